"""Checkpoints to and from DeepSpeed's own format, which `deepspeed.initialize` and
`load_checkpoint` of any program read; runs of engine=deepspeed need neither.

DeepSpeed itself writes and reads them. What is read never runs code: tensors and plain values, and
four classes of DeepSpeed (`_without_code`), whatever else a file asks for.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope import HopeModel
from train.checkpoint import CheckpointError, CheckpointStore, load_parameters
from train.checkpoint.places import Place
from train.checkpoint.reading import TensorReader, read_plain
from train.config import RunConfig, load_config, validate_config
from train.engines.deepspeed import parameter_groups
from train.parallel.part import unused_parameters
from train.parallel.ranks import Ranks
from train.zero.library import open_deepspeed, quiet
from train.zero.partitions import Partitions

OURS = "hope"  # in DeepSpeed's client state: everything of a checkpoint that is not a tensor
STATES = ("exp_avg", "exp_avg_sq")


def to_deepspeed(folder: Place, output: Path) -> str:
    """Write a checkpoint as one of DeepSpeed with ZeRO 1: weights, AdamW's moments and steps.

    A parameter group for each level and kind of weight decay, in the order of the model. Returns
    what to say. Raises CheckpointError where there is something at `output`, or an optimizer that
    DeepSpeed's format has no place for.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} is there already; give a new folder")
    reader, plain = TensorReader(folder), read_plain(folder)
    config = validate_config(plain["config"], str(folder))
    kinds = {name.rpartition("/")[2] for name in reader.names("optimizer/")}
    if odd := sorted(k for k in kinds if k not in (*STATES, "step") and "accumulated" not in k):
        raise CheckpointError(
            f"{folder} holds {', '.join(odd)}: DeepSpeed's format is written for AdamW alone; "
            "`export` writes the weights"
        )
    library = open_deepspeed()
    model = HopeModel(config.model, seed=None)
    named = dict(model.named_parameters())
    load_parameters(named, {n: reader.stored(n) for n in reader.names("model/")})
    groups = parameter_groups(config, named, unused_parameters(model))
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in g.names], "weight_decay": g.weight_decay} for g in groups],
        lr=config.optimizer.lr,
    )
    with quiet():
        engine, *_ = library.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
            },
            dist_init_required=False,
        )
        lines = Partitions(engine.optimizer, named, {n: p.shape for n, p in named.items()})
        for names, line in zip(lines.names, lines.tensors, strict=True):
            state = {one: torch.zeros_like(line) for one in STATES}
            for name in names:
                lines.put(name, reader.whole(f"model/{name}"), line.detach())
                for one in STATES:
                    zero = torch.zeros_like(named[name])
                    lines.put(name, _state(reader, name, one, zero), state[one])
            state["step"] = _state(reader, names[0], "step", torch.tensor(0.0))
            optimizer.state[line] = state
        tokens = int(plain["clock"]["tokens"])
        engine.save_checkpoint(str(output), tag=f"tokens-{tokens}", client_state={OURS: plain})
    left = {"accumulated gradients"} if any("accumulated" in kind for kind in kinds) else set()
    left |= {"memories of rows"} if reader.names("stream/") else set()
    return f"{output}: {len(groups)} groups of parameters, {tokens:,} tokens" + (
        f"; left behind: {', '.join(sorted(left))}" if left else ""
    )


