"""How parameters are divided over tensor-parallel ranks: the plan, as data.

Every block says in `shard_plan()` where each of its parameters goes, by the parameter's name; the
layer and the model put the names together, every parameter exactly once. Nothing here knows of
ranks that talk: who follows a plan supplies the collectives (arXiv 1909.08053), which are

    Shard(0) of a linear's weight   column-parallel: whole inputs, this rank's heads or channels out
    Shard(1) of a linear's weight   row-parallel: partial outputs, to be summed over the ranks
    Shard(0) of token vectors, head vocabulary-parallel: this rank's tokens
    Shard of anything else          this rank's heads or channels; nothing to communicate
    Replicate                       acts on whole activations of the residual stream

Heads never meet between a mixer's projections and its output, so fast weights and caches stay on
the rank that owns the head. A replicated parameter's gradient is whole on every rank, unless ranks
divide the sequence between the linears (sequence parallelism): then it is a sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from torch import Tensor

from hope.config import HopeConfig


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the whole parameter."""


@dataclass(frozen=True)
class Shard:
    """Rank r of n holds the r-th of n equal slices along axis `dim`."""

    dim: int


Placement = Replicate | Shard
ShardPlan = dict[str, Placement]


def within(module: str, plan: Mapping[str, Placement]) -> ShardPlan:
    """The plan of a submodule under its name in the parent: `weight` -> `module.weight`."""
    return {f"{module}.{name}": placement for name, placement in plan.items()}


def local_part(tensor: Tensor, placement: Placement, rank: int, size: int) -> Tensor:
    """What rank `rank` of `size` holds of a tensor: a view, the tensor itself when replicated.

    Raises ValueError where the axis can't be divided evenly.
    """
    if isinstance(placement, Replicate):
        return tensor
    length = tensor.shape[placement.dim]
    if length % size:
        raise ValueError(
            f"axis {placement.dim} of {list(tensor.shape)} can't be divided over {size} ranks"
        )
    return tensor.narrow(placement.dim, rank * (length // size), length // size)


def tensor_parallel_sizes(config: HopeConfig) -> tuple[int, ...]:
    """The numbers of ranks that the model's parameters can be divided over, smallest first."""
    common = gcd(*_divided(config).values())
    return tuple(size for size in range(1, common + 1) if common % size == 0)


def check_tensor_parallel(config: HopeConfig, size: int) -> None:
    """Raise ValueError, in one line, when the model can't be divided over `size` ranks."""
    for name, value in _divided(config).items():
        if size < 1 or value % size:
            possible = ", ".join(str(n) for n in tensor_parallel_sizes(config))
            raise ValueError(
                f"tensor parallelism over {size} ranks can't divide {name}={value}; "
                f"this model allows {possible}"
            )


def _divided(config: HopeConfig) -> dict[str, int]:
    """Every number that the plan divides, by its key in the configuration."""
    numbers = {"model.num_heads": config.num_heads}
    for level in config.cms.levels:
        numbers[f"hidden_size of CMS level {level.name!r}"] = level.hidden_size
    if config.vocab_size is not None:
        numbers["model.vocab_size"] = config.vocab_size
    return numbers
