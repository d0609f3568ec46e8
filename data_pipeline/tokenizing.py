"""Documents to shards: parallel, interruptible, and the same bytes whatever happens on the way.

Which documents a shard holds follows from the input alone. Each finished shard leaves a note in
.progress, so a run that was killed goes on behind the shards it finished; the manifest comes last.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from tqdm import tqdm

from data_pipeline import manifest as manifests
from data_pipeline.building import (
    PROGRESS,
    REJECTS,
    read_notes,
    refuse_foreign,
    shard_name,
    write_note,
)
from data_pipeline.cutting import split_source
from data_pipeline.documents import Reject, read_source
from data_pipeline.encoders import DocumentEncoder
from data_pipeline.errors import DataError
from data_pipeline.files import file_checksum, only_writer, remove_temporaries, write_whole
from data_pipeline.processes import each
from data_pipeline.sources import Source, find
from data_pipeline.streams import open_bytes
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.writer import write_shard

_READ_BYTES = 1 << 20
_SMALLEST, _LARGEST, _SHARDS = 1 << 20, 256 << 20, 64
_READ_AGAIN = 8


@dataclass(frozen=True)
class Job:
    """One shard: its file name, and what goes into it."""

    file: str
    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        return sum(source.size for source in self.sources)


def plan(sources: Sequence[Source], shard_bytes: int | None) -> list[Job]:
    """Cut `sources` into shards of about `shard_bytes` of text, in order.

    None takes a 64th of the input, but at least 1 MiB and at most 256 MiB. Pieces that need what is
    before them in their file have at least an eighth of the input, so that a file that can only be
    decompressed as a whole is decompressed up to eight times, and not in part where there are as
    many files of its size.
    """
    total = sum(source.size for source in sources)
    target = shard_bytes or min(max(total // _SHARDS, _SMALLEST), _LARGEST)
    limit = max(target, -(-total // _READ_AGAIN))
    groups: list[list[Source]] = [[]]
    filled = 0
    for source in (piece for whole in sources for piece in split_source(whole, target, limit)):
        if filled >= target:
            groups.append([])
            filled = 0
        groups[-1].append(source)
        filled += source.size
    return [Job(shard_name(n), tuple(group)) for n, group in enumerate(groups)]


@dataclass(frozen=True)
class Recipe:
    """How records become tokens: what every job of a run shares."""

    tokenizer: Tokenizer
    text_field: str = "text"
    id_field: str | None = None
    max_bad: int = 0
    encoder: str = "exact"

    @cached_property
    def encode(self) -> DocumentEncoder:
        return DocumentEncoder(self.tokenizer, self.encoder)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.tokenizer, self.text_field, self.id_field, self.max_bad, self.encoder)
        return Recipe, fields


def _input_checksum(job: Job, recipe: Recipe) -> str:
    settings = (recipe.tokenizer.sha256, recipe.text_field, recipe.id_field)
    digest = xxhash.xxh3_128(repr(settings).encode())
    for source in job.sources:
        digest.update(f"\0{source.name}\0{source.start}\0".encode())
        if source.file_xxh3_128:
            digest.update(f"{source.stop}\0{source.file_xxh3_128}".encode())
            continue
        with open_bytes(source.path) as file:
            file.seek(source.start)
            left, block = source.size, b""
            while left > 0 and (block := file.read(min(left, _READ_BYTES))):
                digest.update(block)
                left -= len(block)
            if left > 0:
                raise DataError(
                    f"{source.path}: shorter than when the run began; run the same command again "
                    "when nobody changes the file any more"
                )
            if source.stop is not None and not block.endswith(b"\n"):
                _add_rest_of_line(digest, file)
    return digest.hexdigest()


def _add_rest_of_line(digest: xxhash.xxh3_128, file: BinaryIO) -> None:
    """A document belongs to the piece in which its line begins, and is read to the line's end."""
    while block := file.read(_READ_BYTES):
        line, newline, _ = block.partition(b"\n")
        digest.update(line)
        if newline:
            return


