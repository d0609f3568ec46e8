"""One rank of a cluster that isn't there: what is built, counted, printed and refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from hope import HopeModel
from tools.parity import STEP, deepspeed_config, make_config
from train.__main__ import main
from train.config import RunConfig
from train.dry_run.build import dry_run, fake_ranks
from train.dry_run.memory import (
    Action,
    held_bytes,
    order_of_one_stage,
    peak_of_actions,
)
from train.dry_run.report import size
from train.dry_run.tracing import LiveBytes, PartBytes
from train.dry_run.traffic import steps_of_periods
from train.dry_run.zero import DEFAULTS, Gathers, Lines, gathers
from train.optim.build import build_cadence
from train.optim.cadence import ACCUMULATOR
from train.parallel.counting import CollectiveBytes
from train.parallel.mesh import alone
from train.zero.cadence import Group

CONFIG = "configs/quickstart.yaml"
BIG = [
    "model.vocab_size=1024",
    "model.num_layers=4",
    "training.batch_tokens=1048576",
    "parallel={tp: 4, pp: 2, dp_replicate: -1, dp_shard: 16, micro_batches: 2}",
]


def test_resume_from_is_not_of_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["c.yaml", "--dry-run", "--resume-from", "tokens-1"])
    assert stopped.value.code == 2
    assert "--resume-from belongs to a run" in capsys.readouterr().err


def test_a_rank_of_1024_is_built_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    options = ["--dry-run", "--world-size", "1024", "--rank", "777"]
    assert main([CONFIG, *options, f"run_dir={run_dir}", *BIG]) == 0
    printed = capsys.readouterr().out
    assert "rank 777 of 1024: pp=2 dp_replicate=8 dp_shard=16 tp=4" in printed
    assert "layers        2-3" in printed
    for kind in ("weights", "gradients", "accumulators", "optimizer", "fast state", "activations"):
        assert f"  {kind}" in printed
    assert "  dp   reduce-scatter" in printed
    assert list(tmp_path.iterdir()) == []


def test_one_layer_does_not_read_as_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [CONFIG, "--dry-run", f"run_dir={tmp_path}", "model.vocab_size=1024"]
    for layers, shown in ((1, "layer         0\n"), (2, "layers        0-1\n")):
        assert main([*options, f"model.num_layers={layers}"]) == 0
        assert shown in capsys.readouterr().out


def test_under_deepspeed_it_is_deepspeeds_numbers_that_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dry-run", "--world-size", "4", f"run_dir={tmp_path}", "model.vocab_size=1024"]
    options += ["engine=deepspeed", "parallel.tp=2"]
    printed = []
    for stage in (1, 3):
        assert main([CONFIG, *options, f"deepspeed.zero_stage={stage}"]) == 0
        printed.append(capsys.readouterr().out)
        assert "rank 0 of 4: dp_replicate=2 tp=2" in printed[-1]
    parameters = [re.search(r"parameters +([\d,]+) of", text) for text in printed]
    assert parameters[0] is not None
    assert parameters[0][1] == parameters[1][1]  # type: ignore[index]
    assert "  dp   all-reduce" in printed[0]
    assert "  dp   reduce-scatter" in printed[1]
    assert all("  optimizer" in text and "  tp   all-reduce" in text for text in printed)


def zero(stage: int, parallel: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    return deepspeed_config("hope", stage, {"dp_replicate": -1, **(parallel or {})}, **changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_stages_divide_more_and_more(precision: str) -> None:
    """Bytes a rank of four holds, of P parameters in lines of F numbers."""
    runs = [dry_run(zero(stage, {"precision": precision}), 4, 1) for stage in (1, 2, 3)]
    number = 2 if precision == "bf16" else 4
    parameters = runs[0].parameters
    assert [run.own_parameters for run in runs] == [parameters] * 3
    one, two, three = (run.memory for run in runs)
    assert one.weights == two.weights
    assert one.weights == pytest.approx((number + 1) * parameters, rel=0.01)
    # All of them are small enough to be kept whole in stage 3, too.
    assert three.weights == pytest.approx((number / 4 + 1 + number) * parameters, rel=0.01)
    assert one.optimizer == pytest.approx(2 * parameters, rel=0.01)
    assert one.gradients > two.gradients == 0
    assert two.accumulators == one.accumulators


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_starts_of_nested_levels_are_divided_too(stage: int) -> None:
    """theta0 in float32, two moments and an accumulator of its own."""
    slower = {"name": "b", "hidden_size": 8, "update_every_tokens": 2 * STEP}
    changes = {"model.cms.levels": [{"name": "a", "hidden_size": 16}, slower]}
    modes = ("sequential", "nested")
    runs = [dry_run(zero(stage, **changes, **{"model.cms.mode": mode}), 4, 1) for mode in modes]
    plain, nested = (run.memory for run in runs)
    starts = nested.weights - plain.weights
    numbers = 4 * (3 * 16 * 32 + 32)  # of level a: four layers, three matrices and a norm
    assert starts == pytest.approx(4 * numbers / 4, rel=0.01)
    assert nested.optimizer - plain.optimizer == 2 * starts
    assert nested.accumulators - plain.accumulators == starts


def test_a_bucket_costs_what_is_written_to_it_on_a_cpu_and_all_of_it_elsewhere() -> None:
    """DeepSpeed's default is 5e8 numbers."""
    for stage in (1, 2, 3):
        host, device = (dry_run(zero(stage), 2, 0, kind).memory for kind in ("cpu", "cuda"))
        assert host.step_buffers < 10**6
        assert device.step_buffers == pytest.approx(4 * 5e8, rel=0.01)


