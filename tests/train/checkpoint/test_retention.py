"""Which checkpoints stay: every rule by itself, together, and against a plain restatement."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.train.checkpoint.states import PLAIN, state, store_in
from train.checkpoint import CheckpointError, retention
from train.checkpoint.manifest import MARKER
from train.checkpoint.places import Place, remove
from train.checkpoint.retention import (
    TAG,
    Retention,
    apply,
    complete,
    metric,
    superfluous,
    sweep,
    tag,
)
from train.checkpoint.writer import attempt


def make(folder: Path, tokens: int, loss: float | None = None, generation: int = 0) -> Path:
    one = folder / (f"tokens-{tokens:015d}" + (f"-{generation}" if generation else ""))
    one.mkdir(parents=True)
    evaluation = None if loss is None else {"loss": loss}
    (one / "trainer.json").write_text(json.dumps({"evaluation": evaluation}))
    (one / MARKER).write_text("")
    return one


def kept(folder: Path, rules: Retention) -> list[int]:
    doomed = superfluous(complete(folder), rules)
    return [int(one.name[7:22]) for one in complete(folder) if one not in doomed]


def test_each_rule(tmp_path: Path) -> None:
    for tokens, loss in ((90, 5.0), (130, 3.0), (170, 3.0), (210, 4.0), (250, float("nan"))):
        make(tmp_path, tokens, loss)
    make(tmp_path, 290)
    assert kept(tmp_path, Retention(last=1)) == [290]
    assert kept(tmp_path, Retention(last=3)) == [210, 250, 290]
    assert kept(tmp_path, Retention(last=1, every_tokens=100)) == [130, 210, 290]
    assert kept(tmp_path, Retention(last=1, every_tokens=40)) == [90, 130, 170, 210, 250, 290]
    assert kept(tmp_path, Retention(last=1, best=1)) == [130, 290]  # the older of equal ones
    assert kept(tmp_path, Retention(last=1, best=3)) == [130, 170, 210, 290]
    assert kept(tmp_path, Retention(last=1, best=9)) == [90, 130, 170, 210, 290]
    (tmp_path / "tokens-000000000000090" / TAG).write_text("first")
    assert kept(tmp_path, Retention(last=1)) == [90, 290]
    assert tag(complete(tmp_path)[0]) == "first"
    assert metric(complete(tmp_path)[-1]) is metric(complete(tmp_path)[-2]) is None


def test_the_latest_of_one_token_count_replaces_the_others(tmp_path: Path) -> None:
    for generation in (0, 2, 10):
        make(tmp_path, 100, 1.0, generation)
    make(tmp_path, 50, 2.0)
    assert [one.name[-3:] for one in complete(tmp_path)] == ["050", "100", "0-2", "-10"]
    entered = []

    def entering(phase: str) -> None:
        entered.append((phase, [one.name[-3:] for one in complete(tmp_path)]))
        assert len(list(tmp_path.iterdir())) == 4  # only markers are gone

    assert apply(tmp_path, Retention(last=2), entering) == [
        "tokens-000000000000100",
        "tokens-000000000000100-2",
    ]
    assert [one.name[-3:] for one in complete(tmp_path)] == ["050", "-10"]
    assert apply(tmp_path, Retention(last=2), entering) == []
    assert entered == [("delete", ["050", "-10"])]


@pytest.mark.parametrize("seed", range(20))
def test_as_checkpoints_come(seed: int, tmp_path: Path) -> None:
    """After every save: the newest is there, and what the rules name among what there was."""
    rng = random.Random(seed)
    rules = Retention(rng.randint(1, 3), rng.choice([None, 30, 100]), rng.randint(0, 2))
    tokens, losses = 0, {}
    for _ in range(25):
        tokens += rng.randint(1, 40)
        losses[tokens] = rng.choice([1.0, 2.0, 3.0])
        make(tmp_path, tokens, losses[tokens])
        before = [int(one.name[7:]) for one in complete(tmp_path)]
        apply(tmp_path, rules)
        after = [int(one.name[7:]) for one in complete(tmp_path)]
        expected = set(before[-rules.last :])
        for multiple in range(1, 1 + tokens // (rules.every_tokens or tokens + 1)):
            low = multiple * (rules.every_tokens or 0)
            there = [t for t in before if low <= t < low + (rules.every_tokens or 0)]
            expected |= set(there[:1])
        expected |= set(sorted(before, key=lambda t: (losses[t], t))[: rules.best])
        assert after == sorted(expected)
        assert {path.name for path in tmp_path.iterdir()} == {
            one.name for one in complete(tmp_path)
        }


def test_what_is_left_of_a_dead_run_goes_and_nothing_else(tmp_path: Path) -> None:
    whole = make(tmp_path, 100)
    half = make(tmp_path, 200)
    (half / MARKER).unlink()
    (tmp_path / ".saving-tokens-000000000000300").mkdir()
    aside = make(tmp_path, 400).rename(tmp_path / "aside-tokens-000000000000400")
    (tmp_path / "notes.txt").write_text("mine")
    sweep(tmp_path)
    assert (tmp_path / ".saving-tokens-000000000000300").exists()  # perhaps under way
    sweep(tmp_path, drafts=True)
    assert sorted(tmp_path.iterdir()) == [aside, tmp_path / "notes.txt", whole]


def test_one_that_can_not_be_deleted_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS the folder of a file that somebody has open can't be removed."""

    def refuse(place: Place) -> None:
        if place == busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        remove(place)

    busy, *_, last = [make(tmp_path, tokens) for tokens in (1, 2, 3)]
    (tmp_path / ".saving-tokens-000000000000004").mkdir()
    monkeypatch.setattr(retention, "remove", refuse)
    with pytest.raises(OSError, match="busy"):
        apply(tmp_path, Retention(last=1))
    assert sorted(tmp_path.glob("tokens-*")) == [busy, last]
    shared = mmap.mmap(-1, 8)

    def save() -> None:
        view = memoryview(shared)
        assert "busy" in attempt(lambda: apply(tmp_path, Retention(last=1)))["error"]
        assert len(view) == 8

    save()
    shared.close()  # a frame that the error had kept would hold the view
    with pytest.raises(OSError, match="busy"):
        sweep(tmp_path, drafts=True)
    assert sorted(tmp_path.iterdir()) == [busy, last]


def test_a_save_counts_whatever_becomes_of_older_ones(tmp_path: Path) -> None:
    (make(tmp_path, 1) / TAG).mkdir()  # whether it may go can't be read
    store, told = store_in(tmp_path, keep_last=1), []
    store.on_complete = told.append
    with pytest.warns(UserWarning, match="supersedes can't be deleted: IsADirectoryError"):
        saved = store.save(2, state(), PLAIN)
    store.finish()
    assert told == [saved] == [store.newest()]


def test_one_that_can_not_be_looked_at_is_passed_over_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path, keep_last=9)
    first, locked = (store.save(tokens, state(), PLAIN) for tokens in (1, 2))

    def refuse(path: Path, **more: Any) -> Any:
        if path.is_relative_to(closed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return os.stat(path, **more)

    closed = locked
    monkeypatch.setattr(Path, "stat", refuse)
    sweep(tmp_path)
    with pytest.warns(UserWarning, match="skipping damaged checkpoint tokens-0+2: .*denied"):
        assert store.newest() == first
    monkeypatch.undo()
    assert store.newest() == locked
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"can't look under .*: NotADirectoryError"):
        store_in(tmp_path / "file").newest()
