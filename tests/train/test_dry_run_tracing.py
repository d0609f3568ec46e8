"""What a part of the model keeps, on sizes where one thing outweighs the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tools.parity import make_config
from train.dry_run.tracing import PartBytes, trace_part
from train.evaluate.perplexity import summed_loss
from train.parallel.part import Part, cut_layers

LAYERS = range(4)


def traced(
    vocabulary: int, tokens: int, released: Callable[[str], bool] | None = None
) -> tuple[PartBytes, int]:
    """A whole model's part, and the bytes of its parameters."""
    changes: dict[str, Any] = {"model.vocab_size": vocabulary}
    part = Part(cut_layers(make_config("transformer", **changes).model, LAYERS), LAYERS)
    x, labels = (torch.empty(1, tokens, dtype=torch.int64, device="meta") for _ in range(2))
    inputs = (x, torch.arange(1), None)
    found = trace_part(part, inputs, lambda y: summed_loss(y, labels), "cpu", (labels,), released)
    return found, sum(p.nbytes for p in part.parameters())


def test_gradients_that_are_there_are_added_to() -> None:
    """Of eight tokens, parameters outweigh activations."""
    found, parameters = traced(48, 8)
    assert found.gradients == parameters
    assert found.left == 0
    assert found.kept < found.forward < found.backward
    assert found.again < found.backward
    assert found.early == found.backward


def test_what_comes_before_the_first_gradient_that_goes_is_told_apart() -> None:
    """Logits of thousands of words are gone by then, and the gradients of layers do not stay."""
    kept, _ = traced(4096, 64)
    found, _ = traced(4096, 64, released=lambda name: name.startswith("layers."))
    assert found.forward == kept.forward
    assert found.backward < found.early <= kept.backward
    assert found.gradients == 4 * 32 * (4096 + 1)  # token vectors, and the last norm
