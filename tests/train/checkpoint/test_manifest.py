"""Damage of every kind is seen, and a manifest that lies is refused, even with right checksums."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutations import mutations
from tests.train.checkpoint.states import PLAIN, assert_equal, state, store_in
from train.checkpoint import CheckpointError
from train.checkpoint.manifest import (
    MANIFEST,
    MARKER,
    ManifestError,
    damage,
    parse_manifest,
)
from train.checkpoint.places import checksum, checksum_of, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return store_in(tmp_path / "checkpoints").save(1, state(), PLAIN)


def test_a_flipped_byte_anywhere_is_seen(folder: Path) -> None:
    """In every file: the first, the last, and 12 others of each."""
    rng = random.Random(0)
    assert damage(folder) is None
    for path in folder.iterdir():
        content = path.read_bytes()
        places = {0, len(content) - 1, *rng.choices(range(len(content)), k=12)}
        for place in places - ({len(content) - 1} if path.name == MARKER else set()):
            changed = bytearray(content)
            changed[place] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            assert damage(folder) is not None, (path.name, place)
        path.write_bytes(content)
    assert damage(folder) is None


def test_a_cut_or_missing_file_is_seen(folder: Path) -> None:
    for path in list(folder.iterdir()):
        content = path.read_bytes()
        for length in (0, 1, len(content) // 2):
            path.write_bytes(content[:length])
            assert damage(folder) is not None, path.name
        path.write_bytes(content + b"x")
        assert path.name == MARKER or damage(folder) is not None, path.name
        path.unlink()
        assert damage(folder) == f"{path.name} is missing"
        path.mkdir()
        assert damage(folder) is not None
        path.rmdir()
        path.write_bytes(content)
    assert damage(folder) is None


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    victim = folder / "model-fast-00000.safetensors"
    outside = tmp_path / "outside"
    victim.rename(outside)
    victim.symlink_to(outside)
    assert damage(folder) == f"{victim.name} is a link to somewhere else"


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    for name in (MARKER, MANIFEST, "TAG"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(OSError, match="it is a pipe"):
            read(folder / name)
    assert damage(folder) == f"{MARKER} can't be read: it is a pipe and no file"


def test_ranks_look_at_shares_that_make_up_the_whole(folder: Path) -> None:
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(b"\xff" + content[1:])
        assert sum(damage(folder, rank, 3) is not None for rank in range(3)) >= 1
        path.write_bytes(content)


Change = Callable[[dict[str, Any]], object]
FILE = "model-fast-00000.safetensors"
NAME = "model/layers.0.mixer.w"


def piece(raw: dict[str, Any]) -> list[Any]:
    found: list[Any] = raw["tensors"][NAME]["pieces"][0]
    return found


def moved_file(raw: dict[str, Any], name: str) -> None:
    raw["files"][name] = raw["files"].pop(FILE)
    piece(raw)[0] = name


LIES: list[tuple[str, Change, str]] = [
    ("format", lambda raw: raw.update(format=1), "has format 1"),
    ("no_files", lambda raw: raw.pop("files"), "'files' is no mapping"),
    ("tensors", lambda raw: raw.update(tensors=[]), "'tensors' is no mapping"),
    ("no_plain", lambda raw: raw["files"].pop("trainer.json"), "names no trainer.json"),
    ("parent", lambda raw: moved_file(raw, "../../x"), "a name that is not allowed"),
    ("absolute", lambda raw: moved_file(raw, "/etc/passwd"), "a name that is not allowed"),
    ("hidden", lambda raw: moved_file(raw, ".x"), "a name that is not allowed"),
    ("separator", lambda raw: moved_file(raw, "a\\b"), "a name that is not allowed"),
    ("nul", lambda raw: moved_file(raw, "a\0b"), "a name that is not allowed"),
    ("newline", lambda raw: moved_file(raw, "model\n"), "a name that is not allowed"),
    ("itself", lambda raw: moved_file(raw, MANIFEST), "a name that is not allowed"),
    ("elsewhere", lambda raw: raw["files"][FILE].update(folder="../.."), "no checkpoint's name"),
    ("size", lambda raw: raw["files"][FILE].update(bytes=-1), "impossible size or position -1"),
    ("huge", lambda raw: raw["files"][FILE].update(bytes=10**30), "impossible size or position"),
    ("true", lambda raw: raw["files"][FILE].update(bytes=True), "impossible size or position True"),
    ("checksum", lambda raw: raw["files"][FILE].update(xxh3_128="0"), "has no checksum"),
    ("sum", lambda raw: raw["files"][FILE].update(xxh3_128=0), "has no checksum"),
    ("place", lambda raw: raw["files"][FILE].update(folder=0), "no checkpoint's name"),
    ("dtype", lambda raw: raw["tensors"][NAME].update(dtype="object"), "unknown dtype 'object'"),
    ("shape", lambda raw: raw["tensors"][NAME].update(shape=[6, 6]), "not made up by its pieces"),
    ("none", lambda raw: raw["tensors"][NAME].update(pieces=[]), "not made up by its pieces"),
    ("start", lambda raw: piece(raw).__setitem__(1, 10**6), "a piece that ends behind"),
    ("minus", lambda raw: piece(raw).__setitem__(1, -8), "impossible size or position -8"),
    ("offset", lambda raw: piece(raw).__setitem__(2, [1, 0]), "a piece that lies outside of it"),
    ("rank", lambda raw: piece(raw).__setitem__(2, [0]), "a piece that lies outside of it"),
    ("file", lambda raw: piece(raw).__setitem__(0, "x"), "a piece in the unknown file 'x'"),
    ("plain", lambda raw: piece(raw).__setitem__(0, "trainer.json"), "a piece in the unknown file"),
    (
        "twice",
        lambda raw: raw["tensors"][NAME].update(
            pieces=[[FILE, 8, [0, 0], [3, 5]], [FILE, 80, [0, 0], [3, 5]]]
        ),
        "has pieces that overlap",
    ),
    (
        "columns",
        lambda raw: raw["tensors"][NAME].update(
            pieces=[[FILE, 8, [0, 0], [6, 2]], [FILE, 80, [0, 1], [6, 3]]]
        ),
        "has pieces that overlap",
    ),
    (
        "shared",
        lambda raw: raw["tensors"].update(other=json.loads(json.dumps(raw["tensors"][NAME]))),
        f"pieces in {FILE} overlap",
    ),
]


@pytest.mark.parametrize(("change", "reason"), [lie[1:] for lie in LIES], ids=[x[0] for x in LIES])
def test_a_manifest_that_lies_with_right_checksums(
    folder: Path, change: Change, reason: str
) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    content = json.dumps(raw).encode()
    with pytest.raises(ManifestError) as caught:
        parse_manifest(content)
    assert reason in str(caught.value)
    reseal(folder, content)
    found = damage(folder)
    assert found is not None
    assert reason in found
    with pytest.raises(CheckpointError, match="can't be read"):
        store_in(folder.parent).tensors(folder)


def reseal(folder: Path, manifest: bytes) -> None:
    """As someone would who can write checksums too."""
    (folder / MANIFEST).write_bytes(manifest)
    (folder / MARKER).write_text(checksum_of([manifest]) + "\n")


def fuzz(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Mutate files of a checkpoint, half of the time with every checksum made right again.

    Each time: an error of ours, or tensors that are as they were, unless their own bytes changed.
    """
    rng = random.Random(seed)
    store = store_in(folder.parent)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    expected = store.tensors(folder)
    outcomes = {"refused": 0, "unchanged": 0, "accepted": 0}
    paths = sorted(before)
    for number in range(count):
        path = rng.choice([folder / MANIFEST, *paths])
        changed = next(mutations(before[path], rng, 1))
        path.write_bytes(changed)
        sealed = number % 2 == 1 and path.name != MARKER
        if sealed:
            _make_right(folder, path)
        reason = damage(folder)
        try:
            found: dict[str, Tensor] | None = store.tensors(folder)
            store.plain(folder)
        except CheckpointError as error:
            assert "\n" not in str(error).strip()  # noqa: PT017
            found = None
        if reason is not None or found is None:
            outcomes["refused"] += 1
        elif changed == before[path]:
            outcomes["unchanged"] += 1
        else:
            # A marker may end in other blanks; what is sealed holds what it says.
            assert sealed or path.name == MARKER, path.name
            outcomes["accepted"] += 1
            assert all(isinstance(tensor, Tensor) for tensor in found.values())
        if not sealed and reason is None and found is not None:
            assert_equal(found, expected)
        for one in folder.iterdir():
            if one not in before:
                one.unlink()
        for one in (path, folder / MANIFEST, folder / MARKER):
            one.write_bytes(before[one])
    assert damage(folder) is None
    return outcomes


