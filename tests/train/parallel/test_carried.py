"""The carried state of a part of a model: by name, by row, by tensor-parallel rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hope import HopeModel
from hope.state import row_axis
from tests.train.test_cadence import config_with
from train.parallel.carried import Carried, from_rows, named, spec_of, state_of, to_rows
from train.parallel.part import Part, cut_layers

CONFIG = replace(config_with("step"), num_layers=3)
LAYERS = range(1, 3)
CPU = torch.device("cpu")


def carried_by(rows: int) -> Carried:
    """Of the second and third layer; every number another."""
    spec, start, found = spec_of(CONFIG, LAYERS, rows, torch.float32), 0, {}
    for name, one in spec.items():
        count = torch.Size(one.shape).numel()
        found[name] = torch.arange(start, start + count).float().view(one.shape)
        start += count
    return found


def test_names_are_those_of_the_whole_model() -> None:
    carried = carried_by(2)
    assert {name.split(".")[1] for name in carried} == {"1", "2"}
    again = named(state_of(carried, LAYERS), LAYERS)
    assert set(again) == set(carried)
    assert all(torch.equal(again[name], carried[name]) for name in carried)


@pytest.mark.parametrize("size", [1, 2])
def test_rows_of_a_checkpoint_come_back(size: int) -> None:
    """Whichever rows of the batch they are; to each tensor-parallel rank its own heads."""
    carried, rows, spec = carried_by(2), range(3, 5), spec_of(CONFIG, LAYERS, 2, torch.float32)
    saved = to_rows(carried, rows, spec, None)
    by_row = [{n: t for n, t in saved.items() if n.startswith(f"stream/{row}/")} for row in rows]
    assert sum(map(len, by_row)) == len(saved) > 0
    for rank in range(size):
        found = from_rows(by_row, rows, spec, rank, size, CPU)
        assert set(found) == set(carried)
        for name, whole in carried.items():
            axis = spec[name].shard_axis
            own = whole if axis is None else whole.chunk(size, dim=axis)[rank]
            assert torch.equal(found[name], own), name


def test_heads_are_divided_where_they_lie_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has one axis less than the rows, before that of the heads or behind it."""
    shards: list[tuple[Tensor, int]] = []

    def from_local(one: Tensor, _: Any, where: list[Shard], run_check: bool) -> Tensor:
        shards.append((one, where[0].dim))
        return one

    monkeypatch.setattr(DTensor, "from_local", from_local)
    carried, spec = carried_by(2), spec_of(CONFIG, LAYERS, 2, torch.float32)
    mesh: Any = object()
    saved = to_rows(carried, range(2), spec, mesh)
    divided = {id(one): dim for one, dim in shards}
    for path, one in saved.items():
        name = path.split("/")[2]
        axis = spec[name].shard_axis
        assert (id(one) in divided) == (axis is not None)
        if axis is not None:
            heads = list(spec[name].shape)
            heads[axis] = -1
            del heads[spec[name].row_axis]
            assert heads.index(-1) == divided[id(one)]


def test_a_part_takes_up_and_keeps_state_by_row() -> None:
    """As the whole batch at once does; a step of fewer pieces keeps nothing of the one before."""
    torch.manual_seed(0)
    part = Part(HopeModel(CONFIG, seed=0), range(3))
    tokens, rows = torch.randint(0, 50, (4, 8)), torch.arange(4)

    def pass_through(*counts: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits = [part(tokens[own], own) for own in rows.split(list(counts))]
        return torch.cat(logits), part.take_after().named_tensors()

    pass_through(4)
    part.before = None
    _, first = pass_through(1, 3)
    part(tokens[2:], rows[2:])
    part(tokens[:2], rows[:2])
    swapped = part.take_after()
    assert not any(tensor.requires_grad for tensor in first.values())
    part.before = swapped
    whole, after = pass_through(4)
    pieces, also = pass_through(1, 3)
    torch.testing.assert_close(pieces, whole)
    for name, tensor in after.items():
        assert tensor.shape[row_axis(name)] == 4
        torch.testing.assert_close(also[name], tensor)
    for name, tensor in swapped.named_tensors().items():
        torch.testing.assert_close(tensor, first[name])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [range(1), range(1, 2), range(2, 3), range(3)])
def test_what_a_part_of_a_model_holds(layers: range, tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    names = {name for name, _ in cut_layers(config, layers).named_parameters()}
    first, last = layers.start == 0, layers.stop == 3
    assert {int(n.split(".")[1]) for n in names if n.startswith("layers.")} == set(layers)
    assert ("embedding.weight" in names) == (first or (last and tied))
    assert any(name.startswith("norm.") for name in names) == last
    assert ("head.weight" in names) == (last and not tied)
