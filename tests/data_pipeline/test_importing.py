"""Megatron and MDS files, written here byte by byte as their own writers do."""

import gzip
import json
import struct

import numpy as np
import pytest
import zstandard

from data_pipeline import CorruptDataError, DataError, cli, megatron
from data_pipeline.mds import import_mds
from data_pipeline.megatron import export_megatron, import_megatron, read_index
from data_pipeline.verify import verify
from tests.data_pipeline.plain_reader import read_corpus


def test_out_and_in_again_is_the_same(corpus_folder, tokenizer, tmp_path, documents, capsys):
    prefix = tmp_path / "deep" / "x"
    assert export_megatron(corpus_folder, prefix) == len(documents)
    index = read_index(prefix)
    ids = np.fromfile(f"{prefix}.bin", "<u2")
    assert ids.tolist() == [token for document in documents for token in document[1:]]
    assert index.lengths.tolist() == [len(document) - 1 for document in documents]
    manifest, _ = import_megatron(prefix, tokenizer, tmp_path / "c")
    assert read_corpus(tmp_path / "c")[0] == documents
    assert verify(tmp_path / "c")[1] == []
    first = read_corpus(corpus_folder)[2]
    assert manifest["text_bytes"] == first["text_bytes"]
    assert import_megatron(f"{prefix}.bin", tokenizer, tmp_path / "c")[1] == 0
    model = tmp_path / "t.model"
    model.write_bytes(tokenizer.model)
    arguments = ["import-megatron", str(prefix), "--tokenizer", str(model)]
    assert cli.main([*arguments, "--out", str(tmp_path / "d")]) == 0
    assert cli.main(["export-megatron", str(corpus_folder), "--out", str(prefix)]) == 2
    assert "is there already" in capsys.readouterr().err


def write_megatron(prefix, sequences, bounds, code=4, dtype="<i4"):
    data = b"".join(np.array(s, dtype).tobytes() for s in sequences)
    prefix.with_suffix(".bin").write_bytes(data)
    offsets, at = [], 0
    for sequence in sequences:
        offsets.append(at)
        at += len(sequence) * np.dtype(dtype).itemsize
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
        + np.array([len(s) for s in sequences], "<i4").tobytes()
        + np.array(offsets, "<i8").tobytes()
        + np.array(bounds, "<i8").tobytes()
    )
    return prefix


@pytest.mark.parametrize("stopped_by", ["write", "rmtree"])
def test_an_export_stopped_behind_its_first_file_goes_on(
    corpus_folder, tmp_path, monkeypatch, stopped_by
):
    export_megatron(corpus_folder, tmp_path / "whole")

    def stop(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        where = {"write": (megatron, "replacing"), "rmtree": (megatron.shutil, "rmtree")}
        patch.setattr(*where[stopped_by], stop)
        with pytest.raises(OSError, match="full"):
            export_megatron(corpus_folder, tmp_path / "x")
    assert (tmp_path / "x.bin").exists()
    export_megatron(corpus_folder, tmp_path / "x")
    for suffix in (".bin", ".idx"):
        made = (tmp_path / "x").with_suffix(suffix).read_bytes()
        assert made == (tmp_path / "whole").with_suffix(suffix).read_bytes()
    assert not (tmp_path / "x.unfinished").exists()
    with pytest.raises(DataError, match="there already"):
        export_megatron(corpus_folder, tmp_path / "x")


@pytest.mark.parametrize(("code", "dtype"), [(4, "<i4"), (8, "<u2"), (5, "<i8"), (3, "<i2")])
def test_sequences_are_joined_to_documents(tokenizer, tmp_path, code, dtype):
    sequences = [[10, 11], [12, 2], [1, 13], [], [14]]
    prefix = write_megatron(tmp_path / "x", sequences, [0, 2, 3, 4, 5], code, dtype)
    import_megatron(prefix, tokenizer, tmp_path / "c")
    documents, names, _ = read_corpus(tmp_path / "c")
    assert documents == [[1, 10, 11, 12, 2], [1, 13, 2], [1, 14, 2]]
    assert names == ["x.bin@0", "x.bin@1", "x.bin@3"]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [([[600]], "id 600 is outside"), ([[-1]], "id -1 is outside"), ([[5, 2, 5]], "token 2 stands")],
)
def test_foreign_ids_are_refused(tokenizer, tmp_path, sequences, message):
    prefix = write_megatron(tmp_path / "x", sequences, [0, 1])
    with pytest.raises(DataError, match=message):
        import_megatron(prefix, tokenizer, tmp_path / "c")


