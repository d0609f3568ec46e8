"""Activation checkpointing: what a layer keeps for its backward, and what it computes again.

The scan's results, and the chunk states that it keeps for itself, are always kept: computing a
layer again never runs a recurrence again (it does so once in any case, inside its own backward).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from hope import HopeModel
from train.parallel.config import ActivationCheckpointing

SCANS = ("hope::scan",)
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::linear",
    "aten::_scaled_dot_product",
    "aten::scaled_dot_product",
    "_c10d_functional::",
)


RECOMPILATIONS = 64


def _policy(kept: tuple[str, ...], _: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    name = getattr(operator, "_schema", None)
    if name is not None and name.name.startswith(kept):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(model: HopeModel, how: ActivationCheckpointing) -> None:
    """Let every layer recompute its activations in backward: see ParallelConfig."""
    if how == "none":
        return
    kept = SCANS + PRODUCTS if how == "selective" else SCANS
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    for layer in model.layers:
        layer.forward = partial(  # type: ignore[method-assign]
            _recomputed, layer.forward, contexts
        )


def _recomputed(forward: Any, contexts: Any, *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        context_fn=contexts,
        preserve_rng_state=False,
    )


def why_not_compile(device: torch.device) -> str:
    """Why layers can't be compiled for that device, as a clause; empty if they can."""
    if device.type != "cpu":
        return ""
    from torch._inductor.config import cpp  # seconds, which a run that compiles nothing saves
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return f"torch.compile finds no C++ compiler ({', '.join(filter(None, cpp.cxx))})"
    return ""


def compile_layers(model: nn.Module) -> None:
    """torch.compile every layer in place; equal layers share what is compiled."""
    # All layers are one function to the compiler: kinds of layers x training or not x with or
    # without a state are more than its 8, and beyond them it would run them uncompiled.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILATIONS)
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile()
