"""No secret of a run reaches a log, a checkpoint or what a resume tells."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import yaml

from tools.checkpoint import main as tool
from train.__main__ import main
from train.checkpoint.load import load_run
from train.config import validate_config
from train.redaction import redact_logging
from train.run import train

SECRET = "hunter2-s3cr3t"


def test_error_lines_and_logs_hold_no_secret(
    raw_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    raw_config["data"]["validation"] = f"file://me:{SECRET}@/nowhere/shards?token={SECRET}"
    path.write_text(yaml.safe_dump(raw_config))
    factory, write = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        assert main([str(path)]) == 2
        error = capsys.readouterr().err
        assert "nowhere" in error
        assert SECRET not in error
        redact_logging()
        record = logging.getLogger("x").makeRecord(
            "x", logging.WARNING, "f", 1, "at %s", (f"http://u:{SECRET}@h",), None
        )
        assert record.getMessage() == "at http://***@h"
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = write


def test_progress_and_warnings_hold_no_secret(
    make_config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL of the checkpoints stands in both."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory, url = logging.getLogRecordFactory(), f"memory://me:{SECRET}@bucket/run"
    settings = {"url": url, "every_tokens": 256, "asynchronous": False}
    quick = {"model.mixer": "attention", "training.total_tokens": 512}
    try:
        redact_logging()
        assert train(make_config(**quick, checkpoint=settings), resume=False) == 0
    finally:
        logging.setLogRecordFactory(factory)
    assert "checkpoint memory://***@bucket/run/tokens-" in capsys.readouterr().err
    written = warnings.formatwarning(f"no {url}", UserWarning, "file.py", 1)
    assert "no memory://***@bucket/run" in written
    assert tool(["verify", url]) == 0
    printed = capsys.readouterr().out
    assert "memory://***@bucket/run/tokens-000000000000512: good" in printed
    assert SECRET not in printed


def test_a_checkpoint_holds_no_secret_and_its_run_does(raw_config, tmp_path: Path) -> None:
    uri = f"http://me:{SECRET}@127.0.0.1:9"
    raw_config["mlflow"] = {"enabled": False, "tracking_uri": uri}
    raw_config["training"]["stop_at_tokens"] = 256
    run = Path(raw_config["run_dir"])
    train(validate_config(raw_config, "test"), False)
    (checkpoint,) = (run / "checkpoints").glob("tokens-*")
    assert not any(SECRET.encode() in path.read_bytes() for path in checkpoint.iterdir())
    for path in (run, checkpoint):
        assert load_run(path)[0].mlflow.tracking_uri == uri
    checkpoint.rename(tmp_path / "alone")
    assert load_run(tmp_path / "alone")[0].mlflow.tracking_uri == "http://***@127.0.0.1:9"


def test_settings_that_a_resume_changes_hold_no_secret(
    make_config, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://me:{SECRET}@127.0.0.1:9"
    config = make_config(
        **{"training.total_tokens": 256, "mlflow.tracking_uri": uri, "mlflow.enabled": False}
    )
    assert train(config, resume=False) == 0
    changed = make_config(**{"mlflow.tracking_uri": f"sqlite://u:{SECRET}@db/x"})
    assert train(changed, resume=True) == 0
    told = capsys.readouterr().err
    assert "resuming with other settings: mlflow.tracking_uri" in told
    assert SECRET not in told
