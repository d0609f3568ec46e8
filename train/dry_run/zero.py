"""How DeepSpeed lays out a rank's parameters, and when its stage 3 has them whole: as data.

Stages 1 and 2 lay every group of parameters in a line, filled up to a multiple of twice the ranks,
and give each rank an equal piece; stage 3 cuts every parameter by itself, into pieces of
ceil(numbers / ranks).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from train.config import RunConfig
from train.engines.deepspeed import parameter_groups
from train.parallel.mesh import Mesh
from train.parallel.part import Part, unused_parameters
from train.zero.cadence import Group
from train.zero.config import settings

DEFAULTS: dict[str, Any] = {
    "contiguous_gradients": True,
    "max_live_parameters": 10**9,
    "max_reuse_distance": 10**9,
    "overlap_comm": None,
    "param_persistence_threshold": 10**5,
    "prefetch_bucket_size": 5 * 10**7,
    "reduce_bucket_size": 5 * 10**8,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
}
"""DeepSpeed's own values of what changes how much it holds and sends, sizes in numbers."""


def buckets_of(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """The values of `DEFAULTS`' keys in a run: a user's file, else DeepSpeed's own."""
    given = settings(config, mesh.layout)["zero_optimization"]
    asked = {key.removeprefix("stage3_"): value for key, value in given.items()}
    return {key: asked.get(key, value) for key, value in DEFAULTS.items()}


@dataclass(frozen=True)
class Lines:
    """A rank's parameters in ZeRO's groups.

    sizes: numbers of each parameter, by name, as this rank computes with them; unused: those that
    no gradient reaches; ranks, rank: the data-parallel ones that divide them.
    """

    groups: list[Group]
    sizes: dict[str, int]
    unused: set[str]
    stage: int
    ranks: int
    rank: int

    @property
    def numbers(self) -> int:
        """Of all parameters."""
        return sum(self.sizes.values())

    @property
    def padded(self) -> int:
        """Numbers of all lines, filled up; in stage 3 of all pieces."""
        return sum(self.shares) * self.ranks

    @property
    def shares(self) -> list[int]:
        """Numbers of each group in this rank's partition."""
        return [self._share(group.names) for group in self.groups]

    def _share(self, names: Sequence[str]) -> int:
        if self.stage == 3:
            return sum(self.piece(name) for name in names)
        return 2 * -(-sum(self.sizes[name] for name in names) // (2 * self.ranks))

    def piece(self, name: str) -> int:
        """Numbers of a parameter on each rank in stage 3, filled up."""
        return -(-self.sizes[name] // self.ranks)

    def fragments(self) -> dict[str, int]:
        """How many numbers of each parameter lie in this rank's partition."""
        if self.stage == 3:
            pieces = {name: self.piece(name) for name in self.sizes}
            rest = {name: self.sizes[name] - self.rank * piece for name, piece in pieces.items()}
            return {name: min(pieces[name], max(0, left)) for name, left in rest.items()}
        found = {}
        for group, share in zip(self.groups, self.shares, strict=True):
            first, last = self.rank * share, (self.rank + 1) * share
            ends = accumulate(self.sizes[name] for name in group.names)
            for name, end in zip(group.names, ends, strict=True):
                begin = end - self.sizes[name]
                found[name] = max(0, min(end, last) - max(begin, first))
        return found

    @property
    def touched(self) -> int:
        """Numbers of the parameters, whole, of which this rank's partition has a part."""
        return sum(self.sizes[name] for name, size in self.fragments().items() if size > 0)


def lines_of(config: RunConfig, mesh: Mesh, part: Part) -> Lines:
    """The lines of a rank whose part of the model is `part`, with plain parameters."""
    parameters = dict(part.model.named_parameters())
    unused = unused_parameters(part.model)
    return Lines(
        groups=parameter_groups(config, parameters, unused),
        sizes={name: parameter.numel() for name, parameter in parameters.items()},
        unused=unused,
        stage=config.deepspeed.zero_stage,
        ranks=mesh.reduce.size,
        rank=mesh.reduce.rank,
    )


def persistent(lines: Lines, buckets: Mapping[str, Any]) -> list[str]:
    """Parameters that stage 3 keeps whole on every rank: the small ones."""
    threshold = buckets["param_persistence_threshold"]
    return [name for name, size in lines.sizes.items() if size <= threshold]


def units_of(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """What stage 3 gathers together, in the order of a forward pass: a layer, or another module."""
    units: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        unit = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
        units.setdefault(unit, {})[name] = size
    return units


@dataclass(frozen=True)
class Gathers:
    """What stage 3 gathers in a forward and backward pass.

    sent: numbers, filled up, of everything that is gathered; alive: the most numbers of it that
    are whole at once.
    """

    sent: int
    alive: int


def gathers(lines: Lines, buckets: Mapping[str, Any]) -> Gathers:
    """DeepSpeed's coordinator, followed through a pass whose order it knows from the one before.

    Each module fetches what it needs and is not there, and then what comes next, as far as
    `prefetch_bucket_size` goes and no more than `max_live_parameters` are whole. Afterwards it lets
    go of its parameters, but for those that come again within `max_reuse_distance` numbers, or
    that a prefetch has counted on.
    """
    small = set(persistent(lines, buckets))
    units = units_of(lines.sizes).values()
    forward = [[name for name in unit if name not in small] for unit in units]
    tied = "embedding.weight" in lines.sizes and "head.weight" not in lines.sizes
    totals = [sum(unit.values()) for unit in units]
    order = [*forward, *reversed(forward)]
    queue = deque((name, step) for step, names in enumerate(order) for name in names)
    expected = dict.fromkeys(lines.sizes, -1)
    there: set[str] = set()
    sent = alive = 0
    for step, names in enumerate(order):
        fetched = [name for name in names if name not in there]
        if tied and step == len(forward) - 1:  # the head, which is no module of its own
            fetched += [name for name in forward[0] if name not in there]
        there.update(fetched)
        for _ in range(sum(expected[name] < step for name in names)):
            name, when = queue.popleft()
            expected[name] = when
        room = buckets["max_live_parameters"] - sum(lines.sizes[name] for name in there)
        room = min(room, buckets["prefetch_bucket_size"])
        coming: list[str] = []
        while queue and sum(lines.sizes[name] for name in coming) < room:
            name, when = queue.popleft()
            if name not in there and name not in coming:
                coming.append(name)
            expected[name] = max(expected[name], when)
        there.update(coming)
        sent += sum(lines.piece(name) for name in fetched + coming) * lines.ranks
        alive = max(alive, sum(lines.sizes[name] for name in there))
        # Layers are looked for among all of them, a single module among its own kind.
        later = sum(totals[step + 1 :]) if step > 0 else 0
        again = step < len(forward) and later < buckets["max_reuse_distance"]
        there.difference_update([n for n in names if not again and expected[n] <= step])
    return Gathers(sent, alive)
