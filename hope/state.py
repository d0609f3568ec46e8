"""What the layers carry from one call to the next (hope-spec "State across sequences").

Every state is a NamedTuple of tensors whose first batch axis is the row, so it can be detached,
moved, split by row and saved without knowing which mixer it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope.scan import MemoryState


class TensorSpec(NamedTuple):
    """A carried tensor before it exists.

    row_axis: which axis counts batch rows; shard_axis: which one tensor-parallel ranks divide
    (heads, or the channels of heads), None when every rank holds the whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    row_axis: int
    shard_axis: int | None


StateSpec = dict[str, TensorSpec]
"""Everything a block carries, by its name within the block's state, e.g. `memory.w1`."""


def bytes_per_row(spec: Mapping[str, TensorSpec]) -> int:
    """Bytes that one batch row carries."""
    return sum(
        prod(one.shape) // one.shape[one.row_axis] * one.dtype.itemsize for one in spec.values()
    )


class TitansState(NamedTuple):
    """State of one self-modifying Titans mixer over B rows.

    memory: fast weights at the last projection-chunk boundary, or None with writes off.
    conv_x, conv_q: last inputs of the two convolutions, [B, conv_width - 1, dim]; with writes
        off nothing reads x, and conv_x is empty, [B, 0, dim].
    pending_x, pending_q: inputs of the scan since that boundary, [B, N, r, d] with r below
        projection_chunk.
        They are read again with the next call, so that any split of a sequence gives the output
        of the whole.
    """

    memory: MemoryState | None
    conv_x: Tensor
    conv_q: Tensor
    pending_x: Tensor
    pending_q: Tensor


class AttentionState(NamedTuple):
    """Keys and values seen so far, for decoding.

    k, v: [B, N, S, d], rotated; document_ids: [B, S], which document of its row each belongs to;
    conv: last inputs of the convolutions on q, k and v, [B, conv_width - 1, 3, dim] (none: empty).
    """

    k: Tensor
    v: Tensor
    document_ids: Tensor
    conv: Tensor


LayerState = TitansState | AttentionState | None


def check_kind(state: Any, kind: type) -> None:
    """Raise ValueError where a layer that carries a `kind` is given anything else."""
    if not isinstance(state, kind | None):
        raise ValueError(f"state: this layer carries {kind.__name__}, got {type(state).__name__}")


def check_held(name: str, held: Tensor, given: Tensor) -> None:
    """Raise ValueError where `held`, of a state, can't go before `given`: [B, N, any, d] each."""
    rows, heads, _, width = given.shape
    if held.shape != (rows, heads, held.shape[2], width):
        raise ValueError(
            f"state.{name} must be [B, N, any, d] = [{rows}, {heads}, any, {width}], "
            f"got {list(held.shape)}"
        )


class ModelState(NamedTuple):
    """One entry a layer; None for a layer that carries nothing."""

    layers: tuple[LayerState, ...]

    def map(self, function: Callable[[str, Tensor], Tensor]) -> ModelState:
        """The same structure with `function(name, tensor)` in place of every tensor.

        Names are unique within the model, e.g. `layers.0.memory.w1`.
        """
        return ModelState(
            tuple(_map(layer, f"layers.{i}", function) for i, layer in enumerate(self.layers))
        )

    def detach(self) -> ModelState:
        """Cut from the graph: what is carried over a training step has no gradient behind it."""
        return self.map(lambda _, tensor: tensor.detach())

    def is_finite(self) -> bool:
        """Whether every carried number is finite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.named_tensors().values())

    def rows(self, start: int, stop: int) -> ModelState:
        """The state of batch rows start to stop."""
        return self.map(lambda name, tensor: tensor.narrow(row_axis(name), start, stop - start))

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        named: dict[str, Tensor] = {}

        def collect(name: str, tensor: Tensor) -> Tensor:
            named[name] = tensor
            return tensor

        self.map(collect)
        return named


def concatenate_rows(states: Sequence[ModelState]) -> ModelState:
    """One state of all rows of `states`, in their order."""
    if len(states) == 1:
        return states[0]
    named = [state.named_tensors() for state in states]
    return states[0].map(
        lambda name, _: torch.cat([tensors[name] for tensors in named], dim=row_axis(name))
    )


def row_axis(name: str) -> int:
    """Which axis of the tensor called `name` in a `ModelState` counts batch rows."""
    return 1 if ".memory." in name else 0


def _map(node: Any, name: str, function: Callable[[str, Tensor], Tensor]) -> Any:
    if node is None:
        return None
    if isinstance(node, Tensor):
        return function(name, node)
    return type(node)(
        *(_map(getattr(node, field), f"{name}.{field}", function) for field in node._fields)
    )
