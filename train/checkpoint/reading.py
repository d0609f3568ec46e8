"""Tensors of a checkpoint, whole or in the blocks that a rank needs, whatever saved them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.errors import CheckpointError
from train.checkpoint.manifest import (
    ITEM_BYTES,
    PLAIN,
    Manifest,
    ManifestError,
    Piece,
    Shape,
    TensorEntry,
    read_manifest,
)
from train.checkpoint.pieces import DTYPES
from train.checkpoint.places import Place, opened, read


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, not read yet; see `train.parallel.placement.Stored`."""

    reader: TensorReader
    name: str
    shape: torch.Size

    def block(self, offsets: Shape, sizes: Shape) -> Tensor:
        """The block of these sizes at these offsets, on the CPU."""
        return self.reader.block(self.name, offsets, sizes)


class TensorReader:
    """The tensors of one checkpoint. Raises CheckpointError where they can't be read."""

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        try:
            self.manifest: Manifest = read_manifest(folder)
        except (ManifestError, OSError) as error:
            raise CheckpointError(f"{folder} can't be read: {error}") from None

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that start with `prefix`, sorted."""
        return sorted(name for name in self.manifest.tensors if name.startswith(prefix))

    def whole(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        shape = self._entry(name).shape
        return self.block(name, (0,) * len(shape), shape)

    def block(self, name: str, offset: Shape, shape: Shape) -> Tensor:
        """The block of `shape` at `offset` of a tensor, on the CPU.

        Reads the rows of each piece that the block shares with it, and no others.
        """
        entry = self._entry(name)
        dtype = DTYPES[entry.dtype]
        block: Tensor | None = None
        for piece in entry.pieces:
            low = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, shape, piece.offset, piece.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            found = self._rows(piece, entry, low, high)
            if found.shape == torch.Size(shape):
                return found.contiguous()
            if block is None:
                block = torch.empty(shape, dtype=dtype)
            where = tuple(
                slice(a - mine, b - mine) for a, b, mine in zip(low, high, offset, strict=True)
            )
            block[where] = found
        return torch.empty(shape, dtype=dtype) if block is None else block

    def stored(self, name: str) -> StoredTensor:
        """A tensor that is read, whole or by blocks, when it is asked for."""
        return StoredTensor(self, name, torch.Size(self._entry(name).shape))

    def all_whole(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors whose names start with `prefix`, whole, on the CPU, whatever saved them."""
        return {name: self.whole(name) for name in self.names(prefix)}

    def all_stored(self, prefix: str = "") -> dict[str, StoredTensor]:
        """The same, read when they are asked for: of a tensor that is divided over ranks, each
        reads its block."""
        return {name: self.stored(name) for name in self.names(prefix)}

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}") from None

    def _rows(self, piece: Piece, entry: TensorEntry, low: list[int], high: list[int]) -> Tensor:
        """The block from `low` to `high`, in coordinates of the whole, out of one piece."""
        item = ITEM_BYTES[entry.dtype]
        if not piece.shape:
            return self._read(piece, entry, 0, item).reshape(())
        row = prod(piece.shape[1:]) * item
        first, end = low[0] - piece.offset[0], high[0] - piece.offset[0]
        rows = self._read(piece, entry, first * row, (end - first) * row)
        rows = rows.view(end - first, *piece.shape[1:])
        for axis in range(1, len(piece.shape)):
            rows = rows.narrow(axis, low[axis] - piece.offset[axis], high[axis] - low[axis])
        return rows

    def _read(self, piece: Piece, entry: TensorEntry, start: int, length: int) -> Tensor:
        """Elements that lie in `length` bytes from byte `start` of a piece."""
        file = self.manifest.files[piece.file].place(self.folder, piece.file)
        content = torch.empty(length, dtype=torch.uint8)
        view = content.numpy().data
        try:
            with opened(file) as stream:
                stream.seek(piece.start + start)
                done = 0
                while done < length:
                    count = stream.readinto(view[done:])  # type: ignore[attr-defined]
                    if not count:
                        raise CheckpointError(f"{file} ends early")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{file} can't be read: {error}") from None
        return content.view(DTYPES[entry.dtype])


def read_plain(folder: Place) -> dict[str, Any]:
    """Everything of a checkpoint that is not a tensor. Raises CheckpointError."""
    try:
        content = json.loads(read(folder / PLAIN))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / PLAIN} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / PLAIN} holds no mapping")
    return content
