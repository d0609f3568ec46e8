"""python -m train CONFIG [key=value ...] [--resume]: train, or continue, one run.

With --dry-run --world-size N [--rank R]: say what a rank would hold and send, and train nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from contextlib import ExitStack, nullcontext

import torch

from data_pipeline import Corpus, CorruptDataError, DataError
from train.callbacks.base import Callback
from train.callbacks.metrics import Metrics
from train.callbacks.mlflow import MLflow
from train.callbacks.progress import Progress
from train.checkpoint import CheckpointError
from train.checkpoint.load import initial_parameters
from train.config import ConfigError, RunConfig, load_config
from train.continual import steps_of_domains
from train.dry_run.report import print_dry_run
from train.engines import layout_of, open_engine
from train.parallel.data_parallel import DataParallel
from train.run_folder import RunFolderError, check_fresh, check_same_run, run_lock, save_config
from train.signals import stop_signals
from train.trainer import Corpora, NonFiniteError, Trainer

USER_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input (one line on stderr), 1 failed, 128 + n on signal n."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train a model of the Hope family from a YAML configuration.",
    )
    parser.add_argument("config", help="YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=3e-4 run_dir=runs/a"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in run_dir from its last checkpoint"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what a rank would hold and send; don't train",
    )
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the dry run")
    parser.add_argument("--rank", type=int, default=0, help="which of them it is (default 0)")
    options = parser.parse_intermixed_args(arguments)
    if not options.dry_run and (options.world_size, options.rank) != (1, 0):
        parser.error("--world-size and --rank belong to --dry-run; torchrun sets those of a run")
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            if config.model.vocab_size is None:
                config = with_vocabulary(config, open_corpora(config))
            print_dry_run(config, options.world_size, options.rank)
            return 0
        return train(config, options.resume)
    except (ConfigError, RunFolderError, CheckpointError, DataError, CorruptDataError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def train(config: RunConfig, resume: bool) -> int:
    """Run `config` to its end or to a signal; returns the exit status."""
    prepare_torch(config.num_threads)
    corpora = open_corpora(config)
    config = with_total_tokens(with_vocabulary(config, corpora), corpora)
    with ExitStack() as stack:
        signals = stack.enter_context(stop_signals())
        ranks = stack.enter_context(DataParallel())
        layout_of(config, ranks.size)
        initial = None
        if config.init_from is not None and not resume:
            tokenizer = corpora.validation.tokenizer_sha256
            initial = initial_parameters(config.init_from, config.model, config.seed, tokenizer)
        stack.enter_context(run_lock(config.run_dir) if ranks.is_first else nullcontext())
        if resume:
            check_same_run(config)
        elif ranks.is_first:
            check_fresh(config.run_dir)
        engine = open_engine(config, ranks, initial)
        callbacks: list[Callback] = []
        if ranks.is_first:
            callbacks = [Progress(), Metrics(config.run_dir)]
            if config.mlflow.enabled:
                callbacks.append(MLflow(config.mlflow, config.run_dir))
        trainer = Trainer(config, corpora, signals, engine, callbacks)
        stack.callback(trainer.loader.close)
        if resume:
            trainer.resume()
        if ranks.is_first:
            save_config(config)
        stopped_by = trainer.fit()
    return 0 if stopped_by is None else 128 + stopped_by


def prepare_torch(num_threads: int | None) -> None:
    """Process-wide settings of torch. Decaying fast weights go denormal, which CPUs do slowly."""
    torch.set_flush_denormal(True)
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def open_corpora(config: RunConfig) -> Corpora:
    """Open the shards that `data` names. Raises DataError when one is missing or damaged."""
    where = config.data.where
    train_corpora = [Corpus.open(**where(source.path)) for source in config.data.train]
    validation = Corpus.open(**where(config.data.validation))
    domains = {
        source.domain: Corpus.open(**where(source.validation))
        for source in config.data.train
        if source.validation is not None
    }
    everything = (*train_corpora, validation, *domains.values())
    sizes = {corpus.vocab_size for corpus in everything}
    if len(sizes) > 1:
        raise ConfigError(
            f"data: the corpora have different vocabularies, of sizes {sorted(sizes)}"
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
    training = config.training.model_copy(update={"total_tokens": total or there})
    return config.model_copy(update={"training": training})


if __name__ == "__main__":
    sys.exit(main())
