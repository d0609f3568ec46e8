"""The scan chunk by chunk in closed form, with a backward of its own.

Forward keeps one fast-weight state in every `checkpoint_chunks` projection chunks; backward
recomputes the rest, segment by segment from the end. It is registered as one operator, so that
compilers and activation checkpointing see a single node; backward is another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hope.scan.contract import MemoryState, ScanConfig, ScanWeights, no_autocast
from hope.scan.operators import (
    KEEP_TOKENS,
    config_of,
    differentiate,
    empty_gradients,
    empty_outputs,
    scan_by,
    state_of,
)
from hope.scan.products import Scratch, over_rows
from hope.scan.run import Run
from hope.scan.tiles import Chunk, chunk_backward, freeze
from hope.scan.writes import Memories
from hope.scan.writes_backward import Sums


def _restart(fast: Memories, fresh: Memories, again: Tensor | None) -> Memories:
    if again is None:
        return fast
    return Memories(*(torch.where(again, new, old) for new, old in zip(fresh, fast, strict=True)))


def forward(
    x: Tensor,
    q: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_eta: Tensor,
    b_eta: Tensor,
    w_alpha: Tensor,
    b_alpha: Tensor,
    state1: Tensor | None,
    state2: Tensor | None,
    reset: Tensor | None,
    memory_chunk: int,
    projection_chunk: int,
    eta_max: float,
    delta_rule: str,
    decay_to: str,
    read: str,
    checkpoint_chunks: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, final w1, final w2, saved Deltas of w1 and w2 [S, M, N, B, ...])."""
    options = (memory_chunk, projection_chunk, eta_max, delta_rule, decay_to, read)
    config = config_of(*options, checkpoint_chunks)
    run = Run(config, x, q, [w1, w2, w_eta, b_eta, w_alpha, b_alpha], reset)
    state = state_of(state1, state2)
    out, final1, final2, saved1, saved2 = empty_outputs(x, w1, config, save)
    scratch = Scratch(final1)
    for heads in run.head_slices():
        params = run.params(heads)
        fresh = run.fresh(params)
        fast = run.start(params, state, heads)
        for chunk in range(run.num_chunks):
            fast = _restart(fast, fresh, run.again(chunk, heads))
            segment, inside = divmod(chunk, checkpoint_chunks)
            if save and segment and not inside:
                run.store(saved1[segment - 1], fast.w1, heads)
                run.store(saved2[segment - 1], fast.w2, heads)
            chunk_out, record = run.forward_chunk(params, fast, chunk, heads, scratch, None)
            run.put(out, chunk_out, chunk, heads)
            fast = record.end
        end = Memories(*(torch.empty_like(z) for z in fast))
        freeze(fast, params.base(config), end)
        run.store(final1.transpose(1, 2), end.w1, heads)
        run.store(final2.transpose(1, 2), end.w2, heads)
    return out, final1, final2, saved1, saved2


def backward(
    d_out: Tensor | None,
    d_final1: Tensor | None,
    d_final2: Tensor | None,
    saved1: Tensor,
    saved2: Tensor,
    x: Tensor,
    q: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_eta: Tensor,
    b_eta: Tensor,
    w_alpha: Tensor,
    b_alpha: Tensor,
    state1: Tensor | None,
    state2: Tensor | None,
    reset: Tensor | None,
    memory_chunk: int,
    projection_chunk: int,
    eta_max: float,
    delta_rule: str,
    decay_to: str,
    read: str,
    checkpoint_chunks: int,
) -> list[Tensor]:
    """Gradients of x, q, the six weights and, if there was one, the incoming state."""
    options = (memory_chunk, projection_chunk, eta_max, delta_rule, decay_to, read)
    config = config_of(*options, checkpoint_chunks)
    weights = [w1, w2, w_eta, b_eta, w_alpha, b_alpha]
    run = Run(config, x, q, weights, reset)
    state = state_of(state1, state2)
    grads = empty_gradients(x, q, weights, state)
    scratch = Scratch(saved1)
    with no_autocast(x):
        for heads in run.head_slices():
            final = (d_final1, d_final2)
            _backward_heads(run, heads, d_out, final, (saved1, saved2), state, grads, scratch)
    return grads


