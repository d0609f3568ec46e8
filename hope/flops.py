"""Floating-point operations per token, declared by every block and checked against torch's count.

A multiply and an add are two operations. Matrix products alone are counted, as by
`torch.utils.flop_counter.FlopCounterMode`; element-wise work, norms, convolutions and the
triangular solves of at most 16 x 16 inside the scan are not. `executed` says which figure is
wanted:

    True    what runs, the figure that FlopCounterMode gives: the whole square of causal attention,
            and in `backward` everything of the forward pass that backward computes again
    False   what the mathematics needs, for fair comparisons and for model FLOPs utilisation: the
            causal half of attention, nothing twice

A scan that is left to choose its implementation counts as the native one does.

Importing this module registers the scan's operators, and torch's softmax attention on a CPU, with
FlopCounterMode, which otherwise counts them as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_flop,
)

from hope.scan import ScanConfig
from hope.scan.closed_form import _INVERSE_LEAF, block_length
from hope.scan.native.flops import call_products
from hope.scan.operators import KEEP_TOKENS
from hope.scan.writes import W1_DELTA, W2_DELTA

_READERS = 4
"""M_k, M_v, M_eta and M_alpha read x."""
_READ_OUT = 2
"""Of them, M_eta and M_alpha are read out to one number a token."""


class Flops(NamedTuple):
    """Floating-point operations of the forward and of the backward pass."""

    forward: float
    backward: float


def sum_flops(parts: Iterable[Flops]) -> Flops:
    """Both passes of all parts."""
    parts = list(parts)
    return Flops(sum(part.forward for part in parts), sum(part.backward for part in parts))


def product_flops(multiply_adds: float) -> Flops:
    """A matrix product, whose derivative is two of its size: by the input and by the weight."""
    return Flops(2 * multiply_adds, 4 * multiply_adds)


def linear_flops(linear: nn.Linear) -> Flops:
    """A linear map, per token."""
    return product_flops(linear.weight.numel())


def softmax_flops(num_heads: int, head_dim: int, seq_len: int, executed: bool) -> Flops:
    """Causal softmax attention between its projections, per token of seq_len.

    Executed: two products of seq_len x seq_len forward and five backward (scores again), as
    fused kernels are counted. Needed: two and four, of the (seq_len + 1) / 2 keys seen on average.
    """
    if executed:
        square = 2 * num_heads * head_dim * seq_len
        return Flops(2 * square, 5 * square)
    return product_flops(2 * num_heads * head_dim * (seq_len + 1) / 2)


def scan_flops(
    config: ScanConfig,
    num_heads: int,
    head_dim: int,
    hidden: int,
    memories: int,
    seq_len: int,
    executed: bool = True,
) -> Flops:
    """The self-modifying scan in closed form, per token of one row of seq_len tokens.

    memories: 5, or 6 with an adaptive query. A sequence whose last projection chunk is partial
    counts as the mixer runs it: the whole chunks, then the rest.
    """
    whole = seq_len - seq_len % config.projection_chunk
    shape = (head_dim, hidden, memories)
    total = sum_flops(
        _call_flops(config, *shape, tokens, executed)
        for tokens in (whole, seq_len - whole)
        if tokens > 0
    )
    return Flops(*(num_heads * flops / seq_len for flops in total))


def _call_flops(
    config: ScanConfig, head_dim: int, hidden: int, memories: int, tokens: int, executed: bool
) -> Flops:
    """One call of the scan: one head of one row, over `tokens` tokens."""
    if config.implementation in ("auto", "native"):
        once, back, again = call_products(config, head_dim, hidden, memories, tokens)
        return Flops(2 * once, 2 * (back + again * executed))
    size, segment = config.projection_chunk, config.segment_chunks
    keep = segment * size <= KEEP_TOKENS
    forward = backward = 0
    starts = range(0, tokens, size)
    for number, start in enumerate(starts):
        once, back = _chunk_products(config, head_dim, hidden, memories, min(size, tokens - start))
        forward += once
        backward += back
        if executed:
            # Backward runs a segment again to get every chunk's state, and then, where it does
            # not keep what it computed, every chunk but the segment's last one once more.
            last = number % segment == segment - 1 or number == len(starts) - 1
            backward += once if keep or last else 2 * once
    return Flops(2 * forward, 2 * backward)


@lru_cache(maxsize=256)
def _chunk_products(
    config: ScanConfig, head_dim: int, hidden: int, memories: int, tokens: int
) -> tuple[int, int]:
    shape = (head_dim, hidden, memories, tokens)
    tables = (forward_products(config, *shape), backward_products(config, *shape))
    forward, backward = (sum(table.values()) for table in tables)
    return forward, backward


def _sizes(config: ScanConfig, head_dim: int, hidden: int, tokens: int) -> tuple[int, int]:
    """Tokens of a projection chunk, padded to whole memory chunks, and of a block."""
    mem = min(config.memory_chunk, tokens)
    return -(-tokens // mem) * mem, block_length(mem, min(head_dim, hidden))


def _terms(config: ScanConfig) -> tuple[bool, bool, bool, bool]:
    """Is there an M_0 to decay to, a delta term of W1, one of W2, and is W2 written at all?"""
    rule = config.delta_rule
    writes2 = rule != "target"
    return config.decay_to == "initial", rule in W1_DELTA, rule in W2_DELTA, writes2


def _inverse(c: int) -> int:
    """Products of `unit_lower_inverse` for one system of c tokens."""
    if c <= _INVERSE_LEAF or c % 2:
        return 0
    return 2 * (c // 2) ** 3 + 2 * _inverse(c // 2)


def forward_products(
    config: ScanConfig, head_dim: int, hidden: int, memories: int, tokens: int
) -> dict[str, int]:
    """Multiply-adds of one projection chunk of one head and row, by name (hope-spec, section 2).

    d = head_dim, h = hidden, m memories, F tokens in blocks of c.
    """
    d, h, m = head_dim, hidden, memories
    F, c = _sizes(config, d, h, tokens)
    from_initial, delta1, delta2, writes2 = _terms(config)
    products = {
        "read x: W2 x of k, v, eta, alpha": _READERS * F * d * h,
        "read x: W1 act of k, v": 2 * F * d * h,
        "read x: w W1, then (w W1) act and w x": _READ_OUT * (d * h + F * h + F * d),
        "read q: W2 q, W1 act of M_q": (memories - 1 - _READERS) * 2 * F * d * h,
    }
    products |= {
        "write: W2 [k; v]": m * 2 * F * d * h,
        "write: W1 (act k - act v) or W1 act v": m * F * d * h,
        "write: r W1": writes2 * m * F * d * h,
        "write: k k^T, u u^T": delta2 * F * c * d + delta1 * m * F * c * h,
        "write: inverses": (delta2 + delta1 * m) * (F // c) * _inverse(c),
        "write: M_0 keys": from_initial * m * (delta1 + delta2) * F * d * h,
        "write: Delta keys": m * (delta1 + delta2) * F * d * h,
        "write: U1, U2 from the inverses": m * F * c * (d + writes2 * h),
        "write: U e^T into the states": m * (1 + writes2) * F * d * h,
    }
    if config.read == "causal":
        products |= {
            "read: Delta2 q, Delta1 act": 2 * F * d * h,
            "read: M_0": from_initial * 2 * F * d * h,
            "read: q k^T and act u^T": F * c * (writes2 * d + h),
            "read: (q k^T) U2 and (act u^T) U1": F * c * (d + writes2 * h),
        }
    else:
        products["read: W2 q, W1 act"] = 2 * F * d * h
    return products


def backward_products(
    config: ScanConfig, head_dim: int, hidden: int, memories: int, tokens: int
) -> dict[str, int]:
    """Multiply-adds of the derivative of a projection chunk, as `forward_products`."""
    d, h, m = head_dim, hidden, memories
    F, c = _sizes(config, d, h, tokens)
    from_initial, delta1, delta2, writes2 = _terms(config)
    products = {
        "read x: W2, x, of k, v, eta, alpha": 2 * _READERS * F * d * h,
        "read x: W1, act, of k, v": 2 * 2 * F * d * h,
        "read x: w W1, w, x": _READ_OUT * (d * h + F * h + 2 * F * d),
        "read q: M_q, q": (memories - 1 - _READERS) * 4 * F * d * h,
    }
    products |= {
        "write: U from the states": m * (1 + writes2) * F * d * h,
        "write: through the inverses": m * F * c * (d + writes2 * h),
        "write: T of W1 and of W2": m * F * c * (d + writes2 * h),
        "write: e from U's and states": m * (1 + writes2) * F * d * h,
        "write: e from T": delta1 * m * F * c * h + delta2 * F * c * d,
        "write: e from Delta e": m * (delta1 + delta2) * F * d * h,
        "write: Delta from Delta e": m * (delta1 + delta2) * F * d * h,
        "write: M_0 and e from M_0 e": from_initial * m * 2 * (delta1 + delta2) * F * d * h,
        "write: r, W1 from r W1": writes2 * m * 2 * F * d * h,
        "write: act, W1 from W1 act": m * 2 * F * d * h,
        "write: W2, [k; v] from W2 [k; v]": m * 4 * F * d * h,
    }
    if config.read == "causal":
        products |= {
            "read: Delta, q and act": 4 * F * d * h,
            "read: M_0, q and act": from_initial * 4 * F * d * h,
            "read: through q k^T and act u^T": 2 * F * c * (writes2 * d + h),
            "read: U, q k^T, act u^T": 2 * F * c * (d + writes2 * h),
        }
    else:
        products["read: W1, W2, act, q"] = 4 * F * d * h
    return products


def _bound(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of an operator by the names in its schema."""
    names = [argument.name for argument in operator.default._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _scan_call(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], executed: bool = True
) -> Flops:
    """All heads and rows of a call of one of the scan's operators."""
    bound = _bound(operator, args, kwargs)
    options = {f.name: bound[f.name] for f in fields(ScanConfig) if f.name in bound}
    options["implementation"] = "native" if "native" in operator.__name__ else "chunked"
    rows, heads, tokens, width = bound["x"].shape
    memories, _, _, hidden = bound["w1"].shape
    call = _call_flops(ScanConfig(**options), width, hidden, memories, tokens, executed)
    return Flops(*(rows * heads * flops for flops in call))


