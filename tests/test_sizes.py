"""The configurations of 340M, 760M and 1.3B: exact sizes, equal twins, and a clear way to fail."""

from __future__ import annotations

import re
import shlex
from math import prod
from pathlib import Path

import pytest

from hope.model import num_parameters
from train.__main__ import main
from train.config import RunConfig, load_config
from train.engines import layout_of

SIZES = {
    "340m": (340e6, 338_298_624, 338_740_224, (24, 1024, 16)),
    "760m": (760e6, 764_610_816, 764_093_952, (24, 1536, 16)),
    "1b3": (1300e6, 1_321_273_920, 1_321_347_072, (18, 2048, 16)),
}


def path_of(name: str) -> Path:
    return Path("configs") / f"{name}.yaml"


def twin_command(name: str) -> list[str]:
    """The words of the command that the file gives for its Transformer++."""
    header = re.sub(r"^# ?", "", path_of(name).read_text(), flags=re.MULTILINE)
    found = re.search(r"python -m train (.*?\\\n.*?)\n", header)
    assert found
    return shlex.split(found[1].replace("\\\n", " "))


def twin_of(name: str) -> RunConfig:
    config_file, *overrides = twin_command(name)
    assert config_file == str(path_of(name))
    return load_config(config_file, overrides)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_name(name: str) -> None:
    nominal, hope, transformer, shape = SIZES[name]
    config, twin = load_config(path_of(name)), twin_of(name)
    assert num_parameters(config.model) == hope
    assert num_parameters(twin.model) == transformer
    assert abs(hope / nominal - 1) < 0.02
    assert abs(transformer / hope - 1) < 0.002
    for model in (config.model, twin.model):
        assert (model.num_layers, model.dim, model.num_heads) == shape
        assert model.vocab_size == 32_000
    text = path_of(name).read_text()
    assert f"{hope:,} parameters" in text
    assert f"({transformer:,})" in text


COMMAND = re.compile(
    r"(?:\w+=\S+ +)*(?:launch/|sbatch |python -m train ).*configs/(?:340m|760m|1b3)"
)
RANKS = re.compile(r"--world-size (\d+)|(?:(?:NNODES=|--nodes=)(\d+) .*)?(?:\.sh |per-node=)(\d+)")


def documented() -> list[str]:
    """Commands of README and docs that train one of the sizes, or say what it would take."""
    texts = [path.read_text() for path in (Path("README.md"), *sorted(Path("docs").glob("*.md")))]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if COMMAND.match(line)]


@pytest.mark.parametrize("command", documented())
def test_what_the_documents_say_can_be_laid_out(command: str) -> None:
    """A size's micro_batches are for one device: more of them have fewer rows each to cut."""
    ranks = 1
    if found := RANKS.search(command.replace(".sh hosts", ".sh 16")):  # two of 8, docs/launch.md
        ranks = prod(int(number) for number in found.groups() if number)
    words = shlex.split(command, comments=True)
    config = next(number for number, word in enumerate(words) if word.startswith("configs/"))
    changes = [word for word in words[config + 1 :] if re.match(r"[a-z_.]+=", word)]
    changes = [word for word in changes if not word.startswith("deepspeed.config=")]  # the user's
    layout = layout_of(load_config(words[config], changes), ranks)
    assert layout.dp * layout.tp * layout.pp * layout.cp == ranks


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_writes_are_as_weak_as_stability_needs(path: Path) -> None:
    """docs/stability.md: beyond 1/2 of the way in a chunk the memories were measured to diverge."""
    titans = load_config(path).model.titans
    assert titans.scan.eta_max * titans.scan.projection_chunk <= 0.5
    assert titans.initial_eta == pytest.approx(titans.scan.eta_max / 2)


@pytest.mark.parametrize("name", SIZES)
def test_the_twin_differs_in_the_layers_alone(name: str) -> None:
    config, twin = load_config(path_of(name)), twin_of(name)
    assert twin.model.mixers == ("attention",) * config.model.num_layers
    assert len(twin.model.cms.levels) == 1
    same = {"model": config.model, "run_dir": config.run_dir}
    assert twin.model_copy(update=same) == config
    assert twin.run_dir != config.run_dir


@pytest.mark.parametrize("name", SIZES)
def test_the_recipe_is_the_published_one(name: str) -> None:
    config = load_config(path_of(name))
    optimizer = config.optimizer
    assert (config.data.seq_len, config.training.batch_tokens) == (4096, 2**19)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_norm) == (4e-4, 0.1, 1.0)
    assert optimizer.schedule.name == "cosine"
    periods = [level.update_every_tokens for level in config.model.cms.levels]
    assert periods == ["step", 2**20, 2**22, 2**24]


@pytest.mark.parametrize("name", SIZES)
def test_without_data_the_trainer_says_so(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    missing = [f"data.train.0.path={tmp_path}/train", f"data.validation={tmp_path}/validation"]
    assert main([str(path_of(name)), *missing, f"run_dir={run}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}/train" in error
    assert not run.exists()
