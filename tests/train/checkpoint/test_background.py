"""The memory that is shared with the process that writes, as a GPU's runtime is told of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from train.checkpoint.background import BackgroundWriter, Save, SharedMemory
from train.checkpoint.pieces import FilePlan
from train.checkpoint.retention import Retention
from train.checkpoint.writer import Target


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
