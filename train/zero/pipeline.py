"""DeepSpeed's PipelineModule over this rank's part of the model, with ZeRO 1.

Its schedule (1F1B) computes and reduces gradients; its own optimizer step is left out, and taken by
`consume` once the cadence has moved the weights. The state of the memories stays on its stage: the
rows and document starts of micro-batches are taken in the order of the schedule, which is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope import HopeConfig
from train.parallel.layout import Layout
from train.parallel.mesh import Mesh
from train.parallel.part import Part
from train.zero.library import quiet

Loss = Callable[[Tensor, Tensor], Tensor]


def topology(layout: Layout) -> Any:
    """DeepSpeed's words for a layout: its axes pipe, data and model are our pp, dp and tp."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)


class Stage(nn.Module):
    """A part as a pipeline's layer: what goes in is the activations alone."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        self.micro_batches: Iterator[tuple[Tensor, Tensor | None]] = iter(())

    def forward(self, x: Tensor) -> Tensor:
        rows, starts = next(self.micro_batches)
        return self.part(x, rows, starts)


class ZeroPipeline:
    """This rank's stage in DeepSpeed's schedule."""

    def __init__(
        self,
        library: Any,
        part: Part,
        optimizer: torch.optim.Optimizer,
        given: dict[str, Any],
        mesh: Mesh,
        model: HopeConfig,
        loss: Loss,
    ) -> None:
        from deepspeed.pipe import LayerSpec, PipelineModule
        from deepspeed.runtime.pipe.schedule import OptimizerStep

        layout = mesh.layout
        tied = _tied(part, mesh) if model.tie_embeddings else []

        class Pipe(PipelineModule):
            """One layer a stage, which is built already; tied token vectors lie at both ends."""

            def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
                return tied

        self._stage = Stage(part)
        self._micro_batches = given["gradient_accumulation_steps"]
        module = Pipe(
            [LayerSpec(_Built, self._stage) for _ in range(layout.pp)],
            topology=topology(layout),
            loss_fn=loss,
            partition_method="uniform",
        )
        self.engine, *_ = library.initialize(
            model=module, optimizer=optimizer, config=given, dist_init_required=False
        )
        self.engine._INSTRUCTION_MAP = {
            **self.engine._INSTRUCTION_MAP,
            OptimizerStep: lambda *_, **__: None,
        }

    def step(self, tokens: Tensor, labels: Tensor, starts: Tensor | None) -> float:
        """Forward and backward of all micro-batches; the summed loss where the model ends."""
        self._feed(tokens, starts, self._micro_batches)
        pairs = zip(
            tokens.chunk(self._micro_batches), labels.chunk(self._micro_batches), strict=True
        )
        self.engine.reset_activation_shape()
        with quiet():  # it tells of its first step
            self.engine.train_batch(iter(list(pairs)))
        return self._total()

    def evaluate(self, tokens: Tensor, labels: Tensor, starts: Tensor | None) -> float:
        """The summed loss where the model ends; stage after stage, no gradient."""
        self._feed(tokens, starts, 1)
        self.engine.reset_activation_shape()
        self.engine.eval_batch(
            iter([(tokens, labels)]), bcast_loss=False, reduce_output=None, num_micro_batches=1
        )
        self.engine.module.train()
        return self._total()

    def consume(self) -> None:
        """DeepSpeed's step, which the schedule left out."""
        self.engine._exec_optimizer_step()

    def _feed(self, tokens: Tensor, starts: Tensor | None, count: int) -> None:
        rows = torch.arange(tokens.shape[0]).chunk(count)
        self._stage.micro_batches = iter(
            [(own, None if starts is None else starts[own]) for own in rows]
        )

    def _total(self) -> float:
        if not self.engine.is_last_stage():
            return 0.0
        return float(sum(loss for loss in self.engine.fwd_outputs))


class _Built(nn.Module):
    """What PipelineModule builds on the rank whose stage it is: the stage that is there already."""

    def __new__(cls, stage: Stage) -> Stage:  # type: ignore[misc]
        return stage


def _tied(part: Part, mesh: Mesh) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
    """The token vectors of the first and the last stage with the group of the two; elsewhere none.

    A collective call of all ranks.
    """
    group = mesh.pipeline_ends()
    if group is None:
        return []
    return [(part.model.get_parameter("embedding.weight"), group)]
