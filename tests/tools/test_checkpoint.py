"""python -m tools.checkpoint: what it says, what it writes, and its exit status."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.train.checkpoint.states import PLAIN, assert_equal, state, store_in
from tools.checkpoint import main
from train.checkpoint.manifest import damage
from train.run_folder import own_url, run_lock, save_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints, of which the middle one is the best."""
    store = store_in(tmp_path / "checkpoints", keep_last=9)
    for tokens, loss in ((100, 3.0), (200, 2.0), (300, 2.5)):
        store.save(
            tokens,
            state({"fast": tokens}),
            {**PLAIN, "evaluation": {"loss": loss}, "config": {"seed": tokens}},
        )
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[int]:
    return [int(path.name[7:]) for path in sorted(folder.iterdir())]


def name(tokens: int) -> str:
    return f"tokens-{tokens:015d}"


def test_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tag", str(folder), name(100), "released"]) == 0
    assert main(["list", str(folder)]) == 0
    first, second, third = capsys.readouterr().out.splitlines()[2:]
    assert first.split()[:3] == [name(100), "100", "3.0000"]
    assert first.endswith("released")
    assert second.split()[2] == "2.0000"
    assert not third.endswith("released")


def test_nobody_reads_the_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not bad input: `as_command` makes it status 141."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    with pytest.raises(BrokenPipeError):
        main(["list", str(folder)])


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder), str(folder)]) == 0
    assert capsys.readouterr().out.count(": good\n") == 6
    (folder / name(200) / "stream-00000.safetensors").unlink()
    assert main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"{name(200)}: stream-00000.safetensors is missing" in out
    assert out.count(": good\n") == 2


