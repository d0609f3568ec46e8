"""A training step's forward, loss and backward never wait for the device and move nothing to or
from it, so that a CUDA graph can hold all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline import IGNORE
from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.fused import cross_entropy, gated_norm, loss
from hope.scan import ScanConfig, chunked
from hope.scan import triton as scan_triton
from tests.hope.fused.cases import relative_error
from train.evaluate.perplexity import summed_loss

pytest.importorskip("triton")

WAITS = (
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::repeat_interleave", "aten::lift_fresh",
)  # fmt: skip
"""What needs values on the host, a shape that depends on them, or (the last) what brings numbers
from there: torch.tensor, and a list as an index."""


class NothingWaits(TorchDispatchMode):
    """Fails on those operators and on copies between devices; looks into the bodies of some.

    seen: how often each operator was called.
    """

    def __init__(self, bodies: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.bodies, self.seen = bodies or {}, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        self.seen[name] = self.seen.get(name, 0) + 1
        assert name not in WAITS, f"{name} waits for the device"
        if name.startswith("aten::index"):  # a mask is looked up on the host
            given = args[1] if isinstance(args[1], (list, tuple)) else ()
            assert not any(isinstance(z, Tensor) and z.dtype == torch.bool for z in given), (
                f"{name} with a mask waits for the device"
            )
        tensors = [z for z in args if isinstance(z, Tensor)]
        if name == "aten::_to_copy" and kwargs.get("device") is not None:
            assert kwargs["device"].type == tensors[0].device.type, "a copy between devices"
        if name == "aten::copy_":
            assert len({z.device.type for z in tensors}) == 1, "a copy between devices"
        if name in self.bodies:
            with self:
                return self.bodies[name](*args, **kwargs)
        return func(*args, **kwargs)


def tiny(
    implementation: str, width: int, layers: int = 1, adaptive_query: bool = False
) -> HopeConfig:
    return HopeConfig(
        vocab_size=80,
        dim=width,
        num_layers=layers,
        num_heads=1 if width < 64 else width // 64,
        titans=TitansConfig(
            adaptive_query=adaptive_query,
            scan=ScanConfig(16, 16, implementation=implementation),  # type: ignore
        ),
        cms=CMSConfig(levels=(LevelConfig(name="a", hidden_size=16),)),
    )


OPERATORS = {
    "triton": (
        scan_triton._scan_triton, scan_triton._scan_triton_backward, gated_norm._gated_norm,
        gated_norm._gated_norm_backward, loss._rows, loss._rows_backward,
    ),
    "cuda": (scan_triton._scan_triton, scan_triton._scan_triton_backward),
    "chunked": (chunked._scan_chunked, chunked._scan_chunked_backward),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
@pytest.mark.parametrize("adaptive_query", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("implementation", OPERATORS)
def test_a_step(
    implementation: str, device: str, adaptive_query: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, where nothing has values; and with the operators' bodies in view."""
    monkeypatch.setattr("hope.scan.check_reset", lambda *_: None)  # asserted on a device
    monkeypatch.setattr("hope.scan.cuda.device.why_not", lambda *_: "")
    monkeypatch.setattr("hope.scan.cuda.device.launch", lambda *_: None)  # nothing can wait in it
    model = HopeModel(tiny(implementation, 16, adaptive_query=adaptive_query)).to(device)
    tokens = torch.zeros(2, 32, dtype=torch.int64, device=device)
    starts = torch.zeros(2, 32, dtype=torch.bool, device=device)
    bodies = {one._qualname: one._init_fn for one in OPERATORS[implementation]}
    kernels = "triton" if implementation == "triton" else "torch"
    with NothingWaits(bodies if device == "cpu" else None) as mode:
        logits, _ = model(tokens, None, starts)
        cross_entropy(logits.flatten(0, 1), tokens.flatten(), IGNORE, kernels).backward()
    assert {name: mode.seen.get(name) for name in bodies} == dict.fromkeys(bodies, 1)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_waits_is_found() -> None:
    x = torch.ones(3)
    calls = (lambda: float(x.sum()), lambda: x[x > 0], x.nonzero, lambda: x.to("meta"))
    for call in (*calls, lambda: x[[0, 2]], lambda: torch.tensor([1.0])):
        with pytest.raises(AssertionError, match=r"waits|between devices"), NothingWaits():
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("triton", torch.float32), ("triton", torch.bfloat16), ("cuda", torch.bfloat16)],
    ids=["triton-float32", "triton-bfloat16", "cuda-bfloat16"],
)
@pytest.mark.parametrize("documents", [False, True])
def test_a_step_as_a_cuda_graph(documents: bool, implementation: str, dtype: torch.dtype) -> None:
    """Captured once and replayed on other tokens: the loss and gradients of an eager step."""
    model = HopeModel(tiny(implementation, 128, layers=2)).to("cuda", dtype)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(0, 80, (2, 2, 65), generator=generator).cuda() for _ in range(2)]
    tokens, labels = draws[0][0][:, :-1].clone(), draws[0][0][:, 1:].clone()
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[1, 32] = True

    def step() -> Tensor:
        logits, _ = model(tokens, None, starts if documents else None)
        total = summed_loss(logits, labels)
        total.backward()
        return total.detach()

    def results(call: Callable[[], Any], total: Tensor | None = None) -> list[Tensor]:
        found = call()
        kept = [found if total is None else total, *(p.grad for p in model.parameters())]
        return [z.clone() for z in kept]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tokens.copy_(draws[1][0][:, :-1])
    labels.copy_(draws[1][0][:, 1:])
    replayed = results(graph.replay, captured)
    model.zero_grad(set_to_none=True)
    for actual, expected in zip(replayed, results(step), strict=True):
        assert relative_error(actual, expected) < (1e-5 if dtype == torch.float32 else 2e-2)
