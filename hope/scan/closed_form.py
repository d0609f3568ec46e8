"""The pieces of a chunk's closed form, each beside its derivative.

Letters used throughout the closed form: N heads, B rows, G = N * B of them flattened (heads
outermost), m memories of a group, d the head's width, h the memories' hidden width, F the tokens
that share one frozen gradient, c the tokens of a block of the recurrence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hope.scan.products import Scratch
from hope.scan.reference import NORM_EPS

MAX_BLOCK = 64
"""Longest block of the recurrence solved at once; its cost a token grows with it."""
_INVERSE_LEAF = 16

# tanh-GELU is z * sigmoid(w), w = _W1 z + _W3 z^3.
_W1 = 2 * math.sqrt(2 / math.pi)
_W3 = _W1 * 0.044715


def _gate(z: Tensor, square: Tensor, gate: Tensor) -> None:
    """z^2 -> square and sigmoid(w) -> gate, shaped like z."""
    torch.mul(z, z, out=square)
    torch.add(z.new_full((), _W1), square, alpha=_W3, out=gate).mul_(z).sigmoid_()


def _gate_slope(square: Tensor, out: Tensor) -> Tensor:
    """dw / dz from z^2 -> out (which may be square itself)."""
    return torch.add(square.new_full((), _W1), square, alpha=3 * _W3, out=out)


def gelu(z: Tensor, scratch: Scratch) -> Tensor:
    """tanh-GELU of z, any shape: one sigmoid and cheap passes, faster here than F.gelu."""
    gate = scratch("gate", *z.shape)
    _gate(z, scratch("square", *z.shape), gate)
    return gate.mul_(z)


def gelu_slope(z: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """tanh-GELU of z and its first derivative, shaped like z."""
    square, gate = scratch("square", *z.shape), scratch("gate", *z.shape)
    _gate(z, square, gate)
    act = torch.mul(z, gate, out=scratch("act", *z.shape))
    slope = torch.addcmul(act, act, gate, value=-1, out=scratch("slope", *z.shape))
    return act, torch.addcmul(gate, slope, _gate_slope(square, square), out=slope)


def gelu_curvature(z: Tensor, tokens: int, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """tanh-GELU of z [m, G, F, h] and its first derivative, and the second one of the first
    `tokens` of F."""
    square, gate = scratch("square", *z.shape), scratch("gate", *z.shape)
    _gate(z, square, gate)
    act = torch.mul(z, gate, out=scratch("act", *z.shape))
    rise = _gate_slope(square, scratch("rise", *z.shape))
    slope = torch.addcmul(act, act, gate, value=-1, out=scratch("slope", *z.shape))
    torch.addcmul(gate, slope, rise, out=slope)

    z, square, gate, rise = (t[:, :, :tokens] for t in (z, square, gate, rise))
    tilt = torch.mul(gate, -2, out=scratch("curvature", *z.shape)).add_(1)
    tilt.mul_(z).mul_(rise).add_(2).mul_(rise).add_(square, alpha=6 * _W3)
    return act, slope, tilt.mul_(gate.addcmul_(gate, gate, value=-1))


def unit(z: Tensor) -> tuple[Tensor, Tensor]:
    """z / |z| along the last dimension and 1 / |z| [..., 1], with |z| at least NORM_EPS."""
    inverse = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min_(NORM_EPS).reciprocal_()
    return z * inverse, inverse


def unit_backward(grad: Tensor, e: Tensor, inverse: Tensor) -> Tensor:
    """Gradient with respect to z of `unit`, from the gradient of e = z / |z|."""
    along = (grad * e).sum(-1, keepdim=True)
    along = along.masked_fill_(inverse > 0.999 / NORM_EPS, 0)
    return torch.addcmul(grad, e, along, value=-1).mul_(inverse)


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + strict)^-1 for strictly lower triangular [n, c, c], by halves down to small solves."""
    n, c, _ = strict.shape
    if c <= _INVERSE_LEAF or c % 2:
        eye = torch.eye(c, dtype=strict.dtype, device=strict.device)
        # The unit diagonal is implied, so `strict` serves as I + strict.
        return torch.linalg.solve_triangular(
            strict, eye.expand(n, c, c), upper=False, unitriangular=True
        )
    half = c // 2
    ends = unit_lower_inverse(torch.cat([strict[:, :half, :half], strict[:, half:, half:]]))
    first, last = ends[:n], ends[n:]
    inverse = strict.new_zeros(n, c, c)
    inverse[:, :half, :half] = first
    inverse[:, half:, half:] = last
    inverse[:, half:, :half] = torch.bmm(last, torch.bmm(strict[:, half:, :half], first)).neg_()
    return inverse


