"""Build one rank of a cluster without the cluster, and say what it would hold and send.

A fake process group answers for all other ranks; mesh, pipeline stages, tensor-parallel parts and
FSDP2's shards are the real ones, on the meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hope.convolution import CausalConvolution
from hope.model import num_parameters
from hope.native.build import why_not
from hope.state import ModelState
from hope.titans import SelfModifyingTitans
from train.config import RunConfig
from train.dry_run.memory import (
    Action,
    Memory,
    fsdp_buffers,
    held_bytes,
    order_of_one_part,
    order_of_one_stage,
    peak_of_actions,
    update_buffers,
)
from train.dry_run.tracing import PartBytes, trace_part
from train.dry_run.traffic import Traffic, local_shapes, predict_traffic, steps_of_periods
from train.dry_run.zero import buckets_of, lines_of
from train.dry_run.zero_memory import Zero, zero_memory
from train.dry_run.zero_traffic import predict_zero_traffic
from train.engines import layout_of
from train.engines.deepspeed import make_local, part_of
from train.evaluate.perplexity import summed_loss
from train.optim.levels import late_levels
from train.parallel.carried import spec_of, state_of
from train.parallel.layout import Layout
from train.parallel.mesh import Mesh, make_mesh
from train.parallel.parallelize import PRECISIONS, parallelize
from train.parallel.part import Part
from train.parallel.pipeline import Pipeline, in_halves
from train.parallel.placement import local
from train.parallel.ranks import Ranks
from train.parallel.stages import layers_of_rank
from train.parallel.tensor import loss_over


@dataclass(frozen=True)
class DryRun:
    """What rank `rank` of `layout` is: its layers, parameters, bytes in memory and bytes sent."""

    layout: Layout
    rank: int
    layers: list[range]
    parameters: int  # numbers of them in the whole model
    own_parameters: int  # ... on this rank
    memory: Memory
    traffic: Traffic


@contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[Ranks]:
    """Rank `rank` of so many, alone: collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = Ranks.alone()
    ranks.size, ranks.rank = world_size, rank
    if world_size == 1:
        yield ranks
        return
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def threads_of_a_rank(config: RunConfig, world_size: int) -> Iterator[None]:
    """As many threads of torch as a rank has: num_threads, or one where launchers start several."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.num_threads or (before if world_size == 1 else 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _without_kernels(config: RunConfig) -> RunConfig:
    """The same run by whatever there is: the kernels that a configuration names may be of another
    machine than this one."""
    model = config.model
    scan, attention = model.titans.scan, model.attention
    if scan.implementation in ("native", "triton", "cuda"):
        scan = replace(scan, implementation="auto")
    if attention.backend == "flash":
        attention = replace(attention, backend="auto")
    model = replace(model, titans=replace(model.titans, scan=scan), attention=attention)
    return config.model_copy(update={"model": model})


def dry_run(config: RunConfig, world_size: int, rank: int, device: str = "cpu") -> DryRun:
    """Build rank `rank`; ConfigError where `config` can't be laid out over so many ranks.

    device: the type of device that the memory is predicted for ("cpu" or "cuda").
    """
    config = _without_kernels(config)
    layout = layout_of(config, world_size)
    with threads_of_a_rank(config, world_size), fake_ranks(world_size, rank) as ranks:
        mesh = make_mesh(layout, ranks)
        under_deepspeed = config.engine == "deepspeed"
        if under_deepspeed:
            parts = [_part_of_deepspeed(config, mesh)]
        else:
            late = late_levels(config.model, config.optimizer)
            parts = parallelize(config.model, config.parallel, mesh, config.data.seq_len, late)
        named: dict[str, Tensor] = {
            name: parameter.detach()
            for part in parts
            for name, parameter in part.model.named_parameters()
        }
        if under_deepspeed:
            memory = predict_zero_memory(config, mesh, parts[0], device)
            traffic = predict_zero_traffic(config, mesh, lines_of(config, mesh, parts[0]))
        else:
            memory = predict_memory(config, mesh, parts, named, device)
            traffic = predict_traffic(config, mesh)
        return DryRun(
            layout=layout,
            rank=rank,
            layers=[part.layers for part in parts],
            parameters=num_parameters(config.model),
            own_parameters=sum(local(one).numel() for one in named.values()),
            memory=memory,
            traffic=traffic,
        )


def predict_memory(
    config: RunConfig, mesh: Mesh, parts: list[Part], named: dict[str, Tensor], device: str
) -> Memory:
    """Bytes by kind at the peak of a step of this rank."""
    every = steps_of_periods(config)
    held = held_bytes(config, mesh, named, every)
    traces = [_trace_of_layers(config, mesh, part.layers, device) for part in parts]
    actions = _actions(config, mesh, parts)
    sharded = mesh.layout.sharded
    reduced = held["gradients"] if sharded and mesh.layout.pp == 1 else 0
    buffers, reducing = _step_buffers(config, mesh, parts)
    most = peak_of_actions(actions, traces, reduced)
    if reduced:  # FSDP2 needs more where gradients come, activations are most before that
        early = [replace(one, backward=one.early) for one in traces]
        later = [replace(one, forward=0) for one in traces]
        before = peak_of_actions(actions, early, reduced), buffers
        after = peak_of_actions(actions, later, reduced), buffers + reducing
        most, buffers = max(before, after, key=sum)
    return Memory(
        **held,
        fast_state=_carried_bytes(config, mesh, parts),
        activations=max(0, most - held["gradients"]),
        step_buffers=buffers,
        update=update_buffers(config, mesh, named, every),
    )


def predict_zero_memory(config: RunConfig, mesh: Mesh, part: Part, device: str) -> Memory:
    """Bytes by kind at the peak of a step of this rank under DeepSpeed."""
    precision, count = _activations(config), config.parallel.micro_batches
    zero = Zero(
        lines_of(config, mesh, part), buckets_of(config, mesh), precision.itemsize, count, device
    )
    piped = mesh.layout.pp > 1
    released = (lambda _: True) if zero.leaves_at_once else None
    trace = _trace(config, mesh, part.to(precision), device, released, piped)
    buffers = 0
    if piped:
        ahead = min(count, mesh.layout.pp - mesh.pp.rank)
        kept = (not part.first) * (1 + 2 * max(2, ahead)) + (not part.last)
        buffers = kept * _activation_bytes(config, mesh)
    actions = _actions(config, mesh, [part])
    return zero_memory(config, zero, actions, trace, _carried_bytes(config, mesh, [part]), buffers)


def _part_of_deepspeed(config: RunConfig, mesh: Mesh) -> Part:
    (layers,) = layers_of_rank(config.model, config.parallel, mesh, config.data.seq_len)
    part = part_of(config, mesh, layers)
    make_local(part.model)
    return part


def _rows(config: RunConfig, mesh: Mesh) -> int:
    return -(-config.batch_rows // mesh.layout.dp)


def _micro_rows(config: RunConfig, mesh: Mesh) -> int:
    return -(-_rows(config, mesh) // config.parallel.micro_batches)


def _activation_bytes(config: RunConfig, mesh: Mesh) -> int:
    """One micro-batch between two stages."""
    layout, parallel = mesh.layout, config.parallel
    tokens = _micro_rows(config, mesh) * config.data.seq_len // layout.cp
    whole = tokens * config.model.dim * _activations(config).itemsize
    return whole // layout.tp if parallel.sequence_parallel else whole


def _activations(config: RunConfig) -> torch.dtype:
    return PRECISIONS[config.parallel.precision] or torch.float32


def _state_bytes(config: RunConfig, mesh: Mesh, layers: range, rows: int) -> int:
    spec = spec_of(config.model, layers, rows, _activations(config))
    sizes = [prod(one.shape) * one.dtype.itemsize for one in spec.values()]
    return sum(sizes) // mesh.layout.tp


def _carried_bytes(config: RunConfig, mesh: Mesh, parts: list[Part]) -> int:
    if config.training.state_carry != "stream" or mesh.cp.rank > 0:
        return 0
    rows = _rows(config, mesh)
    return sum(_state_bytes(config, mesh, part.layers, rows) for part in parts)


def _trace_of_layers(config: RunConfig, mesh: Mesh, layers: range, device: str) -> PartBytes:
    """A micro-batch of a part as this rank has it, without what FSDP2 and neighbours add."""
    layout, parallel, sharded = mesh.layout, config.parallel, mesh.layout.sharded
    changes: dict[str, Any] = {"compile": False}
    if sharded:
        changes["precision"] = "fp32"
    alone = Ranks.alone()
    narrow = replace(layout, dp_replicate=1, dp_shard=1, cp=1)
    here = replace(mesh, layout=narrow, data=alone, reduce=alone, cp=alone)
    plain = parallel.model_copy(update=changes)
    built = parallelize(config.model, plain, here, config.data.seq_len)
    (part,) = [one for one in built if one.layers == layers]
    if sharded:
        part.to(_activations(config))
    released = None
    if sharded and layout.pp == 1:
        released = lambda name: name.startswith("layers.")  # noqa: E731
    piped = layout.pp > 1
    return _trace(config, mesh, part, device, released, piped, piped and in_halves(parallel, part))


def _trace(
    config: RunConfig,
    mesh: Mesh,
    part: Part,
    device: str,
    released: Callable[[str], bool] | None,
    piped: bool,
    halves: bool = False,
) -> PartBytes:
    part.keeps_state = config.training.state_carry == "stream"
    layout, parallel, precision = mesh.layout, config.parallel, _activations(config)
    rows, length = _micro_rows(config, mesh), config.data.seq_len // layout.cp
    meta = torch.device("meta")
    if part.first:
        x = torch.empty(rows, length, dtype=torch.int64, device=meta)
    else:
        inner = length // layout.tp if parallel.sequence_parallel else length
        x = torch.empty(rows, inner, config.model.dim, dtype=precision, device=meta)
        x.requires_grad_()
    starts = None
    if config.data.tells_documents:
        starts = torch.empty(rows, length, dtype=torch.bool, device=meta)
    loss: Callable[[Tensor], Tensor] | None = None
    if part.last:
        labels = torch.empty(rows, length, dtype=torch.int64, device=meta)
        over = summed_loss if mesh.tensor is None else loss_over(mesh.tensor.get_group())
        loss = lambda logits: over(logits, labels)  # noqa: E731
    part.before = before = _before(config, mesh, part.layers, rows)
    given = [] if before is None else list(before.named_tensors().values())
    inputs = (x, torch.arange(rows), starts)
    native = device == "cpu" and config.model.titans.scan.implementation == "auto"
    scan = "native" if native and not why_not() else device
    if device == "cpu" and why_not():
        for module in part.model.modules():
            if isinstance(module, CausalConvolution | SelfModifyingTitans):
                module.fused = "torch"
    return trace_part(part, inputs, loss, scan, given, released, halves, piped)


def _before(config: RunConfig, mesh: Mesh, layers: range, rows: int) -> ModelState | None:
    """The state that a micro-batch begins with: carried, or of the piece before it."""
    received = mesh.cp.rank > 0
    if not received and config.training.state_carry != "stream":
        return None
    found = {}
    for name, one in spec_of(config.model, layers, rows, _activations(config)).items():
        shape = list(one.shape)
        if one.shard_axis is not None:
            shape[one.shard_axis] //= mesh.layout.tp
        tensor = torch.empty(shape, dtype=one.dtype, device="meta")
        found[name] = tensor.requires_grad_() if received else tensor
    return state_of(found, range(layers.start, layers.stop)) if found else None


def _actions(config: RunConfig, mesh: Mesh, parts: list[Part]) -> list[Action]:
    """This rank's passes through its parts, in their order."""
    parallel, layout = config.parallel, mesh.layout
    count = parallel.micro_batches
    if layout.pp == 1:
        return order_of_one_part(count, int(layout.cp > 1))
    if layout.stages_per_rank == 1:
        return order_of_one_stage(count, layout.pp, mesh.pp.rank, parallel.schedule)
    pipeline = Pipeline(config, mesh, parts, summed_loss, _activations(config))
    indices = {index: number for number, index in enumerate(pipeline.indices)}
    halves = [in_halves(parallel, part) for part in parts]
    found = []
    for one in pipeline.order:
        kind, number = (one.computation_type.value, indices[one.stage_index]) if one else ("", 0)
        if kind in ("F", "B") or (kind in ("I", "W") and halves[number]):
            found.append(Action(kind, number))
        elif kind == "I":
            found.append(Action("B", number))
    return found


