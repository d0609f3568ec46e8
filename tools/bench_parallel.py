"""make bench-parallel: are all layouts one process, what they cost, and what was predicted.

Parity: every layout of `tools.parity` with every model and engine, against one process. Memory: the
dry run's prediction against the resident set's high-water mark (`tools.peak_memory`). Speed: tokens
a second of two processes of one thread each over one, the same global batch, in turns within one
run. Bubbles: the share of a step in which a pipeline's rank computes nothing, by schedule. Writes
runs/bench/parallel.json, after each part.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.stage import PipelineStage

from data_pipeline import Batch
from data_pipeline.command import as_command
from data_pipeline.loader import rows_of_rank
from tools import parity
from tools.figures import add_figures, table
from tools.peak_memory import CASES, DEEPSPEED_CASES, prediction_errors
from tools.processes import run
from train.clock import TokenClock
from train.config import RunConfig, validate_config
from train.engines import layout_of
from train.engines.native import NativeEngine
from train.optim.levels import periods
from train.parallel import mesh as meshes
from train.parallel.layout import STAGES_PER_RANK
from train.parallel.ranks import Ranks

RANKS, MICRO_BATCHES = 2, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "dp2": {"dp_replicate": 2},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2, "micro_batches": MICRO_BATCHES},
    "cp2": {"cp": 2, "micro_batches": 2},
}
PARTS = ("speed", "bubbles", "memory", "parity")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble", "zbv")


def configuration(parallel: dict[str, Any], rows: int, seq_len: int) -> RunConfig:
    """A model whose layers are much larger than what is said about them."""
    raw = {
        "run_dir": "nowhere",
        "model": {
            "vocab_size": 1024,
            "dim": 256,
            "num_layers": 4,
            "num_heads": 4,
            "tie_embeddings": False,
            "titans": {
                "initial_eta": 0.0078,
                "scan": {"memory_chunk": 32, "projection_chunk": 32, "eta_max": 0.0156},
            },
            "cms": {"levels": [{"name": "mlp", "hidden_size": 1024}]},
        },
        "data": {"train": [{"path": "nowhere"}], "validation": "nowhere", "seq_len": seq_len},
        "training": {"total_tokens": 10**9, "batch_tokens": rows * seq_len},
        "parallel": parallel,
    }
    return validate_config(raw, "bench_parallel")


class Steps:
    """Training steps of one layout; every rank of it calls `step`."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config = config
        mesh = meshes.make_mesh(layout_of(config, ranks.size), ranks)
        self.engine = NativeEngine(config, mesh)
        self._cadence = self.engine.make_cadence()
        self._clock = TokenClock(periods(config.model))
        first, last = rows_of_rank(config.batch_rows, mesh.data.rank, mesh.data.size)
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch_rows, config.data.seq_len + 1)
        ids = torch.randint(0, 1024, shape, generator=generator)[first:last]
        starts = torch.zeros(last - first, config.data.seq_len, dtype=torch.bool)
        self._batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), starts)

    def step(self) -> float:
        """Seconds of a step on this rank."""
        started = time.perf_counter()
        loss, _ = self.engine.forward_backward(self._batch, None)
        self._cadence.agree([loss])
        tokens = self.config.training.batch_tokens
        self._cadence.step(self._clock.advance(tokens), tokens, lambda _: 1e-4, self._clock.tokens)
        return time.perf_counter() - started


def measure_speed(rank: int, rounds: int, rows: int, seq_len: int) -> dict[str, list[float]]:
    """Run on both ranks: seconds of a step of each layout, round after round, the first dropped."""
    torch.set_flush_denormal(True)
    runs = {}
    for name, parallel in LAYOUTS.items():
        ranks = Ranks.alone() if name == "alone" else Ranks()
        if name != "alone" or rank == 0:
            runs[name] = Steps(configuration(parallel, rows, seq_len), ranks)
    found: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for number in range(rounds + 1):
        for name in LAYOUTS:
            dist.barrier()
            started = time.perf_counter()
            if name in runs:
                runs[name].step()
            dist.barrier()
            if number > 0:
                found[name].append(time.perf_counter() - started)
    return found


class Busy:
    """Adds up the time that this process spends inside of pipeline stages' passes."""

    PASSES = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False
        self._before: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Busy:
        for name in self.PASSES:
            self._before[name] = inner = getattr(PipelineStage, name)
            setattr(PipelineStage, name, self._timed(inner))
        return self

    def __exit__(self, *_: object) -> None:
        for name, inner in self._before.items():
            setattr(PipelineStage, name, inner)

    def _timed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return inner(*args, **kwargs)
            self._inside, started = True, time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - started

        return timed


def measure_bubbles(rank: int, rounds: int, rows: int, seq_len: int) -> dict[str, list[float]]:
    """Run on both ranks: the idle share of each step's passes, by schedule, the first dropped."""
    torch.set_flush_denormal(True)
    runs = {}
    for schedule in SCHEDULES:
        parallel = {"pp": RANKS, "micro_batches": MICRO_BATCHES, "schedule": schedule}
        runs[schedule] = Steps(configuration(parallel, rows, seq_len), Ranks())
    found: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
    for number in range(rounds + 1):
        for schedule, steps in runs.items():
            dist.barrier()
            with Busy() as busy:
                started = time.perf_counter()
                steps.engine.forward_backward(steps._batch, None)
                dist.barrier()
                whole = time.perf_counter() - started
            for parameter in steps.engine.parameters.values():
                parameter.grad = None
            if number > 0:
                found[schedule].append(1 - busy.seconds / whole)
    return found


