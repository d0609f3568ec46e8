"""Bytes that a rank sends in a training step under DeepSpeed: the formulas.

Bytes are ring algorithms', as in `train.dry_run.traffic`, whose formulas for tensor parallelism
hold here too. P numbers of a rank's part that get a gradient, F those of its lines, filled up, s
bytes of a number that computes, m micro-batches.

dp    ZeRO 1: an all-reduce of 4 P a step (in bfloat16 of 4 F), an all-gather of s F. ZeRO 2: an
      all-reduce of 4 P a micro-batch, for DeepSpeed adds up slices of several ranks in one
      (`use_multi_rank_bucket_allreduce: false`: reduces to their owners instead), and the same
      all-gather. ZeRO 3: a reduce-scatter of 4 F a micro-batch; all-gathers, see
      `train.dry_run.zero.gathers`; small parameters once a step.
pp    An activation at each border, as with our engine. Without sequence parallelism DeepSpeed
      sends the tp ranks' part of it, which they put together again: an all-gather for what a stage
      receives, and for what it had sent away. Losses and shapes: a few bytes.
tp    With sequence parallelism the gradients of replicated parameters, as far as they lie in the
      rank's partition.
all   Counts, flags and norms; norms of DeepSpeed's own that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from hope.sharding import Replicate
from train.config import RunConfig
from train.dry_run.traffic import (
    TRAINERS_NUMBERS,
    Sizes,
    Traffic,
    sizes_of,
    steps_of_periods,
    tensor_traffic,
)
from train.dry_run.zero import Lines, buckets_of, gathers, persistent
from train.memory import NUMBER
from train.parallel.counting import ALL_GATHER, ALL_REDUCE, BROADCAST, REDUCE, REDUCE_SCATTER, SEND
from train.parallel.counting import sent as ring
from train.parallel.mesh import Mesh

SHAPE = 1024
"""Bytes in which a stage tells the next one of the shape of what it sends, once a step."""


def predict_zero_traffic(
    config: RunConfig, mesh: Mesh, lines: Lines, numbers: int = TRAINERS_NUMBERS
) -> Traffic:
    """Bytes that this rank sends in a step, by (axis, collective); see `predict_traffic`."""
    sizes, layout = sizes_of(config, mesh), mesh.layout
    parts: list[Traffic] = []
    if layout.tp > 1:
        fragments = lines.fragments()
        (part,) = sizes.parts
        plan = part.shard_plan()
        partial = sum(fragments[n] for n, where in plan.items() if isinstance(where, Replicate))
        parts.append(tensor_traffic(config, mesh, sizes, partial))
    if layout.pp > 1:
        parts.append(_pipeline(config, mesh, sizes))
    if lines.ranks > 1:
        parts.append(_gradients(config, sizes, lines, buckets_of(config, mesh)))
    if layout.world > 1:
        told = _agreement(config, mesh, lines, numbers)
        parts.append(Traffic(float, {("all", ALL_REDUCE): told}))
    found = Traffic(float)
    for key, number in (pair for part in parts for pair in part.items()):
        found[key] += number
    return found


def _gradients(
    config: RunConfig, sizes: Sizes, lines: Lines, buckets: Mapping[str, Any]
) -> Traffic:
    found, times = Traffic(float), config.parallel.micro_batches
    ranks, stage, itemsize = lines.ranks, lines.stage, sizes.itemsize

    def add(collective: str, numbers: float, size: int) -> None:
        found["dp", collective] += ring(collective, ranks, numbers * size)

    if stage == 3:
        if buckets["reduce_scatter"] or not buckets["contiguous_gradients"]:
            add(REDUCE_SCATTER, times * lines.padded, NUMBER)
        else:
            add(ALL_REDUCE, times * lines.numbers, NUMBER)
        small = sum(lines.piece(name) * ranks for name in persistent(lines, buckets))
        add(ALL_GATHER, times * gathers(lines, buckets).sent + small, itemsize)
        return found
    used = lines.numbers - sum(lines.sizes[name] for name in lines.unused)
    add(ALL_GATHER, lines.padded, itemsize)
    if stage == 1 and itemsize < NUMBER:
        add(ALL_REDUCE, lines.padded, NUMBER)
        return found
    slices = buckets["reduce_scatter"] and not buckets["use_multi_rank_bucket_allreduce"]
    add(REDUCE if slices else ALL_REDUCE, used * (times if stage == 2 else 1), NUMBER)
    return found


def _pipeline(config: RunConfig, mesh: Mesh, sizes: Sizes) -> Traffic:
    found, layout = Traffic(float), mesh.layout
    times, sequence = config.parallel.micro_batches, config.parallel.sequence_parallel
    whole = sizes.tokens * config.model.dim * sizes.itemsize
    first, last = mesh.pp.rank == 0, mesh.pp.rank == layout.pp - 1
    borders = (not first) + (not last)
    found["pp", SEND] = borders * whole / layout.tp + (not last) * SHAPE
    if layout.tp > 1 and not sequence:
        found["pp", SEND] += borders * times * 8 * (7 + layout.tp)
        together = (not first) + 2 * (not last)
        found["tp", ALL_GATHER] = together * ring(ALL_GATHER, layout.tp, whole)
    if config.model.tie_embeddings and (first or last):
        (shape,) = {shapes["embedding.weight"] for shapes in sizes.shapes}
        found["pp", ALL_REDUCE] = ring(ALL_REDUCE, 2, prod(shape) * NUMBER)
    found["pp", BROADCAST] = ring(BROADCAST, layout.pp, 2 * NUMBER)
    if last and layout.dp > 1:
        found["dp", ALL_REDUCE] = ring(ALL_REDUCE, layout.dp, NUMBER)
    return found


def _agreement(config: RunConfig, mesh: Mesh, lines: Lines, numbers: int) -> float:
    """What the cadence's ranks tell each other, and DeepSpeed's own norms."""
    every, world, layout = steps_of_periods(config), mesh.world.size, mesh.layout
    norms = 1 + sum(1 / steps for steps in every.values())
    told = ring(ALL_REDUCE, world, 8 * (len(every) + world + numbers + norms))
    bf16 = config.parallel.precision == "bf16"
    if lines.stage == 1:
        return told + bf16 * ring(ALL_REDUCE, layout.pp * layout.tp, NUMBER)
    size = bf16 * 1 if lines.stage == 2 else 8 * len(lines.groups)
    return told + ring(ALL_REDUCE, lines.ranks, size) + ring(ALL_REDUCE, layout.tp, size)