def _documents(
    job: Job, recipe: Recipe, rejects: list[Reject]
) -> Iterator[tuple[str, np.ndarray, int]]:
    for source in job.sources:
        for record in read_source(source, recipe.text_field, recipe.id_field):
            if isinstance(record, Reject):
                rejects.append(record)
                if len(rejects) > recipe.max_bad:
                    raise TooManyRejectsError(rejects)
            elif record.text:
                yield record.name, recipe.encode(record.name, record.text), record.text_bytes


class TooManyRejectsError(Exception):
    """A shard alone has more bad records than the run may have; carries them."""


@dataclass(frozen=True)
class Done:
    """A finished shard: its manifest entry, its bad records, whether it was written just now."""

    entry: dict[str, Any]
    rejects: list[Reject]
    written: bool


def _make(job: Job, folder: Path, recipe: Recipe, known: Done | None) -> Done:
    """The job's shard; it is written unless it is there already."""
    path, checksum = folder / job.file, _input_checksum(job, recipe)
    if (
        known is not None
        and known.entry["input_xxh3_128"] == checksum
        and known.entry["rejected"] == len(known.rejects)
        and path.is_file()
        and file_checksum(path) == known.entry["xxh3_128"]
    ):
        return known
    rejects: list[Reject] = []
    entry = write_shard(
        path,
        _documents(job, recipe, rejects),
        vocab_size=recipe.tokenizer.vocab_size,
        tokenizer_sha256=recipe.tokenizer.sha256,
    )
    entry = {"file": job.file, "input_xxh3_128": checksum, "rejected": len(rejects), **entry}
    write_note(folder, entry, [asdict(reject) for reject in rejects])
    return Done(entry, rejects, True)


@dataclass(frozen=True)
class _Maker:
    """(job, what an earlier run made of it) -> Done, in whichever process."""

    folder: Path
    recipe: Recipe

    def __call__(self, job: tuple[Job, Done | None]) -> Done:
        return _make(job[0], self.folder, self.recipe, job[1])


def _known(folder: Path, manifest: dict[str, Any] | None) -> dict[str, Done]:
    """The shards that an earlier run finished, by file name."""
    if manifest is None:
        return {
            entry["file"]: Done(entry, [Reject(**fields) for fields in rejects], False)
            for entry, rejects in read_notes(folder)
        }
    listed: dict[str, list[Reject]] = {}
    try:
        for line in (folder / REJECTS).read_text().splitlines():
            fields = json.loads(line)
            listed.setdefault(fields.pop("shard"), []).append(Reject(**fields))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        listed.clear()  # shards that had any are made again
    return {
        entry["file"]: Done(entry, listed.get(entry["file"], []), False)
        for entry in manifest["shards"]
    }


def _check_manifest(
    folder: Path, manifest: dict[str, Any], jobs: Sequence[Job], recipe: Recipe
) -> None:
    """DataError unless `manifest` is of this input and recipe."""
    if manifest["tokenizer"]["sha256"] != recipe.tokenizer.sha256:
        difference = "was made with another tokenizer"
    elif [shard["file"] for shard in manifest["shards"]] != [job.file for job in jobs]:
        difference = "is of other input or another shard size"
    else:
        same = all(
            shard.get("input_xxh3_128") == _input_checksum(job, recipe)
            for shard, job in zip(manifest["shards"], jobs, strict=True)
        )
        if same:
            return
        difference = "is of other input or other fields"
    raise DataError(
        f"{folder}: the corpus there {difference}; name another --out or remove the folder"
    )


def _write_rejects(folder: Path, done: dict[str, list[Reject]], max_bad: int) -> None:
    """Write rejects.jsonl, if there is anything to write; DataError if there is too much."""
    found = [(shard, reject) for shard in sorted(done) for reject in done[shard]]
    lines = [json.dumps({"shard": shard, **asdict(reject)}) + "\n" for shard, reject in found]
    content = "".join(lines).encode()
    path = folder / REJECTS
    if content and not (path.exists() and path.read_bytes() == content):
        write_whole(path, content)
    elif not content:
        path.unlink(missing_ok=True)
    if len(found) > max_bad:
        first = found[0][1]
        raise DataError(
            f"{len(found)} bad records, --max-bad is {max_bad}; the first is {first.file} line "
            f"{first.line}: {first.reason}; see {path}, correct the input or raise --max-bad"
        )


