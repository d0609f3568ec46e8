"""MLflow: its embedded store, and that no server's state is ever felt by a run, or secret in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.train.tracking_server import tracking_server
from train.callbacks.mlflow import check_tracking, tracking_location
from train.callbacks.mlflow_sender import Backlog, Sender
from train.config import ConfigError, MLflowConfig
from train.run import train


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("htp://me:hunter2-s3cr3t@server", r"=htp://\*\*\*@server: MLflow has no htp:// store"),
        ("s3://bucket/runs", "MLflow has no s3:// store; it has databricks, http, https, mssql"),
        ("uc:there", "MLflow has no uc:// store"),
        ("runs/mlruns", "=runs/mlruns: MLflow no longer writes to folders; name a database"),
        ("file:///runs/mlruns", "MLflow no longer writes to folders"),
    ],
)
@pytest.mark.parametrize("key", ["mlflow.tracking_uri", "MLFLOW_TRACKING_URI"])
def test_a_store_that_can_never_be_is_refused_at_once(
    make_config, monkeypatch: pytest.MonkeyPatch, uri: str, reason: str, key: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    own = uri if key == "mlflow.tracking_uri" else None
    config = make_config(mlflow={"tracking_uri": own})
    with pytest.raises(ConfigError, match=f"^{key}.*{reason}"):
        train(config, resume=False)
    assert not config.run_dir.exists()


@pytest.mark.parametrize(
    "uri",
    ["", "sqlite:///a.db", "mysql+pymysql://h/db", "https://h/x", "databricks", "databricks://me"],
)
def test_stores_that_may_be_there_later(uri: str, tmp_path: Path) -> None:
    check_tracking(MLflowConfig(tracking_uri=uri), tmp_path)


def test_folders_and_plugins_where_mlflow_takes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_tracking(MLflowConfig(tracking_uri="./mlruns"), tmp_path)
    plugin = EntryPoint("redis", "somewhere:Store", "mlflow.tracking_store")
    monkeypatch.setattr("train.callbacks.mlflow.entry_points", lambda group: [plugin])
    check_tracking(MLflowConfig(tracking_uri="redis://h"), tmp_path)


def test_without_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("train.callbacks.mlflow.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="mlflow is not installed: pip install mlflow, or set"):
        check_tracking(MLflowConfig(), tmp_path)


SECRET = "hunter2-s3cr3t"
QUICK = {"model.mixer": "attention", "training.total_tokens": 4 * 256}


def test_a_server_that_is_down_stops_nothing_and_gets_everything_later(
    make_config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow keeps files with a store of one's own
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        uri = f"http://me:{SECRET}@127.0.0.1:{nobody.getsockname()[1]}"
        settings = {"every_steps": 1, "tracking_uri": uri, "experiment": "e"}
        config = make_config(**QUICK, mlflow={**settings, "flush_s": 30.0})
        assert train(config, resume=False) == 0
    told = capsys.readouterr().err
    assert "training goes on, sending later" in told
    assert "has not taken" in told
    assert SECRET not in told
    backlog = config.run_dir / "mlflow_backlog.jsonl"
    assert SECRET not in backlog.read_text()
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = make_config(mlflow={**settings, "tracking_uri": store})
    assert train(config, resume=True) == 0  # done already: what was kept is sent
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    run_id = (config.run_dir / "mlflow_run_id").read_text()
    steps = [point.step for point in client.get_metric_history(run_id, "train/loss")]
    assert steps == [256, 512, 768, 1024]
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["training.batch_tokens"] == "256"
    assert "***" in found.data.params["mlflow.tracking_uri"]
    assert int((config.run_dir / "mlflow_sent").read_text()) == backlog.stat().st_size
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    mine = (config.run_dir / "config.yaml").read_bytes()
    assert not any(SECRET.encode() in content for content in everything if content != mine)


def test_a_domain_of_any_name_reaches_mlflow_and_so_does_what_follows(
    make_config, corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    held_out, store = str(corpora["validation"]), f"sqlite:///{tmp_path / 'mlflow.db'}"
    source = {"path": held_out, "validation": held_out, "name": "c++ (new)", "tokens": 512}
    stream = {"mode": "continual", "data.order": "stream", "training.state_carry": "stream"}
    config = make_config(
        **{**QUICK, **stream, "data.train": [source], "training.total_tokens": 0},
        mlflow={"every_steps": 1, "tracking_uri": store, "flush_s": 30.0},
    )
    assert train(config, resume=False) == 0
    from mlflow.tracking import MlflowClient

    found = MlflowClient(store).get_run((config.run_dir / "mlflow_run_id").read_text())
    assert "validation/c__ _new_/loss" in found.data.metrics
    assert found.info.status == "FINISHED"


@pytest.mark.parametrize("broken", ["metrics", "artifacts", "artifact server"])
def test_what_mlflow_refuses_does_not_keep_back_what_follows(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    from mlflow.tracking import MlflowClient

    def failing(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("/mlruns") if broken == "artifacts" else RuntimeError("status 500")

    if broken != "metrics":
        monkeypatch.setattr(MlflowClient, "log_text", failing)
    monkeypatch.setattr("train.callbacks.mlflow_sender.FIRST_RETRY_S", 0.01)
    backlog, store = Backlog(tmp_path), f"sqlite:///{tmp_path / 'mlflow.db'}"
    name = "x+y" if broken == "metrics" else "x"
    backlog.add({"metrics": {name: 1.0}, "step": 1, "time": 1})
    backlog.add({"metrics": {"x": 2.0}, "step": 2, "time": 2})
    backlog.add({"text": "words", "name": "config.yaml"})
    backlog.add({"metrics": {"x": 3.0}, "step": 3, "time": 3})
    backlog.add({"status": "FINISHED"})
    sender = Sender(backlog, store, tmp_path / "artifacts", "e", tmp_path)
    sender.start()
    deadline = time.monotonic() + 60
    while backlog.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sender.finish(30) == 0
    run = MlflowClient(store).get_run((tmp_path / "mlflow_run_id").read_text())
    assert run.data.metrics["x"] == 3.0
    assert run.info.status == "FINISHED"
    refused = "metrics" if broken == "metrics" else "config.yaml"
    assert capsys.readouterr().err.count(f"MLflow refuses {refused}, left out: ") == 1


@pytest.mark.parametrize("broken", ["artifacts", "metrics, once"])
def test_a_run_that_ends_at_once_has_every_metric_in_mlflow_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """While its server takes no files, or has a bad moment, and answers."""
    monkeypatch.setattr("train.callbacks.mlflow_sender.FIRST_RETRY_S", 0.01)
    calls: list[str] = []

    def fault(call: str) -> int | None:
        calls.append(call)
        once = calls.count("runs/log-batch") == 1 and call == "runs/log-batch"
        return 500 if ("artifacts/" in call if broken == "artifacts" else once) else None

    with tracking_server() as server:
        server.fault = fault
        backlog = Backlog(tmp_path)
        sender = Sender(backlog, f"http://{server.address}", None, "e", tmp_path)
        backlog.add({"metrics": {"x": 0.0}, "step": 0, "time": 1})
        backlog.add({"text": "words", "name": "config.yaml"})
        for step in range(1, 1200):
            backlog.add({"metrics": {"x": 0.5}, "step": step, "time": 1})
        backlog.add({"status": "FINISHED"})
        sender.start()
        assert sender.finish(30) == 0
        (run,) = server.runs.values()
    assert run["info"]["status"] == "FINISHED"
    assert [metric["step"] for metric in run["metrics"]] == list(range(1200))
    assert calls.count("runs/log-batch") <= 5


@pytest.mark.parametrize("gone", ["emptied", "deleted", "while it runs"])
def test_in_place_of_a_run_that_is_gone_a_new_one_gets_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: str
) -> None:
    backlog = Backlog(tmp_path)
    with tracking_server() as server:
        for start in (0, 2):
            sender = Sender(backlog, f"http://{server.address}", None, "e", tmp_path)
            backlog.add({"params": {"lr": "1"}} if start == 0 else {"status": "RUNNING"})
            sender.start()
            for step in range(start, start + 2):
                backlog.add({"metrics": {"x": 0.5}, "step": step, "time": 1})
                deadline = time.monotonic() + 30
                while backlog.left() and time.monotonic() < deadline:
                    time.sleep(0.01)
                if gone == "while it runs" and start == 0 == step:
                    server.runs.clear()
            backlog.add({"status": "FINISHED"})
            assert sender.finish(30) == 0
            if gone == "deleted" and start == 0:
                server.runs["run0"]["info"]["lifecycle_stage"] = "deleted"
            elif gone == "emptied" and start == 0:
                server.runs = {"another": server.runs["run0"]}
        run = list(server.runs.values())[-1]
    assert run["info"]["run_id"] == (tmp_path / "mlflow_run_id").read_text()
    assert run["info"]["status"] == "FINISHED"
    assert [metric["step"] for metric in run["metrics"]] == list(range(4))
    assert run["params"] == [{"key": "lr", "value": "1"}]
    assert capsys.readouterr().err.count("a new run gets everything") == 1


def test_nothing_is_printed_of_a_server_that_takes_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """MLflow's client prints where the run is, with user and password of the URI."""
    with tracking_server() as server:
        backlog = Backlog(tmp_path)
        sender = Sender(backlog, f"http://me:{SECRET}@{server.address}", None, "e", tmp_path)
        backlog.add({"status": "FINISHED"})
        sender.start()
        assert sender.finish(30) == 0
        assert [run["info"]["status"] for run in server.runs.values()] == ["FINISHED"]
    assert capfd.readouterr() == ("", "")