def from_deepspeed(folder: Path, output: Path, config_path: Path | None) -> str:
    """Write the weights of a checkpoint of DeepSpeed, of any stage and number of ranks, as one of
    ours under `output`, for init_from, evaluation and sampling.

    config_path: of the model, where the checkpoint does not say. Raises CheckpointError, one line.
    """
    open_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with _without_code():
        try:
            with quiet():
                weights = get_fp32_state_dict_from_zero_checkpoint(str(folder))
            plain = _client_state(folder)
        except pickle.UnpicklingError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder} asks for code to be run: {reason[:300]}") from None
        except (ValueError, OSError, KeyError, RuntimeError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{folder} is no checkpoint of DeepSpeed: {reason[:300]}"
            ) from None
    config = load_config(config_path) if config_path is not None else _own_config(plain, folder)
    names = {name.removeprefix("module."): name for name in weights}
    config = _with_vocabulary(config, weights.get(names.get("embedding.weight")), folder)
    with torch.device("meta"):
        expected = dict(HopeModel(config.model, seed=None).named_parameters())
    wrong = sorted(expected.keys() ^ names.keys())
    wrong += [n for n, p in expected.items() if n in names and weights[names[n]].shape != p.shape]
    if wrong:
        raise CheckpointError(f"{folder} and the model of the configuration differ in {wrong[:4]}")
    tensors: dict[str, Tensor] = {f"model/{n}": weights[names[n]].contiguous() for n in expected}
    kept = {"config": config.model_dump(mode="json"), "imported": "DeepSpeed"}
    kept |= {key: plain[key] for key in ("tokenizer", "clock", "evaluation") if key in plain}
    tokens = int(plain.get("clock", {}).get("tokens", 0))
    store = CheckpointStore(output, Ranks.alone())
    saved = store.save(tokens, tensors, kept)
    store.finish()
    return f"{saved}: {len(tensors)} tensors"


def _state(reader: TensorReader, name: str, state: str, default: Tensor) -> Tensor:
    """A state of a parameter's optimizer; `default` for a level that has never fired."""
    there = f"optimizer/{name}/{state}"
    return reader.whole(there) if there in reader.manifest.tensors else default


def _client_state(folder: Path) -> dict[str, Any]:
    """What `to_deepspeed` has added, if anything."""
    tag = (folder / "latest").read_text().strip()
    for path in sorted((folder / tag).glob("*model_states.pt")):
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(OURS)
        if isinstance(found, dict):
            return found
    return {}


def _own_config(plain: dict[str, Any], folder: Path) -> RunConfig:
    if not isinstance(plain.get("config"), dict):
        raise CheckpointError(f"{folder} does not say what model it is of: add --config CONFIG")
    return validate_config(plain["config"], str(folder))


def _with_vocabulary(config: RunConfig, embedding: Tensor | None, folder: Path) -> RunConfig:
    """Where the configuration leaves the vocabulary to the data, it is as large as the embedding's,
    since the data need not be here."""
    if config.model.vocab_size is not None:
        return config
    if embedding is None:
        raise CheckpointError(f"{folder} is not of a model of ours: it has no embedding.weight")
    model = dataclasses.replace(config.model, vocab_size=len(embedding))
    return config.model_copy(update={"model": model})


@contextmanager
def _without_code() -> Iterator[None]:
    """torch.load takes tensors, plain values and the classes below, whoever calls it and how."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def add_commands(commands: Any, checkpoint: Any) -> None:
    """The two commands of `tools.checkpoint`; checkpoint: makes a folder of what the user wrote."""

    def export(options: argparse.Namespace) -> int:
        print(to_deepspeed(checkpoint(options.checkpoint), options.folder))
        return 0

    def take(options: argparse.Namespace) -> int:
        print(from_deepspeed(options.folder, options.output, options.config))
        return 0

    command = commands.add_parser("to-deepspeed", help="Write a checkpoint as one of DeepSpeed.")
    command.set_defaults(action=export)
    command.add_argument("checkpoint", metavar="CHECKPOINT")
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command = commands.add_parser("from-deepspeed", help="Make a checkpoint of one of DeepSpeed.")
    command.set_defaults(action=take)
    command.add_argument("folder", metavar="FOLDER", type=Path, help="with the file `latest`")
    command.add_argument("output", metavar="OUTPUT", type=Path, help="folder of checkpoints")
    command.add_argument("--config", type=Path, help="of the model, if FOLDER does not say")
