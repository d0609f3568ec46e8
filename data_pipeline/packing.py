"""How documents fill windows of `seq_len` positions.

A packing lays the documents of a corpus out on a virtual stream and cuts that into windows. A
window is a list of pieces (column, start, stop): tokens start..stop of the corpus go to the row
from `column` on; what no piece covers is padding. A row has seq_len + 1 columns, the last one only
for the label of the position before it.

concat    documents follow each other without a gap.
aligned   every document starts on a multiple of `align` in the stream, hence also in its row; the
          gap before it is padding. A memory that is reset at document starts is then reset on its
          chunk boundaries only.
best-fit  no document is cut that fits into a row; see bestfit.py.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from data_pipeline.bestfit import BestFit
from data_pipeline.bounded_cache import BoundedCache
from data_pipeline.corpus import Corpus
from data_pipeline.errors import CorruptDataError, DataError
from data_pipeline.shard_format import aligned

Piece = tuple[int, int, int]
PACKINGS = ("aligned", "best-fit", "concat")
_LAYOUTS_KEPT = 64


class Packing(Protocol):
    """Windows of one corpus, numbered from 0; every token is in exactly one of them."""

    num_windows: int

    def pieces(self, window: int) -> list[Piece]: ...

    def continues(self, window: int) -> bool:
        """Whether the text of a window goes on where the window before it ended."""
        ...


class Concat:
    def __init__(self, corpus: Corpus, seq_len: int) -> None:
        self._tokens, self._seq_len = corpus.num_tokens, seq_len
        self.num_windows = -(-corpus.num_tokens // seq_len)

    def pieces(self, window: int) -> list[Piece]:
        start = window * self._seq_len
        return [(0, start, min(start + self._seq_len + 1, self._tokens))]

    def continues(self, window: int) -> bool:
        return True


class Aligned:
    """Holds one number per shard; where documents lie in a shard is worked out when needed."""

    def __init__(self, corpus: Corpus, seq_len: int, align: int) -> None:
        self._corpus, self._seq_len, self._align = corpus, seq_len, align
        lengths = [corpus.aligned_tokens(shard, align) for shard in range(corpus.num_shards)]
        self._bases = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._layouts: BoundedCache[int, tuple[np.ndarray, np.ndarray]] = BoundedCache(
            _LAYOUTS_KEPT
        )
        self.num_windows = -(-int(self._bases[-1]) // seq_len)

    def _layout(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(first token of each document and the end, where each starts on the virtual stream)."""
        layout = self._layouts.get(shard)
        if layout is None:
            lengths = self._corpus.document_lengths(shard)
            gaps = aligned(lengths, self._align)
            if int(gaps.sum()) != self._bases[shard + 1] - self._bases[shard]:
                raise CorruptDataError(
                    str(self._corpus.shard(shard).path),
                    f"the manifest gives other aligned_tokens for {self._align}",
                )
            tokens = np.concatenate([[0], np.cumsum(lengths)]) + self._corpus.shard_start(shard)
            virtual = np.concatenate([[0], np.cumsum(gaps)[:-1]]) + self._bases[shard]
            layout = (tokens, virtual)
            self._layouts.put(shard, layout)
        return layout

    def pieces(self, window: int) -> list[Piece]:
        begin, end = window * self._seq_len, (window + 1) * self._seq_len + 1
        found: list[Piece] = []
        shard = int(np.searchsorted(self._bases, begin, side="right")) - 1
        while shard < len(self._bases) - 1 and self._bases[shard] < end:
            if self._bases[shard] == self._bases[shard + 1]:  # a shard without documents
                shard += 1
                continue
            tokens, virtual = self._layout(shard)
            first = max(int(np.searchsorted(virtual, begin, side="right")) - 1, 0)
            last = int(np.searchsorted(virtual, end, side="left"))
            for document in range(first, last):
                at = int(virtual[document])
                start = int(tokens[document]) + max(begin - at, 0)
                stop = min(int(tokens[document + 1]), int(tokens[document]) + end - at)
                if start < stop:
                    found.append((max(at - begin, 0), start, stop))
            shard += 1
        return found

    def continues(self, window: int) -> bool:
        return True


def make_packing(name: str, corpus: Corpus, seq_len: int, align: int) -> Packing:
    """The packing called `name`, one of PACKINGS, of `corpus` in windows of `seq_len`.

    Raises DataError for an unknown name, or where seq_len is not a multiple of align.
    """
    if seq_len < 1 or align < 1:
        raise DataError(f"seq_len {seq_len} and align {align} must be at least 1")
    if name == "concat":
        return Concat(corpus, seq_len)
    if name not in PACKINGS:
        raise DataError(f"packing {name!r}: choose one of {', '.join(PACKINGS)}")
    if seq_len % align:
        raise DataError(f"seq_len {seq_len} must be a multiple of align {align}")
    return (Aligned if name == "aligned" else BestFit)(corpus, seq_len, align)
