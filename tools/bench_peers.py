"""python -m tools.bench_peers: how fast is Hope beside its public implementations?

Two packages are measured, forward and backward with their memories written, against one layer of
ours of the same width, batch and tokens whose memories hold at least as many floats:

    kmccleary   nested-learning, the self-modifying preset of its README in its own training loop;
                also with its loop in chunks of 64 tokens, and over the whole sequence at once
    lucidrains  titans-pytorch, NeuralMemory with its defaults and chunk 16

They live in a virtual environment of their own, runs/bench/peers-venv, made on first use; a peer
that can't be installed or run is named in one line and has no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from data_pipeline.command import as_command
from tools.figures import BENCH, table, write_figures
from tools.peer_environment import PeerError, prepare
from tools.peer_models import COMPARISONS, Result

GOALS = {"kmccleary": 20.0, "lucidrains": 10.0}
"""How many times faster ours is meant to be."""
ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tools" / "bench_peers_requirements.txt"
ENVIRONMENT = BENCH / "peers-venv"


def measure(pairs: int = 3, environment: Path = ENVIRONMENT) -> dict[str, float]:
    """Seconds of each peer over ours, as medians over `pairs` runs of one after the other.

    Prints progress and a table. Returns `peer_speedup_NAME` for each comparison and, when every
    peer was measured, `peer_speedup`: the smallest of theirs over their goals. What could not be
    measured is absent.
    """
    results: dict[str, Result] = {}
    try:
        python = prepare(environment, REQUIREMENTS)
    except PeerError as error:
        print(f"error: {error}; no peer was measured", file=sys.stderr)
        return {}
    for name in COMPARISONS:
        try:
            results[name] = run(python, name, pairs)
        except PeerError as error:
            print(f"error: {error}; it has no figure", file=sys.stderr)
    if results:
        print(report(results))
    return speedups(results)


def run(python: Path, name: str, pairs: int) -> Result:
    """One comparison in a process of its own, its progress on stderr; PeerError if it fails."""
    done = subprocess.run(
        [str(python), "-m", "tools.peer_models", name, "--pairs", str(pairs)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise PeerError(f"{name} stopped with exit code {done.returncode}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def speedups(results: dict[str, Result]) -> dict[str, float]:
    """The figures; `peer_speedup` is 1 when the peer that is hardest to beat meets its goal."""
    figures = {
        f"peer_speedup_{name}": median(theirs / ours for theirs, ours in result.pairs)
        for name, result in results.items()
    }
    if all(name in results for name in GOALS):
        figures["peer_speedup"] = min(
            figures[f"peer_speedup_{name}"] / goal for name, goal in GOALS.items()
        )
    return figures


def report(results: dict[str, Result]) -> str:
    """A table: both times, their ratio and goal, and how large the memories are."""
    figures = speedups(results)
    rows = []
    for name, result in results.items():
        times = [median(side) for side in zip(*result.pairs, strict=True)]
        goal = f"{GOALS[name]:.0f}" if name in GOALS else ""
        rows.append(
            [
                name,
                str(result.tokens),
                *(f"{seconds:.2f}" for seconds in times),
                f"{figures[f'peer_speedup_{name}']:.1f}",
                goal,
                *(f"{floats:,}" for floats in (*result.memory, *result.cms)),
            ]
        )
    header = ["", "tokens", "theirs, s", "ours, s", "ratio", "goal"]
    header += ["memory, theirs", "ours", "CMS, theirs", "ours"]
    return table(header, rows)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 when a peer is missing, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_peers", description=main.__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (%(default)s)")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT)
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error("--pairs must be positive")
    try:
        figures = measure(options.pairs, options.environment)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    if figures:
        print(f"figures: {write_figures('peers', figures)}")
    return 0 if "peer_speedup" in figures else 1


if __name__ == "__main__":
    sys.exit(as_command(main))
