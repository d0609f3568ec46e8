"""One run from its configuration to its exit status: data, ranks, claim on the folder, trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from data_pipeline import CorruptDataError, DataError
from train.callbacks.base import Callback
from train.callbacks.faults import Faults
from train.callbacks.metrics import Metrics
from train.callbacks.mlflow import MLflow, check_tracking
from train.callbacks.profiler import profilers
from train.callbacks.progress import Progress
from train.checkpoint import CheckpointError
from train.checkpoint.load import initial_parameters
from train.config import ConfigError, RunConfig
from train.corpora import open_corpora, with_total_tokens, with_vocabulary
from train.engines import check_kernels, layout_of, open_engine
from train.memory import OutOfMemoryError, building_report, is_out_of_memory, memory_report
from train.parallel.ranks import Ranks, current_device
from train.run_folder import RunFolderError, claim, continues, goes_back_to, save_config, went_back
from train.signals import (
    StoppedError,
    StopSignals,
    agreed_status,
    stop_signals,
    walltime_deadline,
)
from train.trainer import Trainer
from train.watchdog import Watchdog

USER_ERRORS = (ConfigError, RunFolderError, CheckpointError, DataError, CorruptDataError)
SAID = "another rank has said so"


def train(
    config: RunConfig,
    resume: bool,
    or_start: bool = False,
    resume_from: str | None = None,
    signals: StopSignals | None = None,
) -> int:
    """Run `config` to its end or until it is asked to stop; returns the exit status.

    resume: continue the run in run_dir; or_start: where it has a checkpoint, else begin.
    resume_from: the name of the checkpoint to resume from; None: the newest that verifies.
    signals: those that are listened to already; None: from here to the end.

    A user's error that several ranks find has the note SAID on all of them but one.
    """
    prepare_torch(config.num_threads)
    with ExitStack() as stack:
        signals = signals or stack.enter_context(stop_signals())
        training = config.training
        signals.deadline = walltime_deadline(training.walltime_s, training.walltime_margin_s)
        ranks = stack.enter_context(Ranks())
        stack.enter_context(ranks.pulse.library_collectives())
        stack.enter_context(_said_once(ranks))
        watchdog = stack.enter_context(Watchdog(config.watchdog, config.run_dir, ranks))
        faults = Faults(config, ranks)
        try:
            trainer, goes_on = _prepare(config, resume, or_start, ranks, signals, watchdog, stack)
        except StoppedError as stopped:
            return stopped.status
        try:
            if goes_on:
                resume_from = goes_back_to(config.run_dir, resume_from, ranks)
                trainer.resume(resume_from)
                if resume_from is not None and ranks.is_first:
                    went_back(config.run_dir, resume_from)
            if ranks.is_first:
                save_config(trainer.config)
            beside = profilers(config, ranks)
            for profiler in beside:
                stack.callback(profiler.close)
            trainer.callbacks = [*trainer.callbacks, *beside, faults]
            return trainer.fit() or 0
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(f"{error}\n{memory_report(trainer, error)}") from None


@contextmanager
def _said_once(ranks: Ranks) -> Iterator[None]:
    """Notes on a user's error that another rank has said so; what one rank alone finds, such as a
    damaged shard, it has to say itself."""
    try:
        yield
    except USER_ERRORS as error:
        if not ranks.says_first(str(error)):
            error.add_note(SAID)
        raise


def _prepare(
    config: RunConfig,
    resume: bool,
    or_start: bool,
    ranks: Ranks,
    signals: StopSignals,
    watchdog: Watchdog,
    stack: ExitStack,
) -> tuple[Trainer, bool]:
    """A trainer before its first step, and whether it is to resume. Raises StoppedError when asked
    to stop meanwhile."""

    def poll() -> None:
        ranks.pulse.enter("open")
        if status := agreed_status(signals, ranks):
            raise StoppedError(status)

    if config.mlflow.enabled:
        _check_tracking(config, ranks)
    corpora = open_corpora(config, poll)
    config = with_total_tokens(with_vocabulary(config, corpora), corpora)
    layout_of(config, ranks.size)
    check_kernels(config, current_device())
    initial = None
    if config.init_from is not None and not continues(config, resume, or_start):
        tokenizer = corpora.validation.tokenizer_sha256
        initial = initial_parameters(config.init_from, config.model, config.seed, tokenizer)
    resume = stack.enter_context(claim(config, ranks, resume, or_start))
    watchdog.share()
    poll()
    try:
        engine = open_engine(config, ranks, initial)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"{error}\n{building_report(config, ranks.rank)}") from None
    callbacks: list[Callback] = []
    if ranks.is_first:
        callbacks = [Progress(), Metrics(config.run_dir)]
        if config.mlflow.enabled:
            callbacks.append(MLflow(config.mlflow, config.run_dir))
    trainer = Trainer(config, corpora, signals, engine, callbacks)
    stack.callback(trainer.loader.close)
    stack.callback(trainer.store.close)
    return trainer, resume


def _check_tracking(config: RunConfig, ranks: Ranks) -> None:
    """Raise ConfigError on every rank where the first one, which tracks, finds that it can't."""
    refused = None
    if ranks.is_first:
        try:
            check_tracking(config.mlflow, config.run_dir)
        except ConfigError as error:
            refused = str(error)
    if refused := ranks.broadcast(refused):
        raise ConfigError(refused)


def prepare_torch(num_threads: int | None) -> None:
    """Process-wide settings of torch. Decaying fast weights go denormal, which CPUs do slowly."""
    torch.set_flush_denormal(True)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
