"""Continuum Memory System (Eqs. 70-74): a chain of MLPs, each with its own update period.

The periods act in the optimizer (`train/optim/cadence.py`); here a level is only an MLP. Each has
its own pre-norm and residual, so one level is exactly a Transformer's feed-forward sublayer:

    sequential:   h <- h + MLP_l(norm_l(h)),  l = 1 ... K          (70, 97)
    independent:  h <- h + sum_l softmax(w)_l MLP_l(norm_l(h))     (74)
    nested:       sequential; that a level is set back to its learned start when the next slower
                  one fires (72) is the optimizer's business, like the periods
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from hope.config import HopeConfig, LevelConfig
from hope.flops import Flops, linear_flops, sum_flops
from hope.init import Constant, Initialiser, Linear, RMSNorm
from hope.sharding import Replicate, Shard, ShardPlan, within
from hope.state import StateSpec


class Level(nn.Module):
    """One level: a pre-normed gated MLP, W_down(silu(W_gate n) * W_up n) with n = norm(x)."""

    def __init__(self, config: HopeConfig, level: LevelConfig) -> None:
        super().__init__()
        std = config.dim**-0.5
        depth = (2 * config.num_layers * len(config.cms.levels)) ** 0.5
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.gate = Linear(config.dim, level.hidden_size, std)
        self.up = Linear(config.dim, level.hidden_size, std)
        self.down = Linear(level.hidden_size, config.dim, level.hidden_size**-0.5 / depth)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> what this level adds to the residual stream, [..., dim]."""
        normed = self.norm(x)
        return self.down(silu(self.gate(normed)) * self.up(normed))

    def shard_plan(self) -> ShardPlan:
        """The hidden width is divided: gate and up by column, down by row."""
        return {
            "norm.weight": Replicate(),
            "gate.weight": Shard(0),
            "up.weight": Shard(0),
            "down.weight": Shard(1),
        }

    def flops_per_token(self) -> Flops:
        """Matrix products per token; see `hope.flops`."""
        return sum_flops(linear_flops(one) for one in (self.gate, self.up, self.down))


class ContinuumMemory(nn.Module):
    """All levels of one layer. forward(x [B, T, dim], None) -> (y [B, T, dim], None).

    mixing: w of `independent` levels, or None; a single level has no shares to learn.
    The residual is included. A CMS carries nothing from call to call; its memory is its weights.
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Level(config, level) for level in config.cms.levels)
        self.mixing: nn.Parameter | None = None
        if config.cms.mode == "independent" and len(config.cms.levels) > 1:
            self.mixing = nn.Parameter(torch.empty(len(config.cms.levels)))
            self.initialisers: dict[str, Initialiser] = {"mixing": Constant(0.0)}

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        if self.mixing is None:
            for level in self.levels:
                x = x + level(x)
            return x, state
        shares = torch.softmax(self.mixing, dim=0).unbind(0)
        parts = [share * level(x) for share, level in zip(shares, self.levels, strict=True)]
        return x + torch.stack(parts).sum(dim=0), state

    def state_spec(
        self,
        batch: int,
        decoding: bool = False,
        tokens: int = 0,
        dtype: torch.dtype | None = None,
    ) -> StateSpec:
        """Nothing."""
        return {}

    def shard_plan(self) -> ShardPlan:
        """Each level's own plan; the shares of `independent` levels act on whole outputs."""
        plan: ShardPlan = {} if self.mixing is None else {"mixing": Replicate()}
        for number, level in enumerate(self._levels()):
            plan |= within(f"levels.{number}", level.shard_plan())
        return plan

    def flops_per_token(self, seq_len: int, executed: bool = True) -> Flops:
        """Matrix products per token, the same at every seq_len; see `hope.flops`."""
        return sum_flops(level.flops_per_token() for level in self._levels())

    def _levels(self) -> list[Level]:
        return list(self.levels)  # type: ignore[arg-type]
