"""The shard plan followed in one process: cut by the plan, the parts add up to the whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from hope import AttentionConfig, CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.scan import ScanConfig
from hope.sharding import (
    Placement,
    Replicate,
    Shard,
    check_tensor_parallel,
    local_part,
    tensor_parallel_sizes,
    within,
)

RANKS = 2
LEVELS = (LevelConfig(name="a", hidden_size=8), LevelConfig(name="b", hidden_size=12))
BASE = HopeConfig(
    vocab_size=18,
    dim=24,
    num_layers=2,
    num_heads=4,
    titans=TitansConfig(scan=ScanConfig(4, 8)),
    cms=CMSConfig(levels=LEVELS),
)
MODELS = {
    "titans": BASE,
    "wide_memories": replace(BASE, titans=replace(BASE.titans, memory_expansion=2)),
    "adaptive_query": replace(BASE, titans=replace(BASE.titans, adaptive_query=True)),
    "writes_off": replace(BASE, titans=replace(BASE.titans, writes=False)),
    "untied_independent": replace(
        BASE, cms=replace(BASE.cms, mode="independent"), tie_embeddings=False
    ),
    "attention": replace(BASE, mixer="attention"),
    "attention_conv": replace(BASE, mixer="attention", attention=AttentionConfig(conv_width=4)),
    "hybrid": replace(BASE, pattern=("titans", "attention")),
}


def cut(block: nn.Module, plan: Mapping[str, Placement], rank: int) -> nn.Module:
    """A rank's block: parameters are views of the whole block's, so gradients meet there."""
    part = copy.deepcopy(block)
    if hasattr(part, "num_heads"):
        part.num_heads //= RANKS
    whole = dict(block.named_parameters())
    for name, placement in plan.items():
        owner_name, _, last = name.rpartition(".")
        owner = part.get_submodule(owner_name)
        delattr(owner, last)
        setattr(owner, last, local_part(whole[name], placement, rank, RANKS))
    return part


class Summed(nn.Module):
    """All ranks of a block whose output is row-parallel: the all-reduce of their outputs."""

    def __init__(self, block: nn.Module, plan: Mapping[str, Placement]) -> None:
        super().__init__()
        # Not registered as submodules: their tensors are views of the whole block's parameters.
        self.__dict__["ranks"] = [cut(block, plan, rank) for rank in range(RANKS)]

    def forward(self, x: Tensor, *more: Any) -> Any:
        outputs = [rank(x, *more) for rank in self.ranks]
        if isinstance(outputs[0], Tensor):
            return sum(outputs)
        self.states = [state for _, state in outputs]
        return sum(y for y, _ in outputs), None


def divided(model: HopeModel) -> HopeModel:
    """The model with every mixer and CMS level run by RANKS simulated ranks."""
    parallel = copy.copy(model)
    parallel._modules = dict(model._modules)
    parallel.layers = nn.ModuleList()
    for layer in model.layers:
        one = copy.copy(layer)
        one._modules = dict(layer._modules)
        one.mixer = Summed(layer.mixer, layer.mixer.shard_plan())
        one.cms = copy.copy(layer.cms)
        one.cms._modules = dict(layer.cms._modules)
        one.cms.levels = nn.ModuleList(
            Summed(level, level.shard_plan()) for level in layer.cms.levels
        )
        parallel.layers.append(one)
    return parallel


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> HopeModel:
    return HopeModel(MODELS[request.param]).double()


def test_every_parameter_is_placed_exactly_once(model: HopeModel) -> None:
    plan = model.shard_plan()
    assert plan.keys() == dict(model.named_parameters()).keys()
    for number, layer in enumerate(model.layers):
        for name, block in (("mixer", layer.mixer), ("cms", layer.cms)):
            assert block.shard_plan().keys() == dict(block.named_parameters()).keys()
            own = within(f"layers.{number}.{name}", block.shard_plan())
            assert own.items() <= plan.items()
    replicated = {name for name, place in plan.items() if isinstance(place, Replicate)}
    assert all(name.endswith(("norm.weight", "cms.mixing")) for name in replicated)
    for name, parameter in model.named_parameters():
        parts = [local_part(parameter, plan[name], rank, RANKS) for rank in range(RANKS)]
        if name in replicated:
            assert all(part is parameter for part in parts)
        else:
            assert torch.equal(torch.cat(parts, plan[name].dim), parameter)


def test_the_ranks_add_up_to_the_whole(model: HopeModel) -> None:
    """Logits and every gradient to 1e-10 in float64."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 18, (2, 21), generator=generator)
    starts = torch.zeros(2, 21, dtype=torch.bool)
    starts[1, 8] = True
    weigh = torch.randn(2, 21, 18, generator=generator, dtype=torch.float64)
    parallel = divided(model)
    results = []
    for one in (model, parallel):
        logits, _ = one(tokens, None, starts)
        (logits * weigh).sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
        model.zero_grad()
    (whole, expected), (summed, actual) = results
    torch.testing.assert_close(summed, whole, rtol=1e-10, atol=1e-10)
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None
            continue
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_a_ranks_state_is_its_part_of_the_whole_state(model: HopeModel) -> None:
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    for layer in model.layers:
        mixer, parallel = layer.mixer, Summed(layer.mixer, layer.mixer.shard_plan())
        spec = mixer.state_spec(2, decoding=True, tokens=21)
        _, whole = mixer(x, mixer.initial_state(2, decoding=True))
        for rank, part in enumerate(parallel.ranks):
            _, own = part(x, part.initial_state(2, decoding=True))
            for name, one in spec.items():
                expected, actual = whole, own
                for field in name.split("."):
                    expected, actual = getattr(expected, field), getattr(actual, field)
                place = Replicate() if one.shard_axis is None else Shard(one.shard_axis)
                expected = local_part(expected, place, rank, RANKS)
                torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_the_vocabulary_is_divided_by_token() -> None:
    """A masked lookup that is summed, and logits that are joined, are the whole model's."""
    model = HopeModel(MODELS["untied_independent"])
    plan, tokens = model.shard_plan(), torch.arange(18)
    found, logits = [], []
    hidden = torch.randn(4, 24)
    for rank in range(RANKS):
        table = local_part(model.embedding.weight, plan["embedding.weight"], rank, RANKS)
        own = tokens - rank * len(table)
        here = (own >= 0) & (own < len(table))
        found.append(embedding(own.where(here, 0), table) * here[:, None])
        head = local_part(model.head.weight, plan["head.weight"], rank, RANKS)
        logits.append(hidden @ head.T)
    assert torch.equal(sum(found), model.embedding(tokens))
    torch.testing.assert_close(torch.cat(logits, 1), model.head(hidden))


def test_sizes_that_divide_the_model() -> None:
    assert tensor_parallel_sizes(BASE) == (1, 2)
    assert tensor_parallel_sizes(replace(BASE, vocab_size=None)) == (1, 2, 4)
    check_tensor_parallel(BASE, 2)
    for size, words in ((3, "num_heads=4"), (4, "vocab_size=18"), (0, "num_heads=4")):
        with pytest.raises(ValueError, match=f"{size} ranks.*{words}; this model allows 1, 2$"):
            check_tensor_parallel(BASE, size)
    narrow = CMSConfig(levels=(LevelConfig(name="c", hidden_size=7),))
    with pytest.raises(ValueError, match="hidden_size of CMS level 'c'=7"):
        check_tensor_parallel(replace(BASE, cms=narrow), 2)
    with pytest.raises(ValueError, match=r"axis 1 of \[2, 3\] can't be divided over 2 ranks"):
        local_part(torch.zeros(2, 3), Shard(1), 0, 2)
