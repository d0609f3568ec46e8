"""No secret passes `redact`, and what is no secret does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from train.__main__ import main, train
from train.checkpoint.load import load_run
from train.config import validate_config
from train.redaction import redact, redact_logging

SECRET = "hunter2-s3cr3t"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"http://me:{SECRET}@host:5000/x", "http://***@host:5000/x"),
        (f"postgresql+psycopg2://me:{SECRET}/q@host/db", "postgresql+psycopg2://***@host/db"),
        (f"https://{SECRET}@host/a", "https://***@host/a"),
        (f"s3://b/k?X-Amz-Signature={SECRET}&part=2", "s3://b/k?X-Amz-Signature=***&part=2"),
        (f"https://h/x?token={SECRET}#f", "https://h/x?token=***#f"),
        (f"az://c/d?sv=2020&sig={SECRET}", "az://c/d?sv=2020&sig=***"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"'https://u:{SECRET}@h' and http://v:{SECRET}@i/", "'https://***@h' and http://***@i/"),
        ("sqlite:////data/runs/mlflow.db", "sqlite:////data/runs/mlflow.db"),
        ("rank 3: loss 2.5, 4096 tokens; a@b.org", "rank 3: loss 2.5, 4096 tokens; a@b.org"),
        ("https://host/shards?version=7", "https://host/shards?version=7"),
    ],
)  # fmt: skip
def test_uris(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
        assert redact(f"failed with {SECRET}-{name}!") == "failed with ***!"
    monkeypatch.setenv("MY_TOKEN", "1")
    monkeypatch.setenv("SOME_PATH", SECRET)
    assert redact(f"1 {SECRET}") == f"1 {SECRET}"


def test_error_lines_and_logs_hold_no_secret(
    raw_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    raw_config["data"]["validation"] = f"file://me:{SECRET}@/nowhere/shards?token={SECRET}"
    path.write_text(yaml.safe_dump(raw_config))
    factory = logging.getLogRecordFactory()
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
