"""Independent training runs, as many at a time as there are cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tools.quickstart import checkpoints, finished
from train.config import load_config


def run_jobs(jobs: Sequence[Callable[[], str]]) -> int:
    """Call all of them, each of which waits for a process; returns an exit status.

    Says the name that each returns, the time passed and what is left. Where one raises
    subprocess.CalledProcessError its command and words are said, and its status is ours; Ctrl-C,
    which the processes get too, is 130.
    """
    started = time.monotonic()
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        running = [pool.submit(job) for job in jobs]
        for number, job in enumerate(as_completed(running), start=1):
            name = job.result()
            passed = time.monotonic() - started
            left = passed / number * (len(jobs) - number)
            print(
                f"{number}/{len(jobs)} {name} | {passed:.0f} s, about {left:.0f} s left", flush=True
            )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip()
        print(f"error: {' '.join(map(str, error.cmd))}: {said}", file=sys.stderr)
        return int(error.returncode)
    except KeyboardInterrupt:
        print("stopping: each run writes its checkpoint, the next call goes on", file=sys.stderr)
        return 130
    finally:
        pool.shutdown(cancel_futures=True)
    return 0


def train_to_the_end(config_file: Path, overrides: Sequence[str]) -> None:
    """`train_alone`, from the last checkpoint where there is one; nothing where the run is over."""
    config = load_config(config_file, list(overrides))
    if not finished(config):
        train_alone([config_file, *overrides], resume=bool(checkpoints(config).complete()))


def train_alone(words: Sequence[object], resume: bool) -> None:
    """`python -m train WORDS` on one thread, quietly. Raises subprocess.CalledProcessError, with
    what it wrote, where it fails."""
    command = [sys.executable, "-m", "train", *map(str, words), *["--resume"][: int(resume)]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
