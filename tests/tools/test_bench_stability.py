"""The stability benchmark sees a state that diverges, and streams what it says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from tools.bench_stability import STREAMS, main, measure, parse, prepare, segments

SHORT = ["--tokens", "640", "--segment", "256", "--threads", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Figures go to a folder of the test's own, where there are no shards: the text is Python's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def figures(folder: Path) -> dict[str, float]:
    content = json.loads((folder / "runs/bench/stability.json").read_text())
    assert content.keys() == {"name", "machine", "date", "figures"}
    return content["figures"]


def test_the_default_layer_is_bounded_and_every_figure_is_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SHORT) == 0
    found = figures(folder)
    for stream in STREAMS:
        assert found[f"finite_tokens_{stream}"] == 640
        assert 0 < found[f"last_state_norm_ratio_{stream}"] < 10
        assert found[f"last_state_change_{stream}"] > 0
    assert (folder / "runs/bench/stability.png").stat().st_size < 100_000
    assert "bounded over 640 tokens" in capsys.readouterr().out


def test_tokens_are_counted_without_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.bench_stability.tqdm", partial(tqdm, disable=True))
    assert measure(*prepare(parse(SHORT)), 256).tokens == [256, 512, 640]


def test_a_state_that_diverges_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--delta-rule", "off", "--initial-eta", "0.45"]) == 1
    found = figures(folder)
    assert min(found[f"finite_tokens_{stream}"] for stream in STREAMS) < 640
    assert max(found[f"max_state_norm_ratio_{stream}"] for stream in STREAMS) > 1e3
    assert "NOT within 10 and finite" in capsys.readouterr().out


def test_the_streams_are_what_they_are_called() -> None:
    model, text = prepare(parse([*SHORT, "--seed", "3"]))
    parts = list(segments(model, text, 256))
    assert [part.shape for part in parts] == [(4, 256, 128), (4, 256, 128), (4, 128, 128)]
    rows = torch.cat(parts, dim=1).detach()
    assert torch.equal(rows[0], model.embedding(text) * model.embedding_scale)
    assert bool((rows[1] == rows[1, 0]).all())
    assert torch.equal(rows[2, ::2], rows[2, :1].expand(320, -1))
    assert torch.equal(rows[2, 1::2], rows[2, 1:2].expand(320, -1))
    assert not torch.equal(rows[2, 0], rows[2, 1])
    noise = rows[3] / rows[3].norm(dim=-1, keepdim=True)
    cosines = (noise @ noise.T)[~torch.eye(640, dtype=torch.bool)]
    assert float(cosines.mean()) == pytest.approx(0.95, abs=0.02)
    assert float(rows.square().mean()) == pytest.approx(1, abs=0.2)


def test_the_length_of_a_segment_does_not_matter() -> None:
    model, text = prepare(parse(SHORT))
    model = model.double()
    whole, split = measure(model, text, 640), measure(model, text, 64)
    torch.testing.assert_close(whole.ratio[-1], split.ratio[-1], rtol=1e-6, atol=1e-6)
    assert whole.finite == split.finite == [640] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--segment", "100"], "must be a multiple of the chunk of 64"),
        (["--text", "nothing.txt"], "can't read text from nothing.txt"),
        (["--run", "nothing"], "nothing holds no run"),
        (["--eta-max", "0.001"], "must lie between 0 and titans.scan.eta_max"),
        (["--memory-chunk", "48"], "must be a multiple of memory_chunk"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (folder / "runs").exists()


def test_ctrl_c_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.bench_stability._norms", interrupted)
    assert main(SHORT) == 130
    assert capsys.readouterr().err.endswith("stopped; nothing was written\n")
    assert not (folder / "runs").exists()
