"""Which corpus the next window comes from: fixed shares, exact to one window at every prefix.

Draws are scheduled like jobs on one processor: draw j of a corpus with share w may not come before
slot floor(j / w) and must come before slot ceil((j + 1) / w). Serving the earliest deadline first
meets every deadline, because the shares sum to one; that is the same as saying that after p slots a
corpus has been drawn p * w times, give or take less than one.

Any slot is found in O(1). The schedule repeats itself, and where its period is short it is worked
out once. Where it is not, it is worked out in blocks of slots, each from a little before it on: two
schedules that begin with different draws made become the same. A draw that only one of them has
still to make is made next, or gives way to one that both have still to make; the other does that
one, so that they differ in a draw with a later deadline, until each has made up for the other's.
That is over when the deadlines of the draws in which they differed have passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from math import gcd, isfinite, lcm
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.recent import Recent

LONGEST_WAIT = 100_000
_LONGEST_PERIOD = 100_000
_BLOCK_SLOTS, _BLOCKS_KEPT = 1024, 16
_END = 1 << 62


def quotas(weights: Sequence[float]) -> list[int]:
    """The least integers in the ratio of `weights`.

    Weights are taken as the decimal numbers they are written as, so (0.7, 0.2, 0.1) gives 7, 2, 1.
    DataError where they are no shares, or one is so small that finding a slot would take long.
    """
    finite = all(isfinite(weight) for weight in weights)
    exact = [Fraction(str(weight)) for weight in weights] if finite else []
    if not exact or min(exact) < 0 or sum(exact) == 0:
        raise DataError(f"weights {list(weights)}: give numbers >= 0 of which one is above 0")
    scale = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    for k, part in enumerate(parts):
        if 0 < part * LONGEST_WAIT < sum(parts):
            raise DataError(
                f"weight {weights[k]} of corpus {k} is below 1/{LONGEST_WAIT} of the whole: "
                "raise it, or set it to 0 to leave the corpus out"
            )
    divisor = gcd(*parts)
    return [part // divisor for part in parts]


class _Block(NamedTuple):
    """Slots that follow each other: `which` corpus int32 [n] draws, and for the `nth` time, int64
    [n]; how often each corpus was drawn `before` them, int64 [k]."""

    which: np.ndarray
    nth: np.ndarray
    before: np.ndarray


class Blend:
    """The endless sequence of corpora with the given weights; slot p is found in O(1)."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = quotas(weights)
        self._total = sum(self.shares)
        self._period = min(self._total, _END)
        self._drawn = np.array([min(share, _END) for share in self.shares])  # in a period
        self._wait = -(-self._total // min(share for share in self.shares if share))
        short = self._total <= _LONGEST_PERIOD
        self._size = self._period if short else max(_BLOCK_SLOTS, self._wait)
        self._blocks: Recent[int, _Block] = Recent(_BLOCKS_KEPT)

    @property
    def weights(self) -> list[float]:
        """The shares as parts of one."""
        return [share / self._total for share in self.shares]

    def _schedule(self, first: int, start: int, stop: int) -> _Block:
        """The slots start .. stop of a schedule that begins at `first` with any draws made."""
        shares, total = self.shares, self._total
        drawn = [first * share // total for share in shares]

        def deadline(k: int) -> int:
            return -(-(drawn[k] + 1) * total // shares[k])

        waiting = [(drawn[k] * total // shares[k], k) for k, share in enumerate(shares) if share]
        ahead = sorted((deadline(k), k) for _, k in waiting if first * shares[k] % total)
        for _, k in ahead[: first - sum(drawn)]:
            drawn[k] += 1
        waiting = [(drawn[k] * total // shares[k], k) for _, k in waiting]
        heapify(waiting)
        ready: list[tuple[int, int]] = []
        which = np.empty(stop - start, np.int32)
        nth = np.empty(stop - start, np.int64)
        before = list(drawn)
        for slot in range(first, stop):
            if slot == start:
                before = list(drawn)
            while waiting and waiting[0][0] <= slot:
                _, k = heappop(waiting)
                heappush(ready, (deadline(k), k))
            _, k = heappop(ready)
            if slot >= start:
                which[slot - start], nth[slot - start] = k, drawn[k]
            drawn[k] += 1
            heappush(waiting, (drawn[k] * total // shares[k], k))
        return _Block(which, nth, np.array(before, np.int64))

    def _block(self, number: int) -> _Block:
        block = self._blocks.get(number)
        if block is None:
            start = number * self._size
            block = self._schedule(max(start - self._wait, 0), start, start + self._size)
            self._blocks.put(number, block)
        return block

    def slots(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each position int64 [n]: the corpus int32 [n], and how often it was drawn before."""
        rounds, places = np.divmod(positions, self._period)
        numbers, inside = np.divmod(places, self._size)
        which, nth = np.empty(len(positions), np.int32), np.empty(len(positions), np.int64)
        for number in np.unique(numbers):
            here, block = numbers == number, self._block(int(number))
            which[here], nth[here] = block.which[inside[here]], block.nth[inside[here]]
        return which, nth + rounds * self._drawn[which]

    def counts(self, position: int) -> np.ndarray:
        """How often each corpus [k] is drawn in the first `position` slots."""
        rounds, place = divmod(position, self._period)
        number, inside = divmod(place, self._size)
        block = self._block(number)
        part = np.bincount(block.which[:inside], minlength=len(self.shares))
        return rounds * self._drawn + block.before + part


class Curriculum:
    """Blends that follow each other: from position starts[i] on, blends[i] draws.

    Within a stage shares are exact to one window at every prefix, counted from its start; each
    corpus goes on in its own order where the stage before left it.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]) -> None:
        self.starts = [start for start, _ in stages]
        if not stages or self.starts[0] != 0 or self.starts != sorted(set(self.starts)):
            raise DataError(
                f"the stages of the weights begin at {self.starts}: "
                "they must begin at 0 and come in rising order"
            )
        self.blends = [Blend(weights) for _, weights in stages]
        counts = [np.zeros(len(self.blends[0].shares), np.int64)]
        for blend, start, end in zip(self.blends, self.starts, self.starts[1:], strict=False):
            counts.append(counts[-1] + blend.counts(end - start))
        self._before = counts

    def stage(self, position: int) -> int:
        """Which stage draws at `position`."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def slots(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each position int64 [n]: the corpus int32 [n], and how often it was drawn before."""
        stages = np.searchsorted(self.starts, positions, side="right") - 1
        which = np.empty(len(positions), np.int32)
        nth = np.empty(len(positions), np.int64)
        for stage in np.unique(stages):
            here = stages == stage
            which[here], nth[here] = self.blends[stage].slots(positions[here] - self.starts[stage])
            nth[here] += self._before[stage][which[here]]
        return which, nth
