"""From a position in the global order to a window of a corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import numpy as np

from data_pipeline.blend import Blend, Curriculum
from data_pipeline.corpus import Corpus
from data_pipeline.errors import DataError
from data_pipeline.order import shuffled, shuffled_in_groups
from data_pipeline.packing import Packing
from data_pipeline.shard_format import FRAME_TOKENS

ORDERS = ("shuffle", "window", "stream")
Weights = Sequence[float] | Sequence[tuple[int, Sequence[float]]]
Shuffler = Callable[[np.ndarray, int, int, int, str], np.ndarray]

# What `order="window"` keeps together: chunks of neighbours, and how many chunks are mixed.
CHUNK_TOKENS = 128 * 4096
GROUP_CHUNKS = 16


class Sampling(Protocol):
    """`identity` is what names the blend in a loader's state, as JSON."""

    identity: list[Any]

    def weights(self, position: int) -> list[float]:
        """The share of each corpus at a position."""
        ...

    def windows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For positions int64 [n]: which corpus, and which of its windows, integers [n] each."""
        ...


class Shuffle:
    """Corpora interleaved by their shares; each in an order that is new in every epoch."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        packings: Sequence[Packing],
        curriculum: Curriculum,
        seed: int,
        shuffler: Shuffler,
    ) -> None:
        self._fingerprints = [corpus.fingerprint for corpus in corpora]
        self._sizes = [packing.num_windows for packing in packings]
        self._curriculum, self._seed, self._shuffler = curriculum, seed, shuffler
        stages = [blend.shares for blend in curriculum.blends]
        self.identity = [list(stage) for stage in zip(curriculum.starts, stages, strict=True)]

    def weights(self, position: int) -> list[float]:
        return self._curriculum.blends[self._curriculum.stage(position)].weights

    def windows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        which, draws = self._curriculum.slots(positions)
        out = np.empty_like(draws)
        for k in np.unique(which):
            mine = which == k
            out[mine] = self._shuffler(
                draws[mine], self._sizes[k], self._seed, int(k), self._fingerprints[k]
            )
        return which, out


class Stream:
    """Row r of every batch goes through its own part of one corpus, window after window.

    The rows of a corpus begin at equal distances in it and go round at its end.
    """

    def __init__(self, packings: Sequence[Packing], blend: Blend, batch_size: int) -> None:
        self._which, nth = blend.slots(np.arange(batch_size))
        rows = blend.counts(batch_size)
        drawn = np.array(blend.shares, dtype=bool)
        if (rows[drawn] == 0).any():
            raise DataError(
                f"a batch of {batch_size} rows is too small for a row of each of the "
                f"{int(drawn.sum())} corpora at these weights: take more rows a batch"
            )
        self._sizes = np.array([packing.num_windows for packing in packings], np.int64)[self._which]
        self._starts = nth * self._sizes // rows[self._which]
        self._batch_size, self._shares = batch_size, (rows / batch_size).tolist()
        self.identity = [[0, blend.shares]]

    def weights(self, position: int) -> list[float]:
        return self._shares

    def windows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps, rows = np.divmod(positions, self._batch_size)
        return self._which[rows], (self._starts[rows] + steps) % self._sizes[rows]


def _stages(
    weights: Weights | None, packings: Sequence[Packing], seq_len: int
) -> list[tuple[int, Sequence[float]]]:
    """The weights as (position of the first row, weights of the corpora) for each stage."""
    if weights is None:
        return [(0, [packing.num_windows for packing in packings])]
    if not any(isinstance(weight, Sequence) for weight in weights):
        weights = [(0, cast(Sequence[float], weights))]
    stages: list[tuple[int, Sequence[float]]]
    try:
        given = cast(Sequence[tuple[int, Sequence[float]]], weights)
        stages = [(-(-int(tokens) // seq_len), list(shares)) for tokens, shares in given]
    except (TypeError, ValueError):
        raise DataError(
            f"weights {weights!r}: give a number for each corpus, or pairs (tokens, numbers)"
        ) from None
    for _, shares in stages:
        if len(shares) != len(packings):
            raise DataError(f"{len(shares)} weights for {len(packings)} corpora: give one for each")
    return stages


def make_sampling(
    order: str,
    corpora: Sequence[Corpus],
    packings: Sequence[Packing],
    weights: Weights | None,
    seed: int,
    batch_size: int,
    seq_len: int,
) -> Sampling:
    """The order called `order`; DataError for an unknown one or weights that do not fit."""
    if order not in ORDERS:
        raise DataError(f"order {order!r}: choose one of {', '.join(ORDERS)}")
    curriculum = Curriculum(_stages(weights, packings, seq_len))
    if order == "stream":
        if len(curriculum.starts) > 1:
            raise DataError("weights that change do not go with order 'stream': its rows are fixed")
        return Stream(packings, curriculum.blends[0], batch_size)
    shuffler: Shuffler = shuffled
    if order == "window":
        chunk = max(1, CHUNK_TOKENS // seq_len)
        shuffler = partial(shuffled_in_groups, chunk=chunk, group_chunks=GROUP_CHUNKS)
        for corpus in corpora:
            corpus.keep_frames(GROUP_CHUNKS * (CHUNK_TOKENS // FRAME_TOKENS + 2))
    return Shuffle(corpora, packings, curriculum, seed, shuffler)
