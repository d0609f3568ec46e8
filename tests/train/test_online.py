"""The online adapter against a plain loop, and what it promises to the bit."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.scan import ScanConfig
from train.online import OnlineAdapter
from train.optim.config import (
    LevelOptimizerConfig,
    OptimizerConfig,
    ScheduleConfig,
)

LR = 0.02


def make(mixer: Any = "titans", mode: Any = "sequential") -> tuple[HopeModel, HopeConfig]:
    levels = tuple(
        LevelConfig(name=name, hidden_size=8, update_every_tokens=every)
        for name, every in (("a", "step"), ("b", 1000), ("c", 5000))
    )
    config = HopeConfig(
        vocab_size=31,
        dim=16,
        num_layers=2,
        num_heads=2,
        mixer=mixer,
        titans=TitansConfig(scan=ScanConfig(memory_chunk=4, projection_chunk=8)),
        cms=CMSConfig(levels=levels, mode=mode),
    )
    return HopeModel(config), config


def stream(length: int, rows: int = 2) -> Tensor:
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(5))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_loop(model: HopeModel, tokens: Tensor, every: dict[str, int]) -> Tensor:
    """Segment by segment; sums kept in lists; one AdamW a level, clipped together to norm 1."""
    size = math.gcd(*every.values())
    level_of = {"a": ".levels.0.", "b": ".levels.1.", "c": ".levels.2."}
    chosen = {
        name: [p for n, p in model.named_parameters() if level_of[name] in n] for name in every
    }
    rules = {
        name: torch.optim.AdamW(part, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
        for name, part in chosen.items()
    }
    sums: dict[str, list[list[Tensor]]] = {name: [] for name in every}
    state, losses = None, []
    for start in range(0, tokens.shape[1] - size, size):
        part = tokens[:, start : start + size + 1]
        logits, state = model(part[:, :-1], state)
        state = state.detach()
        nats = cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        losses.append(nats.detach())
        flat = [p for some in chosen.values() for p in some]
        grads = iter(torch.autograd.grad(nats.sum(), flat))
        for name, some in chosen.items():
            sums[name].append([next(grads) for _ in some])
        firing = [name for name, period in every.items() if (start + size) % period == 0]
        for name in firing:
            count = len(sums[name]) * size * tokens.shape[0]
            for i, p in enumerate(chosen[name]):
                p.grad = torch.stack([one[i] for one in sums[name]]).sum(0) / count
            sums[name] = []
        nn.utils.clip_grad_norm_([p for name in firing for p in chosen[name]], 1.0)
        for name in firing:
            rules[name].step()
            rules[name].zero_grad()
    return torch.cat(losses, dim=1)


@pytest.mark.parametrize("every", [{"b": 8}, {"b": 16}, {"a": 16, "c": 24}])
def test_it_is_a_plain_loop_over_segments(every: dict[str, int]) -> None:
    model, config = make()
    reference, _ = make()
    tokens = stream(8 * 18 + 1)
    expected = plain_loop(reference, tokens, every)
    adapter = OnlineAdapter(model, config, every, lr=LR)
    found = torch.cat([adapter.feed(tokens), adapter.rest()], dim=1)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_where_the_stream_is_cut_changes_nothing(mixer: str) -> None:
    tokens = stream(150)
    results = []
    for cuts in ([150], [1, 2, 30, 17, 0, 100], [15] * 10):
        model, config = make(mixer)
        adapter = OnlineAdapter(model, config, {"a": 16, "c": 32}, lr=LR)
        losses = torch.cat([adapter.feed(p) for p in tokens.split(cuts, 1)] + [adapter.rest()], 1)
        results.append((losses, weights(model)))
    for losses, moved in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert all(torch.equal(moved[name], results[0][1][name]) for name in moved)
    assert results[0][0].shape == (2, 149)


def test_only_the_chosen_levels_move_and_only_later_tokens_see_it() -> None:
    tokens = stream(97)
    frozen_model, config = make()
    frozen = OnlineAdapter(frozen_model, config, {"b": 32}, lr=0.0)
    without = torch.cat([frozen.feed(tokens), frozen.rest()], 1)
    model, _ = make()
    before = weights(model)
    adapter = OnlineAdapter(model, config, {"b": 32}, lr=LR)
    found = torch.cat([adapter.feed(tokens), adapter.rest()], 1)
    assert torch.equal(found[:, :32], without[:, :32])
    assert not torch.equal(found[:, 32], without[:, 32])
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]) == (".levels.1." not in name), name
    assert all(p.requires_grad for p in model.parameters())
    assert adapter.clock.firings == {"b": 3}


def test_rates_of_zero_change_nothing() -> None:
    model, config = make()
    before = weights(model)
    tokens = stream(65)
    adapter = OnlineAdapter(model, config, {"a": 16, "b": 32, "c": 64}, lr=0.0)
    found = adapter.feed(tokens)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    state, expected = model.initial_state(2, decoding=True), []
    with torch.no_grad():
        for start in range(0, 64, 16):
            logits, state = model(tokens[:, start : start + 16], state)
            labels = tokens[:, start + 1 : start + 17]
            nats = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            expected.append(nats.view(2, 16))
    assert torch.equal(found, torch.cat(expected, 1))


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_learns_the_same_wherever_it_is_called(grad: Any) -> None:
    """Without gradients around it, on a frozen model, over gradients that somebody left, on ids of
    another dtype; saved and gone on with in between."""
    tokens, every = stream(100), {"a": 16, "c": 32}
    model, config = make()
    expected = OnlineAdapter(model, config, every, lr=LR).feed(tokens)
    moved = weights(model)
    model, _ = make()
    model(tokens)[0].sum().backward()
    left = {name: p.grad.clone() for name, p in model.named_parameters() if ".levels." not in name}
    flags = [i % 2 == 0 for i, _ in enumerate(model.parameters())]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    with grad():
        adapter = OnlineAdapter(model, config, every, lr=LR)
        first = adapter.feed(tokens[:, :70].int())
        adapter.load_state_dict(adapter.state_dict())
        found = torch.cat([first, adapter.feed(tokens[:, 70:].short())], dim=1)
    assert torch.equal(found, expected)
    assert all(torch.equal(value, moved[name]) for name, value in weights(model).items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(torch.equal(gradients[name], value) for name, value in left.items())


def test_reset_and_context_give_the_trained_weights_back() -> None:
    model, config = make()
    before = weights(model)
    tokens = stream(70)
    with OnlineAdapter(model, config, {"b": 16}, lr=LR) as adapter:
        first = adapter.feed(tokens)
        assert not torch.equal(
            weights(model)["layers.0.cms.levels.1.up.weight"],
            before["layers.0.cms.levels.1.up.weight"],
        )
        adapter.reset()
        assert torch.equal(adapter.feed(tokens), first)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_stream_is_saved_and_gone_on_with_to_the_bit() -> None:
    tokens = stream(140)
    straight_model, config = make()
    straight = OnlineAdapter(straight_model, config, {"a": 16, "c": 48}, lr=LR)
    expected = straight.feed(tokens)
    model, _ = make()
    adapter = OnlineAdapter(model, config, {"a": 16, "c": 48}, lr=LR)
    first = adapter.feed(tokens[:, :77])
    file = io.BytesIO()
    kept = adapter.state_dict()
    torch.save(kept, file)
    file.seek(0)
    adapter.feed(tokens[:, 77:])  # changes nothing of what was kept
    adapter.reset()
    moved = weights(straight_model)
    for state in (torch.load(file, weights_only=True), kept, kept):
        other_model, _ = make()
        other = OnlineAdapter(other_model, config, {"a": 16, "c": 48}, lr=LR)
        other.load_state_dict(state)
        assert torch.equal(torch.cat([first, other.feed(tokens[:, 77:])], 1), expected)
        assert all(torch.equal(v, moved[name]) for name, v in weights(other_model).items())
    with pytest.raises(ValueError, match="every_tokens"):
        OnlineAdapter(other_model, config, {"a": 16}).load_state_dict(adapter.state_dict())


def test_the_rate_is_what_schedule_and_level_say() -> None:
    """Of plain gradient descent one step is proportional to it."""
    moved, name = [], "layers.0.cms.levels.1.up.weight"
    for schedule, scale in (("constant", 1.0), ("linear", 1.0), ("constant", 0.25)):
        model, config = make()
        optimizer = OptimizerConfig(
            name="sgd",
            lr=0.5,
            weight_decay=0.0,
            schedule=ScheduleConfig(name=schedule, min_ratio=0.0),
            levels={"b": LevelOptimizerConfig(lr_scale=scale)},
        )
        before = weights(model)[name]
        adapter = OnlineAdapter(model, config, {"b": 16}, optimizer=optimizer, total_tokens=64)
        adapter.feed(stream(17))
        moved.append(weights(model)[name] - before)
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], 0.75 * moved[0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(moved[2], 0.25 * moved[0], rtol=1e-3, atol=1e-7)


def test_a_segment_that_is_not_finite_teaches_nothing() -> None:
    config = replace(make()[1], tie_embeddings=False)
    model = HopeModel(config)
    before = weights(model)
    with torch.no_grad():
        model.embedding.weight[7] = float("nan")
    tokens = stream(65)
    tokens[tokens == 7] = 8
    tokens[0, 20] = 7
    adapter = OnlineAdapter(model, config, {"b": 16}, lr=LR)
    losses = adapter.feed(tokens)
    assert losses[:, 16:32].isnan().any()
    assert losses[:, 32:].isfinite().all()
    assert (adapter.clock.tokens, adapter.clock.skipped_tokens) == (48, 16)
    after = weights(model)
    after.pop("embedding.weight")
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(
        after["layers.0.cms.levels.1.up.weight"], before["layers.0.cms.levels.1.up.weight"]
    )


def test_a_segment_that_spoils_what_is_carried_teaches_nothing() -> None:
    """Its own losses are finite; the memories go on from before it."""
    model, config = make()
    adapter = OnlineAdapter(model, config, {"b": 16}, lr=LR)
    predict, calls = adapter._predict, []

    def spoiled(tokens: torch.Tensor) -> Any:
        losses, after = predict(tokens)
        calls.append(len(calls))
        return losses, after.map(lambda _, t: t * float("nan")) if calls[-1] == 1 else after

    adapter._predict = spoiled  # type: ignore[method-assign]
    assert adapter.feed(stream(65)).isfinite().all()
    assert (adapter.clock.tokens, adapter.clock.skipped_tokens) == (48, 16)


def test_a_segment_whose_gradient_overflows_what_waits_teaches_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second and the third of four segments: finite gradients, too large beside the first."""
    model, config = make()
    adapter = OnlineAdapter(model, config, {"a": 16, "c": 48}, lr=LR)
    agree, segments = adapter.cadence.agree, []

    def enlarged(numbers: list[float]) -> Any:
        segments.append(len(segments))
        for parameter in adapter.cadence.levels[1].parameters.values():
            assert parameter.grad is not None
            parameter.grad.fill_(2e38 if segments[-1] < 3 else 0.0)
        return agree(numbers)

    monkeypatch.setattr(adapter.cadence, "agree", enlarged)
    assert adapter.feed(stream(65)).isfinite().all()
    assert (adapter.clock.tokens, adapter.clock.skipped_tokens) == (32, 32)
    assert adapter.cadence.pending_tokens["c"] == 2 * 32  # of two rows
    assert all(value.isfinite().all() for value in weights(model).values())


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "choose at least one CMS level to adapt; the model has 'a', 'b', 'c'$"),
    ({"z": 8}, "^no CMS level 'z'; the model has 'a', 'b', 'c'$"),
    ({"z": 8, "y": 8}, "^no CMS levels 'y', 'z'; the model has"),
    ({"fast": 8}, "no CMS level"),
    ({"a": 0}, "1 or more tokens, got 0"),
    ({"a": 1.5}, "1 or more tokens, got 1.5"),
]


