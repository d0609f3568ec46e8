"""No layout changes the mathematics: every one follows one process, step after step."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hope.config import AttentionConfig, HopeConfig
from tools.parity import (
    LENGTH,
    MODELS,
    ROWS,
    SP,
    TOLERANCE,
    alone,
    errors_of,
    make_batch,
    make_config,
    several,
    table,
    trained,
    worst_error,
)
from tools.processes import run
from train.config import RunConfig
from train.engines import layout_of, open_engine
from train.parallel.config import ParallelConfig
from train.parallel.layout import Job, resolve
from train.parallel.part import Part, cut_layers
from train.parallel.pipeline import in_halves
from train.parallel.ranks import Ranks
from train.section import ConfigError


def compare(model: str, world: int, configs: dict[str, RunConfig]) -> None:
    errors = errors_of(model, world, configs, seconds=1200)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


CASES = [
    pytest.param(engine, model, world, id=f"{engine}-{model}-{world}")
    for engine in ("native", "deepspeed")
    for model in MODELS
    for world in (2, 4, 8)
]


def test_a_third_of_the_layouts_of_two_ranks_follow_one_process() -> None:
    """Every third of those below: sharded, tensor, pipeline and context parallel."""
    layouts = table("native", "hope", 2)
    compare("hope", 2, {name: layouts[name] for name in list(layouts)[2::3]})


TOGETHER: list[dict[str, Any]] = [
    {"pp": 2, "tp": 2, "micro_batches": 2},
    {"pp": 2, "tp": 2, "micro_batches": 2, **SP},
    {"pp": 2, "cp": 2, "micro_batches": 2},
    {"pp": 2, "dp_replicate": 2, "micro_batches": 2},
    {"pp": 4, "micro_batches": 4},
]


def test_pipelines_beside_other_axes_follow_one_process() -> None:
    """Stages of half a sequence, of half the rows, and stages that are neither first nor last."""
    compare("transformer", 4, {str(one): make_config("transformer", one) for one in TOGETHER})


def test_softmax_layers_and_stages_down_a_v_follow_one_process() -> None:
    """Pieces of sequences with convolutions, and schedules of two stages a rank."""
    layouts: list[dict[str, Any]] = [
        {"cp": 2, "micro_batches": 2},
        {"pp": 2, "micro_batches": 4, "schedule": "interleaved"},
        {"pp": 2, "micro_batches": 4, "schedule": "zbv"},
    ]
    model = "hope-attention"
    compare(model, 2, {str(one): make_config(model, one) for one in layouts})


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("engine", "model", "world"), CASES)
def test_every_layout_follows_one_process(engine: str, model: str, world: int) -> None:
    """Losses, the norm of every level, a held-out loss and all parameters over eight steps, in
    which every level fires, with memories carried, documents and padding."""
    compare(model, world, table(engine, model, world))


class Scans(TorchDispatchMode):
    """Counts the scan's forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.counts["backward" if name.endswith("backward") else "forward"] += "scan" in name
        return func(*args, **(kwargs or {}))


def scans(rank: int, configs: list[RunConfig]) -> list[dict[str, int]]:
    """The scans of this rank in one step of each configuration."""
    found = []
    for config in configs:
        engine = open_engine(config, Ranks())
        with Scans() as seen:
            engine.forward_backward(make_batch(0, 0, ROWS), None)
        found.append(dict(seen.counts))
    return found


def test_no_schedule_runs_a_recurrence_twice() -> None:
    """Two layers a rank and four micro-batches; nor with layers that are recomputed."""
    layouts = [
        {"pp": 2, "micro_batches": 4, "schedule": schedule, "activation_checkpointing": how}
        for schedule in ("1f1b", "zero-bubble", "zbv")
        for how in ("none", "selective")
    ]
    found = run(2, scans, [make_config("hope", layout) for layout in layouts], seconds=120)
    assert found == [[{"forward": 8, "backward": 8}] * len(layouts)] * 2


