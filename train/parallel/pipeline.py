"""Pipeline parallelism: torch's schedules over this rank's stages, and a relay for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from hope.titans import SelfModifyingTitans
from train.config import RunConfig
from train.parallel.config import ParallelConfig, Schedule
from train.parallel.mesh import Mesh
from train.parallel.part import Part
from train.parallel.stages import stages_of_rank

SCHEDULES: dict[Schedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def in_halves(parallel: ParallelConfig, part: Part) -> bool:
    """Whether a part's backward passes are done in halves, by the inputs and by the parameters.

    The zero-bubble schedules place the halves apart. Where the second half would do work of the
    first again, the scan's recurrence or a layer that is recomputed or compiled (its backward pass
    is one call), the first half does it all. So it does where memories that are not written make
    the query too: M_q and M_mem are of the same parameters, one behind the other, and torch's
    second half would go through M_mem for M_q's share.
    """
    mixers = [m for m in part.model.modules() if isinstance(m, SelfModifyingTitans)]
    chained = any(mixer.writes or mixer.adaptive_query for mixer in mixers)
    whole = chained or parallel.activation_checkpointing != "none" or parallel.compile
    return parallel.schedule in ("zero-bubble", "zbv") and not whole


def _nothing_left() -> None:
    """The second half of a backward pass that the first half has done."""


class _Stage(PipelineStage):
    """A stage that does not send to its own rank, as torch 2.11 does before the first step where a
    V turns and gloo can't."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        rank = dist.get_rank()
        return [one for one in super()._get_init_p2p_neighbors_ops() if one.peer != rank]


class Pipeline:
    """This rank's stages in the schedule that the configuration names.

    Losses are sums, so gradients are never scaled by the number of micro-batches. The state of the
    memories stays on its stage, by row.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        parts: Sequence[Part],
        loss: Callable[[Tensor, Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:
        parallel, layout = config.parallel, mesh.layout
        self._mesh, self._parts, self._loss = mesh, parts, loss
        self._indices = stages_of_rank(
            mesh.pp.rank, layout.pp, layout.stages_per_rank, parallel.schedule
        )
        self._total = layout.pp * layout.stages_per_rank
        self._owners = {
            stage: rank
            for rank in range(layout.pp)
            for stage in stages_of_rank(rank, layout.pp, layout.stages_per_rank, parallel.schedule)
        }
        self._dim, self._dtype = config.model.dim, dtype
        self._divisor = layout.tp if parallel.sequence_parallel else 1
        rows = config.batch_rows // layout.dp // parallel.micro_batches
        length = config.data.seq_len // layout.cp
        stages = [
            _Stage(
                part,
                index,
                self._total,
                mesh.device,
                input_args=self._entering(part, rows, length),
                output_args=self._leaving(part, rows, length, config),
                group=mesh.pp.group if mesh.pp.group is not None else dist.group.WORLD,
                dw_builder=None if in_halves(parallel, part) else lambda: _nothing_left,
            )
            for index, part in zip(self._indices, parts, strict=True)
        ]
        schedule: Any = SCHEDULES[parallel.schedule]
        takes = stages[0] if parallel.schedule in ("1f1b", "gpipe") else stages
        self._schedule = schedule(takes, parallel.micro_batches, loss_fn=loss, scale_grads=False)

    @property
    def indices(self) -> list[int]:
        """This rank's stages."""
        return self._indices

    @property
    def order(self) -> list[Any]:
        """This rank's passes in the order of the schedule, where it has several stages; None for
        one in which it waits."""
        return list(self._schedule.pipeline_order[self._mesh.pp.rank])

    def _entering(self, part: Part, rows: int, length: int) -> Tensor:
        if part.first:
            return torch.empty(rows, length, dtype=torch.int64, device="meta")
        return self._hidden(rows, length).requires_grad_()

    def _leaving(self, part: Part, rows: int, length: int, config: RunConfig) -> Tensor:
        if not part.last:
            return self._hidden(rows, length).requires_grad_()
        assert config.model.vocab_size is not None
        columns = config.model.vocab_size // self._mesh.layout.tp
        return torch.empty(rows, length, columns, dtype=self._dtype, device="meta")

    def _hidden(self, rows: int, length: int, device: str | torch.device = "meta") -> Tensor:
        shape = (rows, length // self._divisor, self._dim)
        return torch.empty(shape, dtype=self._dtype, device=device)

    def step(self, tokens: Tensor, labels: Tensor, starts: Tensor | None) -> float:
        """Forward and backward of all micro-batches; the summed loss where the model ends."""
        more = {"rows": torch.arange(tokens.shape[0])}  # read on the host
        if starts is not None:
            more["document_starts"] = starts
        last = self._parts[-1].last
        losses: list[Tensor] | None = [] if last else None
        target = labels if last else None
        inputs = (tokens,) if self._parts[0].first else ()
        self._schedule.step(*inputs, target=target, losses=losses, return_outputs=False, **more)
        return float(sum(loss.detach() for loss in losses)) if losses else 0.0

    def evaluate(self, tokens: Tensor, labels: Tensor, starts: Tensor | None) -> float:
        """The summed loss where the model ends; stage after stage, no gradient."""
        rows, total = torch.arange(tokens.shape[0]), 0.0
        group, y = self._mesh.pp, tokens
        for index, part in zip(self._indices, self._parts, strict=True):
            before, after = self._owners.get(index - 1), self._owners.get(index + 1)
            if before is not None and before != group.rank:
                y = self._hidden(tokens.shape[0], tokens.shape[1], tokens.device)
                dist.recv(y, group.global_rank(before), group=group.group)
            y = part(y, rows, starts)
            if part.last:
                total = float(self._loss(y, labels))
            elif after != group.rank:
                assert after is not None
                dist.send(y.contiguous(), group.global_rank(after), group=group.group)
        return total
