"""Tensors of all ranks as pieces of files: who writes what, and the bytes of each file.

A file holds what moves together: parameters of one CMS level, its optimizer state, what it has
accumulated, ... of one rank. A level that has not fired since the last checkpoint then makes a
file with the same content, which need not be written again. Files are in the safetensors format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.checkpoint.levels import LEVEL
from train.checkpoint.manifest import ITEM_BYTES, Shape
from train.parallel.placement import block

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LocalPiece:
    """The part of tensor `name` that this rank has: a block at `offset` of the whole."""

    name: str
    dtype: str
    shape: Shape  # of the whole
    offset: Shape
    local: Tensor

    def describe(self) -> tuple[str, str, Shape, Shape, Shape]:
        """What other ranks have to know of it."""
        return self.name, self.dtype, self.shape, self.offset, tuple(self.local.shape)


Described = tuple[str, str, Shape, Shape, Shape]
Owners = dict[tuple[str, Shape], int]


@dataclass(frozen=True)
class FilePlan:
    """One file that this rank writes: header, entries for the manifest, and whose bytes follow."""

    name: str
    header: bytes
    tensors: dict[str, Any]
    sources: list[Tensor]

    @property
    def bytes(self) -> int:
        """Bytes behind the header."""
        return sum(source.nbytes for source in self.sources)


def local_block(tensor: Tensor) -> tuple[Shape, Tensor]:
    """(offset in the whole, local part) of a tensor; ValueError for a sum that is still pending."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tensor.detach()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a DTensor with a Partial placement is no state to save")
    local: Tensor = tensor.to_local().detach()  # type: ignore[no-untyped-call]
    return block(tensor)[0], local


def local_pieces(tensors: dict[str, Tensor]) -> list[LocalPiece]:
    """What this rank has of each tensor; nothing of those of which it has no element."""
    pieces = []
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, which no checkpoint can hold")
        try:
            offset, local = local_block(tensor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        shape = tuple(tensor.shape)
        if local.numel() > 0:
            pieces.append(LocalPiece(name, _NAMES[tensor.dtype], shape, offset, local))
        elif prod(shape) == 0:
            whole = local.new_empty(shape)
            pieces.append(LocalPiece(name, _NAMES[tensor.dtype], shape, (0,) * len(shape), whole))
    return pieces


def group_of(name: str) -> str:
    """The file, less its rank, that a tensor belongs in."""
    kind = re.sub(r"[^a-z0-9]+", "-", name.partition("/")[0].lower())
    if kind == "stream":
        return kind
    if kind == "optimizer" and name.rpartition("/")[2].startswith("accumulated_grad"):
        kind = "accumulated"
    level = LEVEL.search(name)
    where = "fast" if level is None else f"level{level[1]}"
    start = "-start" if "@start/" in name else ""
    return f"{kind}-{where}{start}"


def assign(ranks: list[list[Described]]) -> Owners:
    """Which rank writes which piece: of the ranks that have it, the one with least to write.

    Settled file by file, so that a level's share does not depend on what other levels have. Raises
    ValueError where the ranks' pieces do not make up a tensor.
    """
    holders: dict[tuple[str, Shape], list[int]] = {}
    described: dict[tuple[str, Shape], Described] = {}
    kinds: dict[str, tuple[str, Shape]] = {}
    for rank, pieces in enumerate(ranks):
        for piece in pieces:
            name, dtype, shape, offset, local = piece
            first = described.setdefault((name, offset), piece)
            if kinds.setdefault(name, (dtype, shape)) != (dtype, shape) or first[4] != local:
                raise ValueError(f"{name} is not the same tensor on all ranks")
            holders.setdefault((name, offset), []).append(rank)
    totals: dict[str, int] = {}
    owners: Owners = {}
    loads: dict[tuple[str, int], int] = {}
    for key in sorted(holders):
        name, dtype, _, _, local = described[key]
        group = group_of(name)
        owner = min(holders[key], key=lambda rank: (loads.get((group, rank), 0), rank))
        loads[group, owner] = loads.get((group, owner), 0) + prod(local) * ITEM_BYTES[dtype]
        owners[key] = owner
        totals[name] = totals.get(name, 0) + prod(local)
    for name, (_, shape) in kinds.items():
        if totals[name] != prod(shape):
            raise ValueError(f"the ranks have {totals[name]} of the {prod(shape)} values of {name}")
    return owners


def plan_files(pieces: list[LocalPiece], owners: Owners, rank: int) -> list[FilePlan]:
    """The files that this rank writes."""
    groups: dict[str, list[LocalPiece]] = {}
    for piece in pieces:
        if owners[piece.name, piece.offset] == rank:
            groups.setdefault(group_of(piece.name), []).append(piece)
    return [
        _plan_file(f"{group}-{rank:05d}.safetensors", own) for group, own in sorted(groups.items())
    ]


def _plan_file(name: str, pieces: list[LocalPiece]) -> FilePlan:
    # Wide elements first: each tensor's bytes are then aligned for its dtype.
    pieces = sorted(pieces, key=lambda p: (-ITEM_BYTES[p.dtype], p.name, p.offset))
    keyed = []
    for piece in pieces:
        part = tuple(piece.local.shape) != piece.shape
        key = f"{piece.name}@{','.join(map(str, piece.offset))}" if part else piece.name
        keyed.append((key, piece.dtype, tuple(piece.local.shape)))
    header, starts = safetensors_header(keyed)
    tensors = {
        piece.name: {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "pieces": [[name, start, list(piece.offset), list(piece.local.shape)]],
        }
        for piece, start in zip(pieces, starts, strict=True)
    }
    return FilePlan(name, header, tensors, [piece.local for piece in pieces])


def safetensors_header(
    tensors: Iterable[tuple[str, str, Shape]], metadata: dict[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """(header of a safetensors file with tensors of (name, dtype, shape), first byte of each).

    Bytes are counted from the start of the file.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    starts, end = [], 0
    for name, dtype, shape in tensors:
        start, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        starts.append(start)
    text = json.dumps(entries, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text.encode(), [8 + len(text) + s for s in starts]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row; a view where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view