def block_length(tokens: int, width: int) -> int:
    """How long a block of the recurrence to use for chunks of that many tokens.

    A block longer than the memories are wide costs more in its triangular system than it saves.
    """
    longest = min(tokens, MAX_BLOCK, max(_INVERSE_LEAF, width))
    divisors = [c for c in range(1, longest + 1) if tokens % c == 0]
    return divisors[-1] if divisors[-1] >= min(tokens, _INVERSE_LEAF) else tokens


class Frame(NamedTuple):
    """What the blocks of a tile share between all memories of a head.

    prev, end: [n, G, c, 1], the decays A_{t-1} (block start to before t) and A_c / A_t (after t
    to block end); total: [n, G, 1, 1], A_c; prev_lost, total_lost: 1 - prev and 1 - total;
    ratio: [n, G, c, c], A_{t-1} / A_s for s < t, else 0; step: [n, G, c, c], eta_t * ratio;
    eta: [n, G, c, 1]; k: [n, G, c, d], the keys.
    """

    prev: Tensor
    end: Tensor
    total: Tensor
    prev_lost: Tensor
    total_lost: Tensor
    ratio: Tensor
    step: Tensor
    eta: Tensor
    k: Tensor


def to_blocks(z: Tensor, c: int) -> Tensor:
    """[G, F, ...] -> contiguous [F / c, G, c, ...]."""
    return z.unflatten(1, (-1, c)).transpose(0, 1).contiguous()


def from_blocks(z: Tensor) -> Tensor:
    """[n, G, c, ...] -> [G, n * c, ...]."""
    return z.transpose(0, 1).flatten(1, 2)


def split_frame(frame: Frame, parts: int) -> list[Frame]:
    """Frames of that many equal runs of blocks."""
    if parts == 1:
        return [frame]
    length = frame.k.shape[0] // parts
    return [Frame(*pieces) for pieces in zip(*(z.split(length) for z in frame), strict=True)]


def make_frame(k: Tensor, eta: Tensor, log_alpha: Tensor, c: int) -> Frame:
    """The frame of keys k [G, F, d], eta and log_alpha [G, F] in blocks of c tokens.

    Every ratio of decays is the exponential of a difference of cumulative logs, at most 1.
    """
    log_alpha = to_blocks(log_alpha, c)
    log_end = log_alpha.cumsum(-1)
    # Shifted, not log_end - log_alpha: exactly independent of the token's own decay.
    log_prev = torch.nn.functional.pad(log_end[..., :-1], (1, 0))
    above = torch.ones(c, c, dtype=torch.bool, device=k.device).triu_()
    ratio = (log_prev.unsqueeze(-1) - log_end.unsqueeze(-2)).masked_fill_(above, -math.inf).exp_()
    log_total = log_end[..., -1:, None]
    prev_lost = log_prev.expm1().neg_().unsqueeze(-1)
    prev = log_prev.exp_().unsqueeze(-1)
    end = (log_end[..., -1:] - log_end).exp_().unsqueeze(-1)
    eta_blocks = to_blocks(eta, c).unsqueeze(-1)
    return Frame(
        prev=prev,
        end=end,
        total=log_total.exp(),
        prev_lost=prev_lost,
        total_lost=log_total.expm1().neg_(),
        ratio=ratio,
        step=ratio * eta_blocks,
        eta=eta_blocks,
        k=to_blocks(k, c),
    )


def log_decay_gradient(p: Tensor, rows: Tensor, boundary: Tensor) -> Tensor:
    """Gradient of the log decays [n, G, c] of blocks, from three sums over the memories.

    With U the recurrence's solution and X the gradient of eta * (W e + G), every decay ratio
    A_{t-1} / A_s occurs in a product with a known value, and the sums telescope:
    p [n, G, c] is <X_t, U_t>; rows [n, G, c] what the decay before t multiplies elsewhere (reads,
    less the undecayed terms); boundary [n, G] is <dDelta_end, Delta_end> of each block.
    """
    later = rows.flip(-1).cumsum(-1).flip(-1) - rows
    return later - p + boundary.unsqueeze(-1)
