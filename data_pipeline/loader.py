"""An endless, seekable stream of batches whose order no number of ranks can change.

Row r of global step s is sample s * batch_size + r, and what a sample holds is a function of (seed,
position) alone. Rank w of W delivers the rows [w * G // W, (w + 1) * G // W) of every step, so W
needs not divide G. Positions count delivered rows; what was only prefetched is not in the state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from data_pipeline.assemble import RowReader
from data_pipeline.batch import Batch, make_batch
from data_pipeline.corpus import Corpus
from data_pipeline.errors import DataError
from data_pipeline.packing import make_packing
from data_pipeline.prefetch import Prefetcher
from data_pipeline.sampling import Sampling, Weights, make_sampling

STATE_VERSION = 1
_PLANNED_ROWS = 512
_END = 1 << 62


def rows_of_rank(batch_size: int, dp_rank: int, dp_size: int) -> tuple[int, int]:
    """The rows [first, last) of a global batch that one rank delivers."""
    if not 0 <= dp_rank < dp_size:
        raise DataError(f"dp_rank {dp_rank} must be at least 0 and below dp_size {dp_size}")
    if batch_size < dp_size:
        raise DataError(
            f"batch_size {batch_size} is the number of rows of all ranks together and leaves some "
            f"of dp_size {dp_size} ranks without a row: raise it to at least {dp_size}"
        )
    return dp_rank * batch_size // dp_size, (dp_rank + 1) * batch_size // dp_size


def _check_tokenizers(corpora: Sequence[Corpus]) -> None:
    if len({corpus.tokenizer_sha256 for corpus in corpora}) != 1:
        folders = ", ".join(str(corpus.path) for corpus in corpora)
        raise DataError(f"{folders}: made with different tokenizers; tokenize them with one")


class Loader:
    """Iterator of Batch over one corpus or a blend, endless over epochs.

    corpora     Corpus or a sequence of them, made with one tokenizer
    seq_len     T, positions per row
    batch_size  G, rows per step of all ranks together
    seed        names the order; any integer
    dp_rank, dp_size  which of how many data-parallel ranks this is
    packing     "aligned": documents start on multiples of `align`; "concat": without gaps;
                "best-fit": aligned, and only documents longer than a row are cut
    order       "shuffle": every epoch a fresh permutation of all windows;
                "window": the same, but staying among 16 chunks of 512K tokens at a time, which
                reads each frame once: for object stores and slow disks;
                "stream": row r reads its own contiguous part of the corpus step after step (for
                state carried from step to step), going round at the end of the corpus
    weights     shares of the corpora, None for shares in proportion to their windows; or stages
                [(0, shares), (tokens, shares), ...], each from so many tokens (positions of the
                global stream) on; with "stream" the shares are rows of the batch
    prefetch    batches made ahead by a background thread; 0 makes them in next()
    on_corrupt  "raise": a damaged frame is a CorruptDataError in next(), naming file and frame;
                "skip": rows that need it are padding throughout, and the frame is logged once; no
                other row changes, on any rank
    pin_memory  put tensors in page-locked memory, for copies to a GPU that do not block

    Raises DataError where the arguments do not fit each other or the corpora.
    """

    def __init__(
        self,
        corpora: Corpus | Sequence[Corpus],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        packing: str = "aligned",
        align: int = 64,
        order: str = "shuffle",
        weights: Weights | None = None,
        prefetch: int = 2,
        on_corrupt: str = "raise",
        pin_memory: bool = False,
    ) -> None:
        corpora = [corpora] if isinstance(corpora, Corpus) else list(corpora)
        if not corpora:
            raise DataError("no corpus given: pass at least one")
        skip = _skips(on_corrupt)
        if prefetch < 0:
            raise DataError(f"prefetch {prefetch} must be at least 0")
        self.corpora, self.seq_len, self.batch_size = corpora, seq_len, batch_size
        self.seed, self.packing, self.align, self.order = seed, packing, align, order
        self._rows = rows_of_rank(batch_size, dp_rank, dp_size)
        _check_tokenizers(corpora)
        packings = [make_packing(packing, corpus, seq_len, align) for corpus in corpora]
        self._num_windows = sum(packing.num_windows for packing in packings)
        self._sampling = make_sampling(order, corpora, packings, weights, seed, batch_size, seq_len)
        self._reader = RowReader(
            corpora, packings, seq_len, corpora[0].pad_id, skip, order == "stream"
        )
        self._finish = partial(
            make_batch, eos=corpora[0].eos_id, pad=corpora[0].pad_id, pin_memory=pin_memory
        )
        self._prefetch = prefetch
        self._position = 0
        self._source: Iterator[Batch] | None = None

    @property
    def position(self) -> int:
        """Rows of all ranks delivered so far; batch_size more after every next()."""
        return self._position

    @property
    def num_windows(self) -> int:
        """Rows in one pass over all corpora."""
        return self._num_windows

    @property
    def weights(self) -> list[float]:
        """The realised share of each corpus in the next batch."""
        return self._sampling.weights(self._position)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._source is None:
            steps = _Steps(
                self._sampling,
                self._reader,
                self._finish,
                self._position,
                self.batch_size,
                self._rows,
            )
            self._source = (
                Prefetcher(steps, self._prefetch) if self._prefetch else map(steps, count())
            )
        try:
            batch = next(self._source)
        except BaseException:
            self.close()
            raise
        self._position += self.batch_size
        return batch

    def seek(self, position: int) -> None:
        """Go to a position in rows of all ranks, in O(1): the next batch begins with that row."""
        if not 0 <= position < _END:
            raise DataError(f"position {position} must be at least 0 and below 2^62")
        self.close()
        self._position = position

    def skip(self, steps: int) -> None:
        """Leave out the next `steps` batches, in O(1)."""
        self.seek(self._position + steps * self.batch_size)

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "corpora": [corpus.fingerprint[:16] for corpus in self.corpora],
            "weights": self._sampling.identity,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "packing": self.packing,
            "align": None if self.packing == "concat" else self.align,
            "order": self.order,
            "batch_size": self.batch_size if self.order == "stream" else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as a few hundred bytes of JSON; the same on all ranks."""
        return {"position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks, in O(1).

        With order "shuffle" the batch size may differ too. Raises DataError naming every field in
        which the state belongs to another stream than this one.
        """
        identity = self._identity()
        position = state.get("position")
        wrong = [
            f"{name} is {state.get(name)!r} in the state and {mine!r} here"
            for name, mine in identity.items()
            if name not in state or state[name] != mine
        ]
        count = position if isinstance(position, int) and not isinstance(position, bool) else -1
        if not 0 <= count < _END:
            wrong.append(f"position {position!r} is not a count of rows")
        if wrong:
            raise DataError("the loader state belongs to another stream: " + "; ".join(wrong))
        self.seek(count)

    def close(self) -> None:
        """Stop the background thread; next() starts it again."""
        source, self._source = self._source, None
        if isinstance(source, Prefetcher):
            source.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Steps:
    """The batches of one rank from a position on, in any order, from any thread."""

    def __init__(
        self,
        sampling: Sampling,
        reader: RowReader,
        finish: Callable[[np.ndarray, np.ndarray], Batch],
        position: int,
        batch_size: int,
        rows: tuple[int, int],
    ) -> None:
        self._sampling, self._reader, self._finish = sampling, reader, finish
        self._position, self._batch_size, self._rows = position, batch_size, rows
        self._block = max(1, _PLANNED_ROWS // (rows[1] - rows[0]))
        self._lock = threading.Lock()
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _plan(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if block not in self._plans:
                first, last = self._rows
                steps = np.arange(block * self._block, (block + 1) * self._block, dtype=np.int64)
                starts = self._position + self._batch_size * steps
                wanted = (starts[:, None] + np.arange(first, last)).ravel()
                if len(self._plans) > 1:
                    del self._plans[min(self._plans)]
                self._plans[block] = self._sampling.windows(wanted)
            return self._plans[block]

    def __call__(self, step: int) -> Batch:
        block, inside = divmod(step, self._block)
        which, windows = self._plan(block)
        size = self._rows[1] - self._rows[0]
        mine = slice(inside * size, (inside + 1) * size)
        return self._finish(*self._reader.rows(which[mine], windows[mine]))


class FiniteBatches(Iterator[Batch]):
    """So many batches, made as they are asked for; len(): those that are left."""

    def __init__(self, count: int, make: Callable[[int], Batch]) -> None:
        self._count, self._make, self._given = count, make, 0

    def __len__(self) -> int:
        return self._count - self._given

    def __next__(self) -> Batch:
        if not len(self):
            raise StopIteration
        self._given += 1
        return self._make(self._given - 1)


def _skips(on_corrupt: str) -> bool:
    """Whether windows with damaged data are left out. Raises DataError for an unknown word."""
    if on_corrupt not in ("raise", "skip"):
        raise DataError(f"on_corrupt {on_corrupt!r}: choose one of raise, skip")
    return on_corrupt == "skip"


def evaluation_batches(
    corpus: Corpus,
    *,
    seq_len: int,
    batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    packing: str = "aligned",
    align: int = 64,
    max_tokens: int | None = None,
    on_corrupt: str = "raise",
) -> FiniteBatches:
    """Every window of `corpus` once, in order: a finite iterator of this rank's batches.

    The windows are the same for every dp_size; the last batch is filled up with rows that are
    padding throughout, so all ranks get the same number of batches. `max_tokens` takes only that
    many positions, rounded down to whole windows and at least one, spread evenly over the corpus.
    on_corrupt: as of `Loader`; with "skip" a window that touches damage counts for nothing.
    """
    first, last = rows_of_rank(batch_size, dp_rank, dp_size)
    windows = make_packing(packing, corpus, seq_len, align)
    whole = number = windows.num_windows
    if max_tokens is not None:
        if max_tokens < 1:
            raise DataError(f"max_tokens {max_tokens} must be at least 1")
        number = min(number, max(1, max_tokens // seq_len))
    skip = _skips(on_corrupt)
    reader = RowReader([corpus], [windows], seq_len, corpus.pad_id, skip)
    which = np.zeros(last - first, np.int64)

    def batch(number_of_it: int) -> Batch:
        place = number_of_it * batch_size + np.arange(first, last)
        wanted = np.where(place < number, place * whole // number, -1)
        return make_batch(*reader.rows(which, wanted), corpus.eos_id, corpus.pad_id)

    return FiniteBatches(-(-number // batch_size), batch)
