"""Both reduction policies, on any number of ranks, against one process; and engines that shard."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.scan import ScanConfig
from tools.processes import run
from train.clock import TokenClock
from train.optim.build import build_cadence
from train.optim.cadence import Cadence
from train.optim.config import LevelOptimizerConfig, OptimizerConfig
from train.optim.levels import periods
from train.parallel import reduction
from train.parallel.ranks import Ranks
from train.parallel.reduction import GradientReduction

ROWS, LENGTH = 12, 16
STEP = ROWS * LENGTH
LR = 0.003

Saved = tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Any]]


def model_config(mode: str, dim: int = 16, hidden: int = 9) -> HopeConfig:
    """Four levels; sizes that three ranks do not divide evenly."""
    every: tuple[Any, ...] = ("step", STEP - 7, 3 * STEP + 5, 5 * STEP)
    if mode == "nested":
        every = ("step", STEP, 2 * STEP, 6 * STEP)
    levels = tuple(
        LevelConfig(name=f"l{i}", hidden_size=hidden, update_every_tokens=period)
        for i, period in enumerate(every)
    )
    return HopeConfig(
        vocab_size=31,
        dim=dim,
        num_layers=1,
        num_heads=2,
        titans=TitansConfig(scan=ScanConfig(memory_chunk=4, projection_chunk=8)),
        cms=CMSConfig(levels=levels, mode=mode),  # type: ignore[arg-type]
    )


def optimizer_config(policies: dict[str, str]) -> OptimizerConfig:
    levels = {name: LevelOptimizerConfig(reduce=value) for name, value in policies.items()}  # type: ignore[arg-type]
    return OptimizerConfig(lr=LR, clip_norm=0.5, levels=levels)


def backward(model: nn.Module, step: int, rank: int, size: int) -> None:
    """Add the summed-loss gradient of this rank's rows of the step's batch."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 31, (ROWS, LENGTH + 1), generator=generator)
    tokens = tokens[rank * ROWS // size : (rank + 1) * ROWS // size]
    logits, _ = model(tokens[:, :-1])
    cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()


def steps(
    model: nn.Module, cadence: Cadence, clock: TokenClock, count: int, ranks: Ranks
) -> list[dict[str, float]]:
    """Train `count` steps; the norms of what fired in each."""
    norms = []
    for step in range(clock.steps, clock.steps + count):
        backward(model, step, ranks.rank, ranks.size)
        report = cadence.step(clock.advance(STEP), STEP, lambda _: LR, clock.tokens)
        norms.append({**report.level_norms, "all": report.grad_norm})
    return norms


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(
    rank: int, mode: str, policies: dict[str, str], count: int, saved: Saved | None = None
) -> tuple[list[dict[str, float]], Saved]:
    """Train from the start, or go on from `saved`; the norms, and everything a checkpoint holds."""
    config = model_config(mode)
    model = HopeModel(config)
    ranks = Ranks()
    cadence = build_cadence(model, config, optimizer_config(policies), ranks)
    clock = TokenClock(periods(config))
    if saved is not None:
        parameters, clock_state, tensors, plain = saved
        model.load_state_dict(parameters)
        clock.load_state_dict(clock_state)
        cadence.load_state_dict(tensors, plain)
    norms = steps(model, cadence, clock, count, ranks)
    tensors, plain = cadence.state_dict()
    tensors = {name: whole(tensor).clone() for name, tensor in tensors.items()}
    parameters = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return norms, (parameters, clock.state_dict(), tensors, plain)


def alone(mode: str, count: int) -> tuple[list[dict[str, float]], Saved]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")
        return trained(0, mode, {}, count)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=2e-6, msg=name)


def merged(results: list[tuple[Any, Saved]]) -> Saved:
    """What a checkpoint of all ranks holds."""
    parameters, clock, _, plain = results[0][1]
    tensors: dict[str, Tensor] = {}
    for _, (_, _, own, _) in results:
        tensors |= own
    return parameters, clock, tensors, plain


SCATTER = {"l1": "every_step", "l2": "every_step", "l3": "every_step"}
UPDATE = {"l1": "at_update", "l2": "at_update", "l3": "at_update"}
MIXED = {"fast": "at_update", "l1": "every_step", "l2": "at_update", "l3": "every_step"}
LAYOUTS = [
    ("sequential", 2, SCATTER),
    ("sequential", 2, UPDATE),
    ("sequential", 3, SCATTER),
    ("sequential", 3, UPDATE),
    ("sequential", 5, MIXED),
    ("independent", 2, MIXED),
    ("nested", 2, SCATTER),
    ("nested", 3, UPDATE),
    ("nested", 3, MIXED),
]


