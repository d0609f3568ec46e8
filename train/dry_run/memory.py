"""Bytes that a rank needs at the peak of a training step, by kind: the formulas.

From the rank's own tensors, P numbers in all, of which P_slow in levels that don't fire every step:

weights       what the rank holds of the parameters, and starts theta0 of nested levels
gradients     as much, in float32
accumulators  4 P_slow; divided by the ranks that share whole parameters, with reduce: every_step
optimizer     AdamW 8 P, SGD 4 P with momentum, Muon 4, M3 16 for its matrices
fast state    what the rows carry from step to step
activations   the most that is alive at once beside all this: `peak_of_actions` goes through the
              rank's forward and backward passes in the order of its schedule, with what
              `tracing.trace_part` finds that a micro-batch keeps and touches
buffers       FSDP2's gathered parameters and gradients (`fsdp_buffers`), a pipeline's receive
              buffers, states on their way to the next piece of a sequence, gradients on their way
              to other ranks

The peak is in backward; or in the update, when activations are gone and gradients travel.
What is offloaded to the host counts like the rest.
Not counted: temporaries of optimizers (Muon's and M3's are a few matrices), Python, libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import Tensor

from train.config import RunConfig
from train.dry_run.tracing import PartBytes
from train.memory import NUMBER
from train.optim.build import is_matrix
from train.optim.levels import group_by_level, reset_by
from train.parallel.mesh import Mesh
from train.parallel.placement import local
from train.parallel.reduction import BUCKET_ELEMENTS


class Action(NamedTuple):
    """A pass of a micro-batch through one of the rank's parts: "F" forward, "B" backward, or its
    halves "I" (by the inputs) and "W" (by the parameters)."""

    kind: str
    part: int


@dataclass(frozen=True)
class Memory:
    """Bytes by kind; update: what the update needs beside all but activations and step_buffers."""

    weights: int
    gradients: int
    accumulators: int
    optimizer: int
    fast_state: int
    activations: int
    step_buffers: int
    update: int

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step. Gradients appear as activations go, so that `activations`
        is counted beyond those that are there by then."""
        held = self.weights + self.accumulators + self.optimizer + self.fast_state
        return held + self.gradients + max(self.activations + self.step_buffers, self.update)


def optimizer_numbers(config: RunConfig, level: str, name: str, parameter: Tensor) -> int:
    """Numbers that the level's optimizer keeps for each number of a parameter."""
    kind = config.optimizer.level(level).optimizer
    if kind == "sgd":
        return int(config.optimizer.sgd.momentum > 0)
    if kind == "adamw" or not is_matrix(name, parameter):  # type: ignore[arg-type]
        return 2
    return 1 if kind == "muon" else 4


def held_bytes(
    config: RunConfig, mesh: Mesh, parameters: dict[str, Tensor], every: dict[str, int]
) -> dict[str, int]:
    """Bytes of weights, gradients, accumulators and optimizer, from the rank's own tensors.

    every: steps between the firings of each level, fastest first.
    """
    found = dict.fromkeys(("weights", "gradients", "accumulators", "optimizer"), 0)
    slower = reset_by(config.model)
    for level, names in group_by_level(parameters, config.model).items():
        nested = level in slower
        copies = 2 if nested else 1
        late = config.optimizer.level(level).reduce == "at_update"
        for name in names:
            own = local(parameters[name])
            share = own.numel()
            if mesh.reduce.size > 1 and not mesh.layout.sharded and not late:
                share = -(-own.shape[0] // mesh.reduce.size) * prod(own.shape[1:])
            slow = int(every[level] > 1) + int(nested)
            found["weights"] += copies * own.nbytes
            found["gradients"] += own.nbytes
            found["accumulators"] += slow * share * NUMBER
            numbers = optimizer_numbers(config, level, name, parameters[name])
            found["optimizer"] += copies * numbers * own.numel() * NUMBER
    return found


def update_buffers(
    config: RunConfig, mesh: Mesh, parameters: dict[str, Tensor], every: dict[str, int]
) -> int:
    """Bytes that gradients need on their way to other ranks: a bucket (8 Mi numbers or one tensor),
    and with a reduce-scatter the shares beside it."""
    if mesh.reduce.size == 1 or mesh.layout.sharded:
        return 0
    most = 0
    for level, names in group_by_level(parameters, config.model).items():
        sizes = [local(parameters[name]).numel() for name in names]
        bucket = max([min(sum(sizes), BUCKET_ELEMENTS), *sizes], default=0)
        shares = 0 if every[level] == 1 else sum(sizes) / mesh.reduce.size
        most = max(most, int(NUMBER * (bucket + shares)))
    return most


def peak_of_actions(actions: Sequence[Action], parts: Sequence[PartBytes], held: int = 0) -> int:
    """The most bytes alive while a rank goes through its passes, those of gradients included.

    held: bytes that gradients of all parts have from the first backward pass on in another form
    (FSDP2's shards), instead of the parts' own.
    """
    alive = most = 0
    started: set[int] = set()
    for kind, number in actions:
        part = parts[number]
        first = number not in started
        fresh = first or held > 0
        if kind == "F":
            most = max(most, alive + part.forward)
            alive += part.kept
            continue
        if kind == "I":
            most = max(most, alive - part.kept + (part.backward if fresh else part.again))
            alive += part.between - part.kept
            continue
        before, during = part.kept, part.backward if fresh else part.again
        if kind == "W":
            before, during = part.between, part.weights if fresh else part.weights_again
        most = max(most, alive - before + during)
        alive += part.left - before
        if held == 0:
            alive += part.gradients if first else 0
        elif not started:
            alive += held
            most = max(most, alive)
        started.add(number)
    return most


def order_of_one_part(micro_batches: int, ahead: int) -> list[Action]:
    """Micro-batch after micro-batch, forward passes `ahead` of backward passes."""
    forward, backward = Action("F", 0), Action("B", 0)
    actions: list[Action] = []
    for number in range(micro_batches):
        actions.append(forward)
        if number >= ahead:
            actions.append(backward)
    return [*actions, *[backward] * min(ahead, micro_batches)]


def order_of_one_stage(micro_batches: int, stages: int, stage: int, schedule: str) -> list[Action]:
    """A rank's passes under "gpipe" and "1f1b", which has as many micro-batches under way as
    there are stages from this one on."""
    ahead = micro_batches if schedule == "gpipe" else min(micro_batches, stages - stage) - 1
    return order_of_one_part(micro_batches, ahead)


def fsdp_buffers(layers: Sequence[int], rest: int, itemsize: int, piped: bool) -> tuple[int, int]:
    """Bytes of FSDP2's buffers: of parameters, and of gradients once a layer has some.

    layers: numbers of each layer's parameters over the shards; rest: of what is left. While a layer
    is worked on its parameters are whole, and the next one's come into a buffer of their size, from
    which they are copied once it is done; its gradients are whole, and again in float32 where they
    are summed. In a pipeline all parameters stay whole for the step.
    """
    largest = max([*layers, rest])
    if piped:
        return (sum(layers) + rest + largest) * itemsize, 0
    gathered = rest + 2 * max(layers, default=0)
    return gathered * itemsize, max(layers, default=0) * (itemsize + NUMBER)
