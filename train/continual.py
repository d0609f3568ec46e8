"""Continual training: a stream of domains, each read once, one after the other.

Rows are contiguous (order "stream"), so that the memories' state is carried through a domain and
on into the next; documents that start inside a row reset it where the packing tells. One clock
counts through all domains, and every level goes at its own pace across their boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from data_pipeline import Batch, Corpus, Loader
from train.config import ConfigError, RunConfig
from train.parallel.ranks import Ranks


def open_loader(config: RunConfig, corpora: Sequence[Corpus], ranks: Ranks) -> Loader:
    """The loader over `corpora` that a configuration describes, for this rank."""
    return Loader(
        corpora,
        seq_len=config.data.seq_len,
        batch_size=config.batch_rows,
        seed=config.seed,
        dp_rank=ranks.rank,
        dp_size=ranks.size,
        packing=config.data.packing,
        align=config.model.titans.scan.projection_chunk,
        order=config.data.order,
        weights=config.data.weights if len(corpora) > 1 else None,
        prefetch=config.data.prefetch,
        on_corrupt=config.data.on_corrupt,
        pin_memory=torch.cuda.is_available(),
    )


def steps_of_domains(config: RunConfig, corpora: Sequence[Corpus]) -> list[int]:
    """Whole steps of each domain when it is read once, or to its budget of tokens.

    What is left is less than a step and is not read. Raises ConfigError for a domain shorter than
    a step, and for a budget beyond the domain.
    """
    found = []
    for source, corpus in zip(config.data.train, corpora, strict=True):
        loader = open_loader(config, [corpus], Ranks.alone())
        whole = loader.num_windows // config.batch_rows
        step = config.training.batch_tokens
        wanted = whole if source.tokens is None else source.tokens // step
        if whole < 1 or wanted < 1:
            size = whole * step if whole < 1 else source.tokens
            raise ConfigError(
                f"data.train: domain {source.domain!r} has {size} tokens to read, less than a step "
                f"of training.batch_tokens={step}"
            )
        if wanted > whole:
            raise ConfigError(
                f"data.train: domain {source.domain!r} has {whole * step} tokens in whole steps, "
                f"fewer than its budget of {source.tokens}"
            )
        found.append(wanted)
    return found


class DomainStream:
    """Batches of the first domain, then of the second, and so on; a batch never mixes two.

    names: of the domains; finished: how many have been read to their end. Raises StopIteration
    after the last.
    """

    def __init__(self, config: RunConfig, corpora: Sequence[Corpus], ranks: Ranks) -> None:
        self.names = [source.domain for source in config.data.train]
        self.steps = steps_of_domains(config, corpora)
        self._loaders = [open_loader(config, [corpus], ranks) for corpus in corpora]
        self._rows = config.batch_rows
        self.finished = 0
        self._done = 0  # steps of the domain that is being read

    @property
    def exhausted(self) -> bool:
        """Whether every domain has been read."""
        return self.finished == len(self.steps)

    @property
    def ends(self) -> int:
        """How many domains have ended when training ends here, the one that is read included."""
        return self.finished + int(self._done > 0)

    @property
    def name(self) -> str:
        """The domain of the next batch; of the last one at the end."""
        return self.names[min(self.finished, len(self.names) - 1)]

    @property
    def position(self) -> int:
        """Rows of all ranks delivered so far."""
        return self._rows * (sum(self.steps[: self.finished]) + self._done)

    def __iter__(self) -> DomainStream:
        return self

    def __next__(self) -> Batch:
        if self.exhausted:
            raise StopIteration
        batch = next(self._loaders[self.finished])
        self._done += 1
        if self._done == self.steps[self.finished]:
            self._loaders[self.finished].close()
            self.finished, self._done = self.finished + 1, 0
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in a few hundred bytes; the same on all ranks."""
        inner = None if self.exhausted else self._loaders[self.finished].state_dict()
        return {"domains": self.names, "finished": self.finished, "loader": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks, in O(1).

        Raises DataError when a domain is not what it was.
        """
        self.finished, self._done = state["finished"], 0
        if state["loader"] is not None:
            self._loaders[self.finished].load_state_dict(state["loader"])
            self._done = self._loaders[self.finished].position // self._rows
        for later in self._loaders[self.finished + 1 :]:
            later.seek(0)  # after a return from them

    def close(self) -> None:
        """Stop the background threads."""
        for loader in self._loaders:
            loader.close()
