"""Matrix products counted as they run, those inside the scan's operators too.

FlopCounterMode takes a custom operator's word for it. Here the scan runs as plain Python, so that
every product is seen; in-place and out= forms are counted as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from hope.flops import Flops
from hope.scan import chunked
from hope.scan.operators import gradients_by, set_up_context


def _baddbmm_flop(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    return bmm_flop(left, right)


class _PlainScan(torch.autograd.Function):
    """The scan's two operators as the functions behind them."""

    forward = staticmethod(chunked.forward)
    setup_context = staticmethod(set_up_context)

    @staticmethod
    def backward(ctx: Any, *d_outputs: torch.Tensor | None) -> Any:
        return gradients_by(chunked.backward, ctx, d_outputs)


@contextmanager
def _plain_scan() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_scan_chunked", _PlainScan.apply)
        yield


def executed_flops(call: Callable[[], torch.Tensor], *, inside: bool = True) -> Flops:
    """Operations of `call` and of its output's backward, as executed.

    inside: look into the scan's operators; False takes the formulas registered for them.
    """
    mapping = {torch.ops.aten.baddbmm_: _baddbmm_flop} if inside else None

    def count() -> Flops:
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            out = call()
            forward = counter.get_total_flops()
            out.sum().backward()
        return Flops(forward, counter.get_total_flops() - forward)

    if not inside:
        return count()
    with _plain_scan():
        return count()
