"""A stand-in for MLflow's tracking server: the calls that a run makes, and faults on purpose."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlparse


class TrackingServer(ThreadingHTTPServer):
    """runs: by id, {"info", "metrics", "params"}; fault: the status to give to a call, or None."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.fault: Callable[[str], int | None] = lambda call: None
        self.address = f"127.0.0.1:{self.server_address[1]}"

    def answer(self, call: str, said: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """What MLflow says to a call, and its status."""
        if call == "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1", "artifact_location": "x"}}, 200
        if call == "runs/create":
            info = {"run_id": f"run{len(self.runs)}", "experiment_id": "1", "status": "RUNNING"}
            info |= {"artifact_uri": "mlflow-artifacts:/1", "lifecycle_stage": "active"}
            self.runs[info["run_id"]] = {"info": info, "metrics": [], "params": []}
            return {"run": {"info": info}}, 200
        if not call.startswith("runs/"):
            return {}, 200
        run = self.runs.get(said["run_id"])
        if run is None:
            return {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}, 404
        if call == "runs/get":
            return {"run": {"info": run["info"]}}, 200
        if run["info"]["lifecycle_stage"] == "deleted":
            return {
                "error_code": "INVALID_PARAMETER_VALUE",
                "message": "not in the 'active' state",
            }, 400
        run["info"]["status"] = said.get("status", run["info"]["status"])
        for kind in ("metrics", "params"):
            run[kind] += said.get(kind, [])
        return {}, 200


class _Handler(BaseHTTPRequestHandler):
    server: TrackingServer

    def _call(self) -> None:
        url = urlparse(self.path)
        call = url.path.rpartition("/mlflow/")[2]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = self.server.fault(call)
        if status is None:
            said = json.loads(body) if body[:1] == b"{" else dict(parse_qsl(url.query))
            answer, status = self.server.answer(call, said)
        else:
            answer = {}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _call  # noqa: N815 (the names that http.server asks for)

    def log_message(self, *told: Any) -> None:
        """Nothing."""


@contextmanager
def tracking_server() -> Iterator[TrackingServer]:
    """A server that listens on a port of its own until the end."""
    with TrackingServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            yield server
        finally:
            server.shutdown()
