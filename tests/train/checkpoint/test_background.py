"""The process that writes beside training, and the memory it shares, as a GPU is told of it."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.train.checkpoint.states import PLAIN, state, store_in
from train.checkpoint import SaveError
from train.checkpoint.background import BackgroundWriter, Save, SharedMemory
from train.checkpoint.manifest import damage
from train.checkpoint.pieces import FilePlan
from train.checkpoint.retention import Retention
from train.checkpoint.writer import Target
from train.signals import HANDLED


def test_what_is_unmapped_is_pinned_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that are mapped anew must not be taken for memory that is pinned already: copies
    would go to pages that nobody reads."""
    pinned: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        others = pinned.items()
        assert not any(a < address + size and address < a + length for a, length in others)
        pinned[address] = size
        return 0

    def unregister(address: int) -> int:
        del pinned[address]
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    shared = SharedMemory()
    for size in (5000, 3000, 70_000, 90_000):
        for name in ("one", "two"):
            _, memory = shared.region(name, size)
            assert memory.numel() == size
    assert sorted(pinned.values()) == [90_000, 90_000]
    del memory
    shared.close()
    assert pinned == {}


def test_copies_from_a_gpu_are_done_before_anybody_writes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    happened: list[str] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *region: 0, cudaHostUnregister=lambda address: 0
    )
    stream = SimpleNamespace(synchronize=lambda: happened.append("done"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    writer = BackgroundWriter()
    copy = writer._copy
    monkeypatch.setattr(writer, "_copy", lambda *a: (happened.append("copied"), copy(*a))[1])
    monkeypatch.setattr(writer, "_send", lambda job, descriptor: happened.append("sent"))
    plans = [FilePlan(name, b"", {}, [torch.ones(3)]) for name in ("one", "two")]
    target = Target(tmp_path / "draft", tmp_path / "final", 0, 1)
    writer.start(Save(target, plans, {}, Retention()))
    writer.close()
    assert happened == ["copied", "copied", "done", "sent"]


def test_the_writer_killed_is_a_save_that_failed(tmp_path: Path) -> None:
    store = store_in(tmp_path, asynchronous=True)
    store.save(1, state(), PLAIN)
    store.finish()
    store.save(2, {"model/w": torch.zeros(20_000_000)}, PLAIN)
    store._writer._process.kill()  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="the process that writes checkpoints ended"):
        assert store.wait() is None
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-000000000000001"]
    store.save(3, state(), PLAIN)
    store.finish()
    assert len(store.complete()) == 2
    process = store._writer._process  # type: ignore[attr-defined]
    assert os.getsid(process.pid) != os.getsid(0)  # Ctrl-C is for the trainer
    process.kill()
    process.wait()  # between two saves: the next one has a process of its own
    store.save(4, state({"fast": 1}), PLAIN)
    store.finish()
    assert store.newest().name == "tokens-000000000000004"


def test_a_last_save_that_failed_is_said_once(tmp_path: Path) -> None:
    """That training goes on, and the next save tries again, is then not so."""
    store = store_in(tmp_path, asynchronous=True)
    store.save(1, {"model/w": torch.zeros(20_000_000)}, PLAIN)
    store._writer._process.kill()  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SaveError, match=r"tokens-0+1: .*the process that writes"):
            store.finish()
    assert list(tmp_path.iterdir()) == []


def test_signals_that_stop_a_run_do_not_stop_the_writer(tmp_path: Path) -> None:
    """Slurm sends them to every process of a job, this one too."""
    store = store_in(tmp_path, asynchronous=True)
    store.save(1, state(), PLAIN)
    store.finish()
    for tokens, number in enumerate((*HANDLED, signal.SIGHUP), start=2):
        store.save(tokens, {"model/w": torch.zeros(2_000_000)}, PLAIN)
        os.kill(store._writer._process.pid, number)  # type: ignore[attr-defined]
        store.finish()
        assert store.newest().name == f"tokens-{tokens:015d}"


def test_what_is_being_written_when_the_store_closes_counts(tmp_path: Path) -> None:
    store = store_in(tmp_path, asynchronous=True)
    folder = store.save(1, {"model/w": torch.zeros(5_000_000)}, PLAIN)
    store.close()
    assert store.complete() == [folder]
    assert damage(folder) is None


def test_a_copy_that_can_not_be_made_is_a_save_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    store = store_in(tmp_path, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", no_memory)
        store.save(1, state(), PLAIN)
    with pytest.warns(UserWarning, match="Cannot allocate memory; the next save, if any"):
        store.save(2, state(), PLAIN)
    store.finish()
    assert [folder.name[-1] for folder in store.complete()] == ["2"]