def test_deepspeeds_own_values_are_those_it_has() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig()
    for key, value in DEFAULTS.items():
        assert key == "overlap_comm" or getattr(theirs, key) == value, key


def test_what_stage_3_gathers_by_hand() -> None:
    """Token vectors of 20 numbers, which are the head too, two layers of 100, a norm of 10."""
    sizes = {"embedding.weight": 20, "layers.0.a": 60, "layers.0.b": 40, "layers.1.a": 100}
    sizes["norm.weight"] = 10
    lines = Lines([Group("fast", 0.0, list(sizes))], sizes, set(), 3, 2, 0)
    whole = {**DEFAULTS, "param_persistence_threshold": 0}
    assert gathers(lines, whole) == Gathers(sent=230, alive=230)
    # Nothing is kept for backward: all but what was whole at the end is gathered twice.
    strict = {**whole, "max_reuse_distance": 0, "prefetch_bucket_size": 0}
    assert gathers(lines, strict) == Gathers(sent=460, alive=120)
    # The second layer comes again after the norm's 10 numbers, the first after 110.
    assert gathers(lines, {**strict, "max_reuse_distance": 50}) == Gathers(sent=330, alive=130)
    # The norm is kept whole all the time, as everything is by DeepSpeed's own threshold.
    assert gathers(lines, {**strict, "param_persistence_threshold": 10}).sent == 440
    assert gathers(lines, DEFAULTS).sent == 0


def test_the_vocabulary_comes_from_the_data_where_there_is_some(
    raw_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    assert main([str(path), "--dry-run"]) == 0
    counted = capsys.readouterr().out
    assert main([str(path), "--dry-run", "model.vocab_size=400"]) == 0
    assert capsys.readouterr().out == counted
    assert not (tmp_path / "run").exists()
    assert main([str(path), "--dry-run", "data.train=[{path: nowhere}]"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--world-size", "1024", "parallel.tp=3"], "can't be laid out"),
        (["--world-size", "2", "--rank", "2"], "--rank 2: the ranks are 0 to 1"),
        (["--world-size", "0"], "--world-size 0: a cluster has at least one rank"),
    ],
)
def test_impossible_layouts_end_with_one_line_and_status_2(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([CONFIG, "--dry-run", "model.vocab_size=1024", *options]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_its_options_are_refused_in_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([CONFIG, "--world-size", "2"])
    assert caught.value.code == 2
    assert "belong to --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (4, {"tp": 2, "pp": 2, "micro_batches": 2}),
        (4, {"dp_replicate": 1, "dp_shard": 4}),
    ],
)
def test_ranks_hold_the_model_between_them(world: int, parallel: dict[str, Any]) -> None:
    """Each parameter once, but for those that every tensor-parallel rank has, and tied ones."""
    config = make_config("hope", parallel, **{"model.tie_embeddings": False})
    runs = [dry_run(config, world, rank) for rank in range(world)]
    model = HopeModel(config.model)
    twice = 0
    if parallel.get("tp"):
        plan = model.shard_plan()
        named = model.named_parameters()
        twice = sum(p.numel() for name, p in named if type(plan[name]).__name__ == "Replicate")
    assert sum(run.own_parameters for run in runs) == runs[0].parameters + twice
    assert runs[0].parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "m3"])
