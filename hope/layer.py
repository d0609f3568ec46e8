"""One layer of Hope (section 1): a sequence mixer, then the Continuum Memory System."""

from __future__ import annotations

from torch import Tensor, nn

from hope.attention import Attention
from hope.cms import ContinuumMemory
from hope.config import HopeConfig, MixerName
from hope.init import RMSNorm
from hope.state import LayerState
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
        return self.cms(x + mixed), state
