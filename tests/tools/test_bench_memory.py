"""The benchmark of the writes: what is compared, and that its tables are the runs'."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from hope.model import num_parameters
from tools import bench_memory
from train.callbacks.metrics import read_metrics
from train.config import load_config


@pytest.fixture
def small(corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tests' corpus, two steps a run; figures and runs in a folder of the test's own."""
    where = {
        "data.train": f"[{{path: {corpora['train']}}}]",
        "data.validation": corpora["validation"],
    }
    where |= {"training.total_tokens": 8192, "mlflow.enabled": "false"}
    common = [one for one in bench_memory.COMMON if one.partition("=")[0] not in where]
    changed = tuple(f"{key}={value}" for key, value in where.items())
    monkeypatch.setattr(bench_memory, "CONFIG_FILE", Path("configs/quickstart.yaml").resolve())
    monkeypatch.setattr(bench_memory, "COMMON", (*common, *changed))
    monkeypatch.setattr(bench_memory, "prepare_corpus", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)


def test_models_are_of_a_size_and_differ_in_what_their_title_says(small: None) -> None:
    variants = dict(bench_memory.all_variants())
    assert list(variants) == ["strong", "weak", "not_written", "transformer"]
    models = {
        key: load_config(bench_memory.CONFIG_FILE, [*bench_memory.COMMON, *words]).model
        for key, (_, words) in variants.items()
    }
    sizes = {k: num_parameters(replace(one, vocab_size=400)) for k, one in models.items()}
    assert all(abs(size / sizes["weak"] - 1) < 0.001 for size in sizes.values())
    weak = models["weak"]
    assert replace(weak, titans=models["strong"].titans) == models["strong"]
    assert models["strong"].titans.scan == replace(
        weak.titans.scan, delta_rule="target", eta_max=0.5
    )
    assert replace(weak, titans=replace(weak.titans, writes=False)) == models["not_written"]
    assert models["transformer"].mixer == "attention"


@pytest.mark.slow
def test_tables_and_figures_are_of_the_runs(
    small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second time everything is there
        assert bench_memory.main(["--seeds", "2"]) == 0
    shown = capsys.readouterr().out
    figures = json.loads(Path("runs/bench/memory.json").read_text())["figures"]
    found = {}
    for key, (title, _) in bench_memory.all_variants():
        runs = [Path("runs/memory") / f"{key}-seed{seed}" / "metrics.jsonl" for seed in (0, 1)]
        losses = [read_metrics(run)[-1]["loss"] for run in runs]
        found[key] = sum(losses) / 2
        assert figures[f"{key}_loss"] == pytest.approx(found[key])
        assert any(f"{found[key]:.4f}" in row for row in shown.splitlines() if title in row)
    assert figures["strong_gain"] == pytest.approx(found["not_written"] - found["strong"])
    assert "context from" in shown