def _step_buffers(config: RunConfig, mesh: Mesh, parts: list[Part]) -> tuple[int, int]:
    """What FSDP2, a pipeline and neighbours along the sequence keep for a step, and what FSDP2
    needs besides while it adds gradients up."""
    layout, count, found, reducing = mesh.layout, config.parallel.micro_batches, 0, 0
    if layout.sharded:
        for part in parts:
            shapes = local_shapes(part.model, layout.tp)
            by_layer: dict[str, int] = {}
            for name, shape in shapes.items():
                unit = name.split(".")[1] if name.startswith("layers.") else ""
                by_layer[unit] = by_layer.get(unit, 0) + prod(shape)
            rest = by_layer.pop("", 0)
            itemsize = _activations(config).itemsize
            sizes = fsdp_buffers(list(by_layer.values()), rest, itemsize, layout.pp > 1)
            found, reducing = found + sizes[0], reducing + sizes[1]
    if layout.pp > 1:
        ends = [(not part.first) + (not part.last) for part in parts]
        found += sum(ends) * count * _activation_bytes(config, mesh)
    if layout.cp > 1:
        states = sum(_state_bytes(config, mesh, part.layers, _rows(config, mesh)) for part in parts)
        sends, receives = mesh.cp.rank < layout.cp - 1, mesh.cp.rank > 0
        # Sent and not yet waited for, until the step ends; received with the next micro-batch.
        found += sends * states + receives * min(2, count) * states // count
    return found, reducing
