"""Best-fit packing: documents are cut only where they are longer than a row.

A document is cut into pieces of seq_len tokens and a rest. Rests are put, longest first, each into
the fullest row that still has room for it; inside a row pieces start on multiples of `align`. Rows
hold pieces of one shard only, so a plan is worked out shard by shard when it is needed, and is the
same on every rank. How many rows each shard makes has to be known at the start: `plan_windows`
writes that beside the corpus for corpora so large that counting would take long.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.bounded_cache import BoundedCache
from data_pipeline.corpus import Corpus
from data_pipeline.errors import DataError
from data_pipeline.files import write_whole
from data_pipeline.manifest import canonical
from data_pipeline.processes import each
from data_pipeline.streams import is_url

_PLANS_KEPT = 64  # as many shards as `tokenize` makes of up to 16 GiB


def pack_shard(lengths: np.ndarray, seq_len: int, align: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for documents of these `lengths`, int64 [D], stored one after the other.

    Returns (first, pieces): row r consists of pieces[first[r] : first[r + 1]], and each piece,
    int64 [3], is (column, start, stop) with tokens counted from the first document.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    whole, rest = np.divmod(lengths, seq_len)
    cut = np.repeat(np.arange(len(lengths)), whole)
    part = np.arange(len(cut)) - np.repeat(np.cumsum(whole) - whole, whole)
    at = starts[cut] + part * seq_len
    units = -(-rest // align)
    longest_first = np.argsort(-units, kind="stable")[: np.count_nonzero(units)]
    full = min(seq_len // align, int(units.sum()))  # room beyond all rests is never used
    rows, columns = _place(units[longest_first], full)
    rests = np.array([align * columns, (ends - rest)[longest_first], ends[longest_first]])
    pieces = np.concatenate([[0 * at, at, np.minimum(at + seq_len + 1, ends[cut])], rests], axis=1)
    row = np.concatenate([np.arange(len(cut)), len(cut) + rows])
    first = np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64)
    return first, np.ascontiguousarray(pieces[:, np.argsort(row, kind="stable")].T)


def _place(units: np.ndarray, full: int) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces of so many units, int64 [n] and falling, come one after the other, in rows of
    `full`: (row, units before it), int64 [n] each.

    Each goes into the row with least room that still fits, of several the one touched last. A row
    that takes one takes as many of that size as it has room for before another is looked at, so
    that what is done a step here is all rows of one room.
    """
    rows: list[int] = []
    columns: list[int] = []
    room: list[list[int]] = [[] for _ in range(full + 1)]
    with_room = made = 0
    sizes, times = np.unique(-units, return_counts=True)
    for need, count in zip((-sizes).tolist(), times.tolist(), strict=True):
        while count:
            fitting = with_room >> need
            left = need + (fitting & -fitting).bit_length() - 1 if fitting else full
            each = min(left // need, count)
            wanted = -(-count // each)
            if fitting:
                taken = room[left][: -wanted - 1 : -1]
                del room[left][-wanted:]
                if not room[left]:
                    with_room &= ~(1 << left)
            else:
                taken = list(range(made, made + wanted))
                made += wanted
            placed = min(count, each * len(taken))
            rows += [row for row in taken for _ in range(each)][:placed]
            inside = [full - left + need * number for number in range(each)]
            columns += (inside * len(taken))[:placed]
            count -= placed
            last = left - need * (placed - each * (len(taken) - 1))
            for over, some in ((left - need * each, taken[:-1]), (last, taken[-1:])):
                if over and some:
                    room[over] += some
                    with_room |= 1 << over
    return np.array(rows, np.int64), np.array(columns, np.int64)


def plan_path(corpus: Corpus, seq_len: int, align: int) -> Path:
    """Where the counts are kept for a corpus in a local folder."""
    if is_url(corpus.path):
        raise DataError(f"{corpus.path}: counts are kept in local folders only")
    return Path(corpus.path) / f"best-fit-{seq_len}-{align}.json"


def _rows(corpus: Corpus, seq_len: int, align: int, shard: int) -> int:
    return len(pack_shard(corpus.document_lengths(shard), seq_len, align)[0]) - 1


def _count(corpus: Corpus, seq_len: int, align: int, workers: int = 1) -> list[int]:
    rows = partial(_rows, corpus, seq_len, align)
    counts = dict(each(rows, range(corpus.num_shards), workers, corpus.path))
    return [counts[shard] for shard in range(corpus.num_shards)]


def plan_windows(corpus: Corpus, seq_len: int, align: int, workers: int = 1) -> list[int]:
    """Count the rows of each shard and keep the counts in the corpus's folder."""
    counts = _count(corpus, seq_len, align, workers)
    note = _note(corpus, seq_len, align, counts)
    write_whole(plan_path(corpus, seq_len, align), json.dumps(note).encode() + b"\n")
    return counts


def _note(corpus: Corpus, seq_len: int, align: int, counts: Any) -> dict[str, Any]:
    """What is kept of `counts`, with a checksum of all else in it."""
    note = {
        "fingerprint": corpus.fingerprint,
        "seq_len": seq_len,
        "align": align,
        "windows": counts,
    }
    return {**note, "xxh3_64": xxhash.xxh3_64_hexdigest(canonical(note))}


def _known(corpus: Corpus, seq_len: int, align: int) -> list[int] | None:
    """The counts that are kept; None where there are none, or not the ones that were written."""
    try:
        note = json.loads(plan_path(corpus, seq_len, align).read_bytes())
        counts: list[int] = note["windows"]
        whole = note == _note(corpus, seq_len, align, counts)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return counts if whole else None


class BestFit:
    """Windows of one corpus. A window's pieces begin mid-document too: see `pieces`."""

    def __init__(self, corpus: Corpus, seq_len: int, align: int) -> None:
        self._corpus, self._seq_len, self._align = corpus, seq_len, align
        known = _known(corpus, seq_len, align)
        counts = _count(corpus, seq_len, align) if known is None else known
        self._bases = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._plans: BoundedCache[int, tuple[np.ndarray, np.ndarray]] = BoundedCache(_PLANS_KEPT)
        self.num_windows = int(self._bases[-1])

    def pieces(self, window: int) -> list[tuple[int, int, int]]:
        """(column, start, stop) of each piece; one in column > 0 may begin inside a document."""
        shard = int(np.searchsorted(self._bases, window, side="right")) - 1
        plan = self._plans.get(shard)
        if plan is None:
            plan = pack_shard(self._corpus.document_lengths(shard), self._seq_len, self._align)
            self._plans.put(shard, plan)
        first, pieces = plan
        row = window - int(self._bases[shard])
        offset = self._corpus.shard_start(shard)
        return [
            (column, start + offset, stop + offset)
            for column, start, stop in pieces[first[row] : first[row + 1]].tolist()
        ]

    def continues(self, window: int) -> bool:
        """Whether the text of a window goes on where the window before it ended."""
        if window == 0:
            return False
        column, start, _ = self.pieces(window - 1)[-1]
        return self.pieces(window)[0][1] == start + self._seq_len - column
