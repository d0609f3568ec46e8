"""The cadence over ZeRO's partitions: the levels' parameters are flat pieces of this rank.

Everything that counts is `Cadence`'s: sums over tokens, accumulators, norms, clipping, firing. What
is added here: where gradients come from (DeepSpeed has reduced and averaged them), how the weights
get back to where they compute, and that checkpoints speak of whole parameters by name.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as OnEvery
from torch.distributed.tensor import Shard as Divided

from hope.config import HopeConfig
from hope.sharding import Placement, Replicate, Shard, local_part
from train.optim.build import elementwise
from train.optim.cadence import ACCUMULATOR, VALUE, Cadence, StepReport
from train.optim.config import OptimizerConfig
from train.optim.finite import NonFinite
from train.optim.level import START, Level
from train.optim.levels import periods, reset_by
from train.optim.norms import Norms, norm_of_each
from train.parallel.mesh import Mesh
from train.parallel.placement import Stored, in_memory
from train.parallel.ranks import Ranks
from train.parallel.reduction import GradientReduction
from train.zero.partitions import Partitions


@dataclass(frozen=True)
class Group:
    """Parameters that share a level and a weight decay, by name: one group of DeepSpeed's."""

    level: str
    weight_decay: float
    names: list[str]


@dataclass
class Published:
    """What a cadence does with DeepSpeed.

    factor: from DeepSpeed's averages to sums over tokens. consume: end DeepSpeed's step, which
    forgets its gradients and lets every rank compute with the partitions. plan: where tensor
    parallelism puts each parameter; shapes: of whole parameters. summed: parameters whose gradient
    each tensor-parallel rank has a part of; elsewhere: parameters that another stage speaks for.
    """

    partitions: Partitions
    mesh: Mesh
    factor: float
    consume: Callable[[], None]
    plan: dict[str, Placement]
    shapes: dict[str, torch.Size]
    summed: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)

    def gradients(self) -> list[Tensor]:
        """Of every partition the sum over all tokens."""
        found = [gradient.mul_(self.factor) for gradient in self.partitions.gradients()]
        if self.summed:
            assert self.mesh.tensor is not None
            parts = [
                found[one.partition][one.start : one.start + one.size]
                for name, one in sorted(self.partitions.fragments.items())
                if name in self.summed
            ]
            line = torch.cat(parts)
            dist.all_reduce(line, group=self.mesh.tensor.get_group())
            for part, summed in zip(parts, line.split([p.numel() for p in parts]), strict=True):
                part.copy_(summed)
        return found

    def own(self, name: str, whole: Tensor) -> Tensor:
        """What this rank computes with of a whole parameter."""
        tp = self.mesh.tp
        return local_part(whole, self.plan[name], tp.rank, tp.size)

    def saved(self, name: str, partition: Tensor) -> Tensor:
        """A parameter, or a state of its optimizer, as a checkpoint takes it."""
        own = self.partitions.whole(name, partition)
        mesh, shape = self.mesh.tensor, self.shapes[name]
        if mesh is None:
            return self._rows.as_dtensor(self._rows.share(own), shape)
        placement = self.plan[name]
        where = Divided(placement.dim) if isinstance(placement, Shard) else OnEvery()
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own, mesh, [where], run_check=False, shape=shape, stride=stride)

    @cached_property
    def _rows(self) -> GradientReduction:
        """Gives each rank its rows of what was whole for a moment."""
        return GradientReduction(self.mesh.reduce)

    def runs(self) -> list[list[slice]]:
        """Of every partition what this rank speaks for in norms."""
        found: list[list[slice]] = []
        for index in range(len(self.partitions.tensors)):
            places = sorted(
                (one.start, one.start + one.size)
                for name, one in self.partitions.fragments.items()
                if one.partition == index and one.size > 0 and self._speaks(name)
            )
            cuts = [n for n, ((_, end), (begin, _)) in enumerate(pairwise(places)) if end != begin]
            firsts, lasts = [0, *(n + 1 for n in cuts)], [*cuts, len(places) - 1]
            pairs = zip(firsts, lasts, strict=True) if places else ()
            found.append([slice(places[a][0], places[b][1]) for a, b in pairs])
        return found

    def _speaks(self, name: str) -> bool:
        replicated = isinstance(self.plan[name], Replicate)
        return name not in self.elsewhere and not (replicated and self.mesh.tp.rank > 0)


