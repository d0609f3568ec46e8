"""Open a finished or stopped run for use: its configuration and its trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline import Corpus, Tokenizer
from data_pipeline.redaction import HIDDEN
from hope import HopeConfig, HopeModel
from hope.stacking import stack_levels
from train.checkpoint.manifest import MARKER, damage
from train.checkpoint.reading import TensorReader, read_plain
from train.checkpoint.store import CheckpointError, CheckpointStore, load_parameters
from train.config import ConfigError, InitFromConfig, RunConfig, load_config, validate_config
from train.parallel.ranks import Ranks
from train.redaction import revealed
from train.run_files import CHECKPOINTS, CONFIG

TRIES = 8
"""To read the newest checkpoint of a run that is writing, and deletes it meanwhile."""


def load_run(path: Path) -> tuple[RunConfig, HopeModel]:
    """The resolved configuration of a run and its model.

    path: a run folder, for its newest checkpoint that verifies, or one checkpoint in it. Raises
    CheckpointError when there is no run or no usable checkpoint.
    """
    config, tensors, _ = _open_run(path)
    return config, _model(config, tensors)


def load_run_and_corpus(path: Path, data: str | None = None) -> tuple[RunConfig, HopeModel, Corpus]:
    """What `load_run` gives, and a corpus of the tokens that the model's ids are of.

    data: where its shards are, a folder or URL; None: the run's validation data. Raises also
    DataError where it can't be opened, and CheckpointError where it is of another tokenizer.
    """
    config, tensors, plain = _open_run(path)
    data = data or config.data.validation
    corpus = Corpus.open(**config.data.where(data))
    if plain.get("tokenizer", corpus.tokenizer_sha256) != corpus.tokenizer_sha256:
        raise CheckpointError(
            f"{path} was trained with another tokenizer than that of {data}: "
            "tokenize that data with the run's own again"
        )
    return config, _model(config, tensors), corpus


def load_run_and_tokenizer(path: Path) -> tuple[RunConfig, HopeModel, Tokenizer]:
    """What `load_run` gives, and the tokenizer of the run's validation data; raises as
    `load_run_and_corpus` does."""
    config, model, corpus = load_run_and_corpus(path)
    return config, model, corpus.tokenizer


def _model(config: RunConfig, tensors: dict[str, Tensor]) -> HopeModel:
    model = HopeModel(config.model, seed=None)
    load_parameters(dict(model.named_parameters()), tensors)
    return model


def initial_parameters(
    init_from: InitFromConfig, model: HopeConfig, seed: int, tokenizer: str
) -> dict[str, Tensor]:
    """Parameters of `model` by name: another run's weights, its MLPs as CMS levels.

    The mathematics is `hope.stacking`. tokenizer: SHA-256 of the tokenizer of this run's data.
    Raises CheckpointError when there is no such run, ConfigError where the two do not fit.
    """
    source, tensors, plain = _open_run(init_from.path)
    if plain.get("tokenizer", tokenizer) != tokenizer:
        raise ConfigError(
            f"init_from.path={init_from.path}: it was trained with another tokenizer than that of "
            "data.validation; tokenize the data with its own"
        )
    pretrained = {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}
    try:
        return stack_levels(pretrained, source.model, model, init_from.levels, seed)
    except ValueError as error:
        raise ConfigError(f"init_from.path={init_from.path}: {error}") from None


def _open_run(path: Path) -> tuple[RunConfig, dict[str, Tensor], dict[str, Any]]:
    """Configuration, `model/NAME` tensors and plain data of a run folder or one checkpoint.

    The configuration is the one that the checkpoint holds: its model has these tensors. It has no
    secrets; those are taken from the run folder's own, where it is there.
    """
    if (path / MARKER).exists():
        if reason := damage(path):
            raise CheckpointError(f"{path}: {reason}")
        return _open_checkpoint(path, path.parent.parent)
    if not (path / CONFIG).exists():
        raise CheckpointError(f"{path} holds no run ({CONFIG} is missing)")
    config = load_config(path / CONFIG)
    store = CheckpointStore(config.checkpoint.url or path / CHECKPOINTS, Ranks.alone())
    for _ in range(TRIES - 1):
        there = store.complete()
        try:
            return _open_checkpoint(store.newest(), path)
        except CheckpointError:
            if store.complete() == there:
                raise
    return _open_checkpoint(store.newest(), path)


def _open_checkpoint(
    checkpoint: Any, run_dir: Path
) -> tuple[RunConfig, dict[str, Tensor], dict[str, Any]]:
    plain = read_plain(checkpoint)
    if not isinstance(plain.get("config"), dict):
        raise CheckpointError(f"{checkpoint} holds no configuration")
    if HIDDEN in json.dumps(plain["config"]) and (run_dir / CONFIG).exists():
        known = load_config(run_dir / CONFIG).model_dump(mode="json")
        plain["config"] = revealed(plain["config"], known)
    tensors = TensorReader(checkpoint).all_whole("model/")
    return validate_config(plain["config"], str(checkpoint)), tensors, plain
