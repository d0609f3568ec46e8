"""Partitions of ZeRO and what their cadence saves and takes up, without DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope.sharding import Replicate
from tests.train.test_nested import nested_with
from train.optim.config import OptimizerConfig
from train.parallel.ranks import Ranks
from train.zero.cadence import Group, Published, ZeroCadence
from train.zero.partitions import Fragment, Partitions

SHAPES = {
    "norm.weight": torch.Size([2, 2]),
    "embedding.weight": torch.Size([3]),
    "layers.0.cms.levels.0.up.weight": torch.Size([4]),
    "layers.0.cms.levels.1.up.weight": torch.Size([4]),
}
PERIODS = (8, 16)
LINES = [list(SHAPES)[:2], list(SHAPES)[2:3], list(SHAPES)[3:]]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda line, group=None: None)


def _address(start: int, numel: int) -> Any:
    return SimpleNamespace(start=start, numel=numel)


def partitions(bfloat16: bool = False) -> Partitions:
    """Of one rank; the first has one number of padding."""
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    flat = []
    for line in LINES:
        start = 0
        for name in line:
            own: Any = named[name]
            size = own.numel()
            own._hp_mapping = SimpleNamespace(
                lp_fragment_address=_address(0, size), hp_fragment_address=_address(start, size)
            )
            start += size
        flat.append(nn.Parameter(torch.arange(float(start + (line is LINES[0])))))
    lines = [[named[name] for name in line] for line in LINES]
    gradients = [torch.ones(sum(p.numel() for p in line)) for line in lines]
    zero = SimpleNamespace(dp_process_group=None, update_lp_params=lambda: None)
    if bfloat16:
        zero.fp32_groups_flat_partition, zero.bf16_groups = flat, lines
        zero.fp32_groups_gradient_flat_partition = [torch.ones_like(one) for one in flat]
    else:
        zero.single_partition_of_fp32_groups, zero.bit16_groups = flat, lines
        zero.averaged_gradients = [[one] for one in gradients]
    return Partitions(zero, named, SHAPES)


def cadence(consumed: list[int]) -> ZeroCadence:
    mesh: Any = SimpleNamespace(
        tp=SimpleNamespace(rank=0, size=1), tensor=None, world=Ranks.alone(), reduce=Ranks.alone()
    )
    plan: Any = {name: Replicate() for name in SHAPES}
    held = Published(partitions(), mesh, 1.0, lambda: consumed.append(1), plan, SHAPES)
    config = nested_with(*PERIODS)
    names = ["fast", *(level.name for level in config.cms.levels)]
    groups = [Group(level, 0.0, line) for level, line in zip(names, LINES, strict=True)]
    return ZeroCadence(groups, config, OptimizerConfig(), held)


def rate(_: str) -> float:
    return 0.1


def saved(one: ZeroCadence) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, plain = one.state_dict()
    return {name: tensor.clone() for name, tensor in tensors.items()}, plain


def test_a_run_in_progress_takes_up_what_was_saved_and_nothing_else() -> None:
    """As one that begins: no moments, accumulators or bounds of before."""
    begun, later = cadence([]), cadence([])
    fresh, plain = saved(begun)
    later.step({"fast"}, 4, rate)
    assert set(saved(later)[0]) > set(fresh)
    later.load_state_dict(fresh, plain)
    assert set(saved(later)[0]) == set(fresh)
    assert all(level.bound is None for level in later.levels)


def test_what_was_saved_comes_back() -> None:
    begun, other = cadence([]), cadence([])
    begun.step({"fast"}, 4, rate)
    tensors, plain = saved(begun)
    other.load_state_dict(tensors, plain)
    again, also = saved(other)
    assert also == plain
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_shares_of_an_accumulator_are_added_up() -> None:
    begun, other = cadence([]), cadence([])
    begun.step({"fast"}, 4, rate)
    tensors, plain = saved(begun)
    (name,) = (n for n in tensors if n.endswith("levels.1.up.weight/accumulated_grad"))
    whole = tensors.pop(name)
    tensors |= {f"{name}.0": whole, f"{name}.1": 2 * whole}
    other.load_state_dict(tensors, plain)
    assert torch.equal(saved(other)[0][name], 3 * whole)


def test_parameters_of_one_partition_have_one_count_of_steps() -> None:
    begun = cadence([])
    begun.step({"fast"}, 4, rate)
    tensors, plain = saved(begun)
    tensors["embedding.weight/step"] += 1
    with pytest.raises(ValueError, match="step is not that of the parameters it lies with"):
        cadence([]).load_state_dict(tensors, plain)


def test_starts_of_parameters_that_other_ranks_have_are_theirs() -> None:
    begun = cadence([])
    tensors, plain = saved(begun)
    other = "layers.1.cms.levels.0.up.weight"
    tensors[f"{other}@start/value"] = torch.zeros(4)
    cadence([]).load_state_dict(tensors, plain, {other})
    with pytest.raises(ValueError, match="unknown parameters"):
        cadence([]).load_state_dict(tensors, plain)


def test_weights_that_a_flush_moved_are_published(monkeypatch: pytest.MonkeyPatch) -> None:
    one = cadence([])
    told: list[int] = []
    monkeypatch.setattr(one.held.partitions, "publish", lambda: told.append(1))
    assert one.flush(rate) is None
    assert not told
    one.step({"fast"}, 4, rate)
    assert one.flush(rate) is not None
    assert told == [1]


def test_a_dropped_step_ends_deepspeeds_and_takes_new_gradients() -> None:
    consumed: list[int] = []
    one = cadence(consumed)
    one.agree()
    one.drop()
    assert consumed == [1]
    assert all(tensor.grad is None for tensor in one._live)
    assert not one._taken


def test_gradients_are_copies() -> None:
    """DeepSpeed's own are used again, while the cadence scales and keeps what it took."""
    for bfloat16 in (False, True):
        some = partitions(bfloat16)
        for gradient in some.gradients():
            gradient.zero_()
        assert all(gradient.any() for gradient in some.gradients())


