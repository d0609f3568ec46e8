"""Write one shard file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
import zstandard

from data_pipeline.files import replacing
from data_pipeline.shard_format import (
    FRAME_TOKENS,
    ZSTD_LEVEL,
    Footer,
    aligned,
    checksum,
    pack_end,
    pack_header,
    token_dtype,
)

ALIGNMENTS = tuple(1 << power for power in range(3, 11))
Document = tuple[str, np.ndarray, int]


class _Writer:
    def __init__(self, file: BinaryIO, header: bytes, dtype: np.dtype, frame_tokens: int) -> None:
        self._file, self._header, self._dtype = file, header, dtype
        self._digest, self._offset = xxhash.xxh3_128(), 0
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self._buffer, self._filled = np.empty(frame_tokens, dtype), 0
        self._frames: list[tuple[int, int, int]] = []
        self._lengths: list[int] = []
        self._names: list[str] = []
        self._text_bytes = 0
        self._write(header)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def _flush(self) -> None:
        packed = self._compressor.compress(self._buffer[: self._filled].tobytes())
        self._frames.append((len(packed), int(self._buffer[0]), checksum(packed)))
        self._write(packed)
        self._filled = 0

    def add(self, name: str, tokens: np.ndarray, text_bytes: int) -> None:
        self._names.append(name)
        self._lengths.append(len(tokens))
        self._text_bytes += text_bytes
        done = 0
        while done < len(tokens):
            take = min(len(tokens) - done, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + take] = tokens[done : done + take]
            self._filled += take
            done += take
            if self._filled == len(self._buffer):
                self._flush()

    def finish(self) -> dict[str, Any]:
        if self._filled:
            self._flush()
        raw_names = json.dumps(self._names, ensure_ascii=False, separators=(",", ":")).encode()
        names = self._compressor.compress(raw_names)
        self._write(names)
        sizes, firsts, checks = zip(*self._frames, strict=True) if self._frames else ((), (), ())
        lengths = np.array(self._lengths, np.int64)
        footer = Footer(
            int(lengths.sum()),
            self._text_bytes,
            len(names),
            len(raw_names),
            checksum(names),
            np.array(sizes, "<u4"),
            np.array(firsts, "<u4"),
            np.array(checks, "<u8"),
            lengths.astype("<u4"),
        )
        end, footer_check = pack_end(self._header, footer, self._offset)
        self._write(end)
        return {
            "bytes": self._offset,
            "tokens": footer.num_tokens,
            "documents": len(lengths),
            "text_bytes": self._text_bytes,
            "aligned_tokens": {str(a): int(aligned(lengths, a).sum()) for a in ALIGNMENTS},
            "footer_xxh3_64": f"{footer_check:016x}",
            "xxh3_128": self._digest.hexdigest(),
        }


def write_shard(
    path: Path,
    documents: Iterable[Document],
    *,
    vocab_size: int,
    tokenizer_sha256: str,
    frame_tokens: int = FRAME_TOKENS,
) -> dict[str, Any]:
    """Write `documents`, triples (name, token ids, bytes of UTF-8 text), as the shard `path`.

    The ids include bos and eos. Returns the shard's entry for the manifest, without its file name.
    The file appears under its name only when it is complete; the same documents give the same
    bytes.
    """
    header = pack_header(vocab_size, frame_tokens, tokenizer_sha256)
    with replacing(path) as file:
        writer = _Writer(file, header, token_dtype(vocab_size), frame_tokens)
        for name, tokens, text_bytes in documents:
            writer.add(name, tokens, text_bytes)
        return writer.finish()
