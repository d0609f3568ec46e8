"""A store on one rank: what is saved is what is loaded, whatever goes wrong in between."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem
from torch import Tensor

from tests.train.checkpoint.states import PLAIN, assert_equal, state, store_in
from train.checkpoint import CheckpointError, SaveError, places
from train.checkpoint.manifest import ITEM_BYTES, MARKER, damage, read_manifest
from train.checkpoint.pieces import DTYPES

BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@BOTH
def test_every_dtype_and_shape_comes_back(tmp_path: Path, asynchronous: bool) -> None:
    tensors: dict[str, Tensor] = {}
    for number, dtype in enumerate(DTYPES.values()):
        for shape in ((), (1,), (0,), (3, 0, 2), (5, 7), (2, 3, 4)):
            content = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(number))
            tensors[f"model/{dtype}{list(shape)}"] = content.to(dtype)
    tensors["model/transposed"] = torch.randn(4, 6).t()
    tensors["model/strided"] = torch.randn(8, 6)[::2, 1:]
    tensors["model/nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    store = store_in(tmp_path, asynchronous=asynchronous)
    store.save(5, tensors, {"a": [1, None, "x"]})
    store.finish()
    folder = store.newest()
    assert folder == tmp_path / "tokens-000000000000005"
    found = store.tensors(folder)
    assert list(found) == sorted(tensors)
    nan, expected = found.pop("model/nan"), tensors.pop("model/nan")
    assert torch.equal(nan.view(torch.int32), expected.view(torch.int32))  # to the bit
    assert_equal(found, tensors)
    assert store.plain(folder) == {"a": [1, None, "x"]}
    assert store.tensors(folder, "model/str").keys() == {"model/strided"}
    for entry in read_manifest(folder).tensors.values():  # whoever maps a file finds them aligned
        assert all(piece.start % ITEM_BYTES[entry.dtype] == 0 for piece in entry.pieces)


def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    """Training goes on in the same tensors at once."""
    store = store_in(tmp_path, asynchronous=True, keep_last=9)
    tensors, kept = state(), []
    for tokens in range(1, 5):
        kept.append({name: tensor.clone() for name, tensor in tensors.items()})
        store.save(tokens, tensors, PLAIN)
        for tensor in tensors.values():
            tensor.mul_(1.5).add_(1)
    store.finish()
    for folder, expected in zip(store.complete(), kept, strict=True):
        assert damage(folder) is None
        assert_equal(store.tensors(folder), expected)


def test_updates_that_torch_does_not_count_are_saved(tmp_path: Path) -> None:
    """Its fused AdamW leaves version counters alone; a copy must not be trusted to them."""
    parameter = torch.nn.Parameter(torch.ones(64))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    store = store_in(tmp_path, asynchronous=True)
    for tokens in (1, 2, 3):
        parameter.grad = torch.ones(64)
        optimizer.step()
        store.save(tokens, {"model/cms.levels.0.w": parameter.detach()}, PLAIN)
        store.wait()
        assert_equal(store.tensors(store.newest()), {"model/cms.levels.0.w": parameter.detach()})


def test_a_full_disk_harms_nothing_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write of a save in turn, half of the file being there."""
    store = store_in(tmp_path / "checkpoints", keep_last=1)
    first, second = state(), state({"fast": 2})
    store.save(1, first, PLAIN)
    real, left = places.write, [0]

    def write(file: Any, buffers: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(file, buffers)

    for module in ("places", "writer", "manifest"):
        monkeypatch.setattr(f"train.checkpoint.{module}.write", write)
    # Parameters and moments of three levels, accumulators, carried rows; the four of a checkpoint.
    writes = 3 + 3 + 1 + 1 + len(["part-00000.json", "trainer.json", "manifest.json", "COMPLETE"])
    for fail_at in range(1, writes + 1):
        left[0] = fail_at
        with pytest.warns(UserWarning, match="tokens-0+2: OSError: No space left on device"):
            assert store.save(2, second, PLAIN) is None
        assert_equal(store.tensors(store.newest()), first)
        assert [path.name for path in tmp_path.glob("*/*")] == ["tokens-000000000000001"]
        with pytest.raises(SaveError, match="No space left on device"):
            store.finish()
    left[0] = writes + 1
    store.save(2, second, PLAIN)
    store.finish()
    assert left[0] == 1
    assert_equal(store.tensors(store.newest()), second)
    assert [path.name for path in tmp_path.glob("*/*")] == ["tokens-000000000000002"]


def test_the_process_that_writes_meets_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the size of files: an error of the system's own, of which training hears later. What was
    written is gone by then."""
    store = store_in(tmp_path / "checkpoints", asynchronous=True)
    monkeypatch.setattr("train.checkpoint.background.sys.executable", str(_limited(tmp_path)))
    assert store.save(2, {"model/big": torch.randn(100_000)}, PLAIN) is not None
    answer = store._writer.part()
    assert "error" in answer
    assert [path for path in tmp_path.glob("*/*/*") if path.is_file()] == []
    monkeypatch.setattr(store._writer, "part", lambda: answer)
    with pytest.warns(UserWarning, match="tokens-0+2: OSError: File too large"):
        assert store.wait() is None
    assert list(tmp_path.glob("*/*")) == []
    monkeypatch.undo()
    store.close()
    store.save(3, {"model/big": torch.randn(100_000)}, PLAIN)
    store.finish()
    assert damage(store.newest()) is None


def _limited(tmp_path: Path) -> Path:
    script = tmp_path / "limited"
    script.write_text(f'#!/bin/sh\nulimit -f 8\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def test_a_last_save_that_fails_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = store_in(tmp_path / "file" / "checkpoints")
    with pytest.warns(UserWarning, match="Not a directory"):
        assert store.save(1, state(), PLAIN) is None
    with pytest.raises(SaveError, match="the last checkpoint could not be written"):
        store.finish()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="files have no names here")
def test_what_a_marker_stands_for_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, then their names, the folder's own, and the marker: in this order at a power cut."""
    flushed: list[str] = []
    flush = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    folder = store_in(tmp_path / "run").save(1, state(), PLAIN)
    names = flushed.index(f".saving-{folder.name}")
    assert {path.name for path in folder.iterdir()} - {MARKER} <= set(flushed[:names])
    assert flushed[names + 1 :] == ["run", f"writing-{MARKER}", folder.name]


TRAINER = """
import sys, torch
from tests.train.checkpoint.states import store_in
store = store_in(sys.argv[1], asynchronous=True, keep_last=9)
for tokens in range(1, 1000):
    print(tokens, flush=True)
    store.save(tokens, {"model/w": torch.full((500_000,), float(tokens))}, {})
"""


def test_kill_9_at_any_point_leaves_what_was_complete(tmp_path: Path) -> None:
    """And the process that wrote beside the trainer goes with it."""
    rng = random.Random(1)
    for trial in range(2):
        folder = tmp_path / str(trial)
        trainer = subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert trainer.stdout is not None
        while int(trainer.stdout.readline()) < 3:
            pass
        time.sleep(rng.random() * 0.2)
        trainer.kill()
        trainer.wait()
        before = _settled(folder)
        store = store_in(folder, keep_last=9)
        for one in store.complete():
            assert damage(one) is None
            assert store.tensors(one)["model/w"].unique().tolist() == [int(one.name[7:])]
        assert len(store.complete()) >= 1
        store.clean()
        assert {path.name for path in folder.iterdir()} == {p.name for p in store.complete()}
        assert before >= {path.name for path in folder.iterdir()}


def _settled(folder: Path) -> set[str]:
    """What lies in the folder when nobody writes any more."""
    seen: set[str] = set()
    for _ in range(100):
        now = {str(path) for path in folder.rglob("*")}
        if now == seen:
            break
        seen = now
        time.sleep(0.2)
    return {path.name for path in folder.iterdir()}


def test_one_that_is_there_stays_unless_it_is_damaged_or_replaced(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    first, second, third = state(), state({"fast": 2}), state({"fast": 3})
    folder = store.save(1, first, PLAIN)
    assert store.save(1, second, PLAIN) == folder
    assert_equal(store.tensors(store.newest()), first)
    replaced = store.save(1, second, PLAIN, replace=True)
    assert (replaced.name, folder.exists()) == (f"{folder.name}-1", False)
    assert_equal(store.tensors(store.newest()), second)
    (replaced / "trainer.json").write_text("{}")
    assert store.save(1, third, PLAIN).name == f"{folder.name}-2"
    assert_equal(store.tensors(store.newest()), third)
    assert len(list(tmp_path.iterdir())) == 1


def test_asked_for_by_name(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=9)
    for tokens in (1, 2, 3):
        store.save(tokens, state({"fast": tokens}), PLAIN)
    assert store.find("tokens-000000000000002") == store.complete()[1]
    with pytest.raises(CheckpointError, match="no checkpoint 'tokens-4'"):
        store.find("tokens-4")
    with pytest.raises(CheckpointError, match=r"no checkpoint '\.\./x'"):
        store.find("../x")
    (store.complete()[1] / "trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"trainer.json has 2 bytes, expected"):
        store.find("tokens-000000000000002")


def test_a_run_that_goes_back_does_not_find_its_other_future(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=9)
    for tokens in (1, 2, 3):
        store.save(tokens, state({"fast": tokens}), PLAIN)
    assert store.rewind_to(store.complete()[0]) == [f"tokens-{n:015d}" for n in (2, 3)]
    assert store.newest() == store.complete()[-1] == tmp_path / "tokens-000000000000001"
    assert (tmp_path / "aside-tokens-000000000000003" / MARKER).exists()
    other = state({"fast": 9})
    store.save(2, other, PLAIN)
    assert_equal(store.tensors(store.newest()), other)
    assert store.rewind_to(store.complete()[0]) == ["tokens-000000000000002"]  # once more
    assert store.still_there is None
    assert_equal(store.tensors(tmp_path / "aside-tokens-000000000000002"), other)


@BOTH
def test_urls(tmp_path: Path, asynchronous: bool) -> None:
    """Of any file system of fsspec's; the memory of this process is not another process's."""
    url = f"file://{tmp_path}/bucket" if asynchronous else f"memory://bucket{os.getpid()}"
    store = store_in(url, keep_last=2, asynchronous=asynchronous)
    with pytest.raises(CheckpointError, match="there is none"):
        store.newest()
    for tokens in (1, 2, 3, 4):
        store.save(tokens, state({"fast": tokens}), PLAIN)
        store.finish()
    assert [f.name[-1] for f in store.complete()] == ["3", "4"]
    assert store.report["reused"] > 0
    assert str(store.newest()) == f"{url}/tokens-000000000000004"
    found = store.tensors(store.newest(), "model/")
    assert_equal(found, {k: v for k, v in state({"fast": 4}).items() if k.startswith("model/")})
    # The first one has lost its marker, but keeps what later ones refer to.
    assert places.names(store.folder / "tokens-000000000000001") == [
        f"{kind}-level{n}-00000.safetensors" for kind in ("model", "optimizer") for n in (0, 1)
    ]
    places.remove(store.newest() / "trainer.json")
    with pytest.warns(UserWarning, match="trainer.json is missing"):
        assert store.newest().name == "tokens-000000000000003"


def test_a_url_that_does_not_answer_loses_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's `exists` takes any error for a no, and what has no marker is deleted."""

    def info(self: Any, path: str, **more: Any) -> Any:
        if "002/COMPLETE" in path:
            raise TimeoutError("no answer")
        return known(self, path, **more)

    store = store_in(f"memory://silent{os.getpid()}", keep_last=3)
    for tokens in (1, 2, 3):
        store.save(tokens, state({"fast": tokens}), PLAIN)
    known = MemoryFileSystem.info
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "info", info)
        patch.setattr(MemoryFileSystem, "exists", AbstractFileSystem.exists)
        store.save(4, state({"fast": 4}), PLAIN)
    assert [folder.name[-1] for folder in store.complete()] == ["2", "3", "4"]
    assert damage(store.folder / "tokens-000000000000002") is None


def test_a_url_that_nothing_reads_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="can't use nosuch://x"):
        store_in("nosuch://x/y").newest()


def test_the_process_that_writes_needs_no_torch() -> None:
    code = "import sys, train.checkpoint.writer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = store_in(tmp_path)
    for tokens in (1, 2, 3):
        store.save(tokens, state(), PLAIN)
    assert store.report["reused"] == 0
    shutil.rmtree(store.complete()[0])
    assert damage(store.newest()) is None
