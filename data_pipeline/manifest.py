"""manifest.json: what a corpus consists of, and its name by content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.cache import read_remote
from data_pipeline.errors import CorruptDataError, DataError
from data_pipeline.files import write_whole
from data_pipeline.shard_format import FRAME_TOKENS, VERSION, token_dtype
from data_pipeline.streams import is_url

MANIFEST = "manifest.json"
FORMAT = "hope-token-shards"

Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Entry(BaseModel):
    """Fields that this version reads; a manifest may have more."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Tokenizer(_Entry):
    kind: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    vocab_size: int = Field(ge=1, lt=1 << 32)
    bos_id: Count
    eos_id: Count
    pad_id: Count
    model_base64: str

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> _Tokenizer:
        if max(self.bos_id, self.eos_id, self.pad_id) >= self.vocab_size:
            raise ValueError(f"bos, eos or pad is no token of {self.vocab_size}")
        return self


class _Shard(_Entry):
    file: str = Field(pattern=r"^[^/\\\x00-\x1f]+$")  # in this folder and in no other
    bytes: Count
    tokens: Count
    documents: Count
    text_bytes: Count
    aligned_tokens: dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,9}$")], Count]
    xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")
    footer_xxh3_64: str = Field(pattern="^[0-9a-f]{16}$")


class _Manifest(_Entry):
    dtype: Literal["uint16", "uint32"]
    frame_tokens: int = Field(ge=1, lt=1 << 32)
    tokens: Count
    documents: Count
    text_bytes: Count
    tokenizer: _Tokenizer
    shards: list[_Shard]

    @model_validator(mode="after")
    def _sums_are_right(self) -> _Manifest:
        for name in ("tokens", "documents", "text_bytes"):
            if sum(getattr(shard, name) for shard in self.shards) != getattr(self, name):
                raise ValueError(f"{name} is not the sum over the shards")
        if token_dtype(self.tokenizer.vocab_size).name != self.dtype:
            raise ValueError(f"dtype {self.dtype} does not fit the vocabulary")
        return self


def canonical(value: Any) -> bytes:
    """The one JSON spelling of `value` that hashes are taken of."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal, of everything in the manifest but the fingerprint itself."""
    return hashlib.sha256(
        canonical({key: value for key, value in manifest.items() if key != "fingerprint"})
    ).hexdigest()


def build(tokenizer: dict[str, Any], shards: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The manifest of `shards` (entries of write_shard with a "file" name), in reading order.

    `tokenizer` is Tokenizer.describe(); `more` are further fields, free of paths and times so that
    the same input gives the same fingerprint everywhere.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(tokenizer["vocab_size"]).name,
        "frame_tokens": FRAME_TOKENS,
        "tokens": sum(shard["tokens"] for shard in shards),
        "documents": sum(shard["documents"] for shard in shards),
        "text_bytes": sum(shard["text_bytes"] for shard in shards),
        "tokenizer": tokenizer,
        "shards": shards,
        **more,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    return manifest


def save(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")


def _read_local(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        there = path.parent.is_dir()
        state = "has no manifest.json, it is not finished" if there else "does not exist"
        raise DataError(
            f"{path.parent}: {state}; make the corpus with `python -m data_pipeline tokenize`"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def load(folder: str | Path) -> dict[str, Any]:
    """The manifest of the corpus in the folder or at the URL `folder`.

    DataError where there is none, CorruptDataError where it is not what was written.
    """
    path = f"{folder}/{MANIFEST}"
    data = read_remote(path) if is_url(path) else _read_local(Path(path))
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptDataError(path, "not valid JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptDataError(path, f'no field "format" with the value "{FORMAT}"')
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path}: format version {manifest.get('version')}, this program reads {VERSION}; "
            "use the release that wrote it or make the corpus again"
        )
    if fingerprint(manifest) != manifest.get("fingerprint"):
        raise CorruptDataError(path, "the content does not match its fingerprint")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        raise CorruptDataError(path, f"{where}: {problem}" if where else problem) from None
    return manifest
