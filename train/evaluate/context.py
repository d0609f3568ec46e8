"""Held-out loss by how much text a prediction could look back on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_pipeline import IGNORE, Batch
from hope import HopeModel
from train.evaluate.perplexity import HeldOut, nothing_to_predict

SLICE = 4096
"""Positions of a row whose logits are there at a time: of 32K tokens with a vocabulary of 32K they
would be 4 GB a row."""


class LossByContext:
    """Sums of -log p, in nats. Class k has the predictions that could look back on 2^k to
    2^(k+1) - 1 tokens: those of their document in their row, the one just read included, or where
    the model is not told of documents, all of the row.

    token_bytes: UTF-8 bytes of each token id.
    """

    def __init__(self, seq_len: int, token_bytes: np.ndarray) -> None:
        classes = seq_len.bit_length()
        self.nats = torch.zeros(classes, dtype=torch.float64)
        self.tokens = torch.zeros(classes, dtype=torch.int64)
        self._bytes = 0
        self._bytes_of = torch.from_numpy(token_bytes.astype(np.int64))

    def add(self, losses: Tensor, labels: Tensor, document_starts: Tensor | None) -> None:
        """Take in the losses [b, T] of labels [b, T]; what they are where none counts is ignored.

        document_starts: bool [b, T], as the model was told of them; None where it was not.
        """
        counts = labels != IGNORE
        begins = torch.zeros_like(counts) if document_starts is None else document_starts
        size = _class_of(begins)[counts]
        self.nats.index_add_(0, size, losses[counts].double())
        self.tokens += torch.bincount(size, minlength=len(self.tokens))
        self._bytes += int(self._bytes_of[labels[counts]].sum())

    def whole(self, name: str) -> HeldOut:
        """All classes together. Raises DataError where there was nothing to predict; name: of the
        data."""
        tokens = int(self.tokens.sum())
        if tokens == 0:
            raise nothing_to_predict(name)
        return HeldOut(float(self.nats.sum()) / tokens, tokens, self._bytes)

    def classes(self) -> dict[range, HeldOut]:
        """Loss by tokens that could be looked back on; of classes that have predictions. (Bytes are
        counted of all classes together, and 0 here.)"""
        return {
            range(1 << k, 2 << k): HeldOut(float(nats) / count, count, 0)
            for k, (nats, count) in enumerate(
                zip(self.nats.tolist(), self.tokens.tolist(), strict=True)
            )
            if count
        }


def _class_of(document_starts: Tensor) -> Tensor:
    """bool [b, T] -> int64 [b, T]: floor(log2(tokens since the document or the row began))."""
    place = torch.arange(document_starts.shape[1])
    begin = torch.where(document_starts, place, 0).cummax(1).values
    return torch.frexp((place - begin + 1).double()).exponent.long() - 1


@torch.no_grad()
def loss_by_context(
    model: HopeModel,
    batches: Iterable[Batch],
    seq_len: int,
    token_bytes: np.ndarray,
    tells_documents: bool,
) -> LossByContext:
    """The losses of `batches` of rows of seq_len tokens, each row from a fresh state, on the device
    and in the precision of the model's parameters.

    tells_documents: whether the model is told where documents begin.
    """
    found = LossByContext(seq_len, token_bytes)
    device = model.embedding.weight.device
    for batch in batches:
        starts = batch.document_starts if tells_documents else None
        told = None if starts is None else starts.to(device)
        x, _ = model.transform(model.embed(batch.tokens.to(device)), None, told)
        labels = batch.labels.to(device)
        losses = [
            _losses(model.logits(some), its)
            for some, its in zip(x.split(SLICE, 1), labels.split(SLICE, 1), strict=True)
        ]
        found.add(torch.cat(losses, dim=1).cpu(), batch.labels, starts)
    return found


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) in float32: logits [b, n, V], labels [b, n] -> [b, n]."""
    flat = cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view(labels.shape)
