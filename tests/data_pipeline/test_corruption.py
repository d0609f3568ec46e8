"""Damage of every kind: an error that names it, never a wrong token, never a crash."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import Corpus, CorruptDataError, DataError, Loader, evaluation_batches
from data_pipeline import manifest as manifests
from data_pipeline.reader import ShardReader
from data_pipeline.verify import verify
from data_pipeline.writer import write_shard

FIXTURES = [HealthCheck.function_scoped_fixture]


def flip(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def read_all(folder):
    corpus = Corpus.open(folder)
    return corpus.read(0, corpus.num_tokens)


def frame_offsets(path):
    return ShardReader(path)._offsets.tolist()


def test_a_whole_corpus_verifies(corpus_folder):
    assert verify(corpus_folder)[1] == []


@pytest.mark.parametrize("part", ["header", "frame", "footer", "trailer"])
def test_a_flipped_bit_is_noticed_wherever_it_is(copied, part):
    path = copied / "shard-00001.tok"
    size = path.stat().st_size
    frames = frame_offsets(path)
    places = {
        "header": range(0, 64),
        "frame": range(frames[0], frames[-1], 97),
        "footer": range(size - 32 - 60, size - 32),
        "trailer": range(size - 32, size),
    }
    whole = path.read_bytes()
    for offset in places[part]:
        flip(path, offset, offset % 8)
        with pytest.raises(CorruptDataError, match=r"shard-00001\.tok") as error:
            read_all(copied)
        if part == "frame":
            frame = int(np.searchsorted(frames, offset, side="right")) - 1
            assert (error.value.frame, error.value.offset) == (frame, frames[frame])
        assert any("shard-00001.tok" in damage for damage in verify(copied)[1])
        path.write_bytes(whole)


def test_every_byte_of_a_small_shard_counts(tmp_path, corpus_folder):
    """Flip each byte of header, names, footer and trailer: verify always says so."""
    small = tmp_path / "small"
    shutil.copytree(corpus_folder, small)
    path = small / "shard-00000.tok"
    whole = path.read_bytes()
    names_start = frame_offsets(path)[-1]
    for offset in [*range(64), *range(names_start, len(whole))]:
        flip(path, offset, offset % 8)
        assert verify(small)[1], f"byte {offset} of {len(whole)}"
        path.write_bytes(whole)


def test_a_bit_in_the_manifest_is_noticed(copied):
    path = copied / "manifest.json"
    whole = path.read_bytes()
    rng = random.Random(0)
    for offset in rng.sample(range(len(whole)), 300):
        flip(path, offset, rng.randrange(7))
        spelled_otherwise = False
        with contextlib.suppress(ValueError):
            spelled_otherwise = json.loads(path.read_bytes()) == json.loads(whole)
        if not spelled_otherwise:
            with pytest.raises(DataError, match=r"manifest\.json"):
                Corpus.open(copied)
        path.write_bytes(whole)


@pytest.mark.parametrize("keep", [0, 10, 63, 64, 500, -1, -20, -33, -200])
def test_a_cut_file_is_noticed(copied, keep):
    path = copied / "shard-00002.tok"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptDataError, match=r"shard-00002.tok"):
        read_all(copied)
    assert any("shard-00002.tok" in damage for damage in verify(copied)[1])


@pytest.mark.parametrize("name", ["shard-00000.tok", "manifest.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(DataError, match=name):
        read_all(copied)


def test_what_the_machine_lacks_is_not_called_damage(copied):
    """Else `on_corrupt: skip` would leave the text out, and `verify` call the corpus damaged."""
    corpus = Corpus.open(copied)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(copied, os.O_RDONLY)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limit[1]))
        with pytest.raises(DataError, match=r"shard-00000\.tok: cannot be opened") as error:
            corpus.read(0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert not isinstance(error.value, CorruptDataError)
    assert corpus.read(0, 1) == [corpus.bos_id]


def test_bytes_that_the_disk_does_not_give_are_damage(copied, monkeypatch):
    corpus = Corpus.open(copied)
    reader = corpus.shard(0)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(CorruptDataError, match=r"shard-00000\.tok: frame 1 at byte .*disk"):
        reader.frame(1, zstandard.ZstdDecompressor())


def test_swapped_shards_are_noticed(copied):
    first, second = copied / "shard-00000.tok", copied / "shard-00001.tok"
    first.rename(copied / "x")
    second.rename(first)
    (copied / "x").rename(second)
    with pytest.raises(CorruptDataError, match="another file"):
        read_all(copied)


def test_verify_names_frame_file_and_offset_of_all_damages(copied):
    first, second = copied / "shard-00000.tok", copied / "shard-00003.tok"
    flip(first, frame_offsets(first)[1] + 5)
    flip(second, frame_offsets(second)[0] + 5)
    damages = verify(copied)[1]
    assert len(damages) == 2
    assert f"shard-00000.tok: frame 1 at byte {frame_offsets(first)[1]}" in damages[0]
    assert "shard-00003.tok: frame 0 at byte 64" in damages[1]


def test_the_tokenizer_in_the_manifest_is_checked(copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_bytes())
    model = manifest["tokenizer"]["model_base64"]
    manifest["tokenizer"]["model_base64"] = model[:100] + "AAAA" + model[104:]
    from data_pipeline.manifest import fingerprint

    manifest["fingerprint"] = fingerprint(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptDataError, match="sha256"):
        _ = Corpus.open(copied).tokenizer
    assert any("sha256" in damage for damage in verify(copied)[1])


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[1, 5, 2], [1, 512, 2]], "an id is outside the vocabulary"),
        ([[5, 1, 2], [1, 5, 2]], "do not stand at the ends"),
        ([[1, 2, 5], [1, 5, 2]], "do not stand at the ends"),
        ([[1, 1, 5, 2, 2]], "do not stand at the ends"),
        ([[1, 5, 2], [1]], "do not stand at the ends"),
        ([[1, 3, 2]], "do not stand at the ends"),
    ],
)
def test_verify_looks_at_the_documents_too(tokenizer, tmp_path, documents, message):
    given = [(f"{n}", np.array(document), 1) for n, document in enumerate(documents)]
    identity = {"vocab_size": 512, "tokenizer_sha256": tokenizer.sha256}
    entry = write_shard(tmp_path / "shard-00000.tok", given, **identity)
    manifest = manifests.build(tokenizer.describe(), [{"file": "shard-00000.tok", **entry}])
    manifests.save(tmp_path, manifest)
    (damage,) = verify(tmp_path)[1]
    assert message in damage
    assert "shard-00000.tok" in damage


def change_bytes(manifest):
    manifest["shards"][1]["bytes"] += 8


def change_aligned(manifest):
    manifest["shards"][1]["aligned_tokens"]["64"] -= 64


def change_frames(manifest):
    manifest["frame_tokens"] //= 2


@pytest.mark.parametrize("change", [change_bytes, change_aligned, change_frames])
def test_verify_compares_all_that_a_manifest_says_of_a_shard(copied, change):
    manifest = manifests.load(copied)
    change(manifest)
    manifest["fingerprint"] = manifests.fingerprint(manifest)
    manifests.save(copied, manifest)
    damages = verify(copied)[1]
    assert damages
    assert all("the manifest gives other counts" in damage for damage in damages)
    if change is change_aligned:
        batches = evaluation_batches(Corpus.open(copied), seq_len=64, batch_size=8)
        with pytest.raises(CorruptDataError, match=r"shard-00001\.tok: .*other aligned_tokens"):
            list(batches)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_loader_raises_in_next_and_keeps_its_place(copied, prefetch):
    path = copied / "shard-00001.tok"
    whole = path.read_bytes()

    def make():
        corpus = Corpus.open(copied)
        return Loader(
            corpus, seq_len=256, batch_size=4, seed=0, packing="concat", prefetch=prefetch
        )

    def take(loader, into):
        while len(into) < 60:
            into.append(next(loader).tokens.tolist())

    expected, got = [], []
    with make() as whole_loader:
        take(whole_loader, expected)
    flip(path, 70)
    loader = make()
    with pytest.raises(CorruptDataError, match=r"shard-00001\.tok: frame 0 at byte 64"):
        take(loader, got)
    with pytest.raises(CorruptDataError):
        next(loader)
    assert loader.position == 4 * len(got)
    path.write_bytes(whole)
    take(loader, got)
    assert got == expected
    loader.close()


def test_skipping_leaves_every_other_row_alone_on_every_rank(copied, caplog):
    options = {"seq_len": 256, "seed": 0, "packing": "concat", "prefetch": 0, "batch_size": 6}
    whole = Loader(Corpus.open(copied), **options)
    expected = [row for _ in range(20) for row in next(whole).tokens.tolist()]
    path = copied / "shard-00001.tok"
    flip(path, frame_offsets(path)[1] + 9)

    def rows(size):
        ranks = [
            Loader(Corpus.open(copied), dp_rank=r, dp_size=size, on_corrupt="skip", **options)
            for r in range(size)
        ]
        batches = [next(rank) for _ in range(20) for rank in ranks]
        assert all(b.num_valid == 0 for b in batches if (b.tokens == 3).all())
        return [row for batch in batches for row in batch.tokens.tolist()]

    got = rows(1)
    assert len(caplog.records) == 1
    assert "shard-00001.tok: frame 1 at byte" in caplog.text
    skipped = [n for n, row in enumerate(got) if row == [3] * 256]
    assert 0 < len(skipped) < 40
    assert all(got[n] == row for n, row in enumerate(expected) if n not in skipped)
    assert rows(4) == got


@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURES)
@given(st.data())
def test_random_damage_never_gives_a_wrong_token(corpus_folder, tmp_path, data):
    whole = (corpus_folder / "shard-00000.tok").read_bytes()
    broken = bytearray(whole)
    kind = data.draw(st.sampled_from(["random", "cut", "flip", "splice", "grow"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    some = data.draw(st.binary(min_size=1, max_size=80))
    if kind == "random":
        broken = bytearray(some)
    elif kind == "cut":
        del broken[at:]
    elif kind == "flip":
        broken[at] ^= data.draw(st.integers(1, 255))
    elif kind == "splice":
        broken[at : at + len(some)] = some
    else:
        broken += some
    path = tmp_path / "broken.tok"
    path.write_bytes(broken)
    _never_wrong(path, corpus_folder / "shard-00000.tok")


@settings(max_examples=100, deadline=None, suppress_health_check=FIXTURES)
@given(at=st.integers(0, 63), value=st.integers(0, 255))
def test_headers_with_a_right_checksum_but_wrong_fields(corpus_folder, tmp_path, at, value):
    data = bytearray((corpus_folder / "shard-00000.tok").read_bytes())
    data[at] = value
    data[56:64] = xxhash.xxh3_64_intdigest(bytes(data[:56])).to_bytes(8, "little")
    path = tmp_path / "broken.tok"
    path.write_bytes(data)
    _never_wrong(path, corpus_folder / "shard-00000.tok")


def _never_wrong(path, original):
    decompressor = zstandard.ZstdDecompressor()
    truth = ShardReader(original)
    error = None
    try:
        reader = ShardReader(path)
    except CorruptDataError as caught:
        error = caught
    if error is not None:
        assert error.file == str(path)
        return
    for number in range(reader.num_frames):
        error, tokens = None, None
        try:
            tokens = reader.frame(number, decompressor)
        except CorruptDataError as caught:
            error = caught
        if error is None:
            assert tokens.tolist() == truth.frame(number, decompressor).tolist()
        else:
            assert error.frame == number
