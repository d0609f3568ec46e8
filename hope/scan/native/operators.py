"""The C++ scan as two operators, with the arguments and results of `hope.scan.chunked`'s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope.native.build import why_not
from hope.scan.contract import MemoryState, ScanConfig, ScanWeights
from hope.scan.native.call import NativeCall
from hope.scan.operators import config_of, differentiate, empty_outputs, scan_by, state_of

_WEIGHTS = slice(2, 8)


def why_not_native(x: Tensor) -> str:
    """Why the C++ scan can't take activations x, as a clause; empty if it can."""
    return why_not() if x.is_cpu else f"x is on {x.device}, not on a CPU"


def _schema_of(operator: Any) -> str:
    return "(" + str(operator.default._schema).partition("(")[2]


def forward(*inputs: Any) -> tuple[Tensor, ...]:
    x, q, *weights = inputs[: _WEIGHTS.stop]
    state1, state2, reset, *options, save = inputs[_WEIGHTS.stop :]
    config = config_of(*options)
    call = NativeCall(config, x, q, weights, state_of(state1, state2), reset)
    out, final1, final2, saved1, saved2 = empty_outputs(x, weights[0], config, save)
    whole = out if out.dtype == call.dtype else torch.empty_like(out, dtype=call.dtype)
    results = {"out": whole, "final1": final1, "final2": final2}
    if save:
        results |= {"saved1": saved1, "saved2": saved2}
    for name, result in results.items():
        call.fill(name, result)
    call.run(backward=False)
    if whole is not out:
        out.copy_(whole)
    return out, final1, final2, saved1, saved2


def backward(*inputs: Any) -> list[Tensor]:
    d_out, d_final1, d_final2, saved1, saved2, x, q, *weights = inputs[: 5 + _WEIGHTS.stop]
    state1, state2, reset, *options = inputs[5 + _WEIGHTS.stop :]
    state = state_of(state1, state2)
    call = NativeCall(config_of(*options), x, q, weights, state, reset)
    call.give("saved1", saved1)
    call.give("saved2", saved2)
    if d_out is not None:
        call.give_tokens("d_out", "d", d_out)
    for name, z in (("d_final1", d_final1), ("d_final2", d_final2)):
        if z is not None:
            call.give(name, z)
    shape = (call.rows, call.heads, call.tokens, call.width)
    dx, dq = call.take("dx", *shape), call.take("dq", *shape)
    # Each row's share of the weights' gradients, added up in the order of the rows.
    shared = (call.rows, call.memories, call.heads)
    parts = [
        call.take("d_w1", *shared, call.width, call.hidden),
        call.take("d_w2", *shared, call.hidden, call.width),
        call.take("d_readout", call.rows, 2, call.heads, call.width),
        call.take("d_bias", call.rows, 2, call.heads),
    ]
    like = state or ()
    states = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in like]
    for name, z in zip(("d_state1", "d_state2"), states, strict=False):
        call.fill(name, z)
    call.run(backward=True)
    d_w1, d_w2, readout, bias = (z[0] if call.rows == 1 else z.sum(0) for z in parts)
    # Copies: an operator's results may not share memory.
    of_gates = [z[i].clone() for i in range(2) for z in (readout, bias)]
    made = [
        z.to(like.dtype)
        for z, like in zip((dx, dq, d_w1, d_w2, *of_gates), (x, q, *weights), strict=True)
    ]
    return made + states


_scan_native = torch.library.custom_op(
    "hope::scan_native", forward, mutates_args=(), schema=_schema_of(torch.ops.hope.scan_chunked)
)
_scan_native_backward = torch.library.custom_op(
    "hope::scan_native_backward",
    backward,
    mutates_args=(),
    schema=_schema_of(torch.ops.hope.scan_chunked_backward),
)


@_scan_native.register_fake
def _(x, q, w1, w2, w_eta, b_eta, w_alpha, b_alpha, state1, state2, reset, *options):  # type: ignore[no-untyped-def]
    return empty_outputs(x, w1, config_of(*options[:-1]), options[-1])


differentiate(_scan_native, _scan_native_backward, kept=2, name="native")


def scan_native(
    x: Tensor,
    q: Tensor,
    weights: ScanWeights,
    config: ScanConfig,
    state: MemoryState | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """The scan in closed form in C++, on a CPU.

    Shapes as in `hope.scan.scan`; inputs are expected to have passed
    `hope.scan.contract.check_inputs` and `why_not_native`. Differentiable once, in every tensor but
    reset.
    """
    return scan_by(_scan_native, x, q, weights, config, state, reset)
