"""python -m tools.compare: what each part of the quickstart's Hope brings.

Trains the same corpus, tokens, width, layers and number of parameters as

    hope              the quickstart's model
    hope, writes off  its memories frozen at their learned start: everything but the memory
    transformer++     rotary attention and one SwiGLU level of the parameters that are left
    transformer++ conv   the same with Hope's width-4 convolution on q, k and v

over several seeds, and prints the held-out loss of each. Every run is `python -m train` with
overrides, one thread each, as many at a time as there are cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline import Corpus
from data_pipeline.arguments import at_least
from data_pipeline.command import as_command
from hope import AttentionConfig, CMSConfig, HopeConfig, LevelConfig
from hope.model import num_parameters
from tools.figures import table, write_figures
from tools.jobs import run_jobs, train_to_the_end
from tools.prepare import prepare_sotu
from tools.quickstart import CONFIG_FILE, held_out_unigram
from train.callbacks.metrics import Curve, plot_loss, read_metrics
from train.config import ConfigError, RunConfig, load_config
from train.run_files import CONFIG, METRICS

RUNS = Path("runs/compare")
BASELINE_LEVEL = "mlp"


@dataclass(frozen=True)
class Variant:
    """One row of the table: its key in the figures, its title, what it changes."""

    key: str
    title: str
    overrides: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    """Train every variant and seed, print the table, save the figures and the picture."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=main.__doc__)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for every run"
    )
    options = parser.parse_args(arguments)
    try:
        base = load_config(CONFIG_FILE, options.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        prepare_sotu()
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # the step has said why
    variants = make_variants(base)
    jobs = [(variant, seed) for seed in range(options.seeds) for variant in variants]
    if status := run_jobs([partial(train_one, *job, options.overrides) for job in jobs]):
        return status
    print("\n" + report(base, variants, options.seeds))
    return 0


def make_variants(base: RunConfig) -> list[Variant]:
    """Hope, its control, and two baselines whose one level takes up the parameters left over."""
    vocab_size = Corpus.open(**base.data.where(base.data.validation)).vocab_size
    hope = replace(base.model, vocab_size=vocab_size)
    wanted = num_parameters(hope)
    transformers = []
    for key, title, width in (("transformer", "Transformer++", 0), ("transformer_conv", "", 4)):
        model = replace(hope, mixer="attention", attention=AttentionConfig(conv_width=width))
        left = wanted - num_parameters(_one_level(model, 1))
        hidden = 1 + round(left / (3 * hope.dim * hope.num_layers))
        transformers.append(
            Variant(
                key,
                title or f"Transformer++ with width-{width} convolution",
                (
                    "model.mixer=attention",
                    f"model.attention.conv_width={width}",
                    f"model.cms.levels=[{{name: {BASELINE_LEVEL}, hidden_size: {hidden}}}]",
                ),
            )
        )
    return [
        Variant("hope", "Hope", ()),
        Variant("hope_no_writes", "Hope, writes off", ("model.titans.writes=false",)),
        *transformers,
    ]


def _one_level(config: HopeConfig, hidden: int) -> HopeConfig:
    level = LevelConfig(name=BASELINE_LEVEL, hidden_size=hidden)
    return replace(config, cms=CMSConfig(levels=(level,)))


def run_dir(variant: Variant, seed: int) -> Path:
    """Where one run of the comparison lives."""
    return RUNS / f"{variant.key}-seed{seed}"


def train_one(variant: Variant, seed: int, overrides: list[str]) -> str:
    """Train one variant with one seed on one thread, unless it is there; returns its name."""
    words = [
        *variant.overrides,
        *overrides,
        f"run_dir={run_dir(variant, seed)}",
        f"seed={seed}",
        "num_threads=1",
        "mlflow.experiment=compare",
    ]
    train_to_the_end(CONFIG_FILE, words)
    return f"{variant.title}, seed {seed}"


def report(base: RunConfig, variants: list[Variant], seeds: int) -> str:
    """The table of means and spreads; writes runs/bench/compare.json and compare.png."""
    figures: dict[str, float] = {"unigram_loss": held_out_unigram(base)}
    rows, curves = [], {}
    for variant in variants:
        metrics = [read_metrics(run_dir(variant, seed) / METRICS) for seed in range(seeds)]
        losses = [_final_loss(run) for run in metrics]
        seconds = statistics.fmean(run[-1]["trained_seconds"] for run in metrics)
        resolved = load_config(run_dir(variant, 0) / CONFIG)
        figures[f"{variant.key}_loss"] = statistics.fmean(losses)
        figures[f"{variant.key}_loss_stdev"] = statistics.stdev(losses) if seeds > 1 else 0.0
        figures[f"{variant.key}_parameters"] = num_parameters(resolved.model)
        figures[f"{variant.key}_seconds"] = seconds
        figures[f"{variant.key}_time_over_hope"] = seconds / figures["hope_seconds"]
        curves[variant.title] = Curve(metrics[0])
        rows.append(
            [
                variant.title,
                f"{figures[f'{variant.key}_parameters']:,.0f}",
                f"{figures[f'{variant.key}_loss']:.4f}",
                f"{figures[f'{variant.key}_loss_stdev']:.4f}",
                " ".join(f"{loss:.4f}" for loss in losses),
                f"{figures[f'{variant.key}_time_over_hope']:.2f}",
            ]
        )
    for key in [key for key in figures if key.endswith("_seconds")]:
        del figures[key]
    plot_loss(curves, RUNS / "compare.png")
    saved = write_figures("compare", figures)
    header = ["", "parameters", "validation", "stdev", "by seed", "time / Hope's"]
    unigram = ["unigram", "", f"{figures['unigram_loss']:.4f}", "", "", ""]
    return (
        table(header, [unigram, *rows])
        + f"\n\nvalidation: nats per token after {base.training.total_tokens:,} tokens, "
        + f"mean of {seeds} seeds\nfigures {saved}, curves {RUNS / 'compare.png'}"
    )


def _final_loss(rows: list[dict[str, Any]]) -> float:
    loss: float = [row["loss"] for row in rows if row["kind"] == "evaluation"][-1]
    return loss


if __name__ == "__main__":
    sys.exit(as_command(main))
