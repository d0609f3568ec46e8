"""What is to be sent to MLflow, as a file; and the thread that sends it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from data_pipeline.redaction import redact
from train.line_file import LineFile, tell, write_whole
from train.run_files import MLFLOW_BACKLOG, MLFLOW_RUN_ID, MLFLOW_SENT

AT_ONCE = 500  # of one request; MLflow takes 1000 metrics
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
ARTIFACT_TRIES = 3
ATTEMPT = "hope.attempt"
"""The tag by which a run is found whose making was not answered."""
ARTIFACTS = {"text", "file"}  # kinds of records that go where MLflow stores files
NOT_FROM_HERE = (ImportError, PermissionError, FileNotFoundError, NotADirectoryError)


class RunGoneError(Exception):
    """MLflow has no such run, or has it among what was deleted."""


class Backlog:
    """mlflow_backlog.jsonl in the run folder: one record a line; `mlflow_sent` counts its bytes
    that MLflow has. Memory holds none of it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / MLFLOW_BACKLOG
        self._sent_path = run_dir / MLFLOW_SENT
        self.sent = int(self._sent_path.read_text()) if self._sent_path.exists() else 0
        self.is_new = not self.path.exists()
        self.added = threading.Event()
        self._lines = LineFile(self.path)
        self._cut_half_a_line()

    def _cut_half_a_line(self) -> None:
        """Of a process that died while it wrote; of a backlog that is gone MLflow has nothing."""
        whole = 0
        if self.path.exists():
            whole = self.path.read_bytes().rfind(b"\n") + 1
            os.truncate(self.path, whole)
        self.sent = min(self.sent, whole)

    def add(self, record: dict[str, Any]) -> None:
        """Append; microseconds, whatever MLflow does."""
        self._lines.add(json.dumps(record))
        self.added.set()

    def next(self) -> tuple[list[dict[str, Any]], int]:
        """The oldest records not yet sent, metrics that follow one another or one of another kind,
        and `sent` once they are."""
        records: list[dict[str, Any]] = []
        sent = self.sent
        if not self.path.exists():
            return records, sent
        with self.path.open("rb") as file:
            file.seek(sent)
            for line in file:
                if len(records) == AT_ONCE or not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                if records and not ("metrics" in record and "metrics" in records[-1]):
                    break
                records.append(record)
                sent += len(line)
        return records, sent

    def mark(self, sent: int) -> None:
        """MLflow has everything before this byte."""
        write_whole(self._sent_path, str(sent))
        self.sent = sent

    def left(self) -> int:
        """Records not yet sent."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            file.seek(self.sent)
            return sum(1 for _ in file)


class Sender:
    """A daemon thread that empties a backlog into one MLflow run, for as long as that takes.

    A record that MLflow will never take is left out with one line, and does not keep back what
    follows: one that it calls wrong, and an artifact that can't be stored although it answers. In
    place of a run that it does not have (deleted, another server) a new one gets everything.

    trouble: the last error, without secrets; "" when the last request went well.
    """

    def __init__(
        self, backlog: Backlog, uri: str, artifacts: Path | None, experiment: str, run_dir: Path
    ) -> None:
        self.backlog, self.uri, self.artifacts = backlog, uri, artifacts
        self.experiment, self.run_dir = experiment, run_dir
        self.trouble = ""
        self._ending = threading.Event()
        self._done = threading.Event()
        self._client: Any = None
        self._run_id = ""
        self._attempt = ""  # to make a run
        self._tries = 0  # of the artifact that is next
        self._anew = False  # whether a run that is gone was made again
        self._refused: set[str] = set()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)

    def start(self) -> None:
        if not self._thread.is_alive() and not self._ending.is_set():
            self._thread.start()

    def finish(self, seconds: float) -> int:
        """Send the rest for at most so long, while MLflow answers; returns how many are left."""
        self._ending.set()
        self.backlog.added.set()
        self._done.wait(seconds)
        return self.backlog.left()

    def _send_all(self) -> None:
        # MLflow would try for minutes by itself, and make a run in each try; here it is the backlog
        # that waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        # It would print the run's address, with user and password of the URI.
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        wait = FIRST_RETRY_S
        while True:
            self.backlog.added.clear()
            ending = self._ending.is_set()
            try:
                while self._send_some():
                    self.trouble, wait = "", FIRST_RETRY_S
            except Exception as error:
                self._tell(error)
                if not ending:
                    self._ending.wait(wait)
                    wait = min(2 * wait, LAST_RETRY_S)
                elif self._has_the_run() is not None:
                    time.sleep(FIRST_RETRY_S)
                else:
                    break
                continue
            if ending:
                break
            self.backlog.added.wait()
        self._done.set()

    def _tell(self, error: Exception) -> None:
        """One line when the trouble begins."""
        if not self.trouble:
            tell(f"MLflow: {_line(error)}; training goes on, sending later")
        self.trouble = type(error).__name__

    def _send_some(self) -> bool:
        """Send the next records; False when there are none."""
        records, sent = self.backlog.next()
        if not records:
            return False
        if not self._run_id:
            self._open()
        try:
            self._send_or_leave_out(records)
        except RunGoneError:
            self._begin_anew()
            return True
        self._tries = 0
        self.backlog.mark(sent)
        return True

    def _send_or_leave_out(self, records: list[dict[str, Any]]) -> None:
        """Send records, one by one if need be; tell of one that will never be taken, once for each
        kind."""
        try:
            self._send(records)
        except Exception as error:
            there = self._has_the_run()
            if there is False and not self._anew:
                raise RunGoneError from None
            if not there or not self._is_hopeless(error, records[0]):
                raise
            if len(records) > 1:
                for record in records:
                    self._send_or_leave_out([record])
                return
            kind = next(iter(records[0]))
            if kind not in self._refused:
                self._refused.add(kind)
                what = records[0].get("name") or records[0].get("file") or kind
                tell(f"MLflow refuses {what}, left out: {_line(error)}")

    def _is_hopeless(self, error: Exception, record: dict[str, Any]) -> bool:
        """Whether MLflow, which answers, will never take what it has not."""
        if not ARTIFACTS.isdisjoint(record):
            self._tries += 1
            if self._tries >= ARTIFACT_TRIES or isinstance(error, NOT_FROM_HERE):
                return True
        return _is_wrong(error)

    def _has_the_run(self) -> bool | None:
        """What MLflow answers when it is asked for the run; None where it does not."""
        try:
            stage = self._client.get_run(self._run_id).info.lifecycle_stage
        except Exception as error:
            return False if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST" else None
        return bool(stage != "deleted")

    def _begin_anew(self) -> None:
        """Send everything to a new run, in place of one that MLflow has no more. Once: behind
        several servers that know nothing of each other runs would be made without end."""
        tell(f"MLflow has no run {self._run_id} (any more): a new run gets everything of this one")
        self.backlog.mark(0)
        (self.run_dir / MLFLOW_RUN_ID).unlink(missing_ok=True)
        self._run_id, self._attempt, self._anew = "", "", True

    def _send(self, records: list[dict[str, Any]]) -> None:
        """Send metrics, or one record of another kind."""
        from mlflow.entities import Metric, Param

        client, run_id, record = self._client, self._run_id, records[0]
        if "metrics" in record:
            metrics = [
                Metric(name, value, one["time"], one["step"])
                for one in records
                for name, value in one["metrics"].items()
            ]
            for start in range(0, len(metrics), AT_ONCE):
                client.log_batch(run_id, metrics=metrics[start : start + AT_ONCE])
        elif "params" in record:
            parameters = [Param(key, value) for key, value in record["params"].items()]
            for start in range(0, len(parameters), 100):
                client.log_batch(run_id, params=parameters[start : start + 100])
        elif "text" in record:
            client.log_text(run_id, record["text"], record["name"])
        elif "file" in record and (self.run_dir / record["file"]).exists():
            client.log_artifact(run_id, str(self.run_dir / record["file"]), record["folder"])
        elif "status" in record:
            self._set_status(record["status"])

    def _set_status(self, status: str) -> None:
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status=status)

    def _open(self) -> None:
        """Find or make the experiment and the run."""
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        with self._alone():
            client = MlflowClient(tracking_uri=self.uri)
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is not None:
                experiment_id = experiment.experiment_id
            else:
                location = self.artifacts.as_uri() if self.artifacts else None
                experiment_id = client.create_experiment(self.experiment, location)
        self._client = client
        id_file = self.run_dir / MLFLOW_RUN_ID
        if id_file.exists():
            self._run_id = id_file.read_text().strip()
        else:
            self._run_id = self._make_run(experiment_id)
            write_whole(id_file, self._run_id)

    def _make_run(self, experiment_id: str) -> str:
        """The id of a new run, of the one made before where only the answer was lost."""
        if self._attempt:
            wanted = f"tags.`{ATTEMPT}` = '{self._attempt}'"
            if found := self._client.search_runs([experiment_id], wanted, max_results=1):
                return str(found[0].info.run_id)
        self._attempt = self._attempt or uuid4().hex
        tags = {ATTEMPT: self._attempt}
        run = self._client.create_run(experiment_id, run_name=self.run_dir.name, tags=tags)
        return str(run.info.run_id)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Runs that start together must not create the embedded store twice."""
        if self.artifacts is None:
            yield
            return
        self.artifacts.mkdir(parents=True, exist_ok=True)
        with (self.artifacts / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_wrong(error: Exception) -> bool:
    """Whether MLflow says that what it was sent can't be right; else it may take it later."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.get_http_status_code() == 400


def _line(error: Exception) -> str:
    return " ".join(redact(str(error)).split())[:300]
