"""The manifest of a checkpoint: its files with sizes and checksums, and where each tensor lies.

Everything that is read from it is checked before use: names stay in their folder, pieces of a
tensor lie inside their files, don't overlap, and make up the whole. Needs no torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from train.checkpoint.places import (
    Place,
    checksum,
    checksum_of,
    flush_folder,
    read,
    size,
    write,
    write_at_once,
)

FORMAT = 2
MANIFEST = "manifest.json"
MARKER = "COMPLETE"
PLAIN = "trainer.json"

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
"""Bytes of an element of each dtype, by the names of the safetensors format."""

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,199}")
_FOLDER_NAME = re.compile(r"tokens-(\d{15})(?:-(\d{1,9}))?")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_MOST = 1 << 48  # of any size, position or dimension

Shape = tuple[int, ...]


class ManifestError(ValueError):
    """A manifest that says something impossible; the message is a few words."""


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint; folder: the checkpoint beside this one that has it, if not this."""

    bytes: int
    xxh3_128: str
    folder: str | None = None

    def place(self, checkpoint: Place, name: str) -> Place:
        """Where the file lies."""
        return (checkpoint if self.folder is None else checkpoint.parent / self.folder) / name


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: from byte `start` of `file`, row by row, at `offset` in the whole."""

    file: str
    start: int
    offset: Shape
    shape: Shape


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the checkpoint, and the pieces that make it up."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """Files by name and tensors by name."""

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


def position(name: str) -> tuple[int, int] | None:
    """(tokens, generation) of a checkpoint's folder name; None for any other name."""
    match = _FOLDER_NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def seal(folder: Place, files: dict[str, Any], tensors: dict[str, Any]) -> str:
    """Write the manifest of plain data; returns its checksum, which is what the marker says."""
    content = json.dumps({"format": FORMAT, "files": files, "tensors": tensors}).encode()
    write(folder / MANIFEST, [content])
    return checksum_of([content])


def write_marker(folder: Place, manifest_checksum: str) -> None:
    """Declare the checkpoint complete: only now does it count."""
    flush_folder(folder.parent)
    write_at_once(folder / MARKER, f"{manifest_checksum}\n".encode())
    flush_folder(folder)


def read_manifest(folder: Place) -> Manifest:
    """The manifest of a checkpoint. Raises ManifestError, or OSError where it can't be read."""
    return parse_manifest(read(folder / MANIFEST))


def read_files(folder: Place) -> dict[str, FileEntry]:
    """The files of a checkpoint alone: to check what a thousand ranks have of tensors takes half a
    minute. Raises ManifestError, or OSError where the manifest can't be read."""
    return _files(_plain(read(folder / MANIFEST)))


def parse_manifest(content: bytes) -> Manifest:
    """Check a manifest's every word. Raises ManifestError."""
    raw = _plain(content)
    files = _files(raw)
    tensors = {
        name: _tensor(name, entry, files) for name, entry in _mapping(raw, "tensors").items()
    }
    _check_disjoint_bytes(tensors)
    return Manifest(files, tensors)


def _plain(content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST} is no JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = raw.get("format") if isinstance(raw, dict) else raw
        raise ManifestError(f"{MANIFEST} has format {got!r:.40}; this code reads {FORMAT}")
    return raw


def _files(raw: dict[str, Any]) -> dict[str, FileEntry]:
    files = {name: _file(name, entry) for name, entry in _mapping(raw, "files").items()}
    if PLAIN not in files:
        raise ManifestError(f"{MANIFEST} names no {PLAIN}")
    return files


def damage(folder: Place, rank: int = 0, ranks: int = 1) -> str | None:
    """Why the checkpoint can't be trusted, in a few words; None when what was looked at verifies.

    rank, ranks: look at every `ranks`-th of the files, from the `rank`-th on.
    """
    looked_at = MARKER
    try:
        marker = read(folder / MARKER)
        looked_at = MANIFEST
        content = read(folder / MANIFEST)
        if marker.decode("ascii", "replace").strip() != checksum_of([content]):
            return f"{MANIFEST} does not match the checksum in {MARKER}"
        for name, entry in sorted(parse_manifest(content).files.items())[rank::ranks]:
            looked_at = name
            file = entry.place(folder, name)
            if isinstance(file, Path) and file.is_symlink():
                return f"{name} is a link to somewhere else"
            if (found := size(file)) != entry.bytes:
                return f"{name} has {found} bytes, expected {entry.bytes}"
            if checksum(file) != entry.xxh3_128:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{looked_at} is missing"
    except ManifestError as error:
        return str(error)
    except OSError as error:
        return f"{looked_at} can't be read: {error.strerror or error}"
    return None


