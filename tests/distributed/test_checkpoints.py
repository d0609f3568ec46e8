"""Saved by any ranks and mesh, loaded by any others: always the tensors that they were."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    zeros,
)

from tools.parity import STEP, alone, make_config, take_up
from tools.processes import run
from train.checkpoint import CheckpointError, CheckpointStore
from train.checkpoint.manifest import damage, read_manifest
from train.checkpoint.reading import TensorReader
from train.engines import open_engine
from train.parallel.placement import fill
from train.parallel.ranks import Ranks

Layout = tuple[tuple[int, ...], list[Any]]

SHAPES: dict[str, tuple[int, ...]] = {
    "model/layers.0.w": (7, 10),
    "model/layers.0.cms.levels.0.up.weight": (5, 6),
    "optimizer/layers.0.cms.levels.0.up.weight/exp_avg": (5, 6),
    "optimizer/layers.0.cms.levels.0.up.weight/accumulated_grad": (5, 6),
    "model/stack": (4, 3, 5),
    "model/short": (1, 8),
    "model/scale": (6,),
    "model/empty": (0, 3),
}


def content() -> dict[str, Tensor]:
    """Every element another number."""
    found, first = {}, 0
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        found[name] = torch.arange(first, first + count, dtype=torch.float32).reshape(shape)
        first += count
    return found


def placed(tensor: Tensor, mesh: Any, where: list[Any]) -> Tensor:
    """A DTensor; where a tensor lacks a dimension to shard, it is replicated."""
    fitting = [
        one if not isinstance(one, Shard) or one.dim < tensor.dim() else Replicate()
        for one in where
    ]
    return distribute_tensor(tensor, mesh, fitting)


def save(rank: int, folder: str, layout: Layout, asynchronous: bool) -> dict[str, Any]:
    """DTensors, one plain tensor on all ranks, and one of each rank's own."""
    shape, where = layout
    mesh = init_device_mesh("cpu", shape)
    tensors = {name: placed(tensor, mesh, where) for name, tensor in content().items()}
    tensors["model/plain"] = torch.arange(9.0)
    tensors[f"stream/{rank}/w1"] = torch.full((3,), float(rank))
    store = CheckpointStore(folder, Ranks(), asynchronous=asynchronous)
    for clock in (1, 2, 3):
        store.save(clock, tensors, {"clock": clock})
        store.finish()
    store.close()
    return store.report


def load(rank: int, folder: str, layout: Layout, rows: int) -> None:
    """Into DTensors of zeros, and whole."""
    shape, where = layout
    mesh = init_device_mesh("cpu", shape)
    store = CheckpointStore(folder, Ranks())
    newest = store.newest()
    assert newest.name == "tokens-000000000000003"
    expected = content()
    targets = {n: placed(torch.zeros_like(tensor), mesh, where) for n, tensor in expected.items()}
    targets["model/plain"] = torch.zeros(9)
    stored = store.reader(newest).all_stored()
    for name, target in targets.items():
        fill(target, stored[name])
    assert torch.equal(targets.pop("model/plain"), torch.arange(9.0))
    for name, target in targets.items():
        assert isinstance(target, DTensor)
        assert torch.equal(target.full_tensor(), expected[name]), name
    whole = store.tensors(newest)
    for name, tensor in expected.items():
        assert torch.equal(whole[name], tensor), name
    assert all(whole[f"stream/{row}/w1"].eq(row).all() for row in range(rows))


LAYOUTS: list[Layout] = [
    ((1,), [Shard(0)]),
    ((2,), [Shard(0)]),
    ((3,), [Shard(0)]),
    ((2,), [Shard(1)]),
    ((2,), [Replicate()]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Shard(0), Shard(0)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(1), Replicate()]),
]


def ranks_of(layout: Layout) -> int:
    return torch.Size(layout[0]).numel()


