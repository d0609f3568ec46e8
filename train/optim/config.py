"""Configuration of the optimizers: one for all levels, and what differs level by level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from train.section import Section

OptimizerName = Literal["adamw", "muon", "m3", "sgd"]
Reduce = Literal["every_step", "at_update"]
AccumulatorDevice = Literal["same", "cpu"]
Share = Annotated[float, Field(ge=0, lt=1)]


class ScheduleConfig(Section):
    """Learning rate as a function of tokens: linear warm-up from 0 to the peak, then a shape.

    constant: the peak. linear, cosine: down to min_ratio of the peak at training.total_tokens.
    wsd (warm-up, stable, decay; arXiv 2404.06395): the peak until decay_tokens before the end, then
    linear down to min_ratio.
    """

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_tokens: int = Field(0, ge=0)
    decay_tokens: int | None = Field(None, ge=1)
    min_ratio: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _decay_is_wsds(self) -> ScheduleConfig:
        if (self.decay_tokens is not None) != (self.name == "wsd"):
            raise ValueError(
                f"schedule {self.name!r} with decay_tokens={self.decay_tokens}: "
                "decay_tokens is how long 'wsd' decays, and belongs to it alone"
            )
        return self


class MuonConfig(Section):
    """Muon (see `train.optim.muon`) for the matrices; everything else has AdamW.

    adjust_lr: "match_rms_adamw" scales a step to the size of AdamW's, so that both take the same
    learning rate; "original" is sqrt(max(1, rows / columns)).
    """

    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(5, ge=1, le=20)
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"


class M3Config(Section):
    """M3 (see `train.optim.m3`) for the matrices; everything else has AdamW.

    slow_every_tokens: the slow momentum's window on the token clock; slow_every_steps: in steps of
    the level's optimizer (16 when neither is given). lr_ratio: the matrices' learning rate over
    the rest's: a step is divided by the size of the gradient, and so has no scale of its own. As
    large as eps, no entry moves by more than the rate times what Newton-Schulz gives it.
    """

    variant: Literal["paper", "ema"] = "ema"
    betas: tuple[Share, Share, Share] = (0.95, 0.95, 0.9)
    alpha: float = Field(0.5, ge=0)
    eps: float = Field(1e-3, gt=0)
    ns_steps: int = Field(5, ge=1, le=20)
    slow_every_steps: int | None = Field(None, ge=1)
    slow_every_tokens: int | None = Field(None, ge=1)
    lr_ratio: float = Field(1e-3, gt=0)

    @model_validator(mode="after")
    def _one_window(self) -> M3Config:
        if self.slow_every_steps is not None and self.slow_every_tokens is not None:
            raise ValueError(
                "optimizer.m3: the slow momentum's window is slow_every_steps or "
                "slow_every_tokens, not both"
            )
        return self


class SGDConfig(Section):
    """Stochastic gradient descent; its weight decay is added to the gradient."""

    momentum: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.sgd: nesterov needs a momentum above 0")
        return self


class LevelOptimizerConfig(Section):
    """What differs for one level; what is not given is the optimizer's.

    lr_scale: its learning rate is lr_scale times its schedule's.
    clip_norm: clip the level's own gradient norm first; the one norm over everything that fires is
        clipped after it, as always.
    reduce: when data-parallel ranks that hold the whole parameter add their gradients.
        "every_step": each step, and each rank keeps its share of the accumulator; "at_update":
        each rank sums its own, whole, and the ranks add up when the level fires; replicas whose
        ranks hold shares sum those. The result is the same, the traffic and the memory are not
        (docs/levels.md, docs/parallelism.md).
    accumulator_device: "cpu" keeps the accumulated gradient off the accelerator.
    """

    name: OptimizerName | None = None
    lr_scale: float = Field(1.0, ge=0)
    schedule: ScheduleConfig | None = None
    weight_decay: float | None = Field(None, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    reduce: Reduce | None = None
    accumulator_device: AccumulatorDevice | None = None


class OptimizerConfig(Section):
    """The optimizer of every level, which steps at the level's own period.

    adamw (arXiv 1711.05101), fused where the device has it; muon and m3 for matrices with AdamW
    for the rest; sgd. betas and eps are AdamW's. clip_norm: of the one gradient norm over all that
    fires in a step. reduce, accumulator_device: see LevelOptimizerConfig.
    """

    name: OptimizerName = "adamw"
    lr: float = Field(1e-3, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
    muon: MuonConfig = MuonConfig()
    m3: M3Config = M3Config()
    sgd: SGDConfig = SGDConfig()
    reduce: Reduce = "every_step"
    accumulator_device: AccumulatorDevice = "same"
    levels: dict[str, LevelOptimizerConfig] = Field(default_factory=dict)

    def level(self, name: str) -> LevelSettings:
        """Everything that holds for level `name`, its own words before the optimizer's."""
        own = self.levels.get(name, LevelOptimizerConfig())
        return LevelSettings(
            optimizer=own.name or self.name,
            peak_lr=own.lr_scale * self.lr,
            schedule=own.schedule or self.schedule,
            weight_decay=self.weight_decay if own.weight_decay is None else own.weight_decay,
            clip_norm=own.clip_norm,
            reduce=own.reduce or self.reduce,
            accumulator_device=own.accumulator_device or self.accumulator_device,
        )


@dataclass(frozen=True)
class LevelSettings:
    """The resolved settings of one level; clip_norm None: no clipping of its own."""

    optimizer: OptimizerName
    peak_lr: float
    schedule: ScheduleConfig
    weight_decay: float
    clip_norm: float | None
    reduce: Reduce
    accumulator_device: AccumulatorDevice
