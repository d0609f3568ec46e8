"""What every engine keeps: the model's parts on this rank, its rows of a batch, its memories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from data_pipeline import IGNORE, Batch
from hope.state import StateSpec
from train.config import RunConfig
from train.evaluate.perplexity import summed_loss
from train.optim.cadence import Cadence
from train.parallel.carried import Carried, from_rows, named, spec_of, to_rows
from train.parallel.mesh import Mesh
from train.parallel.parallelize import PRECISIONS
from train.parallel.part import Part
from train.parallel.placement import Stored
from train.parallel.tensor import loss_over

Loss = Callable[[Tensor, Tensor], Tensor]


class Engine(Protocol):
    """What the trainer needs of whatever computes its gradients.

    parameters: those that this rank holds (parts of), by their names in the whole model.
    modules: the parts of the model that this rank calls, first to last.
    speaks: whether this rank's loss and counts are to be added to those of the others; of the ranks
    that compute the same tokens one does.
    """

    mesh: Mesh
    parameters: dict[str, nn.Parameter]
    speaks: bool

    @property
    def modules(self) -> Sequence[Part]: ...

    def make_cadence(self) -> Cadence: ...

    def saved_parameters(self) -> dict[str, Tensor]: ...

    def load_parameters(
        self, tensors: Mapping[str, Tensor | Stored], elsewhere: set[str]
    ) -> None: ...

    def forward_backward(
        self, batch: Batch, carried: Carried | None
    ) -> tuple[float, Carried | None]: ...

    def held_out(self, batch: Batch) -> float: ...

    def spoken_for(self, labels: Tensor) -> Tensor: ...

    def carried_rows(self, carried: Carried | None, rows: range) -> dict[str, Tensor]: ...

    def take_up_rows(self, saved: list[dict[str, Tensor]], rows: range) -> Carried | None: ...


class EngineParts:
    """The parts of a model that this rank has, and which tokens and states are this rank's."""

    def __init__(self, config: RunConfig, mesh: Mesh, parts: list[Part]) -> None:
        self.config, self.mesh, self.parts = config, mesh, parts
        tp = mesh.tensor
        self.loss: Loss = summed_loss if tp is None else loss_over(tp.get_group())
        self.speaks = self.parts[-1].last and mesh.tp.rank == 0
        for part in parts:
            part.keeps_state = config.training.state_carry == "stream"

    @property
    def modules(self) -> Sequence[Part]:
        """The parts of the model, first to last."""
        return self.parts

    @property
    def _activations(self) -> torch.dtype:
        precision = PRECISIONS[self.config.parallel.precision]
        return precision or next(iter(self.parts[0].parameters())).dtype

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
        if self.config.training.state_carry != "stream":
            return None
        found: Carried = {}
        for part in self.parts:
            found |= named(part.take_after(), part.layers)
        pieces = self.parts[0].pieces
        return found if pieces is None else pieces.wrap_around(found)

    def _cut(self, tensor: Tensor) -> Tensor:
        """This rank's piece of the sequences."""
        return tensor.chunk(self.mesh.cp.size, dim=1)[self.mesh.cp.rank]

    def _piece(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        starts = batch.document_starts if self.config.data.tells_documents else None

        def own(tensor: Tensor) -> Tensor:
            return self._cut(tensor).to(self.mesh.device, non_blocking=True)

        return own(batch.tokens), own(batch.labels), None if starts is None else own(starts)
