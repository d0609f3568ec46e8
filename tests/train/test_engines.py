"""What computes gradients, beside its parity with one process (tests/distributed/)."""

from __future__ import annotations

import gc
import weakref
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from hope import HopeModel
from tools.parity import ROWS, deepspeed_config, make_batch, make_config
from tools.processes import run
from train.config import RunConfig
from train.engines import deepspeed, open_engine
from train.engines.deepspeed import part_of
from train.parallel.mesh import alone
from train.parallel.ranks import Ranks


def test_a_held_out_batch_begins_afresh_whatever_was_carried() -> None:
    engine = open_engine(make_config("hope"), Ranks.alone())
    held_out = make_batch(999, 0, ROWS)
    expected = engine.held_out(held_out)
    _, carried = engine.forward_backward(make_batch(0, 0, ROWS), None)
    engine.forward_backward(make_batch(1, 0, ROWS), carried)
    assert engine.held_out(held_out) == expected


@pytest.mark.parametrize("carry", ["none", "stream"])
def test_states_that_nothing_carries_are_not_kept(
    carry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model's are hundreds of megabytes a row: those of one micro-batch are gone when the
    next begins, and an evaluation keeps none in any case."""
    config = make_config("hope", {"micro_batches": 4}, **{"training.state_carry": carry})
    engine = open_engine(config, Ranks.alone())
    alive: list[int] = []
    states: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    transform = HopeModel.transform

    def watched(model: HopeModel, *inputs: Any) -> Any:
        gc.collect()
        alive.append(len(states))
        x, after = transform(model, *inputs)
        after = after.map(lambda _, z: z.clone())
        states.update(z.untyped_storage() for z in after.named_tensors().values())
        return x, after

    monkeypatch.setattr(HopeModel, "transform", watched)
    engine.forward_backward(make_batch(0, 0, ROWS), None)
    assert [bool(count) for count in alive] == [False, *[carry == "stream"] * 3]
    gc.collect()
    assert not states
    engine.held_out(make_batch(0, 0, ROWS))
    gc.collect()
    assert not states


def begun(
    rank: int, configs: list[RunConfig], initial: list[dict[str, Tensor] | None]
) -> list[dict[str, Tensor]]:
    """What engines that begin with these would save."""
    gc.freeze()  # DeepSpeed collects garbage twenty times an engine: modules are much to look at
    pairs = product(configs, initial)
    return [open_engine(config, Ranks(), one).saved_parameters() for config, one in pairs]


def test_zero_begins_with_what_it_is_given_and_rounds_nothing() -> None:
    """With parallel.precision=bf16 DeepSpeed makes its partitions of rounded parameters."""
    configs = [deepspeed_config("transformer", 1, {"precision": one}) for one in ("fp32", "bf16")]
    model = HopeModel(configs[0].model, seed=configs[0].seed)
    drawn = {name: p.detach() for name, p in model.named_parameters()}
    given = {name: torch.rand_like(one) for name, one in drawn.items()}
    (found,) = run(1, begun, configs, [None, given])
    for one, expected in zip(found, 2 * (drawn, given), strict=True):
        assert one.keys() == expected.keys()
        assert all(torch.equal(one[name], expected[name]) for name in expected)


def test_a_part_under_deepspeed_is_recomputed_and_compiled_as_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(deepspeed, "checkpoint_activations", lambda _, how: calls.append(how))
    monkeypatch.setattr(deepspeed, "compile_layers", lambda _: calls.append("compile"))
    for wanted in ({"activation_checkpointing": "full"}, {"compile": True}):
        config = deepspeed_config("hope", 1, wanted)
        part_of(config, alone(), range(config.model.num_layers))
    assert calls == ["full", "none", "compile"]
