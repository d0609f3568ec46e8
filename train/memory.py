"""Where the bytes are: one table for the moment when there are not enough of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hope.model import num_parameters
from train.optim.cadence import ACCUMULATOR
from train.parallel.placement import local
from train.utilisation import peak_memory

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.trainer import Trainer


NUMBER = 4
"""Bytes of a number in parameters, sums of gradients and optimizers: float32."""


class OutOfMemoryError(RuntimeError):
    """Memory ran out; the message is a table of what holds it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on a device."""
    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def memory_report(trainer: Trainer, error: BaseException) -> str:
    """Bytes of this rank by what they are for, where `error` says that there were no more, and what
    to change; several lines.

    What is left of the peak after everything that has a name is activations, for the most part.
    """
    on_device = isinstance(error, torch.OutOfMemoryError)
    device = trainer.engine.mesh.device if on_device else torch.device("cpu")

    def there(tensors: Iterable[Tensor]) -> int:
        return _bytes(tensor for tensor in tensors if tensor.device.type == device.type)

    parameters = list(trainer.engine.parameters.values())
    cadence = trainer.cadence
    parts_of_levels = [p for level in cadence.levels for p in (level, level.start) if p is not None]
    moments = [
        tensor
        for level in parts_of_levels
        for parameter in level.parameters.values()
        for tensor in level.optimizer_state(parameter).values()
    ]
    starts = [level.start for level in cadence.levels if level.start is not None]
    carried = trainer.carried.values() if trainer.carried is not None else ()
    parts = {
        "parameters": there(parameters),
        "gradients": there(p.grad for p in parameters if p.grad is not None),
        "optimizer states": there(moments),
        "learned starts of nested levels": there(p for s in starts for p in s.parameters.values()),
        "accumulators of slow levels": there(held[ACCUMULATOR] for held in cadence.state.values()),
        "carried fast weights": there(carried),
    }
    peak, what = peak_memory(device), "peak of the process, libraries included"
    if device.type == "cuda":
        what = "peak allocated on the device"
    rest = max(0, peak - sum(parts.values()))
    parts |= {"everything else, activations first": rest, what: peak}
    parts_of_rows = trainer.config.parallel.micro_batches
    lines = [
        f"out of memory on rank {trainer.ranks.rank}, in phase {trainer.ranks.pulse.phase} of step "
        f"{trainer.ranks.pulse.step}:",
        *_table(parts),
        f"more parallel.micro_batches ({parts_of_rows} now), or activation_checkpointing, take "
        "less for activations; optimizer.accumulator_device=cpu keeps accumulators off the device",
    ]
    if device.type == "cuda":
        lines.append(torch.cuda.memory_summary(device, abbreviated=True))
    return "\n".join(lines)


def building_report(config: RunConfig, rank: int) -> str:
    """Bytes that the model of `config` takes when it has been built, and what to change; several
    lines."""
    size = NUMBER * num_parameters(config.model)
    parts = {
        "parameters of the whole model": size,
        "their gradients": size,
        "their moments, with AdamW": 2 * size,
    }
    return "\n".join(
        [
            f"out of memory on rank {rank}, while the model was built:",
            *_table(parts),
            "parallel.dp_shard, tp and pp divide them; --dry-run --world-size N says what a rank "
            "then holds",
        ]
    )


def _table(parts: dict[str, int]) -> list[str]:
    return [f"  {name:<42}{size / 2**20:>12,.1f} MiB" for name, size in parts.items()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that this rank holds of some tensors."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)
