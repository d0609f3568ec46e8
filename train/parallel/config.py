"""How a run is spread over ranks: the section `parallel` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from train.section import Section

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"]
ActivationCheckpointing = Literal["none", "selective", "full"]


class ParallelConfig(Section):
    """None of these keys changes the mathematics; a resume may change all of them.

    dp_replicate, dp_shard: data parallelism. Every replica is sharded over dp_shard ranks (FSDP2;
        with both above 1, HSDP). At most one of the two may be -1: what the other axes leave.
    tp: tensor parallelism; sequence_parallel: between the linears each of the tp ranks has a piece
        of the sequence, which saves memory and costs the same traffic. tensor_backend: our layers,
        or megatron-core's.
    pp: pipeline parallelism; schedule: "1f1b", "gpipe", or, with stages_per_rank stages on each
        rank, "interleaved", "zero-bubble" (interleaved) and "zbv" (two stages a rank, as a V).
    cp: context parallelism: each of the cp ranks has a piece of every sequence; memories are passed
        on from piece to piece, softmax layers exchange heads for tokens.
    micro_batches: parts into which a rank's rows are cut; pipelines and context parallelism want
        several, to have something to do while they wait.
    activation_checkpointing: "selective" keeps matrix products and what the scan keeps, "full" only
        the latter; the rest is computed again in backward.
    compile: torch.compile for every layer.
    precision: "bf16" computes in bfloat16; parameters, sums of gradients, fast weights and
        optimizers stay float32. A pass reads every parameter rounded to bfloat16, `b_alpha` too:
        near its start, 9.21, in steps of 1/16, so that what a token forgets moves in steps of 6 %.
    cpu_offload: parameters and optimizers live in the host's memory (with dp_shard above 1).
    """

    dp_replicate: int = Field(-1, ge=-1)
    dp_shard: int = Field(1, ge=-1)
    tp: int = Field(1, ge=1)
    sequence_parallel: bool = False
    tensor_backend: Literal["native", "megatron"] = "native"
    pp: int = Field(1, ge=1)
    schedule: Schedule = "1f1b"
    stages_per_rank: int | None = Field(None, ge=1)
    cp: int = Field(1, ge=1)
    micro_batches: int = Field(1, ge=1)
    activation_checkpointing: ActivationCheckpointing = "none"
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    cpu_offload: bool = False
