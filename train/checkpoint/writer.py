"""Writing a checkpoint: each rank its part, then the first one what makes it count.

    python -m train.checkpoint.writer MEMORY

is the process that does it beside training. It reads jobs, one JSON object a line, from its
standard input and the tensors' bytes from the memory of file descriptor MEMORY, which it shares
with the trainer. When its input ends without a word, the trainer has died: so does it, at once.

Ranks meet in the draft folder: each leaves a file that says what it wrote, and the first waits for
all of them. No process group is involved. Needs no torch.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from train.checkpoint import retention
from train.checkpoint.manifest import (
    MARKER,
    PLAIN,
    ManifestError,
    read_files,
    seal,
    write_marker,
)
from train.checkpoint.places import (
    Place,
    URLPath,
    as_place,
    checksum,
    checksum_of,
    flush_folder,
    identity,
    link,
    make_folder,
    read,
    remove,
    rename,
    write,
    write_at_once,
)
from train.signals import HANDLED

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class NewFile:
    """A file of tensors to write: safetensors header, then the tensors' bytes.

    tensors: entries of the manifest; the first byte after the header is `start` 0 in them.
    """

    name: str
    buffers: Sequence[bytes | memoryview]
    tensors: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Where a save goes. draft: the folder until it is whole; behind a URL it is `final`."""

    draft: Place
    final: Place
    rank: int
    ranks: int

    def part(self, rank: int) -> Place:
        """What a rank says when its part is written."""
        return self.draft / f"part-{rank:05d}.json"


def write_part(target: Target, files: Sequence[NewFile]) -> dict[str, int]:
    """Write this rank's files, and say so in the draft folder. Where that fails they are removed:
    others may need the place on the disk.

    A file that the checkpoint before the last has, by its checksum, is not written again: it is
    read back to see that it is good, and linked (behind a URL: referred to).
    """
    try:
        return _write_part(target, files)
    except BaseException:
        for file in files:
            attempt(partial(remove, target.draft / file.name))
        raise


def _write_part(target: Target, files: Sequence[NewFile]) -> dict[str, int]:
    make_folder(target.draft)
    known = _known_files(target.final.parent, {file.name for file in files}) if files else {}
    entries: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    written = reused = 0
    for file in files:
        length = sum(len(memoryview(buffer)) for buffer in file.buffers)
        digest = checksum_of(file.buffers)
        entry: dict[str, Any] = {"bytes": length, "xxh3_128": digest}
        old = known.get((digest, length))
        if old is not None and _reuse(old, target.draft / file.name, entry):
            reused += length
        else:
            write(target.draft / file.name, file.buffers)
            written += length
        entries[file.name] = entry
        for name, tensor in file.tensors.items():
            tensors[name] = tensor
    said = {"files": entries, "tensors": tensors, "written": written, "reused": reused}
    write_at_once(target.part(target.rank), json.dumps(said).encode())
    return {"written": written, "reused": reused}


