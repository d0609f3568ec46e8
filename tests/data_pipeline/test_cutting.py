"""Large files in pieces: together they hold what the file holds, and no number of workers shows."""

import gzip
import io
import json
import random

import pyarrow
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipeline import DataError, tokenizing
from data_pipeline.cutting import split_source
from data_pipeline.documents import read_source
from data_pipeline.sources import Source
from data_pipeline.tokenizing import plan, tokenize
from tests.data_pipeline.test_documents import one
from tests.data_pipeline.test_tokenizing import contents

SKIPPED = (0x184D2A5E).to_bytes(4, "little") + (7).to_bytes(4, "little") + b"seek me"


def lines(seed: int, count: int, longest: int = 300) -> bytes:
    """Records, bad ones and empty lines among them; the last line may have no end."""
    rng = random.Random(seed)
    words = [f"{rng.randrange(1 << 30):x}" for _ in range(999)]
    made = []
    for number in range(count):
        text = " ".join(rng.choices(words, k=rng.randrange(1, longest) // 6 + 1))
        good = json.dumps({"text": text, "id": number}).encode()
        made.append(rng.choice([good] * 12 + [b"", b"bad", b'{"text": 1}', good + b"\r"]))
    return b"\n".join(made) + rng.choice([b"", b"\n", b"\n\n"])


def zst(data: bytes, parts: int, blocks: int, seed: int) -> bytes:
    """Frames that tell their size or do not, with checksums or without, in blocks, some empty or
    to be skipped."""
    rng = random.Random(seed)
    packed = b""
    for part in cut(data, parts, rng):
        packed += rng.choice([b"", SKIPPED])
        told = rng.choice([len(part), -1])
        made = zstandard.ZstdCompressor(write_checksum=rng.random() < 0.5).compressobj(told)
        for block in cut(part, blocks, rng):
            packed += made.compress(block) + made.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        packed += made.flush()
    return packed + rng.choice([b"", SKIPPED])


def gz(data: bytes, parts: int, blocks: int, seed: int) -> bytes:
    rng = random.Random(seed)
    members = [gzip.compress(part, rng.choice([0, 1, 6])) for part in cut(data, parts, rng)]
    return b"".join(member + rng.choice([b"", bytes(9)]) for member in members)


def cut(data: bytes, parts: int, rng: random.Random) -> list[bytes]:
    places = sorted(rng.randrange(len(data) + 1) for _ in range(parts - 1))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def check_pieces(source: Source, size: int, limit: int) -> list[Source]:
    """Cut `source`; its pieces have to add up to it."""
    whole = list(read_source(source))
    pieces = split_source(source, size, limit)
    assert [record for piece in pieces for record in read_source(piece)] == whole
    assert sum(piece.size for piece in pieces) == source.size
    assert all(piece.size >= size for piece in pieces[:-1])
    return pieces


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(".zst", zst), (".gz", gz)]),
    st.integers(1, 120),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3000),
    st.integers(1, 4),
)
def test_pieces_of_compressed_files(tmp_path_factory, seed, packing, count, parts, blocks, size, x):
    suffix, pack = packing
    path = tmp_path_factory.mktemp("packed") / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines(seed, count), parts, blocks, seed))
    check_pieces(one(path), size, size * x)


