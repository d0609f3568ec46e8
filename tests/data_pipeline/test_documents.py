import gzip
import json

import numpy as np
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipeline import DataError, documents
from data_pipeline.cutting import split_source
from data_pipeline.documents import Document, Reject, read_source, read_texts
from data_pipeline.sources import Source
from data_pipeline.tokenizing import tokenize
from tests.data_pipeline.plain_reader import read_corpus

TEXTS = ["first", "", "zwei\n\u2028 é😀", "x" * 5000, "last\r\n"]
LINES = b"".join(
    json.dumps({"text": text, "id": f"d{n}", "number": n}).encode() + b"\n"
    for n, text in enumerate(TEXTS)
)


def one(path):
    return Source(str(path), path.name, path.stat().st_size)


def texts_of(path, **fields):
    return [record.text for record in read_source(one(path), **fields)]


def zst(data):
    half = len(data) // 2
    compress = zstandard.ZstdCompressor().compress
    return compress(data[:half]) + compress(data[half:])


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".zst", zst)],
)
def test_the_same_documents_from_every_packing(write, suffix, pack):
    assert texts_of(write(f"a.jsonl{suffix}", pack(LINES))) == TEXTS
    assert texts_of(write(f"a.jsonl{suffix}", pack(LINES[:-1]))) == TEXTS
    assert texts_of(write(f"a.txt{suffix}", pack(TEXTS[2].encode()))) == [TEXTS[2]]


def test_parquet(tmp_path):
    table = pyarrow.table({"text": TEXTS, "id": [f"d{n}" for n in range(5)], "x": range(5)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    records = list(read_source(one(tmp_path / "a.parquet"), "text", "id"))
    assert [(r.text, r.name) for r in records] == [(t, f"d{n}") for n, t in enumerate(TEXTS)]
    assert [r.name for r in read_source(one(tmp_path / "a.parquet"))][3] == "a.parquet@3"
    with pytest.raises(DataError, match="no column body; it has text, id, x"):
        texts_of(tmp_path / "a.parquet", text_field="body")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    with pytest.raises(DataError, match=r"b\.parquet: not a whole"):
        texts_of(tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "c.parquet")
    assert Reject("c.parquet", 2, "field 'text' is not text") in list(
        read_source(one(tmp_path / "c.parquet"))
    )
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="several columns text; it has text, text"):
        texts_of(tmp_path / "d.parquet")


def test_parquet_text_that_is_not_utf8(tmp_path):
    offsets, data = np.array([0, 2, 4, 6], "<i4"), b"ok\xff\xfeOK"
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data)]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    first, reject, last = read_source(one(tmp_path / "a.parquet"))
    assert (first.text, first.name, last.text, last.name) == (
        "ok", "a.parquet@0", "OK", "a.parquet@2",
    )  # fmt: skip
    assert reject == Reject("a.parquet", 2, "not UTF-8")


def test_damaged_parquet_is_told_by_its_name(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"hello {n} " * 20 for n in range(300)]})
    parquet.write_table(table, path, use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    for place in (len(data) // 4, len(data) // 2):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(DataError, match=r"a\.parquet: not a whole \.parquet file"):
            texts_of(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "a JSON list, not an object"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'{"text": 3}', "field 'text' is not text"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "field 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_told_with_file_line_and_reason(write, line, reason):
    path = write("a.jsonl", b'{"text": "ok"}\n\n' + line + b'\n{"text": "ok"}\n')
    first, reject, last = read_source(one(path))
    assert first.text == last.text == "ok"
    assert reject == Reject("a.jsonl", 3, reason)
    with pytest.raises(DataError, match=r"a\.jsonl: line 3: "):
        list(read_texts([one(path)]))


def test_a_text_file_that_is_not_utf8(write):
    (reject,) = read_source(one(write("a.txt", b"one\ntwo \xe9\n")))
    assert reject == Reject("a.txt", 2, "byte 8 of the file is not UTF-8")


def test_fields_are_chosen(write):
    path = write("a.jsonl", LINES)
    assert [r.name for r in read_source(one(path), "text", "id")] == ["d0", "d1", "d2", "d3", "d4"]
    assert [r.name for r in read_source(one(path), "text", "number")] == list("01234")
    names = [r.name for r in read_source(one(path))]
    assert [LINES[int(name.split("@")[1]) :][:1] for name in names] == [b"{"] * 5
    assert len(set(names)) == 5
    (reject, *_) = read_source(one(path), "text", "nothing")
    assert reject.reason == "no field 'nothing' with a text or a number"


def test_a_document_named_by_half_of_a_surrogate_pair(write):
    path = write("a.jsonl", b'{"text": "a", "id": "\\ud800"}\n{"text": "b", "id": "x"}\n')
    reject, document = read_source(one(path), "text", "id")
    assert reject.reason == "field 'id' holds half of a surrogate pair"
    assert document.name == "x"


def test_a_byte_order_mark_is_no_part_of_the_first_record(write):
    marked = b"\xef\xbb\xbf" + LINES
    assert texts_of(write("a.jsonl", marked)) == TEXTS
    assert texts_of(write("a.jsonl.gz", gzip.compress(marked))) == TEXTS
    assert len(texts_of(write("b.txt", marked))[0].encode()) == len(marked)
    second, *_ = read_source(one(write("c.jsonl", b"\n" + marked)))
    assert second == Reject("c.jsonl", 2, "not JSON")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "middle", "nonsense"])
def test_damaged_compression_is_never_a_shorter_file(write, name, damage):
    data = (gzip.compress if name.endswith("gz") else zst)(LINES * 20)
    middle = len(data) // 4
    broken = {
        "cut": data[:-9],
        "middle": data[:middle] + bytes(30) + data[middle + 30 :],
        "nonsense": b"nonsense",
    }
    with pytest.raises(DataError, match="damaged or cut off"):
        list(read_source(one(write(name, broken[damage]))))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab\n é", max_size=30), min_size=1, max_size=12),
    st.integers(1, 200),
    st.sampled_from([b"\n", b"\n\n", b"\r\n"]),
)
def test_pieces_of_a_file_hold_what_the_file_holds(tmp_path_factory, texts, size, between):
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_bytes(between.join(json.dumps({"text": text}).encode() for text in texts))
    whole = list(read_source(one(path)))
    pieces = split_source(one(path), size, size)
    assert sum(piece.size for piece in pieces) == path.stat().st_size
    assert [record for piece in pieces for record in read_source(piece)] == whole
    assert [record.text for record in whole] == texts
    assert all(isinstance(record, Document) for record in whole)


