import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import Corpus
from data_pipeline import manifest as manifests
from data_pipeline.shard_format import token_dtype
from data_pipeline.writer import ALIGNMENTS, write_shard
from tests.data_pipeline.plain_reader import read_corpus, read_shard

IDENTITY = {"tokenizer_sha256": "ab" * 32}


def test_the_written_specification_reads_what_was_written(corpus_folder, documents, texts):
    read, names, manifest = read_corpus(corpus_folder)
    assert read == documents
    assert names == [name for name, text in sorted(texts.items()) if text]
    assert manifest["tokens"] == sum(map(len, documents))
    assert manifest["documents"] == len(documents)
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts.values())
    for entry in manifest["shards"]:
        lengths = [len(document) for document in read_shard(corpus_folder / entry["file"])[0]]
        for align in ALIGNMENTS:
            padded = sum(-(-length // align) * align for length in lengths)
            assert entry["aligned_tokens"][str(align)] == padded
        assert entry["bytes"] == (corpus_folder / entry["file"]).stat().st_size


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 69_999), max_size=40), max_size=8),
    st.integers(1, 50),
    st.sampled_from([70_000, 1 << 16]),
)
def test_any_documents_come_back(tmp_path_factory, documents, frame_tokens, vocab_size):
    path = tmp_path_factory.mktemp("shard") / "x.tok"
    documents = [[token % vocab_size for token in document] for document in documents]
    given_ = [(f"n{n}\n", np.array(d, np.int64), 3) for n, d in enumerate(documents)]
    entry = write_shard(path, given_, vocab_size=vocab_size, frame_tokens=frame_tokens, **IDENTITY)
    read, names = read_shard(path)
    assert read == documents
    assert names == [name for name, _, _ in given_]
    assert entry["tokens"] == sum(map(len, documents))


def test_ids_take_two_bytes_while_they_fit():
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")


def test_the_fingerprint_names_the_content(corpus_folder, second_folder):
    first, second = manifests.load(corpus_folder), manifests.load(second_folder)
    assert first["fingerprint"] != second["fingerprint"]
    assert manifests.fingerprint(first) == first["fingerprint"]
    assert Corpus.open(corpus_folder).fingerprint == first["fingerprint"]
    assert Corpus.open(corpus_folder / "manifest.json").fingerprint == first["fingerprint"]


def test_a_corpus_can_be_moved(copied, corpus_folder):
    assert Corpus.open(copied).fingerprint == Corpus.open(corpus_folder).fingerprint


def test_however_many_corpora_few_files_are_open(corpus_folder):
    corpora = [Corpus.open(corpus_folder) for _ in range(300)]
    for corpus in corpora:
        assert corpus.shard(0).num_tokens + corpus.shard(1).num_tokens > 0
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert sum(name.endswith(".tok") for name in opened) <= 256
    assert corpora[0].read(0, 100).tolist() == corpora[-1].read(0, 100).tolist()


def test_the_manifest_holds_no_paths_or_times(corpus_folder):
    text = (corpus_folder / "manifest.json").read_text()
    assert str(corpus_folder.parent) not in text
    assert os.sep not in json.dumps([s["file"] for s in json.loads(text)["shards"]])


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def documents():
        yield "a", np.arange(10), 1
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "x.tok", documents(), vocab_size=100, **IDENTITY)
    assert list(tmp_path.iterdir()) == []
