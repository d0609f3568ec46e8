"""The scan as a literal loop over tokens: the oracle that the fast implementations are held to.

Written from the recurrences (Eqs. 83-91) and not from their closed form, differentiable by
autograd, in float32 or float64. It keeps every fast weight of every token for backward: use it
for small sizes only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hope.scan.contract import (
    ALPHA,
    ETA,
    MEM,
    MemoryState,
    Q,
    ScanConfig,
    ScanWeights,
    compute_dtype,
    initial_state,
)
from hope.scan.contract import K as KEY
from hope.scan.contract import V as VALUE

NORM_EPS = 1e-6
"""Vectors shorter than this are divided by it instead of by their length."""


def l2norm(z: Tensor) -> Tensor:
    """z / |z| along the last dimension, with |z| at least NORM_EPS; same shape as z."""
    return z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(NORM_EPS)


def hidden(w2: Tensor, z: Tensor) -> Tensor:
    """W2 z: w2 [..., h, d], z [..., d] -> [..., h]."""
    return (w2 @ z.unsqueeze(-1)).squeeze(-1)


def memory(w1: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    """M(z) = z + W1 act(W2 z), act = tanh-GELU (Eqs. 89, 91); [..., d] -> [..., d]."""
    a = F.gelu(hidden(w2, z), approximate="tanh")
    return z + (w1 @ a.unsqueeze(-1)).squeeze(-1)


def gelu_slope(z: Tensor) -> Tensor:
    """Derivative of the tanh-GELU; any shape."""
    inner = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    inner_slope = (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * z**2)
    t = torch.tanh(inner)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * inner_slope


def write(
    config: ScanConfig,
    now: MemoryState,
    frozen: MemoryState,
    initial: MemoryState,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
) -> MemoryState:
    """One token's step of every memory (Eqs. 88, 90): states [M, B, N, ...] -> the next ones.

    The gradient comes from the frozen (chunk-start) state, the delta and the decay act on the
    current one. k, v: [B, N, d]; eta, alpha: [B, N].

    `delta_rule: target` is the delta rule proper on W1, with W2's features held: at eta = 1 one
    write makes M(k) the unit target. The delta term forgets W1 u, so the frozen term is the target
    alone; "normalised" subtracts the frozen W1 u once more.
    """
    z = hidden(frozen.w2, k)
    a = F.gelu(z, approximate="tanh")
    target = memory(frozen.w1, frozen.w2, v)
    r = memory(frozen.w1, frozen.w2, k) - target
    g = hidden(frozen.w1.transpose(-1, -2), r) * gelu_slope(z)

    eta, alpha = eta[..., None, None], alpha[..., None, None]
    k_row = k.unsqueeze(-2)
    w1 = alpha * now.w1
    w2 = alpha * now.w2
    if config.delta_rule != "target":
        w2 = w2 - eta * g.unsqueeze(-1) * k_row
    if config.delta_rule in ("normalised", "input"):
        w2 = w2 - eta * hidden(now.w2, k).unsqueeze(-1) * k_row
    if config.delta_rule in ("normalised", "target"):
        if config.delta_rule == "target":
            r = k - l2norm(target)
        rho = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        u = a / rho.clamp_min(NORM_EPS)
        step = hidden(now.w1, u) + rho / (rho**2 + 0.01) * r
        w1 = w1 - eta * step.unsqueeze(-1) * u.unsqueeze(-2)
    else:
        w1 = w1 - eta * r.unsqueeze(-1) * a.unsqueeze(-2)
    if config.decay_to == "initial":
        w1 = w1 + (1 - alpha) * initial.w1
        w2 = w2 + (1 - alpha) * initial.w2
    return MemoryState(w1, w2)


def scan_reference(
    x: Tensor,
    q: Tensor,
    weights: ScanWeights,
    config: ScanConfig,
    state: MemoryState | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """The scan, token by token (Eqs. 83-91).

    x, q: [B, N, T, d]; reset: bool [B, T]. Returns out [B, N, T, d] in x's dtype and the state
    after T tokens. Inputs are expected to have passed `hope.scan.contract.check_inputs`.
    """
    dtype = compute_dtype(x)
    weights = ScanWeights(*(w.to(dtype) for w in weights))
    initial = initial_state(weights, x.shape[0], dtype)
    now = initial if state is None else state
    projection, mem = now, now
    outputs = []
    for t, (x_t, q_t) in enumerate(zip(x.to(dtype).unbind(2), q.to(dtype).unbind(2), strict=True)):
        if t % config.projection_chunk == 0:
            if reset is not None:
                again = reset[:, t].view(1, -1, 1, 1, 1)
                now = MemoryState(
                    torch.where(again, initial.w1, now.w1), torch.where(again, initial.w2, now.w2)
                )
            projection = now
        if t % config.memory_chunk == 0:
            mem = now

        y = memory(projection.w1, projection.w2, x_t)
        k, v = l2norm(y[KEY]), l2norm(y[VALUE])
        eta = config.eta_max * torch.sigmoid((weights.w_eta * y[ETA]).sum(-1) + weights.b_eta)
        alpha = torch.sigmoid((weights.w_alpha * y[ALPHA]).sum(-1) + weights.b_alpha)
        if weights.w1.shape[0] > Q:
            q_t = l2norm(memory(projection.w1[Q], projection.w2[Q], q_t))

        source = now if config.read == "causal" else mem
        outputs.append(memory(source.w1[MEM], source.w2[MEM], q_t))

        is_mem = torch.arange(weights.w1.shape[0], device=x.device).view(-1, 1, 1, 1, 1) == MEM
        frozen = MemoryState(
            torch.where(is_mem, mem.w1, projection.w1), torch.where(is_mem, mem.w2, projection.w2)
        )
        now = write(config, now, frozen, initial, k, v, eta, alpha)
    final = MemoryState(now.w1.contiguous(), now.w2.contiguous())
    return torch.stack(outputs, 2).to(x.dtype), final
