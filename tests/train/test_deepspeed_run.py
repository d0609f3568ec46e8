"""A run under DeepSpeed's launcher, resumed by our own engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train.__main__ import main
from train.checkpoint.load import load_run
from train.config import dump_config

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_launcher_and_a_resume_by_the_other_engine(make_config: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(make_config(**{"optimizer.eps": 1e-5})))
    straight = tmp_path / "straight"
    assert main([str(path), f"run_dir={straight}"]) == 0
    options = ["engine=deepspeed", "deepspeed.zero_stage=3", "training.stop_at_tokens=1792"]
    found = subprocess.run(
        ["launch/deepspeed.sh", "2", str(path), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert found.returncode == 0, found.stderr
    assert "Using topology" not in found.stdout
    assert main([str(path), "--resume"]) == 0
    expected = dict(load_run(straight)[1].named_parameters())
    for name, parameter in load_run(tmp_path / "run")[1].named_parameters():
        difference = (parameter - expected[name]).norm() / expected[name].norm()
        assert difference <= 1e-4, name
