"""Runs that are taken up from a checkpoint: which one, exactly, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline import DataError
from tests.conftest import tiny_config
from tests.train.checkpoint.states import PLAIN, assert_equal, state, store_in
from tests.train.checkpoint.test_manifest import _make_right
from tests.train.test_trainer import assert_same_run, losses
from tools.checkpoint import main as prune
from train.__main__ import main
from train.checkpoint import CheckpointError, CheckpointStore, load, open_store, reading
from train.checkpoint import store as store_module
from train.checkpoint.load import load_run
from train.checkpoint.manifest import MARKER
from train.config import RunConfig, dump_config, validate_config
from train.corpora import open_corpora, with_vocabulary
from train.engines import open_engine
from train.parallel.ranks import Ranks
from train.run import train
from train.run_folder import RunFolderError, claim, run_lock
from train.signals import StopSignals
from train.trainer import Trainer


def named(tokens: int) -> str:
    return f"tokens-{tokens:015d}"


def store_of(config: RunConfig) -> CheckpointStore:
    return open_store(config, Ranks.alone())


@pytest.fixture(scope="module")
def straight(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was never stopped, with checkpoints every two steps, all kept."""
    raw = tiny_config(corpora, tmp_path_factory.mktemp("straight") / "run")
    raw["training"]["total_tokens"] = 8 * 256
    raw["checkpoint"] = {"every_tokens": 512, "keep_last": 9}
    config = validate_config(raw, "test")
    assert train(config, resume=False) == 0
    return config


