"""Which layouts are possible: checked before anything is allocated, with every reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from hope.config import HopeConfig
from hope.sharding import tensor_parallel_sizes
from train.parallel.config import ParallelConfig, Schedule
from train.section import ConfigError

STAGES_PER_RANK: dict[Schedule, int] = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "zero-bubble": 2,
    "zbv": 2,
}
_SUGGESTED = 3


@dataclass(frozen=True)
class Layout:
    """How many ranks there are along each axis, slowest-varying first; their product is `world`."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    stages_per_rank: int = 1

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the parameters and adds up the gradients.

        It does where they are divided over data-parallel ranks; and where tensor-parallel ranks
        have them and there is anything left to add.
        """
        return self.dp_shard > 1 or (self.tp > 1 and self.dp * self.cp > 1)

    @property
    def plain(self) -> bool:
        """Whether every rank holds every parameter whole."""
        return self.tp == self.pp == 1 and not self.sharded

    def __str__(self) -> str:
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        found = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) > 1]
        return " ".join(found) or "one process"


def _nothing_more(_: ParallelConfig, __: Layout) -> list[str]:
    return []


@dataclass(frozen=True)
class Job:
    """What has to be spread: a model, and the rows [rows, seq_len] of one step.

    at_update: levels with reduce: at_update. engine: its name; refused: what it can't do of the run
    in any layout; more_problems: what it can't do besides in a layout.
    """

    model: HopeConfig
    rows: int
    seq_len: int
    at_update: tuple[str, ...] = ()
    engine: str = "native"
    refused: tuple[str, ...] = ()
    more_problems: Callable[[ParallelConfig, Layout], list[str]] = _nothing_more


def resolve(parallel: ParallelConfig, world: int, job: Job) -> Layout:
    """The layout of `world` ranks. ConfigError, with every reason why it can't be and the nearest
    layouts that can."""
    asked = Layout(
        pp=parallel.pp,
        dp_replicate=parallel.dp_replicate,
        dp_shard=parallel.dp_shard,
        cp=parallel.cp,
        tp=parallel.tp,
        stages_per_rank=parallel.stages_per_rank or STAGES_PER_RANK[parallel.schedule],
    )
    layout = _fill_in(asked, world)
    reasons = [] if layout is not None else [_uneven(asked, world)]
    tried = layout or replace(
        asked, dp_replicate=max(1, asked.dp_replicate), dp_shard=max(1, asked.dp_shard)
    )
    reasons += problems(parallel, tried, job)
    more = job.more_problems(parallel, tried)
    if layout is not None and not (reasons or more or job.refused):
        return layout
    hint = ""
    if reasons or more:
        near = ", or ".join(f"({one})" for one in nearest(parallel, asked, world, job))
        hint = f"; possible: {near}" if near else ""
    engines = [*job.refused, *more]
    if not reasons:
        raise ConfigError(f"engine={job.engine} can't run this: {'; '.join(engines)}{hint}")
    reasons += [f"engine={job.engine}: {one}" for one in engines]
    raise ConfigError(f"parallel: can't be laid out: {'; '.join(reasons)}{hint}")


def _uneven(asked: Layout, world: int) -> str:
    """Why `world` ranks don't come out even."""
    if asked.dp_replicate == asked.dp_shard == -1:
        return "only one of dp_replicate and dp_shard may be -1"
    if 0 in (asked.dp_replicate, asked.dp_shard):
        return "dp_replicate and dp_shard are at least 1, or -1"
    axes = (asked.pp, asked.dp_replicate, asked.dp_shard, asked.cp, asked.tp)
    fixed = prod(size for size in axes if size > 0)
    return f"its axes multiply to {fixed}, and there are {world} ranks"