def test_megatron_reads_what_we_write(corpus_folder, tmp_path, documents):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    prefix = tmp_path / "x"
    export_megatron(corpus_folder, prefix)
    theirs = indexed.IndexedDataset(str(prefix))
    assert [theirs[number].tolist() for number in range(len(theirs))] == [
        document[1:] for document in documents
    ]
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(tokenizer, tmp_path, dtype):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    prefix = tmp_path / "x"
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    builder.add_document(np.array([10, 11, 12, 2], dtype), [2, 2])  # of two sequences
    builder.add_document(np.array([13], dtype), [1])
    builder.finalize(f"{prefix}.idx")
    import_megatron(prefix, tokenizer, tmp_path / "c")
    assert read_corpus(tmp_path / "c")[0] == [[1, 10, 11, 12, 2], [1, 13, 2]]


def test_damaged_indexes_are_noticed(tokenizer, tmp_path):
    prefix = write_megatron(tmp_path / "x", [[10, 11], [12]], [0, 1, 2])
    path = prefix.with_suffix(".idx")
    whole = path.read_bytes()
    for data in (b"", b"x" * 99, whole[:-3], whole[:9] + b"\x07" + whole[10:]):
        path.write_bytes(data)
        with pytest.raises(CorruptDataError, match=r"x\.idx"):
            import_megatron(prefix, tokenizer, tmp_path / "c")
    path.write_bytes(whole)
    prefix.with_suffix(".bin").write_bytes(b"\0" * 8)
    with pytest.raises(CorruptDataError, match=r"does not fit x\.bin"):
        read_index(prefix)
    with pytest.raises(DataError, match="no such file"):
        read_index(tmp_path / "y")


def write_mds(folder, columns, samples, compression=None):
    """columns: {name: encoding}; samples: lists of encoded values, in the order of columns."""
    folder.mkdir()
    sizes = [8 if encoding == "int" else None for encoding in columns.values()]
    blobs = [
        b"".join(
            struct.pack("<I", len(v)) for v, size in zip(sample, sizes, strict=True) if not size
        )
        + b"".join(sample)
        for sample in samples
    ]
    head = json.dumps({"columns": "as the writer leaves them"}).encode()
    begin = 4 + 4 * (len(blobs) + 1) + len(head)
    offsets = np.cumsum([begin, *map(len, blobs)]).astype("<u4")
    raw = struct.pack("<I", len(blobs)) + offsets.tobytes() + head + b"".join(blobs)
    shard = {
        "column_encodings": list(columns.values()),
        "column_names": list(columns),
        "column_sizes": sizes,
        "compression": compression,
        "format": "mds",
        "hashes": [],
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(raw), "hashes": {}},
        "samples": len(blobs),
        "size_limit": 1 << 26,
        "version": 2,
        "zip_data": None,
    }
    if compression:
        pack = {"zstd": zstandard.ZstdCompressor().compress, "gz": gzip.compress}
        name = f"shard.00000.mds.{compression.partition(':')[0]}"
        shard["zip_data"] = {"basename": name, "bytes": 0, "hashes": {}}
        (folder / name).write_bytes(pack[compression.partition(":")[0]](raw))
    else:
        (folder / "shard.00000.mds").write_bytes(raw)
    (folder / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))
    return folder


def shaped(values, dtype, with_dtype):
    kind = {"uint16": 16, "int32": 33, "int64": 65}[dtype]
    shape = bytes([1 << 2 | 1]) + struct.pack("<H", len(values))
    return bytes([kind] * with_dtype) + shape + np.array(values, dtype).tobytes()


