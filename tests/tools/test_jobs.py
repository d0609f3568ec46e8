"""Runs side by side: what is said of them, and what a failure or Ctrl-C leaves."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.jobs import run_jobs, train_alone


def named(name: str) -> Callable[[], str]:
    return lambda: name


def test_every_job_is_said_as_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_jobs([named("a"), named("b"), named("c")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert {line.split()[1] for line in lines} == {"a", "b", "c"}
    assert all(" s left" in line for line in lines)


def test_a_command_that_fails_ends_it_with_its_words_and_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun, may_end = [], threading.Event()

    def fails() -> str:
        code = "import sys; sys.exit('error: no such thing' if sys.argv else 1)"
        try:
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        finally:
            may_end.set()
        return "never"

    def waits() -> str:
        may_end.wait(60)
        begun.append(1)
        time.sleep(0.2)
        return "late"

    assert run_jobs([fails, *[waits] * 40]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {sys.executable} -c ")
    assert said.endswith("error: no such thing")
    assert len(begun) < 40  # those that had not begun never do


def test_ctrl_c_is_said_to_be_resumable(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    assert run_jobs([interrupted]) == 130
    assert "the next call goes on" in capsys.readouterr().err


def test_a_run_that_is_refused_tells_why(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        train_alone([tmp_path / "none.yaml"], resume=False)
    assert failed.value.returncode == 2
    assert "can't read configuration" in failed.value.stderr
    assert failed.value.cmd[-1] == str(tmp_path / "none.yaml")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        train_alone([tmp_path / "none.yaml"], resume=True)
    assert failed.value.cmd[-1] == "--resume"