@pytest.mark.parametrize(("mode", "size", "policies"), LAYOUTS)
def test_ranks_follow_one_process(mode: str, size: int, policies: dict[str, str]) -> None:
    """Norms of every firing, parameters, and moments, over firings of every level."""
    expected, (parameters, clock, _, _) = alone(mode, 11)
    assert min(clock["firings"].values()) >= 1
    results = run(size, trained, mode, policies, 11)
    for norms, saved in results:
        for one, other in zip(norms, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        assert_close(saved[0], parameters)
    first = results[0][1][0]
    for _, saved in results[1:]:
        assert all(torch.equal(saved[0][name], first[name]) for name in first)


RESUMES = [
    ("sequential", (2, UPDATE), (2, UPDATE), True),
    ("sequential", (3, SCATTER), (3, SCATTER), True),
    ("nested", (2, MIXED), (2, MIXED), True),
    ("sequential", (2, UPDATE), (3, UPDATE), False),
    ("sequential", (3, UPDATE), (2, SCATTER), False),
    ("sequential", (2, SCATTER), (3, UPDATE), False),
    ("nested", (3, MIXED), (2, UPDATE), False),
    ("sequential", (2, UPDATE), (1, SCATTER), False),
    ("nested", (1, SCATTER), (2, UPDATE), False),
]


@pytest.mark.parametrize(("mode", "before", "after", "exact"), RESUMES)
def test_a_stop_inside_a_period(mode: str, before: Any, after: Any, exact: bool) -> None:
    """To the bit on the same ranks; on others, or with the other policy, to round-off."""
    stopped = merged(run(before[0], trained, mode, before[1], 4))
    assert any("accumulated_grad" in name for name in stopped[2])
    resumed = run(after[0], trained, mode, after[1], 8, stopped)[0][1][0]
    if exact:
        straight = run(before[0], trained, mode, before[1], 12)[0][1][0]
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    else:
        assert_close(resumed, alone(mode, 12)[1][0])


def sums_both_ways(rank: int, seed: int, bucket: int) -> None:
    """scatter then gather, and add, against a sum made of everyone's tensors."""
    patch = pytest.MonkeyPatch()
    patch.setattr(reduction, "BUCKET_ELEMENTS", bucket)
    rng = random.Random(seed)
    ranks = Ranks()
    reduce = GradientReduction(ranks)
    kinds = [torch.float32, torch.float64, torch.bfloat16]
    shapes = [
        (tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 3))), rng.choice(kinds))
        for _ in range(9)
    ]
    everyone = [
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(100 * r + i)).to(kind)
            for i, (shape, kind) in enumerate(shapes)
        ]
        for r in range(ranks.size)
    ]
    exact = [torch.stack([t.double() for t in part]).sum(0) for part in zip(*everyone, strict=True)]
    shares = reduce.scatter(everyone[rank])
    gathered = reduce.gather(shares, [tensor.shape for tensor in everyone[rank]])
    for found, expected, (_, kind) in zip(gathered, exact, shapes, strict=True):
        wanted = torch.float64 if kind == torch.float64 else torch.float32
        assert found.dtype == wanted
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for share, expected in zip(shares, exact, strict=True):
        own = reduce.share(expected.to(share.dtype))
        torch.testing.assert_close(share, own, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            whole(reduce.as_dtensor(share, expected.shape)).double(),
            expected,
            rtol=1e-6,
            atol=1e-6,
        )
    reduce.add(everyone[rank])
    for found, expected, (_, kind) in zip(everyone[rank], exact, shapes, strict=True):
        assert found.dtype == kind
        tolerance = 1e-2 if kind == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_sums_of_any_shape(seed: int) -> None:
    run(2 + seed, sums_both_ways, seed, 10 * (seed + 1))


def sharded(rank: int, mode: str, count: int) -> dict[str, Tensor]:
    """FSDP2 over all ranks: parameters, moments and accumulators are its DTensors."""
    config = model_config(mode)
    model = HopeModel(config)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    for module in (*model.layers, model):
        module.set_gradient_divide_factor(1.0)  # sums, as everywhere here
        module.set_force_sum_reduction_for_comms(True)
    ranks = Ranks()
    cadence = build_cadence(model, config, optimizer_config(SCATTER), ranks)
    clock = TokenClock(periods(config))
    for half in (count // 2, count - count // 2):
        steps(model, cadence, clock, half, ranks)
        tensors, plain = cadence.state_dict()
        pending = [tensor for name, tensor in tensors.items() if "accumulated_grad" in name]
        assert all(isinstance(tensor, DTensor) for tensor in pending)
        tensors = {name: whole(tensor).clone() for name, tensor in tensors.items()}
        cadence = build_cadence(model, config, optimizer_config(SCATTER), ranks)
        cadence.load_state_dict(tensors, plain)
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("mode", "size"), [("sequential", 2), ("sequential", 3), ("nested", 2)])
def test_the_cadence_needs_nothing_special_under_fsdp2(mode: str, size: int) -> None:
    """Saved and taken up again in the middle, too."""
    found = run(size, sharded, mode, 11)[0]
    assert_close(found, alone(mode, 11)[1][0])


def without_writes(rank: int, optimizer: OptimizerConfig) -> dict[str, Tensor]:
    config = model_config("sequential")
    config = HopeConfig(
        **{**vars(config), "titans": TitansConfig(writes=False, scan=config.titans.scan)}
    )
    model = HopeModel(config)
    ranks = Ranks()
    cadence = build_cadence(model, config, optimizer, ranks)
    steps(model, cadence, TokenClock(periods(config)), 3, ranks)
    return dict(model.state_dict())


def test_parameters_without_a_gradient_stand_still_on_any_number_of_ranks() -> None:
    """Weight decay is part of a step, and a parameter that nothing looks at takes none."""
    decaying = OptimizerConfig(lr=LR, weight_decay=50.0)
    fresh = HopeModel(model_config("sequential")).state_dict()
    found = run(2, without_writes, decaying)[0]
    idle = [name for name, value in found.items() if torch.equal(value, fresh[name])]
    assert any("x_in" in name for name in idle)
    assert len(idle) < len(found) / 2
    one = run(1, without_writes, decaying)[0]
    assert_close(found, one)
