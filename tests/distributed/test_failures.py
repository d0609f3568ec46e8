"""Runs that are stopped, killed, hung and damaged on real processes, and end with the same bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import faults
from tools.fault_processes import attempt
from tools.fault_rehearsal import (
    WATCHDOG_S,
    Outcome,
    configuration,
    differences,
    make_corpora,
    rehearse,
)
from train.callbacks.faults import read_fired
from train.callbacks.metrics import read_metrics
from train.run_folder import run_lock

STATUSES = {"term": 143, "int": 130, "usr1": 75, "kill": 76}
STOPS = (
    ("term", "open", 0),
    ("usr1", "start", 0),
    ("int", "data", 3),
    ("term", "forward", 5),
    ("usr1", "backward", 8),
    ("term", "evaluation", 10),
    ("int", "reduce", 14),
    ("usr1", "evaluation", 14),
    ("usr1", "optimizer", 16),
    ("term", "save", 17),
    ("usr1", "evaluation", 24),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("rehearsal") / "corpora")


@pytest.fixture(scope="module")
def calm(data: Path) -> Callable[[int], Outcome]:
    """The undisturbed run on so many processes."""
    runs: dict[int, Outcome] = {}

    def get(ranks: int) -> Outcome:
        if ranks not in runs:
            runs[ranks] = rehearse(configuration(data, data.parent / f"calm{ranks}", 0), ranks)
            assert runs[ranks].finished
        return runs[ranks]

    return get


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stop_in_any_phase_is_agreed_saved_and_resumed_to_the_bit(
    data: Path, calm: Callable[[int], Outcome], tmp_path: Path, ranks: int
) -> None:
    """The rank that is told varies; all end with the status of its signal."""
    planned = [
        {"kind": kind, "phase": phase, "step": step, "rank": number % ranks}
        for number, (kind, phase, step) in enumerate(STOPS)
    ]
    outcome = rehearse(configuration(data, tmp_path / "run", 0, faults=planned), ranks)
    assert outcome.finished, (tmp_path / "run.log").read_text()[-3000:]
    assert [row["number"] for row in outcome.fired] == list(range(len(STOPS)))
    for (kind, phase, _), start in zip(STOPS, outcome.attempts[:-1], strict=True):
        assert start.statuses == [STATUSES[kind]] * ranks, (kind, phase)
    assert differences(calm(ranks).run_dir, outcome.run_dir) == []


def test_kills_and_damage_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tally = faults.matrix(1, (2,), ("kill", "damage"))
    text = faults.report(tally)
    assert tally.problems == [], text
    assert sum(tally.survived.values()) == sum(tally.injected.values()) == 24
    assert "kill in save-after-marker" in text


@pytest.mark.slow
def test_every_fault_on_two_and_four_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tally = faults.matrix(1)
    assert tally.problems == [], faults.report(tally)


def test_a_stopped_rank_is_found_and_named(data: Path, tmp_path: Path) -> None:
    fault = {"kind": "stop", "phase": "backward", "step": 5, "rank": 1}
    outcome = rehearse(configuration(data, tmp_path / "run", 0, faults=[fault]), 2)
    assert outcome.attempts[0].statuses == [76, -9]  # the launcher kills what does not answer
    assert outcome.finished
    (seconds,) = faults.detections(outcome)
    assert WATCHDOG_S <= seconds < 1.15 * WATCHDOG_S + 3
    text = (tmp_path / "run" / "hang-rank0.txt").read_text()
    assert "rank 1 did not arrive at collective" in text
    assert re.search(
        r"its machine is\), last heard of in phase [\w-]+ of step [0-5], \d+ coll", text
    )
    assert "all_reduce of numbers (step 5, reduce), not left" in text
    assert "in step\n" in text  # the stack of the training thread
    assert text in (tmp_path / "run.log").read_text()
    assert not (tmp_path / "run" / "hang-rank1.txt").exists()


TWO = r" of ranks \[0, 1\] of step 5"
HANGS: list[Any] = [
    (2, {"pp": 2, "micro_batches": 2}, r"\w*p2p" + TWO),
    *(
        pytest.param(2, parallel, where + TWO, marks=pytest.mark.slow)
        for parallel, where in (
            ({"tp": 2}, "all_reduce"),
            ({"dp_replicate": 1, "dp_shard": 2}, r"\w*all_gather\w*"),
            ({"cp": 2}, "recv"),
        )
    ),
    pytest.param(
        4,
        {"tp": 2, "dp_replicate": 1, "dp_shard": 2},
        r"\w+ of ranks \[(2, 3|1, 3)\]( of step 5|, where rank [12] waits)",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("ranks", "parallel", "where"), HANGS)
def test_a_rank_missing_in_a_collective_of_a_library_is_named(
    data: Path, tmp_path: Path, ranks: int, parallel: dict[str, Any], where: str
) -> None:
    """FSDP2, tensor parallelism and pipelines call their collectives themselves."""
    last = ranks - 1
    fault = {"kind": "stop", "phase": "forward", "step": 5, "rank": last}
    config = configuration(data, tmp_path / "run", 0, faults=[fault])
    config["model"]["num_layers"] = 2
    config["parallel"] = parallel
    outcome = rehearse(config, ranks)
    assert outcome.finished
    statuses = outcome.attempts[0].statuses
    assert statuses[last] == -9
    assert 76 in statuses
    found = [(tmp_path / "run" / f"hang-rank{rank}.txt") for rank in range(last)]
    texts = [path.read_text() for path in found if path.exists()]
    assert texts
    for text in texts:
        assert re.search(rf"rank {last} did not arrive at ({where})", text), text[:2000]


@pytest.mark.parametrize("phase", ["forward", "evaluation"])
@pytest.mark.parametrize(
    "layout",
    [
        {"parallel": {"pp": 2, "micro_batches": 2}},
        {"parallel": {"tp": 2}},
        {"parallel": {"dp_replicate": 1, "dp_shard": 2}},
        {"parallel": {"cp": 2}},
        pytest.param(
            {"engine": "deepspeed", "deepspeed": {"zero_stage": 3}}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_lost_in_a_collective_of_a_library_is_one_line(
    data: Path, tmp_path: Path, layout: dict[str, Any], phase: str
) -> None:
    fault = {"kind": "kill", "phase": phase, "step": 3, "rank": 1}
    config = configuration(data, tmp_path / "run", 0, faults=[fault]) | layout
    config["model"]["num_layers"] = 2
    config["evaluation"]["every_tokens"] = 32  # before a save, which would wait for the rank's part
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    start = attempt([str(tmp_path / "run.yaml")], 2, tmp_path / "log", grace_s=60.0)
    assert start.statuses == [76, -9]
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    assert re.search(r"collective.* of step [34] \(\w+\) failed, as it does when a rank is", text)


def test_one_process_that_stands_still_ends_itself_and_a_slow_one_does_not(
    data: Path, tmp_path: Path
) -> None:
    slow = [
        {"kind": "slow", "phase": "forward", "step": 3, "seconds": 0.6 * WATCHDOG_S},
        {"kind": "slow", "phase": "optimizer", "step": 4, "seconds": 20},
    ]
    config = configuration(data, tmp_path / "run", 0, faults=slow)
    config["watchdog"]["timeout_s"] = WATCHDOG_S
    outcome = rehearse(config, 1)
    assert [start.statuses for start in outcome.attempts] == [[76], [0]]
    assert len(outcome.fired) == 2
    text = (tmp_path / "run" / "hang-rank0.txt").read_text()
    assert "rank 0 itself stands still, in phase optimizer of step 4, not in a collective" in text
    assert "time.sleep(fault.seconds)" in text or "in _happen" in text


def test_a_folder_in_use_refuses_all_ranks_of_a_second_job(data: Path, tmp_path: Path) -> None:
    config = configuration(data, tmp_path / "run", 0)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with run_lock(tmp_path / "run"):
        start = attempt([str(tmp_path / "run.yaml")], 2, tmp_path / "log")
    assert start.statuses == [2, 2]
    text = (tmp_path / "log").read_text()
    assert text.count("in use by another training process") == 1
    assert text.count("\n") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_what_goes_wrong_is_one_readable_line(data: Path, tmp_path: Path) -> None:
    planned = [
        {"kind": "disk_full", "step": 2, "phase": "save-before-marker"},
        {"kind": "oom", "step": 7, "phase": "backward", "rank": 0},
        {"kind": "kill", "step": 10, "phase": "forward", "rank": 1},
    ]
    outcome = rehearse(configuration(data, tmp_path / "run", 0, faults=planned), 2)
    assert [start.statuses[0] for start in outcome.attempts] == [1, 76, 0]
    text = (tmp_path / "run.log").read_text()
    assert "Traceback" not in text
    assert "No space left on device" in text
    assert "the next save, if any, tries again" in text
    assert "out of memory on rank 0, in phase backward of step 7" in text
    for part in ("parameters", "optimizer states", "accumulators of slow levels", "activations"):
        assert f"  {part}" in text or part in text, part
    assert "all_reduce of numbers, of step 10 (reduce) failed, as it does when a rank is" in text


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(data: Path, tmp_path: Path) -> None:
    planned: list[dict[str, Any]] = [
        {"kind": "kill", "step": 5, "phase": "backward", "rank": 1},
        {"kind": "kill", "step": 12, "phase": "save", "rank": 0},
    ]
    config = configuration(data, tmp_path / "run", 0, faults=planned)
    config["watchdog"]["timeout_s"] = 120.0
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [sys.executable, *launcher, "--max-restarts=3", "-m", "train", str(tmp_path / "run.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(read_fired(tmp_path / "run" / "faults.jsonl")) == 2
    calm = rehearse(configuration(data, tmp_path / "calm", 0), 2)
    assert differences(calm.run_dir, tmp_path / "run") == []
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 24


def test_a_killed_run_goes_on_with_the_ranks_that_are_left(
    data: Path, calm: Callable[[int], Outcome], tmp_path: Path
) -> None:
    fault = {"kind": "kill", "step": 11, "phase": "optimizer", "rank": 1}
    config = configuration(data, tmp_path / "run", 0, faults=[fault])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = [str(tmp_path / "run.yaml"), "--resume-or-start"]
    assert attempt(arguments, 2, tmp_path / "log", grace_s=60.0).statuses == [76, -9]
    assert attempt(arguments, 1, tmp_path / "log").statuses == [0]
    runs = [read_metrics(run / "metrics.jsonl") for run in (calm(2).run_dir, tmp_path / "run")]
    for one, two in zip(*runs, strict=True):
        assert (one["kind"], one["tokens"]) == (two["kind"], two["tokens"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
