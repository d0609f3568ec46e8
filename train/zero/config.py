"""The section `deepspeed` of the configuration, and a user's own DeepSpeed file merged with ours.

What both say has to be the same. What only their file says is passed on where it changes how
DeepSpeed computes (buckets, overlap, profiling), and refused where it would change what.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from train.optim.config import LevelSettings
from train.optim.levels import periods
from train.parallel.config import ParallelConfig
from train.parallel.layout import Layout
from train.section import ConfigError, LocalPath, Section

if TYPE_CHECKING:
    from train.config import RunConfig

PASSED_ON = {
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "comms_logger",
    *(
        f"zero_optimization.{key}"
        for key in (
            "allgather_bucket_size",
            "allgather_partitions",
            "contiguous_gradients",
            "ignore_unused_parameters",
            "log_trace_cache_warnings",
            "overlap_comm",
            "prefetch_bucket_size",
            "max_live_parameters",
            "max_reuse_distance",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "reduce_bucket_size",
            "reduce_scatter",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_prefetch_bucket_size",
            "sub_group_size",
            "use_multi_rank_bucket_allreduce",
        )
    ),
}
"""Keys of a DeepSpeed file that leave the mathematics alone; sections stand for all below them."""

ELSEWHERE = {
    "scheduler": "optimizer.schedule",
    "zero_optimization.offload_optimizer": "parallel.cpu_offload",
    "zero_optimization.offload_param": "parallel.cpu_offload",
    "tensor_parallel": "parallel.tp",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "compile": "parallel.compile",
}
"""Keys of a DeepSpeed file whose place in ours is another."""

NEVER = 2**31  # steps between DeepSpeed's own prints


class DeepSpeedConfig(Section):
    """How engine=deepspeed shards, over all data-parallel ranks.

    zero_stage: 1 shards the optimizer's state and float32 parameters, 2 also gradients, 3 also the
        parameters that compute (arXiv 1910.02054). With parallel.pp above 1 it is 1.
    config: a DeepSpeed file (JSON) of your own. What it says of batch sizes, precision, optimizer,
        clipping or stage must be what this configuration says, or "auto".
    """

    zero_stage: Literal[1, 2, 3] = Field(1)
    config: LocalPath | None = None


def settings(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """What DeepSpeed is initialised with. Raises ConfigError, one line, for a file that can't be
    read, contradicts ours (both values are named) or has keys that this engine can't honour."""
    optimizer = config.optimizer
    micro = config.parallel.micro_batches
    ours: dict[str, Any] = {
        "train_batch_size": config.batch_rows,
        "train_micro_batch_size_per_gpu": config.batch_rows // (layout.dp * micro),
        "gradient_accumulation_steps": micro,
        "gradient_clipping": optimizer.clip_norm,
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        "bf16": {"enabled": config.parallel.precision == "bf16"},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "optimizer": {
            "type": optimizer.name,
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
            },
        },
    }
    if layout.pp > 1 and config.parallel.sequence_parallel:
        # What passes between stages differs from rank to rank along tp: each sends all it has.
        ours["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    merged = {**ours, "steps_per_print": NEVER}
    if config.deepspeed.config is not None:
        merged = _merge(_read(config.deepspeed.config), merged, config.deepspeed.config)
    # These are the cadence's: DeepSpeed must not do them once more.
    del merged["optimizer"]
    merged["gradient_clipping"] = 0.0
    stage, bf16 = config.deepspeed.zero_stage, config.parallel.precision == "bf16"
    if stage == 2 or (stage == 1 and not bf16):  # elsewhere DeepSpeed insists on a norm of its own
        merged["zero_optimization"] = {**merged["zero_optimization"], "compute_grad_norm": False}
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed.config={path}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed.config={path}: not JSON: {error}") from None
    if not isinstance(theirs, dict):
        raise ConfigError(f"deepspeed.config={path}: expected an object of sections")
    return theirs


def _merge(
    theirs: dict[str, Any], ours: dict[str, Any], path: Path, above: str = ""
) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        name = above + key
        passed_on = name in PASSED_ON
        if key in ours and isinstance(ours[key], dict) and isinstance(value, dict):
            merged[key] = _merge(value, ours[key], path, f"{name}.")
        elif passed_on:
            merged[key] = value
        elif key not in ours:
            hint = f"; it is {ELSEWHERE[name]} in ours" if name in ELSEWHERE else ""
            raise ConfigError(
                f"deepspeed.config={path}: {name}={json.dumps(value)} can't be honoured{hint}"
            )
        elif value != "auto" and not _same(value, ours[key]):
            raise ConfigError(
                f"deepspeed.config={path}: {name}={json.dumps(value)} contradicts this "
                f"configuration, where it is {json.dumps(ours[key])}"
            )
    return merged


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    return isinstance(theirs, bool) is isinstance(ours, bool) and theirs == ours


def refused(config: RunConfig) -> list[str]:
    """What of `config` DeepSpeed can't do in any layout, one phrase each."""
    found = []
    levels = _levels(config)
    if odd := sorted({one.optimizer for one in levels.values()} & {"muon", "m3"}):
        found.append(
            f"optimizer {', '.join(odd)} needs whole matrices; ZeRO cuts them into flat pieces, "
            "and this engine does not gather them: adamw or sgd, or engine=native"
        )
    if late := [name for name, one in levels.items() if one.reduce == "at_update"]:
        found.append(
            f"reduce=at_update of level {', '.join(late)}: DeepSpeed adds up the gradients of all "
            "parameters every step, and can't leave some out: engine=native with dp_replicate"
        )
    if config.parallel.cpu_offload:
        found.append("cpu_offload is engine=native's")
    if config.parallel.tensor_backend == "megatron":
        found.append("tensor_backend=megatron is engine=native's")
    if config.parallel.compile and config.deepspeed.zero_stage == 3:
        found.append("compile goes with zero_stage 1 or 2: in 3 DeepSpeed gathers as layers run")
    return found


def _levels(config: RunConfig) -> dict[str, LevelSettings]:
    return {name: config.optimizer.level(name) for name in periods(config.model)}


def problems(config: RunConfig, parallel: ParallelConfig, layout: Layout) -> list[str]:
    """What DeepSpeed can't do of a layout of `config`, one phrase each."""
    stage, found = config.deepspeed.zero_stage, []
    if layout.dp_shard > 1:
        found.append("ZeRO shards over all data-parallel ranks: leave dp_shard at 1")
    if layout.cp > 1:
        found.append("cp above 1 is engine=native's")
    if layout.pp > 1 and stage > 1:
        found.append(f"pp={layout.pp} goes with zero_stage=1, not {stage}")
    if layout.pp > 1 and parallel.schedule != "1f1b":
        found.append(f"DeepSpeed's pipeline schedule is 1f1b, not {parallel.schedule}")
    if config.batch_rows % (layout.dp * parallel.micro_batches):
        found.append(
            f"DeepSpeed needs equal micro-batches: {config.batch_rows} rows over {layout.dp} "
            f"data-parallel ranks and {parallel.micro_batches} micro_batches"
        )
    return found
