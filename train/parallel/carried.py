"""The memories' state that a rank carries from step to step: by name, and by row in checkpoints.

Names are those of the whole model, `layers.3.memory.w1`. A rank has its rows of the batch, its
layers, and its heads; of the pieces of a sequence the first carries what the last one left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hope import HopeConfig, HopeModel, ModelState
from hope.scan import MemoryState
from hope.state import LayerState, StateSpec, TitansState

Carried = dict[str, Tensor]


def spec_of(config: HopeConfig, layers: range, rows: int, dtype: torch.dtype) -> StateSpec:
    """What `rows` rows carry between steps in these layers, of all heads."""
    with torch.device("meta"):
        whole = HopeModel(config, seed=None).state_spec(rows, dtype=dtype)
    return {name: one for name, one in whole.items() if int(name.split(".")[1]) in layers}


def named(state: ModelState, layers: range) -> Carried:
    """The tensors of a state of these layers."""
    found = {}
    for name, tensor in state.named_tensors().items():
        _, number, own = name.split(".", 2)
        found[f"layers.{layers[int(number)]}.{own}"] = tensor
    return found


def state_of(carried: Carried, layers: range) -> ModelState:
    """The state of these layers, made of its named tensors."""

    def layer(number: int) -> LayerState:
        prefix = f"layers.{number}."
        own = {n.removeprefix(prefix): t for n, t in carried.items() if n.startswith(prefix)}
        if not own:
            return None
        memory = None
        if "memory.w1" in own:
            memory = MemoryState(own.pop("memory.w1"), own.pop("memory.w2"))
        return TitansState(memory=memory, **own)

    return ModelState(tuple(layer(number) for number in layers))


def to_rows(
    carried: Carried, rows: range, spec: StateSpec, mesh: DeviceMesh | None
) -> dict[str, Tensor]:
    """`stream/ROW/NAME` for each of the global batch rows `rows`; over tensor-parallel ranks, whole
    heads as DTensors of `mesh`."""
    found: dict[str, Tensor] = {}
    for name, tensor in carried.items():
        if tensor.numel() == 0:
            continue
        axis, divided = spec[name].row_axis, spec[name].shard_axis
        for local, row in enumerate(rows):
            one = tensor.select(axis, local).contiguous()
            if mesh is not None and divided is not None:
                one = DTensor.from_local(
                    one, mesh, [Shard(divided - int(divided > axis))], run_check=False
                )
            found[f"stream/{row}/{name}"] = one
    return found


def from_rows(
    saved: list[dict[str, Tensor]],
    rows: range,
    spec: StateSpec,
    rank: int,
    size: int,
    device: torch.device,
) -> Carried:
    """What `to_rows` gave, whole, taken up by rank `rank` of `size` tensor-parallel ranks."""
    found = {}
    for name, one in spec.items():
        axis, divided = one.row_axis, one.shard_axis
        shape = list(one.shape)
        if divided is not None:
            shape[divided] //= size
        if 0 in shape:
            found[name] = torch.zeros(shape, dtype=one.dtype, device=device)
            continue
        pairs = zip(rows, saved, strict=True)
        whole = torch.stack([tensors[f"stream/{row}/{name}"] for row, tensors in pairs], dim=axis)
        if divided is not None:
            whole = whole.narrow(divided, rank * shape[divided], shape[divided])
        found[name] = whole.contiguous().to(device)
    return found
