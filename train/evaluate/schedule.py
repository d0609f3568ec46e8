"""When a run looks at held-out text: at multiples of evaluation.every_tokens, at the ends of
domains, and at the end of training over everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipeline import Corpus
from train.evaluate.perplexity import (
    EvaluationInterruptedError,
    HeldOut,
    evaluate,
    held_out_batches,
)

if TYPE_CHECKING:
    from train.trainer import Trainer


class Evaluations:
    """The evaluations of a run, on this rank; all ranks take part in each. Nothing of the trainer
    is changed by them.

    last: what the newest found; tokens: when it was, by the clock; domains: at how many ends of
    domains every domain was evaluated; unsaved: whether the newest is in no checkpoint yet.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.last: HeldOut | None = None
        self.tokens = 0
        self.domains = 0
        self.unsaved = False

    def if_due(self) -> None:
        """Evaluate at multiples of evaluation.every_tokens, also one that a signal cut short."""
        settings = self._trainer.config.evaluation
        now = self._trainer.clock.tokens // settings.every_tokens
        if not self._trainer.finished and now > self.tokens // settings.every_tokens:
            self._evaluate(settings.max_tokens)

    def over_everything(self) -> bool:
        """Evaluate over everything, unless the newest did and was of this moment; False when a
        signal interrupted it."""
        whole = self._trainer.corpora.held_out_is_whole(self.last)
        return (whole and self.tokens == self._trainer.clock.tokens) or self._evaluate(None)

    def of_domains(self, last: bool = False) -> bool:
        """Evaluate on every domain where one or, with `last`, training ends; False when a signal
        interrupted it."""
        trainer = self._trainer
        if trainer.domains is None:
            return True
        reached = trainer.domains.ends if last else trainer.domains.finished
        if reached <= self.domains:
            return True
        most = trainer.config.evaluation.max_tokens
        try:
            found = {n: self._over(c, most) for n, c in trainer.corpora.domains.items()}
        except EvaluationInterruptedError:
            return False
        self.domains, self.unsaved = reached, True
        for name, held_out in found.items():
            for callback in trainer.callbacks:
                callback.on_domain_evaluation(trainer, name, held_out)
        return True

    def out_of_date(self) -> None:
        """Weights were moved without a step: evaluations of this moment are to be done again."""
        self.tokens = min(self.tokens, self._trainer.clock.tokens - 1)
        if self._trainer.domains is not None:
            self.domains = min(self.domains, self._trainer.domains.ends - 1)

    def state_dict(self) -> dict[str, Any]:
        """What was found last and when, as plain data."""
        return {
            "evaluation": vars(self.last) if self.last else None,
            "evaluated_tokens": self.tokens,
            "domains_evaluated": self.domains,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; other keys are left alone."""
        self.domains = state["domains_evaluated"]
        self.tokens = state["evaluated_tokens"]
        self.last = HeldOut(**state["evaluation"]) if state["evaluation"] else None

    def _evaluate(self, max_tokens: int | None) -> bool:
        """Evaluate and tell the callbacks; False when a signal interrupted it."""
        trainer = self._trainer
        try:
            self.last = self._over(trainer.corpora.validation, max_tokens)
        except EvaluationInterruptedError:
            return False
        self.tokens, self.unsaved = trainer.clock.tokens, True
        for callback in trainer.callbacks:
            callback.on_evaluation(trainer, self.last)
        return True

    def _over(self, corpus: Corpus, max_tokens: int | None) -> HeldOut:
        """Held-out loss over at most max_tokens tokens (None: all) of `corpus`."""
        trainer = self._trainer
        ranks = trainer.mesh.data
        batches = held_out_batches(trainer.config, corpus, max_tokens, ranks.rank, ranks.size)
        return evaluate(
            trainer.engine,
            batches,
            corpus.token_bytes,
            trainer.ranks,
            name=str(corpus.path),
            should_stop=trainer.stop_requested,
        )
