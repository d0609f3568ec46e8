"""MLflow tracking: parameters, metrics by token count, the configuration and the loss curve."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hope.model import num_parameters
from train.callbacks.base import Callback
from train.callbacks.metrics import LOSS_CURVE
from train.config import ConfigError, MLflowConfig, flatten
from train.run_folder import CONFIG, MLFLOW_RUN_ID, PLOTS

if TYPE_CHECKING:
    from train.evaluate.perplexity import HeldOut
    from train.optim.cadence import StepReport
    from train.trainer import SkippedStep, StepRecord, Trainer


class MLflow(Callback):
    """Logs asynchronously to the given URI, to MLFLOW_TRACKING_URI, or to SQLite beside the runs.

    A resumed run goes on in the same MLflow run. Raises ConfigError when mlflow is not installed.
    """

    def __init__(self, config: MLflowConfig, run_dir: Path) -> None:
        try:
            import mlflow
        except ImportError:
            raise ConfigError(
                "mlflow is not installed: pip install mlflow, or set mlflow.enabled=false"
            ) from None
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        self._mlflow = mlflow
        self.every_steps = config.every_steps
        self.run_dir = run_dir
        self.uri, self.artifacts = tracking_location(config, run_dir)
        self.experiment = config.experiment

    def on_start(self, trainer: Trainer) -> None:
        mlflow = self._mlflow
        with self._alone():
            mlflow.set_tracking_uri(self.uri)
            if mlflow.get_experiment_by_name(self.experiment) is None:
                location = self.artifacts.as_uri() if self.artifacts else None
                mlflow.create_experiment(self.experiment, artifact_location=location)
            mlflow.set_experiment(self.experiment)
        id_file = self.run_dir / MLFLOW_RUN_ID
        run_id = id_file.read_text().strip() if id_file.exists() else None
        run = mlflow.start_run(run_id=run_id, run_name=None if run_id else self.run_dir.name)
        if run_id is None:
            id_file.write_text(run.info.run_id)
            flat = flatten(trainer.config.model_dump(mode="json"))
            mlflow.log_params({key: str(value)[:500] for key, value in flat.items()})
            mlflow.log_param("num_parameters", num_parameters(trainer.config.model))
            mlflow.log_artifact(str(self.run_dir / CONFIG))

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

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step % self.every_steps:
            return
        values = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/tokens_per_second": record.tokens_per_second,
        }
        values |= {f"lr/{name}": rate for name, rate in record.learning_rates.items()}
        values |= {f"grad_norm/{name}": norm for name, norm in record.level_norms.items()}
        values |= {f"firings/{name}": float(n) for name, n in trainer.clock.firings.items()}
        self._log(values, record.tokens)

    def on_skip(self, trainer: Trainer, record: SkippedStep) -> None:
        self._log({"train/skipped_tokens": float(trainer.clock.skipped_tokens)}, record.tokens)

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
        curve = self.run_dir / PLOTS / LOSS_CURVE
        if curve.exists():
            self._mlflow.log_artifact(str(curve), artifact_path=PLOTS)

    def on_end(self, trainer: Trainer) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run("FINISHED" if trainer.finished else "KILLED")

    def _log(self, values: dict[str, float], tokens: int) -> None:
        self._mlflow.log_metrics(values, step=tokens, synchronous=False)


def tracking_location(config: MLflowConfig, run_dir: Path) -> tuple[str, Path | None]:
    """(tracking URI, artifact folder for the embedded store or None when a server decides)."""
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri, None
    beside = run_dir.resolve().parent
    return f"sqlite:///{beside / 'mlflow.db'}", beside / "mlflow-artifacts"