def _mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(raw.get(key), dict):
        raise ManifestError(f"{MANIFEST}: {key!r} is no mapping")
    found: dict[str, Any] = raw[key]
    return found


def _file(name: str, raw: Any) -> FileEntry:
    where = f"{MANIFEST}: file {name!r:.80}"
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise ManifestError(f"{where} has a name that is not allowed")
    if not isinstance(raw, dict) or not raw.keys() <= {"bytes", "xxh3_128", "folder"}:
        raise ManifestError(f"{where} is not described by bytes and xxh3_128")
    digest, folder = raw.get("xxh3_128"), raw.get("folder")
    if not isinstance(digest, str) or not _CHECKSUM.fullmatch(digest):
        raise ManifestError(f"{where} has no checksum")
    if folder is not None and (not isinstance(folder, str) or position(folder) is None):
        raise ManifestError(f"{where} lies in {folder!r:.80}, which is no checkpoint's name")
    return FileEntry(_count(raw.get("bytes"), where), digest, folder)


def _tensor(name: str, raw: Any, files: dict[str, FileEntry]) -> TensorEntry:
    where = f"{MANIFEST}: tensor {name!r:.80}"
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "pieces"}:
        raise ManifestError(f"{where} is not described by dtype, shape and pieces")
    dtype, shape = raw["dtype"], _shape(raw["shape"], where)
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ManifestError(f"{where} has the unknown dtype {dtype!r:.40}")
    if not isinstance(raw["pieces"], list):
        raise ManifestError(f"{where} has no list of pieces")
    pieces = []
    for one in raw["pieces"]:
        if not isinstance(one, list) or len(one) != 4:
            raise ManifestError(f"{where} has a piece that is not [file, start, offset, shape]")
        piece = Piece(one[0], _count(one[1], where), _shape(one[2], where), _shape(one[3], where))
        if not isinstance(piece.file, str) or piece.file not in files or piece.file == PLAIN:
            raise ManifestError(f"{where} has a piece in the unknown file {piece.file!r:.80}")
        if not len(piece.offset) == len(piece.shape) == len(shape) or any(
            first + length > most
            for first, length, most in zip(piece.offset, piece.shape, shape, strict=True)
        ):
            raise ManifestError(f"{where} has a piece that lies outside of it")
        if piece.start + prod(piece.shape) * ITEM_BYTES[dtype] > files[piece.file].bytes:
            raise ManifestError(f"{where} has a piece that ends behind {piece.file}")
        pieces.append(piece)
    if sum(prod(piece.shape) for piece in pieces) != prod(shape) or not pieces:
        raise ManifestError(f"{where} is not made up by its pieces")
    _check_disjoint(pieces, where)
    return TensorEntry(dtype, shape, tuple(pieces))


def _check_disjoint(pieces: list[Piece], where: str) -> None:
    """Sweep along the dimension with most cuts, so that few pieces are compared with one another.

    Pieces of the right total that do not overlap make up the whole.
    """
    rank = len(pieces[0].offset)
    if len(pieces) == 1:
        return
    if rank == 0:
        raise ManifestError(f"{where} has pieces that overlap")
    axis = max(range(rank), key=lambda axis: len({piece.offset[axis] for piece in pieces}))
    active: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.offset[axis]):
        here = piece.offset[axis]
        active = [one for one in active if one.offset[axis] + one.shape[axis] > here]
        for one in active:
            if all(
                max(a, b) < min(a + la, b + lb)
                for a, la, b, lb in zip(
                    one.offset, one.shape, piece.offset, piece.shape, strict=True
                )
            ):
                raise ManifestError(f"{where} has pieces that overlap")
        active.append(piece)


def _check_disjoint_bytes(tensors: dict[str, TensorEntry]) -> None:
    """No byte belongs to two pieces, so that what is read is never more than the files hold."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for entry in tensors.values():
        for piece in entry.pieces:
            end = piece.start + prod(piece.shape) * ITEM_BYTES[entry.dtype]
            spans.setdefault(piece.file, []).append((piece.start, end))
    for file, found in spans.items():
        found.sort()
        if any(end > start for (_, end), (start, _) in pairwise(found)):
            raise ManifestError(f"{MANIFEST}: pieces in {file} overlap")


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise ManifestError(f"{where} has the impossible size or position {value!r:.40}")
    return value


def _shape(value: Any, where: str) -> Shape:
    if not isinstance(value, list) or len(value) > 16:
        raise ManifestError(f"{where} has the impossible shape {value!r:.40}")
    shape = tuple(_count(one, where) for one in value)
    if prod(shape) > _MOST:
        raise ManifestError(f"{where} has the impossible shape {value!r:.40}")
    return shape
