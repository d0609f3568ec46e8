"""The data of a run: opened, told apart, and what a configuration leaves to them filled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline import Corpus
from train.config import ConfigError, RunConfig
from train.consistency import check_schedules
from train.continual import steps_of_domains
from train.evaluate.perplexity import HeldOut


@dataclass
class Corpora:
    """The opened data of a run."""

    train: list[Corpus]
    validation: Corpus
    domains: dict[str, Corpus] = field(default_factory=dict)  # held out, of a continual run

    def fingerprints(self) -> dict[str, Any]:
        """What the corpora hold, whatever their folders are called."""
        return {
            "train": [corpus.fingerprint for corpus in self.train],
            "validation": self.validation.fingerprint,
            "domains": {name: corpus.fingerprint for name, corpus in self.domains.items()},
        }

    def held_out_is_whole(self, evaluation: HeldOut | None) -> bool:
        """Whether an evaluation was over all held-out text: over every token that is predicted,
        which is all but the first of each document."""
        text = self.validation
        return evaluation is not None and evaluation.tokens == text.num_tokens - text.num_documents

    def held_out_changes(self, saved: dict[str, Any]) -> list[str]:
        """One line for each held-out corpus that was another when `saved`, the fingerprints of a
        checkpoint, were taken; training data that changed is refused by the loader."""
        now, domains = self.fingerprints(), saved.get("domains", {})
        changed = [("validation", saved.get("validation"), now["validation"])]
        changed += [(name, domains.get(name), one) for name, one in now["domains"].items()]
        return [
            f"held-out data ({name}) is not what it was at the checkpoint: losses over it do not "
            "compare with those before"
            for name, before, after in changed
            if before is not None and before != after
        ]


def open_corpora(config: RunConfig, poll: Callable[[], None] = lambda: None) -> Corpora:
    """Open the shards that `data` names. Raises DataError when one is missing or damaged.

    poll: called before each of them.
    """

    def open_one(location: str) -> Corpus:
        poll()
        return Corpus.open(**config.data.where(location))

    train_corpora = [open_one(source.path) for source in config.data.train]
    validation = open_one(config.data.validation)
    domains = {
        source.domain: open_one(source.validation)
        for source in config.data.train
        if source.validation is not None
    }
    check_vocabularies([*train_corpora, validation, *domains.values()])
    return Corpora(train_corpora, validation, domains)


def check_vocabularies(corpora: Sequence[Corpus]) -> None:
    """Raise ConfigError where they were not all made with one tokenizer."""
    sizes = {corpus.vocab_size for corpus in corpora}
    if len(sizes) > 1:
        raise ConfigError(
            f"data: the corpora have different vocabularies, of sizes {sorted(sizes)}"
        )
    first, *others = corpora
    for corpus in others:
        if corpus.tokenizer_sha256 != first.tokenizer_sha256:
            raise ConfigError(
                f"data: {corpus.path} was made with another tokenizer than {first.path}: its ids "
                "stand for other text; tokenize both with one"
            )


def with_vocabulary(config: RunConfig, corpora: Corpora) -> RunConfig:
    """Fill in model.vocab_size from the data; ConfigError when it is set and too small."""
    needed = corpora.validation.vocab_size
    size = config.model.vocab_size
    if size is not None and size < needed:
        raise ConfigError(f"model.vocab_size={size} is below the data's vocabulary of {needed}")
    if size is not None:
        return config
    model = dataclasses.replace(config.model, vocab_size=needed)
    return config.model_copy(update={"model": model})


def with_total_tokens(config: RunConfig, corpora: Corpora) -> RunConfig:
    """Fill in training.total_tokens of a continual run; ConfigError when set and too large."""
    if config.mode == "pretrain":
        return config
    there = sum(steps_of_domains(config, corpora.train)) * config.training.batch_tokens
    total = config.training.total_tokens
    if total > there:
        raise ConfigError(
            f"training.total_tokens={total} is more than the {there} tokens that the domains have "
            "in whole steps; leave it out to train on all of them"
        )
    try:
        check_schedules(config, total or there)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    training = config.training.model_copy(update={"total_tokens": total or there})
    return config.model_copy(update={"training": training})
