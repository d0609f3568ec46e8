"""A folder of shards as one long array of tokens."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zstandard

from data_pipeline import manifest as manifests
from data_pipeline.bounded_cache import BoundedCache
from data_pipeline.cache import DEFAULT_BYTES, ShardCache
from data_pipeline.errors import CorruptDataError, DataError
from data_pipeline.manifest import MANIFEST
from data_pipeline.reader import ShardReader
from data_pipeline.shard_format import aligned
from data_pipeline.streams import is_url
from data_pipeline.tokenizer import Tokenizer

_T = TypeVar("_T")

_SHARDS_OPEN = 256  # of all corpora: a process may hold 1,024 files by default
_FRAMES_KEPT = 32
_FETCHES = 16

_numbers = count()
_readers: BoundedCache[tuple[int, int], ShardReader] = BoundedCache(_SHARDS_OPEN)
"""By (number of the corpus, shard). What nobody reads any more goes when others come."""


class _Scratch(threading.local):
    """What each reading thread has of its own."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


class Corpus:
    """Tokenized documents, each stored as bos t1 ... tn eos, one after the other.

    Tokens are numbered from 0 over all shards. Reading is safe from several threads. Every frame's
    checksum is compared whenever it is decoded; a mismatch is a CorruptDataError. A pickled
    corpus is opened anew.
    """

    def __init__(
        self, path: str, manifest: dict[str, Any], cache: ShardCache | None = None
    ) -> None:
        self.path, self.manifest, self._cache = path, manifest, cache
        self.fingerprint: str = manifest["fingerprint"]
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.text_bytes: int = manifest["text_bytes"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        described = manifest["tokenizer"]
        self.tokenizer_sha256: str = described["sha256"]
        self.vocab_size: int = described["vocab_size"]
        self.bos_id, self.eos_id = described["bos_id"], described["eos_id"]
        self.pad_id = described["pad_id"]
        self._shards = manifest["shards"]
        tokens = [shard["tokens"] for shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        self._bounds: list[int] = self._starts.tolist()
        self._number = next(_numbers)
        self._frames: BoundedCache[tuple[int, int], np.ndarray] = BoundedCache(_FRAMES_KEPT)
        self._opening = threading.Lock()
        self._scratch = _Scratch()
        if self.num_tokens != int(self._starts[-1]) or self.num_tokens == 0:
            raise DataError(f"{path}: the corpus holds no tokens; tokenize some documents")

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.path, self.manifest, self._cache)

    @classmethod
    def open(
        cls,
        path: str | Path,
        cache_dir: str | Path | None = None,
        cache_bytes: int = DEFAULT_BYTES,
    ) -> Corpus:
        """The corpus in the folder or at the URL `path`; reads its manifest only.

        Shards of a URL are copied to `cache_dir` when they are needed (by default
        ~/.cache/hope-shards), which holds at most `cache_bytes`. DataError where there is no corpus
        or it is of another version; CorruptDataError where it is not what was written.
        """
        path = str(path).removesuffix(MANIFEST).rstrip("/") or "/"
        cache = None
        if is_url(path):
            cache = ShardCache(cache_dir or Path.home() / ".cache" / "hope-shards", cache_bytes)
        elif cache_dir is not None:
            raise DataError(f"{path}: cache_dir is for URLs, a local folder is read in place")
        return cls(path, manifests.load(path), cache)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with, from the manifest."""
        return Tokenizer.from_description(self.manifest["tokenizer"])

    @property
    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: bytes of UTF-8 text that each token stands for; special tokens 0."""
        return self.tokenizer.token_bytes

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def shard_start(self, shard: int) -> int:
        """The number of the first token of a shard."""
        return int(self._starts[shard])

    def shard(self, number: int) -> ShardReader:
        """The reader of one shard; at most a fixed number of files is held open, of all corpora
        together."""
        reader = _readers.get((self._number, number))
        if reader is not None:
            return reader
        with self._opening:
            reader = _readers.get((self._number, number))
            if reader is None:
                reader = self._good(number, lambda: self._open_shard(number))
                _readers.put((self._number, number), reader)
        return reader

    def _open_shard(self, number: int) -> ShardReader:
        entry = self._shards[number]
        where = f"{self.path}/{entry['file']}"
        if self._cache is None:
            reader = ShardReader(Path(where), entry["footer_xxh3_64"])
        else:
            reader = self._open_copy(self._cache, where, entry)
        found = (reader.num_tokens, reader.vocab_size, reader.tokenizer.hex())
        if found != (entry["tokens"], self.vocab_size, self.tokenizer_sha256[:32]):
            raise CorruptDataError(str(reader.path), "the manifest describes another file")
        return reader

    def _open_copy(self, cache: ShardCache, where: str, entry: dict[str, Any]) -> ShardReader:
        """The reader of the local copy of a remote shard. Another process may make room by removing
        it before it is open; that is no damage, and it is fetched again."""
        for _ in range(_FETCHES):
            path = cache.fetch(where, entry)
            try:
                return ShardReader(path, entry["footer_xxh3_64"])
            except CorruptDataError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
        raise DataError(
            f"{where}: its copy in {cache.folder} was removed {_FETCHES} times before it could be "
            f"opened: the processes that share the cache need more than its {cache.limit} bytes"
        )

    def _good(self, number: int, read: Callable[[], _T]) -> _T:
        """What `read` finds in a shard; where the local copy of a remote one has rotted, that goes,
        and `read` looks again, into one that is fetched anew."""
        try:
            return read()
        except CorruptDataError:
            if self._cache is None:
                raise
            self._cache.path(self._shards[number]).unlink(missing_ok=True)
            _readers.drop((self._number, number))
            return read()

    def names(self, shard: int) -> list[str]:
        """The name of every document of a shard, in order."""
        self.shard(shard)  # what can't be opened has been fetched twice by then
        return self._good(shard, lambda: self.shard(shard).names())

    def keep_frames(self, number: int) -> None:
        """Hold up to `number` decoded frames (8 KB each at 16-bit tokens) for further reads."""
        self._frames.size = max(self._frames.size, number)

    def document_lengths(self, shard: int) -> np.ndarray:
        """int64 [D]: tokens of each document of a shard, bos and eos included."""
        return self.shard(shard).document_lengths

    def aligned_tokens(self, shard: int, align: int) -> int:
        """Positions a shard takes where every document starts on a multiple of `align`."""
        if align == 1:
            return self._shards[shard]["tokens"]
        known = self._shards[shard]["aligned_tokens"].get(str(align))
        if known is None:
            known = int(aligned(self.document_lengths(shard), align).sum())
        return known

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill `out`, an integer array [n], with the tokens start .. start + n."""
        stop = start + len(out)
        if start < 0 or stop > self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a corpus of {self.num_tokens}")
        number = bisect_right(self._bounds, start) - 1
        done, frames, scratch = 0, self._frames, self._scratch.decompressor
        while start + done < stop:
            reader = _readers.get((self._number, number)) or self.shard(number)
            base, size = self._bounds[number], reader.frame_tokens
            end = min(stop, self._bounds[number + 1]) - base
            at = start + done - base
            while at < end:
                frame, inside = divmod(at, size)
                take = min(size - inside, end - at)
                if take == 1 and inside == 0:
                    out[done] = reader.first_tokens.item(frame)
                else:
                    tokens = frames.get((number, frame))
                    if tokens is None:
                        tokens = self._decode(number, frame, scratch)
                    out[done : done + take] = tokens[inside : inside + take]
                done += take
                at += take
            number += 1

    def _decode(self, shard: int, frame: int, scratch: zstandard.ZstdDecompressor) -> np.ndarray:
        tokens = self._good(shard, lambda: self.shard(shard).frame(frame, scratch))
        self._frames.put((shard, frame), tokens)
        return tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens start .. stop (exclusive), as an array of the stored type."""
        out = np.empty(max(stop - start, 0), self.dtype)
        self.read_into(out, start)
        return out