@pytest.mark.parametrize("compression", [None, "zstd:3", "gz"])
@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("ndarray:uint16:3", lambda v: np.array(v, "<u2").tobytes()),
        ("ndarray:int32", lambda v: shaped(v, "int32", False)),
        ("ndarray", lambda v: shaped(v, "int64", True)),
        ("bytes", lambda v: np.array(v, "<i8").tobytes()),
    ],
)
def test_token_columns(tokenizer, tmp_path, compression, encoding, encode):
    values = [[10, 11, 12], [1, 13, 14], [15, 16, 2]]
    samples = [
        [f"name {n}".encode(), struct.pack("<q", n), encode(v)] for n, v in enumerate(values)
    ]
    columns = {"name": "str", "number": "int", "tokens": encoding}
    folder = write_mds(tmp_path / "mds", columns, samples, compression)
    dtype = "int64" if encoding == "bytes" else None
    import_mds(folder, tokenizer, tmp_path / "c", "tokens", dtype)
    assert read_corpus(tmp_path / "c")[0] == [[1, 10, 11, 12, 2], [1, 13, 14, 2], [1, 15, 16, 2]]
    assert import_mds(folder, tokenizer, tmp_path / "c", "tokens", dtype)[1] == 0


def test_text_columns_are_tokenized(tokenizer, tmp_path, capsys):
    texts = ["one é", "two\r\n"]
    folder = write_mds(tmp_path / "mds", {"text": "str"}, [[text.encode()] for text in texts])
    (tmp_path / "t.model").write_bytes(tokenizer.model)
    arguments = ["import-mds", str(folder), "--tokenizer", str(tmp_path / "t.model")]
    assert cli.main([*arguments, "--column", "text", "--out", str(tmp_path / "c")]) == 0
    documents, names, manifest = read_corpus(tmp_path / "c")
    assert [tokenizer.decode(document) for document in documents] == texts
    assert names == ["shard.00000.mds@0", "shard.00000.mds@1"]
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert cli.main([*arguments, "--column", "body", "--out", str(tmp_path / "d")]) == 2
    assert "no body" in capsys.readouterr().err


def test_what_is_no_whole_mds_dataset(tokenizer, tmp_path):
    folder = write_mds(tmp_path / "a", {"x": "bytes", "n": "int"}, [[b"abcd", b"12345678"]])
    with pytest.raises(DataError, match="say what with --dtype"):
        import_mds(folder, tokenizer, tmp_path / "c", "x")
    with pytest.raises(DataError, match="neither text nor tokens"):
        import_mds(folder, tokenizer, tmp_path / "c", "n")
    shard = folder / "shard.00000.mds"
    whole = shard.read_bytes()
    for data in (whole[:-1], b"\x09" + whole[1:], whole[:4] + b"\xff" * 8 + whole[12:]):
        shard.write_bytes(data)
        with pytest.raises(CorruptDataError, match=r"shard\.00000\.mds"):
            import_mds(folder, tokenizer, tmp_path / "c", "x", "int32")
    shard.unlink()
    with pytest.raises(DataError, match="no such file"):
        import_mds(folder, tokenizer, tmp_path / "c", "x", "int32")
    (folder / "index.json").write_text("[]")
    with pytest.raises(CorruptDataError, match="not an MDS index"):
        import_mds(folder, tokenizer, tmp_path / "c", "x")
    packed = write_mds(tmp_path / "b", {"x": "str"}, [[b"abcd"]], "gz")
    (packed / "shard.00000.mds.gz").write_bytes(b"nonsense")
    with pytest.raises(CorruptDataError, match="compressed data is damaged"):
        import_mds(packed, tokenizer, tmp_path / "c", "x")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"samples": None}, "shards.0.samples"),
        ({"raw_data": {}}, "shards.0.raw_data.basename"),
        ({"column_encodings": []}, "differ in length"),
        ({"column_encodings": ["ndarray"]}, r"mds@0: column x holds no token ids"),
        ({"column_encodings": ["ndarray:foo:2"]}, r"mds@0: column x holds no token ids"),
        ({"column_encodings": ["ndarray:float32:1"]}, r"values of float32"),
        ({"column_encodings": ["ndarray:int64:1"]}, r"mds@0: column x holds no token ids"),
        ({}, r"mds@0: column x holds no token ids"),
    ],
)
def test_an_index_or_a_column_that_is_not_what_it_says(tokenizer, tmp_path, change, problem):
    folder = write_mds(tmp_path / "mds", {"x": "bytes"}, [[b"\x99bcd"]])
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= change
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=problem):
        import_mds(folder, tokenizer, tmp_path / "c", "x", "int64")
    (folder / "index.json").write_text('{"shards": 5}')
    with pytest.raises(CorruptDataError, match="not an MDS index"):
        import_mds(folder, tokenizer, tmp_path / "c", "x", "int64")
