"""Write a corpus whose documents are tokens already: what split and the importers share.

Shards are made one after the other; a finished one leaves a note in .progress, so a run that was
killed goes on behind it. The manifest comes last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline import manifest as manifests
from data_pipeline.errors import DataError
from data_pipeline.files import file_checksum, only_writer, remove_temporaries, write_whole
from data_pipeline.writer import Document, write_shard

PROGRESS = ".progress"
REJECTS = "rejects.jsonl"
_OURS = (PROGRESS, REJECTS, "shard-", "best-fit-", ".shard-", ".manifest", ".rejects")


@dataclass(frozen=True)
class Part:
    """One shard to be: `source` names, by checksum, everything its documents are made from."""

    source: str
    documents: Callable[[], Iterable[Document]]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tok"


def refuse_foreign(folder: Path) -> None:
    """DataError if `folder` holds anything but what an unfinished corpus leaves there."""
    if folder.exists() and not (
        folder.is_dir() and all(item.name.startswith(_OURS) for item in folder.iterdir())
    ):
        raise DataError(f"{folder}: the folder holds other files; name an empty or a new --out")


def wrap(name: str, tokens: np.ndarray, tokenizer: dict[str, Any]) -> np.ndarray:
    """The tokens of a foreign document as bos ... eos, whichever of them it had already.

    DataError for an id outside the vocabulary, or a special token inside the document.
    """
    bos, eos, pad = tokenizer["bos_id"], tokenizer["eos_id"], tokenizer["pad_id"]
    if len(tokens) and tokens[0] == bos:
        tokens = tokens[1:]
    if len(tokens) and tokens[-1] == eos:
        tokens = tokens[:-1]
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer["vocab_size"]:
        raise DataError(
            f"{name}: id {tokens.max() if tokens.min() >= 0 else tokens.min()} is outside the "
            f"vocabulary of {tokenizer['vocab_size']}; name the tokenizer the data was made with"
        )
    for special in (bos, eos, pad):
        at = np.flatnonzero(tokens == special)
        if at.size:
            raise DataError(
                f"{name}: the special token {special} stands inside the document, at {at[0]}; "
                "name the tokenizer the data was made with"
            )
    return np.concatenate([[bos], tokens, [eos]])


def build_corpus(
    out: str | Path, tokenizer: dict[str, Any], parts: Sequence[Part], doing: str
) -> tuple[dict[str, Any], int]:
    """Write `parts` as the corpus `out`; `tokenizer` is Tokenizer.describe().

    Returns (manifest, number of shards written). Shards that are there already, made from the same
    sources and whole, are kept. DataError where `out` holds something else.
    """
    folder = Path(out)
    names = [shard_name(number) for number in range(len(parts))]
    known: dict[str, dict[str, Any]] = {}
    manifest = None
    if (folder / manifests.MANIFEST).exists():
        manifest = manifests.load(folder)
        known = {entry["file"]: entry for entry in manifest["shards"]}
        sources = [entry.get("input_xxh3_128") for entry in manifest["shards"]]
        if sources != [part.source for part in parts]:
            raise DataError(
                f"{folder}: holds another corpus; name another --out or remove the folder"
            )
    else:
        refuse_foreign(folder)
    with only_writer(folder):
        remove_temporaries(folder)
        (folder / PROGRESS).mkdir(exist_ok=True)
        for note in (folder / PROGRESS).glob("*.json"):
            entry = json.loads(note.read_bytes())["entry"]
            known[entry["file"]] = entry
        entries, written = [], 0
        for name, part in zip(
            names, tqdm(parts, desc=doing, unit=" shards", disable=None), strict=True
        ):
            entry = known.get(name)
            path = folder / name
            if (
                entry is None
                or entry["input_xxh3_128"] != part.source
                or not path.is_file()
                or file_checksum(path) != entry["xxh3_128"]
            ):
                made = write_shard(
                    path,
                    part.documents(),
                    vocab_size=tokenizer["vocab_size"],
                    tokenizer_sha256=tokenizer["sha256"],
                )
                entry = {"file": name, "input_xxh3_128": part.source, **made}
                content = json.dumps({"entry": entry, "rejects": []}).encode()
                write_whole(folder / PROGRESS / f"{name}.json", content)
                written += 1
            entries.append(entry)
        result = manifests.build(tokenizer, entries)
        if result["tokens"] == 0:
            raise DataError(f"{folder}: there are no documents to write")
        if result != manifest:
            manifests.save(folder, result)
        shutil.rmtree(folder / PROGRESS)
    return result, written
