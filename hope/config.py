"""Configuration of the model: one frozen dataclass per component.

Every value that changes the mathematics of Hope stands here; how a run is trained (rates, batch
sizes, schedules) does not, except the period of each CMS level, which is part of what the model
is (arXiv 2512.24695, Eq. 71). `__pydantic_config__` lets a typed outer configuration embed these
classes and refuse unknown keys; this module itself needs nothing beyond torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

from hope.scan import ScanConfig

STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}

MixerName = Literal["titans", "attention"]
TitansStart = Literal["independent", "aligned"]
MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1
"""Larger numbers are slips; they are refused before anything of that size is made."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class TitansConfig:
    """Self-modifying Titans (Eqs. 83-91).

    memory_expansion: hidden width of each memory over the head's width.
    adaptive_query: a sixth memory makes the query, q = l2norm(M_q(z)), of what the convolution
        gives, z, as M_k makes the key; without it q = l2norm(z).
    writes: False freezes every memory at its learned start, the memory-off control: only
        M_mem,0 is read, and nothing is written or recurrent beyond the convolution.
    conv_width: taps of the causal depthwise convolutions before the memories.
    initial_eta: the write strength that training starts from, below scan.eta_max. Under
        1 / (2 projection_chunk) memories that start with a gain of up to 5 were measured to stay
        bounded (docs/stability.md).
    start: how queries and keys begin. "independent": unrelated random projections and
        convolutions. "aligned": W_q = W_in, the query's convolution passes the token itself and
        the memories' input takes the token and its predecessor, so that a token's query meets what
        was written just after its last occurrence from the first step on (docs/recall.md).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    memory_expansion: int = 1
    adaptive_query: bool = False
    writes: bool = True
    conv_width: int = 4
    initial_eta: float = 0.0075
    start: TitansStart = "independent"
    scan: ScanConfig = field(default_factory=ScanConfig)

    def __post_init__(self) -> None:
        _require(self.memory_expansion >= 1, "titans.memory_expansion must be at least 1")
        _require(self.conv_width >= 1, "titans.conv_width must be at least 1")
        _require(
            0 < self.initial_eta < self.scan.eta_max,
            f"titans.initial_eta={self.initial_eta} must lie between 0 and "
            f"titans.scan.eta_max={self.scan.eta_max}",
        )
        _require(
            self.start in get_args(TitansStart),
            f"titans.start must be one of {', '.join(get_args(TitansStart))}, got {self.start!r}",
        )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal softmax attention with rotary positions.

    conv_width: taps of a causal depthwise convolution on each of q, k and v (0: none), the same
        convolution as the Titans mixer has, so that a baseline can be given what it brings.
    backend: "flash" takes flash-attn's kernels (an error where it is not installed, or on tensors
        it can't take), "sdpa" torch's own; "auto" takes flash-attn where it is installed and the
        tensors are float16 or bfloat16 on a CUDA device. Decoding from a cache is torch's own.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    rope_theta: float = 10_000.0
    conv_width: int = 0
    backend: Literal["auto", "sdpa", "flash"] = "auto"

    def __post_init__(self) -> None:
        _require(self.rope_theta > 0, "attention.rope_theta must be positive")
        _require(self.conv_width >= 0, "attention.conv_width must be 0 (none) or more")
        _require(
            self.backend in ("auto", "sdpa", "flash"),
            f"attention.backend must be auto, sdpa or flash, got {self.backend!r}",
        )


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level of the Continuum Memory System.

    name: how configuration, logs and checkpoints call it; `fast` is taken by everything that is
        not a CMS level.
    hidden_size: inner width of its gated MLP.
    update_every_tokens: its period in tokens over all ranks, or "step" to fire every step.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    hidden_size: int
    update_every_tokens: int | Literal["step"] = "step"

    def __post_init__(self) -> None:
        _require(self.name.isidentifier(), f"CMS level name {self.name!r} must be an identifier")
        _require(self.name != "fast", "a CMS level can't be called 'fast': that is the rest")
        _require(
            1 <= self.hidden_size <= MAX_SIZE,
            f"CMS level {self.name!r}: hidden_size must lie between 1 and {MAX_SIZE:,}",
        )
        _require(
            self.update_every_tokens == "step" or self.update_every_tokens >= 1,
            f"CMS level {self.name!r}: update_every_tokens must be positive or 'step'",
        )


@dataclass(frozen=True, kw_only=True)
class CMSConfig:
    """Continuum Memory System (Eqs. 70-74): its levels, fastest first, and how they compose.

    mode: "sequential" chains the levels (70, 73), "independent" mixes them side by side (74),
        "nested" chains them and sets each level back to a learned start whenever the next slower
        one fires (72); then every period is a multiple of the next faster one, so that a level
        is never set back in the middle of a period of its own. One level is the same in all three.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    mode: Literal["sequential", "independent", "nested"] = "sequential"
    levels: tuple[LevelConfig, ...] = (LevelConfig(name="level_1", hidden_size=512),)

    def __post_init__(self) -> None:
        _require(len(self.levels) >= 1, "cms.levels needs at least one level")
        names = [level.name for level in self.levels]
        _require(len(set(names)) == len(names), f"cms.levels: names must differ, got {names}")
        periods = [
            0 if level.update_every_tokens == "step" else level.update_every_tokens
            for level in self.levels
        ]
        _require(
            periods == sorted(periods),
            f"cms.levels must be ordered fastest first, got periods {periods}",
        )
        if self.mode == "nested":
            _require(
                all(fast == 0 or slow % fast == 0 for fast, slow in pairwise(periods)),
                "cms.mode=nested needs periods that are multiples of the next faster one, "
                f"got {periods}",
            )


@dataclass(frozen=True, kw_only=True)
class HopeConfig:
    """A decoder-only language model of Hope layers.

    vocab_size: rows of the embedding; None until the tokenizer is known (the trainer fills it in).
    dim: width of the residual stream; num_heads heads of dim / num_heads each.
    mixer: the sequence mixer of every layer; pattern, when given, names the mixers of
        consecutive layers instead and repeats until num_layers are named.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    vocab_size: int | None = None
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    mixer: MixerName = "titans"
    pattern: tuple[MixerName, ...] | None = None
    titans: TitansConfig = field(default_factory=TitansConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    cms: CMSConfig = field(default_factory=CMSConfig)
    tie_embeddings: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.{name} must be positive, got {value}")
            most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
            _require(value is None or value <= most, f"model.{name}={value} is more than {most:,}")
        _require(
            self.dim % self.num_heads == 0,
            f"model.dim={self.dim} must be a multiple of model.num_heads={self.num_heads}",
        )
        _require(
            "attention" not in self.mixers or self.head_dim % 2 == 0,
            f"rotary attention needs an even head width, got {self.head_dim}",
        )
        _require(self.norm_eps > 0, f"model.norm_eps must be positive, got {self.norm_eps}")
        _require(self.pattern is None or len(self.pattern) >= 1, "model.pattern must not be empty")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads

    @property
    def mixers(self) -> tuple[MixerName, ...]:
        """The mixer of each layer, first to last."""
        pattern = self.pattern or (self.mixer,)
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))
