"""python -m train CONFIG [key=value ...] [--resume | --resume-or-start]: one run.

With --dry-run --world-size N [--rank R]: say what a rank would hold and send, and train nothing.
"""

from __future__ import annotations

from train.signals import (
    StoppedError,
    StopSignals,
    agreed_status,
    stop_signals,
    walltime_deadline,
)

if __name__ == "__main__":  # at once: the imports below take seconds
    listening = StopSignals()
    listening.listen()

import argparse
import dataclasses
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from data_pipeline import Corpus, CorruptDataError, DataError
from data_pipeline.command import as_command
from data_pipeline.redaction import redact
from train.callbacks.base import Callback
from train.callbacks.faults import Faults
from train.callbacks.metrics import Metrics
from train.callbacks.mlflow import MLflow
from train.callbacks.progress import Progress
from train.checkpoint import CheckpointError, SaveError
from train.checkpoint.load import initial_parameters
from train.config import ConfigError, RunConfig, load_config
from train.continual import steps_of_domains
from train.dry_run.report import print_dry_run
from train.engines import layout_of, open_engine
from train.memory import OutOfMemoryError, building_report, is_out_of_memory, memory_report
from train.parallel.pulse import RankLostError
from train.parallel.ranks import NoDeviceError, Ranks
from train.records import Corpora, NonFiniteError
from train.redaction import redact_logging
from train.run_folder import RunFolderError, claim, continues, goes_back_to, save_config, went_back
from train.trainer import Trainer
from train.watchdog import HANG, Watchdog

FAILED = 1
USER_ERROR = 2
USER_ERRORS = (ConfigError, RunFolderError, CheckpointError, DataError, CorruptDataError)
SAID = "another rank has said so"
CAUSE_FIRST_S = 2.0  # for the rank to end whose error it is that others lost it
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
DISK_HINT = "what was saved before is whole, and --resume goes on from it"


def main(arguments: list[str] | None = None, signals: StopSignals | None = None) -> int:
    """Exit status: 0 done; 2 bad input (one line on stderr); 128 + n on signal n, but 75 (start me
    again) on SIGUSR1 and at the walltime; 76 a rank hangs or was lost; 1 failed otherwise.

    signals: those that are listened to already; None: from the beginning of a run to its end.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train a model of the Hope family from a YAML configuration.",
    )
    parser.add_argument("config", help="YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="e.g. optimizer.lr=3e-4 run_dir=runs/a",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--resume", action="store_true", help="continue the run in run_dir from its last checkpoint"
    )
    how.add_argument(
        "--resume-or-start",
        action="store_true",
        help="for launchers that restart: continue where run_dir has a checkpoint, else start",
    )
    parser.add_argument(
        "--resume-from",
        metavar="NAME",
        help="continue from this checkpoint, e.g. tokens-000000001048576; later ones are set aside",
    )
    how.add_argument(
        "--dry-run", action="store_true", help="say what a rank would hold and send; don't train"
    )
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the dry run")
    parser.add_argument("--rank", type=int, default=0, help="which of them it is (default 0)")
    # The deepspeed launcher passes it; LOCAL_RANK in the environment is what counts.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if not options.dry_run and (options.world_size, options.rank) != (1, 0):
        parser.error("--world-size and --rank belong to --dry-run; torchrun sets those of a run")
    if options.dry_run and options.resume_from is not None:
        parser.error("--dry-run trains nothing, and --resume-from belongs to a run")
    redact_logging()
    if options.dry_run and signals is not None:
        signals.let_through()
    try:
        try:
            config = load_config(options.config, options.overrides)
        except ConfigError as error:  # one line a machine; the ranks don't know each other yet
            return _tell(error, USER_ERROR, int(os.environ.get("LOCAL_RANK", "0")) == 0)
        if options.dry_run:
            if config.model.vocab_size is None:
                config = with_vocabulary(config, open_corpora(config))
            print_dry_run(config, options.world_size, options.rank)
            return 0
        named = options.resume_from
        resume = options.resume or named is not None
        return train(config, resume, options.resume_or_start, named, signals)
    except SaveError as error:
        return _tell(error, FAILED)
    except USER_ERRORS as error:
        return _tell(error, USER_ERROR, SAID not in getattr(error, "__notes__", ()))
    except NoDeviceError as error:
        return _tell(error, USER_ERROR)
    except RankLostError as error:
        status = _tell(error, HANG)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # the job's status is that of the first to end
            time.sleep(CAUSE_FIRST_S)
        return status
    except (NonFiniteError, FloatingPointError, OutOfMemoryError) as error:
        return _tell(error, FAILED)
    except Exception as error:
        if options.dry_run and isinstance(error, BrokenPipeError):
            raise
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            return _tell(f"{error}; {DISK_HINT}", FAILED)
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        return FAILED


def _tell(error: Exception | str, status: int, here: bool = True) -> int:
    if here:
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
    return status


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
            trainer.callbacks = [*trainer.callbacks, faults]
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

    corpora = open_corpora(config, poll)
    config = with_total_tokens(with_vocabulary(config, corpora), corpora)
    layout_of(config, ranks.size)
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


def prepare_torch(num_threads: int | None) -> None:
    """Process-wide settings of torch. Decaying fast weights go denormal, which CPUs do slowly."""
    torch.set_flush_denormal(True)
    if num_threads is not None:
        torch.set_num_threads(num_threads)


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
    everything = (*train_corpora, validation, *domains.values())
    sizes = {corpus.vocab_size for corpus in everything}
    if len(sizes) > 1:
        raise ConfigError(
            f"data: the corpora have different vocabularies, of sizes {sorted(sizes)}"
        )
    first, others = everything[0], everything[1:]
    for corpus in others:
        if corpus.tokenizer_sha256 != first.tokenizer_sha256:
            raise ConfigError(
                f"data: {corpus.path} was made with another tokenizer than {first.path}: its ids "
                "stand for other text; tokenize both with one"
            )
    return Corpora(train_corpora, validation, domains)


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
        config.check_schedules(total or there)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    training = config.training.model_copy(update={"total_tokens": total or there})
    return config.model_copy(update={"training": training})


if __name__ == "__main__":
    sys.exit(as_command(partial(main, signals=listening)))
