"""What the projection memories make of a chunk's inputs: k, v, eta, alpha (and q), Eqs. 83-86.

All of it is read from the state at the projection chunk's start.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope.scan.closed_form import gelu, gelu_slope, unit, unit_backward
from hope.scan.writes import shared_left_mm, shared_mm, sum_mm


class Projected(NamedTuple):
    """Keys and values [G, F, d], steps and log decays [G, F], and what backward needs.

    kv: [2, G, F, d]; act, slope: [4, G, F, h] (slope is empty when backward will not follow);
    inverse: [2, G, F, 1], one over the lengths of k and v before normalisation; rest: [2, G, F],
    1 - sigmoid of the logits of eta and alpha; pulled: [2, G, 1, h], W1^T w of both.
    """

    x: Tensor
    kv: Tensor
    eta: Tensor
    log_alpha: Tensor
    act: Tensor
    slope: Tensor
    inverse: Tensor
    rest: Tensor
    pulled: Tensor


class ProjectedGradient(NamedTuple):
    """Gradients of `project`: x [G, F, d], w1 [4, G, d, h], w2 [4, G, h, d], the readout vectors
    [2, N, d] and their biases [2, N]."""

    x: Tensor
    w1: Tensor
    w2: Tensor
    readout: Tensor
    bias: Tensor


def project(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    readout: Tensor,
    bias: Tensor,
    eta_max: float,
    valid: int,
    keep: bool,
) -> Projected:
    """x [G, F, d] through M_k, M_v, M_eta and M_alpha (w1 [4, G, d, h], w2 [4, G, h, d]).

    readout [2, N, d] and bias [2, N]: of eta and alpha. Tokens from `valid` on are padding, x = 0:
    their keys are zero, so they write nothing, and their alpha is made 1. keep: whether
    `project_backward` follows.
    """
    z = shared_mm(x, w2.mT)
    act, slope = gelu_slope(z) if keep else (gelu(z), z.new_empty(0))
    kv, inverse = unit((act[:2] @ w1[:2].mT).add_(x))
    # Only <w, M(x)> = <w, x> + <W1^T w, act> is needed of M_eta and M_alpha.
    rows = x.shape[0] // readout.shape[1]
    readout = readout.repeat_interleave(rows, 1).unsqueeze(2)
    pulled = readout @ w1[2:]
    logit = (act[2:] @ pulled.mT).squeeze(-1)
    logit += (x @ readout.squeeze(2).permute(1, 2, 0)).permute(2, 0, 1)
    logit += bias.repeat_interleave(rows, 1).unsqueeze(-1)
    eta = torch.sigmoid(logit[0]) * eta_max
    log_alpha = F.logsigmoid(logit[1])
    rest = torch.sigmoid(-logit)
    log_alpha[:, valid:] = 0
    rest[:, :, valid:] = 0
    return Projected(x, kv, eta, log_alpha, act, slope, inverse, rest, pulled)


def project_backward(
    projected: Projected,
    w1: Tensor,
    w2: Tensor,
    readout: Tensor,
    d_kv: Tensor,
    d_log_eta: Tensor,
    d_log_alpha: Tensor,
) -> ProjectedGradient:
    """Derivative of `project`, from those of kv [2, G, F, d], log eta and log alpha [G, F]."""
    x, act = projected.x, projected.act
    heads = readout.shape[1]
    rows = x.shape[0] // heads
    dy = unit_backward(d_kv, projected.kv, projected.inverse)
    d_logit = torch.stack([d_log_eta, d_log_alpha]).mul_(projected.rest).unsqueeze(-1)
    d_act = torch.empty_like(act)
    torch.matmul(dy, w1[:2], out=d_act[:2])
    torch.mul(d_logit, projected.pulled, out=d_act[2:])
    dz = d_act.mul_(projected.slope)

    d_pulled = d_logit.mT @ act[2:]
    wide = readout.repeat_interleave(rows, 1).unsqueeze(-1)
    dw1 = torch.cat([dy.mT @ act[:2], wide * d_pulled])
    dw2 = shared_left_mm(dz.mT, x)
    dx = sum_mm(dz, w2).add_(dy.sum(0))
    dx += d_logit.squeeze(-1).permute(1, 2, 0) @ wide.squeeze(-1).transpose(0, 1)
    d_readout = (d_pulled @ w1[2:].mT + d_logit.mT @ x).squeeze(2)
    return ProjectedGradient(
        dx,
        dw1,
        dw2,
        d_readout.unflatten(1, (heads, rows)).sum(2),
        d_logit.sum((2, 3)).unflatten(1, (heads, rows)).sum(2),
    )


class Queried(NamedTuple):
    """Adaptive queries [G, F, d], the inputs of M_q, and what backward needs; see `Projected`."""

    q: Tensor
    source: Tensor
    act: Tensor
    slope: Tensor
    inverse: Tensor


def project_query(source: Tensor, w1: Tensor, w2: Tensor) -> Queried:
    """q = l2norm(M_q(source)): source [G, F, d], w1 [G, d, h], w2 [G, h, d]."""
    act, slope = gelu_slope(source @ w2.mT)
    q, inverse = unit(torch.baddbmm(source, act, w1.mT))
    return Queried(q, source, act, slope, inverse)


def project_query_backward(
    queried: Queried, w1: Tensor, w2: Tensor, dq: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative of `project_query` from dq [G, F, d]: (dsource, dw1, dw2)."""
    dy = unit_backward(dq, queried.q, queried.inverse)
    dz = (dy @ w1).mul_(queried.slope)
    return (
        torch.baddbmm(dy, dz, w2),
        dy.mT @ queried.act,
        dz.mT @ queried.source,
    )