@pytest.mark.parametrize("told", [True, False])
def test_a_piece_is_entered_at_its_frame(tmp_path, told):
    data = b"".join(b'{"text": "%d"}\n' % (number**9) for number in range(9000))
    frame = len(data) // 20 + 1
    packed = b""
    for start in range(0, len(data), frame):
        part = data[start : start + frame]
        made = zstandard.ZstdCompressor().compressobj(len(part) if told else -1)
        packed += made.compress(part) + made.flush()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed)
    pieces = check_pieces(one(path), len(packed) // 12, len(packed))
    assert len(pieces) == 10
    assert all(piece.enter == piece.start for piece in pieces)
    path.write_bytes(bytes(pieces[6].enter) + packed[pieces[6].enter :])
    later = list(read_source(pieces[6]))
    assert later[5].name.startswith("a.jsonl.zst@")
    assert data[int(later[5].name.split("@")[1]) :].startswith(b'{"text"')


def test_frames_with_windows_of_2_gib(tmp_path):
    """As `zstd --long=31` makes them, in which large corpora are kept: byte 5 is (31 - 10) * 8."""
    packed = b""
    for seed in range(3):
        made = zstandard.ZstdCompressor().compressobj()
        frame = made.compress(lines(seed, 99)) + made.flush()
        packed += frame[:5] + bytes([(31 - 10) * 8]) + frame[6:]
    assert zstandard.get_frame_parameters(packed).window_size == 1 << 31
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed)
    assert len(check_pieces(one(path), len(packed) // 4, len(packed))) == 3


@pytest.mark.parametrize("groups", [700, 5000, 10_000_000])
def test_pieces_of_parquet_files(tmp_path, groups):
    rng = random.Random(groups)
    kinds = [[f"{rng.random()} " * rng.randrange(1, 9)] * 9 + [None] for _ in range(12_345)]
    texts = [rng.choice(kind) for kind in kinds]
    parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=groups
    )
    source = one(tmp_path / "a.parquet")
    for parts, fewest in ((2, 2), (7, 3), (50, 3)):
        pieces = check_pieces(source, source.size // parts, source.size // min(parts, 4))
        assert fewest <= len(pieces) <= parts + 1


def test_a_parquet_file_of_few_long_rows(tmp_path):
    texts = [random.Random(n).randbytes(9000).hex() for n in range(40)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    source = one(tmp_path / "a.parquet")
    assert len(check_pieces(source, source.size // 9, source.size // 8)) >= 7


def test_files_that_are_not_whole_are_told_by_their_name(tmp_path, tokenizer):
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["some text"] * 20_000}), table, row_group_size=999)
    whole = {
        "a.jsonl.zst": zst(lines(2, 3000), 9, 2, 0).removesuffix(SKIPPED),
        "a.jsonl.gz": gzip.compress(lines(2, 3000)),
        "a.parquet": table.getvalue(),
    }
    for name, data in whole.items():
        for broken in (data[:-9], data[: len(data) // 2]):
            path = tmp_path / name
            path.write_bytes(broken)
            with pytest.raises(DataError, match=rf"{name}: (the compressed data|not a whole)"):
                tokenize(
                    [str(path)], tokenizer, tmp_path / f"c{len(broken)}", 1, 2000, max_bad=9999
                )


def test_few_pieces_are_read_from_the_beginning(tmp_path):
    big = [Source(f"{n}.jsonl.gz", f"{n}.jsonl.gz", 1 << 20) for n in range(8)]
    assert [len(job.sources) for job in plan(big, 1 << 18)] == [1] * 8
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gz(lines(3, 9000), 1, 1, 0))
    assert [len(job.sources) for job in plan([one(path)], 1000)] == [1] * 8


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of each kind, of which the shards below get several pieces each."""
    folder = tmp_path_factory.mktemp("large")
    good = b"".join(line + b"\n" for line in lines(4, 3000, 900).split(b"\n") if line[:1] == b"{")
    good = good.replace(b'{"text": 1}\n', b"")
    middle = good.index(b"\n", len(good) * 2 // 3) + 1
    data = good[:middle] + b"?\n" + good[middle:]
    (folder / "a.jsonl.gz").write_bytes(gz(data, 3, 1, 1))
    (folder / "b.jsonl.zst").write_bytes(zst(data, 9, 3, 1))
    texts = [json.loads(line)["text"] for line in good.splitlines()]
    table = pyarrow.table({"text": [*texts[:700], None, *texts[700:]]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=300)
    return folder


SHARD = 60_000


def test_workers_and_a_killed_run_change_nothing(large, tokenizer, tmp_path):
    first = tmp_path / "first"
    manifest, _ = tokenize([str(large)], tokenizer, first, 1, SHARD, max_bad=3)
    assert len(manifest["shards"]) > 12
    rejects = [json.loads(line) for line in (first / "rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r["reason"]) for r in rejects] == [
        ("a.jsonl.gz", "not JSON"),
        ("b.jsonl.zst", "not JSON"),
        ("c.parquet", "field 'text' is not text"),
    ]
    stored = gzip.decompress((large / "a.jsonl.gz").read_bytes()).split(b"\n")
    assert stored[rejects[0]["line"] - 1] == stored[rejects[1]["line"] - 1] == b"?"
    assert rejects[2]["line"] == 701
    for workers in (2, 3):
        tokenize([str(large)], tokenizer, tmp_path / f"{workers}", workers, SHARD, max_bad=3)
        assert contents(tmp_path / f"{workers}") == contents(first)
    with pytest.raises(DataError, match="3 bad records, --max-bad is 2"):
        tokenize([str(large)], tokenizer, tmp_path / "x", 1, SHARD, max_bad=2)
    finished = {path.name for path in (tmp_path / "x").glob("shard-*.tok")}
    _, written = tokenize([str(large)], tokenizer, tmp_path / "x", 2, SHARD, max_bad=3)
    assert written == len(manifest["shards"]) - len(finished)
    assert contents(tmp_path / "x") == contents(first)
    assert tokenize([str(large)], tokenizer, first, 1, SHARD, max_bad=3)[1] == 0


def test_a_large_file_that_changed_is_read_again(large, tokenizer, tmp_path):
    source, out = tmp_path / "a.parquet", tmp_path / "c"
    texts = parquet.read_table(large / "c.parquet").column("text").to_pylist()
    parquet.write_table(pyarrow.table({"text": texts}), source, row_group_size=300)
    with pytest.raises(DataError, match="1 bad record"):
        tokenize([str(source)], tokenizer, out, 1, SHARD)
    kept = {path.name for path in out.glob("shard-*.tok")}
    assert kept
    texts[700] = "x"
    parquet.write_table(pyarrow.table({"text": texts}), source, row_group_size=300)
    manifest, written = tokenize([str(source)], tokenizer, out, 1, SHARD)
    assert written == len(manifest["shards"])
    tokenize([str(source)], tokenizer, tmp_path / "fresh", 1, SHARD)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_file_that_gets_shorter_under_way_is_an_error(tokenizer, tmp_path, monkeypatch, suffix):
    lines = json.dumps({"text": "a text of some words"}).encode() + b"\n"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    half = b"".join(pack(20 * lines) for _ in range(20))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(half + half)

    def plan_and_cut(sources, shard_bytes):
        jobs = plan(sources, shard_bytes)
        assert len(jobs) > 4
        path.write_bytes(half)
        return jobs

    monkeypatch.setattr(tokenizing, "plan", plan_and_cut)
    with pytest.raises(DataError, match=rf"a.jsonl{suffix}: .*shorter than when the run began"):
        tokenize([str(path)], tokenizer, tmp_path / "c", shard_bytes=len(half) // 10)
    assert not (tmp_path / "c" / "manifest.json").exists()
    monkeypatch.undo()
    made, _ = tokenize([str(path)], tokenizer, tmp_path / "c", shard_bytes=len(half) // 10)
    assert made["documents"] == 400


def test_small_files_are_not_looked_through(large):
    """What is not cut has the checksum that it had before any file of its type was cut."""
    source = one(large / "b.jsonl.zst")
    assert split_source(source, source.size, source.size) == [source]
    assert source.file_xxh3_128 == ""
    pieces = split_source(source, source.size // 2, source.size)
    assert {p.file_xxh3_128 for p in pieces} == {
        xxhash.xxh3_128_hexdigest((large / "b.jsonl.zst").read_bytes())
    }
