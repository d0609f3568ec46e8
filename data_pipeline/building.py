"""Write a corpus whose documents are tokens already: what split and the importers share.

Each finished shard leaves a note in .progress, so a run that was killed goes on behind those. The
manifest comes last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from data_pipeline import manifest as manifests
from data_pipeline.errors import DataError
from data_pipeline.files import file_checksum, only_writer, remove_temporaries, write_whole
from data_pipeline.processes import each
from data_pipeline.writer import Document, write_shard

PROGRESS = ".progress"
REJECTS = "rejects.jsonl"
_OURS = (PROGRESS, REJECTS, "shard-", "best-fit-", ".shard-", ".manifest", ".rejects")


@dataclass(frozen=True)
class Part:
    """One shard to be: `key` says which documents, and `source` names, by checksum, everything they
    are made from."""

    source: str
    key: Any


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tok"


def write_note(folder: Path, entry: dict[str, Any], rejects: list[dict[str, Any]]) -> None:
    """Note that the shard of a manifest's entry is finished, and the bad records on the way."""
    note = {"entry": entry, "rejects": rejects}
    whole = {**note, "xxh3_64": xxhash.xxh3_64_hexdigest(manifests.canonical(note))}
    write_whole(folder / PROGRESS / f"{entry['file']}.json", json.dumps(whole).encode())


def read_notes(folder: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(entry, bad records) of each note that is what was written; without one a shard is made
    again."""
    for path in (folder / PROGRESS).glob("*.json"):
        try:
            note = json.loads(path.read_bytes())
            check = note.pop("xxh3_64")
            if check == xxhash.xxh3_64_hexdigest(manifests.canonical(note)):
                yield note["entry"], note["rejects"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue


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


@dataclass(frozen=True)
class _Maker:
    """(file name, part, its entry from an earlier run) -> (entry, whether it was written now)."""

    folder: Path
    documents: Callable[[Any], Iterable[Document]]
    vocab_size: int
    tokenizer_sha256: str

    def __call__(self, job: tuple[str, Part, dict[str, Any] | None]) -> tuple[dict[str, Any], bool]:
        name, part, known = job
        path = self.folder / name
        if (
            known is not None
            and known["input_xxh3_128"] == part.source
            and path.is_file()
            and file_checksum(path) == known["xxh3_128"]
        ):
            return known, False
        made = write_shard(
            path,
            self.documents(part.key),
            vocab_size=self.vocab_size,
            tokenizer_sha256=self.tokenizer_sha256,
        )
        entry = {"file": name, "input_xxh3_128": part.source, **made}
        write_note(self.folder, entry, [])
        return entry, True


def build_corpus(
    out: str | Path,
    tokenizer: dict[str, Any],
    parts: Sequence[Part],
    documents: Callable[[Any], Iterable[Document]],
    doing: str,
    workers: int = 1,
) -> tuple[dict[str, Any], int]:
    """Write `parts` as the corpus `out`; `tokenizer` is Tokenizer.describe().

    `documents` gives the documents of a part's key; with more than one of `workers` it and the keys
    have to be picklable. Returns (manifest, number of shards written). Shards that are there
    already, made from the same sources and whole, are kept. DataError where `out` holds something
    else.
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
        known |= {entry["file"]: entry for entry, _ in read_notes(folder)}
        jobs = [(name, part, known.get(name)) for name, part in zip(names, parts, strict=True)]
        maker = _Maker(folder, documents, tokenizer["vocab_size"], tokenizer["sha256"])
        made: dict[int, tuple[dict[str, Any], bool]] = {}
        with tqdm(total=len(jobs), desc=doing, unit=" shards", disable=None) as bar:
            for number, shard in each(maker, jobs, workers, str(folder)):
                made[number] = shard
                bar.update()
        result = manifests.build(tokenizer, [made[number][0] for number in range(len(jobs))])
        if result["tokens"] == 0:
            raise DataError(
                f"{folder}: there are no documents to write; "
                "give more of them, or split with another --holdout"
            )
        if result != manifest:
            manifests.save(folder, result)
        shutil.rmtree(folder / PROGRESS)
    return result, sum(written for _, written in made.values())
