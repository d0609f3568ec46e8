"""What the scan's custom operators have in common: what they take and give, and their derivative.

An operator `forward(x, q, *weights, state1, state2, reset, *options, *more, save)` returns out, the
final w1 and w2, and what it kept for backward. Its `backward(d_out, d_final1, d_final2, *kept, x,
q, *weights, state1, state2, reset, *options, *more)` returns the gradients of x, q, the six weights
and, if there was one, the incoming state. Options are those of `options_of`: a schema holds numbers
and words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hope.scan.contract import MemoryState, ScanConfig, ScanWeights, compute_dtype

KEEP_TOKENS = 256
"""Segments up to this long keep their intermediate values while backward works on them."""

_TENSORS = 11  # x, q, the six weights, the two of the state, reset


def options_of(config: ScanConfig) -> tuple[int, int, float, str, str, str, int]:
    """What an operator is told of a configuration; `config_of` goes back."""
    return (
        config.memory_chunk,
        config.projection_chunk,
        config.eta_max,
        config.delta_rule,
        config.decay_to,
        config.read,
        config.segment_chunks,
    )


def config_of(
    memory_chunk: int,
    projection_chunk: int,
    eta_max: float,
    delta_rule: str,
    decay_to: str,
    read: str,
    checkpoint_chunks: int,
) -> ScanConfig:
    """The configuration that an operator's options stand for."""
    return ScanConfig(
        memory_chunk=memory_chunk,
        projection_chunk=projection_chunk,
        eta_max=eta_max,
        delta_rule=delta_rule,  # type: ignore[arg-type]
        decay_to=decay_to,  # type: ignore[arg-type]
        read=read,  # type: ignore[arg-type]
        checkpoint_chunks=checkpoint_chunks,
    )


def state_of(state1: Tensor | None, state2: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both weights of the incoming state, or none."""
    return None if state1 is None or state2 is None else (state1, state2)


def empty_results(x: Tensor, w1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for (out, final w1, final w2) of activations x [B, N, T, d] and start weights w1."""
    rows, heads, _, width = x.shape
    memories, _, _, hidden = w1.shape
    dtype = compute_dtype(x)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((memories, rows, heads, width, hidden), dtype=dtype),
        x.new_empty((memories, rows, heads, hidden, width), dtype=dtype),
    )


def empty_outputs(
    x: Tensor, w1: Tensor, config: ScanConfig, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`empty_results`, and room for what is kept: Deltas of w1 and w2 between segments
    [S, M, N, B, ...]."""
    out, final1, final2 = empty_results(x, w1)
    memories, rows, heads, width, hidden = final1.shape
    kept = (num_saved(x, config, save), memories, heads, rows)
    saved1, saved2 = (
        final1.new_empty((*kept, *shape)) for shape in ((width, hidden), (hidden, width))
    )
    return out, final1, final2, saved1, saved2


def num_saved(x: Tensor, config: ScanConfig, save: bool) -> int:
    """How many states between segments are kept of x [B, N, T, d]."""
    length = config.projection_chunk * config.segment_chunks
    return (x.shape[2] + length - 1) // length - 1 if save else 0


def empty_gradients(
    x: Tensor, q: Tensor, weights: list[Tensor], state: tuple[Tensor, Tensor] | None
) -> list[Tensor]:
    """Room for what a backward operator returns."""
    inputs = [x, q, *weights, *(state or ())]
    return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in inputs]


def set_up_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What backward is given of a call of a forward operator."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*output[3:], *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:-1]


def gradients_by(
    backward: Callable[..., list[Tensor]], ctx: Any, d_outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradient of every input of the forward operator, from a backward operator's."""
    grads = backward(*d_outputs[:3], *ctx.saved_tensors, *ctx.options)
    states = grads[8:] or (None, None)
    return (*grads[:8], *states, None, *([None] * (len(ctx.options) + 1)))


def differentiate(forward: Any, backward: Any, kept: int, name: str) -> None:
    """Make `backward` the derivative of `forward`, both custom operators, and itself have none.

    kept: how many tensors forward keeps for backward; name: of the scan, for the error.
    """

    def fake_gradients(*inputs: Any) -> list[Tensor]:
        x, q, *weights, state1, state2 = inputs[3 + kept :][: _TENSORS - 1]
        return empty_gradients(x, q, weights, state_of(state1, state2))

    def gradients(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients_by(backward, ctx, d_outputs)

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"scan: no second derivative of the {name} scan; use the reference")

    backward.register_fake(fake_gradients)
    backward.register_autograd(refuse)
    forward.register_autograd(gradients, setup_context=set_up_context)


def scan_by(
    operator: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    q: Tensor,
    weights: ScanWeights,
    config: ScanConfig,
    state: MemoryState | None,
    reset: Tensor | None,
    *more: bool,
) -> tuple[Tensor, MemoryState]:
    """The scan by a forward operator; more: its own options."""
    tensors = [x, q, *weights, *(state or ())]
    save = torch.is_grad_enabled() and any(z.requires_grad for z in tensors)
    states = state or (None, None)
    options = options_of(config)
    out, final1, final2, *_ = operator(x, q, *weights, *states, reset, *options, *more, save)
    return out, MemoryState(final1, final2)
