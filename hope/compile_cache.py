"""What compilers make of our sources, kept for the next process.

It lies in `$XDG_CACHE_HOME/hope` (by default `~/.cache/hope`) under names that tell sources, flags
and target apart, so that machines may share the folder and nothing stale is ever loaded. A process
that is killed leaves nothing behind that counts; of those that start together one compiles and the
others wait for it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

_UNFINISHED = ".compiling-"
_DIGEST = hashlib.sha256().digest_size
T = TypeVar("T")


def key(flags: Iterable[str], sources: Iterable[bytes]) -> str:
    """A name for what `flags`, all that the compiler is told and what tells its target, make of
    `sources`."""
    contents = b"\0".join([repr(tuple(flags)).encode(), *sources])
    return hashlib.sha256(contents).hexdigest()[:16]


def kept(name: str, make: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """What `read` gives of the file `name`, written by `make` if there is none yet.

    make: compiles into the path that it is given, RuntimeError if it can't. read: OSError for a
    file that is damaged, which is made again. Where nothing can be kept (no home, a read-only or a
    full one), it is made for this process alone; also after a RuntimeError, which is all that a
    compiler's own full disk looks like. Raises RuntimeError or OSError as `make` did.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "hope"
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder / "lock"):
            for killed in folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(killed, ignore_errors=True)
            if (folder / name).exists():
                try:
                    return read(folder / name)
                except OSError:  # damaged
                    pass
            _make_whole(make, folder / name)
            return read(folder / name)
    except (OSError, RuntimeError) as error:
        with tempfile.TemporaryDirectory(prefix="hope-") as alone:
            try:
                make(Path(alone) / name)
            except RuntimeError:
                raise error from None
            return read(Path(alone) / name)


def kept_bytes(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, once: the same with its digest before it in the file.

    It compiles in memory, where the disk has no part in a failure: that, too, is asked for once.
    """

    @cache
    def outcome() -> bytes | RuntimeError:
        try:
            return make()
        except RuntimeError as error:
            return error

    def write(path: Path) -> None:
        code = outcome()
        if isinstance(code, RuntimeError):
            raise code
        path.write_bytes(hashlib.sha256(code).digest() + code)

    def read(path: Path) -> bytes:
        written = path.read_bytes()
        digest, code = written[:_DIGEST], written[_DIGEST:]
        if hashlib.sha256(code).digest() != digest:
            raise OSError(f"{path} is damaged")
        return code

    return kept(name, write, read)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process that holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        raise OSError("this system has no file locks") from None
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_whole(make: Callable[[Path], None], target: Path) -> None:
    """Make a file beside `target` and rename it."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_UNFINISHED) as folder:
        make(Path(folder) / target.name)
        os.replace(Path(folder) / target.name, target)