def compiled_passes(rank: int, config: RunConfig) -> list[int]:
    """How often compiled layers ran forward and backward in one step."""
    engine = open_engine(config, Ranks())
    engine.forward_backward(make_batch(0, 0, ROWS), None)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        engine.forward_backward(make_batch(1, 0, ROWS), None)
    counts = {event.key: event.count for event in seen.key_averages()}
    return [counts["CompiledFunction"], counts["CompiledFunctionBackward"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_schedule_runs_a_compiled_layer_twice() -> None:
    """Its backward pass is one call, which gives the inputs' gradients and the parameters'."""
    layout = {"pp": 2, "micro_batches": 2, "schedule": "zbv", "compile": True}
    found = run(2, compiled_passes, make_config("transformer", layout), seconds=500)
    assert found == [[4, 4]] * 2


def test_memories_behind_one_another_follow_one_process() -> None:
    """Frozen ones: M_q and M_mem have the same parameters, which a schedule of halves goes to."""
    changes = {"model.titans.writes": False, "model.titans.adaptive_query": True}
    layout = {"pp": 2, "micro_batches": 4, "schedule": "zero-bubble"}
    found = run(2, several, [make_config("hope", layout, **changes)], seconds=60)
    expected = trained(0, make_config("hope", **changes), ranks=Ranks.alone())
    assert worst_error([trace for (trace,) in found], expected) <= TOLERANCE


def test_backward_passes_go_in_halves_where_that_repeats_nothing() -> None:
    def halves(model: str, changes: dict[str, Any] | None = None, **parallel: Any) -> bool:
        config = make_config(model, **(changes or {}))
        part = Part(cut_layers(config.model, range(2)), range(2))
        return in_halves(ParallelConfig(**parallel), part)

    assert halves("transformer", schedule="zbv")
    assert halves("transformer", schedule="zero-bubble")
    assert not halves("transformer", schedule="interleaved")
    assert not halves("transformer", schedule="zbv", compile=True)
    assert not halves("transformer", schedule="zbv", activation_checkpointing="selective")
    assert not halves("hope-attention", schedule="zbv")
    frozen = {"model.titans.writes": False}
    assert halves("hope", frozen, schedule="zbv")
    assert not halves("hope", frozen | {"model.titans.adaptive_query": True}, schedule="zbv")


SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero-bubble", "zbv")


def random_layouts(count: int, seed: int) -> list[tuple[str, int, dict[str, Any]]]:
    """Possible ones, drawn among all axes, models and options.

    What is drawn first is kept until the rest fits it: a pipeline's schedule, or none. Drawn with
    the rest, those with two stages a rank would be as rare as layouts that they are possible in.
    """
    rng, found = random.Random(seed), []
    schedule = rng.choice((None, None, None, *SCHEDULES))
    while len(found) < count:
        model, world = rng.choice(list(MODELS)), rng.choice((2, 4, 4, 8))
        sizes = {axis: rng.choice((1, 1, 2, 4)) for axis in ("tp", "cp", "dp_shard")}
        raw = {
            **sizes,
            "pp": 1 if schedule is None else rng.choice((2, 4)),
            "dp_replicate": -1,
            "schedule": schedule or "1f1b",
            "micro_batches": rng.choice((1, 2, 4)),
            "sequence_parallel": sizes["tp"] > 1 and rng.random() < 0.5,
            "activation_checkpointing": rng.choice(("none", "none", "selective", "full")),
        }
        try:
            config = make_config(model, raw)
            layout_of(config, world)
        except ConfigError:
            continue
        found.append((model, world, raw))
        schedule = rng.choice((None, None, None, *SCHEDULES))
    return found


RANDOM_SEEDS = range(5)


def test_random_layouts_have_every_schedule() -> None:
    """Ten layouts of each of the seeds below: a fair share of each would be six."""
    drawn = [raw for seed in RANDOM_SEEDS for _, _, raw in random_layouts(10, seed)]
    counts = Counter(raw["schedule"] for raw in drawn if raw["pp"] > 1)
    assert all(counts[schedule] >= 3 for schedule in SCHEDULES), counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", RANDOM_SEEDS)
def test_random_layouts_follow_one_process(seed: int) -> None:
    groups: dict[tuple[str, int], dict[str, RunConfig]] = {}
    for model, world, layout in random_layouts(10, seed):
        groups.setdefault((model, world), {})[str(layout)] = make_config(model, layout)
    for (model, world), configs in groups.items():
        compare(model, world, configs)


def test_bfloat16_stays_near_float32() -> None:
    """Rounded to 8 bits: losses within 2 %, whatever the layout; parameters stay float32."""
    layouts = [
        {"precision": "bf16"},
        {"precision": "bf16", "dp_replicate": 1, "dp_shard": 2},
        {"precision": "bf16", "tp": 2, **SP},
        {"precision": "bf16", "pp": 2, "micro_batches": 2},
    ]
    expected = alone("hope").losses
    for traces in run(2, several, [make_config("hope", one) for one in layouts], seconds=300):
        for trace in traces:
            assert trace.losses == pytest.approx(expected, rel=0.02)
            assert trace.losses != expected
            assert all(p.dtype.itemsize == 4 for p in trace.parameters.values())


COMPILED: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, {"dp_replicate": 1, "dp_shard": 2}),
    (2, {"tp": 2, **SP}),
    (2, {"pp": 2, "micro_batches": 2}),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["hope", "hope-attention"])
@pytest.mark.parametrize(("world", "layout"), COMPILED)
def test_compiled_layers_follow_one_process(model: str, world: int, layout: dict[str, Any]) -> None:
    """With every axis but cp, whose layers wait for each other."""
    compare(model, world, {str(layout): make_config(model, {**layout, "compile": True})})


