"""Held-out loss: mean negative log-likelihood, perplexity, bits per byte."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline import IGNORE, Batch, Corpus, DataError, evaluation_batches
from data_pipeline.loader import FiniteBatches
from hope.fused import cross_entropy
from train.parallel.ranks import Ranks

if TYPE_CHECKING:
    from train.config import RunConfig

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def perplexity(loss: float) -> float:
    """exp of a loss in nats; the largest float where that is beyond it."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


@dataclass(frozen=True)
class HeldOut:
    """Loss over `tokens` predicted tokens that stand for `bytes` bytes of text."""

    loss: float  # nats per token
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token; see `perplexity`."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Total information in bits over the bytes of the predicted text; tokenizer-independent."""
        return self.loss * self.tokens / math.log(2) / max(1, self.bytes)


def held_out_batches(
    config: RunConfig,
    corpus: Corpus,
    max_tokens: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> FiniteBatches:
    """A data-parallel rank's batches of at most max_tokens tokens (None: all) of `corpus`, in rows
    like those that the run trains on."""
    return evaluation_batches(
        corpus,
        seq_len=config.data.seq_len,
        batch_size=max(config.evaluation.batch_rows, dp_size),
        dp_rank=dp_rank,
        dp_size=dp_size,
        packing=config.data.packing,
        align=config.model.titans.scan.projection_chunk,
        max_tokens=max_tokens,
        on_corrupt=config.data.on_corrupt,
    )


def nothing_to_predict(name: str) -> DataError:
    """The error of held-out data of that name in which no label counts."""
    return DataError(
        f"{name}: held out, and no token in it to predict: its documents are of one token "
        "each, or damaged (data.on_corrupt=skip leaves those out)"
    )


class EvaluationInterruptedError(Exception):
    """Evaluation was asked to stop; nothing was lost, since it changes nothing."""


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the positions that count of -log p(label), in float32. logits [..., V]."""
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), IGNORE)


class LossOfABatch(Protocol):
    """What an evaluation needs of an engine: see `train.engines.parts.Engine`."""

    def held_out(self, batch: Batch) -> float: ...

    def spoken_for(self, labels: Tensor) -> Tensor: ...


def evaluate(
    engine: LossOfABatch,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    ranks: Ranks,
    *,
    name: str = "the data",
    should_stop: Callable[[], bool] = lambda: False,
) -> HeldOut:
    """Mean loss over `batches`, each row from a fresh state, over all ranks.

    token_bytes: UTF-8 bytes of each token id. Changes neither the model nor any state. Raises
    EvaluationInterruptedError between batches when should_stop() answers True, and DataError where
    no token is predicted; name: of the data, for that.
    """
    bytes_of = torch.from_numpy(token_bytes.astype(np.int64))
    nats, count, size = 0.0, 0, 0
    for batch in batches:
        if should_stop():
            raise EvaluationInterruptedError
        ranks.pulse.enter("evaluation")
        nats += engine.held_out(batch)
        counted = engine.spoken_for(batch.labels)
        count += counted.numel()
        size += int(bytes_of[counted].sum())
    nats, total, size_total = ranks.sum([nats, count, size])
    if total == 0:
        raise nothing_to_predict(name)
    return HeldOut(nats / total, int(total), int(size_total))
