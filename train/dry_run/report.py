"""`python -m train CONFIG --dry-run --world-size N [--rank R]`: what is printed."""

from __future__ import annotations

import torch

from train.config import ConfigError, RunConfig
from train.dry_run.build import DryRun, dry_run
from train.dry_run.memory import Memory
from train.dry_run.traffic import Traffic


def print_dry_run(config: RunConfig, world_size: int, rank: int) -> None:
    """Build rank `rank` of `world_size` and print it. ConfigError where that can't be."""
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: a cluster has at least one rank")
    if not 0 <= rank < world_size:
        raise ConfigError(f"--rank {rank}: the ranks are 0 to {world_size - 1}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(describe(dry_run(config, world_size, rank, device), device))


def describe(run: DryRun, device: str) -> str:
    """The report as text."""
    layers = ", ".join(_span(one) for one in run.layers)
    label = "layer" if sum(map(len, run.layers)) == 1 else "layers"  # "layers 0" would be none
    lines = [
        f"rank {run.rank} of {run.layout.world}: {run.layout}",
        f"{label:<14}{layers}",
        f"parameters    {run.own_parameters:,} of {run.parameters:,}",
    ]
    return "\n".join([*lines, "", *_memory(run.memory, device), "", *_traffic(run.traffic)])


def _memory(memory: Memory, device: str) -> list[str]:
    kinds = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "accumulators": memory.accumulators,
        "optimizer": memory.optimizer,
        "fast state": memory.fast_state,
        "activations": memory.activations,
        "buffers": memory.step_buffers,
        "peak": memory.peak,
    }
    lines = [f"memory at the peak of a step, on a {device} device"]
    lines += [f"  {name:<14}{size(number):>12}" for name, number in kinds.items()]
    if memory.update > memory.activations + memory.step_buffers:
        lines.append(f"  the peak is in the update, with {size(memory.update)} of buckets")
    return lines


def _traffic(traffic: Traffic) -> list[str]:
    lines = [
        f"  {axis:<5}{collective:<16}{size(number):>12}"
        for (axis, collective), number in sorted(traffic.items())
        if number
    ]
    return ["sent in a step, by axis and collective", *(lines if traffic else ["  nothing"])]


def size(number: float) -> str:
    """Bytes for people: 1,234 B, 12.3 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def _span(layers: range) -> str:
    last = layers.stop - 1
    return str(layers.start) if last == layers.start else f"{layers.start}-{last}"
