"""Activation checkpointing: the same gradients to the bit, less kept, no recurrence run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.native.build import why_not
from hope.scan import ScanConfig
from train.config import RunConfig
from train.engines import check_kernels
from train.parallel.activations import checkpoint_activations, why_not_compile
from train.section import ConfigError

CONFIG = HopeConfig(
    vocab_size=31,
    dim=32,
    num_layers=3,
    num_heads=2,
    pattern=("titans", "attention", "titans"),
    titans=TitansConfig(scan=ScanConfig(memory_chunk=8, projection_chunk=16)),
    cms=CMSConfig(levels=(LevelConfig(name="a", hidden_size=48),)),
)


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def step(how: Any) -> tuple[dict[str, Tensor], Counter[str], int]:
    """(gradients, operators called, bytes held for backward)."""
    model = HopeModel(CONFIG)
    checkpoint_activations(model, how)
    tokens = torch.randint(0, 31, (2, 65), generator=torch.Generator().manual_seed(0))
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Calls() as calls, saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, _ = model(tokens[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients, calls.counts, sum(held.values())


def test_norm_and_gate_are_computed_again() -> None:
    """Their kernel is cheap; the scan's, beside it, is not run twice."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted")
    scan = ScanConfig(memory_chunk=16, projection_chunk=16, implementation="triton")
    config = replace(CONFIG, pattern=("titans",), num_layers=1, titans=TitansConfig(scan=scan))
    model = HopeModel(config)
    checkpoint_activations(model, "selective")
    with Calls() as calls:
        model(torch.zeros(1, 16, dtype=torch.int64))[0].sum().backward()
    assert (calls.counts["hope::scan_triton"], calls.counts["hope::gated_norm"]) == (1, 2)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_gradients_are_the_same_and_no_scan_runs_twice(how: str) -> None:
    plain, plain_calls, _ = step("none")
    gradients, calls, _ = step(how)
    assert gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    scan = "hope::scan_chunked" if why_not() else "hope::scan_native"
    assert calls[scan] == plain_calls[scan] == 2
    assert calls[f"{scan}_backward"] == 2
    again = calls["aten::mm"] - plain_calls["aten::mm"]
    assert again > 0 if how == "full" else again == 0
    assert calls["aten::silu"] > plain_calls["aten::silu"]


def test_without_a_compiler_compiled_layers_are_refused_in_a_line(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the first step, with a hundred lines of the compiler's own."""
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    config = make_config(**{"parallel.compile": True})
    with pytest.raises(ConfigError) as caught:
        check_kernels(config, torch.device("cpu"))
    assert str(caught.value) == (
        "parallel.compile=true can't be used: torch.compile finds no C++ compiler "
        "(no-such-compiler); install one, name it in CXX, or take compile=false"
    )
    assert not why_not_compile(torch.device("cuda"))