def bubble_in_theory(schedule: str) -> float:
    """The idle share when all passes of a stage take equal time and sending takes none."""
    stages = STAGES_PER_RANK[schedule]  # type: ignore[index]
    if schedule == "zbv":
        return 0.0
    return (RANKS - 1) / (stages * MICRO_BATCHES + RANKS - 1)


def measure_parity(worlds: list[int]) -> dict[str, float]:
    """The worst relative error of every layout with every model and engine."""
    errors: dict[str, float] = {}
    for engine in ("native", "deepspeed"):
        for model in parity.MODELS:
            for world in worlds:
                configs = parity.table(engine, model, world)
                found = parity.errors_of(model, world, configs, seconds=1800)
                errors |= {
                    f"{engine}, {model}, {world} ranks, {name}": error
                    for name, error in found.items()
                }
                worst = f"{len(found)} layouts, worst {max(found.values()):.1e}"
                print(f"{engine}, {model}, {world} ranks: {worst}", file=sys.stderr)
    return errors


def report_speed(sizes: tuple[int, int, int]) -> dict[str, float]:
    print(f"load average before timing: {_load()}; {os.cpu_count()} cores")
    seconds = run(RANKS, measure_speed, *sizes, seconds=3600)[0]
    figures, rows = {}, []
    for name in list(LAYOUTS)[1:]:
        pairs = zip(seconds["alone"], seconds[name], strict=True)
        figures[f"speedup_{name}"] = statistics.median(one / two for one, two in pairs)
        rows.append([name, f"{figures[f'speedup_{name}']:.2f}"])
    print(table(["two processes over one", "tokens/s, ratio"], rows))
    print(f"load average after: {_load()}\n")
    return figures


def report_bubbles(sizes: tuple[int, int, int]) -> dict[str, float]:
    shares = run(RANKS, measure_bubbles, *sizes, seconds=3600)
    figures, rows = {}, []
    for schedule in SCHEDULES:
        steps = zip(*(ranks[schedule] for ranks in shares), strict=True)
        mean = statistics.median(sum(step) / RANKS for step in steps)
        key = "bubble_" + schedule.replace("-", "_")
        figures[key], figures[f"{key}_theory"] = mean, bubble_in_theory(schedule)
        rows.append([schedule, f"{mean:.3f}", f"{bubble_in_theory(schedule):.3f}"])
    print(
        table([f"idle, {RANKS} ranks, {MICRO_BATCHES} micro-batches", "measured", "theory"], rows)
    )
    print(f"load average after: {_load()}\n")
    return figures


def report_memory() -> dict[str, float]:
    worst, rows = 0.0, []
    cases = [(world, 0, parallel, model) for world, parallel, model in CASES] + DEEPSPEED_CASES
    for number, (world, stage, parallel, model) in enumerate(cases, start=1):
        errors = prediction_errors(world, parallel, stage, **model)
        error = max(errors, key=abs)
        worst = max(worst, abs(error))
        engine = f"ZeRO {stage}, " if stage else ""
        rows.append([f"{world}: {engine}{parallel | model}", f"{100 * error:+.1f} %"])
        print(f"memory: {number} of {len(cases)} cases", file=sys.stderr)
    print(table(["peak memory, predicted over measured", "worst rank"], rows), "\n")
    return {"memory_prediction_error": worst}


def report_parity(worlds: list[int]) -> dict[str, float]:
    errors = measure_parity(worlds)
    inside = sum(error <= parity.TOLERANCE for error in errors.values())
    for name, error in errors.items():
        if not error <= parity.TOLERANCE:
            print(f"not in parity: {name}: {error:.1e}")
    print(f"{inside} of {len(errors)} layouts follow one process\n")
    return {"layouts_in_parity": inside, "worst_relative_error": max(errors.values())}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_parallel", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps a layout (default 5)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step (default 4)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8], help="of parity")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    options = parser.parse_args()
    if options.rounds < 1 or options.rows % MICRO_BATCHES or options.rows < 1:
        parser.error(f"--rounds at least 1, --rows a multiple of {MICRO_BATCHES}")
    sizes = (options.rounds, options.rows, options.seq_len)
    reports: dict[str, Callable[[], dict[str, float]]] = {
        "speed": lambda: report_speed(sizes),
        "bubbles": lambda: report_bubbles(sizes),
        "memory": report_memory,
        "parity": lambda: report_parity(options.worlds),
    }
    for part in options.parts:
        figures = reports[part]()
        print(f"{add_figures('parallel', figures)}: {figures}\n", flush=True)
    return 0


def _load() -> str:
    return ", ".join(f"{number:.1f}" for number in os.getloadavg())


if __name__ == "__main__":
    sys.exit(as_command(main))
