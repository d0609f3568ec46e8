"""The trainer: one training step, top to bottom on one page, and the loop around it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline import Corpus, Loader, evaluation_batches
from data_pipeline.loader import rows_of_rank
from train.callbacks.base import Callback
from train.checkpoint import CheckpointError, CheckpointStore
from train.checkpoint.levels import describe_levels, map_levels
from train.clock import TokenClock
from train.config import RunConfig
from train.continual import DomainStream, open_loader
from train.engines.parts import Engine
from train.evaluate.perplexity import EvaluationInterruptedError, HeldOut, evaluate
from train.optim.cadence import NonFinite
from train.optim.levels import periods
from train.parallel.carried import Carried
from train.parallel.part import parameter_names
from train.run_folder import CHECKPOINTS
from train.signals import StopSignals


class NonFiniteError(RuntimeError):
    """Too many steps in a row had an infinite or NaN loss or gradient; no weight moved by it."""


@dataclass(frozen=True)
class StepRecord:
    """What one step did. Rates and counts are over all ranks.

    level_norms, learning_rates: of the levels that fired; level_norms before clipping.
    """

    step: int
    tokens: int
    loss: float  # nats per token that counts
    grad_norm: float
    level_norms: dict[str, float]
    learning_rates: dict[str, float]
    tokens_per_second: float


@dataclass(frozen=True)
class SkippedStep:
    """A step whose loss or gradient was not finite: read, and not trained on."""

    tokens: int  # trained on before it
    step_tokens: int
    problem: NonFinite


@dataclass
class Corpora:
    """The opened data of a run."""

    train: list[Corpus]
    validation: Corpus
    domains: dict[str, Corpus] = field(default_factory=dict)  # held out, of a continual run


@dataclass
class Trainer:
    """Everything of one run on this rank."""

    config: RunConfig
    corpora: Corpora
    signals: StopSignals
    engine: Engine
    callbacks: Sequence[Callback] = ()
    carried: Carried | None = None
    trained_seconds: float = 0.0
    last_evaluation: HeldOut | None = None
    domains_evaluated: int = 0  # at how many ends of domains every domain was evaluated
    level_changes: tuple[str, ...] = ()  # since the checkpoint, one line each

    def __post_init__(self) -> None:
        config = self.config
        self.mesh = self.engine.mesh
        self.ranks = ranks = self.mesh.world
        self.clock = TokenClock(periods(config.model))
        self.cadence = self.engine.make_cadence()
        self.store = CheckpointStore(
            config.run_dir / CHECKPOINTS, ranks, config.checkpoint.keep_last
        )
        self.domains: DomainStream | None = None
        self.loader: Loader | DomainStream
        if config.mode == "continual":
            self.loader = self.domains = DomainStream(config, self.corpora.train, self.mesh.data)
        else:
            self.loader = open_loader(config, self.corpora.train, self.mesh.data)

    @property
    def finished(self) -> bool:
        """Whether training has come to its end: its tokens, or the last of its domains."""
        done = self.clock.tokens >= self.config.training.total_tokens
        return done or (self.domains is not None and self.domains.exhausted)

    @property
    def target_tokens(self) -> int:
        """Tokens after which this call of `fit` ends."""
        stop = self.config.training.stop_at_tokens
        total = self.config.training.total_tokens
        return total if stop is None else min(stop, total)

    def step(self) -> StepRecord | SkippedStep:
        """One training step over the next global batch; skipped by all ranks if it is not finite
        on any of them."""
        started = time.perf_counter()
        batch = next(self.loader)
        loss_sum, carried = self.engine.forward_backward(batch, self.carried)
        finite = carried is None or all(bool(t.isfinite().all()) for t in carried.values())
        counts = [
            loss_sum,
            self.engine.spoken_for(batch.labels).numel(),
            0.0 if finite else math.nan,
        ]
        (loss_sum, valid, _), problem = self.cadence.agree(counts)
        if problem:
            self.cadence.drop()
            self.clock.skip(self.config.training.batch_tokens)
            return SkippedStep(self.clock.tokens, self.config.training.batch_tokens, problem)
        self.carried = carried
        firing = self.clock.advance(self.config.training.batch_tokens)
        report = self.cadence.step(firing, int(valid), self._rate, self.clock.tokens)
        seconds = time.perf_counter() - started
        self.trained_seconds += seconds
        return StepRecord(
            step=self.clock.steps,
            tokens=self.clock.tokens,
            loss=loss_sum / valid,
            grad_norm=report.grad_norm,
            level_norms=report.level_norms,
            learning_rates=report.learning_rates,
            tokens_per_second=self.config.training.batch_tokens / seconds,
        )

    def _rate(self, level: str) -> float:
        """The learning rate of a level at the clock's token count."""
        total = self.config.training.total_tokens
        return self.clock.learning_rate(self.config.optimizer.level(level), total)

    def fit(self) -> int | None:
        """Train to the target; returns the signal that stopped it early, or None.

        Raises NonFiniteError, after a checkpoint, when too many steps in a row were skipped.
        """
        self._notify("on_start")
        if self.level_changes:
            self.save(replace=True)  # from here on the folder's configuration is the new one
        evaluated = self.domains_evaluated
        if not self.finished:
            self._evaluate_domains()
        while self._has_more() and not self._stop_requested():
            before = self.clock.tokens
            record = self.step()
            if isinstance(record, SkippedStep):
                self._skipped(record)
                continue
            for callback in self.callbacks:
                callback.on_step(self, record)
            if self.finished:
                break  # the last evaluation and checkpoint are below
            self._evaluate_domains()
            if self._crossed(self.config.evaluation.every_tokens, before):
                self._evaluate(self.config.evaluation.max_tokens)
            if self._crossed(self.config.checkpoint.every_tokens, before):
                self.save()
        stopped = self._stop_requested()
        flushed = False
        if self.finished and not stopped:
            flushed = self.config.training.flush and self._flush()
            stopped = not (self._evaluate_domains(last=True) and self._evaluate(None))
        self.save(replace=flushed or self.domains_evaluated > evaluated)
        self._notify("on_end")
        return self.signals.received if stopped else None

    def _has_more(self) -> bool:
        """Whether there is a step to take in this call of `fit`."""
        return self.clock.tokens < self.target_tokens and not self.finished

    def _skipped(self, record: SkippedStep) -> None:
        """Tell of a skipped step; after too many in a row, save and give up."""
        for callback in self.callbacks:
            callback.on_skip(self, record)
        in_a_row = self.clock.skipped_in_a_row
        if in_a_row <= self.config.training.max_skipped_in_a_row:
            return
        self.clock.skipped_in_a_row = 0  # a resume may try as often again
        self.save()
        self._notify("on_end")
        raise NonFiniteError(
            f"{in_a_row} steps in a row were skipped after {self.clock.tokens:,} tokens: "
            f"{record.problem}. Lower optimizer.lr or model.titans.scan.eta_max, or raise "
            "training.max_skipped_in_a_row; a checkpoint was saved, and no weight was moved"
        )

    def _flush(self) -> bool:
        """Fire what is pending at the end of training; whether anything was."""
        pending = self.cadence.pending_tokens
        report = self.cadence.flush(self._rate, self.clock.tokens)
        if report is None:
            return False
        for callback in self.callbacks:
            callback.on_flush(self, pending, report)
        return True

    def _crossed(self, every: int, before: int) -> bool:
        """Whether this step passed a multiple of `every` tokens."""
        return self.clock.tokens // every > before // every

    def _stop_requested(self) -> bool:
        """Whether any rank was told to stop; the ranks agree on the answer."""
        flag = float(self.signals.received is not None)
        return self.ranks.sum([flag])[0] > 0

    def _evaluate(self, max_tokens: int | None) -> bool:
        """Evaluate and tell the callbacks; False when a signal interrupted it."""
        try:
            self.last_evaluation = self.evaluate(max_tokens)
        except EvaluationInterruptedError:
            return False
        for callback in self.callbacks:
            callback.on_evaluation(self, self.last_evaluation)
        return True

    def _evaluate_domains(self, last: bool = False) -> bool:
        """At the end of a domain, and of training, evaluate on every domain; False when a signal
        interrupted it."""
        if self.domains is None:
            return True
        reached = self.domains.finished + int(last and self.domains.inside)
        if reached <= self.domains_evaluated:
            return True
        most = self.config.evaluation.max_tokens
        try:
            found = {n: self.evaluate(most, corpus) for n, corpus in self.corpora.domains.items()}
        except EvaluationInterruptedError:
            return False
        self.domains_evaluated = reached
        for name, held_out in found.items():
            for callback in self.callbacks:
                callback.on_domain_evaluation(self, name, held_out)
        return True

    def evaluate(self, max_tokens: int | None, corpus: Corpus | None = None) -> HeldOut:
        """Held-out loss over at most max_tokens tokens (None: all) of `corpus` (None: data's)."""
        data = self.config.data
        corpus = corpus or self.corpora.validation
        batches = evaluation_batches(
            corpus,
            seq_len=data.seq_len,
            batch_size=self.config.evaluation.batch_rows,
            dp_rank=self.mesh.data.rank,
            dp_size=self.mesh.data.size,
            packing=data.packing,
            align=self.config.model.titans.scan.projection_chunk,
            max_tokens=max_tokens,
        )
        return evaluate(
            self.engine, batches, corpus.token_bytes, self.ranks, should_stop=self._stop_requested
        )

    def _notify(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self)

    def save(self, replace: bool = False) -> None:
        """Write a checkpoint of everything that the rest of the run depends on.

        replace: also where there is one of this moment already, which is then out of date.
        """
        optimizer, cadence_plain = self.cadence.state_dict()
        parameters = self.engine.saved_parameters()
        tensors = {f"model/{name}": tensor for name, tensor in parameters.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
        tensors |= self.engine.carried_rows(self.carried, self._own_rows())
        evaluation = self.last_evaluation
        plain: dict[str, Any] = {
            "clock": self.clock.state_dict(),
            "cadence": cadence_plain,
            "cms": describe_levels(self.config.model.cms),
            "loader": self.loader.state_dict(),
            "tokenizer": self.corpora.validation.tokenizer_sha256,
            "trained_seconds": self.trained_seconds,
            "evaluation": vars(evaluation) if evaluation else None,
            "domains_evaluated": self.domains_evaluated,
            "streams": self.config.training.state_carry == "stream" and self.clock.steps > 0,
        }
        folder = self.store.save(self.clock.tokens_read, tensors, plain, replace)
        for callback in self.callbacks:
            callback.on_checkpoint(self, folder)

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, to the bit.

        Raises CheckpointError when its levels can't become this model's.
        """
        folder = self.store.newest()
        plain = self.store.plain(folder)
        try:
            mapping = map_levels(plain["cms"], self.config.model.cms)
        except ValueError as error:
            raise CheckpointError(f"{folder} can't be resumed: {error}") from None
        parameters = mapping.rename(self.store.tensors(folder, "model/"))
        parameters |= mapping.start_added(self.config.model, self.config.seed)
        self.engine.load_parameters(parameters, self._elsewhere)
        optimizer = mapping.rename(self.store.tensors(folder, "optimizer/"))
        self.cadence.load_state_dict(
            {name.removeprefix("optimizer/"): tensor for name, tensor in optimizer.items()},
            plain["cadence"],
            self._elsewhere,
        )
        self.clock.load_state_dict(plain["clock"])
        self.loader.load_state_dict(plain["loader"])
        self.trained_seconds = plain["trained_seconds"]
        self.domains_evaluated = plain["domains_evaluated"]
        if plain["evaluation"]:
            self.last_evaluation = HeldOut(**plain["evaluation"])
        if plain["streams"]:
            rows = self._own_rows()
            saved = [self.store.tensors(folder, f"stream/{row}/") for row in rows]
            self.carried = self.engine.take_up_rows(saved, rows)
        self.level_changes = mapping.changes

    @property
    def _elsewhere(self) -> set[str]:
        """Names of the model's parameters of which this rank has nothing."""
        return parameter_names(self.config.model) - self.engine.parameters.keys()

    def _own_rows(self) -> range:
        """The global batch rows that this rank holds."""
        return range(
            *rows_of_rank(self.config.batch_rows, self.mesh.data.rank, self.mesh.data.size)
        )