def test_a_server_that_never_answers_takes_no_time(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        backlog = Backlog(tmp_path)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        sender = Sender(backlog, uri, None, "e", tmp_path)
        sender.start()
        started = time.monotonic()
        for step in range(1000):
            backlog.add({"metrics": {"x": 1.0}, "step": step, "time": 0})
        assert time.monotonic() - started < 5  # 5 ms each would be slow
        assert sender.finish(0.5) == 1000
    assert sender.finish(30) == 1000  # its thread ends here, not in another test


def test_a_run_whose_making_is_not_answered_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, str]] = []
    taken: list[str] = []

    class Client:
        def __init__(self, tracking_uri: str) -> None: ...

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id="1")

        def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
            made.append(tags)
            raise TimeoutError("read timed out")

        def search_runs(self, experiments: list[str], wanted: str, max_results: int) -> Any:
            found = [n for n, t in enumerate(made) if all(value in wanted for value in t.values())]
            return [SimpleNamespace(info=SimpleNamespace(run_id=f"run {n}")) for n in found]

        def log_batch(self, run_id: str, metrics: Any) -> None:
            taken.append(run_id)

    monkeypatch.setattr("mlflow.tracking.MlflowClient", Client)
    monkeypatch.setattr("train.callbacks.mlflow_sender.FIRST_RETRY_S", 0.01)
    backlog = Backlog(tmp_path)
    backlog.add({"metrics": {"x": 1.0}, "step": 1, "time": 1})
    sender = Sender(backlog, "http://slow", None, "e", tmp_path)
    sender.start()
    deadline = time.monotonic() + 60
    while backlog.left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sender.finish(30) == 0
    assert (len(made), taken) == (1, ["run 0"])


def test_a_backlog_goes_on_after_half_a_line(tmp_path: Path) -> None:
    backlog = Backlog(tmp_path)
    assert backlog.is_new
    assert backlog.next() == ([], 0)
    for step in range(3):
        backlog.add({"metrics": {}, "step": step})
    backlog.add({"status": "FINISHED"})
    records, sent = backlog.next()
    assert [record["step"] for record in records] == [0, 1, 2]
    backlog.mark(sent)
    backlog.mark(backlog.next()[1])
    backlog.add({"metrics": {}, "step": 3})
    with backlog.path.open("a") as file:
        file.write(json.dumps({"metrics": {}, "step": 4})[:-2])
    again = Backlog(tmp_path)
    assert not again.is_new
    assert again.left() == 1
    again.add({"metrics": {}, "step": 5})
    assert [record["step"] for record in again.next()[0]] == [3, 5]
    again.path.unlink()  # by hand; what is written from now on is another file
    anew = Backlog(tmp_path)
    anew.add({"metrics": {}, "step": 6})
    assert [record["step"] for record in anew.next()[0]] == [6]
