"""Bytes that a rank sends in a training step: the formulas, axis by axis.

Bytes are ring algorithms' (`train.parallel.counting.sent`). With T' tokens of the rank's rows in
its piece of the sequences, s bytes an activation, and a whole activation A = T' dim s:

tp    A layer with K levels: forward an all-reduce of A after the mixer's output and after each
      level's; backward one before each: 2 + 2K, for one level the 4 of a Megatron Transformer
      layer (arXiv 1909.08053). Sequence parallelism makes each an all-gather and a reduce-scatter
      of the same bytes (arXiv 2205.05198). megatron-core's layers: backward one before each
      column-parallel product. Token vectors and the final norm add one each, and the
      loss three numbers a token. Fast weights: nothing.
pp    A (its part, with sequence parallelism) forward and backward at each border of two ranks.
cp    A Titans layer: its state, forward, and the gradient of it, backward, from rank to neighbour,
      whatever the sequence's length; with a carried state the last rank's state to the first.
      A softmax layer: eight all-to-alls of A.
dp    Ranks with whole parameters, a level of P parameters that fires every N steps, R ranks: see
      `_gradients`, and docs/levels.md. FSDP2: see `_sharded`.
      Muon and M3 of matrices that are cut, by tp or FSDP2: see `_orthogonalised`.
all   Counts, flags and norms, 8 bytes each, on which the ranks agree.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod

from hope import HopeModel
from hope.attention import Attention
from hope.init import Linear
from hope.sharding import Replicate, Shard
from hope.titans import SelfModifyingTitans
from train.config import RunConfig
from train.memory import NUMBER
from train.optim.build import is_matrix
from train.optim.levels import group_by_level, late_levels, level_of, periods, reset_by
from train.parallel.counting import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
    SEND,
    sent,
)
from train.parallel.mesh import Mesh
from train.parallel.parallelize import PRECISIONS
from train.parallel.part import cut_layers, unused_parameters
from train.parallel.stages import layers_of_rank, stages_of_rank
from train.signals import REASONS

TRAINERS_NUMBERS = 3 + len(REASONS)
"""What the trainer tells besides: loss, counted tokens, whether the state is finite; and of each
reason to stop whether there is one."""

MOMENTA = {"muon": 1, "m3": 2}
"""What these orthogonalise of each matrix when its level fires."""

Traffic = defaultdict[tuple[str, str], float]
"""Bytes that this rank sends in a step, a mean over periods, by (axis, collective)."""


@dataclass(frozen=True)
class Sizes:
    """What the formulas need to know of the rank's work in one step.

    tokens: of its rows in its piece of the sequences; itemsize: of an activation, in bytes;
    shapes: of its tensor-parallel part of each parameter, by name, for each of its parts.
    """

    tokens: int
    rows: int
    itemsize: int
    layers: list[range]
    parts: list[HopeModel]
    stages: list[int]
    shapes: list[dict[str, tuple[int, ...]]]

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parts' parameters."""
        return {name: shape for shapes in self.shapes for name, shape in shapes.items()}

    @property
    def trained(self) -> list[dict[str, tuple[int, ...]]]:
        """`shapes` of those that get a gradient."""
        pairs = zip(self.parts, self.shapes, strict=True)
        unused = [(unused_parameters(part), shapes) for part, shapes in pairs]
        return [{n: s for n, s in shapes.items() if n not in no} for no, shapes in unused]


