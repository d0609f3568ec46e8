"""What every implementation of the scan takes and returns, and the checks that guard it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

DeltaRule = Literal["normalised", "input", "off", "target"]
DecayTarget = Literal["initial", "zero"]
Read = Literal["causal", "chunk_start"]
ScanImplementation = Literal["auto", "reference", "chunked", "native", "triton", "cuda"]

MEMORIES = ("k", "v", "eta", "alpha", "mem", "q")
"""Order of the memories along the first dimension of the fast weights; q only when adaptive."""
K, V, ETA, ALPHA, MEM, Q = range(6)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class MemoryState(NamedTuple):
    """The fast weights of every memory, row and head after some tokens.

    w1: [M, B, N, d, h]; w2: [M, B, N, h, d]; float32, or float64 for float64 activations.
    """

    w1: Tensor
    w2: Tensor


class ScanWeights(NamedTuple):
    """The trained parameters of the scan: the initial fast weights M_0 and two read-out vectors.

    w1: [M, N, d, h]; w2: [M, N, h, d]; w_eta, w_alpha: [N, d]; b_eta, b_alpha: [N].
    M is 5 (k, v, eta, alpha, mem), or 6 with an adaptive query (q last).
    """

    w1: Tensor
    w2: Tensor
    w_eta: Tensor
    b_eta: Tensor
    w_alpha: Tensor
    b_alpha: Tensor


@dataclass(frozen=True)
class ScanConfig:
    """How the memories are written and read (Eqs. 83-91; the choices are argued in the docs).

    memory_chunk: tokens written with one frozen gradient in M_mem (C).
    projection_chunk: the same for the other memories (P), a multiple of memory_chunk.
    eta_max: largest step size of a write; 0 switches writes off (a memory-off control).
    delta_rule: "normalised" (delta term on each layer's own unit input), "target" (only W1 is
        written, towards the unit target M(v) / |M(v)|, and W2 only decays: bounded up to eta 1),
        "input" (the letter of Eq. 88: W2 only) or "off" (plain gradient descent).
    decay_to: what the weight decay pulls towards: the "initial" weights, or "zero" (Eq. 88).
    read: "causal" reads the state after the previous token (Eq. 83), "chunk_start" the state at
        the start of the token's memory chunk (Eq. 90).
    checkpoint_chunks: one fast-weight state is kept for backward in this many projection chunks,
        the rest is recomputed; None keeps one in about 256 tokens.
    implementation: "reference" (a token loop, slow), "chunked" (the closed form in PyTorch),
        "native" (the closed form in C++, on a CPU), "triton" (the closed form in GPU kernels),
        "cuda" (the same in CUDA C++ with the states on chip, for memories of 64 x 64,
        64 x 128 and 128 x 128 in bfloat16), or "auto": native on a CPU where there is a compiler;
        on a CUDA device cuda for memories of 64 x 64, triton for what its kernels take; chunked
        for the rest.

    Raises ValueError when a value is not allowed.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    memory_chunk: int = 16
    projection_chunk: int = 64
    eta_max: float = 0.5
    delta_rule: DeltaRule = "normalised"
    decay_to: DecayTarget = "initial"
    read: Read = "causal"
    checkpoint_chunks: int | None = None
    implementation: ScanImplementation = "auto"

    def __post_init__(self) -> None:
        for name in ("memory_chunk", "projection_chunk", "checkpoint_chunks"):
            value = getattr(self, name)
            if value is None and name == "checkpoint_chunks":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"scan: {name} must be an integer of at least 1, got {value!r}")
        if self.projection_chunk % self.memory_chunk:
            raise ValueError(
                f"scan: projection_chunk ({self.projection_chunk}) must be a multiple of "
                f"memory_chunk ({self.memory_chunk})"
            )
        eta_max = self.eta_max
        if isinstance(eta_max, bool) or not isinstance(eta_max, (int, float)):
            raise ValueError(f"scan: eta_max must be a number, got {eta_max!r}")
        if not (math.isfinite(eta_max) and eta_max >= 0):
            raise ValueError(f"scan: eta_max must be finite and at least 0, got {eta_max!r}")
        for name, options in (
            ("delta_rule", get_args(DeltaRule)),
            ("decay_to", get_args(DecayTarget)),
            ("read", get_args(Read)),
            ("implementation", get_args(ScanImplementation)),
        ):
            value = getattr(self, name)
            if value not in options:
                raise ValueError(f"scan: {name} must be one of {', '.join(options)}; got {value!r}")

    @property
    def segment_chunks(self) -> int:
        """Projection chunks between two fast-weight states kept for backward."""
        if self.checkpoint_chunks is not None:
            return self.checkpoint_chunks
        return max(1, 256 // self.projection_chunk)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Within it nothing is cast; also for the meta device, which has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of fast weights, decay products and triangular solves for activations x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def initial_state(weights: ScanWeights, batch: int, dtype: torch.dtype) -> MemoryState:
    """M_0 for every row, as a view where it can be: w1 [M, B, N, d, h], w2 [M, B, N, h, d]."""
    w1, w2 = (w.to(dtype)[:, None].expand(-1, batch, -1, -1, -1) for w in (weights.w1, weights.w2))
    return MemoryState(w1, w2)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"scan: {name} must be {letters} = {list(expected)}, got {list(tensor.shape)}"
        )


