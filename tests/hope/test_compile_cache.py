"""What compilers made is kept: made once, made again when damaged, made anyway without a place."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from hope.compile_cache import kept, kept_bytes, key


class Compiler:
    """Makes something, and counts how often."""

    def __init__(self, said: str = "", seconds: float = 0) -> None:
        self.said, self.seconds, self.calls = said, seconds, 0

    def __call__(self) -> bytes:
        self.calls += 1
        time.sleep(self.seconds)
        if self.said:
            raise RuntimeError(self.said)
        return b"code"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hope"


@pytest.mark.parametrize("damage", [b"", b"short", None], ids=["empty", "short", "one bit"])
def test_made_once_and_again_when_damaged(folder: Path, damage: bytes | None) -> None:
    compiler = Compiler()
    for _ in range(3):
        assert kept_bytes("one", compiler) == b"code"
    assert compiler.calls == 1
    whole = (folder / "one").read_bytes()
    (folder / "one").write_bytes(whole[:-1] + b"f" if damage is None else damage)
    assert kept_bytes("one", compiler) == b"code"
    assert compiler.calls == 2
    assert (folder / "one").read_bytes() == whole
    assert kept_bytes("other", compiler) == b"code"
    assert compiler.calls == 3
    assert {path.name for path in folder.iterdir()} == {"one", "other", "lock"}


def test_those_that_come_together_wait_for_one(folder: Path) -> None:
    compiler, got = Compiler(seconds=0.2), []
    threads = [
        threading.Thread(target=lambda: got.append(kept_bytes("one", compiler))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [b"code"] * 3
    assert compiler.calls == 1


def test_what_a_killed_one_left_does_not_count(folder: Path) -> None:
    left = folder / ".compiling-x1"
    left.mkdir(parents=True)
    (left / "one").write_bytes(b"half")
    assert kept_bytes("one", Compiler()) == b"code"
    assert not left.exists()


def test_a_compiler_that_fails_is_asked_once_and_leaves_nothing(folder: Path) -> None:
    compiler = Compiler("no such flag")
    with pytest.raises(RuntimeError, match=r"^no such flag$"):
        kept_bytes("one", compiler)
    assert compiler.calls == 1
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_without_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    where = []

    def make(path: Path) -> None:
        where.append(path)
        path.write_bytes(b"code")

    assert kept("one", make, Path.read_bytes) == b"code"
    assert not where[0].parent.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_compiled_is_not_compiled_again_for_want_of_a_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hope.compile_cache.os.replace", full)
    compiler = Compiler()
    assert kept_bytes("one", compiler) == b"code"
    assert compiler.calls == 1


def test_a_compiler_that_writes_by_itself_may_fail_for_want_of_a_place(folder: Path) -> None:
    def make(path: Path) -> None:
        if path.is_relative_to(folder):
            raise RuntimeError("c++: No space left on device")
        path.write_bytes(b"code")

    assert kept("one", make, Path.read_bytes) == b"code"


def test_another_name_for_other_flags_or_sources() -> None:
    names = {
        key(flags, sources)
        for flags in (["-O3"], ["-O3", "-g"], ["-O3 -g"])
        for sources in ([b"ab", b"c"], [b"a", b"bc"])
    }
    assert len(names) == 6
