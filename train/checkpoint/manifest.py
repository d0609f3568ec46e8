"""The files of a checkpoint with their sizes and checksums, so that damage is seen before use."""

from __future__ import annotations

import json
import os
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"
MARKER = "COMPLETE"


def write_manifest(folder: Path) -> None:
    """Write manifest.json over every other file of `folder`, and flush all of them to disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)}
        _fsync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": files}, indent=1))
    _fsync(manifest)


def write_marker(folder: Path) -> None:
    """Declare the checkpoint complete: only now does it count."""
    marker = folder / MARKER
    marker.write_text(_checksum(folder / MANIFEST) + "\n")
    _fsync(marker)
    _fsync(folder)
    _fsync(folder.parent)


def damage(folder: Path) -> str | None:
    """Why the checkpoint can't be trusted, in a few words; None when every file verifies."""
    try:
        if (folder / MARKER).read_text().strip() != _checksum(folder / MANIFEST):
            return f"{MANIFEST} does not match the checksum in {MARKER}"
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
            if _checksum(path) != expected["xxh3_128"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} can't be read: {error}"
    return None


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