def finish(
    target: Target,
    plain: dict[str, Any],
    rules: retention.Retention,
    entering: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """On the first rank: when every part is there, make the checkpoint count; then delete old ones.

    entering: told of "save-before-marker", "save-after-marker" and "delete" when they begin.
    Returns bytes written and reused, the names of what was deleted and why something was not: the
    checkpoint counts all the same.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    totals = {"written": 0, "reused": 0}
    for rank in range(target.ranks):
        while not target.part(rank).exists():
            time.sleep(POLL_SECONDS)
        said = json.loads(read(target.part(rank)))
        files |= said["files"]
        for name, entry in said["tensors"].items():
            there = tensors.setdefault(name, {**entry, "pieces": []})
            there["pieces"] += entry["pieces"]
        for key in totals:
            totals[key] += said[key]
    content = json.dumps(plain).encode()
    write(target.draft / PLAIN, [content])
    files[PLAIN] = {"bytes": len(content), "xxh3_128": checksum_of([content])}
    digest = seal(target.draft, files, tensors)
    for rank in range(target.ranks):
        remove(target.part(rank))
    flush_folder(target.draft)
    if target.draft != target.final:
        rename(target.draft, target.final)
    entering("save-before-marker")
    write_marker(target.final, digest)
    entering("save-after-marker")
    answer = attempt(lambda: retention.apply(target.final.parent, rules, entering))
    return {**totals, "deleted": answer.get("result", []), "undeleted": answer.get("error")}


def discard(target: Target) -> None:
    """Remove what a save that failed has left, on the first rank."""
    remove(target.draft)
    if not (target.final / MARKER).exists():
        remove(target.final)


def _known_files(folder: Place, own: set[str]) -> dict[tuple[str, int], Place]:
    """Files called as one of this rank's `own`, of the checkpoint before the last, by checksum and
    bytes: what has not moved since then has its content.

    None that the last one has too: it and the next one share no file, so that damage to one leaves
    the other. Nothing of other ranks or of older checkpoints is looked at: there may be thousands.
    """
    last: set[tuple[int, int] | str] | None = None
    for checkpoint in reversed(retention.complete(folder)):
        try:
            files = {name: e for name, e in read_files(checkpoint).items() if name in own}
            found = [(e, e.place(checkpoint, name)) for name, e in files.items()]
            identities = [identity(place) for _, place in found]
        except (ManifestError, OSError):
            continue
        if last is not None:
            return {
                (entry.xxh3_128, entry.bytes): place
                for (entry, place), one in zip(found, identities, strict=True)
                if one not in last
            }
        last = set(identities)
    return {}


def _reuse(old: Place, new: Place, entry: dict[str, Any]) -> bool:
    """Make an old file part of the new checkpoint, if it still is what its manifest says."""
    try:
        if checksum(old) != entry["xxh3_128"]:
            return False
        if isinstance(old, URLPath):
            if old.name != new.name:
                return False
            entry["folder"] = old.parent.name
            return True
        return link(old, new)
    except OSError:
        return False


def attempt(action: Callable[[], Any]) -> dict[str, Any]:
    """{"result": ...} of an action, or {"error": why it failed, in one line}.

    Whatever goes wrong with a save, training goes on.
    """
    try:
        return {"result": action()}
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return {"error": " ".join(f"{type(error).__name__}: {reason}{where}".split())}


def perform(job: dict[str, Any], memory: memoryview) -> None:
    """Do one job of the trainer's, and print an answer for each half of it."""
    target = Target(as_place(job["draft"]), as_place(job["final"]), job["rank"], job["ranks"])
    files = [
        NewFile(
            one["name"],
            [one["header"].encode("latin-1"), memory[one["start"] : one["start"] + one["bytes"]]],
            one["tensors"],
        )
        for one in job["files"]
    ]
    answer = attempt(lambda: write_part(target, files))
    print(json.dumps(answer), flush=True)
    if "error" in answer or job["rank"] != 0:
        return
    rules = retention.Retention(**job["rules"])
    answer = attempt(lambda: finish(target, job["plain"], rules))
    if "error" in answer:
        attempt(lambda: discard(target))
    print(json.dumps(answer), flush=True)


def main() -> None:
    """Serve jobs until told to stop; the signals that stop a run are the trainer's business."""
    for number in (*HANDLED, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # training comes first where cores are few
    descriptor = int(sys.argv[1])
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            jobs.put(json.loads(line))
        os._exit(1)  # the trainer is gone

    threading.Thread(target=listen, daemon=True).start()
    while "stop" not in (job := jobs.get()):
        length = os.fstat(descriptor).st_size
        if length == 0:
            perform(job, memoryview(b""))
            continue
        with (
            mmap.mmap(descriptor, length, prot=mmap.PROT_READ) as shared,
            memoryview(shared) as memory,
        ):
            perform(job, memory)
    os._exit(0)  # the listener still waits for a line


if __name__ == "__main__":
    main()