def problems(parallel: ParallelConfig, layout: Layout, job: Job) -> list[str]:
    """Every reason why `job` can't run so; empty when it can."""
    model, found = job.model, []
    sizes = tensor_parallel_sizes(model)
    if layout.tp not in sizes:
        found.append(
            f"tp={layout.tp} must divide the heads, the vocabulary and every level's hidden_size "
            f"(possible: {', '.join(map(str, sizes))})"
        )
    piece = job.seq_len // layout.cp
    if parallel.sequence_parallel and piece % layout.tp:
        found.append(f"sequence_parallel: tp={layout.tp} must divide data.seq_len / cp = {piece}")
    stages = layout.pp * layout.stages_per_rank
    if layout.pp > 1 and model.num_layers < stages:
        found.append(
            f"{stages} pipeline stages need as many layers, and there are {model.num_layers}"
        )
    single = parallel.schedule in ("1f1b", "gpipe")
    if single and layout.stages_per_rank != 1:
        found.append(f"schedule={parallel.schedule} has one stage a rank")
    if parallel.schedule == "zbv" and layout.stages_per_rank != 2:
        found.append("schedule=zbv has two stages a rank")
    rounds = max(1, parallel.micro_batches // layout.pp)
    if layout.pp > 1 and not single and parallel.micro_batches % rounds:
        found.append(
            f"schedule={parallel.schedule}: micro_batches must be a multiple of pp={layout.pp}"
        )
    found += _problems_of_rows(parallel, layout, job)
    if layout.cp > 1:
        found += _problems_of_pieces(parallel, layout, job)
    if job.at_update and layout.sharded and layout.dp_replicate == 1:
        found.append(
            f"reduce=at_update of level {', '.join(job.at_update)} needs replicas: a rank that "
            "keeps a share of a gradient adds it up every micro-batch; dp_replicate above 1"
        )
    if parallel.schedule == "zbv" and layout.pp > 1 and layout.sharded and model.tie_embeddings:
        found.append(
            "schedule=zbv has first and last stage on one rank, where FSDP2 can't share tied "
            "embeddings: model.tie_embeddings=false, or another schedule"
        )
    if parallel.cpu_offload and not layout.sharded:
        found.append("cpu_offload needs dp_shard above 1")
    if parallel.tensor_backend == "megatron":
        found += _problems_of_megatron(parallel, layout)
    return found


def _problems_of_megatron(parallel: ParallelConfig, layout: Layout) -> list[str]:
    found = []
    if layout.tp == 1:
        found.append("tensor_backend=megatron needs tp above 1")
    if parallel.sequence_parallel:
        found.append(
            "sequence_parallel is tensor_backend=native's: megatron-core divides axis 0, and that "
            "of sequences is 1"
        )
    if parallel.activation_checkpointing == "selective":
        found.append(
            "activation_checkpointing=selective is tensor_backend=native's: megatron-core adds up "
            "in place what it would keep; none or full"
        )
    if parallel.compile:
        found.append("compile is tensor_backend=native's")
    return found


def _problems_of_rows(parallel: ParallelConfig, layout: Layout, job: Job) -> list[str]:
    found = []
    if job.rows < layout.dp:
        found.append(
            f"training.batch_tokens gives {job.rows} rows of data.seq_len tokens, fewer than the "
            f"{layout.dp} data-parallel ranks"
        )
        return found
    fewest = job.rows // layout.dp
    if parallel.micro_batches > fewest:
        found.append(f"micro_batches={parallel.micro_batches} of only {fewest} rows a rank")
    if layout.pp > 1:
        if job.rows % layout.dp or fewest % parallel.micro_batches:
            found.append(
                f"a pipeline needs equal micro-batches: {job.rows} rows over {layout.dp} "
                f"data-parallel ranks and {parallel.micro_batches} micro_batches"
            )
        if parallel.schedule != "gpipe" and parallel.micro_batches < layout.pp:
            found.append(
                f"schedule={parallel.schedule} needs micro_batches of at least pp={layout.pp}"
            )
    return found


def _problems_of_pieces(parallel: ParallelConfig, layout: Layout, job: Job) -> list[str]:
    found, model = [], job.model
    if job.seq_len % layout.cp:
        return [f"cp={layout.cp} must divide data.seq_len={job.seq_len}"]
    piece = job.seq_len // layout.cp
    chunk = model.titans.scan.projection_chunk
    if "titans" in model.mixers and model.titans.writes and piece % chunk:
        found.append(
            f"cp={layout.cp} cuts sequences into pieces of {piece} tokens, which must be a "
            f"multiple of projection_chunk={chunk}"
        )
    if "attention" in model.mixers and model.num_heads // layout.tp % layout.cp:
        found.append(
            f"cp={layout.cp} must divide the {model.num_heads // layout.tp} heads of a rank"
        )
    width = model.attention.conv_width
    if "attention" in model.mixers and width - 1 > piece:
        found.append(
            f"cp={layout.cp} cuts sequences into pieces of {piece} tokens, and "
            f"attention.conv_width={width} needs more than the piece before has"
        )
    if parallel.activation_checkpointing != "none":
        found.append("with cp above 1 activation_checkpointing would send everything twice: none")
    if parallel.compile:
        found.append("with cp above 1 layers wait for each other and can't be compiled")
    if layout.pp > 1 and parallel.schedule in ("zero-bubble", "zbv"):
        found.append(f"schedule={parallel.schedule} with cp above 1: use 1f1b or interleaved")
    return found


def _fill_in(asked: Layout, world: int) -> Layout | None:
    """`asked` with -1 replaced by what is left; None where the ranks don't come out even."""
    open_axes = [name for name in ("dp_replicate", "dp_shard") if getattr(asked, name) == -1]
    if len(open_axes) > 1 or 0 in (asked.dp_replicate, asked.dp_shard):
        return None
    if open_axes:
        rest = world // abs(asked.world)
        asked = replace(asked, **{open_axes[0]: rest})
    return asked if asked.world == world else None


def nearest(parallel: ParallelConfig, asked: Layout, world: int, job: Job) -> list[str]:
    """Up to three possible layouts, those with the fewest changes first.

    Of `world` ranks with any number of micro-batches; of fewer ranks where there is none.
    """
    choices = _choices(asked.stages_per_rank, job)
    most = job.rows * prod(max(sizes) for axis, sizes in choices.items() if axis != "dp_shard")
    for size in range(min(world, most), 0, -1):
        if found := sorted(_possible(parallel, asked, size, job, choices)):
            return [text for *_, text in found[:_SUGGESTED]]
    return []


def _choices(stages_per_rank: int, job: Job) -> dict[str, list[int]]:
    """What each axis may be whatever the others are: the search goes no further than these."""
    model = job.model
    piece = model.titans.scan.projection_chunk
    if "titans" not in model.mixers or not model.titans.writes:
        piece = 1
    pieces = [n for n in range(1, job.seq_len // piece + 1) if job.seq_len % n == 0]
    if "attention" in model.mixers:
        pieces = [n for n in pieces if n <= model.num_heads]
    return {
        "pp": list(range(1, max(1, model.num_layers // stages_per_rank) + 1)),
        "dp_shard": list(range(1, job.rows + 1)),
        "cp": pieces or [1],
        "tp": list(tensor_parallel_sizes(model)),
    }


def _possible(
    parallel: ParallelConfig, asked: Layout, world: int, job: Job, choices: dict[str, list[int]]
) -> Iterator[tuple[int, int, str]]:
    """(number of changes, how far they go, the layout in words)."""
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    divisors = [[n for n in sizes if world % n == 0] for sizes in choices.values()]
    parts = {n for n in (1, 2, 4, 8, 16, 32, job.rows) if n <= job.rows} | {parallel.micro_batches}
    for pp, shard, cp, tp in product(*divisors):
        if world % (pp * shard * cp * tp):
            continue
        replicas = world // (pp * shard * cp * tp)
        if replicas * shard > job.rows:
            continue
        one = replace(asked, pp=pp, dp_shard=shard, cp=cp, tp=tp, dp_replicate=replicas)
        far = [abs(getattr(one, axis) - getattr(asked, axis)) for axis in axes]
        for micro_batches in parts:
            changed = parallel.model_copy(update={"micro_batches": micro_batches})
            if problems(changed, one, job) or job.more_problems(changed, one):
                continue
            away = [*far, abs(micro_batches - parallel.micro_batches)]
            text = f"{world} ranks as {one}" if world > 1 else str(one)
            if micro_batches != parallel.micro_batches:
                text += f" micro_batches={micro_batches}"
            yield sum(n > 0 for n in away), sum(away), text
