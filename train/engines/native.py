"""Our own engine: torch's FSDP2, DTensors and pipeline schedules around the parts of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_pipeline import IGNORE, Batch
from hope.sharding import Replicate, ShardPlan
from hope.state import StateSpec
from train.config import RunConfig
from train.evaluate.perplexity import summed_loss
from train.parallel.carried import Carried, from_rows, named, spec_of, state_of, to_rows
from train.parallel.mesh import Mesh
from train.parallel.parallelize import PRECISIONS, allocate, parallelize
from train.parallel.pipeline import Pipeline
from train.parallel.tensor import loss_over

Loss = Callable[[Tensor, Tensor], Tensor]


class Engine(Protocol):
    """What the trainer needs of whatever computes its gradients.

    parameters: those that this rank holds (parts of), by their names in the whole model.
    modules: what it calls, first to last.
    speaks: whether this rank's loss and counts are to be added to those of the others; of the ranks
    that compute the same tokens one does.
    """

    mesh: Mesh
    parameters: dict[str, nn.Parameter]
    speaks: bool

    @property
    def modules(self) -> Sequence[nn.Module]: ...

    def forward_backward(
        self, batch: Batch, carried: Carried | None
    ) -> tuple[float, Carried | None]: ...

    def held_out(self, batch: Batch) -> float: ...

    def spoken_for(self, labels: Tensor) -> Tensor: ...

    def carried_rows(self, carried: Carried | None, rows: range) -> dict[str, Tensor]: ...

    def take_up_rows(self, saved: list[dict[str, Tensor]], rows: range) -> Carried | None: ...


class NativeEngine:
    """The parts of a model that this rank has, and how a step goes through them.

    initial: whole tensors by parameter name to start from; None draws them from config.seed.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, initial: dict[str, Tensor] | None = None
    ) -> None:
        self.config, self.mesh = config, mesh
        parallel = config.parallel
        self.parts = parallelize(config.model, parallel, mesh, config.data.seq_len)
        value = None if initial is None else lambda name, _: initial[name]
        allocate(self.parts, self._home, value, config.seed)
        self._tie_here()
        self.parameters = {
            name: parameter
            for part in self.parts
            for name, parameter in part.model.named_parameters()
        }
        tp = mesh.tensor
        self.loss: Loss = summed_loss if tp is None else loss_over(tp.get_group())
        self.speaks = self.parts[-1].last and mesh.tp.rank == 0
        self._pipeline: Pipeline | None = None
        if mesh.layout.pp > 1:
            self._pipeline = Pipeline(config, mesh, self.parts, self.loss, self._activations)
        self._partial = self._partial_gradients()
        self._tied = self._tied_group()

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The parts of the model, first to last."""
        return self.parts

    @property
    def _activations(self) -> torch.dtype:
        precision = PRECISIONS[self.config.parallel.precision]
        return precision or next(iter(self.parts[0].parameters())).dtype

    @property
    def _home(self) -> torch.device:
        """Where parameters live."""
        return torch.device("cpu") if self.config.parallel.cpu_offload else self.mesh.device

    def forward_backward(
        self, batch: Batch, carried: Carried | None
    ) -> tuple[float, Carried | None]:
        """Add the gradient of the summed loss over this rank's tokens to every `.grad`.

        carried: the state that the rows begin with. Returns (the sum of the loss over the tokens
        that this rank speaks for, the state that the rows end with).
        """
        tokens, labels, starts = self._piece(batch)
        for part in self.parts:
            part.before = None if carried is None else state_of(carried, part.layers)
        if self._pipeline is not None:
            self.mesh.world.pulse.enter("forward")
            total = self._pipeline.step(tokens, labels, starts)
            self.mesh.world.pulse.enter("backward")
        else:
            total = self._in_order(tokens, labels, starts)
        for part in self.parts:
            if part.pieces is not None:
                part.pieces.settle()
        self._add_partial_gradients()
        return total if self.speaks else 0.0, self._after()

    def _in_order(self, tokens: Tensor, labels: Tensor, starts: Tensor | None) -> float:
        """Micro-batch after micro-batch. Where ranks wait for each other along the sequence, the
        next one's forward pass comes before the backward pass of the one before."""
        (part,) = self.parts
        pulse, rows = self.mesh.world.pulse, torch.arange(tokens.shape[0])
        ahead = 1 if self.mesh.cp.size > 1 else 0
        total, waiting = 0.0, []
        for own in rows.tensor_split(self.config.parallel.micro_batches):
            documents = None if starts is None else starts[own]
            pulse.enter("forward")
            loss = self.loss(part(tokens[own], own, documents), labels[own])
            total += float(loss.detach())
            waiting.append(loss)
            if len(waiting) > ahead:
                pulse.enter("backward")
                waiting.pop(0).backward()
        for loss in waiting:
            pulse.enter("backward")
            loss.backward()
        return total

    @torch.no_grad()
    def held_out(self, batch: Batch) -> float:
        """The summed loss of a batch whose rows begin afresh, as far as this rank speaks for it."""
        tokens, labels, starts = self._piece(batch)
        for part in self.parts:
            part.before = None
        if self._pipeline is not None:
            total = self._pipeline.evaluate(tokens, labels, starts)
        else:
            (part,) = self.parts
            logits = part(tokens, torch.arange(tokens.shape[0]), starts)
            total = float(self.loss(logits, labels))
        for part in self.parts:
            part.take_after()
            if part.pieces is not None:
                part.pieces.settle()
        return total if self.speaks else 0.0

    def spoken_for(self, labels: Tensor) -> Tensor:
        """The labels, flat, that count in this rank's sums of losses."""
        labels = self._cut(labels)
        return labels[labels != IGNORE] if self.speaks else labels.new_empty(0)

    def carried_rows(self, carried: Carried | None, rows: range) -> dict[str, Tensor]:
        """`stream/ROW/NAME` for a checkpoint."""
        if carried is None:
            return {}
        return to_rows(carried, rows, self._spec(len(rows)), self.mesh.tensor)

    def take_up_rows(self, saved: list[dict[str, Tensor]], rows: range) -> Carried | None:
        """What `carried_rows` gave, whole, on this rank."""
        if self.mesh.cp.rank > 0:
            return None
        tp = self.mesh.tp
        return from_rows(saved, rows, self._spec(len(rows)), tp.rank, tp.size, self.mesh.device)

    def _spec(self, rows: int) -> StateSpec:
        found: StateSpec = {}
        for part in self.parts:
            found |= spec_of(self.config.model, part.layers, rows, self._activations)
        return found

    def _after(self) -> Carried | None:
        found: Carried = {}
        for part in self.parts:
            found |= named(part.take_after(), part.layers)
        if self.config.training.state_carry != "stream":
            return None
        pieces = self.parts[0].pieces
        return found if pieces is None else pieces.wrap_around(found)

    def _cut(self, tensor: Tensor) -> Tensor:
        """This rank's piece of the sequences."""
        return tensor.chunk(self.mesh.cp.size, dim=1)[self.mesh.cp.rank]

    def _piece(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        starts = batch.document_starts if self.config.data.tells_documents else None
        device = self.mesh.device
        tokens, labels = self._cut(batch.tokens).to(device), self._cut(batch.labels).to(device)
        return tokens, labels, None if starts is None else self._cut(starts).to(device)

    def _partial_gradients(self) -> list[nn.Parameter]:
        """With sequence parallelism: parameters that see a piece of the sequence on each rank."""
        if self.mesh.tensor is None or not self.config.parallel.sequence_parallel:
            return []
        plans: ShardPlan = {}
        for part in self.parts:
            plans |= part.model.shard_plan()
        return [p for name, p in self.parameters.items() if isinstance(plans[name], Replicate)]

    def _tie_here(self) -> None:
        """Where first and last stage are on one rank, tied token vectors are one parameter."""
        first, last = self.parts[0], self.parts[-1]
        if first is not last and first.first and last.last and last.model.head is None:
            last.model.embedding = first.model.embedding

    def _tied_group(self) -> dist.ProcessGroup | None:
        """The ranks that have copies of tied token vectors: the first and the last stage's."""
        layout, config = self.mesh.layout, self.config
        if layout.pp == 1 or not config.model.tie_embeddings or config.parallel.schedule == "zbv":
            return None
        across = self.mesh.world.size // layout.pp
        ends = [[n, n + across * (layout.pp - 1)] for n in range(across)]
        group, _ = dist.new_subgroups_by_enumeration(ends)
        return group if self.mesh.pp.rank in (0, layout.pp - 1) else None

    @torch.no_grad()
    def _add_partial_gradients(self) -> None:
        if self._partial:
            assert self.mesh.tensor is not None
            _add_up(self._partial, self.mesh.tensor.get_group())
        if self._tied is not None:
            _add_up([self.parameters["embedding.weight"]], self._tied)


def _add_up(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Replace the gradients by their sums over `group`, in one all-reduce a dtype."""
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    for dtype in {grad.dtype for grad in grads if grad is not None}:
        some = [grad for grad in grads if grad is not None and grad.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in some])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(some, flat.split([g.numel() for g in some]), strict=True):
            grad.copy_(part.view_as(grad))