def config_file(config: RunConfig, tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    return str(path)


def copy_of(run: RunConfig, tmp_path: Path) -> RunConfig:
    """Its folder under another name."""
    copied = run.model_copy(update={"run_dir": tmp_path / "copy"})
    shutil.copytree(run.run_dir, copied.run_dir)
    return copied


def test_back_to_one_by_name_and_on_to_the_same_end(straight: RunConfig, tmp_path: Path) -> None:
    """In the middle of both periods; whatever state torch's own generator is in."""
    run = copy_of(straight, tmp_path)
    for older in (512, 1024):
        torch.manual_seed(older)
        assert train(run, resume=True, resume_from=named(older)) == 0
        assert_same_run(straight, run)
    folder = run.run_dir / "checkpoints"
    assert (folder / f"aside-{named(1536)}" / MARKER).exists()
    assert [one.name for one in store_of(run).complete()] == [
        named(tokens) for tokens in (512, 1024, 1536, 2048)
    ]


def refuse(*_: Any) -> None:
    """To rename, on a disk that takes nothing."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_what_can_not_be_set_aside_counts_no_longer_and_is_before_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path, keep_last=9)
    for tokens in (1, 2, 3):
        store.save(tokens, state({"fast": tokens}), PLAIN)
    first, _, last = store.complete()

    monkeypatch.setattr(store_module, "rename", refuse)
    assert store.rewind_to(first) == [named(n) for n in (2, 3)]
    assert store.still_there == "OSError: Read-only file system"
    assert store.newest() == first
    with pytest.warns(UserWarning, match="Read-only file system; the next save, if any"):
        assert store.save(2, state({"fast": 9}), PLAIN) is None
    monkeypatch.undo()
    shutil.rmtree(last)  # by hand
    store.save(2, state({"fast": 9}), PLAIN)
    assert_equal(store.tensors(store.newest()), state({"fast": 9}))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"aside-{named(2)}",
        named(1),
        named(2),
    ]
    assert store.rewind_to(first) == [named(2)]
    assert store.still_there is None


def test_a_resume_that_can_not_set_aside_what_is_later_is_refused(
    straight: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copy_of(straight, tmp_path)
    monkeypatch.setattr(store_module, "rename", refuse)
    assert main([config_file(run, tmp_path), "--resume-from", named(1024)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: can't set aside what is after it: OSError: Read-only file system"


def test_the_newest_that_verifies_is_resumed(
    straight: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(straight, tmp_path)
    command = [config_file(run, tmp_path), "--resume"]
    for one in store_of(run).complete()[-2:]:
        (one / "trainer.json").write_text("{}")
    assert main([*command, "--resume-from", named(2048)]) == 2
    assert f"{named(2048)}: trainer.json has 2 bytes" in capsys.readouterr().err
    assert main([*command, "--resume-from", named(7)]) == 2
    assert f"no checkpoint '{named(7)}'" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=f"skipping damaged checkpoint {named(2048)}"):
        assert main(command) == 0
    assert_same_run(straight, run)
    for one in store_of(run).complete():
        (one / "trainer.json").write_text("{}")
    capsys.readouterr()
    with pytest.warns(UserWarning, match="skipping damaged"):
        assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no usable checkpoint under")
    assert error.count("\n") == 1


def test_what_does_not_change_the_mathematics_is_accepted_and_logged(
    straight: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [config_file(copy_of(straight, tmp_path), tmp_path), "--resume"]
    capsys.readouterr()
    assert main([*command, "checkpoint.keep_last=1", "checkpoint.asynchronous=false"]) == 0
    expected = "checkpoint.asynchronous (True -> False), checkpoint.keep_last (9 -> 1)"
    assert f"resuming with other settings: {expected}, run_dir (" in capsys.readouterr().err
    kernels = ("titans.scan.implementation=chunked", "titans.scan.checkpoint_chunks=2")
    kernels += ("attention.backend=sdpa",)
    assert main([*command, *(f"model.{key}" for key in kernels)]) == 0
    told = capsys.readouterr().err
    assert "model.titans.scan.implementation ('auto' -> 'chunked')" in told
    assert main([*command, "optimizer.lr=0.5", "seed=3"]) == 2
    assert "optimizer.lr (0.01 -> 0.5), seed (0 -> 3)" in capsys.readouterr().err


def test_a_run_whose_rates_do_not_depend_on_its_end_may_go_on_beyond_it(
    make_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {"optimizer.schedule": {"name": "constant", "warmup_tokens": 512}}
    straight = make_config(**schedule, run_dir=str(tmp_path / "straight"))
    assert train(straight, resume=False) == 0
    short = {"run_dir": str(tmp_path / "short"), "training.total_tokens": 2048}
    assert train(make_config(**short), resume=False) == 0
    longer = make_config(**{"training.total_tokens": 3072})
    assert train(longer, resume=True) == 0
    steps = [[row for row in losses(run) if row[0] == "step"] for run in (straight, longer)]
    assert steps[0] == steps[1]
    first, second = (store_of(run).tensors(store_of(run).newest()) for run in (straight, longer))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "training.total_tokens (2048 -> 3072)" in capsys.readouterr().err
    cosine = {"optimizer.levels": {"b": {"schedule": {"name": "cosine"}}}}
    assert (
        train(make_config(**{**short, **cosine, "run_dir": str(tmp_path / "b")}), resume=False) == 0
    )
    with pytest.raises(RunFolderError, match=r"another configuration: training.total_tokens"):
        train(make_config(**{"training.total_tokens": 3072}), resume=True)


def test_checkpoints_behind_a_url(straight: RunConfig, tmp_path: Path) -> None:
    """Written by a process of their own, read back by whoever knows the run folder."""
    settings = straight.checkpoint.model_copy(update={"url": f"file://{tmp_path}/bucket"})
    run = straight.model_copy(update={"run_dir": tmp_path / "run", "checkpoint": settings})
    stopped = run.training.model_copy(update={"stop_at_tokens": 1280})
    file = config_file(run, tmp_path)
    assert train(run.model_copy(update={"training": stopped}), resume=False) == 0
    assert not (run.run_dir / "checkpoints").exists()
    assert main([file]) == 2  # the bucket is in use
    assert train(run, resume=True) == 0
    assert_same_run_tensors(straight, run)
    assert load_run(run.run_dir)[0].checkpoint.url == settings.url


def test_a_run_whose_url_was_forgotten_is_not_begun_again(
    make_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints are where the folder's own configuration says."""
    url = f"file://{tmp_path}/bucket"
    small = {"model.mixer": "attention", "training.total_tokens": 256}
    config = make_config(**small, **{"checkpoint.url": url})
    assert train(config, resume=False) == 0
    before = losses(config)
    file = config_file(make_config(**{"checkpoint.url": None}), tmp_path)
    for how in ([], ["--resume-or-start"]):
        assert main([file, *how]) == 2
        assert f"already holds a run, with its checkpoints under {url}" in capsys.readouterr().err
    assert losses(config) == before


def test_a_url_that_can_not_be_used_is_named(make_config, tmp_path: Path) -> None:
    """In one line of every rank, of which the first one alone has looked; and no folder is left."""
    (tmp_path / "file").touch()
    for url, why in (
        ("nosuch://bucket", "can't use nosuch://bucket"),
        (f"file://{tmp_path}/file/bucket", "can't use file:.*/bucket: Not a directory"),
    ):
        config = make_config(**{"checkpoint.url": url})
        refusal = pytest.raises(RunFolderError, match=why)
        with refusal, claim(config, Ranks.alone(), resume=False, auto=False):
            pass
        assert not config.run_dir.exists()


def test_two_runs_do_not_write_behind_one_url(
    make_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even while neither has a checkpoint: the one would take the other's for its own. A run
    that moved is the same, its copy is another. What is told of the URL is told to `prune`."""
    url = f"file://{tmp_path}/bucket"
    quick = {"model.mixer": "attention", "checkpoint.url": url}
    first = make_config(**quick, run_dir=str(tmp_path / "first"))
    with claim(first, Ranks.alone(), resume=False, auto=False):
        second = make_config(run_dir=str(tmp_path / "second"))
        with pytest.raises(RunFolderError, match="takes the checkpoints of another run"):
            train(second, resume=False)
    first = make_config(run_dir=str(tmp_path / "first"), **{"training.stop_at_tokens": 512})
    assert train(first, resume=False) == 0
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    again = make_config(run_dir=str(moved), **{"training.stop_at_tokens": 768})
    assert train(again, resume=True) == 0
    shutil.copytree(moved, tmp_path / "copy")
    with pytest.raises(RunFolderError, match=r"/moved, which .*/copy is a copy of"):
        train(make_config(run_dir=str(tmp_path / "copy")), resume=True)
    there = sorted((tmp_path / "bucket").iterdir())
    with run_lock(moved):
        for run in (url, str(moved)):
            assert prune(["prune", run, "--keep-last", "1"]) == 2
            assert "is in use by another training process" in capsys.readouterr().err
    assert sorted((tmp_path / "bucket").iterdir()) == there
    assert prune(["prune", str(moved), "--keep-last", "1"]) == 0
    assert len(list((tmp_path / "bucket").glob("tokens-*"))) == 1


def assert_same_run_tensors(one: RunConfig, other: RunConfig) -> None:
    found = [store.tensors(store.newest()) for store in map(store_of, (one, other))]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert losses(one) == losses(other)


def test_a_run_whose_disk_is_full_trains_to_its_end_and_says_so(
    make_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**{"training.total_tokens": 5 * 256, "checkpoint.every_tokens": 512})
    config.run_dir.mkdir()
    (config.run_dir / "checkpoints").write_text("in the way")
    with pytest.warns(UserWarning, match="the next save, if any, tries again"):
        assert main([config_file(config, tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "error: the last checkpoint could not be written: tokens-000000000001280" in error
    assert [tokens for kind, tokens, _ in losses(config) if kind == "step"][-1] == 1280


def trainer_of(config: RunConfig) -> Trainer:
    corpora = open_corpora(config)
    config = with_vocabulary(config, corpora)
    engine = open_engine(config, Ranks.alone())
    return Trainer(config, corpora, StopSignals(), engine)


def test_everything_that_a_run_depends_on_is_there(straight: RunConfig) -> None:
    store = store_of(straight)
    plain = store.plain(store.newest())
    trainer = trainer_of(straight)
    assert plain["config"] == yaml.safe_load((straight.run_dir / "config.yaml").read_text())
    assert plain["tokenizer"] == trainer.corpora.validation.tokenizer_sha256
    assert plain["data"]["train"] == [corpus.fingerprint for corpus in trainer.corpora.train]
    assert plain["code"]["torch"] == torch.__version__
    assert plain["clock"]["steps"] == 8
    assert plain["cadence"]["tokens"] == {"fast": 0, "a": 0, "b": 512, "c": 768}
    kinds = {name.partition("/")[0] for name in store.tensors(store.newest())}
    assert kinds == {"model", "optimizer"}
    trainer.resume()
    assert trainer.cadence.pending_tokens == plain["cadence"]["tokens"]
    trainer.store.close()
    trainer.loader.close()


def test_the_manifest_is_read_once_whatever_the_rows(make_config, monkeypatch) -> None:
    config = make_config(**{"training.state_carry": "stream", "data.order": "stream"})
    train(config, resume=False)
    trainer, read = trainer_of(config), []
    real = reading.read_manifest
    monkeypatch.setattr(
        reading, "read_manifest", lambda folder: read.append(folder) or real(folder)
    )
    trainer.resume()
    assert trainer.carried is not None
    assert config.batch_rows > 1
    assert len(read) == 1
    trainer.store.close()
    trainer.loader.close()


@pytest.mark.parametrize("gone_at", ["verified", "read_plain", "read_manifest"])
def test_a_run_may_be_opened_while_it_deletes_what_it_has_saved(
    straight: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone_at: str
) -> None:
    folder = copy_of(straight, tmp_path).run_dir / "checkpoints"
    newest = store_of(straight).newest().name
    (folder / newest).rename(folder / "later")
    module, name = {
        "verified": (store_module, "damage"),
        "read_plain": (load, "read_plain"),
        "read_manifest": (reading, "read_manifest"),
    }[gone_at]
    real = getattr(module, name)

    def saved_and_deleted(one: Path, *others: int) -> Any:
        if (folder / "later").exists():
            (folder / "later").rename(folder / newest)
            for other in folder.glob("tokens-*"):
                if other.name != newest:
                    shutil.rmtree(other)
        return real(one, *others)

    monkeypatch.setattr(module, name, saved_and_deleted)
    with warnings.catch_warnings(action="error"):
        found = load_run(folder.parent)[1].state_dict()
    expected = load_run(straight.run_dir)[1].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for file in (folder / newest).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        load_run(folder.parent)


NEEDED = (
    "clock",
    "cadence",
    "cms",
    "loader",
    "trained_seconds",
    "evaluated_tokens",
    "spikes",
    "streams",
)


def test_a_checkpoint_that_lacks_something_is_refused_in_one_line(
    straight: RunConfig, tmp_path: Path
) -> None:
    """With right checksums: left out, of another kind, empty."""
    run = copy_of(straight, tmp_path)
    folder = store_of(run).newest()
    plain = json.loads((folder / "trainer.json").read_text())
    trainer = trainer_of(run)
    changes: list[dict[str, Any]] = []
    for key in NEEDED:
        changes.append({k: v for k, v in plain.items() if k != key})
        if isinstance(plain[key], dict):
            changes += [{**plain, key: value} for value in ([], "text", {}, None)]
    for changed in changes:
        (folder / "trainer.json").write_text(json.dumps(changed))
        _make_right(folder, folder / "trainer.json")
        with pytest.raises((CheckpointError, DataError)) as caught:
            trainer.resume()
        assert str(caught.value).count("\n") == 0
    trainer.loader.close()
