"""Commands that work on shards, in one process and in several: the same bytes and words."""

import multiprocessing
import os
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from data_pipeline import Corpus, DataError
from data_pipeline.bestfit import plan_path, plan_windows
from data_pipeline.mds import import_mds
from data_pipeline.megatron import export_megatron, import_megatron
from data_pipeline.processes import each
from data_pipeline.recombining import merge, split
from data_pipeline.verify import verify
from tests.data_pipeline.test_importing import write_mds


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def a_merge(source, second, tokenizer, out, workers):
    merge([source, second], out, workers)


def a_split(source, second, tokenizer, out, workers):
    split(source, out, 3, workers)


def an_export(source, second, tokenizer, out, workers):
    export_megatron(source, out / "x", workers)


def an_import(source, second, tokenizer, out, workers):
    prefix = out.parent / f"from-{workers}" / "x"
    export_megatron(source, prefix)
    import_megatron(prefix, tokenizer, out, workers)


def a_mosaic(source, second, tokenizer, out, workers):
    samples = [[f"text {n}".encode()] for n in range(5)]
    folder = write_mds(out.parent / f"{out.name}-mds", {"text": "str"}, samples, "zstd")
    import_mds(folder, tokenizer, out, "text", None, workers)


def a_plan(source, second, tokenizer, out, workers):
    shutil.copytree(source, out)
    plan_windows(Corpus.open(out), 256, 16, workers)
    assert plan_path(Corpus.open(out), 256, 16).exists()


@pytest.mark.parametrize("action", [a_merge, a_split, an_export, an_import, a_mosaic, a_plan])
def test_workers_change_no_byte(corpus_folder, second_folder, tokenizer, tmp_path, action):
    for workers in (1, 3):
        out = tmp_path / str(workers)
        action(corpus_folder, second_folder, tokenizer, out, workers)
    assert files(tmp_path / "1") == files(tmp_path / "3")
    assert len(files(tmp_path / "1")) > 1


def test_an_import_of_several_shards(corpus_folder, tokenizer, tmp_path, monkeypatch, documents):
    from data_pipeline import megatron

    monkeypatch.setattr(megatron, "_SHARD_TOKENS", 5000)
    export_megatron(corpus_folder, tmp_path / "x", 2)
    for workers in (1, 2):
        import_megatron(tmp_path / "x", tokenizer, tmp_path / f"c{workers}", workers)
    assert files(tmp_path / "c1") == files(tmp_path / "c2")
    assert Corpus.open(tmp_path / "c2").num_shards > 5
    assert Corpus.open(tmp_path / "c2").num_documents == len(documents)


def test_verify_names_damages_in_the_order_of_shards(copied):
    shards = sorted(copied.glob("*.tok"))
    for path in shards[::2]:
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    found = verify(copied, 3)[1]
    assert found == verify(copied, 1)[1]
    assert len(found) == len(shards[::2])


def test_a_killed_export_goes_on(corpus_folder, tmp_path, monkeypatch):
    from data_pipeline import megatron

    whole = tmp_path / "whole"
    export_megatron(corpus_folder, whole / "x")
    real, notes = megatron.write_whole, []

    def stopping(path, data):
        if len(notes) == 2:
            raise KeyboardInterrupt
        notes.append(path.name)
        real(path, data)

    out = tmp_path / "out"
    monkeypatch.setattr(megatron, "write_whole", stopping)
    with pytest.raises(KeyboardInterrupt):
        export_megatron(corpus_folder, out / "x")
    assert not (out / "x.bin").exists()
    monkeypatch.setattr(megatron, "write_whole", lambda *a: (notes.append(a[0].name), real(*a)))
    export_megatron(corpus_folder, out / "x")
    assert sorted(notes) == sorted(set(notes))
    assert files(out) == files(whole)


def square_or_die(own: int, job: int) -> int:
    if job == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 8:
        raise DataError("job 8 does not like it")
    assert os.getpid() != own
    return job * job


def test_each_job_once():
    done = dict(each(partial(square_or_die, os.getpid()), range(6), 2, "x"))
    assert done == {n: n * n for n in range(6)}


@pytest.mark.parametrize(("bad", "message"), [(7, "folder: a worker .* killed"), (8, "job 8")])
def test_a_job_that_fails_stops_them_all(bad, message):
    with pytest.raises(DataError, match=message):
        list(each(partial(square_or_die, os.getpid()), [1, bad, 2], 2, "folder"))


class StoppedError(BaseException):
    pass


def interrupted_after(taken: int, monkeypatch) -> list[int]:
    """A SIGINT is sent in this thread just when a condition's lock was taken for the n-th time."""
    real, left = threading.Condition.__enter__, [taken]

    def enter(self):
        entered = real(self)
        if threading.get_ident() == threading.main_thread().ident:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
        return entered

    monkeypatch.setattr(threading.Condition, "__enter__", enter)
    return left


def interrupt(*_):
    raise StoppedError


@pytest.mark.parametrize("taken", [1, 2, 3, 4, 5, 6, 8, 10, 12])
def test_an_interrupt_that_comes_while_a_lock_is_taken(monkeypatch, taken):
    usual = signal.signal(signal.SIGINT, interrupt)
    try:
        left = interrupted_after(taken, monkeypatch)
        with pytest.raises(StoppedError):
            list(each(partial(square_or_die, os.getpid()), range(6), 2, "x"))
        assert left[0] <= 0
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGINT, usual)
    assert not multiprocessing.active_children()


def test_a_handler_that_returns_lets_the_jobs_go_on():
    came = []
    usual = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        done = {}
        for number, result in each(partial(square_or_die, os.getpid()), range(6), 2, "x"):
            done[number] = result
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert done == {n: n * n for n in range(6)}
    assert came == [signal.SIGINT] * 6