@pytest.mark.parametrize("mode", ["sequential", "nested"])
def test_bytes_that_optimizers_and_accumulators_keep(optimizer: str, mode: str) -> None:
    changes: dict[str, Any] = {
        "optimizer.name": optimizer,
        "optimizer.sgd": {"momentum": 0.9},
        "model.cms.mode": mode,
        "model.cms.levels": [
            {"name": "a", "hidden_size": 16},
            {"name": "b", "hidden_size": 8, "update_every_tokens": 2 * STEP},
            {"name": "c", "hidden_size": 8, "update_every_tokens": 4 * STEP},
        ],
    }
    config = make_config("hope", **changes)
    model = HopeModel(config.model)
    every = steps_of_periods(config)
    named = {name: p.detach() for name, p in model.named_parameters()}
    found = held_bytes(config, alone(), named, every)
    cadence = build_cadence(model, config.model, config.optimizer)
    most = 0
    for step in range(1, 9):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        firing = {name for name, steps in every.items() if step % steps == 0}
        cadence.step(firing, STEP, lambda _: 0.0)
        most = max(most, sum(state[ACCUMULATOR].nbytes for state in cadence.state.values()))
    tensors, _ = cadence.state_dict()
    starts = sum(t.nbytes for name, t in tensors.items() if name.endswith("/value"))
    kept = sum(
        t.nbytes
        for name, t in tensors.items()
        if t.ndim > 0 and not name.endswith(("/value", f"/{ACCUMULATOR}"))
    )
    assert found["optimizer"] == kept
    assert found["accumulators"] == most
    assert found["weights"] == sum(p.nbytes for p in model.parameters()) + starts


def test_live_bytes_see_tensors_come_and_go() -> None:
    with LiveBytes() as counted:
        x = torch.empty(100, device="meta")
        y = x + 1
        del x
        z = y.view(10, 10)
        assert (counted.live, counted.peak) == (400, 800)
        del y
        assert counted.live == 400  # z keeps the memory
        del z
    assert counted.live == 0


@pytest.mark.parametrize(("implementation", "growth"), [("chunked", 2), ("auto", 1.3)])
def test_the_scans_own_buffers_are_counted(implementation: str, growth: float) -> None:
    """Memories four times as wide: what the scan keeps inside grows, what it returns does too."""
    peaks = []
    for expansion in (1, 4):
        changes: dict[str, Any] = {"model.titans.memory_expansion": expansion}
        changes["model.titans.scan.implementation"] = implementation
        peaks.append(dry_run(make_config("hope", **changes), 1, 0).memory.activations)
    assert peaks[1] > growth * peaks[0]


@pytest.mark.parametrize(
    ("model", "key", "named"),
    [
        *(("hope", "titans.scan.implementation", name) for name in ("native", "triton", "cuda")),
        ("transformer", "attention.backend", "flash"),
    ],
)
def test_kernels_of_another_machine_are_no_obstacle(model: str, key: str, named: str) -> None:
    config = make_config(model, **{f"model.{key}": named})
    assert dry_run(config, 1, 0) == dry_run(make_config(model), 1, 0)


def test_peak_of_a_schedule_by_hand() -> None:
    part = PartBytes(forward=7, kept=5, backward=12, again=9, left=1, gradients=4)
    forward, backward = Action("F", 0), Action("B", 0)
    assert peak_of_actions([forward, backward], [part]) == 12
    # 5 kept, forward again: 5 + 7; backward of the first beside the second's 5: 5 + 12.
    assert peak_of_actions([forward, forward, backward], [part]) == 17
    # After the first: 1 left and gradients of 4; then again: 1 + 4 + 9.
    assert peak_of_actions([forward, backward, forward, backward], [part]) == 14
    # In halves: 6 wait for the second, beside them forward 7, and the other's first half 12.
    halves = PartBytes(7, 5, 12, 12, 1, 4, between=6, weights=10, weights_again=8)
    inputs, weights = Action("I", 0), Action("W", 0)
    assert peak_of_actions([forward, inputs, forward, inputs, weights, weights], [halves]) == 18


@pytest.mark.parametrize(
    ("stage", "schedule", "under_way"), [(0, "1f1b", 4), (3, "1f1b", 1), (3, "gpipe", 8)]
)
def test_micro_batches_under_way(stage: int, schedule: str, under_way: int) -> None:
    alive = most = 0
    actions = order_of_one_stage(8, 4, stage, schedule)
    for action in actions:
        alive += 1 if action.kind == "F" else -1
        most = max(most, alive)
    assert (most, alive, len(actions)) == (under_way, 0, 16)


@pytest.mark.parametrize(
    ("number", "text"), [(1023, "1,023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.00 GiB")]
)
def test_sizes_are_readable(number: int, text: str) -> None:
    assert size(number) == text


def test_collectives_are_counted_by_ring_algorithms_and_unknown_ones_refused() -> None:
    """40 bytes over four ranks."""
    tensor = torch.ones(10)
    with fake_ranks(4, 0), CollectiveBytes() as counted:
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        dist.all_gather([torch.ones(10) for _ in range(4)], tensor)
        dist.send(tensor, 1)
        dist.reduce(tensor, 0)
        expected = {"all-reduce": 60, "broadcast": 30, "reduce": 30, "all-gather": 120, "send": 40}
        assert counted.bytes == expected
        assert sum(counted.calls.values()) == 5
        with pytest.raises(AssertionError, match="not counted: c10d::gather_"):
            dist.gather(tensor, [torch.ones(10) for _ in range(4)], 0)