JOB = Job(HopeConfig(vocab_size=48, dim=32, num_layers=4, num_heads=4), ROWS, LENGTH)
IMPOSSIBLE = [
    ({"tp": 3, "dp_replicate": 1}, 3, "tp=3 must divide the heads"),
    ({"pp": 8, "dp_replicate": 1, "micro_batches": 8}, 8, "8 pipeline stages need as many layers"),
    ({"pp": 2, "dp_replicate": 3}, 4, "its axes multiply to 6, and there are 4 ranks"),
    ({"pp": 2, "schedule": "interleaved", "micro_batches": 3}, 2, "equal micro-batches"),
    ({"pp": 4, "micro_batches": 2}, 4, "needs micro_batches of at least pp=4"),
    ({"cp": 3}, 3, "cp=3 must divide data.seq_len=32"),
    ({"cp": 4}, 4, "multiple of projection_chunk=64"),
    ({"cp": 2, "activation_checkpointing": "full"}, 2, "send everything twice"),
    ({}, 16, "8 rows of data.seq_len tokens, fewer than the 16"),
    ({"dp_shard": 0}, 2, "dp_replicate and dp_shard are at least 1, or -1"),
    ({"dp_replicate": 0}, 2, "dp_replicate and dp_shard are at least 1, or -1"),
    ({"dp_shard": -1}, 2, "only one of dp_replicate and dp_shard"),
    ({"micro_batches": 9}, 1, "micro_batches=9 of only 8 rows"),
    ({"tensor_backend": "megatron"}, 1, "needs tp above 1"),
    ({"cpu_offload": True}, 2, "cpu_offload needs dp_shard"),
    ({"pp": 2, "stages_per_rank": 2, "micro_batches": 2}, 2, "schedule=1f1b has one stage a rank"),
    ({"pp": 2, "schedule": "interleaved", "micro_batches": 5}, 2, "must be a multiple of pp=2"),
    ({"pp": 2, "cp": 2, "schedule": "zbv"}, 4, "schedule=zbv with cp above 1: use 1f1b or"),
    ({"cp": 2, "compile": True}, 2, "with cp above 1 layers wait for each other"),
    ({"cp": 16, "tp": 4, "sequence_parallel": True}, 64, "tp=4 must divide data.seq_len / cp = 2"),
    ({"pp": 2, "schedule": "zbv", "micro_batches": 2, "dp_shard": 2}, 4, "share tied embeddings"),
    ({"tensor_backend": "megatron", "activation_checkpointing": "selective"}, 1, "up in place"),
]


@pytest.mark.parametrize(("raw", "world", "reason"), IMPOSSIBLE)
def test_impossible_layouts_are_refused_with_what_would_do(
    raw: dict[str, Any], world: int, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(ParallelConfig(**raw), world, JOB)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_has_a_head_for_every_piece_of_a_sequence() -> None:
    attention = Job(replace(JOB.model, mixer="attention"), ROWS, LENGTH)
    assert resolve(ParallelConfig(cp=2, tp=2), 4, attention).world == 4
    with pytest.raises(ConfigError, match="cp=4 must divide the 2 heads of a rank"):
        resolve(ParallelConfig(cp=4, tp=2), 8, attention)


def test_convolutions_of_softmax_layers_reach_no_further_than_the_piece_before() -> None:
    def job(width: int) -> Job:
        model = replace(JOB.model, mixer="attention", attention=AttentionConfig(conv_width=width))
        return Job(model, ROWS, LENGTH)

    assert resolve(ParallelConfig(cp=4), 4, job(9)).cp == 4
    with pytest.raises(ConfigError, match="pieces of 8 tokens, and attention"):
        resolve(ParallelConfig(cp=4), 4, job(10))


def test_every_reason_is_told_where_the_axes_do_not_come_out_even_too() -> None:
    parallel = ParallelConfig(tp=3, pp=5, dp_replicate=1)
    with pytest.raises(ConfigError) as caught:
        resolve(parallel, 4, JOB)
    for reason in ("multiply to 15, and there are 4", "tp=3 must divide", "5 pipeline stages need"):
        assert reason in str(caught.value)


@pytest.mark.timeout(20)
def test_far_too_many_ranks_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"; possible: \(\d+ ranks as"):
        resolve(ParallelConfig(), 1_000_000, JOB)


def test_every_reason_is_given_and_what_is_proposed_is_possible() -> None:
    parallel = ParallelConfig(tp=3, pp=2, schedule="interleaved", micro_batches=3)
    with pytest.raises(ConfigError) as caught:
        resolve(parallel, 6, JOB)
    message = str(caught.value)
    assert message.count(";") == 2
    proposed = re.findall(r"\((\d) ranks as ([^)]*)\)", message)
    assert len(proposed) == 3
    for world, text in proposed:
        changes = dict(pair.split("=") for pair in text.split())
        raw = {"schedule": "interleaved", "micro_batches": 3, "dp_replicate": 1, **changes}
        assert resolve(ParallelConfig.model_validate(raw, strict=False), int(world), JOB)
