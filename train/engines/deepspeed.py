"""DeepSpeed as an engine: ZeRO 1, 2 or 3 around this rank's part of the model, or its pipeline.

DeepSpeed computes gradients, shards and reduces them, keeps float32 partitions and gathers what
computes. When a level fires, and on what, is the cadence's: it steps the partitions themselves, so
the optimizer that DeepSpeed is given has nothing to do. Its averages are turned back into sums over
tokens; its clipping and loss scaling are off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_pipeline import Batch
from hope import HopeModel
from hope.init import initial_value
from hope.sharding import Replicate
from train.config import RunConfig
from train.engines.parts import EngineParts
from train.optim.build import decays
from train.optim.levels import level_of
from train.parallel.activations import checkpoint_activations, compile_layers
from train.parallel.carried import Carried, state_of
from train.parallel.mesh import Mesh
from train.parallel.parallelize import allocate
from train.parallel.part import Part, cut_layers, unused_parameters
from train.parallel.placement import Stored, in_memory
from train.parallel.stages import layers_of_rank
from train.parallel.tensor import connect, divide
from train.zero.cadence import Group, Published, ZeroCadence
from train.zero.config import settings
from train.zero.library import open_deepspeed, quiet
from train.zero.partitions import Partitions
from train.zero.pipeline import ZeroPipeline, topology


class Outside(torch.optim.Optimizer):
    """The optimizer that DeepSpeed is given: its groups are cut into partitions, and the cadence
    steps those."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


class DeepSpeedEngine(EngineParts):
    """This rank's part of the model under DeepSpeed.

    initial: whole tensors by parameter name to start from; None draws them from config.seed.
    Raises ConfigError where deepspeed is not installed. Every rank begins with its part whole.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, initial: dict[str, Tensor] | None = None
    ) -> None:
        library = open_deepspeed()
        (layers,) = layers_of_rank(config.model, config.parallel, mesh, config.data.seq_len)
        part = part_of(config, mesh, layers)
        super().__init__(config, mesh, [part])
        value = None if initial is None else lambda name, _: initial[name]
        allocate(self.parts, mesh.device, value, config.seed)
        whole = {name: p.shape for name, p in part.model.named_parameters()}
        self._plan = part.model.shard_plan()
        make_local(part.model)
        self.parameters = dict(part.model.named_parameters())
        self._groups = parameter_groups(config, self.parameters, unused_parameters(part.model))
        own = {name: parameter.shape for name, parameter in self.parameters.items()}
        with quiet():
            self._engine, self._pipeline = self._initialize(library, part)
        partitions = Partitions(self._engine.optimizer, self.parameters, own)
        tied_twice = mesh.layout.pp > 1 and config.model.tie_embeddings
        last = mesh.pp.rank == mesh.layout.pp - 1
        partial = config.parallel.sequence_parallel and mesh.tensor is not None
        self._held = Published(
            partitions,
            mesh,
            float(mesh.reduce.size * (config.parallel.micro_batches if self._pipeline else 1)),
            self._consume,
            self._plan,
            whole,
            {n for n, p in self._plan.items() if partial and isinstance(p, Replicate)},
            {"embedding.weight"} if tied_twice and last else set(),
        )
        if config.parallel.precision == "bf16":  # partitions are of rounded parameters until here
            for name, shape in whole.items():
                if initial is None:
                    self._put(name, initial_value(part.model, name, shape, config.seed))
                else:
                    self._put(name, initial[name])

    def _initialize(self, library: Any, part: Part) -> tuple[Any, ZeroPipeline | None]:
        config, mesh = self.config, self.mesh
        given = settings(config, mesh.layout)
        optimizer = Outside(
            [{"params": [self.parameters[n] for n in one.names]} for one in self._groups],
            {"lr": 0.0},
        )
        if mesh.layout.pp > 1:
            pipeline = ZeroPipeline(library, part, optimizer, given, mesh, config.model, self.loss)
            return pipeline.engine, pipeline
        if config.deepspeed.zero_stage == 3:
            library.utils.set_z3_leaf_modules(part, [type(part.model.layers[0])])
        mpu = None
        if mesh.tensor is not None:
            mpu = library.runtime.pipe.topology.PipelineParallelGrid(topology(mesh.layout))
        library.utils.groups.mpu = mpu  # which it would keep from an engine before this one
        engine, *_ = library.initialize(
            model=part, optimizer=optimizer, config=given, mpu=mpu, dist_init_required=False
        )
        return engine, None

    def make_cadence(self) -> ZeroCadence:
        """What steps the partitions."""
        return ZeroCadence(self._groups, self.config.model, self.config.optimizer, self._held)

    def saved_parameters(self) -> dict[str, Tensor]:
        """Every parameter for a checkpoint, by name, in float32; a collective call."""
        partitions = self._held.partitions
        return {
            name: self._held.saved(name, partitions.tensors[one.partition].detach())
            for name, one in partitions.fragments.items()
        }

    def load_parameters(self, tensors: Mapping[str, Tensor | Stored], elsewhere: set[str]) -> None:
        """Take whole `model/NAME` tensors; elsewhere: names of parameters that other ranks have.

        ValueError unless the names match; a collective call.
        """
        saved = {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}
        wrong = sorted(self.parameters.keys() ^ saved.keys())
        if wrong := [name for name in wrong if name not in elsewhere]:
            raise ValueError(f"checkpoint and model differ in {wrong[:4]}")
        for name in self.parameters:
            self._put(name, in_memory(saved[name]))
        self._held.partitions.publish()

    @torch.no_grad()
    def _put(self, name: str, whole: Tensor) -> None:
        partitions = self._held.partitions
        partition = partitions.tensors[partitions.fragments[name].partition]
        partitions.put(name, self._held.own(name, whole), partition)

    def forward_backward(
        self, batch: Batch, carried: Carried | None
    ) -> tuple[float, Carried | None]:
        """Let DeepSpeed reduce the gradient of the summed loss of this step.

        carried: the state that the rows begin with. Returns (the sum of the loss over the tokens
        that this rank speaks for, the state that the rows end with).
        """
        tokens, labels, starts = self._piece(batch)
        (part,) = self.parts
        part.before = None if carried is None else state_of(carried, part.layers)
        if self._pipeline is not None:
            self.mesh.world.pulse.enter("forward")
            total = self._pipeline.step(tokens, labels, starts)
            self.mesh.world.pulse.enter("backward")
        else:
            total = self._in_order(tokens, labels, starts)
        return total if self.speaks else 0.0, self._after()

    def _in_order(self, tokens: Tensor, labels: Tensor, starts: Tensor | None) -> float:
        rows = torch.arange(tokens.shape[0])
        pieces = rows.tensor_split(self.config.parallel.micro_batches)
        total = 0.0
        for number, own in enumerate(pieces, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(pieces))
            documents = None if starts is None else starts[own]
            self.mesh.world.pulse.enter("forward")
            loss = self.loss(self._engine(tokens[own], own, documents), labels[own])
            self.mesh.world.pulse.enter("backward")
            self._engine.backward(loss, scale_wrt_gas=False)
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def held_out(self, batch: Batch) -> float:
        """The summed loss of a batch whose rows begin afresh, as far as this rank speaks for it."""
        tokens, labels, starts = self._piece(batch)
        (part,) = self.parts
        part.before = None
        if self._pipeline is not None:
            total = self._pipeline.evaluate(tokens, labels, starts)
        else:
            logits = self._engine(tokens, torch.arange(tokens.shape[0]), starts)
            total = float(self.loss(logits, labels))
        return total if self.speaks else 0.0

    def _consume(self) -> None:
        """End DeepSpeed's step: gradients are forgotten, partitions gathered for computing."""
        if self._pipeline is not None:
            self._pipeline.consume()
        else:
            self._engine.step()


