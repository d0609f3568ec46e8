"""python -m tools.bench_recall: do the memories remember? Multi-query associative recall.

A sequence states 64 distinct keys, each with its value; in the rest of its 512 tokens every key is
asked once, at a random place among noise, and the model has to say its value there (MQAR, arXiv
2312.04927; which key has which value is drawn anew in each sequence, so weights can't know it).
Two layers of Hope, attention nowhere, are trained twice, with their memories' writes and without.
Training begins with short lists (the task's usual curriculum); half of its sequences ask each key
several times in a row of questions without noise. Accuracy is over questions in unseen sequences.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_pipeline.command import as_command
from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.init import seed_from
from hope.scan import ScanConfig
from tools.figures import add_figures, table

KEYS, VALUES, NOISE = 128, 128, 64
"""Vocabulary: keys, then values, then noise; a guess is right 1 time in 128."""
TEST_PAIRS, TEST_TOKENS = 64, 512


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: sequences of `tokens` tokens with `pairs` pairs, for `steps`."""

    pairs: int
    tokens: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained and tested; rates are AdamW's, the schedule is a trapezoid."""

    stages: tuple[Stage, ...] = (
        Stage(8, 32, 400),
        Stage(16, 64, 150),
        Stage(32, 128, 250),
        Stage(64, 256, 1000),
        Stage(TEST_PAIRS, TEST_TOKENS, 500),
    )
    step_tokens: int = 1024
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    decay_share: float = 0.3
    clip: float = 1.0
    test: Stage = Stage(TEST_PAIRS, TEST_TOKENS, 1)
    test_rows: int = 64

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        left = (self.steps - step + 1) / (self.decay_share * self.steps)
        return self.lr * min(1.0, step / self.warmup_steps, max(0.02, left))


SCAN = ScanConfig(memory_chunk=64, projection_chunk=64, eta_max=0.5, delta_rule="target")
TITANS = TitansConfig(initial_eta=0.25, start="aligned", scan=SCAN)
MODEL = HopeConfig(
    vocab_size=KEYS + VALUES + NOISE,
    dim=64,
    num_layers=2,
    num_heads=1,
    titans=TITANS,
    cms=CMSConfig(levels=(LevelConfig(name="every_step", hidden_size=64),)),
    tie_embeddings=False,
)


def _with(titans: TitansConfig) -> HopeConfig:
    return replace(MODEL, titans=titans)


def _with_scan(scan: ScanConfig) -> HopeConfig:
    return _with(replace(TITANS, scan=scan))


VARIANTS: dict[str, tuple[str, HopeConfig]] = {
    "hope": ("Hope", MODEL),
    "no_writes": ("writes off", _with(replace(TITANS, writes=False))),
    "independent_start": ("start: independent", _with(replace(TITANS, start="independent"))),
    "normalised": ("delta_rule: normalised", _with_scan(replace(SCAN, delta_rule="normalised"))),
    "weak": ("initial_eta: 0.0075", _with(replace(TITANS, initial_eta=0.0075))),
    "chunk_start": (
        "read: chunk_start of 16",
        _with_scan(replace(SCAN, read="chunk_start", memory_chunk=16)),
    ),
}
"""What can be trained: its name -> its title and its model."""
DEFAULT = ("hope", "no_writes")


def draw(
    rows: int, pairs: int, tokens: int, generator: torch.Generator, repeat: bool = False
) -> tuple[Tensor, Tensor]:
    """Sequences and their answers: inputs, labels int64 [rows, tokens], labels -100 off questions.

    The first 2 * pairs tokens are key, value, key, value, ...; then each key is asked once at a
    random place among noise or, with `repeat`, as often as fits, without noise.
    """
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (rows, pairs), generator=generator)
    noise = torch.randint(NOISE, (rows, tokens), generator=generator)
    inputs = KEYS + VALUES + noise
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    left = tokens - 2 * pairs
    places = 2 * pairs + torch.rand(rows, left, generator=generator).argsort(1)
    asked = torch.arange(left if repeat else pairs).remainder(pairs).expand(rows, -1)
    places = places[:, : asked.shape[1]]
    labels = torch.full((rows, tokens), -100)
    inputs.scatter_(1, places, keys.gather(1, asked))
    labels.scatter_(1, places, values.gather(1, asked))
    return inputs, labels