PAIRS = list(zip(LAYOUTS, [*LAYOUTS[4:], *LAYOUTS[:4]], strict=True))


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_any_layout_to_any_other(saved: Layout, loaded: Layout, tmp_path: Path) -> None:
    asynchronous = PAIRS.index((saved, loaded)) % 2 == 1
    report = run(ranks_of(saved), save, str(tmp_path), saved, asynchronous)[0]
    newest = sorted(tmp_path.glob("tokens-*"))[-1]
    assert damage(newest) is None
    # Nothing moved between the saves; and no tensor is written twice.
    assert report["written"] == 0
    manifest = read_manifest(newest)
    sizes = {len(entry.pieces) for entry in manifest.tensors.values()}
    assert max(sizes) <= ranks_of(saved)
    run(ranks_of(loaded), load, str(tmp_path), loaded, ranks_of(saved))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_layouts(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)

    def draw() -> Layout:
        shape = rng.choice([(2,), (3,), (4,), (2, 2), (1, 3), (4, 1)])
        return shape, [rng.choice([Shard(0), Shard(1), Shard(2), Replicate()]) for _ in shape]

    saved = draw()
    run(ranks_of(saved), save, str(tmp_path), saved, bool(seed % 2))
    for loaded in (draw(), draw()):
        run(ranks_of(loaded), load, str(tmp_path), loaded, ranks_of(saved))


def fsdp(rank: int, folder: str) -> None:
    """FSDP2 of a layer that is sharded in two dimensions: into its own parameters."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = torch.nn.Linear(5, 7, bias=False)
    weight = distribute_tensor(torch.arange(35.0).reshape(7, 5), mesh["tp"], [Shard(0)])
    layer.weight = torch.nn.Parameter(weight)
    fully_shard(layer, mesh=mesh["dp"])
    store = CheckpointStore(folder, Ranks())
    store.save(1, {"model/weight": layer.weight.detach()}, {})
    with torch.no_grad():
        layer.weight.zero_()
    fill(layer.weight.detach(), store.reader(store.newest()).all_stored()["model/weight"])
    assert torch.equal(layer.weight.full_tensor(), torch.arange(35.0).reshape(7, 5))
    assert torch.equal(
        store.tensors(store.newest())["model/weight"], torch.arange(35.0).reshape(7, 5)
    )


def test_fsdp_over_tensor_parallel(tmp_path: Path) -> None:
    run(4, fsdp, str(tmp_path))


def disagree(rank: int, folder: str) -> list[str]:
    """What does not fit together is refused on every rank, before a file is written."""
    store = CheckpointStore(folder, Ranks())
    mesh = init_device_mesh("cpu", (2,))
    cases: list[dict[str, Tensor]] = [
        {"model/w": torch.zeros(2 + rank)},
        {"model/w": torch.zeros(2, dtype=torch.float64 if rank else torch.float32)},
        {"model/w": zeros(3, device_mesh=mesh, placements=[Partial()])},
        {"model/w": zeros(4, device_mesh=mesh, placements=[Shard(0)])} if rank else {},
    ]
    messages = []
    for case in cases:
        again = []
        for _ in range(2):  # what was refused is so the next time
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                store.save(1, case, {})
            again.append(str(caught.value))
        assert again[0] == again[1]
        messages.append(again[0])
    with pytest.raises(CheckpointError, match="there is none"):
        store.newest()
    return messages


def test_tensors_that_do_not_fit_together(tmp_path: Path) -> None:
    for messages in run(2, disagree, str(tmp_path)):
        assert messages[0] == messages[1] == "model/w is not the same tensor on all ranks"
        assert "Partial placement" in messages[2]
        assert messages[3] == "the ranks have 2 of the 4 values of model/w"


def fail_on_one_rank(rank: int, folder: str, asynchronous: bool) -> list[str]:
    """The second rank can't write: all ranks hear of it, and the next save works."""
    store = CheckpointStore(folder, Ranks(), asynchronous=asynchronous)
    tensors = {f"model/{rank}": torch.full((4,), float(rank))}
    store.save(1, tensors, {})
    store.finish()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if rank == 1 and asynchronous:
            store._writer._process.kill()  # type: ignore[attr-defined]
            store._writer._send = _refuse  # type: ignore[attr-defined]
        elif rank == 1:
            store._writer.start = lambda save: _refuse_part(store)  # type: ignore[method-assign]
        store.save(2, tensors, {})
        assert store.wait() is None
        assert store.failure is not None
    assert store.newest().name.endswith("1")
    store._writer.__dict__.pop("_send", None)
    store._writer.__dict__.pop("start", None)
    store.save(3, tensors, {})
    store.finish()
    assert store.tensors(store.newest()).keys() == {"model/0", "model/1"}
    store.close()
    return [str(one.message) for one in caught]