class PartitionNorms(Norms):
    """Norms over partitions: every rank of the job speaks for some of their numbers."""

    def __init__(self, world: Ranks, runs: dict[nn.Parameter, list[slice]]) -> None:
        super().__init__()
        self._world, self._runs = world, runs

    def of(self, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """The norm of what this rank speaks for, of each that has a gradient."""
        found = {}
        for parameter in parameters:
            grad = parameter.grad
            if grad is not None:
                parts = [grad[run] for run in self._runs[parameter]] or [grad[:0]]
                found[parameter] = norm_of_each([torch.stack(norm_of_each(parts))])[0]
        return found

    def total(self, norms: dict[nn.Parameter, Tensor]) -> float:
        """The norm of everything, the same on all ranks; a collective call of all of them."""
        squares = float(torch.stack(list(norms.values())).double().square().sum()) if norms else 0.0
        return float(self._world.sum([squares])[0] ** 0.5)


class ZeroCadence(Cadence):
    """`Cadence` where DeepSpeed holds parameters and reduces gradients. The same trajectory, to
    float32's last bits, and the same checkpoints."""

    def __init__(
        self, groups: Sequence[Group], model: HopeConfig, config: OptimizerConfig, held: Published
    ) -> None:
        self.held, self._taken = held, False
        tensors, numbers = held.partitions.tensors, held.partitions.group_of
        runs = dict(zip(tensors, held.runs(), strict=True))
        slower = reset_by(model)
        levels = []
        for name in periods(model):
            own = {
                f"{name}.{index}": (tensor, groups[number].weight_decay)
                for index, (tensor, number) in enumerate(zip(tensors, numbers, strict=True))
                if groups[number].level == name
            }
            level = _level(name, name, own, config)
            if name in slower:
                copies = {}
                for key, (tensor, decay) in own.items():
                    copy = nn.Parameter(tensor.detach().clone())
                    copies[key + START], runs[copy] = (copy, decay), runs[tensor]
                level.start = _level(name, name + START, copies, config)
                level.reset_by = slower[name]
            levels.append(level)
        mesh = held.mesh
        super().__init__(
            levels,
            tensors,
            config.clip_norm,
            GradientReduction(Ranks.alone(), mesh.world),
            PartitionNorms(mesh.world, runs),
        )

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """As `Cadence.gradients`, of those that DeepSpeed has reduced; a collective call."""
        if not self._taken:
            for tensor, gradient in zip(self._live, self.held.gradients(), strict=True):
                tensor.grad = gradient
            self._taken = True
        return super().gradients()

    def agree(self, numbers: Sequence[float] = ()) -> tuple[list[float], NonFinite | None]:
        """As `Cadence.agree`, of the gradients that DeepSpeed has reduced."""
        self.gradients()
        return super().agree(numbers)

    def step(
        self,
        firing: set[str],
        tokens: int,
        rate: Callable[[str], float],
        clock_tokens: int = 0,
    ) -> StepReport:
        """As `Cadence.step`; every rank computes with the moved weights afterwards."""
        report = super().step(firing, tokens, rate, clock_tokens)
        self._consume()
        return report

    def drop(self) -> None:
        """As `Cadence.drop`."""
        super().drop()
        self._consume()

    def flush(self, rate: Callable[[str], float], clock_tokens: int = 0) -> StepReport | None:
        """As `Cadence.flush`."""
        report = super().flush(rate, clock_tokens)
        if report is not None:
            self.held.partitions.publish()
        return report

    def _consume(self) -> None:
        self.held.consume()
        self._taken = False
        for tensor in self._live:
            tensor.grad = None

    @torch.no_grad()
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `Cadence.state_dict`, by the names of whole parameters; a collective call."""
        tensors: dict[str, Tensor] = {}
        for level, suffix, partition, names in self._lines():
            held = level.optimizer_state(partition) | self.state.get(partition, {})
            if suffix:
                held[VALUE] = partition.detach()
            for name in names:
                for part, value in sorted(held.items()):
                    flat = value.shape == partition.shape
                    one = self.held.saved(name, value) if flat else value.clone()
                    tensors[f"{name}{suffix}/{part}"] = one
        return tensors, {"tokens": {key: level.tokens for key, level in self._parts()}}

    def _lines(self) -> Iterator[tuple[Level, str, nn.Parameter, list[str]]]:
        """Every partition: its level, what is appended to the names of starts, what lies in it."""
        for key, level in self._parts():
            suffix = START if key.endswith(START) else ""
            for own, partition in level.parameters.items():
                index = int(own.removesuffix(START).rpartition(".")[2])
                yield level, suffix, partition, self.held.partitions.names[index]

    @torch.no_grad()
    def load_state_dict(
        self,
        tensors: Mapping[str, Tensor | Stored],
        plain: dict[str, Any],
        elsewhere: Container[str] = (),
    ) -> None:
        """As `Cadence.load_state_dict`, whatever engine and layout saved it."""
        self.state.clear()
        remaining: dict[str, dict[str, Tensor | Stored]] = {}
        for full_name, value in tensors.items():
            name, _, part = full_name.rpartition("/")
            remaining.setdefault(name, {})[part] = value
        for key, level in self._parts():
            level.tokens, level.bound = plain["tokens"].get(key, 0), None
            for optimizer in level.optimizers:
                optimizer.state.clear()
        for level, suffix, partition, names in self._lines():
            state: dict[str, Tensor] = {}
            for name in names:
                saved = remaining.pop(name + suffix, {})
                if suffix and VALUE not in saved:
                    raise ValueError(
                        f"checkpoint holds no {name}{suffix}: it is not of a nested CMS"
                    )
                whole = {part: in_memory(value) for part, value in saved.items()}
                self._take_in(name, whole, partition, state)
            if suffix:
                partition.copy_(state.pop(VALUE))
            pending = state.pop(ACCUMULATOR, None)
            if pending is not None:
                device = "cpu" if level.accumulator_device == "cpu" else partition.device
                self.state[partition] = {ACCUMULATOR: pending.to(device)}
            if state:
                level.set_optimizer_state(partition, state)
        unknown = sorted(name for name in remaining if name.removesuffix(START) not in elsewhere)
        if unknown:
            raise ValueError(f"checkpoint holds state of unknown parameters: {unknown}")

    def _take_in(
        self, name: str, saved: dict[str, Tensor], partition: Tensor, state: dict[str, Tensor]
    ) -> None:
        """Add what was saved of one parameter to the state of its partition."""
        shares = [part for part in saved if part.startswith(f"{ACCUMULATOR}.")]
        if shares:  # as ranks had them who add up when a level fires
            saved[ACCUMULATOR] = torch.stack([saved.pop(part) for part in shares]).sum(dim=0)
        for part, value in saved.items():
            if value.ndim > 0:
                line = state.setdefault(part, torch.zeros_like(partition))
                self.held.partitions.put(name, self.held.own(name, value), line)
            elif not torch.equal(state.setdefault(part, value.to(partition.device)), value):
                raise ValueError(f"{name}: its {part} is not that of the parameters it lies with")


def _level(
    level: str,
    name: str,
    own: dict[str, tuple[nn.Parameter, float]],
    config: OptimizerConfig,
) -> Level:
    """Partitions with their weight decay as a level called `name`, with the settings of `level`."""
    settings = config.level(level)
    decays = sorted({decay for _, decay in own.values()})
    groups: list[dict[str, object]] = [
        {"params": [p for p, its in own.values() if its == decay], "weight_decay": decay}
        for decay in decays
    ]
    return Level(
        name,
        {key: partition for key, (partition, _) in own.items()},
        [elementwise(settings.optimizer, groups, settings, config)] if own else [],
        accumulator_device=settings.accumulator_device,
        clip_norm=settings.clip_norm,
    )