def sizes_of(config: RunConfig, mesh: Mesh) -> Sizes:
    """The rank's share of a step; memory is needed for nothing."""
    layout, parallel = mesh.layout, config.parallel
    ranges = layers_of_rank(config.model, parallel, mesh, config.data.seq_len)
    parts = [cut_layers(config.model, layers) for layers in ranges]
    rows = -(-config.batch_rows // layout.dp)
    precision = PRECISIONS[parallel.precision]
    return Sizes(
        tokens=rows * config.data.seq_len // layout.cp,
        rows=rows,
        itemsize=4 if precision is None else precision.itemsize,
        layers=ranges,
        parts=parts,
        stages=stages_of_rank(mesh.pp.rank, layout.pp, layout.stages_per_rank, parallel.schedule),
        shapes=[local_shapes(part, layout.tp) for part in parts],
    )


def local_shapes(model: HopeModel, tp: int) -> dict[str, tuple[int, ...]]:
    """The shape of a tensor-parallel rank's part of each parameter."""
    plan, found = model.shard_plan(), {}
    for name, parameter in model.named_parameters():
        shape, placement = list(parameter.shape), plan[name]
        if isinstance(placement, Shard):
            shape[placement.dim] //= tp
        found[name] = tuple(shape)
    return found


def predict_traffic(config: RunConfig, mesh: Mesh, numbers: int = TRAINERS_NUMBERS) -> Traffic:
    """Bytes that this rank sends in a step, by (axis, collective).

    numbers: how many the ranks add up beside the flags of the cadence.
    """
    sizes, layout = sizes_of(config, mesh), mesh.layout
    parts: list[Traffic] = []
    if layout.tp > 1:
        shard = layout.dp_shard * layout.cp if layout.sharded else 1
        parts.append(tensor_traffic(config, mesh, sizes, _replicated(sizes, shard)))
    if layout.pp > 1:
        parts.append(_pipeline(config, mesh, sizes))
    if layout.cp > 1:
        parts.append(_context(config, mesh, sizes))
    if layout.sharded:
        parts.append(_sharded(config, mesh, sizes))
    elif mesh.reduce.size > 1:
        parts.append(_gradients(config, mesh, sizes))
    if layout.world > 1:
        parts.append(_agreement(config, mesh, sizes, numbers))
        parts.append(_orthogonalised(config, mesh, sizes))
    found = Traffic(float)
    for key, number in [pair for part in parts for pair in part.items()]:
        found[key] += number
    return found


def _replicated(sizes: Sizes, shard: int) -> int:
    """Numbers of this rank's share of the parameters that all tensor-parallel ranks have alike."""
    found = 0
    for part, shapes in zip(sizes.parts, sizes.shapes, strict=True):
        plan = part.shard_plan()
        alike = [prod(shapes[n]) for n, where in plan.items() if isinstance(where, Replicate)]
        found += sum(-(-n // shard) for n in alike)
    return found


def tensor_traffic(config: RunConfig, mesh: Mesh, sizes: Sizes, partial: int) -> Traffic:
    """Tensor parallelism. partial: numbers whose gradients sequence parallelism leaves in parts."""
    found = Traffic(float)
    tp, sequence = mesh.layout.tp, config.parallel.sequence_parallel
    whole = sizes.tokens * config.model.dim * sizes.itemsize
    levels = len(config.model.cms.levels)
    recomputed = config.parallel.activation_checkpointing == "full"
    megatron = config.parallel.tensor_backend == "megatron"

    def add(collective: str, times: float, size: float = whole) -> None:
        found["tp", collective] += times * sent(collective, tp, size)

    for part, own in zip(sizes.parts, sizes.layers, strict=True):
        layers, first, last = len(own), own.start == 0, own.stop == config.model.num_layers
        # Of what is computed again, the layer's last sum is in no derivative.
        again = layers * (levels + (config.model.cms.mode == "independent")) if recomputed else 0
        inside = layers * (1 + levels)
        if sequence:
            ends = int(first) + int(last)
            add(REDUCE_SCATTER, 2 * inside + ends + again)
            add(ALL_GATHER, 2 * inside + ends + (inside if recomputed else 0))
        else:
            backward = column_products(part) if megatron else inside
            add(ALL_REDUCE, inside + backward + int(first) + int(last) + again)
        if last:
            add(ALL_REDUCE, 3, sizes.tokens * NUMBER)
    if sequence:
        add(ALL_REDUCE, 1, partial * NUMBER)
    return found


def column_products(part: HopeModel) -> int:
    """Column-parallel products of the layers that have a gradient: megatron-core's each add up
    that of their input, ours the sum of those that have the same."""
    plan, unused = part.shard_plan(), unused_parameters(part)
    linears = [f"{name}.weight" for name, m in part.layers.named_modules() if isinstance(m, Linear)]
    names = [f"layers.{name}" for name in linears]
    return sum(plan[name] == Shard(0) and name not in unused for name in names)


def _pipeline(config: RunConfig, mesh: Mesh, sizes: Sizes) -> Traffic:
    layout, parallel = mesh.layout, config.parallel
    stages = layout.pp * layout.stages_per_rank
    border = sizes.tokens * config.model.dim * sizes.itemsize
    border //= layout.tp if parallel.sequence_parallel else 1
    mine = set(sizes.stages)
    sends = sum(
        0 <= stage + step < stages and stage + step not in mine
        for stage in mine
        for step in (1, -1)
    )
    found = Traffic(float, {("pp", SEND): float(sends * border)})
    ends = mesh.pp.rank in (0, layout.pp - 1)
    if config.model.tie_embeddings and parallel.schedule != "zbv" and ends:
        (shape,) = {s["embedding.weight"] for s in sizes.shapes if "embedding.weight" in s}
        shard = layout.dp_shard * layout.cp if layout.sharded else 1
        size = -(-shape[0] // shard) * prod(shape[1:]) * NUMBER
        found["pp", ALL_REDUCE] += sent(ALL_REDUCE, 2, size)
    return found


def _context(config: RunConfig, mesh: Mesh, sizes: Sizes) -> Traffic:
    found = Traffic(float)
    layout, cp = mesh.layout, mesh.cp
    neighbours = int(cp.rank < cp.size - 1) + int(cp.rank > 0)
    channels = config.model.dim // layout.tp
    for part in sizes.parts:
        for layer in part.layers:
            mixer = layer.mixer
            if isinstance(mixer, SelfModifyingTitans):
                spec = mixer.state_spec(sizes.rows, dtype=PRECISIONS[config.parallel.precision])
                counts = {name: prod(one.shape) // layout.tp for name, one in spec.items()}
                found["cp", SEND] += neighbours * sum(counts.values()) * 4
                if config.training.state_carry == "stream" and cp.rank == cp.size - 1:
                    found["cp", SEND] += sum(n * spec[k].dtype.itemsize for k, n in counts.items())
                continue
            assert isinstance(mixer, Attention)
            whole = sizes.tokens * channels * sizes.itemsize
            found["cp", ALL_TO_ALL] += 8 * sent(ALL_TO_ALL, cp.size, whole)
            if mixer.convs is not None:
                tails = 3 * sizes.rows * mixer.reach * channels * sizes.itemsize
                found["cp", SEND] += neighbours * tails
            if config.data.tells_documents:
                found["cp", ALL_GATHER] += sent(ALL_GATHER, cp.size, sizes.tokens * cp.size)
    return found


def _padded(shape: tuple[int, ...], ranks: int) -> int:
    """Numbers of a tensor whose rows are divided into equal shares, the last ones filled up."""
    return -(-shape[0] // ranks) * ranks * prod(shape[1:])


def _sharded(config: RunConfig, mesh: Mesh, sizes: Sizes) -> Traffic:
    """FSDP2: of each layer, and of what is left, an all-gather of its parameters for every forward
    and backward pass and a reduce-scatter of its gradients for every backward pass; with replicas
    an all-reduce of the shares, of a level with `reduce: at_update` only when it fires. What is
    left (token vectors, last norm, head) stays gathered between the passes; in a pipeline
    everything does, from the first micro-batch to the last, and gradients are added up before they
    travel.
    """
    found = Traffic(float)
    layout, piped = mesh.layout, mesh.layout.pp > 1
    shards = layout.dp_shard * layout.cp
    times = 1 if piped else config.parallel.micro_batches
    every, late = steps_of_periods(config), late_levels(config.model, config.optimizer)
    if shards > 1:
        for name, shape in [pair for shapes in sizes.shapes for pair in shapes.items()]:
            passes = 2 if name.startswith("layers.") and not piped else 1
            gathered = _padded(shape, shards) * sizes.itemsize
            found["dp", ALL_GATHER] += passes * times * sent(ALL_GATHER, shards, gathered)
    for name, shape in [pair for shapes in sizes.trained for pair in shapes.items()]:
        count = _padded(shape, shards)
        if shards > 1:
            found["dp", REDUCE_SCATTER] += times * sent(REDUCE_SCATTER, shards, count * NUMBER)
        if layout.dp_replicate > 1:
            level, most, often = level_of(name, config.model), count // shards, float(times)
            if level in late:  # the cadence's: nothing is filled up
                first = mesh.reduce.rank % shards * most
                most, often = min(most, max(0, prod(shape) - first)), 1 / every[level]
            sums = sent(ALL_REDUCE, layout.dp_replicate, most * NUMBER)
            found["dp", ALL_REDUCE] += often * sums
    return found


def _gradients(config: RunConfig, mesh: Mesh, sizes: Sizes) -> Traffic:
    """The cadence's sums over ranks that hold the same parameters, of P numbers a level.

    A level that fires every step: an all-reduce. A slower one: a reduce-scatter every step and an
    all-gather when it fires; with `reduce: at_update` an all-reduce when it fires, and nothing
    before.
    """
    found = Traffic(float)
    ranks, every = mesh.reduce.size, steps_of_periods(config)
    shapes = {name: shape for shapes in sizes.trained for name, shape in shapes.items()}
    slower = reset_by(config.model)
    for level, names in group_by_level(shapes, config.model).items():
        count = sum(prod(shapes[name]) for name in names) * NUMBER
        padded = sum(_padded(shapes[name], ranks) for name in names) * NUMBER
        late = config.optimizer.level(level).reduce == "at_update"
        if late or (every[level] == 1 and level not in slower):
            found["dp", ALL_REDUCE] += sent(ALL_REDUCE, ranks, count) / every[level]
            continue
        found["dp", REDUCE_SCATTER] += sent(REDUCE_SCATTER, ranks, padded)
        found["dp", ALL_GATHER] += sent(ALL_GATHER, ranks, padded) / every[level]
    return found


def _orthogonalised(config: RunConfig, mesh: Mesh, sizes: Sizes) -> Traffic:
    """What Muon, and M3 for each of its two momenta, gather when a level fires: matrices of which a
    rank has a part, in float32, over tp and then over FSDP2's ranks. Of a stack that is cut between
    its matrices nothing."""
    found = Traffic(float)
    layout, every = mesh.layout, steps_of_periods(config)
    shards = layout.dp_shard * layout.cp if layout.sharded else 1
    for part, shapes in zip(sizes.parts, sizes.trained, strict=True):
        plan, parameters = part.shard_plan(), dict(part.named_parameters())
        for name, shape in shapes.items():
            level, where = level_of(name, config.model), plan[name]
            momenta = MOMENTA.get(config.optimizer.level(level).optimizer, 0)
            tp = layout.tp if isinstance(where, Shard) else 1
            cut = [where.dim] if isinstance(where, Shard) and tp > 1 else []
            cut += [0] if shards > 1 else []
            if not is_matrix(name, parameters[name]) or all(axis < len(shape) - 2 for axis in cut):
                continue
            whole = tp * _padded(shape, shards) * NUMBER
            times = momenta / every[level]
            found["tp", ALL_GATHER] += times * sent(ALL_GATHER, tp, whole / shards)
            found["dp", ALL_GATHER] += times * sent(ALL_GATHER, shards, whole)
    return found


def _agreement(config: RunConfig, mesh: Mesh, sizes: Sizes, numbers: int) -> Traffic:
    """Which parameters have a gradient, over the ranks that share them; over all ranks, which
    levels and ranks have something that is not finite, `numbers` more, and norms in parts."""
    world, reduce = mesh.world.size, mesh.reduce.size
    every = steps_of_periods(config)
    norms = 0.0 if mesh.layout.plain else 1 + sum(1 / steps for steps in every.values())
    present = sent(ALL_REDUCE, reduce, 8 * len(sizes.parameters)) if reduce > 1 else 0.0
    told = sent(ALL_REDUCE, world, 8 * (len(every) + world + numbers + norms))
    return Traffic(float, {("all", ALL_REDUCE): present + told})


def steps_of_periods(config: RunConfig) -> dict[str, int]:
    """Steps between the firings of each level, fastest first."""
    tokens = config.training.batch_tokens
    return {name: max(1, -(-period // tokens)) for name, period in periods(config.model).items()}
