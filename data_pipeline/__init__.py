"""Text to token shards to batches; usable by itself, and what the trainer reads from.

Nothing here imports torch until a batch is made, so the command line and the tokenizer start
quickly and run where torch is absent. Names are resolved on first use:

    from data_pipeline import Corpus, Loader
    corpus = Corpus.open("runs/data/sotu/train")
    loader = Loader([corpus], seq_len=1024, batch_size=8, seed=0)
    batch = next(loader)        # Batch(tokens, labels, document_starts)
    state = loader.state_dict() # a few hundred bytes, the same on every rank
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.batch import IGNORE, Batch
    from data_pipeline.corpus import Corpus
    from data_pipeline.errors import CorruptDataError, DataError
    from data_pipeline.loader import Loader, evaluation_batches
    from data_pipeline.tokenizer import Tokenizer, train_tokenizer

_HOME = {
    "IGNORE": "batch",
    "Batch": "batch",
    "Corpus": "corpus",
    "CorruptDataError": "errors",
    "DataError": "errors",
    "Loader": "loader",
    "evaluation_batches": "loader",
    "Tokenizer": "tokenizer",
    "train_tokenizer": "tokenizer",
}
__all__ = [
    "IGNORE",
    "Batch",
    "Corpus",
    "CorruptDataError",
    "DataError",
    "Loader",
    "Tokenizer",
    "evaluation_batches",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'data_pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(f"data_pipeline.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