def test_diff(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = str(folder / name(100)), str(folder / name(200))
    assert main(["diff", one, one]) == 0
    assert capsys.readouterr().out == ""
    assert main(["diff", one, other]) == 1
    lines = capsys.readouterr().out.splitlines()
    first, second = state({"fast": 100}), state({"fast": 200})
    moved = {key for key in first if not torch.equal(first[key], second[key])}
    assert {line.split(":")[0] for line in lines if not line.startswith("trainer.json")} == moved
    assert "trainer.json evaluation.loss: 3.0 and 2.0" in lines
    assert "optimizer/layers.0.mixer.w/step: differs by up to 100" in lines


def test_export_is_read_by_the_library(folder: Path, tmp_path: Path) -> None:
    """The newest that verifies, or the one that was named."""
    output = tmp_path / "model.safetensors"
    assert main(["export", str(folder), str(output)]) == 0
    expected = {k[6:]: v for k, v in state({"fast": 300}).items() if k.startswith("model/")}
    assert_equal(load_file(output), expected)
    with safe_open(output, "pt") as opened:
        assert json.loads(opened.metadata()["config"]) == {"seed": 300}
    assert main(["export", str(folder / name(200)), str(output), "--prefix", "optimizer/"]) == 0
    assert all(key.startswith("layers.0.") for key in load_file(output))


def test_an_export_that_fails_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And names the file that was asked for, whether the system names one or not."""
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "none" / "model", tmp_path / "file" / "model"):
        assert main(["export", str(folder), str(output)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: can't make {output}: ")
        assert ".writing-" not in error

    def failing(old: Path, new: Path) -> None:
        raise OSError("no more")

    monkeypatch.setattr("tools.checkpoint.rename", failing)
    assert main(["export", str(folder), str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err == f"error: can't make {tmp_path / 'model'}: no more\n"
    assert not list(tmp_path.glob("*model*"))


def test_an_export_takes_the_place_of_files_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the device that stands for it, /dev/null was made a file."""
    (tmp_path / "taken").mkdir()
    os.mkfifo(tmp_path / "taken-too")
    for output in (tmp_path / "taken", tmp_path / "taken-too", ""):
        assert main(["export", str(folder), str(output)]) == 2
        assert capsys.readouterr().err.endswith("is there and is no file; give the name of one\n")
    assert (tmp_path / "taken-too").is_fifo()
    assert sorted(path.name for path in tmp_path.glob("*taken*")) == ["taken", "taken-too"]
    (tmp_path / "old").write_text("")
    (tmp_path / "link").symlink_to("old")
    assert main(["export", str(folder), str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "old").stat().st_size > 0


def test_every_file_of_a_checkpoint_is_read_by_the_library(folder: Path) -> None:
    found = {}
    for path in (folder / name(200)).glob("*.safetensors"):
        found |= load_file(path)
    assert_equal(found, state({"fast": 200}))


def test_prune(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--keep-best", "-4"], ["--keep-last", "0"], ["--keep-last", "x"]):
        with pytest.raises(SystemExit):
            main(["prune", str(folder), *wrong])
    assert names(folder) == [100, 200, 300]
    capsys.readouterr()
    rules = ["--keep-last", "1", "--keep-best", "1"]
    assert main(["prune", str(folder), *rules, "--dry-run"]) == 0
    assert capsys.readouterr().out == f"would delete {folder / name(100)}\n"
    assert names(folder) == [100, 200, 300]
    assert main(["prune", str(folder), *rules]) == 0
    assert names(folder) == [200, 300]
    assert main(["tag", str(folder), name(200), "kept"]) == 0
    assert main(["prune", str(folder), "--keep-last", "1"]) == 0
    assert names(folder) == [200, 300]
    assert main(["tag", str(folder), name(200)]) == 0
    assert main(["prune", str(folder), "--keep-last", "1"]) == 0
    assert names(folder) == [300]
    assert damage(folder / name(300)) is None


def test_a_run_keeps_to_its_own_rules(
    folder: Path,
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What its configuration keeps was deleted, unless it was said again; whichever of its folders
    is named. What is said on the command line goes before."""
    rules = {"checkpoint.keep_last": 1, "checkpoint.keep_every_tokens": 200}
    save_config(make_config(run_dir=str(folder.parent), **rules))
    for run in (folder.parent, folder):
        assert main(["prune", str(run), "--dry-run"]) == 0
        assert capsys.readouterr().out == f"would delete {folder / name(100)}\n"
        for given, kept in ((["--keep-last", "3"], 3), (["--keep-every-tokens", "0"], 1)):
            assert main(["prune", str(run), *given, "--dry-run"]) == 0
            assert capsys.readouterr().out.count("would delete") == 3 - kept
    monkeypatch.chdir(folder)
    assert main(["prune", ".", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"would delete {name(100)}\n"
    (folder.parent / "config.yaml").write_text("no configuration")
    for run in (folder.parent, folder):
        assert main(["prune", str(run)]) == 2
        assert str(folder.parent / "config.yaml") in capsys.readouterr().err
    folder.rename(folder.parent / "loose")  # beside some other program's config.yaml
    assert main(["prune", str(folder.parent / "loose")]) == 0
    assert names(folder.parent / "loose") == [200, 300]


def test_a_run_behind_a_url_keeps_to_its_own_rules(
    tmp_path: Path, make_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "memory://kept-by-its-run"
    settings = {"url": url, "keep_every_tokens": 100, "asynchronous": False}
    config = make_config(checkpoint=settings)
    config.run_dir.mkdir()
    save_config(config)
    own_url(config.run_dir, url)
    store = store_in(url, keep_last=9)
    for tokens in (100, 200, 300):
        store.save(tokens, state({"fast": tokens}), PLAIN)
    for run in (str(config.run_dir), url):
        assert main(["prune", run, "--dry-run"]) == 0
        assert capsys.readouterr().out == ""
    (config.run_dir / "config.yaml").unlink()
    assert main(["prune", url, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would delete") == 1


def test_a_run_that_trains_is_not_pruned(
    folder: Path, make_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of its folders is named: a save may be between its name and its marker."""
    save_config(make_config(run_dir=str(folder.parent)))
    with run_lock(folder.parent):
        assert main(["prune", str(folder), "--keep-last", "1"]) == 2
    assert "is in use by another training process" in capsys.readouterr().err
    assert names(folder) == [100, 200, 300]
    assert main(["prune", str(folder), "--keep-last", "1"]) == 0
    assert names(folder) == [300]


def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name(100) / "trainer.json").write_text("{}")
    output = str(tmp_path / "x")
    cases = [
        (["list", output], 2, "neither a run folder nor a folder of checkpoints"),
        (["verify", "nosuch://x/y"], 2, "can't use nosuch://x/y"),
        (["tag", str(folder), "tokens-1", "x"], 2, "no checkpoint 'tokens-1'"),
        (["tag", str(folder), "../x", "x"], 2, "no checkpoint '../x'"),
        (["export", str(folder), output, "--prefix", "x/"], 2, "whose name starts with 'x/'"),
        (["export", str(folder), "/nosuch/x"], 2, "No such file or directory"),
        (["export", str(folder / name(100)), output], 1, "trainer.json has 2 bytes"),
        (["diff", str(folder / name(100)), str(folder)], 1, "trainer.json has 2 bytes"),
    ]
    for arguments, status, message in cases:
        assert main(arguments) == status, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    for wrong in (["prune", output, "--keep-last", "0"], ["tag", str(folder), name(100), "\udcff"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2


def test_prune_says_which_rules_it_keeps_to(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for wanted in (
        "`checkpoint` section of the run's configuration",
        "newest N (the run's, else 2)",
        "multiple of TOKENS; 0: none (the run's, else none)",
    ):
        assert wanted in shown