def part_of(config: RunConfig, mesh: Mesh, layers: range) -> Part:
    """This rank's part on the meta device, in the order of `train.parallel.parallelize`."""
    model = cut_layers(config.model, layers)
    if mesh.tensor is not None:
        divide(model, mesh.tensor)
        connect(model, mesh.tensor.get_group(), config.parallel.sequence_parallel)
    checkpoint_activations(model, config.parallel.activation_checkpointing)
    if config.parallel.compile:
        compile_layers(model)
    return Part(model, layers)


def make_local(model: HopeModel) -> None:
    """Replace DTensors by what this rank has of them: DeepSpeed lays plain numbers in a line.

    It takes what is not marked as divided for the first tensor-parallel rank's to speak for, and
    its BF16_Optimizer fails on a rank that has nothing to speak for.
    """
    for name, parameter in list(model.named_parameters()):
        if isinstance(parameter, DTensor):
            path, _, own = name.rpartition(".")
            plain = nn.Parameter(parameter.to_local().detach())
            divided = any(one.is_shard() for one in parameter.placements)
            plain.tensor_model_parallel = divided  # type: ignore[attr-defined]
            model.get_submodule(path).register_parameter(own, plain)


def parameter_groups(
    config: RunConfig, parameters: dict[str, nn.Parameter], unused: set[str]
) -> list[Group]:
    """A group for every level, of parameters with weight decay and of those without.

    Without a gradient nothing decays; DeepSpeed has zeros there, and the cadence would step on.
    """
    found: dict[tuple[str, float], list[str]] = {}
    for name, parameter in parameters.items():
        level = level_of(name, config.model)
        shrinks = decays(name, parameter) and name not in unused
        decay = config.optimizer.level(level).weight_decay if shrinks else 0.0
        found.setdefault((level, decay), []).append(name)
    return [Group(level, decay, names) for (level, decay), names in found.items()]
