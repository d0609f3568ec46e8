"""The quickstart from shards on: train, report, generate; MLflow holds what the run folder does."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tools import quickstart
from tools.generate import main as generate
from train.__main__ import main as train
from train.callbacks.metrics import read_metrics
from train.config import load_config


@pytest.fixture(scope="module")
def overrides(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The quickstart's configuration on the small corpus, a few steps long."""
    return [
        f"run_dir={tmp_path_factory.mktemp('runs') / 'quick'}",
        f"data.train=[{{path: {corpora['train']}}}]",
        f"data.validation={corpora['validation']}",
        "data.seq_len=64",
        "model.titans.scan.eta_max=0.01",
        "training.batch_tokens=256",
        "training.total_tokens=5120",
        "model.cms.levels.1.update_every_tokens=1024",
        "model.cms.levels.2.update_every_tokens=2048",
        "evaluation.every_tokens=2560",
        "num_threads=1",
        "mlflow.every_steps=5",
    ]


@pytest.fixture(scope="module")
def printed(overrides: list[str]) -> str:
    """What `make quickstart` prints, corpus preparation aside."""
    import contextlib

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(quickstart, "prepare_sotu", lambda: None)
        assert quickstart.main(overrides) == 0
    return output.getvalue()


def run_dir_of(overrides: list[str]) -> Path:
    return Path(overrides[0].removeprefix("run_dir="))


def test_the_table_says_what_the_run_did(printed: str, overrides: list[str]) -> None:
    rows = read_metrics(run_dir_of(overrides) / "metrics.jsonl")
    final = [row for row in rows if row["kind"] == "evaluation"][-1]
    assert re.search(r"tokens trained\s+5,120", printed)
    assert re.search(rf"validation loss\s+{final['loss']:.4f} nats", printed)
    assert re.search(rf"bits per byte\s+{final['bits_per_byte']:.4f}", printed)
    assert re.search(r"firings of every_step \(every step\)\s+20", printed)
    assert re.search(r"firings of mid \(every 1,024 tokens\)\s+5", printed)
    assert re.search(r"firings of slow \(every 2,048 tokens\)\s+2", printed)
    for command in ("--resume", "mlflow ui", "configs/small.yaml", "make compare"):
        assert command in printed


def test_its_commands_can_be_typed_as_they_stand(
    printed: str,
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (line,) = (line for line in printed.splitlines() if line.startswith("resume "))
    resume = shlex.split(line.partition("(after")[0])
    assert resume[3] == "train"
    assert train(resume[4:]) == 0
    assert "all 5,120 tokens of this run are trained already" in capsys.readouterr().err
    config = load_config(quickstart.CONFIG_FILE, overrides)
    monkeypatch.setenv("PATH", os.devnull)
    python, mlflow = quickstart.program("python"), quickstart.mlflow_command(config).split()[0]
    assert all(os.access(path, os.X_OK) for path in (python, mlflow))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert quickstart.program("python") == "python"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@server/mlflow")
    assert quickstart.mlflow_command(config) == "https://***@server/mlflow"


def test_bits_per_byte_are_nats_over_the_bytes_of_the_text(
    printed: str, overrides: list[str], corpora: dict[str, Path]
) -> None:
    """Against the size of the text file, not the byte table of the tokenizer."""
    import math

    rows = read_metrics(run_dir_of(overrides) / "metrics.jsonl")
    final = [row for row in rows if row["kind"] == "evaluation"][-1]
    text = corpora["validation"].parent / "text" / "validation"
    size = sum(path.stat().st_size for path in text.iterdir())
    bits = final["loss"] * final["predicted_tokens"] / math.log(2)
    assert final["bits_per_byte"] == pytest.approx(bits / size, rel=0.01)


def test_a_second_call_trains_nothing(printed: str, overrides: list[str]) -> None:
    metrics = run_dir_of(overrides) / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "prepare_sotu", lambda: None)
        assert quickstart.main(overrides) == 0
    assert metrics.stat().st_mtime_ns == before


def test_mlflow_has_parameters_metrics_and_artifacts(printed: str, overrides: list[str]) -> None:
    from mlflow.tracking import MlflowClient

    run_dir = run_dir_of(overrides)
    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    run_id = (run_dir / "mlflow_run_id").read_text()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.titans.scan.eta_max"] == "0.01"
    assert int(run.data.params["num_parameters"]) > 100_000
    rows = read_metrics(run_dir / "metrics.jsonl")
    steps = {row["tokens"]: row["loss"] for row in rows if row["kind"] == "step"}
    history = client.get_metric_history(run_id, "train/loss")
    assert [point.step for point in history] == [1280, 2560, 3840, 5120]
    assert all(point.value == pytest.approx(steps[point.step]) for point in history)
    validation = client.get_metric_history(run_id, "validation/loss")
    assert len(validation) == sum(row["kind"] == "evaluation" for row in rows)
    assert {item.path for item in client.list_artifacts(run_id)} == {"config.yaml", "plots"}
    assert [item.path for item in client.list_artifacts(run_id, "plots")] == ["plots/loss.png"]


def test_generate_is_repeatable_and_checks_its_input(
    printed: str, overrides: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = str(run_dir_of(overrides))
    texts = []
    for seed in ("1", "1", "2"):
        assert generate([run, "--prompt", "def ", "--max-tokens", "40", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def ")
    assert generate([str(tmp_path)]) == 2
    assert generate([run, "--temperature", "-1"]) == 2
    assert generate([run, "--temperature", "nan"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "holds no run" in errors[0]
    assert "temperature" in errors[1]
    assert "temperature" in errors[2]
    for wrong in (["--max-tokens", "-3"], ["--prompt", "a\udcff"], ["--seed", str(1 << 70)]):
        with pytest.raises(SystemExit) as stopped:
            generate([run, *wrong])
        assert stopped.value.code == 2


def test_generate_with_a_model_of_more_ids_than_the_tokenizer_has(
    overrides: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wide = [f"run_dir={tmp_path}", "model.vocab_size=2048", "training.total_tokens=256"]
    assert train(["configs/quickstart.yaml", *overrides, *wide]) == 0
    assert generate([str(tmp_path), "--temperature", "9", "--top-k", "2048"]) == 0
    assert capsys.readouterr().out