def test_lines_are_counted_from_the_beginning_of_the_file(write):
    path = write("a.jsonl", b'{"text": "ok"}\n' * 50 + b"bad\n" + b'{"text": "ok"}\n' * 50)
    found = [r for piece in split_source(one(path), 100, 100) for r in read_source(piece)]
    assert [r.line for r in found if isinstance(r, Reject)] == [51]


def test_what_is_before_a_piece_is_read_once_for_all_its_bad_lines(write, monkeypatch):
    path = write("a.jsonl", b"bad\n" * 100)
    piece = split_source(one(path), 200, 200)[1]
    calls = []
    count = documents._newlines_before
    monkeypatch.setattr(documents, "_newlines_before", lambda *a: calls.append(a) or count(*a))
    assert [record.line for record in read_source(piece)] == list(range(51, 101))
    assert len(calls) == 1


@pytest.fixture
def mixed(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = b"".join(
        json.dumps({"text": f"document {n} " * 20, "id": n}).encode() + b"\n" for n in range(200)
    )
    middle = good.index(b"\n", 20000) + 1
    (folder / "a.jsonl").write_bytes(good[:middle] + b"bad\n[7]\n" + good[middle:])
    (folder / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(good + b"[]\n"))
    (folder / "c.txt").write_text("plain")
    return folder


def test_the_list_of_rejects_is_no_input(mixed, tokenizer):
    out = mixed / "out"
    with pytest.raises(DataError, match="bad records"):
        tokenize([str(mixed)], tokenizer, out)
    manifest, _ = tokenize([str(mixed)], tokenizer, out, max_bad=3)
    assert manifest["documents"] == 401
    assert tokenize([str(mixed)], tokenizer, out, max_bad=3)[1] == 0


def test_rejects_are_counted_listed_and_limited(mixed, tokenizer, tmp_path):
    out = tmp_path / "c"
    arguments = ([str(mixed)], tokenizer)
    with pytest.raises(DataError, match=r"3 bad records, --max-bad is 2; the first is a\.jsonl"):
        tokenize(*arguments, out, 1, 5000, max_bad=2)
    assert not (out / "manifest.json").exists()
    assert len((out / "rejects.jsonl").read_text().splitlines()) == 3
    manifest, _ = tokenize(*arguments, out, 1, 5000, max_bad=3)
    assert sum(shard["rejected"] for shard in manifest["shards"]) == 3
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [r["file"] for r in rejects] == ["a.jsonl", "a.jsonl", "b.jsonl.zst"]
    assert [r["reason"] for r in rejects[:2]] == ["not JSON", "a JSON list, not an object"]
    assert (mixed / "a.jsonl").read_bytes().split(b"\n")[rejects[0]["line"] - 1] == b"bad"
    assert rejects[2]["line"] == 201
    for workers in (2, 3):
        other = tmp_path / f"w{workers}"
        tokenize(*arguments, other, workers, 5000, max_bad=3)
        names = sorted(p.name for p in out.iterdir())
        assert sorted(p.name for p in other.iterdir()) == names
        assert all((other / name).read_bytes() == (out / name).read_bytes() for name in names)
    assert tokenize(*arguments, out, 1, 5000, max_bad=3)[1] == 0
    with pytest.raises(DataError, match="other fields"):
        tokenize(*arguments, out, 1, 5000, id_field="id", max_bad=4)
    documents, names, _ = read_corpus(out)
    assert len(documents) == 401
    assert tokenizer.decode(documents[names.index("c.txt")]) == "plain"
    (out / "rejects.jsonl").unlink()
    assert tokenize(*arguments, out, 1, 5000, max_bad=3)[1] > 0
    assert len((out / "rejects.jsonl").read_text().splitlines()) == 3
