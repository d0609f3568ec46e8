"""Which corpus the next window comes from: fixed shares, exact to one window at every prefix.

Weights become integer quotas of a period. Within the period draws are scheduled like jobs on one
processor: draw j of a corpus with share w may not come before slot floor(j / w) and must come
before slot ceil((j + 1) / w). Serving the earliest deadline first meets every deadline, because the
shares sum to one; that is the same as saying that after p slots a corpus has been drawn p * w
times, give or take less than one. Every period ends exactly on its quotas, so any slot is found in
O(1).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, isfinite, lcm

import numpy as np

from data_pipeline.errors import DataError

MAX_PERIOD = 100_000


def quotas(weights: Sequence[float]) -> list[int]:
    """Integer shares in the ratio of `weights`, summing to at most MAX_PERIOD.

    Weights are taken as the decimal numbers they are written as, so (0.7, 0.2, 0.1) gives 7, 2, 1
    exactly. Ratios that need a longer period are rounded to multiples of 1 / MAX_PERIOD.
    """
    finite = all(isfinite(weight) for weight in weights)
    exact = [Fraction(str(weight)) for weight in weights] if finite else []
    if not exact or min(exact) < 0 or sum(exact) == 0:
        raise DataError(f"weights {list(weights)}: give numbers >= 0 of which one is above 0")
    scale = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    divisor = gcd(*parts)
    parts = [part // divisor for part in parts]
    total = sum(parts)
    if total <= MAX_PERIOD:
        return parts
    rounded = [part * MAX_PERIOD // total for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda k: (-(parts[k] * MAX_PERIOD % total), k))
    for k in by_remainder[: MAX_PERIOD - sum(rounded)]:
        rounded[k] += 1
    for k, part in enumerate(parts):
        if part and not rounded[k]:
            raise DataError(
                f"weight {weights[k]} of corpus {k} is below 1/{MAX_PERIOD} of the whole: "
                "raise it, or set it to 0 to leave the corpus out"
            )
    divisor = gcd(*rounded)
    return [part // divisor for part in rounded]


def _earliest_deadline_first(shares: list[int]) -> np.ndarray:
    period = sum(shares)
    waiting = [(0, k, 0) for k, share in enumerate(shares) if share]
    ready: list[tuple[int, int, int]] = []
    order = np.empty(period, np.int32)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, k, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(j + 1) * period // shares[k]), k, j))
        _, k, j = heapq.heappop(ready)
        order[slot] = k
        if j + 1 < shares[k]:
            heapq.heappush(waiting, ((j + 1) * period // shares[k], k, j + 1))
    return order


class Blend:
    """The endless sequence of corpora with the given weights; slot p is found in O(1)."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = np.array(quotas(weights), np.int64)
        self.period = int(self.shares.sum())
        self._which = _earliest_deadline_first(self.shares.tolist())
        self._nth = np.empty(self.period, np.int64)
        for k, share in enumerate(self.shares):
            self._nth[self._which == k] = np.arange(share)

    def slots(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each position int64 [n]: the corpus int32 [n], and how often it was drawn before."""
        rounds, inside = np.divmod(positions, self.period)
        which = self._which[inside]
        return which, rounds * self.shares[which] + self._nth[inside]

    def counts(self, position: int) -> np.ndarray:
        """How often each corpus [k] is drawn in the first `position` slots."""
        rounds, inside = divmod(position, self.period)
        part = np.bincount(self._which[:inside], minlength=len(self.shares))
        return rounds * self.shares + part


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
