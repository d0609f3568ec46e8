"""The trainer: one training step, top to bottom on one page, and the loop around it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from data_pipeline import DataError, Loader
from data_pipeline.loader import rows_of_rank
from train.callbacks.base import Callback
from train.checkpoint import CheckpointError, SaveError, open_store
from train.checkpoint.levels import describe_levels, map_levels
from train.clock import TokenClock
from train.code_version import code_version
from train.config import RunConfig
from train.continual import DomainStream, open_loader
from train.corpora import Corpora
from train.engines.parts import Engine
from train.evaluate.schedule import Evaluations
from train.optim.finite import OverflowedError
from train.optim.levels import periods
from train.parallel.carried import Carried
from train.parallel.part import parameter_names
from train.parallel.placement import Stored
from train.records import NonFiniteError, NothingCounts, Problem, SkippedStep, StepRecord
from train.redaction import redact_tree
from train.signals import StopSignals, agreed_status
from train.spikes import LeftOut, Rollback, Spike, SpikeWatch
from train.utilisation import Utilisation, peak_memory


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
    level_changes: tuple[str, ...] = ()  # since the checkpoint, one line each
    stop_status: int | None = None  # exit status that the ranks agreed to stop with

    def __post_init__(self) -> None:
        config = self.config
        self.mesh = self.engine.mesh
        self.ranks = ranks = self.mesh.world
        self.clock = TokenClock(periods(config.model))
        self.cadence = self.engine.make_cadence()
        self.store = open_store(config, ranks)
        self.spikes = SpikeWatch(config.spikes)
        self.evaluations = Evaluations(self)
        self.utilisation = Utilisation.of_run(config, ranks.size, self.mesh.device)
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
        training = self.config.training
        return min(training.stop_at_tokens or training.total_tokens, training.total_tokens)

    def step(self) -> StepRecord | SkippedStep:
        """One training step over the next global batch; skipped by all ranks if it is not finite
        on any of them, or where spikes of the loss are looked after."""
        started = time.perf_counter()
        pulse = self.ranks.pulse
        pulse.enter("data", self.clock.steps + self.clock.skipped_steps + 1)
        position = self.loader.position
        domain = 0 if self.domains is None else self.domains.finished
        batch = next(self.loader)
        data_seconds = time.perf_counter() - started
        if left_out := self.spikes.leaves_out(position, self.config.batch_rows):
            return self._skip(position, left_out)
        loss_sum, carried = self.engine.forward_backward(batch, self.carried)
        finite = carried is None or all(bool(t.isfinite().all()) for t in carried.values())
        counted = self.engine.spoken_for(batch.labels).numel()
        pulse.enter("reduce")
        told = [loss_sum, counted, 0.0 if finite else math.nan]
        (loss_sum, valid, _), problem = self.cadence.agree(told)
        if not problem and not valid:
            return self._skip(position, NothingCounts())
        before = self.clock.state_dict(), self.spikes.state_dict()
        if unfit := problem or self.spikes.check(loss_sum / valid, domain):
            return self._skip(position, unfit)
        pulse.enter("optimizer")
        firing = self.clock.advance(self.config.training.batch_tokens)
        try:
            report = self.cadence.step(firing, int(valid), self._rate, self.clock.tokens)
        except OverflowedError as error:
            self.clock.load_state_dict(before[0])
            self.spikes.load_state_dict(before[1])
            return self._skip(position, error.problem)
        self.carried = carried
        seconds = time.perf_counter() - started
        self.trained_seconds += seconds
        rate = self.config.training.batch_tokens / seconds
        return StepRecord(
            step=self.clock.steps,
            tokens=self.clock.tokens,
            loss=loss_sum / valid,
            grad_norm=report.grad_norm,
            level_norms=report.level_norms,
            learning_rates=report.learning_rates,
            tokens_per_second=rate,
            data_seconds=data_seconds,
            tflops_per_rank=self.utilisation.tflops_per_rank(rate),
            mfu=self.utilisation.mfu(rate),
            peak_memory=peak_memory(self.mesh.device),
        )

    def _skip(self, position: int, problem: Problem) -> SkippedStep:
        """End a step without any effect but the count of it."""
        tokens = self.config.training.batch_tokens
        if not isinstance(problem, LeftOut):  # whose batch had no gradient
            self.cadence.drop()
        self.clock.skip(tokens)
        return SkippedStep(self.clock.tokens, tokens, position, problem)

    def _rate(self, level: str) -> float:
        """The learning rate of a level at the clock's token count."""
        total = self.config.training.total_tokens
        return self.clock.learning_rate(self.config.optimizer.level(level), total)

    def fit(self) -> int | None:
        """Train to the target; returns the exit status that it was asked to stop with, or None.

        Raises NonFiniteError, after a checkpoint, when too many steps in a row were skipped, or
        undone in all, and SaveError when the last checkpoint could not be written.
        """
        self.ranks.pulse.enter("start", self.clock.steps + self.clock.skipped_steps)
        self._notify("on_start")
        self.store.clean()
        self.store.on_complete = self._saved
        if self.level_changes:
            self.save(replace=True)  # from here on the folder's configuration is the new one
        if not self.finished:
            self.evaluations.of_domains()
            self.evaluations.if_due()
        while self._has_more() and not self.stop_requested():
            before = self.clock.tokens
            record = self.step()
            if isinstance(record, SkippedStep):
                self._skipped(record)
                self.evaluations.of_domains()
                continue
            for callback in self.callbacks:
                callback.on_step(self, record)
            if self.finished:
                break  # the last evaluation and checkpoint are below
            self.evaluations.of_domains()
            self.evaluations.if_due()
            every = self.config.checkpoint.every_tokens
            if self.clock.tokens // every > before // every:
                self.save()
        stopped = self.stop_requested()
        flushed = False
        if self.finished and not stopped:
            flushed = self.config.training.flush and self._flush()
            stopped = not (
                self.evaluations.of_domains(last=True) and self.evaluations.over_everything()
            )
        self.save(replace=flushed or self.evaluations.unsaved)
        self.store.finish()
        self._notify("on_end")
        return self.stop_status if stopped else None

    def _has_more(self) -> bool:
        """Whether there is a step to take in this call of `fit`."""
        return self.clock.tokens < self.target_tokens and not self.finished

    def _skipped(self, record: SkippedStep) -> None:
        """Tell of a skipped step; after too many in a row, save and give up."""
        for callback in self.callbacks:
            callback.on_skip(self, record)
        if isinstance(record.problem, LeftOut):
            self.clock.skipped_in_a_row = 0  # meant, and no sign of trouble
        if isinstance(record.problem, Spike) and record.problem.undo:
            self._roll_back(record.position, record.problem)
        in_a_row = self.clock.skipped_in_a_row
        if in_a_row <= self.config.training.max_skipped_in_a_row:
            return
        self.clock.skipped_in_a_row = 0  # a resume may try as often again
        remedy = "Lower optimizer.lr or model.titans.scan.eta_max"
        if isinstance(record.problem, NothingCounts):
            remedy = "Look for damaged shards in data.train"
        self._give_up(
            f"{in_a_row} steps in a row were skipped after {self.clock.tokens:,} tokens: "
            f"{record.problem}. {remedy}, or raise training.max_skipped_in_a_row; a checkpoint "
            "was saved, and no weight was moved"
        )

    def _roll_back(self, position: int, spike: Spike) -> None:
        """Go back to the newest checkpoint before the batches that a spike is blamed on, and leave
        them out; where there is none, stay, with the step skipped.

        position: of the spike's batch. Raises NonFiniteError after spikes.max_rollbacks of them.
        """
        settings, rows = self.config.spikes, self.config.batch_rows
        if self.spikes.rollbacks >= settings.max_rollbacks:
            self._give_up(
                f"the loss spiked again after {self.spikes.rollbacks} rollbacks: {spike}. Lower "
                "optimizer.lr, or raise spikes.threshold or spikes.max_rollbacks; a checkpoint was "
                "saved"
            )
        first = max(0, position - (settings.skip_batches - 1) * rows)
        try:
            self.store.wait()
            folder = self.store.newest(first * self.config.data.seq_len)
        except CheckpointError:
            return
        positions = tuple(range(first, position + 1, rows))
        from_tokens = self.clock.tokens
        self.load(folder)
        number = self.spikes.leave_out(positions, rows)
        rollback = Rollback(number, folder.name, from_tokens, positions, spike)
        for callback in self.callbacks:
            callback.on_rollback(self, rollback)

    def _give_up(self, why: str) -> NoReturn:
        """Save, and raise NonFiniteError."""
        self.save()
        self.store.finish()
        self._notify("on_end")
        raise NonFiniteError(why)

    def _flush(self) -> bool:
        """Fire what is pending at the end of training; whether anything was. Evaluations of this
        moment, by a run that had ended without it, are then out of date."""
        pending = self.cadence.pending_tokens
        report = self.cadence.flush(self._rate, self.clock.tokens)
        if report is None:
            return False
        self.evaluations.out_of_date()
        for callback in self.callbacks:
            callback.on_flush(self, pending, report)
        return True

    def stop_requested(self) -> bool:
        """Whether any rank was told to stop; the ranks agree on the answer."""
        self.stop_status = self.stop_status or agreed_status(self.signals, self.ranks)
        return self.stop_status is not None

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
        plain: dict[str, Any] = {
            "config": redact_tree(self.config.model_dump(mode="json")),
            "code": code_version(),
            "data": self.corpora.fingerprints(),
            "clock": self.clock.state_dict(),
            "cadence": cadence_plain,
            "cms": describe_levels(self.config.model.cms),
            "loader": self.loader.state_dict(),
            "tokenizer": self.corpora.validation.tokenizer_sha256,
            "trained_seconds": self.trained_seconds,
            **self.evaluations.state_dict(),
            "spikes": self.spikes.state_dict(),
            "streams": self.config.training.state_carry == "stream" and self.clock.steps > 0,
        }
        self.evaluations.unsaved = False
        self.store.save(self.clock.tokens_read, tensors, plain, replace)

    def _saved(self, folder: Any) -> None:
        """Tell of a checkpoint that is complete; of one written beside training, some steps on."""
        for callback in self.callbacks:
            callback.on_checkpoint(self, folder)

    def resume(self, name: str | None = None) -> None:
        """Continue, to the bit, from the checkpoint of that name, or the newest that verifies.

        Later ones are set aside. Raises CheckpointError when there is none, when the one that was
        named is damaged, and when its levels can't become this model's; SaveError where later ones
        can't be set aside, which another resume would find.
        """
        self.load(self.store.newest() if name is None else self.store.find(name))
        if self.store.still_there is not None:
            raise SaveError(f"can't set aside what is after it: {self.store.still_there}")

    def load(self, folder: Any, rewind: bool = True) -> None:
        """Take up what a checkpoint holds, whatever this one is in; rewind: later ones go aside."""
        self.carried = None
        plain = self.store.plain(folder)
        try:
            self._take_up(folder, plain)
            told = self.corpora.held_out_changes(plain.get("data", {}))
        except (CheckpointError, DataError):
            raise
        except ValueError as error:
            raise CheckpointError(f"{folder} can't be resumed: {error}") from None
        except (LookupError, TypeError, AttributeError) as error:
            reason = f"it does not hold what a run needs ({type(error).__name__}: {error})"
            raise CheckpointError(f"{folder} can't be resumed: {reason}") from error
        if rewind and (later := self.store.rewind_to(folder)):
            when = f" at the next save ({self.store.still_there})" if self.store.still_there else ""
            told.append(f"set aside what is after {folder.name}{when}: {', '.join(later)}")
        if (code := plain.get("code")) != code_version():
            told.append(f"the checkpoint was written by other code: {code}")
        for line in told if self.ranks.is_first else ():
            warnings.warn(line, stacklevel=2)

    def _take_up(self, folder: Any, plain: dict[str, Any]) -> None:
        """Become what a checkpoint says."""
        mapping = map_levels(plain["cms"], self.config.model.cms)
        reader = self.store.reader(folder)
        parameters: dict[str, Tensor | Stored] = {**mapping.rename(reader.all_stored("model/"))}
        parameters |= mapping.start_added(self.config.model, self.config.seed)
        self.engine.load_parameters(parameters, self._elsewhere)
        optimizer = mapping.rename(reader.all_stored("optimizer/"))
        self.cadence.load_state_dict(
            {name.removeprefix("optimizer/"): tensor for name, tensor in optimizer.items()},
            plain["cadence"],
            self._elsewhere,
        )
        self.clock.load_state_dict(plain["clock"])
        self.loader.load_state_dict(plain["loader"])
        self.trained_seconds = plain["trained_seconds"]
        self.evaluations.load_state_dict(plain)
        self.spikes.load_state_dict(plain["spikes"])
        if plain["streams"]:
            rows = self._own_rows()
            saved = [reader.all_whole(f"stream/{row}/") for row in rows]
            self.carried = self.engine.take_up_rows(saved, rows)
        self.level_changes = mapping.changes

    @property
    def _elsewhere(self) -> set[str]:
        """Names of the model's parameters of which this rank has nothing."""
        return parameter_names(self.config.model) - self.engine.parameters.keys()

    def _own_rows(self) -> range:
        """The global batch rows that this rank holds."""
        data = self.mesh.data
        return range(*rows_of_rank(self.config.batch_rows, data.rank, data.size))
