"""Our own engine: torch's FSDP2, DTensors and pipeline schedules around the parts of the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline import Batch
from hope.sharding import Replicate, ShardPlan
from train.checkpoint.store import load_parameters
from train.config import RunConfig
from train.engines.parts import EngineParts
from train.optim.build import build_cadence
from train.optim.cadence import Cadence
from train.optim.levels import late_levels
from train.parallel.carried import Carried, state_of
from train.parallel.mesh import Mesh
from train.parallel.parallelize import allocate, parallelize
from train.parallel.pipeline import Pipeline
from train.parallel.placement import Stored, local


class NativeEngine(EngineParts):
    """The parts of a model that this rank has, and how a step goes through them.

    initial: whole tensors by parameter name to start from; None draws them from config.seed.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, initial: dict[str, Tensor] | None = None
    ) -> None:
        parallel = config.parallel
        super().__init__(
            config,
            mesh,
            parallelize(
                config.model,
                parallel,
                mesh,
                config.data.seq_len,
                late_levels(config.model, config.optimizer),
            ),
        )
        value = None if initial is None else lambda name, _: initial[name]
        allocate(self.parts, self._home, value, config.seed)
        self._tie_here()
        self.parameters = {
            name: parameter
            for part in self.parts
            for name, parameter in part.model.named_parameters()
        }
        self._pipeline: Pipeline | None = None
        if mesh.layout.pp > 1:
            self._pipeline = Pipeline(config, mesh, self.parts, self.loss, self._activations)
        self._partial = self._partial_gradients()
        self._tied = self._tied_group()

    @property
    def _home(self) -> torch.device:
        """Where parameters live."""
        return torch.device("cpu") if self.config.parallel.cpu_offload else self.mesh.device

    def make_cadence(self) -> Cadence:
        """What steps the parameters."""
        config = self.config
        return build_cadence(self.parameters, config.model, config.optimizer, self.mesh)

    def saved_parameters(self) -> dict[str, Tensor]:
        """Every parameter for a checkpoint, by name."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_parameters(self, tensors: Mapping[str, Tensor | Stored], elsewhere: set[str]) -> None:
        """Take whole `model/NAME` tensors; elsewhere: names of parameters that other ranks have."""
        load_parameters(self.parameters, tensors, elsewhere)

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
        losses, waiting = [], []
        for own in rows.tensor_split(self.config.parallel.micro_batches):
            documents = None if starts is None else starts[own]
            pulse.enter("forward")
            loss = self.loss(part(tokens[own], own, documents), labels[own])
            losses.append(loss.detach())
            waiting.append(loss)
            if len(waiting) > ahead:
                pulse.enter("backward")
                waiting.pop(0).backward()
        for loss in waiting:
            pulse.enter("backward")
            loss.backward()
        return sum(map(float, losses))  # only now is a device waited for

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
            if part.pieces is not None:
                part.pieces.settle()
        return total if self.speaks else 0.0

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
        return self.mesh.pipeline_ends()

    @torch.no_grad()
    def _add_partial_gradients(self) -> None:
        if self._partial:
            assert self.mesh.tensor is not None
            _add_up(self._partial, self.mesh.tensor.get_group())
        if self._tied is not None:
            _add_up([self.parameters["embedding.weight"]], self._tied)


def _add_up(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Replace the gradients by their sums over `group`, in one all-reduce a dtype."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        some = [grad for grad in grads if grad.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in some])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(some, flat.split([g.numel() for g in some]), strict=True):
            grad.copy_(part.view_as(grad))
