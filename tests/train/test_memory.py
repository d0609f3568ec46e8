"""Out of memory: a table of what holds it, whenever it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hope.model import num_parameters
from train.__main__ import main
from train.checkpoint.load import load_run
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
        patch.setattr("train.__main__.open_engine", nothing_left)
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
