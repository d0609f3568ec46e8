"""What the loader delivers: one rank's rows of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.errors import DataError

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""The label of a position that no loss counts (torch's default `ignore_index`)."""


@dataclass(frozen=True)
class Batch:
    """`b` rows (this rank's share of the global batch) of `T` positions.

    tokens           int64 [b, T]
    labels           int64 [b, T]: the next token of the same document; IGNORE after a document's
                     last token, on padding, and in rows that only fill up a batch
    document_starts  bool [b, T]: True exactly where a document begins (at its bos token); with
                     best-fit packing also where the rest of a long document follows other text
                     in its row, or with order "stream" in the row before, which is where a memory
                     has to be reset as well
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor

    @property
    def document_ids(self) -> torch.Tensor:
        """int64 [b, T]: which document of its row a position is in; padding counts to the last."""
        return self.document_starts.cumsum(1)

    @property
    def num_valid(self) -> int:
        """How many positions of these rows have a label that counts."""
        return int((self.labels != IGNORE).sum())


def make_batch(
    rows: np.ndarray, starts: np.ndarray, eos: int, pad: int, pin_memory: bool = False
) -> Batch:
    """Batch from rows of token ids.

    `rows` is an integer array [b, T + 1]: the T inputs of each row and the token after the last;
    `starts` bool [b, T] is document_starts. `pin_memory` puts the tensors in page-locked memory,
    for asynchronous copies to a GPU.
    """
    import torch

    inputs = rows[:, :-1]
    labels = rows[:, 1:].astype(np.int64)
    np.putmask(labels, (inputs == eos) | (inputs == pad), IGNORE)
    arrays = (inputs.astype(np.int64), labels, starts)
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    if pin_memory:
        if not torch.cuda.is_available():
            raise DataError("pin_memory is for machines with a GPU: leave it off here")
        tensors = tuple(tensor.pin_memory() for tensor in tensors)
    return Batch(*tensors)