def _refuse(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def _refuse_part(store: CheckpointStore) -> None:
    store._writer._part = {"error": "OSError: No space left on device"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_can_not_write(tmp_path: Path, asynchronous: bool) -> None:
    first, second = run(2, fail_on_one_rank, str(tmp_path), asynchronous)
    assert len(first) == 1
    assert "tokens-000000000000002: rank 1: OSError: No space left on device" in first[0]
    assert second == []  # one line, not one a rank
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"tokens-00000000000000{n}" for n in (1, 3)
    ]


def find_damage(rank: int, folder: str) -> str:
    return CheckpointStore(folder, Ranks()).newest().name


def test_all_ranks_agree_on_the_newest_that_verifies(tmp_path: Path) -> None:
    """Each looks at its share of the files; any rank's finding counts for all."""
    run(2, save, str(tmp_path), LAYOUTS[1], False)
    newest = sorted(tmp_path.glob("tokens-*"))[-1]
    victims = [path for path in newest.iterdir() if path.stat().st_nlink == 1]
    assert len(victims) > 1
    for path in victims:
        content = path.read_bytes()
        path.write_bytes(content[:-2])
        assert set(run(2, find_damage, str(tmp_path))) == {"tokens-000000000000002"}, path.name
        path.write_bytes(content)
    assert set(run(2, find_damage, str(tmp_path))) == {newest.name}


def bytes_read(rank: int, folder: str, parallel: dict[str, Any]) -> tuple[int, int]:
    """(bytes of tensors that a rank read to take up a checkpoint, bytes that it holds)."""
    ranks = Ranks()
    engine = open_engine(make_config("hope", parallel), ranks)
    cadence = engine.make_cadence()
    store = CheckpointStore(folder, ranks)
    if not store.complete():
        for parameter in engine.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        cadence.step({"fast", "a", "b"}, STEP, lambda _: 0.0)  # c accumulates
        optimizer, plain = cadence.state_dict()
        tensors = {f"model/{name}": one for name, one in engine.saved_parameters().items()}
        store.save(
            1, tensors | {f"optimizer/{name}": one for name, one in optimizer.items()}, plain
        )
    newest, lengths = store.newest(), list[int]()
    read = TensorReader._read

    def counted(self: Any, piece: Any, entry: Any, start: int, length: int) -> Tensor:
        lengths.append(length)
        return read(self, piece, entry, start, length)

    elsewhere = alone("hope").parameters.keys() - engine.parameters.keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorReader, "_read", counted)
        take_up(engine, cadence, store, newest, set(elsewhere))
    kept, _ = cadence.state_dict()
    held = [*engine.saved_parameters().values(), *kept.values()]
    local = [one.to_local() if isinstance(one, DTensor) else one for one in held]
    return sum(lengths), sum(one.nbytes for one in local)


@pytest.mark.parametrize(
    "parallel",
    [{"dp_replicate": 1, "dp_shard": 2}, {"tp": 2}, {"pp": 2, "micro_batches": 2}],
    ids=["fsdp", "tp", "pp"],
)
def test_a_rank_reads_what_it_holds_and_no_more(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """Rows of a piece that is cut by columns are read whole: at most twice as much."""
    (everything, _), *_ = run(1, bytes_read, str(tmp_path), {})
    for read, held in run(2, bytes_read, str(tmp_path), parallel):
        assert held <= read <= (1.6 if "tp" in parallel else 1.0) * held
        assert read < 0.85 * everything