@pytest.mark.parametrize(("every", "message"), BAD)
def test_what_it_refuses(every: dict[str, Any], message: str) -> None:
    model, config = make()
    with pytest.raises(ValueError, match=message):
        OnlineAdapter(model, config, every)


def test_other_refusals() -> None:
    model, config = make()
    adapter = OnlineAdapter(model, config, {"a": 8})
    with pytest.raises(ValueError, match=r"tokens \[rows, length\], got \[5\]"):
        adapter.feed(torch.zeros(5, dtype=torch.long))
    adapter.feed(stream(9))
    with pytest.raises(ValueError, match="the stream has 2 rows, got 3"):
        adapter.feed(stream(9, rows=3))
    levels = tuple(
        LevelConfig(name=n, hidden_size=8, update_every_tokens=e) for n, e in (("a", 10), ("b", 20))
    )
    cms = CMSConfig(mode="nested", levels=levels)
    nested = HopeConfig(vocab_size=31, dim=16, num_layers=1, num_heads=2, cms=cms)
    with pytest.raises(ValueError, match="nested CMS can't be adapted"):
        OnlineAdapter(HopeModel(nested), nested, {"a": 8})
    alone = replace(nested, cms=CMSConfig(mode="nested", levels=levels[:1]))
    OnlineAdapter(HopeModel(alone), alone, {"a": 8})  # has no other to set back