def _backward_heads(
    run: Run,
    heads: slice,
    d_out: Tensor | None,
    d_final: tuple[Tensor | None, Tensor | None],
    saved: tuple[Tensor, Tensor],
    state: tuple[Tensor, Tensor] | None,
    grads: list[Tensor],
    scratch: Scratch,
) -> None:
    """Write the gradients of some heads into `grads`, in the order of the operator's inputs."""
    config = run.config
    params = run.params(heads)
    fresh = run.fresh(params)
    d_fast = run.gradient(d_final, params, heads)
    frozen, lost = (Memories(*(torch.zeros_like(z) for z in fresh)) for _ in range(2))
    weights = Memories(*(torch.zeros_like(z) for z in params.start))
    readout, bias = torch.zeros_like(params.readout), torch.zeros_like(params.bias)
    sums = Sums(frozen, weights, lost, readout, bias)

    def add_base(d: Memories) -> None:
        # Of the rows that start from the weights.
        for one, z in zip(weights, d, strict=True):
            one.add_(over_rows(z, one.shape[1]))

    length = config.segment_chunks
    keep = length * config.projection_chunk <= KEEP_TOKENS
    for first in reversed(range(0, run.num_chunks, length)):
        if first == 0:
            fast = run.start(params, state, heads)
        else:
            fast = run.load(saved[0][first // length - 1], saved[1][first // length - 1], heads)
        chunks = range(first, min(first + length, run.num_chunks))
        starts: list[Memories] = []
        records: dict[int, Chunk] = {}
        for chunk in chunks:
            fast = _restart(fast, fresh, run.again(chunk, heads))
            if keep:
                _, record = run.forward_chunk(params, fast, chunk, heads, scratch, chunk - first)
                records[chunk] = record
                fast = record.end
                continue
            starts.append(Memories(*(z.clone() for z in fast)))
            if chunk != chunks[-1]:
                fast = run.forward_chunk(params, fast, chunk, heads, scratch, None)[1].end
        for chunk in reversed(chunks):
            if keep:
                record = records.pop(chunk)
            else:
                _, record = run.forward_chunk(params, starts.pop(), chunk, heads, scratch, 0)
            d_chunk = run.take_gradient(d_out, chunk, heads)
            dx, dq = chunk_backward(config, params, record, d_chunk, d_fast, sums, scratch)
            run.put(grads[0], dx, chunk, heads)
            run.put(grads[1], dq, chunk, heads)
            again = run.again(chunk, heads)
            if again is not None:
                zero = Memories(*(torch.zeros_like(z) for z in d_fast))
                add_base(_restart(zero, d_fast, again))
                d_fast = _restart(d_fast, zero, again)

    if state is not None:
        run.store(grads[8].transpose(1, 2), d_fast.w1, heads)
        run.store(grads[9].transpose(1, 2), d_fast.w2, heads)
    else:
        add_base(d_fast)
    add_base(lost)
    grads[2][:, heads], grads[3][:, heads] = weights
    for i, z in zip((4, 6), readout, strict=True):
        grads[i][heads] = z
    for i, z in zip((5, 7), bias, strict=True):
        grads[i][heads] = z


_scan_chunked = torch.library.custom_op("hope::scan_chunked", forward, mutates_args=())
_scan_chunked_backward = torch.library.custom_op(
    "hope::scan_chunked_backward", backward, mutates_args=()
)


@_scan_chunked.register_fake
def _(x, q, w1, w2, w_eta, b_eta, w_alpha, b_alpha, state1, state2, reset, *options):  # type: ignore[no-untyped-def]
    return empty_outputs(x, w1, config_of(*options[:-1]), options[-1])


differentiate(_scan_chunked, _scan_chunked_backward, kept=2, name="chunked")


def scan_chunked(
    x: Tensor,
    q: Tensor,
    weights: ScanWeights,
    config: ScanConfig,
    state: MemoryState | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """The scan in closed form, chunk by chunk.

    Shapes as in `hope.scan.scan`; inputs are expected to have passed
    `hope.scan.contract.check_inputs`. Differentiable once, in every tensor but reset.
    """
    return scan_by(_scan_chunked, x, q, weights, config, state, reset)
