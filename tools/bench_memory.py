"""make bench-memory: what are the memories' writes worth to a language model of code?

Python's standard library in windows of 1,024 tokens, where names come back: the quickstart's Hope,
written strongly, as weakly as in the quickstart, and not at all, and a Transformer++ of equal
parameters. Equal tokens, rates and schedules, three seeds. The second table says where the
difference is: by how much text a prediction could look back on.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from data_pipeline.arguments import at_least
from data_pipeline.command import as_command
from tools.compare import make_variants
from tools.evaluate import losses_of
from tools.figures import table, write_figures
from tools.jobs import run_jobs, train_to_the_end
from tools.prepare import prepare_corpus
from tools.quickstart import CONFIG_FILE
from train.callbacks.metrics import read_metrics
from train.checkpoint.load import load_run_and_corpus
from train.config import load_config
from train.run_files import METRICS

DATA = Path("data/code")
RUNS = Path("runs/memory")
EVALUATED_TOKENS = 262_144
"""Of the losses by context; a run's own evaluation at its end reads everything."""

COMMON = (
    f"data.train=[{{path: {DATA / 'train'}}}]",
    f"data.validation={DATA / 'validation'}",
    "data.seq_len=1024",
    "training.batch_tokens=4096",
    "training.total_tokens=1572864",
    "optimizer.lr=6e-3",
    "optimizer.schedule.warmup_tokens=65536",
    "evaluation.every_tokens=1048576",
    "checkpoint.every_tokens=524288",
    "mlflow.experiment=memory",
)
STRONG = (
    "model.titans.scan.delta_rule=target",
    "model.titans.scan.eta_max=0.5",
    "model.titans.initial_eta=0.1",
)
HOPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "strong": ("Hope, target, eta from 0.1, under 0.5", STRONG),
    "weak": ("Hope, normalised, eta under 0.0156", ()),
    "not_written": ("Hope, writes off", ("model.titans.writes=false",)),
}


def main(arguments: list[str] | None = None) -> int:
    """Train what is not there yet, print the tables, save the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=at_least(1), default=3)
    options = parser.parse_args(arguments)
    try:
        prepare_corpus("stdlib", DATA)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # the step has said why
    variants = all_variants()
    jobs = [(key, words, seed) for seed in range(options.seeds) for key, (_, words) in variants]
    if status := run_jobs([partial(train_one, *job) for job in jobs]):
        return status
    print("\n" + report(dict(variants), options.seeds))
    return 0


def all_variants() -> list[tuple[str, tuple[str, tuple[str, ...]]]]:
    """(key, (title, overrides)); the Transformer++ has the parameters of the others."""
    known = {one.key: one for one in make_variants(load_config(CONFIG_FILE, [*COMMON]))}
    twin = known["transformer"]
    return [*HOPES.items(), (twin.key, (twin.title, twin.overrides))]


def run_dir(key: str, seed: int) -> Path:
    """Where one run lives."""
    return RUNS / f"{key}-seed{seed}"


def train_one(key: str, overrides: tuple[str, ...], seed: int) -> str:
    """Train one variant with one seed on one thread, unless it is there; returns its name."""
    folder = run_dir(key, seed)
    words = [*COMMON, *overrides, f"run_dir={folder}", f"seed={seed}", "num_threads=1"]
    train_to_the_end(CONFIG_FILE, words)
    return folder.name


def report(variants: dict[str, tuple[str, tuple[str, ...]]], seeds: int) -> str:
    """Both tables, from the run folders; writes runs/bench/memory.json."""
    figures: dict[str, float] = {}
    losses = {
        key: [read_metrics(run_dir(key, seed) / METRICS)[-1]["loss"] for seed in range(seeds)]
        for key in variants
    }
    rows = []
    for key, (title, _) in variants.items():
        figures[f"{key}_loss"] = mean = statistics.fmean(losses[key])
        figures[f"{key}_loss_stdev"] = spread = statistics.stdev(losses[key]) if seeds > 1 else 0.0
        each = " ".join(f"{loss:.4f}" for loss in losses[key])
        rows.append([title, f"{mean:.4f}", f"{spread:.4f}", each])
    for key in ("strong", "weak"):
        pairs = zip(losses["not_written"], losses[key], strict=True)
        figures[f"{key}_gain"] = statistics.fmean(without - its for without, its in pairs)
    saved = write_figures("memory", figures)
    return (
        table(["", "validation", "stdev", "by seed"], rows)
        + "\n\n"
        + by_context(list(variants))
        + f"\n\nnats per token, mean of {seeds} seeds above, seed 0 below; figures {saved}"
    )


def by_context(keys: list[str]) -> str:
    """The losses of seed 0 by how many tokens of its document a prediction could look back on."""
    columns = {}
    for key in keys:
        config, model, corpus = load_run_and_corpus(run_dir(key, 0))
        found = losses_of(model, config, corpus, EVALUATED_TOKENS, key)
        columns[key] = found.classes()
    rows = [
        [f"{context.start:,}", *(f"{column[context].loss:.3f}" for column in columns.values())]
        for context in columns[keys[0]]
    ]
    return table(["context from", *keys], rows)


if __name__ == "__main__":
    sys.exit(as_command(main))
