"""Files that checkpoints share, since what is in them has not moved."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.train.checkpoint.states import PLAIN, assert_equal, state, store_in
from tests.train.checkpoint.test_store import BOTH
from train.checkpoint import places, writer
from train.checkpoint.manifest import MANIFEST, MARKER, damage, read_manifest


@BOTH
def test_what_has_not_moved_is_not_written_again(tmp_path: Path, asynchronous: bool) -> None:
    store = store_in(tmp_path, keep_last=3, asynchronous=asynchronous)
    moves: dict[str, int] = {"fast": 0, "0": 0, "1": 0}
    kept = {}
    for tokens in range(1, 7):
        moves["fast"] += 1
        moves["0"] += tokens % 2 == 0
        kept[tokens] = state(moves)
        store.save(tokens, kept[tokens], PLAIN)
        store.finish()
        # Never from the checkpoint before: level 0 has moved since the one before that.
        still = {"model-level1-00000.safetensors", "optimizer-level1-00000.safetensors"}
        files = read_manifest(store.newest()).files
        expected = sum(files[name].bytes for name in still) if tokens > 2 else 0
        assert store.report["reused"] == expected
        total = sum(entry.bytes for name, entry in files.items() if name != "trainer.json")
        assert store.report["written"] == total - expected
    assert [int(folder.name[-3:]) for folder in store.complete()] == [4, 5, 6]
    slow = [(f / "model-level1-00000.safetensors").stat().st_ino for f in store.complete()]
    assert slow[0] == slow[2] != slow[1]
    for folder, tokens in zip(store.complete(), (4, 5, 6), strict=True):
        assert_equal(store.tensors(folder), kept[tokens])


def test_a_save_looks_at_few_files_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks times checkpoints times the files of all ranks would be millions."""
    looked: list[object] = []
    real = writer.read_files, writer.identity
    monkeypatch.setattr(writer, "read_files", lambda one: looked.append(one) or real[0](one))
    monkeypatch.setattr(writer, "identity", lambda one: looked.append(one) or real[1](one))
    for tokens in range(1, 9):
        final = tmp_path / f"tokens-{tokens:015d}"
        for rank in range(4):
            looked.clear()
            target = writer.Target(tmp_path / ".saving", final, rank, 4)
            file = writer.NewFile(f"model-fast-{rank:05d}.safetensors", [b"not moved"], {})
            assert writer.write_part(target, [file])["reused"] == (9 if tokens > 2 else 0)
            assert len(looked) <= 4  # two manifests, and what they have of its own
        target = writer.Target(tmp_path / ".saving", final, 0, 4)
        writer.finish(target, {}, writer.retention.Retention(last=99))


@pytest.mark.parametrize("where", ["local", "url"])
def test_deleting_in_any_order_harms_no_other(tmp_path: Path, where: str) -> None:
    """One level moves at every save, one at every other, one never."""
    rng = random.Random(0)
    for trial in range(6):
        folder = f"memory://trial{trial}" if where == "url" else str(tmp_path / str(trial))
        store = store_in(folder, keep_last=99)
        kept = {}
        for tokens in range(1, 6):
            kept[tokens] = state({"fast": tokens, "0": tokens // 2})
            store.save(tokens, kept[tokens], PLAIN)
        assert store.report["reused"] > 0
        order = list(range(1, 6))
        rng.shuffle(order)
        for gone in order:
            doomed = next(f for f in store.complete() if int(f.name[-3:]) == gone)
            places.remove(doomed / MARKER)
            writer.retention.sweep(store.folder)
            del kept[gone]
            assert {int(folder.name[-3:]) for folder in store.complete()} == kept.keys()
            for folder in store.complete():
                assert damage(folder) is None
                assert_equal(store.tensors(folder), kept[int(folder.name[-3:])])
        assert places.names(store.folder) == []


@pytest.mark.parametrize("where", ["disk", "url"])
def test_a_damaged_file_is_not_reused(tmp_path: Path, where: str) -> None:
    folder = f"memory://damaged{os.getpid()}" if where == "url" else tmp_path
    store = store_in(folder, keep_last=3)
    store.save(1, state({"fast": 1}), PLAIN)
    victim = store.newest() / "model-level1-00000.safetensors"
    content = bytearray(places.read(victim))
    content[-1] ^= 1
    places.write(victim, [content])
    for tokens in (2, 3):
        store.save(tokens, state({"fast": tokens}), PLAIN)
    assert store.report["reused"] > 0
    assert damage(store.complete()[0]) is not None
    assert_equal(store.tensors(store.newest()), state({"fast": 3}))


@pytest.mark.parametrize("gone", [0, 3])
def test_a_damaged_file_leaves_the_checkpoint_before(tmp_path: Path, gone: int) -> None:
    """Whichever it is, of checkpoints that share what has not moved, and of which one may be
    missing."""
    store = store_in(tmp_path, keep_last=9)
    for tokens in range(1, 6):
        store.save(tokens, state({"fast": tokens}), PLAIN)
        if gone == tokens - 1 > 0:
            shutil.rmtree(store.complete()[-2])
    assert (store.report["reused"] > 0) == (gone == 0)  # else the last one has what the others have
    for victim in sorted(store.newest().glob("*.safetensors")):
        whole = victim.read_bytes()
        victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.warns(UserWarning, match="skipping damaged checkpoint"):
            assert store.newest().name.endswith("4")
        victim.write_bytes(whole)


def test_behind_a_url_nothing_that_may_be_referred_to_is_lost() -> None:
    store = store_in(f"memory://referred{os.getpid()}", keep_last=9)
    for tokens in (1, 2, 3):
        store.save(tokens, state({"fast": tokens}), PLAIN)
    first, second, third = store.complete()
    assert store.report["reused"] > 0
    whole = places.read(third / MANIFEST)
    places.remove(first / MARKER)
    there = places.names(first)
    places.write(third / MANIFEST, [b"damaged"])
    writer.retention.sweep(store.folder)
    assert places.names(first) == there
    places.write(third / MANIFEST, [whole])
    writer.retention.sweep(store.folder)
    assert damage(third) is None
    for file in places.names(second):  # cut short: nothing refers to it from now on
        if "-level" in file:
            places.write(second / file, [places.read(second / file)[:-1]])
    store.save(4, state({"fast": 4}), PLAIN)
    assert damage(store.complete()[-1]) is None
