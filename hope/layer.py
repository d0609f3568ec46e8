"""One layer of Hope (section 1): a sequence mixer, then the Continuum Memory System."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hope.attention import Attention
from hope.cms import ContinuumMemory
from hope.config import HopeConfig, MixerName
from hope.flops import Flops, sum_flops
from hope.init import RMSNorm
from hope.sharding import Replicate, ShardPlan, within
from hope.state import LayerState, StateSpec
from hope.titans import SelfModifyingTitans

MIXERS: dict[MixerName, type[SelfModifyingTitans] | type[Attention]] = {
    "titans": SelfModifyingTitans,
    "attention": Attention,
}


class HopeLayer(nn.Module):
    """x <- x + Mixer(norm(x)), then x <- CMS(x), whose levels bring their own norms and residuals.

    forward(x [B, T, dim], state, document_starts) -> (x [B, T, dim], state).
    """

    def __init__(self, config: HopeConfig, mixer: MixerName) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer = MIXERS[mixer](config)
        self.cms = ContinuumMemory(config)

    def forward(
        self, x: Tensor, state: LayerState = None, document_starts: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        mixed, state = self.mixer(self.norm(x), state, document_starts)
        x, _ = self.cms(x + mixed)
        return x, state

    def state_spec(
        self,
        batch: int,
        decoding: bool = False,
        tokens: int = 0,
        dtype: torch.dtype | None = None,
    ) -> StateSpec:
        """What `batch` rows carry after `tokens` tokens: the mixer's state, if it carries one.

        decoding: as in `initial_state`; dtype: the activations' (default: the parameters').
        """
        return self.mixer.state_spec(batch, decoding, tokens, dtype)

    def shard_plan(self) -> ShardPlan:
        """Where every parameter of the layer goes."""
        return {
            "norm.weight": Replicate(),
            **within("mixer", self.mixer.shard_plan()),
            **within("cms", self.cms.shard_plan()),
        }

    def flops_per_token(self, seq_len: int, executed: bool = True) -> Flops:
        """Matrix products per token of both blocks; see `hope.flops`."""
        return sum_flops(
            block.flops_per_token(seq_len, executed) for block in (self.mixer, self.cms)
        )
