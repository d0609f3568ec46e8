"""Calls of the C++ scan on torch's tensors."""

from __future__ import annotations

import ctypes
from typing import get_args

import torch
from torch import Tensor

from hope.native.build import load
from hope.scan.contract import DeltaRule, ScanConfig, compute_dtype

_ALIGNMENT = 64
_AXES = ("row", "head", "token")
_RULES = get_args(DeltaRule)


class _Call(ctypes.Structure):
    """`Call` of memory.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "rows", "heads", "tokens", "width", "hidden", "memories",
            "memory_chunk", "projection_chunk", "segment_chunks",
            "rule", "initial", "causal", "threads",
        )),
        ("eta_max", ctypes.c_double),
        *((f"{name}_{axis}", ctypes.c_int64) for name in "xqd" for axis in _AXES),
        *((name, ctypes.c_void_p) for name in (
            "x", "q", "w1", "w2", "w_eta", "b_eta", "w_alpha", "b_alpha",
            "state1", "state2", "reset", "out", "final1", "final2", "saved1", "saved2",
            "d_out", "d_final1", "d_final2", "dx", "dq", "d_w1", "d_w2", "d_readout", "d_bias",
            "d_state1", "d_state2", "scratch",
        )),
        ("scratch_bytes", ctypes.c_int64),
    ]  # fmt: skip


class NativeCall:
    """The inputs of a call in the compute dtype, and what the library is told of them.

    x, q: [B, N, T, d]; weights: the six of `ScanWeights`; state: w1, w2 or nothing; reset: bool
    [B, T] or nothing.
    """

    def __init__(
        self,
        config: ScanConfig,
        x: Tensor,
        q: Tensor,
        weights: list[Tensor],
        state: tuple[Tensor, Tensor] | None,
        reset: Tensor | None,
    ) -> None:
        self.dtype = compute_dtype(x)
        self.rows, self.heads, self.tokens, self.width = x.shape
        self.memories, _, _, self.hidden = weights[0].shape
        self.like = x
        self._held: list[Tensor] = []
        self._call = call = _Call(
            rows=self.rows,
            heads=self.heads,
            tokens=self.tokens,
            width=self.width,
            hidden=self.hidden,
            memories=self.memories,
            memory_chunk=config.memory_chunk,
            projection_chunk=config.projection_chunk,
            segment_chunks=config.segment_chunks,
            rule=_RULES.index(config.delta_rule),
            initial=config.decay_to == "initial",
            causal=config.read == "causal",
            threads=min(torch.get_num_threads(), self.rows * self.heads),
            eta_max=config.eta_max,
        )
        self.give_tokens("x", "x", x)
        self.give_tokens("q", "q", q)
        names = ("w1", "w2", "w_eta", "b_eta", "w_alpha", "b_alpha")
        for name, tensor in zip(names, weights, strict=True):
            self.give(name, tensor)
        if state is not None:
            self.give("state1", state[0])
            self.give("state2", state[1])
        if reset is not None:
            starts = reset[:, :: config.projection_chunk].to(torch.uint8).contiguous()
            self._held.append(starts)
            call.reset = starts.data_ptr()

    def give(self, name: str, tensor: Tensor) -> None:
        """Hand over an input, in the compute dtype and contiguous."""
        tensor = tensor.to(self.dtype).contiguous()
        self._held.append(tensor)
        setattr(self._call, name, tensor.data_ptr())

    def give_tokens(self, name: str, strides: str, tensor: Tensor) -> None:
        """Hand over tokens [B, N, T, d] whose features lie together, rows, heads and tokens where
        they are."""
        tensor = tensor.to(self.dtype)
        if tensor.stride(3) != 1:
            tensor = tensor.contiguous()
        self._held.append(tensor)
        setattr(self._call, name, tensor.data_ptr())
        for axis, stride in zip(_AXES, tensor.stride(), strict=False):
            setattr(self._call, f"{strides}_{axis}", stride)

    def take(self, name: str, *shape: int) -> Tensor:
        """A result to be filled, of the compute dtype."""
        result = self.like.new_empty(shape, dtype=self.dtype)
        self.fill(name, result)
        return result

    def fill(self, name: str, result: Tensor) -> None:
        """Where a result is to be written: contiguous, of the compute dtype."""
        self._held.append(result)
        setattr(self._call, name, result.data_ptr() or self._call.w1)  # an empty one has no place

    def run(self, backward: bool) -> None:
        """Call the library; on the meta device, only make the memory that it would use."""
        library = load()
        assert isinstance(library, ctypes.CDLL)
        kind = "double" if self.dtype == torch.float64 else "float"
        argument = ctypes.byref(self._call)
        scratch_bytes = library[f"hope_scratch_{kind}"]
        scratch_bytes.restype = ctypes.c_int64
        size = scratch_bytes(argument, ctypes.c_int64(backward))
        scratch = self.like.new_empty(self._call.threads * size + _ALIGNMENT, dtype=torch.uint8)
        if scratch.is_meta:
            return
        start = scratch.data_ptr()
        self._call.scratch = start + -start % _ALIGNMENT
        self._call.scratch_bytes = size
        library[f"hope_{'backward' if backward else 'forward'}_{kind}"](argument)
