"""Thousands of mutated corpora: an error of ours, in one line, or the tokens that were written."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard

from data_pipeline import Corpus, DataError, Loader
from data_pipeline import manifest as manifests
from data_pipeline.manifest import MANIFEST, fingerprint
from data_pipeline.shard_format import (
    HEADER_BYTES,
    TRAILER_BYTES,
    checksum,
    pack_end,
    unpack_footer,
    unpack_trailer,
)
from data_pipeline.verify import verify
from tests.mutations import mutations, strange_values


def read(folder: Path) -> np.ndarray:
    """Every token of a corpus, and a batch of a loader over it."""
    corpus = Corpus.open(folder)
    next(Loader([corpus], seq_len=64, batch_size=2, prefetch=0, seed=0))
    return corpus.read(0, corpus.num_tokens)


def damaged(folder: Path) -> bool:
    try:
        return bool(verify(folder)[1])
    except DataError:
        return True


def seal(folder: Path, name: str, content: bytes) -> None:
    """Write a file with every checksum, of it and of what lists it, made right again."""
    path = folder / name
    manifest = manifests.load(folder)
    if name == MANIFEST:
        manifest = json.loads(content)
    else:
        entry = next(one for one in manifest["shards"] if one["file"] == name)
        content, check = resealed(content)
        path.write_bytes(content)
        entry["bytes"], entry["footer_xxh3_64"] = len(content), f"{check:016x}"
        entry["xxh3_128"] = xxhash.xxh3_128_hexdigest(content)
    if isinstance(manifest, dict):
        manifest["fingerprint"] = fingerprint(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def resealed(content: bytes) -> tuple[bytes, int]:
    """A shard whose header and trailer have the checksums of what they hold."""
    head, tail = content[:HEADER_BYTES], content[-TRAILER_BYTES:]
    head = head[:-8] + checksum(head[:-8]).to_bytes(8, "little")
    at = int.from_bytes(tail[:8], "little")
    packed = content[at:-TRAILER_BYTES]
    check = checksum(head, packed, tail[:16])
    tail = tail[:16] + check.to_bytes(8, "little") + tail[24:]
    return head + content[HEADER_BYTES:-TRAILER_BYTES] + tail, check


def with_another_index(content: bytes, rng: random.Random) -> bytes:
    """A shard whose footer says something else, packed and sealed as its own."""
    at, packed, size, _ = unpack_trailer(content[-TRAILER_BYTES:], len(content), "")
    raw = zstandard.ZstdDecompressor().decompress(content[at : at + packed])
    for _ in range(20):
        changed = bytearray(raw)
        place = rng.choice([rng.randrange(min(56, size)), rng.randrange(size)])
        changed[place] = rng.choice([0, 255, changed[place] ^ 1 << rng.randrange(8)])
        try:
            footer = unpack_footer(bytes(changed), "")
        except DataError:
            continue
        return content[:at] + pack_end(content[:HEADER_BYTES], footer, at)[0]
    return content


def fuzz(folder: Path, count: int, seed: int) -> Counter[str]:
    """Mutate files of a corpus, half of the time sealed again, and read it."""
    rng = random.Random(seed)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    names = [name for name in before if name == MANIFEST or name.endswith(".tok")]
    expected, outcomes = read(folder), Counter[str]()
    for number in range(count):
        name = rng.choice([MANIFEST, *names])
        sealed = number % 2 == 1
        if not sealed:
            (folder / name).write_bytes(next(mutations(before[name], rng, 1)))
        elif name == MANIFEST:
            tree = next(strange_values(json.loads(before[name]), rng, 1))
            seal(folder, name, json.dumps(tree).encode())
        else:
            edge = bytearray(before[name])
            edge[rng.choice([*range(8, 56), *range(-TRAILER_BYTES, -16)])] ^= 1 << rng.randrange(8)
            changed = bytes(edge) if rng.random() < 0.5 else with_another_index(before[name], rng)
            seal(folder, name, changed)
        same = all((folder / one).read_bytes() == content for one, content in before.items())
        try:
            found = read(folder)
        except DataError as error:
            assert "\n" not in str(error), error  # noqa: PT017
            outcomes["refused"] += 1
        else:
            outcomes["unchanged" if same else "accepted"] += 1
            assert sealed or np.array_equal(found, expected), name
        # A manifest may be spelled with other blanks: its fingerprint is of what it says.
        assert sealed or same or name == MANIFEST or damaged(folder), name
        for one, content in before.items():
            (folder / one).write_bytes(content)
    assert np.array_equal(read(folder), expected)
    return outcomes


@pytest.fixture
def copied(corpus_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus_folder, tmp_path / "copied"))


def test_mutated_corpora_are_refused_or_unchanged(copied: Path) -> None:
    outcomes = fuzz(copied, 300, seed=0)
    assert outcomes["refused"] > 150


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_thousand_mutated_corpora(copied: Path, seed: int) -> None:
    assert fuzz(copied, 2000, seed)["refused"] > 1000
