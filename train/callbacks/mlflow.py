"""MLflow tracking: parameters, metrics by token count, the configuration and the loss curve.

The training thread only appends to a file in the run folder; a thread of its own sends what is
there (`train.callbacks.mlflow_sender`). So a server that is slow or down costs nothing, and what it
missed is sent later in the run, or when the run is resumed.
"""

from __future__ import annotations

import os
import re
import time
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from data_pipeline.redaction import redact
from hope.model import num_parameters
from train.callbacks.base import Callback
from train.callbacks.metrics import LOSS_CURVE
from train.callbacks.mlflow_sender import Backlog, Sender
from train.config import ConfigError, MLflowConfig, dump_config, flatten
from train.line_file import tell
from train.run_files import PLOTS

if TYPE_CHECKING:
    from train.evaluate.perplexity import HeldOut
    from train.optim.cadence import StepReport
    from train.records import SkippedStep, StepRecord
    from train.spikes import Rollback
    from train.trainer import Trainer

REDACTED_CONFIG = "config.yaml"
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")
"""What MLflow refuses in the name of a metric, and with it all that is sent after it."""
KINDS = {"databricks", "http", "https", "mssql", "mysql", "postgresql", "sqlite"}
"""Of stores that take runs, by the scheme of their URI, beside folders."""
AFTER_A_SIGNAL_S = 5.0  # launchers kill 30 s after SIGTERM


class MLflow(Callback):
    """Logs to the given URI, to MLFLOW_TRACKING_URI, or to SQLite beside the runs.

    A resumed run goes on in the same MLflow run. What can never work has been refused by
    `check_tracking`; a server that does not answer gets everything later.
    """

    def __init__(self, config: MLflowConfig, run_dir: Path) -> None:
        import mlflow  # noqa: F401  (takes seconds: not in a thread beside the first steps)

        self.config, self.run_dir = config, run_dir
        uri, artifacts = tracking_location(config, run_dir)
        self.backlog = Backlog(run_dir)
        self.sender = Sender(self.backlog, uri, artifacts, config.experiment, run_dir)

    def on_start(self, trainer: Trainer) -> None:
        if self.backlog.is_new:
            flat = flatten(trainer.config.model_dump(mode="json"))
            parameters = {key: redact(str(value))[:500] for key, value in flat.items()}
            size = num_parameters(trainer.config.model)
            self.backlog.add({"params": {**parameters, "num_parameters": str(size)}})
            text = redact(dump_config(trainer.config))
            self.backlog.add({"text": text, "name": REDACTED_CONFIG})
        self.backlog.add({"status": "RUNNING"})
        self.sender.start()

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step % self.config.every_steps:
            return
        values = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/tokens_per_second": record.tokens_per_second,
            "train/data_seconds": record.data_seconds,
            "train/tflops_per_rank": record.tflops_per_rank,
            "train/peak_memory_gib": record.peak_memory / 2**30,
        }
        if record.mfu is not None:
            values["train/mfu"] = record.mfu
        values |= {f"lr/{name}": rate for name, rate in record.learning_rates.items()}
        values |= {f"grad_norm/{name}": norm for name, norm in record.level_norms.items()}
        values |= {f"firings/{name}": float(n) for name, n in trainer.clock.firings.items()}
        self._log(values, record.tokens)

    def on_skip(self, trainer: Trainer, record: SkippedStep) -> None:
        self._log({"train/skipped_tokens": float(trainer.clock.skipped_tokens)}, record.tokens)

    def on_rollback(self, trainer: Trainer, rollback: Rollback) -> None:
        self._log({"train/rollbacks": float(rollback.number)}, rollback.from_tokens)

    def on_flush(self, trainer: Trainer, pending: dict[str, int], report: StepReport) -> None:
        values = {f"flush/pending_tokens/{name}": float(n) for name, n in pending.items() if n}
        values |= {f"flush/grad_norm/{name}": n for name, n in report.level_norms.items()}
        self._log(values, trainer.clock.tokens)

    def on_evaluation(self, trainer: Trainer, held_out: HeldOut) -> None:
        values = {
            "validation/loss": held_out.loss,
            "validation/perplexity": held_out.perplexity,
            "validation/bits_per_byte": held_out.bits_per_byte,
        }
        self._log(values, trainer.clock.tokens)

    def on_domain_evaluation(self, trainer: Trainer, domain: str, held_out: HeldOut) -> None:
        values = {
            f"validation/{domain}/loss": held_out.loss,
            f"validation/{domain}/bits_per_byte": held_out.bits_per_byte,
        }
        self._log(values, trainer.clock.tokens)

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        self._send_curve()

    def _send_curve(self) -> None:
        if (self.run_dir / PLOTS / LOSS_CURVE).exists():
            self.backlog.add({"file": f"{PLOTS}/{LOSS_CURVE}", "folder": PLOTS})

    def on_end(self, trainer: Trainer) -> None:
        self._send_curve()
        self.backlog.add({"status": "FINISHED" if trainer.finished else "KILLED"})
        stopped = trainer.stop_status is not None
        left = self.sender.finish(AFTER_A_SIGNAL_S if stopped else self.config.flush_s)
        if left:
            tell(
                f"MLflow has not taken {left} records ({self.sender.trouble or 'slow'}); they are "
                f"kept in {self.backlog.path} and sent when the run is resumed"
            )

    def _log(self, values: dict[str, float], tokens: int) -> None:
        values = {_NOT_IN_NAMES.sub("_", name): value for name, value in values.items()}
        self.backlog.add({"metrics": values, "step": tokens, "time": int(time.time() * 1000)})


def check_tracking(config: MLflowConfig, run_dir: Path) -> None:
    """Raise ConfigError where mlflow is not installed, or its tracking URI is of no kind that it
    knows, of itself or by a plugin: no server will ever take what is kept for it."""
    if find_spec("mlflow") is None:
        raise ConfigError(
            "mlflow is not installed: pip install mlflow, or set mlflow.enabled=false"
        )
    uri, _ = tracking_location(config, run_dir)
    kind = uri if uri == "databricks" else urlsplit(uri).scheme.partition("+")[0]
    plugins = {one.name for one in entry_points(group="mlflow.tracking_store")}
    key = "mlflow.tracking_uri" if config.tracking_uri else "MLFLOW_TRACKING_URI"
    if kind in ("", "file") and "file" not in plugins:
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
            raise ConfigError(
                f"{key}={redact(uri)}: MLflow no longer writes to folders; name a database, such "
                "as sqlite:///runs/mlflow.db, or set MLFLOW_ALLOW_FILE_STORE=true"
            )
    elif kind not in plugins | KINDS:
        raise ConfigError(
            f"{key}={redact(uri)}: MLflow has no {kind}:// store; it has "
            f"{', '.join(sorted(plugins | KINDS))}"
        )


def tracking_location(config: MLflowConfig, run_dir: Path) -> tuple[str, Path | None]:
    """(tracking URI, artifact folder for the embedded store or None when a server decides)."""
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri, None
    beside = run_dir.resolve().parent
    return f"sqlite:///{beside / 'mlflow.db'}", beside / "mlflow-artifacts"
