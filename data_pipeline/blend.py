"""Which corpus the next window comes from: fixed shares, exact to one window at every prefix.

Draws are scheduled like jobs on one processor: draw j of a corpus with share w may not come before
slot floor(j / w) and must come before slot ceil((j + 1) / w). Serving the earliest deadline first
meets every deadline, because the shares sum to one; that is the same as saying that after p slots a
corpus has been drawn p * w times, give or take less than one.

Corpora with tiny shares have deadlines so far apart that the schedule could not be followed from
one to the next. Together, with share r, they get the slots floor((j + 1/2) / r), j = 0, 1, ...; the
others are served in the slots left over, and in both kinds of slots the earliest deadline comes
first. All are still met. Of any of the others, with share 1 - c in all, no more draws have to be
made in the slots a .. b than floor(b (1 - c)) - ceil(a (1 - c)) = b - a - (ceil(b c) - floor(a c));
c is at least r, and n reserved slots span more than (n - 1) / r, so that no more than ceil(b c) -
floor(a c) of them lie there. Of any of the tiny, with share s in all, it is (b - a) s draws at
most, rounded down, and no fewer slots than (b - a) r, rounded down, are reserved.

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
from math import gcd, lcm
from typing import NamedTuple

import numpy as np

from data_pipeline.bounded_cache import BoundedCache
from data_pipeline.errors import DataError

LONGEST_WAIT = 100_000
_LONGEST_PERIOD = 100_000
_BLOCK_SLOTS, _BLOCKS_KEPT = 1024, 16
_END = 1 << 62


def _tiny(shares: Sequence[int]) -> list[bool]:
    """Which corpora are drawn so rarely that slots are reserved for them."""
    return [0 < share * LONGEST_WAIT < sum(shares) for share in shares]


def quotas(weights: Sequence[float]) -> list[int]:
    """The least integers in the ratio of `weights`.

    Weights are taken as the decimal numbers they are written as, so (0.7, 0.2, 0.1) gives 7, 2, 1.
    DataError where they are no shares, or one is so small, beside others that are small, that
    finding a slot would take long.
    """
    try:
        exact = [Fraction(str(weight)) for weight in weights]
    except ValueError:  # nan and inf among others
        exact = []
    if not exact or min(exact) < 0 or sum(exact) == 0:
        raise DataError(f"weights {list(weights)}: give numbers >= 0 of which one is above 0")
    scale = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    tiny = sum(part for part, is_tiny in zip(parts, _tiny(parts), strict=True) if is_tiny)
    for k, part in enumerate(parts):
        if 0 < part * LONGEST_WAIT < tiny:
            raise DataError(
                f"weight {weights[k]} of corpus {k} is below 1/{LONGEST_WAIT} of what all weights "
                f"below 1/{LONGEST_WAIT} of the whole add up to: raise it, or set it to 0 to leave "
                "the corpus out"
            )
    divisor = gcd(*parts)
    return [part // divisor for part in parts]


class _Block(NamedTuple):
    """Slots that follow each other: `which` corpus int32 [n] draws, and for the `nth` time, int64
    [n]; how often each corpus was drawn `before` them, int64 [k]."""

    which: np.ndarray
    nth: np.ndarray
    before: np.ndarray


class _Served:
    """Corpora that share slots of their own, which the subclass numbers from 0.

    `shares` are those of all corpora, 0 for one that is not served here, out of `total`.
    """

    def __init__(self, shares: Sequence[int], total: int, size: int | None = None) -> None:
        self._shares, self._ours, self._total = shares, sum(shares), total
        self._wait = -(-self._ours // min(share for share in shares if share)) + 2
        self._size = size or max(_BLOCK_SLOTS, self._wait)
        self._blocks: BoundedCache[int, _Block] = BoundedCache(_BLOCKS_KEPT)

    def before(self, slot: int) -> int:
        """How many of the first `slot` slots of the blend are served here."""
        return slot

    def slot(self, number: int) -> int:
        """Which slot of the blend the one with this number is."""
        return number

    def _schedule(self, first: int, start: int, stop: int) -> _Block:
        """The slots start .. stop of a schedule that begins at `first` with any draws made."""
        shares, total = self._shares, self._total
        at = self.slot(first)
        drawn = [at * share // total for share in shares]

        def release(k: int) -> int:
            return self.before(drawn[k] * total // shares[k])

        def deadline(k: int) -> int:
            return self.before(-(-(drawn[k] + 1) * total // shares[k]))

        served = [k for k, share in enumerate(shares) if share]
        ahead = sorted((deadline(k), k) for k in served if at * shares[k] % total)
        for _, k in ahead[: first - sum(drawn)]:
            drawn[k] += 1
        waiting = [(release(k), k) for k in served]
        heapify(waiting)
        ready: list[tuple[int, int]] = []
        which = np.empty(stop - start, np.int32)
        nth = np.empty(stop - start, np.int64)
        before = list(drawn)
        for number in range(first, stop):
            if number == start:
                before = list(drawn)
            while waiting and waiting[0][0] <= number:
                _, k = heappop(waiting)
                heappush(ready, (deadline(k), k))
            _, k = heappop(ready)
            if number >= start:
                which[number - start], nth[number - start] = k, drawn[k]
            drawn[k] += 1
            heappush(waiting, (release(k), k))
        return _Block(which, nth, np.array(before, np.int64))

    def _block(self, number: int) -> _Block:
        block = self._blocks.get(number)
        if block is None:
            start = number * self._size
            block = self._schedule(max(start - self._wait, 0), start, start + self._size)
            self._blocks.put(number, block)
        return block

    def draws(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For slots served here, by their numbers int64 [n]: corpus and draw as Blend.slots."""
        blocks, inside = np.divmod(numbers, self._size)
        which, nth = np.empty(len(numbers), np.int32), np.empty(len(numbers), np.int64)
        for number in np.unique(blocks):
            here, block = blocks == number, self._block(int(number))
            which[here], nth[here] = block.which[inside[here]], block.nth[inside[here]]
        return which, nth

    def counts(self, number: int) -> np.ndarray:
        """How often each corpus [k] is drawn in the first `number` slots served here."""
        block_number, inside = divmod(number, self._size)
        block = self._block(block_number)
        return block.before + np.bincount(block.which[:inside], minlength=len(self._shares))


