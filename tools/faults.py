"""Every fault that a run has to survive, on 2 and 4 processes: `make faults`.

Each chain of faults strikes one run; started again after each, it has to end with the bits of the
run that was left alone. Then how long training waits for a checkpoint, and a soak: training under
random faults, for its goodput. --soak MINUTES is a long one of these, and nothing else.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.arguments import at_least
from data_pipeline.command import as_command
from tools.bench_checkpoint import measure_time, stall_fractions
from tools.fault_processes import attempt
from tools.fault_rehearsal import (
    EVERY_STEPS,
    STEPS,
    Fault,
    Outcome,
    configuration,
    differences,
    make_corpora,
    rehearse,
)
from tools.figures import add_figures, table
from train.parallel.pulse import FIRST_RANK_PHASES
from train.watchdog import HANG

FOLDER = Path("runs/faults")
WORLDS = (2, 4)
SHORT_SOAK_MINUTES = 2.0

PLACES = {
    "kill": (
        *("open", "start", "data", "forward", "backward", "reduce", "optimizer", "evaluation"),
        *("save", "save-before-marker", "save-after-marker", "delete"),
    ),
    "term": ("open", "start", "data", "forward", "backward", "optimizer", "evaluation", "save"),
    "usr1": ("open", "start", "forward", "reduce", "evaluation", "save"),
    "int": ("data", "backward", "evaluation"),
    "stop": ("forward", "evaluation", "save"),
    "raise": ("forward", "optimizer", "evaluation", "save-before-marker"),
    "oom": ("backward",),
    "slow": ("forward", "save"),
    "disk_full": ("save-before-marker", "save-before-marker"),
    "nan_loss": ("forward",),
    "nan_gradient": ("reduce", "reduce"),
}
DAMAGE = (
    *("flip_checkpoint", "truncate_checkpoint", "remove_from_checkpoint"),
    *("flip_shard", "truncate_shard", "remove_shard"),
)
CHAINS = {
    "kill": ("kill",),
    "signals": ("term", "usr1", "int"),
    "errors": ("raise", "oom", "slow", "disk_full"),
    "not finite": ("nan_loss", "nan_gradient", "kill"),
    "hang": ("stop",),
}


@dataclass
class Tally:
    """Faults by (kind, phase): how many came, and how many runs they left with the right bits."""

    injected: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    survived: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    problems: list[str] = field(default_factory=list)
    hang_detection_s: list[float] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)  # seconds of a fault / seconds of a step

    def add(self, name: str, outcome: Outcome, wrong: list[str], planned: int) -> None:
        """Count the faults of one chain."""
        if len(outcome.fired) < planned:
            wrong = [*wrong, f"{planned - len(outcome.fired)} faults did not come"]
        for row in outcome.fired:
            place = (row["kind"], row["phase"])
            self.injected[place] += 1
            self.survived[place] += not wrong
        if wrong:
            self.problems.append(f"{name}: {', '.join(wrong[:4])}")


def plan(chain: str, ranks: int, seed: int) -> list[Fault]:
    """The faults of a chain, spread over its steps and ranks."""
    if chain == "damage":
        return _damage(ranks, seed)
    places = [(kind, phase) for kind in CHAINS[chain] for phase in PLACES[kind]]
    if chain == "not finite":
        places = [p for p in places if p[0] != "kill" or p[1] in ("forward", "save-after-marker")]
    draw = random.Random(f"{seed}/{chain}")
    draw.shuffle(places)
    faults = []
    for number, (kind, phase) in enumerate(places):
        step = 1 + number * (STEPS - 4) // len(places)
        if phase in ("open", "start"):
            step = 0 if phase == "open" else seed % 2  # of the first start, or the second
        rank = 0 if phase in FIRST_RANK_PHASES else (seed + number) % ranks
        faults.append({"kind": kind, "phase": phase, "step": step, "rank": rank, "seed": seed})
        if kind == "slow":
            faults[-1]["seconds"] = 0.2
    return faults


def _damage(ranks: int, seed: int) -> list[Fault]:
    """Damage to files, each with a kill, so that somebody has to read them again."""
    faults: list[Fault] = []
    for number, kind in enumerate(DAMAGE):
        where = {"step": 7 + 2 * number, "rank": (seed + number) % ranks, "seed": seed + number}
        faults.append({"kind": kind, "phase": "forward", **where})
        faults.append({"kind": "kill", "phase": "forward", **where})
    return faults


def matrix(seeds: int, worlds: tuple[int, ...] = WORLDS, chains: tuple[str, ...] = ()) -> Tally:
    """Every chain on every number of processes, with several seeds."""
    corpora, tally = make_corpora(FOLDER / "corpora"), Tally()
    attempt(["--help"], 1, FOLDER / "help.log")  # the fork server imports torch now
    for ranks in worlds:
        for seed in range(seeds):
            base = FOLDER / f"ranks{ranks}-seed{seed}"
            calm = rehearse(configuration(corpora, base / "calm", seed), ranks)
            for chain in chains or (*CHAINS, "damage"):
                faults = plan(chain, ranks, seed)
                name = f"{chain}, {ranks} processes, seed {seed}"
                reference = calm
                if chain == "not finite":
                    alone = [fault for fault in faults if fault["kind"].startswith("nan")]
                    reference = rehearse(
                        configuration(corpora, base / "skipping", seed, faults=alone), ranks
                    )
                run_dir = base / chain.replace(" ", "-")
                outcome = rehearse(configuration(corpora, run_dir, seed, faults=faults), ranks)
                wrong = ["it did not come to its end"]
                if outcome.finished:
                    wrong = differences(reference.run_dir, outcome.run_dir)
                tally.add(name, outcome, wrong, len(faults))
                tally.hang_detection_s += detections(outcome)
                if chain == "kill":
                    lost = (outcome.wall_s - calm.wall_s) / len(faults)
                    tally.recovery.append(lost / calm.step_s)
                print(
                    f"{name}: {len(outcome.fired)} faults, {len(outcome.attempts)} starts, "
                    f"{outcome.wall_s:.1f} s{'' if not wrong else ': WRONG'}",
                    file=sys.stderr,
                )
    return tally


def detections(outcome: Outcome) -> list[float]:
    """Seconds from each SIGSTOP to the exit of the first rank whose watchdog saw it."""
    found = []
    for row in outcome.fired:
        if row["kind"] != "stop":
            continue
        ends = [
            end - row["time"]
            for start in outcome.attempts
            for status, end in zip(start.statuses, start.ended, strict=True)
            if status == HANG and start.started < row["time"] < end
        ]
        found += [min(ends)] if ends else []
    return found


def report(tally: Tally) -> str:
    """The table, and the figures into runs/bench/faults.json."""
    rows = [
        [f"{kind} in {phase}", str(count), str(tally.survived[kind, phase])]
        for (kind, phase), count in sorted(tally.injected.items())
    ]
    injected, survived = sum(tally.injected.values()), sum(tally.survived.values())
    rows.append(["all", str(injected), str(survived)])
    figures: dict[str, Any] = {"injected": injected, "survived_bitwise": survived}
    if tally.recovery:
        figures["recovery_s_over_step_s"] = statistics.median(tally.recovery)
    if tally.hang_detection_s:
        figures["hang_detection_s"] = statistics.median(tally.hang_detection_s)
    add_figures("faults", figures)
    lines = [table(["fault", "injected", "survived to the bit"], rows)]
    lines += [f"{name}: {value:,.2f}" for name, value in figures.items()]
    return "\n".join(lines)


def stalls() -> str:
    """How long training waits for a checkpoint, into the same figures; `make bench-checkpoint`
    says more."""
    with tempfile.TemporaryDirectory() as folder:
        found = stall_fractions(measure_time(6, 4, 144, Path(folder)))
    add_figures("faults", found)
    return "\n".join(f"{name}: {value:.3f} of a step" for name, value in found.items())


def soak(minutes: float, ranks: int, seed: int) -> tuple[str, list[str]]:
    """Train for about so many minutes under random faults, beside it without, and compare.

    Returns what to print, and what is wrong.
    """
    corpora = make_corpora(FOLDER / "corpora")
    probe = rehearse(configuration(corpora, FOLDER / "soak-probe", seed), ranks)
    steps = int(0.5 * minutes * 60 / (probe.trained_s / STEPS))
    steps -= steps % EVERY_STEPS
    draw = random.Random(f"soak/{seed}")
    count = max(1, int(minutes * 60 * 0.25 / 4))
    kinds = ("kill", "kill", "kill", "term", "usr1", "stop", "raise", "slow", "disk_full")
    faults: list[Fault] = []
    for number in range(count):
        kind = draw.choice(kinds)
        phase = draw.choice(PLACES[kind])
        rank = 0 if phase in FIRST_RANK_PHASES else draw.randrange(ranks)
        step = 1 + (steps - 4) * number // count
        faults.append({"kind": kind, "phase": phase, "step": step, "rank": rank, "seed": seed})
    limit_s = 600 + 120 * minutes
    with ThreadPoolExecutor() as beside:
        undisturbed = beside.submit(
            rehearse, configuration(corpora, FOLDER / "soak-calm", seed, steps), ranks, limit_s
        )
        disturbed = configuration(corpora, FOLDER / "soak", seed, steps, faults)
        outcome = rehearse(disturbed, ranks, limit_s)
        calm = undisturbed.result()
    wrong = ["it did not come to its end"]
    if outcome.finished:
        wrong = differences(calm.run_dir, outcome.run_dir)
    goodput = outcome.trained_s / outcome.wall_s
    add_figures("faults", {"goodput": goodput})
    text = (
        f"{steps} steps on {ranks} processes in {outcome.wall_s / 60:.1f} minutes "
        f"(undisturbed, beside it: {calm.wall_s / 60:.1f}), "
        f"{len(outcome.fired)} of {count} faults came, {len(outcome.attempts)} starts\n"
        f"goodput {goodput:.3f} (undisturbed: {calm.trained_s / calm.wall_s:.3f})\n"
        + ("" if wrong else "final state equal to the bit")
    )
    return text, wrong[:8]


def _minutes(text: str) -> float:
    """The type of --soak."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 when a run did not survive with the right bits, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__)
    parser.add_argument(
        "--seeds", type=at_least(1), default=2, help="seeds of each chain (default 2)"
    )
    parser.add_argument(
        "--soak", type=_minutes, nargs="?", const=30.0, metavar="MINUTES", help="default 30"
    )
    parser.add_argument(
        "--ranks",
        type=at_least(1),
        nargs="+",
        default=WORLDS,
        help="processes (default 2 and 4; soak: 2)",
    )
    options = parser.parse_args(arguments)
    ranks, problems = options.ranks, []
    if not options.soak:
        tally = matrix(options.seeds, tuple(ranks))
        problems += tally.problems
        print(report(tally), flush=True)
        print(stalls(), flush=True)
    text, wrong = soak(options.soak or SHORT_SOAK_MINUTES, ranks[0], seed=0)
    problems += wrong
    print("\n".join([text, *(f"WRONG: {one}" for one in problems)]))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(as_command(main))
