"""flash-attn's kernels, where they are installed (arXiv 2205.14135, 2307.08691, 2407.08608).

Looked up when an attention layer is built, never when this package is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Version(NamedTuple):
    """A flash-attn. All have the two functions called below, in modules of different names.

    widths: of heads, and in words; capability: the oldest GPU, by its major compute capability.
    """

    module: str
    widths: Container[int]
    heads: str
    capability: int


_VERSIONS = (
    Version("flash_attn_interface", range(8, 257, 8), "heads of multiples of 8 up to 256", 8),  # 3
    Version("flash_attn", range(257), "heads of at most 256", 8),  # 2
    Version("flash_attn.cute", (64, 96, 128), "heads of 64, 96 or 128", 9),  # 4
)
_DTYPES = (torch.float16, torch.bfloat16)


class FlashAttention(NamedTuple):
    """flash-attn's functions for rows of one document each, and for documents of any lengths.

    version: whose they are; required: whether tensors that they can't take are an error.
    """

    dense: Callable[..., Any]
    varlen: Callable[..., Any]
    version: Version
    required: bool

    def takes(self, q: Tensor) -> bool:
        """Whether queries q [B, N, T, d] can go through; ValueError if they can't but must."""
        _, widths, heads, _ = self.version
        fits = q.is_cuda and q.dtype in _DTYPES and q.shape[-1] in widths
        if self.required and not fits:
            raise ValueError(
                f"attention.backend=flash needs float16 or bfloat16 on a CUDA device and {heads}, "
                f"got {q.dtype} on {q.device.type} and {q.shape[-1]}; set attention.backend=auto"
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
        documents = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
        most = {"max_seqlen_q": length, "max_seqlen_k": length}
        out = _out(self.varlen(*flat, **documents, **most, causal=True))
        return out.unflatten(0, (batch, length)).transpose(1, 2)


def load_flash(backend: str) -> FlashAttention | None:
    """The installed flash-attn, or None: with backend "sdpa", or with "auto" where there is none.

    Raises ValueError with backend "flash" where it can't be imported.
    """
    if backend == "sdpa":
        return None
    reasons = []
    for version in _VERSIONS:
        try:
            module = importlib.import_module(version.module)
            functions = (module.flash_attn_func, module.flash_attn_varlen_func)
        except (ImportError, AttributeError) as error:  # where 4 is, `flash_attn` is an empty name
            reasons.append(" ".join(str(error).split()))
            continue
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < version.capability:
            reasons.append(f"{version.module} needs compute capability {version.capability}.0")
            continue
        return FlashAttention(*functions, version, required=backend == "flash")
    if backend == "flash":
        raise ValueError(
            f"attention.backend=flash, but flash-attn can't be used ({'; '.join(reasons)}): "
            "install requirements-gpu.txt on a CUDA machine, or set attention.backend=auto"
        )
    return None


def _out(result: Any) -> Tensor:
    """The output alone: 4 and some of 3 return (output, log-sum-exp)."""
    return result[0] if isinstance(result, tuple) else result
