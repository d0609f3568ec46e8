import gzip
import json
import os
import zipfile
from pathlib import Path

import pytest

from data_pipeline import DataError
from data_pipeline.cutting import split_source
from data_pipeline.documents import read_source
from data_pipeline.sources import find_sources
from data_pipeline.tokenizing import tokenize
from tests.data_pipeline.plain_reader import read_corpus
from tests.data_pipeline.test_documents import LINES, TEXTS, texts_of, zst


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("text")
    for place in (tmp_path, tmp_path / "a.jsonl", tmp_path / "*"):
        with pytest.raises(DataError, match=r"a\.jsonl: a pipe"):
            find_sources([str(place)])


def test_a_file_name_that_is_not_utf8(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.txt")).write_text("text")
    tokenize([str(tmp_path / "in")], tokenizer, tmp_path / "out")
    assert read_corpus(tmp_path / "out")[1] == ["caf\\xe9.txt"]


def test_links_in_a_folder(tmp_path):
    for name in ("in/deep/b.txt", "elsewhere/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "in/a_link").symlink_to("deep")
    (tmp_path / "in/deep/loop").symlink_to("..")
    (tmp_path / "in/out").symlink_to("../elsewhere")
    found = [source.name for source in find_sources([str(tmp_path / "in")])]
    assert found == ["deep/b.txt", "out/c.txt"]
    (tmp_path / "in/dead.txt").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"dead\.txt"):
        find_sources([str(tmp_path / "in")])


def test_names_do_not_depend_on_the_order_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "m.txt").write_text("text")
    for name in ("z.txt", "b.txt", "a.txt", "y.txt"):
        (tmp_path / name).symlink_to("m.txt")
    walk, found = os.walk, set()
    for order in (list, reversed, sorted):
        monkeypatch.setattr(
            os,
            "walk",
            lambda *a, _o=order, **b: ((x, y, _o(sorted(z))) for x, y, z in walk(*a, **b)),
        )
        found.add(tuple(source.name for source in find_sources([str(tmp_path)])))
    assert len(found) == 1


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "in/closed").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("text")
    scan = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="closed"):
        find_sources([str(tmp_path / "in")])


def test_lines_under_the_names_of_c4_and_dolma(write):
    """.json.gz and .json.zst, in one piece or cut; a plain .json is not taken for text."""
    write("a.json.gz", gzip.compress(LINES))
    write("b.json.zst", zst(LINES) * 3)
    folder = write("info.json", b"{}").parent
    sources = find_sources([str(folder)])
    assert [source.name for source in sources] == ["a.json.gz", "b.json.zst"]
    assert texts_of(folder / "a.json.gz") == TEXTS
    pieces = split_source(sources[1], 1, 1)
    assert len(pieces) > 1
    assert [d.text for piece in pieces for d in read_source(piece)] == 3 * TEXTS


def test_files_folders_patterns_and_urls(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("b.txt", "deep/a.jsonl", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
        memory.pipe(f"/box/{name}", b"x")

    def names(*inputs):
        return [source.name for source in find_sources([str(i) for i in inputs])]

    assert names(tmp_path) == ["b.txt", "deep/a.jsonl"]
    assert names(tmp_path / "*.txt", tmp_path / "b.txt") == ["b.txt"]
    assert names(tmp_path / "**/*.jsonl") == ["a.jsonl"]
    assert names("memory://box") == ["b.txt", "deep/a.jsonl"]
    assert names("memory://box/*.txt") == ["b.txt"]
    assert names(f"file://{tmp_path}") == ["b.txt", "deep/a.jsonl"]
    assert [d.text for d in read_source(find_sources(["memory://box/b.txt"])[0])] == ["x"]
    for wrong in (tmp_path / "notes.md", "nothing*", "memory://box/none", "abc://x"):
        with pytest.raises(DataError, match=str(wrong)[:3]):
            names(wrong)


def test_a_folder_that_a_pattern_means_is_not_left_out(tmp_path):
    import fsspec

    files = fsspec.filesystem("memory")
    for name in ("a.txt", "one/b.txt", "one/deep/c.txt", "two/b.txt", "two/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        files.pipe(f"/shelf/{name}", name.encode())
    everything = ["a.txt", "deep/c.txt", "one/b.txt", "two/b.txt"]
    for place in (f"{tmp_path}/*", "memory://shelf/*", f"file://{tmp_path}/*"):
        sources = find_sources([place])
        assert [source.name for source in sources] == everything
        (document,) = read_source(sources[2])
        assert document.text == "one/b.txt"
    deep = find_sources([f"{tmp_path}/one/**"])
    assert [source.name for source in deep] == ["b.txt", "deep/c.txt"]


def test_files_of_one_name_are_told_apart(tokenizer, tmp_path):
    for name in ("x/1/bad.jsonl", "x/2/bad.jsonl", "y/2/bad.jsonl", "y/2/good.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "some text"}\n?\n')
    folders = [str(tmp_path / folder) for folder in ("x/1", "x/2", "y/2")]
    tokenize(folders, tokenizer, tmp_path / "out", max_bad=4)
    rejects = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in rejects] == [
        "1/bad.jsonl",
        "good.jsonl",
        "x/2/bad.jsonl",
        "y/2/bad.jsonl",
    ]


def test_files_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "box.zip", "w") as archive:
        archive.writestr("in/a.txt", "first")
        archive.writestr("in/b.jsonl.gz", gzip.compress(b'{"text": "second"}\n'))
    for place in ("in", "in/*", ""):
        sources = find_sources([f"zip://{place}::file://{tmp_path}/box.zip"])
        texts = [document.text for source in sources for document in read_source(source)]
        assert texts == ["first", "second"]
