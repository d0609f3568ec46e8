"""Remote corpora, on a file system that fails in every way it can."""

import errno
import os

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline import Corpus, CorruptDataError, DataError, Loader, cache
from data_pipeline.cache import ShardCache


class Faulty(MemoryFileSystem):
    """memory:// whose next reads fail as `faults` says."""

    protocol = "faulty"
    faults: list = []  # noqa: RUF012
    opened: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def _open(self, path, mode="rb", **kwargs):
        file = super()._open(path, mode, **kwargs)
        if mode != "rb":
            return file
        Faulty.opened.append(path)
        fault = Faulty.faults.pop(0) if Faulty.faults else None
        if fault is None:
            return file
        data = file.read()
        if fault == "refused":
            raise OSError("503 slow down")
        from io import BytesIO

        if fault == "short":
            return BytesIO(data[: len(data) // 2])
        return BytesIO(data[:100] + bytes([data[100] ^ 4]) + data[101:])


@pytest.fixture
def url(corpus_folder, monkeypatch):
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(cache, "_FIRST_PAUSE_SECONDS", 0.001)
    files = fsspec.filesystem("faulty")
    for path in corpus_folder.iterdir():
        files.pipe(f"/corpus/{path.name}", path.read_bytes())
    Faulty.faults, Faulty.opened = [], []
    yield "faulty://corpus"
    Faulty.faults = []


def everything(corpus):
    return corpus.read(0, corpus.num_tokens).tolist()


def test_a_remote_corpus_is_the_local_one(url, corpus, tmp_path):
    remote = Corpus.open(url, cache_dir=tmp_path)
    assert remote.fingerprint == corpus.fingerprint
    assert everything(remote) == everything(corpus)
    fetched = len(Faulty.opened)
    assert everything(Corpus.open(url + "/manifest.json", cache_dir=tmp_path)) == everything(corpus)
    shards = [path for path in Faulty.opened[fetched:] if path.endswith(".tok")]
    assert shards == []


@pytest.mark.parametrize("packing", ["aligned", "best-fit"])
def test_the_loader_reads_it(url, corpus, tmp_path, packing):
    options = {"seq_len": 128, "batch_size": 4, "seed": 0, "packing": packing}
    remote, local = Corpus.open(url, cache_dir=tmp_path), corpus
    with Loader(remote, **options) as first, Loader(local, **options) as second:
        for _ in range(20):
            assert next(first).tokens.tolist() == next(second).tokens.tolist()


@pytest.mark.parametrize("fault", ["refused", "short", "flipped"])
def test_faults_on_the_way_are_tried_again(url, corpus, tmp_path, fault):
    remote = Corpus.open(url, cache_dir=tmp_path)
    Faulty.faults = [fault, None, fault, fault, None]
    assert everything(remote) == everything(corpus)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("fault", "message"), [("refused", "503"), ("short", "checksum"), ("flipped", "checksum")]
)
def test_a_lasting_fault_is_an_error_that_names_the_shard(
    url, tmp_path, monkeypatch, fault, message
):
    pauses = []
    monkeypatch.setattr(cache.time, "sleep", pauses.append)
    remote = Corpus.open(url, cache_dir=tmp_path)
    Faulty.faults = [fault] * 50
    with pytest.raises(DataError, match=rf"shard-00000\.tok: failed 5 times.*{message}"):
        everything(remote)
    assert list(tmp_path.iterdir()) == []
    assert pauses == [0.001, 0.002, 0.004, 0.008]


def test_a_copy_that_rots_is_fetched_again(url, corpus, tmp_path):
    remote = Corpus.open(url, cache_dir=tmp_path)
    remote.read(0, 1)
    (copy,) = tmp_path.iterdir()
    data = bytearray(copy.read_bytes())
    data[5000] ^= 1
    copy.write_bytes(data)
    assert everything(Corpus.open(url, cache_dir=tmp_path)) == everything(corpus)


@pytest.mark.parametrize("part", ["header", "names", "footer", "all of it"])
def test_a_copy_that_cannot_be_opened_is_fetched_again(url, corpus, tmp_path, part):
    remote = Corpus.open(url, cache_dir=tmp_path)
    for shard in range(corpus.num_shards):
        copy = ShardCache(tmp_path).path(corpus.manifest["shards"][shard])
        remote.shard(shard)
        data = bytearray(copy.read_bytes())
        footer = int.from_bytes(data[-32:-24], "little")
        if part == "all of it":
            data = bytearray()
        else:
            data[{"header": 20, "names": footer - 5, "footer": footer + 5}[part]] ^= 1
        copy.write_bytes(data)
    again = Corpus.open(url, cache_dir=tmp_path)
    for shard in range(corpus.num_shards):
        assert again.names(shard) == corpus.names(shard)
    assert everything(again) == everything(corpus)


@pytest.fixture
def other_processes(monkeypatch):
    """Those that share the cache: they remove the copies fetched next, before they are open."""
    to_remove = []
    fetch = ShardCache.fetch

    def fetch_and_lose(self, url, entry):
        path = fetch(self, url, entry)
        if to_remove:
            to_remove.pop()
            path.unlink()
        return path

    monkeypatch.setattr(ShardCache, "fetch", fetch_and_lose)
    return to_remove


@pytest.mark.parametrize("on_corrupt", ["raise", "skip"])
def test_a_copy_that_made_room_before_it_was_open_is_no_damage(
    url, corpus, tmp_path, other_processes, on_corrupt
):
    wanted = Loader([corpus], seq_len=64, batch_size=2, seed=0, prefetch=0)
    remote = Corpus.open(url, cache_dir=tmp_path)
    loader = Loader([remote], seq_len=64, batch_size=2, seed=0, prefetch=0, on_corrupt=on_corrupt)
    for _ in range(3):
        other_processes += ["removed"] * 3
        assert next(loader).tokens.tolist() == next(wanted).tokens.tolist()


def test_a_cache_too_small_for_those_that_share_it_is_an_error_that_says_so(
    url, tmp_path, other_processes
):
    other_processes += ["removed"] * 1000
    remote = Corpus.open(url, cache_dir=tmp_path, cache_bytes=1 << 20)
    with pytest.raises(DataError, match="need more than its 1048576 bytes") as caught:
        remote.read(0, 1)
    assert not isinstance(caught.value, CorruptDataError)


def test_what_killed_downloads_left_makes_room(url, tmp_path):
    left, going_on = tmp_path / ".a.tok.tmp-1-1", tmp_path / ".b.tok.tmp-2-2"
    for path in (left, going_on):
        path.write_bytes(b"x")
    os.utime(left, (0, 0))
    Corpus.open(url, cache_dir=tmp_path).read(0, 1)
    assert not left.exists()
    assert going_on.exists()


def test_the_cache_keeps_to_its_size(url, corpus, tmp_path):
    biggest = max(shard["bytes"] for shard in corpus.manifest["shards"])
    limit = 2 * biggest + 10
    remote = Corpus.open(url, cache_dir=tmp_path, cache_bytes=limit)
    for shard in range(corpus.num_shards):
        remote.shard(shard)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    assert everything(remote) == everything(corpus)
    kept = {path.name for path in tmp_path.iterdir()}
    last = corpus.manifest["shards"][-1]
    assert ShardCache(tmp_path).path(last).name in kept
    least = Corpus.open(url, cache_dir=tmp_path / "least", cache_bytes=biggest)
    assert everything(least) == everything(corpus)
    with pytest.raises(DataError, match="do not fit into a cache of 10"):
        Corpus.open(url, cache_dir=tmp_path / "x", cache_bytes=10).read(0, 1)


@pytest.mark.parametrize("folder", ["file", "file/below", "full"])
def test_a_place_that_keeps_nothing_is_an_error_that_names_it(url, tmp_path, monkeypatch, folder):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_bytes(b"")
    if folder == "full":
        monkeypatch.setattr(cache, "replacing", full)
    remote = Corpus.open(url, cache_dir=tmp_path / folder)
    with pytest.raises(DataError, match=f"{tmp_path / folder}: (No space|Not a dir).*cache_dir"):
        everything(remote)
    assert len(Faulty.opened) <= 1


def test_no_such_place(tmp_path, url):
    with pytest.raises(DataError, match=r"faulty://nowhere/manifest\.json: there is no such"):
        Corpus.open("faulty://nowhere", cache_dir=tmp_path)
    with pytest.raises(DataError, match="cache_dir is for URLs"):
        Corpus.open(tmp_path, cache_dir=tmp_path)
    fsspec.filesystem("faulty").pipe("/corpus/manifest.json", b"{}")
    with pytest.raises(CorruptDataError, match=r"faulty://corpus/manifest\.json"):
        Corpus.open(url, cache_dir=tmp_path)


@pytest.mark.parametrize("opened_again", [0, 1])  # folders list files in orders of their own
def test_the_shard_not_opened_for_longest_makes_room(url, corpus, tmp_path, opened_again):
    entries = corpus.manifest["shards"][:3]
    limit = sum(entry["bytes"] for entry in entries) - 1
    shards = ShardCache(tmp_path, limit)
    paths = []
    for age, number in enumerate([0, 1, opened_again, 2]):
        path = shards.fetch(f"{url}/{entries[number]['file']}", entries[number])
        paths.append(path)
        if age < 2:
            os.utime(path, (age, age))
    assert [path.exists() for path in paths] == [opened_again == 0, opened_again == 1, True, True]