class _Tiny(_Served):
    """Corpora with tiny shares, in the slots floor((j + 1/2) * total / sum of their shares)."""

    def before(self, slot: int) -> int:
        return -((self._total - 2 * slot * self._ours) // (2 * self._total))

    def slot(self, number: int) -> int:
        return (2 * number + 1) * self._total // (2 * self._ours)


class _Others(_Served):
    """All other corpora, in the slots left over."""

    def before(self, slot: int) -> int:
        reserved = self._total - self._ours
        return slot + (self._total - 2 * slot * reserved) // (2 * self._total)

    def slot(self, number: int) -> int:
        reserved = self._total - self._ours
        behind = self._total - 2 * reserved * (number + 1)
        return number + max(0, -(behind // (2 * self._ours)))


class Blend:
    """The endless sequence of corpora with the given weights; slot p is found in O(1)."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = quotas(weights)
        self._total = sum(self.shares)
        self._period = min(self._total, _END)
        self._drawn = np.array([min(share, _END) for share in self.shares])  # in a period
        tiny = [share if t else 0 for share, t in zip(self.shares, _tiny(self.shares), strict=True)]
        others = [share - t for share, t in zip(self.shares, tiny, strict=True)]
        self._tiny: _Served | None = None
        self._others: _Served
        if any(tiny):
            self._tiny, self._others = _Tiny(tiny, self._total), _Others(others, self._total)
        else:
            size = self._period if self._total <= _LONGEST_PERIOD else None
            self._others = _Served(others, self._total, size)

    @property
    def weights(self) -> list[float]:
        """The shares as parts of one."""
        return [share / self._total for share in self.shares]

    def slots(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each position int64 [n]: the corpus int32 [n], and how often it was drawn before."""
        rounds, places = np.divmod(positions, self._period)
        if self._tiny is None:
            which, nth = self._others.draws(places)
        else:
            which, nth = np.empty(len(places), np.int32), np.empty(len(places), np.int64)
            passed = np.array([self._tiny.before(slot) for slot in places.tolist()], np.int64)
            after = np.array([self._tiny.before(slot + 1) for slot in places.tolist()], np.int64)
            reserved = after > passed
            which[reserved], nth[reserved] = self._tiny.draws(passed[reserved])
            which[~reserved], nth[~reserved] = self._others.draws((places - passed)[~reserved])
        return which, nth + rounds * self._drawn[which]

    def counts(self, position: int) -> np.ndarray:
        """How often each corpus [k] is drawn in the first `position` slots."""
        rounds, place = divmod(position, self._period)
        drawn = rounds * self._drawn
        if self._tiny is not None:
            drawn = drawn + self._tiny.counts(self._tiny.before(place))
        return drawn + self._others.counts(self._others.before(place))


class Curriculum:
    """Blends that follow each other: from position starts[i] on, blends[i] draws.

    Within a stage shares are exact to one window at every prefix, counted from its start; each
    corpus goes on in its own order where the stage before left it.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]) -> None:
        self.starts = [start for start, _ in stages]
        if not stages or self.starts[0] != 0 or self.starts != sorted(set(self.starts)):
            raise DataError(
                f"the stages of the weights begin at the rows {self.starts} of the stream: "
                "they must begin at 0 and come in rising order, a row or more apart"
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
