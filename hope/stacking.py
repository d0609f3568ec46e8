"""Ad-hoc level stacking (section 7.3): CMS levels that start from a pretrained model's MLPs.

The paper sets MLP^(f_i)_0 = MLP_pretrained_i, and has the pretrained model back where the level
learning rates are 0; its experiments place the MLPs of a Llama at levels of different periods
(9.1). It does not say which MLP becomes which level. Decided here:

* A layer's MLP becomes one level of that same layer's CMS: chaining MLPs of several layers in one
  CMS would move them past the mixers between, and lose the model.
* By default the slowest level, the most persistent knowledge; `placement` names others, and
  repeats over the layers, so that consecutive MLPs can go to levels of different periods.
* The other levels of a layer start as exact zeros on the residual stream: their down projection
  is zero, everything before it as the model draws it. The logits are the pretrained model's, bit
  for bit, and the first gradient of such a level reaches its down projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from hope.config import HopeConfig
from hope.model import HopeModel

_EXECUTION = ("backend", "implementation", "checkpoint_chunks")
"""Settings that say how something is computed, not what."""

_LEVEL = re.compile(r"^layers\.(\d+)\.cms\.levels\.(\d+)\.(.+)$")


def stack_levels(
    pretrained: Mapping[str, Tensor],
    source: HopeConfig,
    target: HopeConfig,
    placement: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Parameters of a `target` model that computes exactly what the pretrained one does.

    pretrained: parameters by name of a model of configuration `source`, which has one CMS level
        (a Transformer++, say). placement: the target's level that takes the MLP of layer 0, 1,
        ..., repeating; None: always the slowest. seed: names the initial weights of the rest.
    Returns tensors by the target's parameter names; `pretrained` is left alone.

    Raises ValueError, in one line, where the two models do not fit together.
    """
    names = [level.name for level in target.cms.levels]
    placement = placement or names[-1:]
    _check(source, target, names, placement)
    fresh = dict(HopeModel(target, seed=seed).named_parameters())
    stacked = {}
    for name, drawn in fresh.items():
        match = _LEVEL.match(name)
        wanted = name
        if match is not None:
            layer, level, part = int(match[1]), int(match[2]), match[3]
            wanted = f"layers.{layer}.cms.levels.0.{part}"
            if names[level] != placement[layer % len(placement)]:
                stacked[name] = drawn.detach().clone()
                if part == "down.weight":
                    stacked[name].zero_()
                continue
        if wanted not in pretrained:
            raise ValueError(f"the pretrained model holds no {wanted}")
        if pretrained[wanted].shape != drawn.shape:
            raise ValueError(
                f"{wanted} is {list(pretrained[wanted].shape)} in the pretrained model, "
                f"but {name} must be {list(drawn.shape)}"
            )
        stacked[name] = pretrained[wanted].detach().to(drawn.dtype, copy=True)
    return stacked


def _check(
    source: HopeConfig, target: HopeConfig, names: Sequence[str], placement: Sequence[str]
) -> None:
    """Raise ValueError for what shapes alone would not show, or would show less clearly."""
    if len(source.cms.levels) != 1:
        raise ValueError(
            f"level stacking starts from a model with one CMS level, "
            f"this one has {[level.name for level in source.cms.levels]}"
        )
    if "independent" in (source.cms.mode, target.cms.mode):
        raise ValueError(
            "level stacking needs cms.mode sequential or nested: "
            "independent levels share the residual stream"
        )
    if unknown := sorted(set(placement) - set(names)):
        raise ValueError(f"level stacking places MLPs at {unknown}, but the levels are {names}")
    apart = {
        "mixers": (list(source.mixers), list(target.mixers)),
        **{
            field.name: (getattr(source, field.name), getattr(target, field.name))
            for field in fields(HopeConfig)
            if field.name not in ("mixer", "pattern", "cms")
        },
    }
    idle = {"titans", "attention"} - set(source.mixers)
    for key, (before, now) in apart.items():
        if _mathematics(before) != _mathematics(now) and key not in idle:
            raise ValueError(
                f"model.{key} is {before} in the pretrained model but {now} here; "
                "level stacking changes the CMS only"
            )
    hidden = source.cms.levels[0].hidden_size
    for level in target.cms.levels:
        if level.name in placement and level.hidden_size != hidden:
            raise ValueError(
                f"CMS level {level.name!r} has hidden_size {level.hidden_size}, but it takes "
                f"MLPs of hidden size {hidden}"
            )


def _mathematics(value: Any) -> Any:
    """A configuration as plain data, without the settings that change no result."""
    if not is_dataclass(value):
        return value
    return {
        field.name: _mathematics(getattr(value, field.name))
        for field in fields(value)
        if field.name not in _EXECUTION
    }
