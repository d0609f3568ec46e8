"""What is ours in the comparison with public implementations; they themselves are not needed."""

from __future__ import annotations

import json
import os
import runpy
import sys
from math import prod
from pathlib import Path

import pytest

from hope import HopeModel
from tools import bench_peers, peer_models
from tools.peer_models import Comparison, Result, Side

LEVELS, CMS = 4, 2_104_320
"""Levels and CMS parameters of nested-learning's preset at width 256."""


def result(*pairs: tuple[float, float]) -> Result:
    return Result(256, (5, 6), (0, 0), list(pairs))


def test_ratios_are_medians_of_pairs_and_the_hardest_peer_decides() -> None:
    results = {
        "kmccleary": result((60.0, 2.0), (50.0, 1.0), (10.0, 1.0)),
        "kmccleary_whole": result((3.0, 1.0)),
        "lucidrains": result((9.0, 2.0), (12.0, 2.0)),
    }
    assert bench_peers.speedups(results) == {
        "peer_speedup_kmccleary": 30.0,
        "peer_speedup_kmccleary_whole": 3.0,
        "peer_speedup_lucidrains": 5.25,
        "peer_speedup": 0.525,
    }
    lines = bench_peers.report(results).splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(results)
    assert "30.0" in lines[2]
    assert "5.2" in lines[4]


def test_a_missing_peer_leaves_the_summary_out() -> None:
    figures = bench_peers.speedups({"lucidrains": result((10.0, 1.0))})
    assert figures == {"peer_speedup_lucidrains": 10.0}
    assert bench_peers.speedups({}) == {}


def test_memory_is_what_a_row_carries() -> None:
    model = HopeModel(peer_models.titans_config(), seed=0)
    spec = model.layers[0].state_spec(batch=1)
    carried = sum(prod(one.shape) for name, one in spec.items() if name.startswith("memory."))
    assert peer_models.memory_floats(model.layers[0].mixer) == carried == 5 * 2 * 256 * 256


def test_our_sides_write_and_have_the_asked_size() -> None:
    model = peer_models.our_model(64, LEVELS, CMS)
    mixer = peer_models.our_mixer(64)
    assert model.cms >= CMS
    assert model.cms < 1.01 * CMS
    assert model.memory == mixer.memory
    assert model.step() > 0
    assert mixer.step() > 0


def test_pairs_are_taken_in_turn_and_a_smaller_memory_is_refused() -> None:
    order = []

    def side(name: str, memory: int) -> Side:
        return Side(lambda: order.append(name) or 1.0, memory)

    def build(ours: int) -> Comparison:
        return Comparison(8, lambda tokens: (side("theirs", 4), side("ours", ours)))

    seen: list[int] = []
    found = peer_models.compare(build(4), 2, lambda number, theirs, ours: seen.append(number))
    assert order == ["theirs", "ours", "ours", "theirs", "ours", "theirs", "ours"]
    assert (len(found.pairs), seen, found.memory) == (2, [1, 2], (4, 4))
    with pytest.raises(AssertionError, match="smaller"):
        peer_models.compare(build(3), 1, lambda *_: None)


def test_online_chunks_cover_every_token_once() -> None:
    assert list(peer_models.online_chunks(5, 2)) == [(0, 2), (2, 4), (4, 5)]
    assert list(peer_models.online_chunks(4, 4)) == [(0, 4)]
    inputs, targets = peer_models.draw(6)
    assert inputs[:, 1:].equal(targets[:, :-1])


def test_the_figures_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_peers, "prepare", lambda *_: Path(sys.executable))
    monkeypatch.setattr(bench_peers, "run", lambda python, name, pairs: result((20.0, 1.0)))
    assert bench_peers.main([]) == 0
    saved = json.loads(Path("runs/bench/peers.json").read_text())
    assert set(saved) == {"name", "machine", "date", "figures"}
    assert saved["figures"]["peer_speedup"] == 1.0
    assert "runs/bench/peers.json" in capsys.readouterr().out


def test_a_package_that_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peer_models", "lucidrains", "--pairs", "1"])
    # A broken package of that name hides an installed one.
    (tmp_path / "titans_pytorch.py").write_text("raise ImportError('No module named it')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "titans_pytorch", raising=False)
    monkeypatch.delitem(sys.modules, "tools.peer_models")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tools.peer_models", run_name="__main__")
    written = capsys.readouterr()
    assert (ended.value.code, written.out) == (1, "")
    assert written.err == "lucidrains: not installed (No module named it)\n"


def test_without_packages_there_is_one_line_and_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert bench_peers.main(["--environment", str(tmp_path / "venv")]) == 1
    written = capsys.readouterr()
    assert written.err.count("\n") == 1
    assert written.err.startswith("error: can't install the peers: No matching distribution")
    assert not Path("runs/bench/peers.json").exists()
    assert not (tmp_path / "venv" / "peers.sha256").exists()