def test_a_rank_puts_its_fragment_where_it_lies() -> None:
    some = partitions()
    some.fragments["norm.weight"] = Fragment(0, start=1, first=2, size=2)
    line = torch.zeros(8)
    some.put("norm.weight", torch.arange(4.0).view(2, 2), line)
    assert line.tolist() == [0, 2, 3, 0, 0, 0, 0, 0]
    assert some.whole("norm.weight", line).tolist() == [[0, 0], [2, 3]]
    with pytest.raises(ValueError, match=r"norm.weight is \[4\], and \[2, 2\] is needed"):
        some.put("norm.weight", torch.arange(4.0), line)


@pytest.mark.parametrize(
    ("rank", "size", "first"), [(0, 3, 0), (1, 3, 3), (2, 1, 6), (3, 0, 9), (4, 0, 12)]
)
def test_fragments_of_zero_3(
    rank: int, size: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last ranks have less of a parameter, or nothing."""
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    parameter: Any = nn.Parameter(torch.zeros(0))
    parameter.ds_numel = 7
    zero = SimpleNamespace(
        dp_process_group=None,
        fp32_partitioned_groups_flat=[nn.Parameter(torch.zeros(3))] * 2,
        fp16_groups=[[], [parameter]],
        sub_group_to_group_id={0: 0, 1: 0},
        grad_position={5: (1, 0, 3)},
        get_param_id=lambda _: 5,
    )
    some = Partitions(zero, {"a": parameter}, {"a": torch.Size([7])})
    assert some.fragments == {"a": Fragment(1, 0, first, size)}
    assert some.group_of == [0, 0]


def test_what_every_rank_keeps_whole_is_published_too() -> None:
    done: list[Any] = []
    small: Any = SimpleNamespace(
        partition=lambda kept: done.append("partition"), all_gather=lambda kept: done.append("all")
    )
    some = partitions()
    some._stage_3 = True
    some._zero.persistent_parameters = [small]
    some._zero._reassign_or_swap_out_partitioned_parameters = done.append
    some.publish()
    assert done == [0, 1, 2, "partition", "all"]
