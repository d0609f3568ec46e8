"""Cross-entropy over a vocabulary without a float32 copy of the logits.

Forward reads the logits once and keeps two numbers a row; backward reads them once more and writes
their gradient, in the logits' own dtype. Everything between is float32. The two numbers of a part
of the columns are what a rank of a vocabulary-parallel head adds to those of the others
(`train.parallel.tensor`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope.forward_mode import needs_torch
from hope.triton import TorchOrTriton, takes_kernels

BLOCK = 4096
"""Columns that a program holds at a time, by 8 warps."""
WARPS = 8


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, implementation: TorchOrTriton = "auto"
) -> Tensor:
    """Sum over the rows of -log softmax(logits)[label], a float32 scalar (float64 for float64).

    logits: [n, V]; labels: int64 [n]; a row whose label is ignore_index counts as 0, a label that
    is no column gives NaN on a CUDA device and IndexError elsewhere. Kernels on CUDA devices
    ("auto"), torch's own elsewhere. Raises ValueError with "triton" where kernels can't run.
    """
    if needs_torch(implementation, logits) or not takes_kernels(logits, implementation):
        return torch.nn.functional.cross_entropy(
            _precise(logits), labels, ignore_index=ignore_index, reduction="sum"
        )
    lse, picked = _rows(logits, labels)
    outside = (labels < 0) | (labels >= logits.shape[1])
    losses = (lse - picked).masked_fill(outside, float("nan"))
    return losses.masked_fill(labels == ignore_index, 0).sum()


def row_statistics(
    logits: Tensor, labels: Tensor, implementation: TorchOrTriton = "auto"
) -> tuple[Tensor, Tensor]:
    """log(sum(exp(logits))) and the label's logit of each row, [n], float32 or float64.

    logits: [n, V]; labels: int64 [n]; the second is 0 where a label is no column. No gradient:
    see `logits_gradient`.
    """
    logits = logits.detach()
    if takes_kernels(logits, implementation):
        return _rows(logits, labels)
    precise = _precise(logits)
    own, inside = _columns(labels, logits.shape[1])
    picked = precise.gather(1, own.unsqueeze(1)).squeeze(1)
    return precise.logsumexp(1), picked.masked_fill(~inside, 0)


def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    d_lse: Tensor,
    d_picked: Tensor,
    implementation: TorchOrTriton = "auto",
) -> Tensor:
    """From the gradients [n] of what `row_statistics` gives to that of logits [n, V]:
    exp(logits - lse) * d_lse + onehot(labels) * d_picked. lse may be over more columns than
    these."""
    if takes_kernels(logits, implementation):
        return _rows_backward(logits, labels, lse, d_lse, d_picked)
    grad = (_precise(logits) - lse.unsqueeze(1)).exp_().mul_(d_lse.unsqueeze(1))
    own, inside = _columns(labels, logits.shape[1])
    grad.scatter_add_(1, own.unsqueeze(1), d_picked.masked_fill(~inside, 0).unsqueeze(1))
    return grad.to(logits.dtype)


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _columns(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Labels as columns, any column where they are none; whether they are one."""
    return labels.clamp(0, count - 1), (labels >= 0) & (labels < count)


def _new_rows(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.library.custom_op("hope::cross_entropy", mutates_args=())
def _rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    from hope.fused.kernels import cross_entropy_forward

    logits, labels = logits.contiguous(), labels.contiguous()
    lse, picked = _new_rows(logits), _new_rows(logits)
    rows, columns = logits.shape
    with torch.cuda.device_of(logits):
        cross_entropy_forward[(rows,)](
            logits, labels, lse, picked, columns, BLOCK=BLOCK, num_warps=WARPS
        )
    return lse, picked


@_rows.register_fake
def _(logits, labels):  # type: ignore[no-untyped-def]
    return _new_rows(logits), _new_rows(logits)


@torch.library.custom_op("hope::cross_entropy_backward", mutates_args=())
def _rows_backward(
    logits: Tensor, labels: Tensor, lse: Tensor, d_lse: Tensor, d_picked: Tensor
) -> Tensor:
    from hope.fused.kernels import cross_entropy_backward

    logits = logits.contiguous()
    rows, columns = logits.shape
    d_logits = torch.empty_like(logits)
    with torch.cuda.device_of(logits):
        cross_entropy_backward[(rows, -(-columns // BLOCK))](
            logits, labels.contiguous(), lse, d_lse.contiguous(), d_picked.contiguous(),
            d_logits, columns, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return d_logits


@_rows_backward.register_fake
def _(logits, *rows):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _backward(ctx: Any, d_lse: Tensor, d_picked: Tensor) -> tuple[Tensor, None]:
    return _rows_backward(*ctx.saved_tensors, d_lse, d_picked), None


_rows.register_autograd(_backward, setup_context=_setup_context)
