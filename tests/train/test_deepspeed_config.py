"""A user's DeepSpeed file beside our configuration, and what DeepSpeed can't run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.parity import ROWS, make_config
from train.__main__ import main
from train.config import ConfigError, RunConfig, dump_config
from train.engines import layout_of
from train.parallel.layout import Layout
from train.zero.config import settings
from train.zero.library import open_deepspeed

TWO = Layout(dp_replicate=2)


def with_file(tmp_path: Path, content: Any, **changes: Any) -> RunConfig:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return make_config(
        "transformer",
        {"micro_batches": 2},
        **{"engine": "deepspeed", "deepspeed.config": str(path), "deepspeed.zero_stage": 2},
        **changes,
    )


AGREEING: dict[str, Any] = {
    "train_batch_size": ROWS,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": False},
    "fp16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "betas": [0.9, 0.95], "eps": 1e-5}},
    "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000},
    "wall_clock_breakdown": True,
}


def test_a_file_that_agrees_is_merged(tmp_path: Path) -> None:
    merged = settings(with_file(tmp_path, AGREEING), TWO)
    assert merged["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "compute_grad_norm": False,
    }
    assert merged["wall_clock_breakdown"] is True
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [merged[key] for key in sizes] == [ROWS, ROWS // 4, 2]
    assert merged["fp16"] == {"enabled": False}
    assert merged["gradient_clipping"] == 0.0  # the cadence clips
    assert "optimizer" not in merged  # the cadence steps


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"train_batch_size": 9}, "train_batch_size=9 contradicts .* it is 8"),
        ({"train_micro_batch_size_per_gpu": 1}, "per_gpu=1 contradicts .* it is 2"),
        ({"gradient_accumulation_steps": 1}, "steps=1 contradicts .* it is 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0 contradicts .* it is 0.5"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3 contradicts .* it is 2"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=true contradicts .* it is false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true contradicts .* it is false"),
        ({"bf16": {"enabled": 0}}, "bf16.enabled=0 contradicts .* it is false"),
        ({"optimizer": {"type": "Lion"}}, 'optimizer.type="Lion" contradicts .* it is "adamw"'),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr=1 contradicts .* it is 0.005"),
        ({"optimizer": 3}, "optimizer=3 contradicts"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler=.*honoured; it is optimizer.schedule"),
        ({"zero_optimization": {"offload_param": {}}}, "offload_param=.*parallel.cpu_offload"),
        ({"zero_optimisation": {}}, "zero_optimisation={} can't be honoured$"),
        ([], "expected an object"),
        ("{", "not JSON"),
    ],
)
def test_a_file_that_contradicts(tmp_path: Path, theirs: Any, message: str) -> None:
    config = with_file(tmp_path, theirs)
    with pytest.raises(ConfigError, match=rf"ds\.json: .*{message}") as caught:
        layout_of(config, 2)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    config = with_file(tmp_path, {})
    (tmp_path / "ds.json").unlink()
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        layout_of(config, 2)


@pytest.mark.parametrize(
    ("parallel", "changes", "reason"),
    [
        ({}, {"optimizer.name": "muon"}, "muon needs whole matrices"),
        ({}, {"optimizer.levels": {"b": {"name": "m3"}}}, "m3 needs whole matrices"),
        ({}, {"optimizer.levels": {"c": {"reduce": "at_update"}}}, "at_update of level c"),
        ({}, {"training.batch_tokens": 9 * 32}, "equal micro-batches: 9 rows over 2"),
        ({"dp_replicate": 1, "dp_shard": 2}, {}, "leave dp_shard at 1"),
        ({"micro_batches": 3}, {}, "equal micro-batches: 8 rows over 2 .* and 3 micro_batches"),
        ({"pp": 2, "micro_batches": 2}, {"deepspeed.zero_stage": 3}, "pp=2 goes with zero_stage=1"),
        ({"pp": 2, "micro_batches": 2}, {"deepspeed.zero_stage": 2}, "zero_stage=1, not 2"),
        ({"dp_replicate": 1, "dp_shard": 2, "cpu_offload": True}, {}, "cpu_offload is engine=na"),
        (
            {"pp": 2, "micro_batches": 2, "schedule": "interleaved"},
            {},
            "schedule is 1f1b, not interleaved",
        ),
        ({"compile": True}, {"deepspeed.zero_stage": 3}, "compile goes with zero_stage 1 or 2"),
        ({"cp": 2}, {}, "cp above 1 is engine=native's"),
        ({"tp": 2, "tensor_backend": "megatron"}, {}, "tensor_backend=megatron is"),
    ],
)
def test_what_deepspeed_can_not_run(
    parallel: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    config = make_config("transformer", parallel, engine="deepspeed", **changes)
    with pytest.raises(ConfigError, match=f"^engine=deepspeed can't run this: .*{reason}"):
        layout_of(config, 2)


@pytest.mark.parametrize(
    ("world", "parallel", "stage", "reasons"),
    [
        (3, {"tp": 3, "schedule": "interleaved"}, 3, ["tp=3 must divide"]),
        (4, {"pp": 2, "micro_batches": 2}, 3, ["pp=2 goes with zero_stage=1"]),
        (16, {}, 2, ["fewer than the 16 data-parallel ranks", "needs equal micro-batches"]),
        (4, {"tp": 3, "cp": 2}, 1, ["multiply to 6, and there are 4", "tp=3 must", "cp above 1"]),
    ],
)
def test_what_is_proposed_deepspeed_can_run(
    world: int, parallel: dict[str, Any], stage: int, reasons: list[str]
) -> None:
    """Every reason, its own and every engine's, and layouts that it really takes."""
    changes = {"engine": "deepspeed", "deepspeed.zero_stage": stage}
    with pytest.raises(ConfigError) as caught:
        layout_of(make_config("transformer", parallel, **changes), world)
    said, _, hint = str(caught.value).partition("; possible: ")
    assert all(reason in said for reason in reasons)
    proposals = re.findall(r"\((\d+) ranks as ([^)]*)\)", hint)
    assert proposals
    for ranks, text in proposals:
        found = {key: int(value) for key, value in (pair.split("=") for pair in text.split())}
        raw = {**parallel, "tp": 1, "pp": 1, "cp": 1, **found}
        assert layout_of(make_config("transformer", raw, **changes), int(ranks))


def test_the_section_belongs_to_the_engine() -> None:
    with pytest.raises(ConfigError, match="engine=native would ignore it"):
        make_config("hope", **{"deepspeed.zero_stage": 3})


def test_the_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"needs the package deepspeed.*pip install"):
        open_deepspeed()


def test_bad_input_exits_with_2(make_config: Any, tmp_path: Path, capsys: Any) -> None:
    changes = {"engine": "deepspeed", "optimizer": {"name": "muon"}}
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(make_config(**changes)))
    assert yaml.safe_load(path.read_text())["engine"] == "deepspeed"
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "optimizer muon needs whole matrices" in error
    assert not (tmp_path / "run").exists()