def _triton_call(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flops:
    """The same for the kernels' operators: backward runs forward again to have every block's state,
    and inside each block once more; those in CUDA C++ there only what makes k's and v's
    activations, r and what the projections give. Their triangular inverses are not counted."""
    once = _scan_call(operator, args, kwargs, executed=False)
    bound = _bound(operator, args, kwargs)
    inside = once.forward
    if bound["on_chip"]:
        rows, heads, tokens, width = bound["x"].shape
        memories, _, _, hidden = bound["w1"].shape
        products = 3 * memories + 2 * (memories - 1) + (bound["read"] == "chunk_start")
        inside = 2 * products * rows * heads * tokens * width * hidden
    return Flops(once.forward, once.backward + once.forward + inside)


def _formula(operator: Any, call: Callable[..., Flops], backward: bool) -> Callable[..., float]:
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> float:
        flops = call(operator, args, kwargs)
        return flops.backward if backward else flops.forward

    return formula


def _register() -> None:
    hope, aten = torch.ops.hope, torch.ops.aten
    for operator, formula in (
        (hope.scan_chunked, _formula(hope.scan_chunked, _scan_call, False)),
        (
            hope.scan_chunked_backward,
            _formula(hope.scan_chunked_backward, _scan_call, True),
        ),
        (hope.scan_native, _formula(hope.scan_native, _scan_call, False)),
        (hope.scan_native_backward, _formula(hope.scan_native_backward, _scan_call, True)),
        (hope.scan_triton, _formula(hope.scan_triton, _triton_call, False)),
        (hope.scan_triton_backward, _formula(hope.scan_triton_backward, _triton_call, True)),
        (aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
    ):
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(formula)  # they look up shapes


_register()
