"""make bench-cadence: what levels of different periods cost in time, traffic and memory.

Time: one training step with a cadence of four levels, and with every period one step, against the
plain loop that any trainer has (mean gradient, clip, one fused AdamW). Traffic: bytes that leave a
rank, counted at the collectives of two processes, for `reduce: every_step` and `at_update`, beside
the formula. Writes runs/bench/cadence.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from data_pipeline.command import as_command
from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.scan import ScanConfig
from tools.figures import table, write_figures
from tools.processes import run
from train.clock import TokenClock
from train.evaluate.perplexity import summed_loss
from train.optim.build import build_cadence, decays
from train.optim.cadence import ACCUMULATOR, Cadence
from train.optim.config import OptimizerConfig, Reduce
from train.optim.levels import periods
from train.parallel.counting import CollectiveBytes
from train.parallel.ranks import Ranks

ROWS, SEQ_LEN = 8, 256
TOKENS = ROWS * SEQ_LEN
EVERY_STEPS = (1, 4, 16, 64)
RANKS = 2
LR = 1e-3


def model_config(
    every_steps: tuple[int, ...] = EVERY_STEPS, hidden_size: int = 144, tokens: int = TOKENS
) -> HopeConfig:
    """The quickstart's model with four levels; periods in steps of so many tokens."""
    levels = tuple(
        LevelConfig(
            name=f"every_{every}", hidden_size=hidden_size, update_every_tokens=period * tokens
        )
        for every, period in zip(EVERY_STEPS, every_steps, strict=True)
    )
    scan = ScanConfig(memory_chunk=32, projection_chunk=32, eta_max=0.0156)
    return HopeConfig(
        vocab_size=1024,
        dim=128,
        num_layers=2,
        num_heads=4,
        tie_embeddings=False,
        titans=TitansConfig(scan=scan, initial_eta=0.0078),
        cms=CMSConfig(levels=levels),
    )