def _make_right(folder: Path, path: Path) -> None:
    """Checksums and sizes as an attacker would leave them."""
    manifest = (folder / MANIFEST).read_bytes()
    if path.name != MANIFEST:
        raw = json.loads(manifest)
        raw["files"][path.name] = {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
        manifest = json.dumps(raw).encode()
    reseal(folder, manifest)


def test_mutations_are_errors_of_ours_or_change_nothing(folder: Path) -> None:
    outcomes = fuzz(folder, 200, seed=0)
    assert outcomes["refused"] > 100
    assert outcomes["accepted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_mutations(folder: Path, seed: int) -> None:
    outcomes = fuzz(folder, 1000, seed)
    assert outcomes["refused"] > 500


def test_nothing_runs_when_a_checkpoint_is_read(folder: Path, tmp_path: Path) -> None:
    """A pickle in the place of a file is bytes like any other."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for path in list(folder.iterdir()):
        content = path.read_bytes()
        torch.save(Trap(), path)
        if path.name not in (MARKER, MANIFEST):
            _make_right(folder, path)
        store = store_in(folder.parent)
        damage(folder)
        try:
            store.tensors(folder)
            store.plain(folder)
        except CheckpointError:
            pass
        path.write_bytes(content)
    assert not (tmp_path / "ran").exists()
    torch.save(Trap(), tmp_path / "trap")
    torch.load(tmp_path / "trap", weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works