def check_inputs(
    x: Tensor,
    q: Tensor,
    weights: ScanWeights,
    state: MemoryState | None,
    reset: Tensor | None,
) -> None:
    """Check shapes, dtypes and devices; raise ValueError with one line that says what is wrong."""
    if x.dim() != 4:
        raise ValueError(f"scan: x must be [B, N, T, d], got {list(x.shape)}")
    rows, heads, tokens, width = x.shape
    if min(x.shape) < 1:
        raise ValueError(f"scan: x [B, N, T, d] must have no empty dimension, got {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"scan: x must be float32, float64 or bfloat16, got {x.dtype}")
    _check_shape("q", q, (rows, heads, tokens, width), "[B, N, T, d] like x")
    if q.dtype != x.dtype:
        raise ValueError(f"scan: q must have x's dtype {x.dtype}, got {q.dtype}; cast one of them")

    if weights.w1.dim() != 4 or weights.w1.shape[0] not in (5, 6):
        raise ValueError(
            "scan: weights.w1 must be [M, N, d, h] with M = 5 (k, v, eta, alpha, mem) or 6 "
            f"(q last), got {list(weights.w1.shape)}"
        )
    memories, hidden = weights.w1.shape[0], weights.w1.shape[3]
    if hidden < 1:
        raise ValueError(f"scan: the memories have no hidden width: {list(weights.w1.shape)}")
    _check_shape("weights.w1", weights.w1, (memories, heads, width, hidden), "[M, N, d, h]")
    _check_shape("weights.w2", weights.w2, (memories, heads, hidden, width), "[M, N, h, d]")
    for name in ("w_eta", "w_alpha"):
        _check_shape(f"weights.{name}", getattr(weights, name), (heads, width), "[N, d]")
    for name in ("b_eta", "b_alpha"):
        _check_shape(f"weights.{name}", getattr(weights, name), (heads,), "[N]")
    dtype = compute_dtype(x)
    for name, tensor in weights._asdict().items():
        too_precise = tensor.dtype == torch.float64 and dtype != torch.float64
        if tensor.dtype not in _DTYPES or too_precise:
            raise ValueError(
                f"scan: weights.{name} is {tensor.dtype}, which {x.dtype} activations cannot use "
                "without losing precision; cast the weights or the activations"
            )

    tensors = {"q": q, **{f"weights.{name}": w for name, w in weights._asdict().items()}}
    if state is not None:
        _check_shape(
            "state.w1", state.w1, (memories, rows, heads, width, hidden), "[M, B, N, d, h]"
        )
        _check_shape(
            "state.w2", state.w2, (memories, rows, heads, hidden, width), "[M, B, N, h, d]"
        )
        for name, tensor in state._asdict().items():
            if tensor.dtype != dtype:
                raise ValueError(
                    f"scan: state.{name} must be {dtype} for {x.dtype} activations, "
                    f"got {tensor.dtype}"
                )
            tensors[f"state.{name}"] = tensor
    if reset is not None:
        _check_shape("reset", reset, (rows, tokens), "[B, T]")
        if reset.dtype != torch.bool:
            raise ValueError(f"scan: reset must be bool, got {reset.dtype}")
        tensors["reset"] = reset
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"scan: {name} is on {tensor.device} but x is on {x.device}")


def check_reset(reset: Tensor, projection_chunk: int) -> None:
    """Raise ValueError where reset [B, T] is true off a multiple of projection_chunk.

    On a CUDA device, which looking at the values would wait for, a device-side assertion instead.
    """
    if reset.shape[1] == 1 or projection_chunk == 1:
        return
    off_boundary = reset.clone()
    off_boundary[:, ::projection_chunk] = False
    if reset.is_cuda:
        torch._assert_async(
            ~off_boundary.any(),
            f"scan: reset is true off a multiple of projection_chunk ({projection_chunk})",
        )
        return
    if bool(off_boundary.any()):
        row, token = (int(i) for i in off_boundary.nonzero()[0])
        raise ValueError(
            f"scan: reset[{row}, {token}] is true, but a row can only start again at a multiple of "
            f"projection_chunk ({projection_chunk}); start documents on those tokens"
        )
