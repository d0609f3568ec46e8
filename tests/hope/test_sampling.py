"""Generating text from a model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from hope import HopeModel
from hope.sampling import generate
from tests.hope.test_model import BASE, VARIANTS, logits_of, tokens_of


@pytest.mark.parametrize("mixer", ["chunk_16", "attention_conv", "hybrid"])
def test_generation_is_the_argmax_of_the_whole_pass(mixer: str) -> None:
    config = replace(VARIANTS[f"{mixer}-sequential"], tie_embeddings=False)
    model, prompt = HopeModel(config), tokens_of(1, 11)[0]
    for layer in model.layers:  # so that what comes next depends on all that came before
        for name, parameter in layer.mixer.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.data.mul_(8)
    chosen = generate(model, prompt, 9, temperature=0)
    assert len(set(chosen.tolist())) > 3
    text = torch.cat([prompt, chosen])
    expected = logits_of(model, text[None, :-1])[0, 10:].argmax(dim=-1)
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_a_temperature_near_zero_takes_the_most_likely_token(top_k: int | None) -> None:
    model, prompt = HopeModel(BASE), tokens_of(1, 11)[0]
    coldest = generate(model, prompt, 5, temperature=0)
    for temperature in (1e-30, 1e-40, 1e-300):
        cold = generate(model, prompt, 5, temperature=temperature, top_k=top_k)
        assert torch.equal(cold, coldest), temperature
    hottest = generate(model, prompt, 5, temperature=1e40, top_k=top_k)
    assert hottest.shape == (5,)
    torch.nn.init.zeros_(model.embedding.weight)  # all tokens are equally likely
    alike = generate(model, prompt, 20, temperature=1.0, top_k=top_k)
    assert top_k is None or len(set(alike.tolist())) <= top_k


def test_generation_draws_from_the_likeliest_and_ends_before_its_stop() -> None:
    model, prompt = HopeModel(BASE), tokens_of(1, 11)[0]
    likeliest = set(logits_of(model, prompt[None])[0, -1].topk(3).indices.tolist())

    def first(seed: int, **options: Any) -> list[int]:
        drawn = torch.Generator().manual_seed(seed)
        return generate(model, prompt, 1, temperature=1e3, generator=drawn, **options).tolist()

    assert {first(seed, top_k=3)[0] for seed in range(16)} == likeliest
    drawn = [first(seed)[0] for seed in range(9)]
    assert drawn == [first(seed)[0] for seed in range(9)]
    assert len(set(drawn)) > 3
    text = generate(model, prompt, 9, temperature=0).tolist()
    stop = text[4]
    ended = generate(model, prompt, 9, temperature=0, stop_token=stop).tolist()
    assert ended == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (2, {"temperature": math.nan}, "temperature must be finite"),
        (2, {"temperature": math.inf, "top_k": 3}, "temperature must be finite"),
        (2, {"temperature": -1.0}, "temperature must be finite and 0 or more"),
        (2, {"top_k": 0}, "top_k must be at least 1"),
        (-2, {}, "number of tokens must be 0 or more"),
    ],
)
def test_generation_refuses_what_it_can_not_do(count: int, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(HopeModel(BASE), tokens_of(1, 3)[0], count, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_from_logits_that_are_not_finite_is_refused(temperature: float) -> None:
    model = HopeModel(BASE)
    model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, tokens_of(1, 3)[0], 2, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_generation_keeps_to_the_ids_of_the_tokenizer(temperature) -> None:
    model, prompt = HopeModel(BASE), tokens_of(1, 11)[0]
    chosen = generate(model, prompt, 40, temperature=temperature, top_k=50, vocab_size=3)
    assert chosen.numel() == 40
    assert int(chosen.max()) < 3
