"""Softmax attention: the mixer of Hope-Attention and of the Transformer++ baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hope.config import HopeConfig
from hope.convolution import CausalConvolution
from hope.flash import load_flash
from hope.flops import Flops, linear_flops, softmax_flops, sum_flops
from hope.init import Linear
from hope.sharding import Shard, ShardPlan, within
from hope.state import AttentionState, StateSpec, TensorSpec, check_held, check_kind


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding (arXiv 2104.09864), [T, head_dim / 2] each."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions.to(dtype)[:, None] * theta**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the halves of the last axis of x [..., T, d] by the given angles [T, d / 2].

    Computed in the angles' precision, returned in x's.
    """
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)
    turned = [first * cosine - second * sine, first * sine + second * cosine]
    return torch.cat(turned, dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention, rotary positions, optional width-4 convolution on q, k, v.

    forward(x [B, T, dim], state, document_starts) -> (y [B, T, dim], state). With state None
    nothing is carried; with an `AttentionState`, keys and values are appended to it (decoding).
    A token attends to earlier tokens of its own document only. `num_heads` counts the heads held
    here: all of them, or this rank's when the parameters were divided by `shard_plan`.

    Raises ValueError when config.attention.backend asks for flash-attn and it is not installed.
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rope_theta = config.attention.rope_theta
        self.flash = load_flash(config.attention.backend)
        std = config.dim**-0.5
        self.q = Linear(config.dim, config.dim, std)
        self.k = Linear(config.dim, config.dim, std)
        self.v = Linear(config.dim, config.dim, std)
        self.out = Linear(config.dim, config.dim, std / (2 * config.num_layers) ** 0.5)
        width = config.attention.conv_width
        self.reach = max(width - 1, 0)
        self.convs: nn.ModuleList | None = None
        if width > 0:
            self.convs = nn.ModuleList(CausalConvolution(config.dim, width) for _ in range(3))

    def initial_state(self, batch: int, decoding: bool) -> AttentionState | None:
        """An empty cache for `batch` rows when decoding, else None."""
        if not decoding:
            return None
        weight = self.q.weight
        empty = weight.new_zeros(batch, self.num_heads, 0, self.head_dim)
        return AttentionState(
            k=empty,
            v=empty,
            document_ids=torch.zeros(batch, 0, dtype=torch.int64, device=weight.device),
            conv=weight.new_zeros(batch, self.reach, 3, self.num_heads * self.head_dim),
        )

    def state_spec(
        self,
        batch: int,
        decoding: bool = False,
        tokens: int = 0,
        dtype: torch.dtype | None = None,
    ) -> StateSpec:
        """What `batch` rows carry after `tokens` tokens: a cache when decoding, else nothing.

        dtype: the activations' (default: the parameters'). Names as in `AttentionState`.
        """
        if not decoding:
            return {}
        dtype = dtype or self.q.weight.dtype
        cache = (batch, self.num_heads, tokens, self.head_dim)
        tail = (batch, self.reach, 3, self.num_heads * self.head_dim)
        return {
            "k": TensorSpec(cache, dtype, row_axis=0, shard_axis=1),
            "v": TensorSpec(cache, dtype, row_axis=0, shard_axis=1),
            "document_ids": TensorSpec((batch, tokens), torch.int64, row_axis=0, shard_axis=None),
            "conv": TensorSpec(tail, dtype, row_axis=0, shard_axis=3),
        }

    def shard_plan(self) -> ShardPlan:
        """Heads are divided: q, k and v by column, the output by row."""
        plan: ShardPlan = {}
        for name in ("q", "k", "v"):
            plan |= within(name, {"weight": Shard(0)})
        for number in range(len(self.convs) if self.convs is not None else 0):
            plan[f"convs.{number}.weight"] = Shard(1)
        return plan | within("out", {"weight": Shard(1)})

    def flops_per_token(self, seq_len: int, executed: bool = True) -> Flops:
        """Matrix products per token of a sequence of seq_len tokens; see `hope.flops`."""
        linears = [linear_flops(one) for one in (self.q, self.k, self.v, self.out)]
        return sum_flops(
            [*linears, softmax_flops(self.num_heads, self.head_dim, seq_len, executed)]
        )

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        check_kind(state, AttentionState)
        projected = [self.q(x), self.k(x), self.v(x)]
        tails = state.conv.unbind(2) if state is not None else (None,) * 3
        seen = state.k.shape[2] if state is not None else 0
        q, k, v, conv_tail = self.prepare(projected, tails, document_starts, seen)
        if state is None:
            return self.finish(self.attend(q, k, v, document_starts)), None
        check_held("k", state.k, k)
        check_held("v", state.v, v)
        documents = self._document_ids(q, state, document_starts)
        k = torch.cat([state.k.to(k.dtype), k], dim=2)
        v = torch.cat([state.v.to(v.dtype), v], dim=2)
        mixed = self._attend_within(q, k, v, documents)
        return self.finish(mixed), AttentionState(k, v, documents, conv_tail)

    def prepare(
        self,
        projected: Sequence[Tensor],
        tails: Sequence[Tensor | None],
        document_starts: Tensor | None,
        first: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Convolutions and rotation of the projections [B, T, channels] of x.

        tails: what came before them, for the convolutions; first: the position of the first token.
        Returns (q, k, v [B, N, T, d], the next tails [B, conv_width - 1, 3, channels]).
        """
        batch, length, channels = projected[0].shape
        conv_tail = projected[0].new_zeros(batch, 0, 3, channels)
        if self.convs is not None:
            pairs = [
                conv(part, tail, document_starts)
                for conv, part, tail in zip(self.convs, projected, tails, strict=True)
            ]
            projected = [y for y, _ in pairs]
            conv_tail = torch.stack([tail for _, tail in pairs], dim=2)
        heads = (batch, length, self.num_heads, self.head_dim)
        q, k, v = (part.view(heads).transpose(1, 2) for part in projected)
        positions = torch.arange(first, first + length, device=q.device)
        precision = torch.promote_types(q.dtype, torch.float32)
        cosine, sine = rotary_angles(positions, self.head_dim, self.rope_theta, precision)
        return rotate(q, cosine, sine), rotate(k, cosine, sine), v, conv_tail

    def attend(self, q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor | None) -> Tensor:
        """Causal attention within documents of whole sequences; all [B, N, T, d]."""
        if self.flash is not None and self.flash.takes(q):
            return self.flash(q, k, v, document_starts)
        if document_starts is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._attend_within(q, k, v, torch.cumsum(document_starts, dim=1))

    def finish(self, mixed: Tensor) -> Tensor:
        """Heads [B, N, T, d] to outputs [B, T, dim]."""
        batch, _, length, _ = mixed.shape
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))

    @staticmethod
    def _attend_within(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        """Attention of the last queries to all keys of their documents [B, S + T]."""
        length, total = q.shape[2], k.shape[2]
        keys = torch.arange(total, device=q.device)
        visible = keys[None, :] <= keys[total - length :, None]
        visible = visible & (documents[:, total - length :, None] == documents[:, None, :])
        return scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])

    @staticmethod
    def _document_ids(q: Tensor, state: AttentionState, document_starts: Tensor | None) -> Tensor:
        """Which document of its row each key belongs to, [B, S + T]."""
        batch, _, length, _ = q.shape
        if document_starts is None:
            ids = torch.zeros(batch, length, dtype=torch.int64, device=q.device)
        else:
            ids = torch.cumsum(document_starts, dim=1)
        if state.document_ids.shape[1] > 0:
            ids = ids + state.document_ids[:, -1:]
        return torch.cat([state.document_ids, ids], dim=1)
