"""No secret passes `redact`, and what is no secret does."""

from __future__ import annotations

import pytest

from data_pipeline.cli import main
from data_pipeline.redaction import redact

SECRET = "hunter2-s3cr3t"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"http://me:{SECRET}@host:5000/x", "http://***@host:5000/x"),
        (f"postgresql+psycopg2://me:{SECRET}/q@host/db", "postgresql+psycopg2://***@host/db"),
        (f"https://{SECRET}@host/a", "https://***@host/a"),
        (f"s3://b/k?X-Amz-Signature={SECRET}&part=2", "s3://b/k?X-Amz-Signature=***&part=2"),
        (f"https://h/x?token={SECRET}#f", "https://h/x?token=***#f"),
        (f"https://h/x?key={SECRET}&monkey=1", "https://h/x?key=***&monkey=1"),
        (f"https://h/x?a=1&subscription-key={SECRET}", "https://h/x?a=1&subscription-key=***"),
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


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_error_lines_hold_no_secret(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, f"file://me:{SECRET}@/nowhere/shards"]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert SECRET not in error
