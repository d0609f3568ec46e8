"""Sampling from the model, token by token, with the state carried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hope.model import HopeModel


def generate(model: HopeModel, prompt: Tensor, num_tokens: int, **options: Any) -> Tensor:
    """What `sample` chooses, int64 [at most num_tokens], once all of it is there."""
    return torch.tensor(list(sample(model, prompt, num_tokens, **options)), dtype=torch.int64)


@torch.inference_mode()
def sample(
    model: HopeModel,
    prompt: Tensor,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    stop_token: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue `prompt`, int64 [T], T >= 1, by at most num_tokens tokens, each as it is chosen.

    temperature 0 takes the most likely token; top_k keeps that many candidates; generation ends
    before `stop_token`. vocab_size: of the tokenizer, where the model's is larger: no id from there
    on is chosen. Raises ValueError for an empty prompt, num_tokens below 0, a temperature that is
    negative or not finite, top_k < 1, and for a model whose logits are not finite.
    """
    if prompt.ndim != 1 or prompt.numel() == 0:
        raise ValueError(f"prompt must be [T] with T >= 1, got {tuple(prompt.shape)}")
    if num_tokens < 0:
        raise ValueError(f"the number of tokens must be 0 or more, got {num_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    logits, state = model(prompt[None], model.initial_state(1, decoding=True))
    for _ in range(num_tokens):
        scores = logits[0, -1, :vocab_size].float()
        if not scores.isfinite().all():
            raise ValueError("the model's logits are not finite: its weights or its state are not")
        if top_k is not None and top_k < scores.numel():
            others = scores.argsort(descending=True, stable=True)[top_k:]
            scores = scores.index_fill(0, others, float("-inf"))
        if temperature == 0:
            token = int(scores.argmax())
        else:
            # Of differences to the largest, which stays 0 however cold it is.
            limits = torch.finfo(scores.dtype)
            divisor = min(max(temperature, limits.tiny), limits.max)
            shares = torch.softmax((scores - scores.max()) / divisor, dim=-1)
            token = int(torch.multinomial(shares, 1, generator=generator))
        if token == stop_token:
            break
        yield token
        logits, state = model(prompt.new_tensor([[token]]), state)
