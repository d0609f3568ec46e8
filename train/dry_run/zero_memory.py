"""Bytes that a rank needs at the peak of a training step under DeepSpeed: the formulas.

P numbers in the rank's part, F those of its lines, filled up, S its share of them, T those of the
parameters, whole, that its share has a part of; s bytes of a number that computes, B those of a
bucket, at most P; D ranks.

weights       ZeRO 1, 2: s F, and the share in float32, 4 S; ZeRO 3: (s + 4) S, and small ones whole
gradients     what there is of them when a backward pass begins, with ZeRO 1 when it has ended:
              ZeRO 1: 4 P, in bfloat16 2 P and float32 sums of 4 F; ZeRO 2: what the micro-batches
              before have left, 4 T, in bfloat16 4 S; ZeRO 3: 4 S and its bucket, 4 B
accumulators  4 S of levels that don't fire every step
optimizer     as with our engine, of the share
activations   the most that is alive beside this, with gradients as they appear
buffers       ZeRO 3's gathered parameters, and a layer's gradients, which wait for its end;
              buckets that fill up within a backward pass; a pipeline's
update        what reducing needs when a backward pass is over, and what the cadence needs

On a CPU a bucket costs what is written to it, elsewhere all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from train.config import RunConfig
from train.dry_run.memory import Action, Memory, peak_of_actions
from train.dry_run.tracing import PartBytes
from train.dry_run.traffic import steps_of_periods
from train.dry_run.zero import Lines, gathers, persistent, units_of
from train.memory import NUMBER
from train.optim.levels import reset_by

BF16_BUCKET = 5 * 10**8
"""Numbers that DeepSpeed's BF16_Optimizer reduces at once."""


@dataclass(frozen=True)
class Zero:
    """What the formulas need: the rank's lines, what it buffers, and where.

    itemsize: bytes of a number that computes; device: the type of device.
    """

    lines: Lines
    buckets: Mapping[str, Any]
    itemsize: int
    micro_batches: int
    device: str

    @property
    def summed(self) -> bool:
        """Whether DeepSpeed's BF16_Optimizer is in charge: ZeRO 1 in bfloat16."""
        return self.lines.stage == 1 and self.itemsize < NUMBER

    @property
    def bucket(self) -> int:
        """Numbers that are reduced at once."""
        return min(self.lines.numbers, int(self.buckets["reduce_bucket_size"]))

    @property
    def overflows(self) -> bool:
        """Whether buckets fill up, and are reduced, within a backward pass."""
        return self.lines.stage > 1 and self.bucket < self.lines.numbers

    @property
    def leaves_at_once(self) -> bool:
        """Whether gradients go as they come: into buckets that are counted by themselves."""
        return self.lines.stage == 3 or self.overflows

    @property
    def unused(self) -> int:
        """Bytes of buckets that are allocated and never written to."""
        if self.device == "cpu" or self.summed or not self.buckets["contiguous_gradients"]:
            return 0
        buckets = 2 if self.buckets["overlap_comm"] and self.lines.stage < 3 else 1
        itemsize = NUMBER if self.lines.stage == 3 else self.itemsize
        return itemsize * (buckets * int(self.buckets["reduce_bucket_size"]) - self.bucket)

    @property
    def weights(self) -> int:
        """Bytes of what computes, and of the partitions in float32."""
        lines, share = self.lines, sum(self.lines.shares)
        if lines.stage < 3:
            return self.itemsize * lines.padded + NUMBER * share
        small = sum(lines.sizes[name] for name in persistent(lines, self.buckets))
        whole = small if lines.ranks > 1 else 0  # of one rank the partition is the parameter
        return (self.itemsize + NUMBER) * share + self.itemsize * whole

    @property
    def left(self) -> int:
        """Bytes of gradients that a micro-batch leaves when it has been reduced."""
        lines = self.lines
        if self.summed:
            return NUMBER * lines.padded + self.itemsize * lines.numbers
        if lines.stage == 1:
            return NUMBER * lines.numbers
        if lines.stage == 2 and self.itemsize == NUMBER:
            return NUMBER * lines.touched
        bucket = self.bucket if lines.stage == 3 else 0
        return NUMBER * (sum(lines.shares) + bucket)

    @property
    def reducing(self) -> int:
        """Bytes of gradients at most while a backward pass's are reduced."""
        lines, bucket = self.lines, self.bucket
        if self.summed:
            return self.left + NUMBER * min(lines.padded, BF16_BUCKET)
        if lines.stage == 3:
            # Laid out for its owners; gloo adds up a copy, of which each takes its share.
            return self.left + NUMBER * bucket * (2 if self.device == "cpu" else 1)
        copies = 0 if self.itemsize == NUMBER else NUMBER * bucket
        line = self.itemsize * bucket
        if lines.ranks > 1 or self.itemsize < NUMBER:
            copies += line
        own = NUMBER * lines.touched
        if lines.stage == 1:
            again = line if bucket < lines.numbers else 0
            return self.left + again + max(copies, own)
        if self.itemsize < NUMBER:
            return line + copies + self.left
        return line + max(copies, own) + (own if self.micro_batches > 1 else 0)

    @property
    def updating(self) -> int:
        """Bytes of gradients at most while the cadence takes them over, and they are let go."""
        share, most = NUMBER * sum(self.lines.shares), NUMBER * max(self.lines.shares)
        if self.summed:
            return self.left + share
        if self.itemsize < NUMBER and self.lines.stage == 2:
            return self.left + share
        kept = NUMBER * self.lines.touched if self.lines.stage < 3 else self.left
        return kept + share + most


