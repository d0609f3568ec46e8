"""What the projection memories make of their inputs: k, v, eta, alpha (and q), Eqs. 83-86.

All of it is read from the state at the projection chunk's start.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope.scan.closed_form import gelu, gelu_slope, unit, unit_backward
from hope.scan.products import Scratch, add_mm, mm
from hope.scan.writes import Memories, for_each_memory
from hope.scan.writes_backward import Sums

READERS = slice(4)
"""The memories that read x: k, v, eta, alpha."""


class Projected(NamedTuple):
    """Keys and values [2, G, F, d], steps and log decays [G, F], and what backward needs.

    z: [4, G, F, h], W2 x; inverse: [2, G, F, 1], one over the lengths of k and v before
    normalisation; rest: [2, G, F], 1 - sigmoid of the logits of eta and alpha; pulled:
    [2, G, 1, h], W1^T w of both.
    """

    x: Tensor
    kv: Tensor
    eta: Tensor
    log_alpha: Tensor
    z: Tensor
    inverse: Tensor
    rest: Tensor
    pulled: Tensor


def project(
    x: Tensor,
    frozen: Memories,
    readout: Tensor,
    bias: Tensor,
    eta_max: float,
    valid: int,
    scratch: Scratch,
    slot: object,
) -> Projected:
    """x [G, F, d] through M_k, M_v, M_eta and M_alpha, the first four of `frozen`.

    readout [2, N, d] and bias [2, N]: of eta and alpha. Tokens from `valid` on are padding, x = 0:
    their keys are zero, so they write nothing, and their alpha is made 1.
    """
    w1, w2 = frozen.some(READERS)
    group, tokens, width = x.shape
    all_x = for_each_memory(4, x, "x", scratch)
    z = mm(all_x, w2.mT, scratch((slot, "x z"), 4, group, tokens, w2.shape[2]))
    act = gelu(z, scratch)
    y = scratch("kv", 2, group, tokens, width)
    kv, inverse = unit(mm(act[:2], w1[:2].mT, y).add_(x))
    # Only <w, M(x)> = <w, x> + <W1^T w, act> is needed of M_eta and M_alpha.
    rows = group // readout.shape[1]
    readout = _each_row(readout, rows).unsqueeze(2)
    pulled = readout @ w1[2:]
    logit = (act[2:] @ pulled.mT).squeeze(-1)
    logit += (x @ readout.squeeze(2).permute(1, 2, 0)).permute(2, 0, 1)
    logit += _each_row(bias, rows).unsqueeze(-1)
    eta = torch.sigmoid(logit[0]) * eta_max
    log_alpha = F.logsigmoid(logit[1])
    rest = torch.sigmoid(-logit)
    if valid < tokens:
        log_alpha[:, valid:] = 0
        rest[:, :, valid:] = 0
    return Projected(x, kv, eta, log_alpha, z, inverse, rest, pulled)


def project_backward(
    projected: Projected,
    frozen: Memories,
    readout: Tensor,
    d_kv: Tensor,
    d_log_eta: Tensor,
    d_log_alpha: Tensor,
    sums: Sums,
    scratch: Scratch,
) -> Tensor:
    """Derivative of `project`, from those of kv [2, G, F, d], log eta and log alpha [G, F]: dx,
    and the rest added to `sums`."""
    x = projected.x
    w1, w2 = frozen.some(READERS)
    heads = readout.shape[1]
    rows = x.shape[0] // heads
    act, slope = gelu_slope(projected.z, scratch)
    dy = unit_backward(d_kv, projected.kv, projected.inverse)
    d_logit = torch.stack([d_log_eta, d_log_alpha]).mul_(projected.rest).unsqueeze(-1)
    dz = scratch("gate", *act.shape)
    mm(dy, w1[:2], dz[:2])
    torch.mul(d_logit, projected.pulled, out=dz[2:])
    dz.mul_(slope)

    d_w1, d_w2 = sums.frozen.some(READERS)
    add_mm(d_w1[:2], dy.mT, act[:2])
    d_pulled = d_logit.mT @ act[2:]
    wide = _each_row(readout, rows).unsqueeze(-1)
    d_w1[2:].addcmul_(wide, d_pulled)
    add_mm(d_w2, dz.mT, for_each_memory(4, x, "x", scratch))
    dx = mm(dz, w2, scratch("dx", 4, *x.shape)).sum(0).add_(dy[0]).add_(dy[1])
    dx += d_logit.squeeze(-1).permute(1, 2, 0) @ wide.squeeze(-1).transpose(0, 1)
    d_readout = (d_pulled @ w1[2:].mT + d_logit.mT @ x).squeeze(2)
    sums.readout.add_(d_readout.unflatten(1, (heads, rows)).sum(2))
    sums.bias.add_(d_logit.sum((2, 3)).unflatten(1, (heads, rows)).sum(2))
    return dx


def _each_row(z: Tensor, rows: int) -> Tensor:
    """Every head's [2, N, ...] for each of its rows, [2, N * rows, ...]. (repeat_interleave copies
    the number of rows to the device and waits.)"""
    return z.unsqueeze(2).expand(-1, -1, rows, *z.shape[2:]).flatten(1, 2)


class Queried(NamedTuple):
    """Adaptive queries [G, F, d], the inputs of M_q, and what backward needs; see `Projected`."""

    q: Tensor
    source: Tensor
    z: Tensor
    inverse: Tensor


def project_query(source: Tensor, frozen: Memories, scratch: Scratch, slot: object) -> Queried:
    """q = l2norm(M_q(source)): source [G, F, d], frozen: M_q alone."""
    shape = (1, *source.shape[:2], frozen.w2.shape[2])
    z = mm(source.unsqueeze(0), frozen.w2.mT, scratch((slot, "q z"), *shape))
    q, inverse = unit(torch.baddbmm(source, gelu(z, scratch)[0], frozen.w1[0].mT))
    return Queried(q, source, z, inverse)


def project_query_backward(
    queried: Queried, frozen: Memories, dq: Tensor, d_frozen: Memories, scratch: Scratch
) -> Tensor:
    """Derivative of `project_query` from dq [G, F, d]: dsource, and M_q's own added to
    d_frozen."""
    act, slope = gelu_slope(queried.z, scratch)
    dy = unit_backward(dq, queried.q, queried.inverse)
    dz = (dy @ frozen.w1[0]).mul_(slope[0])
    d_frozen.w1[0].baddbmm_(dy.mT, act[0])
    d_frozen.w2[0].baddbmm_(dz.mT, queried.source)
    return torch.baddbmm(dy, dz, frozen.w2[0])
