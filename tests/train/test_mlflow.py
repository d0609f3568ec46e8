"""MLflow's embedded store: where it lies, and that runs may start on it together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from train.callbacks.mlflow import tracking_location
from train.config import MLflowConfig


def test_two_runs_that_start_together_share_the_store(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    raw_config["mlflow"] = {"every_steps": 1}
    raw_config["training"]["total_tokens"] = 512
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "train", str(path), f"run_dir={tmp_path / 'runs' / name}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in running:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    for name in ("one", "two"):
        run_id = (tmp_path / "runs" / name / "mlflow_run_id").read_text()
        assert [p.step for p in client.get_metric_history(run_id, "train/loss")] == [256, 512]


def test_the_tracking_uri_of_the_environment_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = Path("/somewhere/runs/a")
    uri, artifacts = tracking_location(MLflowConfig(), run_dir)
    assert uri == "sqlite:////somewhere/runs/mlflow.db"
    assert artifacts == Path("/somewhere/runs/mlflow-artifacts")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_location(MLflowConfig(), run_dir) == ("http://127.0.0.1:5000", None)
    own = MLflowConfig(tracking_uri="sqlite:///elsewhere.db")
    assert tracking_location(own, run_dir) == ("sqlite:///elsewhere.db", None)
