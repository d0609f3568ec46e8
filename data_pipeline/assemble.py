"""Fill rows with the tokens of windows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from data_pipeline.corpus import Corpus
from data_pipeline.errors import CorruptDataError
from data_pipeline.packing import Packing

logger = logging.getLogger(__name__)


class RowReader:
    """Reads windows of several corpora, each with its packing, as rows of token ids.

    With `skip_corrupt` a window that touches a damaged frame becomes a row of padding, and the
    frame is logged once: no row changes its place, so ranks need not agree on anything. With
    `in_stream` what a row begins with is read after the window before it, state and all.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        packings: Sequence[Packing],
        seq_len: int,
        pad_id: int,
        skip_corrupt: bool = False,
        in_stream: bool = False,
    ) -> None:
        self._corpora, self._packings = corpora, packings
        self._columns, self._pad_id, self._bos_id = seq_len + 1, pad_id, corpora[0].bos_id
        self._dtype = np.result_type(*(corpus.dtype for corpus in corpora))
        self._skip_corrupt, self._in_stream = skip_corrupt, in_stream
        self._logged: set[tuple[str, int | None]] = set()

    def rows(self, which: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows windows[i] of the corpora which[i]; a window below 0 is all padding.

        Returns (ids [n, seq_len + 1], starts bool [n, seq_len]): `starts` is true at every bos, and
        where a later part of a document follows other text, in the row or in the stream. Raises
        CorruptDataError where a frame does not match its checksum, unless such windows are skipped.
        """
        out = np.full((len(windows), self._columns), self._pad_id, self._dtype)
        inside: list[tuple[int, int]] = []
        for number, (k, window) in enumerate(zip(which.tolist(), windows.tolist(), strict=True)):
            if window < 0:
                continue
            row, corpus = out[number], self._corpora[k]
            try:
                if self._in_stream and not self._packings[k].continues(window):
                    inside.append((number, 0))
                for column, start, stop in self._packings[k].pieces(window):
                    corpus.read_into(row[column : column + stop - start], start)
                    if 0 < column < self._columns - 1:
                        inside.append((number, column))
            except CorruptDataError as error:
                if not self._skip_corrupt:
                    raise
                self._log(error)
                row[:] = self._pad_id
                inside = [place for place in inside if place[0] != number]
        starts = out[:, :-1] == self._bos_id
        for place in inside:
            starts[place] = True
        return out, starts

    def _log(self, error: CorruptDataError) -> None:
        if (error.file, error.frame) not in self._logged:
            self._logged.add((error.file, error.frame))
            logger.warning("windows with damaged data are left out: %s", error)
