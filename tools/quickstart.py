"""python -m tools.quickstart: real text to a trained, evaluated and sampled small Hope.

Every step is a public command, shown before it runs. What is there already is reused: a finished
run is only reported on, an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline import Corpus
from data_pipeline.command import as_command
from data_pipeline.redaction import redact
from tools.figures import table
from tools.prepare import prepare_sotu, run
from train.callbacks.metrics import read_metrics
from train.callbacks.mlflow import tracking_location
from train.checkpoint import CheckpointStore, open_store
from train.config import ConfigError, RunConfig, load_config
from train.evaluate.perplexity import held_out_batches
from train.evaluate.unigram import count_labels, unigram_loss
from train.parallel.ranks import Ranks
from train.run_files import CONFIG, METRICS

CONFIG_FILE = Path("configs/quickstart.yaml")
PROMPT = "Fellow citizens, the state of our Union is"


def main(arguments: list[str] | None = None) -> int:
    """Run the quickstart; the exit status is the first failing step's, or 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.quickstart", description=main.__doc__)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for the training run"
    )
    options = parser.parse_args(arguments)
    try:
        config = load_config(CONFIG_FILE, options.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        prepare_sotu()
        if not finished(config):
            resume = ["--resume"] if checkpoints(config).complete() else []
            run("train", CONFIG_FILE, *options.overrides, *resume)
        print()
        run("tools.generate", config.run_dir, "--prompt", PROMPT, "--max-tokens", 160)
    except subprocess.CalledProcessError as error:
        return error.returncode
    print("\n" + report(config, options.overrides))
    return 0


def finished(config: RunConfig) -> bool:
    """Whether the run folder holds a checkpoint at the run's last token."""
    complete = checkpoints(config).complete()
    if not complete or not (config.run_dir / CONFIG).exists():
        return False
    return _tokens(config) >= config.training.total_tokens


def report(config: RunConfig, overrides: Sequence[str]) -> str:
    """The closing table: what was trained, how well, and what to do next. Its commands can be typed
    as they stand here, whether the virtual environment is active or not."""
    store = checkpoints(config)
    plain = store.plain(store.complete()[-1])
    rows = read_metrics(config.run_dir / METRICS)
    steps = [row for row in rows if row["kind"] == "step"]
    held_out = [row for row in rows if row["kind"] == "evaluation"][-1]
    last = steps[-20:]
    training_loss = sum(row["loss"] for row in last) / len(last)
    unigram = held_out_unigram(config)
    clock = plain["clock"]
    lines = [
        ["tokens trained", f"{clock['tokens']:,}"],
        ["tokens per second", f"{clock['tokens'] / plain['trained_seconds']:,.0f}"],
        ["training loss, last 20 steps", f"{training_loss:.4f} nats"],
        ["validation loss", f"{held_out['loss']:.4f} nats"],
        ["  a unigram model of the same tokens", f"{unigram:.4f} nats"],
        ["  below the unigram model by", f"{unigram - held_out['loss']:.4f} nats"],
        ["validation perplexity", f"{held_out['perplexity']:.2f}"],
        ["validation bits per byte", f"{held_out['bits_per_byte']:.4f}"],
    ]
    for level in config.model.cms.levels:
        every = level.update_every_tokens
        period = "every step" if every == "step" else f"every {every:,} tokens"
        lines.append([f"firings of {level.name} ({period})", f"{clock['firings'][level.name]:,}"])
    python = program("python")
    resume = shlex.join([python, "-m", "train", str(CONFIG_FILE), *overrides, "--resume"])
    return "\n".join(
        [
            table([str(config.run_dir), ""], lines),
            "",
            f"resume        {resume}   (after Ctrl-C)",
            f"MLflow        {mlflow_command(config)}",
            f"loss curve    {config.run_dir / 'plots' / 'loss.png'}",
            f"a bigger one  {python} -m train configs/small.yaml",
            "controls      make compare",
        ]
    )


def mlflow_command(config: RunConfig) -> str:
    """What shows the run in MLflow: a command, or the address of the server that has it."""
    if not config.mlflow.enabled:
        return "off (mlflow.enabled)"
    uri, _ = tracking_location(config.mlflow, config.run_dir)
    if uri.startswith(("http://", "https://")):
        return redact(uri)
    return redact(shlex.join([program("mlflow"), "ui", "--backend-store-uri", uri]))


def program(name: str) -> str:
    """How a program beside our Python is called from here: by name where that is the one found."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path):
        return name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def held_out_unigram(config: RunConfig) -> float:
    """Validation loss of the training text's token frequencies, in nats per token."""
    counts = []
    for path in (config.data.train[0].path, config.data.validation):
        corpus = Corpus.open(**config.data.where(path))
        counts.append(count_labels(held_out_batches(config, corpus), corpus.vocab_size))
    return unigram_loss(*counts)


def checkpoints(config: RunConfig) -> CheckpointStore:
    """The checkpoints of a run, as the only rank sees them."""
    return open_store(config, Ranks())


def _tokens(config: RunConfig) -> int:
    store = checkpoints(config)
    tokens: int = store.plain(store.complete()[-1])["clock"]["tokens"]
    return tokens


if __name__ == "__main__":
    sys.exit(as_command(main))
