"""The floor of every language model: token frequencies of the training text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data_pipeline import IGNORE, Batch


def count_labels(batches: Iterable[Batch], vocab_size: int) -> np.ndarray:
    """How often each token is predicted in `batches`, int64 [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in batches:
        labels = batch.labels.numpy()
        counts += np.bincount(labels[labels != IGNORE], minlength=vocab_size)
    return counts


def unigram_loss(training: np.ndarray, held_out: np.ndarray) -> float:
    """Nats per token of held-out counts under training frequencies with one added to each."""
    log_p = np.log((training + 1) / (training + 1).sum())
    return float(-(held_out * log_p).sum() / held_out.sum())
