"""Read one shard file; no byte is believed before its checksum was compared."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from data_pipeline.errors import CorruptDataError, DataError
from data_pipeline.shard_format import (
    HEADER_BYTES,
    TRAILER_BYTES,
    checksum,
    unpack_footer,
    unpack_header,
    unpack_trailer,
)

_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM)
"""Why a file can't be opened that is not what was written. All else is the machine's state, such as
too many open files or a mount that does not answer, and says nothing about the file."""


class ShardReader:
    """Random access to the frames of a shard.

    Opening reads header and footer only. `expected_check`, the footer checksum that the manifest
    holds, ties the file to its manifest: footer and header are covered by it, every frame by the
    footer. Raises CorruptDataError, naming the file, for anything that does not fit together, and
    DataError where it can't be opened for a reason that is not the file's.
    """

    def __init__(self, path: Path, expected_check: str | None = None) -> None:
        self.path, self._name = path, str(path)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._descriptor = -1
            if error.errno not in _LOST:
                raise DataError(
                    f"{path}: cannot be opened ({error.strerror}), which says nothing about the "
                    "file; mend that and run the same again"
                ) from error
            raise CorruptDataError(str(path), f"cannot be read ({error.strerror})") from error
        file_bytes = os.fstat(self._descriptor).st_size
        head = os.pread(self._descriptor, HEADER_BYTES, 0)
        header = unpack_header(head, str(path))
        tail = os.pread(self._descriptor, TRAILER_BYTES, max(file_bytes - TRAILER_BYTES, 0))
        at, packed_bytes, size, check = unpack_trailer(tail, file_bytes, str(path))
        packed = os.pread(self._descriptor, packed_bytes, at)
        if checksum(head, packed, tail[:16]) != check:
            raise CorruptDataError(str(path), "the footer does not match its checksum", None, at)
        if expected_check is not None and f"{check:016x}" != expected_check:
            raise CorruptDataError(str(path), "the manifest describes another file than this one")
        raw = _decompress(zstandard.ZstdDecompressor(), packed, size, str(path), None, at)
        footer = unpack_footer(raw, str(path))
        self.vocab_size, self.frame_tokens = header.vocab_size, header.frame_tokens
        self.dtype, self.tokenizer = header.dtype, header.tokenizer
        self._width = header.dtype.itemsize
        self.num_tokens, self.text_bytes = footer.num_tokens, footer.text_bytes
        self.first_tokens, self._checks = footer.first_tokens, footer.frame_checks
        self.document_lengths = footer.document_lengths.astype(np.int64)
        sizes = footer.frame_bytes.astype(np.int64)
        self._offsets = HEADER_BYTES + np.concatenate([[0], np.cumsum(sizes)])
        self._looked_at = bytearray(len(self._checks))  # the same bytes need no second look
        self._names = (footer.names_bytes, footer.names_size, footer.names_check)
        if (
            self.num_frames != -(-self.num_tokens // self.frame_tokens)
            or int(self._offsets[-1]) + footer.names_bytes != at
            or int(self.document_lengths.sum()) != self.num_tokens
        ):
            raise CorruptDataError(str(path), "the footer contradicts itself", None, at)
        if self.num_frames and int(self.first_tokens.max()) >= self.vocab_size:
            raise CorruptDataError(
                str(path), "the index has an id outside the vocabulary", None, at
            )

    @property
    def num_frames(self) -> int:
        return len(self._checks)

    def frame_length(self, frame: int) -> int:
        """Tokens in a frame: frame_tokens for all but the last."""
        return min(self.frame_tokens, self.num_tokens - frame * self.frame_tokens)

    def frame(self, number: int, decompressor: zstandard.ZstdDecompressor) -> np.ndarray:
        """The tokens of one frame, read-only, after comparing its checksum.

        `decompressor` belongs to the calling thread; everything else may be shared.
        """
        offset = self._offsets.item(number)
        size = self._offsets.item(number + 1) - offset
        try:
            packed = os.pread(self._descriptor, size, offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            problem = f"the disk does not give its bytes ({error.strerror})"
            raise CorruptDataError(self._name, problem, number, offset) from error
        if len(packed) != size or xxhash.xxh3_64_intdigest(packed) != self._checks.item(number):
            raise CorruptDataError(
                self._name, "the bytes do not match their checksum", number, offset
            )
        wanted = self.frame_length(number) * self._width
        if self._looked_at[number]:
            return np.frombuffer(decompressor.decompress(packed), self.dtype)
        raw = _decompress(decompressor, packed, wanted, self._name, number, offset)
        tokens = np.frombuffer(raw, self.dtype)
        if np.maximum.reduce(tokens) >= self.vocab_size:
            raise CorruptDataError(self._name, "an id is outside the vocabulary", number, offset)
        self._looked_at[number] = 1
        return tokens

    def names(self) -> list[str]:
        """The name of every document, in the order in which they are stored."""
        size, raw_size, check = self._names
        offset = int(self._offsets[-1])
        packed = os.pread(self._descriptor, size, offset)
        if len(packed) != size or checksum(packed) != check:
            raise CorruptDataError(
                str(self.path), "the document names do not match their checksum", None, offset
            )
        decompressor = zstandard.ZstdDecompressor()
        raw = _decompress(decompressor, packed, raw_size, str(self.path), None, offset)
        try:
            names = json.loads(raw)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CorruptDataError(
                str(self.path), "the document names are not a list of texts", None, offset
            )
        return names

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)


def _decompress(
    decompressor: zstandard.ZstdDecompressor,
    packed: bytes,
    size: int,
    file: str,
    frame: int | None,
    offset: int,
) -> bytes:
    try:
        if zstandard.frame_content_size(packed) != size:  # before as much memory is asked for
            raise CorruptDataError(file, "the data has another size than its index", frame, offset)
        raw = decompressor.decompress(packed)
        if len(raw) == size:
            return raw
    except zstandard.ZstdError:
        pass
    raise CorruptDataError(file, "not the compressed data that was written", frame, offset)
