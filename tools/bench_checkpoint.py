"""make bench-checkpoint: what a checkpoint costs training, in time and in bytes.

Time: a model of four CMS levels trains; in turn, no checkpoint, one that training waits for, and
one written by a process beside it. The stall is the time in `save`, as a fraction of a step; the
cost is all that a save adds to the steps until the next one, the competition for cores included.
Bytes: what is written of checkpoints at several intervals when a level that has not moved is not
written again. Writes runs/bench/checkpoint.json, and the stalls into faults.json too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.command import as_command
from hope import HopeModel
from tools.bench_cadence import EVERY_STEPS, model_config
from tools.figures import add_figures, table, write_figures
from train.checkpoint import CheckpointStore
from train.clock import TokenClock
from train.evaluate.perplexity import summed_loss
from train.optim.build import build_cadence
from train.optim.config import OptimizerConfig
from train.optim.levels import periods
from train.parallel.ranks import Ranks

ROWS, SEQ_LEN = 8, 256
TOKENS = ROWS * SEQ_LEN
INTERVALS = (2, 8, 32)
LR = 1e-3


class Run:
    """A model in training, and what a checkpoint holds of it."""

    def __init__(self, hidden_size: int) -> None:
        config = model_config(hidden_size=hidden_size, tokens=TOKENS)
        self.model = HopeModel(config)
        self.cadence = build_cadence(self.model, config, OptimizerConfig(lr=LR))
        self.clock = TokenClock(periods(config))
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> float:
        """One training step; its seconds."""
        tokens = torch.randint(0, 1024, (ROWS, SEQ_LEN + 1), generator=self.generator)
        started = time.perf_counter()
        logits, _ = self.model(tokens[:, :-1])
        summed_loss(logits, tokens[:, 1:]).backward()
        self.update()
        return time.perf_counter() - started

    def update(self) -> None:
        """What follows the backward pass."""
        self.cadence.step(self.clock.advance(TOKENS), TOKENS, lambda _: LR, self.clock.tokens)

    def tensors(self) -> dict[str, Tensor]:
        """As the trainer gives them to the store."""
        optimizer, _ = self.cadence.state_dict()
        named = {f"model/{name}": p.detach() for name, p in self.model.named_parameters()}
        return named | {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}


def measure_time(rounds: int, steps: int, hidden_size: int, folder: Path) -> dict[str, float]:
    """Medians over the rounds: seconds in `save`, and of the `steps` steps after it, by kind."""
    run = Run(hidden_size)
    stores = {
        kind: CheckpointStore(folder / kind, Ranks.alone(), asynchronous=kind == "async")
        for kind in ("sync", "async")
    }
    for _ in range(max(EVERY_STEPS)):  # every level fires, so that all optimizer state is there
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        run.update()
    for store in stores.values():
        store.save(0, run.tensors(), {})  # memory and processes are there from now on
        store.finish()
    run.step()
    found: dict[str, list[float]] = {}
    for number in range(1, rounds + 1):
        for kind in ("none", "sync", "async"):
            started = time.perf_counter()
            if kind != "none":
                stores[kind].save(number, run.tensors(), {})
                found.setdefault(f"{kind}_stall", []).append(time.perf_counter() - started)
            each = [run.step() for _ in range(steps)]
            found.setdefault(f"{kind}_total", []).append(time.perf_counter() - started)
            if kind == "none":
                found.setdefault("step", []).extend(each)
            else:
                stores[kind].finish()  # what is left of it must not touch the next measurement
        print(f"\rround {number}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for store in stores.values():
        store.close()
    found["bytes"] = [float(sum(tensor.nbytes for tensor in run.tensors().values()))]
    return {name: statistics.median(values) for name, values in found.items()}


def measure_bytes(interval: int, hidden_size: int, folder: Path) -> tuple[int, int]:
    """(bytes written, bytes of the checkpoints) over 64 steps, a checkpoint every `interval`.

    The 64 steps before are for all optimizer state to be there.
    """
    run = Run(hidden_size)
    store = CheckpointStore(folder / str(interval), Ranks.alone())
    written = total = 0
    for step in range(1, 2 * max(EVERY_STEPS) + 1):
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        run.update()
        if step >= max(EVERY_STEPS) and step % interval == 0:
            store.save(step, run.tensors(), {})
            if step > max(EVERY_STEPS):
                written += store.report["written"]
                total += store.report["written"] + store.report["reused"]
    return written, total


def stall_fractions(seconds: dict[str, float]) -> dict[str, float]:
    """The time that training waits in `save`, as a fraction of a step, from `measure_time`."""
    return {
        f"stall_fraction_{kind}": seconds[f"{kind}_stall"] / seconds["step"]
        for kind in ("sync", "async")
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_checkpoint", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="saves of each kind (default 12)")
    parser.add_argument("--steps", type=int, default=4, help="after each save (default 4)")
    parser.add_argument("--hidden-size", type=int, default=144, help="of a level (default 144)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: temporary)")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.steps, options.hidden_size) < 1:
        parser.error("--rounds, --steps and --hidden-size must be positive")
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, hidden_size = Path(name), options.hidden_size
        seconds = measure_time(options.rounds, options.steps, hidden_size, folder)
        saved = {interval: measure_bytes(interval, hidden_size, folder) for interval in INTERVALS}
    step = seconds["step"]
    stalls = stall_fractions(seconds)
    cost = {
        kind: (seconds[f"{kind}_total"] - seconds["none_total"]) / step
        for kind in ("sync", "async")
    }
    print(
        table(
            [f"a save of {seconds['bytes'] / 1e6:.1f} MB; a step is {step:.2f} s", "stall", "cost"],
            [
                [
                    label,
                    f"{100 * stalls[f'stall_fraction_{kind}']:.1f} % of a step",
                    f"{100 * cost[kind]:.1f} %",
                ]
                for kind, label in (("sync", "training waits"), ("async", "a process writes"))
            ],
        )
    )
    print()
    print(
        table(
            ["a checkpoint every", "written", "of", "not written"],
            [
                [f"{n} steps", f"{w / 1e6:.1f} MB", f"{t / 1e6:.1f} MB", f"{1 - w / t:.1%}"]
                for n, (w, t) in saved.items()
            ],
        )
    )
    figures = {
        **stalls,
        "cost_fraction_sync": cost["sync"],
        "cost_fraction_async": cost["async"],
    }
    for interval, (written, total) in saved.items():
        figures[f"bytes_saved_fraction_every_{interval}_steps"] = 1 - written / total
    add_figures("faults", stalls)
    print(f"\n{write_figures('checkpoint', figures)}: {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
