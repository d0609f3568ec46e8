"""The bytes of a shard file: header, frames, document names, footer, trailer.

docs/shard-format.md describes them for readers in other languages. All integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash
import zstandard

from data_pipeline.errors import CorruptDataError

VERSION = 1
MAGIC, END_MAGIC = b"HOPETOK\x00", b"HOPETOK\xff"
FRAME_TOKENS = 4096
ZSTD_LEVEL = 3
MAX_FOOTER_BYTES = 1 << 31

_HEADER = struct.Struct("<8sIIII16s16x")
_CHECK = struct.Struct("<Q")
_COUNTS = struct.Struct("<QQQQQQII")
_TRAILER = struct.Struct("<QIIQ8s")
HEADER_BYTES = _HEADER.size + _CHECK.size
TRAILER_BYTES = _TRAILER.size


def checksum(*parts: bytes) -> int:
    """XXH3 64 of the parts one after the other."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits into it, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def aligned(lengths: np.ndarray, align: int) -> np.ndarray:
    """int64 [D]: `lengths` int64 [D] rounded up to multiples of `align`."""
    return -(-lengths // align) * align


def pack_header(vocab_size: int, frame_tokens: int, tokenizer_sha256: str) -> bytes:
    fields = _HEADER.pack(
        MAGIC,
        VERSION,
        token_dtype(vocab_size).itemsize,
        frame_tokens,
        vocab_size,
        bytes.fromhex(tokenizer_sha256)[:16],
    )
    return fields + _CHECK.pack(checksum(fields))


@dataclass(frozen=True)
class Header:
    vocab_size: int
    frame_tokens: int
    tokenizer: bytes
    dtype: np.dtype


def unpack_header(data: bytes, file: str) -> Header:
    """Header from the first HEADER_BYTES of a file; CorruptDataError if they are not one."""
    if len(data) < HEADER_BYTES or data[:8] != MAGIC:
        raise CorruptDataError(file, "this is not a token shard (wrong first bytes)")
    _, version, width, frame_tokens, vocab_size, tokenizer = _HEADER.unpack_from(data)
    if _CHECK.unpack_from(data, _HEADER.size)[0] != checksum(data[: _HEADER.size]):
        raise CorruptDataError(file, "the header does not match its checksum")
    if version != VERSION:
        raise CorruptDataError(file, f"format version {version}, this program reads {VERSION}")
    dtype = token_dtype(vocab_size)
    if width != dtype.itemsize or frame_tokens < 1:
        raise CorruptDataError(file, f"a header with {width}-byte tokens, {frame_tokens} a frame")
    return Header(vocab_size, frame_tokens, tokenizer, dtype)


@dataclass(frozen=True)
class Footer:
    """The index of a shard.

    frame_bytes uint32 [F], first_tokens uint32 [F], frame_checks uint64 [F] for F frames;
    document_lengths uint32 [D] in tokens, bos and eos included; names_* locate the compressed
    names of the documents, which lie between the last frame and the footer.
    """

    num_tokens: int
    text_bytes: int
    names_bytes: int
    names_size: int
    names_check: int
    frame_bytes: np.ndarray
    first_tokens: np.ndarray
    frame_checks: np.ndarray
    document_lengths: np.ndarray

    def pack(self) -> bytes:
        counts = _COUNTS.pack(
            self.num_tokens,
            len(self.document_lengths),
            self.text_bytes,
            self.names_bytes,
            self.names_size,
            self.names_check,
            len(self.frame_bytes),
            0,
        )
        columns = (
            self.frame_checks.astype("<u8"),
            self.frame_bytes.astype("<u4"),
            self.first_tokens.astype("<u4"),
            self.document_lengths.astype("<u4"),
        )
        return counts + b"".join(column.tobytes() for column in columns)


def unpack_footer(data: bytes, file: str) -> Footer:
    """Footer from its uncompressed bytes; CorruptDataError if the sizes do not add up."""
    if len(data) < _COUNTS.size:
        raise CorruptDataError(file, "the footer is too short")
    tokens, documents, text, names, names_size, names_check, frames, _ = _COUNTS.unpack_from(data)
    if len(data) != _COUNTS.size + 16 * frames + 4 * documents:
        raise CorruptDataError(file, "the footer's length does not fit its counts")
    at = _COUNTS.size
    checks = np.frombuffer(data, "<u8", frames, at)
    sizes = np.frombuffer(data, "<u4", frames, at + 8 * frames)
    firsts = np.frombuffer(data, "<u4", frames, at + 12 * frames)
    lengths = np.frombuffer(data, "<u4", documents, at + 16 * frames)
    return Footer(tokens, text, names, names_size, names_check, sizes, firsts, checks, lengths)


def pack_end(header: bytes, footer: Footer, footer_offset: int) -> tuple[bytes, int]:
    """(compressed footer and trailer, the checksum that stands in the trailer)."""
    raw = footer.pack()
    packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(raw)
    place = struct.pack("<QII", footer_offset, len(packed), len(raw))
    check = checksum(header, packed, place)
    return packed + _TRAILER.pack(footer_offset, len(packed), len(raw), check, END_MAGIC), check


def unpack_trailer(data: bytes, file_bytes: int, file: str) -> tuple[int, int, int, int]:
    """(footer offset, compressed bytes, uncompressed bytes, checksum) from the last bytes."""
    at = file_bytes - TRAILER_BYTES
    if len(data) != TRAILER_BYTES:
        raise CorruptDataError(file, "the file is cut off", offset=file_bytes)
    offset, packed, size, check, magic = _TRAILER.unpack(data)
    if magic != END_MAGIC:
        raise CorruptDataError(file, "the file is cut off or its last bytes are damaged", offset=at)
    if offset + packed != at or offset < HEADER_BYTES or size > MAX_FOOTER_BYTES:
        raise CorruptDataError(file, "the trailer does not fit the file", offset=at)
    return offset, packed, size, check