def zero_memory(
    config: RunConfig,
    zero: Zero,
    actions: Sequence[Action],
    trace: PartBytes,
    fast_state: int,
    step_buffers: int,
) -> Memory:
    """Bytes by kind at the peak of a step.

    trace: of the rank's part, as it computes, with gradients that stay (`zero.leaves_at_once`: that
    go as they come); step_buffers: a pipeline's.
    """
    starts, accumulators, optimizer = _held(config, zero.lines)
    gradients, alive = zero.left, 0
    if zero.lines.stage == 1:  # those of what computes appear in a step's first backward pass
        own = zero.itemsize * zero.lines.numbers if zero.summed else gradients
        alive = max(0, peak_of_actions(actions, [trace]) - own)
    else:
        trace = replace(trace, again=trace.backward, weights_again=trace.weights, gradients=0)
        alive = peak_of_actions(actions, [trace])
        if zero.lines.stage == 2 and zero.micro_batches == 1:
            gradients = 0
    if zero.lines.stage == 3:
        units = units_of(zero.lines.sizes).values()
        step_buffers += zero.itemsize * max(sum(unit.values()) for unit in units)
        if zero.lines.ranks > 1:
            step_buffers += zero.itemsize * gathers(zero.lines, zero.buckets).alive
    if zero.overflows:
        step_buffers += zero.reducing - gradients
    return Memory(
        weights=zero.weights + starts,
        gradients=gradients,
        accumulators=accumulators,
        optimizer=optimizer,
        fast_state=fast_state,
        activations=alive,
        step_buffers=step_buffers + zero.unused,
        update=max(zero.reducing + zero.unused, zero.updating) - gradients,
    )


def _held(config: RunConfig, lines: Lines) -> tuple[int, int, int]:
    """Bytes of nested levels' starts, of accumulators and of the optimizer, in the rank's share."""
    every = steps_of_periods(config)
    slower = reset_by(config.model)
    starts = accumulators = optimizer = 0
    for group, share in zip(lines.groups, lines.shares, strict=True):
        settings = config.optimizer.level(group.level)
        numbers = 2 if settings.optimizer == "adamw" else int(config.optimizer.sgd.momentum > 0)
        nested = group.level in slower
        starts += NUMBER * share * nested
        accumulators += NUMBER * share * ((every[group.level] > 1) + nested)
        optimizer += NUMBER * share * numbers * (1 + nested)
    return starts, accumulators, optimizer