def _nothing(folder: Path, rejects: dict[str, list[Reject]]) -> str:
    """Why there is no document to write, and what to do."""
    bad = [reject for shard in sorted(rejects) for reject in rejects[shard]]
    if not bad:
        return "every document is empty; give some text"
    first = bad[0]
    return (
        f"no documents beside {len(bad)} bad records; the first is {first.file} line {first.line}: "
        f"{first.reason}; see {folder / REJECTS}, correct the input or the fields asked for"
    )


def _tell_not_read(others: dict[str, str], folder: Path) -> None:
    """Warn of files (path to name) that are not read for their type; `folder` has the corpus."""
    corpus = folder.resolve()

    @cache
    def is_ours(parent: str) -> bool:
        return Path(parent).resolve().is_relative_to(corpus)

    left = [name for path, name in others.items() if not is_ours(os.path.dirname(path))]
    if left:
        files = "file" if len(left) == 1 else "files"
        names = ", ".join([*sorted(left)[:3], *(["..."] if len(left) > 3 else [])])
        warnings.warn(f"{len(left)} {files} of other types not read: {names}", stacklevel=3)


def tokenize(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    out: str | Path,
    workers: int = 1,
    shard_bytes: int | None = None,
    text_field: str = "text",
    id_field: str | None = None,
    max_bad: int = 0,
    encoder: str = "exact",
) -> tuple[dict[str, Any], int]:
    """Write the corpus of `inputs` to the folder `out`.

    `text_field` and `id_field` are the fields of .jsonl and .parquet records that hold the text
    and, if given, the name of a document. Up to `max_bad` bad records are left out and listed in
    rejects.jsonl in `out`; more stop the run. `encoder`, "exact" or "gigatoken", is what
    `encoders.choose` found; both write the same bytes.

    Returns (manifest, number of shards written): 0 where all was there already. Finished shards are
    compared with their checksums and kept; a damaged one is made again. DataError where the input
    cannot be read, or `out` holds another corpus. Files of other types in a folder of `inputs` are
    not read: a warning says how many.
    """
    folder = Path(out)
    recipe = Recipe(tokenizer, text_field, id_field, max_bad, encoder)
    ours = str(folder.resolve() / REJECTS)
    found = find(inputs)
    sources = [one for one in found.sources if os.path.realpath(one.path) != ours]
    _tell_not_read(found.others, folder)
    manifest = manifests.load(folder) if (folder / manifests.MANIFEST).exists() else None
    if manifest is None:
        refuse_foreign(folder)
    jobs = plan(sources, shard_bytes)
    if manifest is not None:
        _check_manifest(folder, manifest, jobs, recipe)
    with only_writer(folder):
        remove_temporaries(folder)
        (folder / PROGRESS).mkdir(exist_ok=True)
        known = _known(folder, manifest)
        done: dict[str, Done] = {}
        rejects: dict[str, list[Reject]] = {}
        total = sum(job.size for job in jobs)
        try:
            with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
                todo = [(job, known.get(job.file)) for job in jobs]
                for number, result in each(_Maker(folder, recipe), todo, workers, str(folder)):
                    job = jobs[number]
                    done[job.file], rejects[job.file] = result, result.rejects
                    if sum(map(len, rejects.values())) > max_bad:
                        break
                    bar.update(job.size)
        except TooManyRejectsError as error:
            rejects["unfinished"] = error.args[0]
        finally:
            remove_temporaries(folder)
        _write_rejects(folder, rejects, max_bad)
        for left in folder.glob("shard-*.tok"):
            if left.name not in done:
                left.unlink()
        shards = [done[job.file].entry for job in jobs]
        made = manifests.build(tokenizer.describe(), shards)
        if made["tokens"] == 0:
            raise DataError(f"{', '.join(inputs)}: {_nothing(folder, rejects)}")
        if made != manifest:
            manifests.save(folder, made)
        shutil.rmtree(folder / PROGRESS)
    return made, sum(shard.written for shard in done.values())
