"""Open a finished or stopped run for use: its configuration and its trained model."""

from __future__ import annotations

from pathlib import Path

from hope import HopeModel
from train.checkpoint.store import CheckpointError, CheckpointStore, load_parameters
from train.config import RunConfig, load_config
from train.parallel.data_parallel import DataParallel
from train.run_folder import CHECKPOINTS, CONFIG


def load_run(run_dir: Path) -> tuple[RunConfig, HopeModel]:
    """The resolved configuration of a run and its model at the newest checkpoint that verifies.

    Raises CheckpointError when the folder holds no run or no usable checkpoint.
    """
    if not (run_dir / CONFIG).exists():
        raise CheckpointError(f"{run_dir} holds no run ({CONFIG} is missing)")
    config = load_config(run_dir / CONFIG)
    store = CheckpointStore(run_dir / CHECKPOINTS, DataParallel(), config.checkpoint.keep_last)
    model = HopeModel(config.model)
    load_parameters(model, store.tensors(store.newest(), "model/"))
    return config, model
