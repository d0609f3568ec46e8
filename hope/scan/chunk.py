"""One projection chunk of the closed form: forward, with what backward needs, and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope.scan.closed_form import Frame, block_length, make_frame, split_frame
from hope.scan.contract import Q, ScanConfig
from hope.scan.projections import (
    Projected,
    Queried,
    project,
    project_backward,
    project_query,
    project_query_backward,
)
from hope.scan.reads import (
    Blocks,
    CausalRead,
    StartRead,
    read_causal,
    read_causal_backward,
    read_start,
    read_start_backward,
    stack_blocks,
)
from hope.scan.writes import W2_DELTA, ReadGradient, Written, with_base, write, write_backward

READERS = 4
"""The memories that read x (k, v, eta, alpha) come first in the slow group."""


class Fast(NamedTuple):
    """Fast weights by group: slow1 [4 or 5, G, d, h] and slow2 [4 or 5, G, h, d] of the projection
    memories (q last), mem1 [1, G, d, h] and mem2 [1, G, h, d] of M_mem."""

    slow1: Tensor
    slow2: Tensor
    mem1: Tensor
    mem2: Tensor


class Bases(NamedTuple):
    """M_0 by group, as `Fast` with N for G, or nothing."""

    slow1: Tensor | None
    slow2: Tensor | None
    mem1: Tensor | None
    mem2: Tensor | None


class Params(NamedTuple):
    """The weights of some heads by group: as `Fast` with N for G; readout [2, N, d], bias [2, N]
    of eta and alpha."""

    slow1: Tensor
    slow2: Tensor
    mem1: Tensor
    mem2: Tensor
    readout: Tensor
    bias: Tensor

    def bases(self, config: ScanConfig) -> Bases:
        """What states are kept relative to: M_0, or nothing with decay towards zero."""
        return Bases(*self[:4]) if config.decay_to == "initial" else Bases(None, None, None, None)


class Chunk(NamedTuple):
    """A projection chunk after its forward pass; reads is a list when they are at chunk starts."""

    projected: Projected
    queried: Queried | None
    slow_frame: Frame
    mem_frame: Frame
    mem_parts: list[Frame]
    slow: Written
    mem: list[Written]
    blocks: Blocks | None
    reads: CausalRead | list[StartRead]

    def end(self) -> Fast:
        """The state after the chunk."""
        mem = self.mem[-1]
        return Fast(self.slow.delta1[-1], self.slow.delta2[-1], mem.delta1[-1], mem.delta2[-1])


def run_chunk(
    config: ScanConfig,
    params: Params,
    start: Fast,
    x: Tensor,
    q: Tensor,
    valid: int,
    keep: bool,
) -> tuple[Tensor, Chunk]:
    """Read and write one projection chunk.

    x, q: [G, F, d], padded behind `valid` tokens to a multiple of the memory chunk (or shorter
    than one); start: Delta before the chunk; keep: whether `chunk_backward` will follow.
    Returns out [G, F, d] and the chunk's record.
    """
    slow1, slow2, mem1, mem2 = params.bases(config)
    w1, w2 = with_base(start.slow1, slow1), with_base(start.slow2, slow2)
    readers = (w1[:READERS], w2[:READERS])
    projected = project(x, *readers, params.readout, params.bias, config.eta_max, valid, keep)
    queried = None
    if w1.shape[0] > READERS:
        queried = project_query(q, w1[READERS], w2[READERS])
        q = queried.q

    k, v = projected.kv
    tokens = k.shape[1]
    mem_tokens = min(config.memory_chunk, tokens)
    count = tokens // mem_tokens
    width = min(w1.shape[2:])
    c_slow, c_mem = block_length(tokens, width), block_length(mem_tokens, width)
    delta = config.delta_rule in W2_DELTA
    slow_frame = make_frame(k, projected.eta, projected.log_alpha, c_slow, delta)
    mem_frame = slow_frame
    if c_mem != c_slow:
        mem_frame = make_frame(k, projected.eta, projected.log_alpha, c_mem, delta)

    rule = config.delta_rule
    slow = write(rule, slow_frame, k, v, start.slow1, start.slow2, slow1, slow2, keep)
    mem_parts = split_frame(mem_frame, count)
    mem, reads, outs = [], [], []
    delta1, delta2 = start.mem1, start.mem2
    pieces = (z.split(mem_tokens, 1) for z in (k, v, q))
    for part, k_i, v_i, q_i in zip(mem_parts, *pieces, strict=True):
        k_i, v_i = k_i.contiguous(), v_i.contiguous()
        written = write(rule, part, k_i, v_i, delta1, delta2, mem1, mem2, keep)
        delta1, delta2 = written.delta1[-1], written.delta2[-1]
        mem.append(written)
        if config.read == "chunk_start":
            out, read = read_start(written, q_i)
            outs.append(out)
            reads.append(read)
    record = (projected, queried, slow_frame, mem_frame, mem_parts, slow, mem)
    if config.read == "chunk_start":
        return torch.cat(outs, 1), Chunk(*record, None, reads)
    blocks = stack_blocks(mem, c_mem)
    base1, base2 = (None if base is None else base[0] for base in (mem1, mem2))
    out, causal = read_causal(mem_frame, blocks, q, base1, base2)
    return out, Chunk(*record, blocks, causal)


def chunk_backward(
    config: ScanConfig, params: Params, chunk: Chunk, d_out: Tensor, d_end: Fast, grads: Params
) -> tuple[Tensor, Tensor, Fast]:
    """Derivative of `run_chunk`: (dx, dq, the gradient of the state before the chunk).

    d_out: [G, F, d], zero on padding; d_end: gradient of the state after it, overwritten;
    grads: the weights' gradients at fixed states, added to in place.
    """
    bases = params.bases(config)
    rule = config.delta_rule
    k, _ = chunk.projected.kv
    tokens = k.shape[1]
    count = len(chunk.mem)
    d_k = torch.zeros_like(k)
    d_v = torch.zeros_like(k)

    read_parts = None
    if isinstance(chunk.reads, CausalRead):
        assert chunk.blocks is not None
        base1, base2 = (None if base is None else base[0] for base in bases[2:])
        d_q, d_k_read, into, d_base1, d_base2 = read_causal_backward(
            chunk.mem_frame, chunk.blocks, chunk.reads, base1, base2, d_out
        )
        d_k += d_k_read
        if d_base1 is not None and d_base2 is not None:
            grads.mem1.add_(d_base1)
            grads.mem2.add_(d_base2)
        length = into.rows.shape[0] // count
        read_parts = [z.split(length) for z in into]
    else:
        d_q = torch.empty_like(d_out)

    d_mem1, d_mem2 = d_end.mem1, d_end.mem2
    log_eta, log_alpha = [], []
    for i in reversed(range(count)):
        here = slice(i * (tokens // count), (i + 1) * (tokens // count))
        written = chunk.mem[i]
        read = None if read_parts is None else ReadGradient(*(z[i] for z in read_parts))
        part = chunk.mem_parts[i]
        grad = write_backward(rule, part, written, bases.mem1, bases.mem2, d_mem1, d_mem2, read)
        d_mem1, d_mem2 = grad.delta1, grad.delta2
        if grad.base1 is not None and grad.base2 is not None:
            grads.mem1.add_(grad.base1)
            grads.mem2.add_(grad.base2)
        if isinstance(chunk.reads, list):
            d_q[:, here], dw1, dw2 = read_start_backward(written, chunk.reads[i], d_out[:, here])
            d_mem1 += dw1
            d_mem2 += dw2
        d_k[:, here] += grad.k
        d_v[:, here] += grad.v
        log_eta.append(grad.log_eta)
        log_alpha.append(grad.log_alpha)

    grad = write_backward(
        rule, chunk.slow_frame, chunk.slow, bases.slow1, bases.slow2, d_end.slow1, d_end.slow2, None
    )
    d_k += grad.k
    d_v += grad.v
    if grad.base1 is not None and grad.base2 is not None:
        grads.slow1.add_(grad.base1)
        grads.slow2.add_(grad.base2)
    d_log_eta = _tokens(torch.cat(log_eta[::-1])) + _tokens(grad.log_eta)
    d_log_alpha = _tokens(torch.cat(log_alpha[::-1])) + _tokens(grad.log_alpha)

    w1, w2 = chunk.slow.w1, chunk.slow.w2
    back = project_backward(
        chunk.projected,
        w1[:READERS],
        w2[:READERS],
        params.readout,
        torch.stack([d_k, d_v]),
        d_log_eta,
        d_log_alpha,
    )
    grads.readout.add_(back.readout)
    grads.bias.add_(back.bias)
    dw1, dw2 = back.w1, back.w2
    if chunk.queried is not None:
        d_q, q_w1, q_w2 = project_query_backward(chunk.queried, w1[READERS], w2[READERS], d_q)
        dw1 = torch.cat([dw1, q_w1.unsqueeze(0)])
        dw2 = torch.cat([dw2, q_w2.unsqueeze(0)])
    return back.x, d_q, Fast(grad.delta1.add_(dw1), grad.delta2.add_(dw2), d_mem1, d_mem2)


def _tokens(z: Tensor) -> Tensor:
    """[n, G, c] -> [G, n * c]."""
    return z.transpose(0, 1).flatten(1)


def group(z: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    """Split [M, N, ...] (k, v, eta, alpha, mem, maybe q) of some heads: slow memories and mem."""
    z = z[:, heads]
    slow = z[:READERS] if z.shape[0] <= Q else torch.cat([z[:READERS], z[Q:]])
    return slow.contiguous(), z[READERS : READERS + 1].contiguous()


def ungroup(target: Tensor, heads: slice, slow: Tensor, mem: Tensor) -> None:
    """The inverse of `group`: write into the heads of target [M, N, ...]."""
    target = target[:, heads]
    target[:READERS] = slow[:READERS].view_as(target[:READERS])
    target[READERS] = mem[0].view_as(target[READERS])
    if target.shape[0] > Q:
        target[Q] = slow[READERS].view_as(target[Q])
