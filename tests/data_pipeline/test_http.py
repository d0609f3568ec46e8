"""Input and shards from a web server; needs the package `aiohttp`."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("aiohttp", reason="optional package")

from data_pipeline import Corpus, DataError, cache, cli
from data_pipeline.documents import read_texts
from data_pipeline.sources import find_sources


class Handler(SimpleHTTPRequestHandler):
    failures = 0

    def end_headers(self):
        if self.path.startswith("/streamed"):
            self._headers_buffer = [h for h in self._headers_buffer if b"Content-Length" not in h]
        super().end_headers()

    def do_GET(self):
        if Handler.failures > 0:
            Handler.failures -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def url(corpus_folder, monkeypatch):
    monkeypatch.setattr(cache, "_FIRST_PAUSE_SECONDS", 0)
    handler = partial(Handler, directory=str(corpus_folder.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_texts_come_from_a_web_server(url, corpus_folder):
    (corpus_folder.parent / "a.txt").write_text("some text")
    assert list(read_texts(find_sources([f"{url}/a.txt"]))) == ["some text"]


def test_a_web_server_that_fails_is_one_line(url, corpus_folder, tmp_path, capsys):
    for name in ("b.txt", "streamed.txt"):
        (corpus_folder.parent / name).write_text("some text")
    (tmp_path / "tokenizer.model").write_bytes(Corpus.open(corpus_folder).tokenizer.model)
    command = ["tokenize", "--tokenizer", str(tmp_path / "tokenizer.model")]
    command += ["--out", str(tmp_path / "out"), "--input"]
    Handler.failures = 99
    assert cli.main([*command, f"{url}/b.txt"]) == 2
    assert f"data_pipeline: {url}/b.txt: " in capsys.readouterr().err
    Handler.failures = 0
    assert cli.main([*command, f"{url}/streamed.txt"]) == 2
    assert "does not say how long it is" in capsys.readouterr().err
    assert cli.main([*command, f"{url}/b.txt"]) == 0


def test_a_web_server_that_fails_for_a_while(url, corpus, tmp_path):
    Handler.failures = 2
    remote = Corpus.open(f"{url}/first", tmp_path)
    Handler.failures = 2
    assert remote.read(0, 50).tolist() == corpus.read(0, 50).tolist()
    Handler.failures = 99
    with pytest.raises(DataError, match="failed 5 times, last with: 503"):
        Corpus.open(f"{url}/first", tmp_path)
    Handler.failures = 0
