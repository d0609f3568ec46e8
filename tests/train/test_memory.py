"""Out of memory: a table of what holds it, whenever it comes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from hope.model import num_parameters
from train.__main__ import main
from train.checkpoint.load import load_run
from train.memory import memory_report
from train.optim.cadence import ACCUMULATOR
from train.trainer import Trainer


def test_where_the_bytes_are_at_any_time(
    make_config,
    raw_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(**{"model.mixer": "attention", "training.stop_at_tokens": 256})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw_config))

    def told(*arguments: str) -> str:
        assert main([str(file), *arguments]) == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    def nothing_left(*_: Any) -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    with monkeypatch.context() as patch:
        patch.setattr("train.run.open_engine", nothing_left)
        error = told()
    assert "error: DefaultCPUAllocator" in error
    assert "out of memory on rank 0, while the model was built:" in error
    assert main([str(file)]) == 0
    size = 4 * num_parameters(load_run(config.run_dir)[0].model)
    (line,) = [one for one in error.splitlines() if "parameters of the whole model" in one]
    assert float(line.split()[-2]) == pytest.approx(size / 2**20, abs=0.06)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take_up", nothing_left)
        assert "in phase open of step 0:\n  parameters" in told("--resume")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", nothing_left)
        patch.setitem(raw_config["training"], "stop_at_tokens", 512)
        file.write_text(yaml.safe_dump(raw_config))
        assert "in phase start of step 1:\n  parameters" in told("--resume")


def test_what_lies_elsewhere_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that is full: its own bytes, not those that are kept on the CPU."""
    mebi, gpu = 2**20, torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * mebi)
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device, abbreviated: f"of {device}")
    parameter = SimpleNamespace(
        device=gpu, grad=None, numel=lambda: mebi // 2, element_size=lambda: 4
    )
    trainer: Any = SimpleNamespace(
        engine=SimpleNamespace(
            parameters={"w": parameter, "offloaded": torch.zeros(mebi)},
            mesh=SimpleNamespace(device=gpu),
        ),
        cadence=SimpleNamespace(levels=[], state={"w": {ACCUMULATOR: torch.zeros(mebi // 2)}}),
        carried=None,
        ranks=SimpleNamespace(rank=1, pulse=SimpleNamespace(phase="forward", step=3)),
        config=SimpleNamespace(parallel=SimpleNamespace(micro_batches=1)),
    )

    def numbers(error: BaseException) -> dict[str, str]:
        lines = [line.rsplit(maxsplit=2) for line in memory_report(trainer, error).splitlines()]
        return {line[0].strip(): line[1] for line in lines if line[-1] == "MiB"}

    full = numbers(torch.OutOfMemoryError("CUDA out of memory"))
    assert full["parameters"] == "2.0"
    assert full["accumulators of slow levels"] == "0.0"
    assert full["everything else, activations first"] == "5.0"
    assert full["peak allocated on the device"] == "7.0"
    full = numbers(MemoryError())
    assert full["parameters"] == "4.0"
    assert full["accumulators of slow levels"] == "2.0"
    assert "peak of the process, libraries included" in full
