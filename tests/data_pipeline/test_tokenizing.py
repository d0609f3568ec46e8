import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import DataError, building, tokenizing
from data_pipeline.files import only_writer
from data_pipeline.sources import Source
from data_pipeline.tokenizing import plan, tokenize
from tests.data_pipeline.conftest import SHARD_BYTES, make_texts, write_texts
from tests.data_pipeline.plain_reader import read_corpus

ROOT = Path(__file__).parents[2]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(text_folder, corpus_folder, tokenizer, tmp_path, workers):
    tokenize([str(text_folder)], tokenizer, tmp_path / "c", workers, SHARD_BYTES)
    assert contents(tmp_path / "c") == contents(corpus_folder)


def command(text_folder, model, out, workers):
    arguments = ["tokenize", "--input", text_folder, "--tokenizer", model, "--out", out]
    arguments += ["--workers", workers, "--shard-bytes", SHARD_BYTES]
    return [sys.executable, "-m", "data_pipeline", *map(str, arguments)]


@pytest.fixture
def model(tokenizer, tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(tokenizer.model)
    return path


def handles_sigterm(pid):
    """Whether the command is past the start of Python, which nothing can be told during."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.parametrize(
    ("workers", "number"),
    [
        (1, signal.SIGTERM),
        (2, signal.SIGKILL),
        (2, signal.SIGINT),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again(text_folder, corpus_folder, model, tmp_path, workers, number):
    out = tmp_path / "c"
    expected = contents(corpus_folder)
    rng = random.Random(workers * 100 + number)
    for _ in range(3):
        process = subprocess.Popen(
            command(text_folder, model, out, workers), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        wanted = rng.randrange(len(expected) - 1)
        while process.poll() is None and not (
            handles_sigterm(process.pid) and len(list(out.glob("shard-*.tok"))) >= wanted
        ):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        before = {p.name: p.read_bytes() for p in out.glob("shard-*.tok")}
        process.send_signal(number)
        message = process.communicate()[1]
        if process.returncode > 0:
            assert process.returncode == 128 + number
            assert message == (
                f"data_pipeline: stopped by {number.name}; run the same command to go on\n"
            )
        else:
            assert process.returncode in ((0, -9) if number == signal.SIGKILL else (0,))
        for name, data in before.items():
            assert (out / name).read_bytes() == data == expected[name]
    subprocess.run(command(text_folder, model, out, workers), cwd=ROOT, check=True)
    assert contents(out) == expected
    assert not list(out.glob(".*"))


def started(pid):
    """A worker of the process `pid`, as soon as there is one."""
    while True:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        time.sleep(0.001)


def test_ctrl_c_while_the_workers_start(text_folder, model, tmp_path):
    process = subprocess.Popen(
        command(text_folder, model, tmp_path / "c", 2),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    status = Path(f"/proc/{started(process.pid)}/status").read_text()
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1].count("\n") == 1
    assert process.returncode == 128 + signal.SIGINT
    masks = [line.split()[1] for line in status.splitlines() if line[:6] in ("SigBlk", "SigIgn")]
    assert any(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks)


def test_a_second_run_writes_nothing(text_folder, copied, tokenizer):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in copied.iterdir()}
    _, written = tokenize([str(text_folder)], tokenizer, copied, 1, SHARD_BYTES)
    assert written == 0
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in copied.iterdir()} == before


@pytest.mark.parametrize("damage", ["flip", "remove", "manifest"])
def test_a_second_run_mends(text_folder, copied, corpus_folder, tokenizer, damage):
    shard = copied / "shard-00002.tok"
    if damage == "flip":
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    elif damage == "remove":
        shard.unlink()
    else:
        (copied / "manifest.json").unlink()
    tokenize([str(text_folder)], tokenizer, copied, 1, SHARD_BYTES)
    assert contents(copied) == contents(corpus_folder)


def test_another_input_or_tokenizer_is_refused(text_folder, copied, tokenizer, tmp_path, texts):
    from data_pipeline import train_tokenizer

    before = contents(copied)
    other = train_tokenizer(texts.values(), 400)
    changed = write_texts(tmp_path / "changed", {**texts, "one.txt": "y"})
    with pytest.raises(DataError, match="another tokenizer"):
        tokenize([str(text_folder)], other, copied, 1, SHARD_BYTES)
    with pytest.raises(DataError, match="other input"):
        tokenize([str(changed)], tokenizer, copied, 1, SHARD_BYTES)
    with pytest.raises(DataError, match="shard size"):
        tokenize([str(text_folder)], tokenizer, copied, 1, 10 * SHARD_BYTES)
    assert contents(copied) == before


def test_text_that_changed_between_a_kill_and_the_rerun(texts, tokenizer, tmp_path):
    folder = write_texts(tmp_path / "texts", texts)
    out = tmp_path / "c"
    (folder / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="byte 0 of the file is not UTF-8"):
        tokenize([str(folder)], tokenizer, out, 1, SHARD_BYTES)
    assert not (out / "manifest.json").exists()
    write_texts(folder, {"zz.txt": "good", "deep/001.txt": "changed"})
    tokenize([str(folder)], tokenizer, out, 1, SHARD_BYTES)
    documents, names, _ = read_corpus(out)
    assert tokenizer.decode(documents[names.index("deep/001.txt")]) == "changed"
    fresh = tmp_path / "fresh"
    tokenize([str(folder)], tokenizer, fresh, 1, SHARD_BYTES)
    assert contents(fresh) == contents(out)


def test_a_line_that_changed_behind_the_end_of_its_piece(tokenizer, tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "c"
    first, changed = ("a" * 1200 + tail for tail in ("old", "new"))
    source.write_text(json.dumps({"text": first}) + "\nnot JSON")
    with pytest.raises(DataError, match="line 2: not JSON"):
        tokenize([str(source)], tokenizer, out, 1, 1000)
    source.write_text(json.dumps({"text": changed}) + "\n")
    tokenize([str(source)], tokenizer, out, 1, 1000)
    documents, _, _ = read_corpus(out)
    assert [tokenizer.decode(document) for document in documents] == [changed]


def test_a_folder_of_other_files_is_left_alone(text_folder, tokenizer, tmp_path, monkeypatch):
    """Large input is not read first."""
    monkeypatch.setattr(tokenizing, "plan", None)
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        tokenize([str(text_folder)], tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.md"]


def test_two_writers_do_not_meet(text_folder, tokenizer, tmp_path):
    with only_writer(tmp_path / "c"), pytest.raises(DataError, match="another process is writing"):
        tokenize([str(text_folder)], tokenizer, tmp_path / "c")


def test_empty_input_is_refused(tokenizer, tmp_path):
    texts = write_texts(tmp_path / "texts", {"a.txt": ""})
    with pytest.raises(DataError, match="every document is empty"):
        tokenize([str(texts)], tokenizer, tmp_path / "c")
    with pytest.raises(DataError, match="no input file"):
        tokenize([str(tmp_path / "nowhere")], tokenizer, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_input_of_bad_records_alone_is_refused_for_what_is_wrong_with_them(tokenizer, tmp_path):
    texts = write_texts(tmp_path / "texts", {"a.jsonl": '{"text": "one"}\n' * 3})
    with pytest.raises(
        DataError, match=r"3 bad records; .*a.jsonl line 1: no field 'id'"
    ) as caught:
        tokenize([str(texts)], tokenizer, tmp_path / "c", id_field="id", max_bad=3)
    assert str(tmp_path / "c" / "rejects.jsonl") in str(caught.value)
    assert "empty" not in str(caught.value)


def test_shards_follow_the_size_of_the_input():
    sources = [Source(f"{n}", f"{n}", 10) for n in range(10)]
    assert [len(job.sources) for job in plan(sources, 25)] == [3, 3, 3, 1]
    big = [Source(f"{n}", f"{n}", 1 << 20) for n in range(640)]
    assert {len(job.sources) for job in plan(big, None)} == {10}


def test_workers_end_with_their_parent(model, tmp_path):
    texts = write_texts(tmp_path / "texts", make_texts(5, 400))
    out = tmp_path / "c"
    process = subprocess.Popen(command(texts, model, out, 2), cwd=ROOT)
    while not list(out.glob("shard-*.tok")):
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    alive = children
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = [pid for pid in children if os.path.exists(f"/proc/{pid}/cmdline")]
        alive = [pid for pid in alive if Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert children
    assert alive == []


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"\xff", "count"])
def test_a_damaged_note_of_an_unfinished_run_is_no_note(text_folder, tokenizer, tmp_path, damage):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n?\n')
    inputs, out = [str(text_folder), str(tmp_path / "bad.jsonl")], tmp_path / "c"
    made, _ = tokenize(inputs, tokenizer, out, shard_bytes=50_000, max_bad=1)
    whole = (out / "manifest.json").read_bytes()
    (out / "rejects.jsonl").write_bytes(b"?" if damage == "count" else damage)
    assert tokenize(inputs, tokenizer, out, shard_bytes=50_000, max_bad=1) == (made, 1)
    (out / "manifest.json").unlink()
    (out / building.PROGRESS).mkdir()
    for entry in made["shards"]:
        rejects = [{"file": "bad.jsonl", "line": 2, "reason": "not JSON"}] * entry["rejected"]
        building.write_note(out, entry, rejects)
    note = out / building.PROGRESS / f"{made['shards'][0]['file']}.json"
    wrong = json.loads(note.read_bytes())
    wrong["entry"]["tokens"] += 1
    note.write_bytes(json.dumps(wrong).encode() if damage == "count" else damage)
    assert tokenize(inputs, tokenizer, out, shard_bytes=50_000, max_bad=1) == (made, 1)
    assert (out / "manifest.json").read_bytes() == whole
