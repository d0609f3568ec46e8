"""Configuration: strict, one line per mistake, and the same after a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hope import HopeConfig
from train.__main__ import main
from train.config import ConfigError, dump_config, load_config, validate_config

MISTAKES = [
    (["run_dir=s3://b/run"], "run_dir: input should be on this machine, not a URL"),
    (["data.cache_dir=s3://b"], "data.cache_dir: input should be on this machine, not a URL"),
    (["model.num_layers=99999999999999999999"], "is more than 10,000"),
    (["optimizer.betas=[.nan, 0.95]"], "optimizer.betas"),
    (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas"),
    (["optimizer.lr=.inf"], "optimizer.lr"),
    (["model.titans.initial_eta=.nan"], "initial_eta"),
    (["optimizer.lrr=1"], "unknown key 'optimizer.lrr' (did you mean 'lr'?)"),
    (["model.titans.scan.memory_chunkk=1"], "unknown key 'model.titans.scan.memory_chunkk'"),
    (["optimizer.lr=fast"], "optimizer.lr: input should be a valid number, got 'fast'"),
    (["optimizer.lr='0.1'"], "optimizer.lr: input should be a valid number, got '0.1'"),
    (["model.dim=12.5"], "model.dim: input should be a valid integer"),
    (["model.mixer=rnn"], "model.mixer: input should be 'titans' or 'attention'"),
    (["model.dim=17"], "model.dim=17 must be a multiple of model.num_heads=2"),
    (["training.batch_tokens=100"], "the nearest is 128"),
    (["data.seq_len=40", "training.batch_tokens=80"], "the nearest is 48"),
    (["training.state_carry=stream"], "needs data.order=stream"),
    (["optimizer.levels={d: {lr_scale: 2}}"], "the levels are ['a', 'b', 'c', 'fast']"),
    (["model.cms.levels.0.name=fast"], "can't be called 'fast'"),
    (["model.cms.levels.1.update_every_tokens=99999"], "ordered fastest first"),
    (["model.cms.levels.7.name=x"], "'7' is no entry of a list of 3"),
    (
        ["model.cms.levels.1.update_every_tokens=abc", "optimizer.lr=x"],
        ": model.cms.levels.1.update_every_tokens: input should be a valid integer, got 'abc'; "
        "optimizer.lr: input should be a valid number, got 'x'\n",
    ),
    (["model.cms.mode=nested"], "multiples of the next faster one, got [0, 768, 1280]"),
    (["init_from={path: x, levels: []}"], "init_from.levels: "),
    (["model.titans.initial_eta=0.6"], "must lie between 0 and titans.scan.eta_max"),
    (["optimizer.lr"], "not of the form key.subkey=value"),
    (["checkpoint.url=memory://box"], "memory:// is of one process"),
    (["seed=3", "seed.x=1"], "lies below a plain value"),
    (["data.train=[]"], "data.train"),
    (["data.validation=''"], "data.validation: string should have at least 1 character, got ''"),
    (["data.packing=bestfit"], "input should be 'aligned', 'best-fit' or 'concat'"),
    (["data.curriculum=[{from_tokens: 64, weights: [1, 1]}]"], "give 1, one for each corpus"),
    (["data.curriculum=[{from_tokens: 64, weights: [0]}]"], "and not only zeros"),
    (
        ["data.curriculum=[{from_tokens: 9, weights: [1]}, {from_tokens: 9, weights: [1]}]"],
        "begins at [9, 9]: give rising from_tokens",
    ),
    (
        ["data.order=stream", "data.curriculum=[{from_tokens: 64, weights: [1]}]"],
        "data.curriculum needs data.order=shuffle or window",
    ),
    (["data.train.0.weight=0"], "data.train: every weight is 0"),
    ([f"data.seq_len={1 << 70}"], "data.seq_len: input should be less than or equal to"),
    ([f"data.prefetch={1 << 70}"], "data.prefetch: input should be less than or equal to"),
    ([f"spikes.window={1 << 70}"], "spikes.window: input should be less than or equal to"),
    ([f"num_threads={1 << 70}"], "num_threads: input should be less than or equal to"),
    (["data.order=stream", "data.packing=best-fit"], "data.order=stream needs aligned or concat"),
    (["optimizer.lr=[1"], "not valid YAML"),
    (["model.cms.levels.\u00b2.name=x"], "'\u00b2' is no entry of a list of 3"),
    (["optimizer.lr=&a [*a]"], "not plain data: Circular reference"),
    (["optimizer={2026-01-01: 2}"], "unknown key 'optimizer.2026-01-01'"),
    (["optimizer={!!timestamp 2026-01-01: 2}"], "not plain data: keys must be str"),
    (["optimizer.lr=!!bool x"], "not valid YAML"),
    ([f"seed={'9' * 5000}"], "not valid YAML: Exceeds the limit"),
    (["training.walltime_s=1:04:00"], "walltime_s: input should be a valid number, got '1:04:00'"),
    (["data.train.0=null"], ": data.train.0: input should be an object, got None\n"),
    (["optimizer={lr: 1, lr: 2}"], "override 'optimizer={lr: 1, lr: 2}': not valid YAML: key 'lr'"),
    (["training.walltime_s=0"], "training.walltime_s: input should be greater than 0, got 0"),
    (["training.walltime_s=soon"], "training.walltime_s: input should be a valid number"),
    (["spikes.action=undo"], "spikes.action: input should be 'none', 'skip' or 'rollback'"),
    (["faults=[{kind: nan_loss, phase: save}]"], "nan_loss happens in forward only"),
    (["faults=[{kind: kill, phase: delete, rank: 1}]"], "phase delete is of rank 0 alone"),
    (["faults=[{kind: kil}]"], "faults.0.kind: input should be 'kill', 'term'"),
]


@pytest.fixture
def config_file(raw_config: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    return path


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    config_file: Path,
    overrides: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert main([str(config_file), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_key_that_appears_twice_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\nmodel: {}\n\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: .*key 'seed' appears twice \(line 4\)"):
        load_config(path)


def test_a_merge_key_takes_what_is_not_given(raw_config: dict[str, Any], tmp_path: Path) -> None:
    raw_config["optimizer"]["levels"] = {}
    path = tmp_path / "config.yaml"
    text = yaml.safe_dump(raw_config)
    levels = "    a: &a {lr_scale: 2.0, weight_decay: 0.5}\n    b: {<<: *a, lr_scale: 3.0}\n"
    path.write_text(text.replace("levels: {}\n", f"levels:\n{levels}"))
    found = load_config(path).optimizer.levels["b"]
    assert (found.lr_scale, found.weight_decay) == (3.0, 0.5)


def test_a_missing_file_and_a_missing_corpus_exit_2(
    config_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert main([str(config_file), f"data.validation={tmp_path}/nothing"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "none.yaml" in lines[0]
    assert "nothing" in lines[1]
    assert not (tmp_path / "run").exists()


def test_overrides_are_typed_yaml(config_file: Path) -> None:
    config = load_config(
        config_file,
        [
            "optimizer.lr=3e-4",
            "model.cms.levels.2.hidden_size=24",
            "optimizer.schedule.name=constant",
        ],
    )
    assert config.optimizer.lr == 3e-4
    assert config.model.cms.levels[2].hidden_size == 24
    assert config.optimizer.schedule.name == "constant"
    levels = "model.cms.levels=[{name: mlp, hidden_size: 40}]"
    baseline = load_config(config_file, ["model.mixer=attention", levels])
    assert baseline.model.mixers == ("attention", "attention")
    assert [level.hidden_size for level in baseline.model.cms.levels] == [40]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 1e-3), ("3E4", 3e4), ("-1.5", -1.5), ("1_000", 1000), ("1.5e+2", 150.0)),
        *(("7", 7), ("0400", 400), ("0o17", 15), ("0x1F", 31), ("-.5", -0.5), ("1:04", "1:04")),
        *(("2026-13-45", "2026-13-45"), ("0b11", "0b11")),
    ],
)
def test_numbers_are_read_as_numbers(text: str, value: float | str) -> None:
    from train.config import _parse

    assert _parse(f"x: {text}", "test") == {"x": value}
    assert type(_parse(f"x: {text}", "test")["x"]) is type(value)


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: a\nrun_dir: b\n")
    with pytest.raises(ConfigError, match="'run_dir' appears twice"):
        load_config(path)


def test_resolved_configuration_loads_again_as_itself(raw_config: dict[str, Any]) -> None:
    config = validate_config(raw_config, "test")
    again = validate_config(yaml.safe_load(dump_config(config)), "dump")
    assert again == config
    assert isinstance(again.model, HopeConfig)


@pytest.mark.parametrize("text", ["1e5", "0400", "0o7", "1:04", ".5e3", "yes", "2026-01-01", "~"])
def test_text_that_looks_like_something_else_stays_text(
    raw_config: dict[str, Any], tmp_path: Path, text: str
) -> None:
    raw_config["mlflow"]["experiment"] = text
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(validate_config(raw_config, "test")))
    assert load_config(path).mlflow.experiment == text


def test_a_tilde_is_the_home_folder(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    asked = ["run_dir=~/run", "data.train.0.path=~/train", "data.validation='~'"]
    asked += ["data.cache_dir=~/cache", "init_from.path=~/base"]
    config = load_config(config_file, asked)
    home = tmp_path / "home"
    assert config.run_dir == home / "run"
    assert config.data.train[0].path == str(home / "train")
    assert config.data.validation == str(home)
    assert config.data.cache_dir == home / "cache"
    assert config.init_from is not None
    assert config.init_from.path == home / "base"


def test_what_is_required_is_the_configuration_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    load_config(path)