class PlainLoop:
    """The mean gradient, one clipped norm, one AdamW: no levels, no clock."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        self.parameters = [parameter for _, parameter in named]
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": 0.1},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)

    def __call__(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(TOKENS)
        float(nn.utils.clip_grad_norm_(self.parameters, 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()


class CadenceLoop:
    """What the trainer does after the backward pass."""

    def __init__(self, model: HopeModel, config: HopeConfig) -> None:
        self.cadence = build_cadence(model, config, OptimizerConfig(lr=LR))
        self.clock = TokenClock(periods(config))

    def __call__(self) -> None:
        self.cadence.agree([0.0])
        self.cadence.step(self.clock.advance(TOKENS), TOKENS, lambda _: LR, self.clock.tokens)


def measure_time(steps: int) -> dict[str, float]:
    """Seconds of forward and backward, and of each loop's update, over interleaved steps.

    An update costs more in a step in which slow levels fire: its median is taken over the steps in
    which as many levels fire, and the mean over those by how often they come.
    """
    base = HopeModel(model_config())
    models = [copy.deepcopy(base) for _ in range(3)]
    updates: dict[str, Callable[[], None]] = {
        "plain": PlainLoop(models[0]),
        "cadence": CadenceLoop(models[1], model_config()),
        "one_step": CadenceLoop(models[2], model_config((1, 1, 1, 1))),
    }
    forward_backward: list[float] = []
    seconds: dict[str, dict[int, list[float]]] = {name: {} for name in updates}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        tokens = torch.randint(0, 1024, (ROWS, SEQ_LEN + 1), generator=generator)
        firing = sum(step % every == 0 for every in EVERY_STEPS)
        for model, (name, update) in zip(models, updates.items(), strict=True):
            started = time.perf_counter()
            logits, _ = model(tokens[:, :-1])
            summed_loss(logits, tokens[:, 1:]).backward()
            middle = time.perf_counter()
            update()
            ended = time.perf_counter()
            forward_backward.append(middle - started)
            seconds[name].setdefault(firing, []).append(ended - middle)
        print(f"\rstep {step}/{steps}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {"forward_backward": statistics.median(forward_backward)} | {
        name: sum(len(part) * statistics.median(part) for part in found.values()) / steps
        for name, found in seconds.items()
    }


def count_traffic(rank: int) -> dict[tuple[Reduce, str], tuple[float, float]]:
    """Run on each rank: (bytes sent a step, bytes of accumulator a slow parameter) for both
    policies, of the CMS alone and of the whole model."""
    ranks = Ranks.alone()
    ranks.rank, ranks.size = rank, RANKS
    config = model_config()
    results: dict[tuple[Reduce, str], tuple[float, float]] = {}
    for reduce in ("every_step", "at_update"):
        for part in ("cms", "model"):
            model = HopeModel(config)
            settings = OptimizerConfig(lr=LR, reduce=reduce)
            cadence = build_cadence(model, config, settings, ranks)
            clock = TokenClock(periods(config))
            largest = 0.0
            with CollectiveBytes() as counted:
                for _ in range(max(EVERY_STEPS)):
                    for name, parameter in model.named_parameters():
                        if part == "model" or ".cms." in name:
                            parameter.grad = torch.ones_like(parameter)
                    cadence.step(clock.advance(TOKENS), TOKENS, lambda _: LR, clock.tokens)
                    largest = max(largest, bytes_per_slow_parameter(cadence))
            results[reduce, part] = (sum(counted.bytes.values()) / max(EVERY_STEPS), largest)
    return results


def bytes_per_slow_parameter(cadence: Cadence) -> float:
    """Bytes of accumulators on this rank over the number of parameters that have one."""
    held = sum(state[ACCUMULATOR].nbytes for state in cadence.state.values())
    slow = sum(parameter.numel() for parameter in cadence.state)
    return held / slow if slow else 0.0


def expected_traffic(reduce: Reduce, part: str) -> float:
    """The formula: bytes that a rank sends a step; docs/levels.md explains it."""
    config = model_config()
    model = HopeModel(config)
    share = 4 * (RANKS - 1) / RANKS
    level_size = sum(p.numel() for n, p in model.named_parameters() if ".cms.levels.0." in n)
    agreement = len(list(model.parameters())) + len(config.cms.levels) + 1 + RANKS
    total = 2 * 8 * agreement * (RANKS - 1) / RANKS
    for every in EVERY_STEPS:
        if every == 1:
            passes = 2.0  # an all-reduce a step
        elif reduce == "every_step":
            passes = 1 + 1 / every  # a reduce-scatter a step, an all-gather a firing
        else:
            passes = 2 / every  # an all-reduce a firing
        total += passes * share * level_size
    if part == "model":
        fast = sum(p.numel() for n, p in model.named_parameters() if ".cms." not in n)
        total += 2 * share * fast
    return total


def one_process_bytes() -> float:
    """Bytes of accumulators over slow parameters in a single process."""
    config = model_config()
    model = HopeModel(config)
    cadence = build_cadence(model, config, OptimizerConfig(lr=LR))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    cadence.step({"fast", "every_1"}, TOKENS, lambda _: LR)
    return bytes_per_slow_parameter(cadence)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_cadence", description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=64, help="a multiple of 64, the slowest period (default 64)"
    )
    steps = parser.parse_args().steps
    if steps < 1 or steps % max(EVERY_STEPS):
        parser.error(f"--steps must be a multiple of {max(EVERY_STEPS)}, got {steps}")
    torch.set_flush_denormal(True)
    seconds = measure_time(steps)
    plain = seconds["forward_backward"] + seconds["plain"]
    ratios = {
        name: (seconds["forward_backward"] + seconds[name]) / plain
        for name in ("plain", "one_step", "cadence")
    }
    labels = {
        "plain": "plain AdamW loop",
        "one_step": "cadence, every period one step",
        "cadence": "cadence, periods of 1, 4, 16 and 64 steps",
    }
    print(
        table(
            ["a training step", "update, ms", "step / plain step"],
            [
                [labels[name], f"{1000 * seconds[name]:.2f}", f"{ratio:.4f}"]
                for name, ratio in ratios.items()
            ],
        )
    )
    traffic = run(RANKS, count_traffic)[0]
    print()
    print(
        table(
            [f"bytes a rank sends a step, {RANKS} ranks", "counted", "formula", "accumulator"],
            [
                [
                    f"{'CMS alone' if part == 'cms' else 'whole model'}, {reduce}",
                    f"{counted:,.0f}",
                    f"{expected_traffic(reduce, part):,.0f}",
                    f"{held:.2f} B/parameter",
                ]
                for (reduce, part), (counted, held) in sorted(traffic.items())
            ],
        )
    )
    figures = {
        "overhead_ratio": ratios["cadence"],
        "overhead_ratio_all_one_step": ratios["one_step"],
        "bytes_ratio_at_update_over_every_step": (
            traffic["at_update", "cms"][0] / traffic["every_step", "cms"][0]
        ),
        "bytes_ratio_whole_model": (
            traffic["at_update", "model"][0] / traffic["every_step", "model"][0]
        ),
        "extra_bytes_per_slow_parameter": one_process_bytes(),
    }
    print(f"\n{write_figures('cadence', figures)}: {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
