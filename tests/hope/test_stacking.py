"""Level stacking: the pretrained model's logits, to the bit, whatever levels are added."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from hope import AttentionConfig, CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.stacking import stack_levels
from tests.hope.test_model import VOCABULARY, logits_of, tokens_of

MLP = (LevelConfig(name="mlp", hidden_size=24),)
LEVELS = (
    LevelConfig(name="a", hidden_size=24),
    LevelConfig(name="b", hidden_size=24, update_every_tokens=1000),
    LevelConfig(name="c", hidden_size=24, update_every_tokens=4000),
)
SOURCE = HopeConfig(
    vocab_size=VOCABULARY,
    dim=32,
    num_layers=3,
    num_heads=2,
    mixer="attention",
    cms=CMSConfig(levels=MLP),
)
TARGET = replace(SOURCE, cms=CMSConfig(levels=LEVELS))


def pretrained(source: HopeConfig) -> HopeModel:
    """A model whose every parameter has left its initial value."""
    model = HopeModel(source, seed=11)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def stacked(source: HopeConfig, target: HopeConfig, **more: object) -> HopeModel:
    model = HopeModel(target, seed=None)
    state = stack_levels(dict(pretrained(source).named_parameters()), source, target, **more)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("placement", [None, ["a"], ["b"], ["a", "b", "c"], ["c", "a"]])
@pytest.mark.parametrize("mode", ["sequential", "nested"])
def test_the_logits_are_the_pretrained_models(mode: str, placement: list[str] | None) -> None:
    target = replace(TARGET, cms=CMSConfig(mode=mode, levels=LEVELS))  # type: ignore[arg-type]
    source, model = pretrained(SOURCE), stacked(SOURCE, target, placement=placement)
    tokens = tokens_of(2, 40)
    assert torch.equal(logits_of(model, tokens), logits_of(source, tokens))
    for number, layer in enumerate(model.layers):
        home = (placement or ["c"])[number % len(placement or ["c"])]
        for level, config in zip(layer.cms.levels, LEVELS, strict=True):
            old = source.layers[number].cms.levels[0]
            same = torch.equal(level.gate.weight, old.gate.weight)
            assert same == (config.name == home)
            assert bool((level.down.weight == 0).all()) == (config.name != home)


@pytest.mark.parametrize(
    "source",
    [
        replace(SOURCE, mixer="titans"),
        replace(SOURCE, tie_embeddings=False),
        replace(SOURCE, attention=AttentionConfig(conv_width=4)),
        replace(SOURCE, pattern=("attention", "titans", "attention")),
    ],
    ids=["titans", "untied", "conv", "hybrid"],
)
def test_any_mixer_keeps_its_logits(source: HopeConfig) -> None:
    model = stacked(source, replace(source, cms=CMSConfig(levels=LEVELS)))
    tokens = tokens_of(2, 64)
    assert torch.equal(logits_of(model, tokens), logits_of(pretrained(source), tokens))


def test_added_levels_can_learn_and_the_checkpoint_is_left_alone() -> None:
    source = dict(pretrained(SOURCE).named_parameters())
    before = {name: p.detach().clone() for name, p in source.items()}
    state = stack_levels(source, SOURCE, TARGET)
    for tensor in state.values():
        tensor.add_(1.0)
    assert all(torch.equal(p, before[name]) for name, p in source.items())
    model, tokens = stacked(SOURCE, TARGET), tokens_of(2, 40)
    logits = model(tokens)[0]
    cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for layer in model.layers:
        assert layer.cms.levels[0].down.weight.grad.abs().max() > 0


def test_an_added_level_may_have_any_size_and_is_drawn_by_the_seed() -> None:
    narrow = replace(TARGET, cms=CMSConfig(levels=(replace(LEVELS[0], hidden_size=8), *LEVELS[1:])))
    tokens, gate = tokens_of(2, 40), "layers.1.cms.levels.0.gate.weight"
    drawn = [stacked(SOURCE, narrow, seed=seed) for seed in (0, 0, 1)]
    for model in drawn:
        assert torch.equal(logits_of(model, tokens), logits_of(pretrained(SOURCE), tokens))
    first, again, other = (model.get_parameter(gate) for model in drawn)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_settings_that_change_no_result_may_differ() -> None:
    target = replace(TARGET, attention=AttentionConfig(backend="sdpa"))
    assert target.attention != SOURCE.attention
    assert stack_levels(dict(pretrained(SOURCE).named_parameters()), SOURCE, target)


def test_settings_of_a_mixer_that_is_not_there_may_differ() -> None:
    target = replace(TARGET, titans=TitansConfig(memory_expansion=2))
    assert stack_levels(dict(pretrained(SOURCE).named_parameters()), SOURCE, target)


@pytest.mark.parametrize(
    ("target", "placement", "message"),
    [
        (replace(TARGET, dim=64), None, "model.dim is 32 in the pretrained model but 64 here"),
        (replace(TARGET, num_layers=2), None, "mixers is ['attention', 'attention', 'attention']"),
        (replace(TARGET, mixer="titans"), None, "but ['titans', 'titans', 'titans'] here"),
        (
            replace(TARGET, attention=AttentionConfig(rope_theta=5e5)),
            None,
            "model.attention is AttentionConfig(",
        ),
        (TARGET, ["d"], "places MLPs at ['d'], but the levels are ['a', 'b', 'c']"),
        (
            replace(TARGET, cms=CMSConfig(levels=(*LEVELS[:2], replace(LEVELS[2], hidden_size=8)))),
            None,
            "level 'c' has hidden_size 8, but it takes MLPs of hidden size 24",
        ),
        (replace(TARGET, cms=CMSConfig(mode="independent", levels=LEVELS)), None, "sequential or"),
    ],
)
def test_what_does_not_fit_is_one_line(
    target: HopeConfig, placement: list[str] | None, message: str
) -> None:
    state = dict(pretrained(SOURCE).named_parameters())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        stack_levels(state, SOURCE, target, placement)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_state_that_is_not_of_its_configuration_is_refused() -> None:
    state = dict(pretrained(SOURCE).named_parameters())
    with pytest.raises(ValueError, match="one CMS level, this one has"):
        stack_levels(state, TARGET, TARGET)
    short = {name: p for name, p in state.items() if not name.endswith("2.mixer.q.weight")}
    with pytest.raises(ValueError, match=r"holds no layers\.2\.mixer\.q\.weight"):
        stack_levels(short, SOURCE, TARGET)
    wrong = state | {"norm.weight": torch.ones(5)}
    with pytest.raises(ValueError, match=r"norm.weight is \[5\] in the pretrained model"):
        stack_levels(wrong, SOURCE, TARGET)
