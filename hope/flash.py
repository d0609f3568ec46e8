"""flash-attn's kernels, where they are installed (arXiv 2205.14135, 2307.08691, 2407.08608).

Looked up when an attention layer is built, never when this package is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MODULES = ("flash_attn_interface", "flash_attn")
"""flash-attn 3 (Hopper) before flash-attn 2; both have the two functions called below."""
_DTYPES = (torch.float16, torch.bfloat16)
_WIDEST_HEAD = 256


class FlashAttention(NamedTuple):
    """flash-attn's functions for rows of one document each, and for documents of any lengths.

    required: whether tensors that they can't take are an error.
    """

    dense: Callable[..., Any]
    varlen: Callable[..., Any]
    required: bool

    def takes(self, q: Tensor) -> bool:
        """Whether queries q [B, N, T, d] can go through; ValueError if they can't but must."""
        fits = q.is_cuda and q.dtype in _DTYPES and q.shape[-1] <= _WIDEST_HEAD
        if self.required and not fits:
            raise ValueError(
                "attention.backend=flash needs float16 or bfloat16 on a CUDA device and heads of "
                f"at most {_WIDEST_HEAD}, got {q.dtype} on {q.device.type} and {q.shape[-1]}; set "
                "attention.backend=auto"
            )
        return fits

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor | None) -> Tensor:
        """Causal attention of q, k, v [B, N, T, d] -> [B, N, T, d].

        document_starts: bool [B, T] or None. Where documents start is read on the host, so with
        them the device is waited for and a compiled graph breaks here.
        """
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if document_starts is None:
            return _out(self.dense(q, k, v, causal=True)).transpose(1, 2)
        batch, length, _, _ = q.shape
        starts = document_starts.clone()
        starts[:, 0] = True
        ends = torch.tensor([batch * length], device=q.device)
        bounds = torch.cat([starts.flatten().nonzero().flatten(), ends]).to(torch.int32)
        flat = (z.flatten(0, 1) for z in (q, k, v))
        out = _out(self.varlen(*flat, bounds, bounds, length, length, causal=True))
        return out.unflatten(0, (batch, length)).transpose(1, 2)


def load_flash(backend: str) -> FlashAttention | None:
    """The installed flash-attn, or None: with backend "sdpa", or with "auto" where there is none.

    Raises ValueError with backend "flash" where it can't be imported.
    """
    if backend == "sdpa":
        return None
    reasons = []
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            reasons.append(" ".join(str(error).split()))
            continue
        functions = (module.flash_attn_func, module.flash_attn_varlen_func)
        return FlashAttention(*functions, required=backend == "flash")
    if backend == "flash":
        raise ValueError(
            f"attention.backend=flash, but flash-attn can't be used ({'; '.join(reasons)}): "
            "install requirements-gpu.txt on a CUDA machine, or set attention.backend=auto"
        )
    return None


def _out(result: Any) -> Tensor:
    """The output alone: some versions of flash-attn 3 return (output, log-sum-exp)."""
    return result[0] if isinstance(result, tuple) else result