def draw_training(rows: int, stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the rows with noise, half with repeated questions."""
    halves = [
        draw(count, stage.pairs, stage.tokens, generator, repeat)
        for count, repeat in ((rows - rows // 2, False), (rows // 2, True))
    ]
    return torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])


def train(
    config: HopeConfig, recipe: Recipe, seed: int, report: Callable[[int, int, float, float], None]
) -> HopeModel:
    """Train one model; report(step, pairs, mean loss, mean accuracy) once in 50 steps.

    A gradient that is not finite ends the training there.
    """
    model = HopeModel(config, seed=seed)
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and "conv" not in n]
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(seed_from(seed, "recall", "train"))
    recent: list[tuple[float, float]] = []
    plan = [stage for stage in recipe.stages for _ in range(stage.steps)]
    for step, stage in enumerate(plan, start=1):
        inputs, labels = draw_training(recipe.step_tokens // stage.tokens, stage, generator)
        asked = labels >= 0
        logits, labels = model(inputs)[0][asked], labels[asked]
        loss = cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if not math.isfinite(norm.item()):
            print(f"  step {step}: the gradient is not finite; stopping here", flush=True)
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.step()
        recent.append((loss.item(), (logits.argmax(-1) == labels).float().mean().item()))
        if step % 50 == 0 or step == len(plan):
            losses, hits = zip(*recent, strict=True)
            report(step, stage.pairs, sum(losses) / len(losses), sum(hits) / len(hits))
            recent.clear()
    return model


@torch.no_grad()
def accuracy(model: HopeModel, recipe: Recipe, seed: int, repeat: bool = False) -> float:
    """Share of right answers over questions in sequences that training has not seen."""
    generator = torch.Generator().manual_seed(seed_from(seed, "recall", "test", int(repeat)))
    right = total = 0
    for _ in range(-(-recipe.test_rows // 8)):
        inputs, labels = draw(8, recipe.test.pairs, recipe.test.tokens, generator, repeat)
        asked = labels >= 0
        right += int((model(inputs)[0].argmax(-1) == labels)[asked].sum())
        total += int(asked.sum())
    return right / total


class Progress:
    """Prints a line for each report: where the run is, its rate, what is left at most."""

    def __init__(self, title: str, recipe: Recipe, waiting: int) -> None:
        self.title, self.recipe, self.waiting = title, recipe, waiting
        self.started = time.monotonic()

    def __call__(self, step: int, pairs: int, loss: float, hits: float) -> None:
        passed, steps = time.monotonic() - self.started, self.recipe.steps
        # A waiting run is taken to last as long as this one; without writes it is far quicker.
        left = (steps * (1 + self.waiting) - step) * passed / step
        print(
            f"{self.title} | {step}/{steps} | {pairs} pairs | loss {loss:.3f} | "
            f"accuracy {hits:.3f} | {step * self.recipe.step_tokens / passed:,.0f} tokens/s | "
            f"at most {left:.0f} s left",
            flush=True,
        )


def run(variants: list[str], recipe: Recipe, seed: int) -> tuple[dict[str, float], str]:
    """Train and test the variants; returns the figures and a table of them."""
    figures: dict[str, float] = {}
    rows = []
    for number, name in enumerate(variants):
        title, config = VARIANTS[name]
        progress = Progress(title, recipe, waiting=len(variants) - number - 1)
        model = train(config, recipe, seed, progress)
        seconds = time.monotonic() - progress.started
        ending = "" if name == "hope" else f"_{name}"
        cells = []
        for key, repeat in (("mqar_accuracy", False), ("mqar_repeated_accuracy", True)):
            figures[key + ending] = accuracy(model, recipe, seed, repeat)
            cells.append(f"{figures[key + ending]:.4f}")
        rows.append([title, *cells, f"{seconds:.0f}"])
    return figures, table(["", "accuracy", "questions repeated", "seconds"], rows)


def main(arguments: list[str] | None = None) -> int:
    """Train Hope with and without writes, print the accuracies, save them."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_recall", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        figures, shown = run(list(options.variants), Recipe(), options.seed)
    except KeyboardInterrupt:
        print("stopped; nothing was saved", file=sys.stderr)
        return 130
    saved = add_figures("recall", figures)  # an ablation leaves Hope's and the control's
    print(f"\n{shown}\n\n{TEST_PAIRS} pairs, {TEST_TOKENS} tokens; figures {saved}")
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
