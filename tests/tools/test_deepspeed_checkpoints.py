"""A checkpoint that plain DeepSpeed takes up, and back: the weights and moments that it had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hope import HopeModel
from tools import checkpoint
from tools.processes import run
from train.checkpoint import CheckpointStore
from train.checkpoint.load import load_run
from train.config import validate_config
from train.engines.deepspeed import parameter_groups
from train.parallel.ranks import Ranks
from train.run import train
from train.zero.library import open_deepspeed, quiet


def convert(rank: int, arguments: list[str]) -> int:
    return checkpoint.main(arguments)


def plain_deepspeed(rank: int, folder: str, raw: dict[str, Any]) -> dict[str, Any]:
    """What a program that knows nothing of ours gets: DeepSpeed's engine, loaded."""
    config = validate_config(raw, "test")
    library = open_deepspeed()
    model = HopeModel(config.model, seed=1)
    named = dict(model.named_parameters())
    groups = [[named[n] for n in one.names] for one in parameter_groups(config, named, set())]
    optimizer = torch.optim.AdamW([{"params": one} for one in groups], lr=0.1)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    with quiet():
        engine, *_ = library.initialize(
            model=model,
            optimizer=optimizer,
            config={**settings, "zero_allow_untested_optimizer": True},
            dist_init_required=False,
        )
        path, client = engine.load_checkpoint(folder)
    assert path is not None
    engine.optimizer._lazy_init_hp_params_optimizer_state()  # else before the next step
    get = library.utils.safe_get_full_optimizer_state
    found = {f"model/{n}": p.detach().clone() for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for state in ("exp_avg", "exp_avg_sq"):
            found[f"optimizer/{name}/{state}"] = get(parameter, state)
    found["steps"] = [float(state["step"]) for state in optimizer.state.values()]
    found["tokens"] = client["hope"]["clock"]["tokens"]
    return found


def test_there_and_back(raw_config: dict[str, Any], tmp_path: Path) -> None:
    raw_config["training"]["stop_at_tokens"] = 7 * 256
    config = validate_config(raw_config, "test")
    assert train(config, False) in (0, None)
    run_dir, there, back = Path(raw_config["run_dir"]), tmp_path / "ds", tmp_path / "back"
    assert run(1, convert, ["to-deepspeed", str(run_dir), str(there)]) == [0]
    raw_config["model"]["vocab_size"] = load_run(run_dir)[0].model.vocab_size
    (found,) = run(1, plain_deepspeed, str(there), raw_config)
    store = CheckpointStore(run_dir / "checkpoints", Ranks.alone())
    expected = store.tensors(store.newest())
    assert found.pop("tokens") == 7 * 256
    assert sorted(set(found.pop("steps"))) == [1.0, 2.0, 7.0]  # levels of 5, 3 and 1 steps
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name

    assert run(1, convert, ["from-deepspeed", str(there), str(back)]) == [0]
    (folder,) = back.glob("tokens-*")
    _, model = load_run(folder)
    _, original = load_run(run_dir)
    tokens = torch.arange(40).reshape(2, 20)
    assert torch.equal(model(tokens)[0], original(tokens)[0])
    assert run(1, convert, ["to-deepspeed", str(run_dir), str(there)]) == [2]


def save_plainly(rank: int, folder: str, raw: dict[str, Any], stage: int) -> dict[str, Any]:
    """Two steps of a program that knows nothing of ours; its weights, whole."""
    library = open_deepspeed()
    model = HopeModel(validate_config(raw, "test").model, seed=3)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    with quiet():
        engine, *_ = library.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
            config={**settings, "zero_allow_untested_optimizer": True},
            dist_init_required=False,
        )
    for _ in range(2):
        loss = engine(torch.arange(32).reshape(2, 16) + rank)[0].square().mean()
        engine.backward(loss)
        engine.step()
    with quiet():
        engine.save_checkpoint(folder)
    get = library.utils.safe_get_full_fp32_param
    return {name: get(parameter).clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_of_any_stage_from_several_ranks(
    raw_config: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    assert "vocab_size" not in raw_config["model"]  # left to the data, as in configs/
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw_config))
    raw_config["model"]["vocab_size"] = 64
    there, back = tmp_path / "ds", tmp_path / "back"
    expected, _ = run(2, save_plainly, str(there), raw_config, stage)
    assert run(1, convert, ["from-deepspeed", str(there), str(back)]) == [2]  # of what model?
    more = ["--config", str(tmp_path / "config.yaml")]
    assert run(1, convert, ["from-deepspeed", str(there), str(back), *more]) == [0]
    (folder,) = back.glob("tokens-*")
    found = dict(load_run(folder)[1].named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class Trap:
    """Pickled as a call that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def stray(rank: int, folder: str, output: str) -> tuple[int, str]:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        status = checkpoint.main(["from-deepspeed", folder, output])
    return status, text.getvalue().splitlines()[-1]


@pytest.mark.slow
def test_what_is_no_checkpoint_is_one_line_and_runs_nothing(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    raw_config["training"]["stop_at_tokens"] = 256
    train(validate_config(raw_config, "test"), False)
    there = tmp_path / "ds"
    assert run(1, convert, ["to-deepspeed", raw_config["run_dir"], str(there)]) == [0]
    (file,) = there.glob("*/*optim_states.pt")
    for content in (b"", file.read_bytes()[:-100], None):
        if content is None:
            torch.save({"optimizer_state_dict": Trap(tmp_path / "ran")}, file)
        else:
            file.write_bytes(content)
        ((status, line),) = run(1, stray, str(there), str(tmp_path / "back"))
        assert (status, line.startswith(f"error: {there}")) == (2, True), line
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "back").exists()
    ((status, line),) = run(1, stray, str(tmp_path / "nothing"), str(tmp_path / "back"))
    assert (status, "nothing" in line) == (2, True)
