"""megatron-core's tensor-parallel layers against ours and against one process."""

from __future__ import annotations

from typing import Any

import pytest

from tools.parity import Trace, make_config, trained, worst_error
from tools.processes import run
from train.config import ConfigError, RunConfig
from train.engines import layout_of, open_engine
from train.parallel.ranks import Ranks

TP = {"tp": 2}
MEGATRON = {"tp": 2, "tensor_backend": "megatron"}

Cases = list[tuple[str, dict[str, Any], dict[str, Any]]]
CASES: Cases = [
    ("hope", {}, {"model.tie_embeddings": True}),
    ("hope-attention", {"micro_batches": 2}, {"model.tie_embeddings": False}),
]
MORE: Cases = [
    ("transformer", {}, {}),
    ("hope", {"activation_checkpointing": "full"}, {}),
    ("hope-attention", {"micro_batches": 4}, {}),
]
ON_FOUR: Cases = [
    ("hope-attention", {"dp_shard": 2, "dp_replicate": 1}, {}),
    ("hope", {"pp": 2, "micro_batches": 2}, {}),
]


def all_trained(rank: int, configs: list[RunConfig]) -> list[Trace]:
    return [trained(rank, config, 6) for config in configs]


def check(ranks: int, cases: Cases) -> None:
    """Megatron's layers, and ours in the same layout, train as one process does."""
    configs = [
        make_config(model, {**tp, **parallel}, **changes)
        for model, parallel, changes in cases
        for tp in (MEGATRON, TP)
    ]
    found = run(ranks, all_trained, configs, seconds=300)
    errors = []
    for number, (model, _, changes) in enumerate(cases):
        expected = trained(0, make_config(model, **changes), 6)
        theirs, ours = ([one[2 * number + which] for one in found] for which in (0, 1))
        errors += [worst_error(theirs, expected), worst_error(ours, expected)]
        errors += [worst_error([a], b) for a, b in zip(theirs, ours, strict=True)]
    assert max(errors) <= 1e-5, errors


def test_two_ranks() -> None:
    check(2, CASES)


@pytest.mark.slow
def test_two_ranks_more() -> None:
    check(2, MORE)


@pytest.mark.slow
def test_four_ranks() -> None:
    check(4, ON_FOUR)


def layers_of(rank: int, config: RunConfig) -> list[str]:
    (part,) = open_engine(config, Ranks()).parts  # type: ignore[attr-defined]
    bases = [
        f"{base.__module__}.{base.__name__}"
        for module in part.model.modules()
        for base in type(module).__mro__
    ]
    return [base for base in bases if base.startswith("megatron.")]


def test_the_layers_are_megatrons_own() -> None:
    """A mixer of Titans: three projections in, one out; a level: two matrices in, one out."""
    for layers in run(2, layers_of, make_config("hope", MEGATRON)):
        where = "megatron.core.tensor_parallel.layers."
        assert layers.count(f"{where}ColumnParallelLinear") == 4 * (3 + 3 * 2)
        assert layers.count(f"{where}RowParallelLinear") == 4 * (1 + 3)
        assert layers.count(f"{where}VocabParallelEmbedding") == 1


@pytest.mark.parametrize(
    ("parallel", "reason"),
    [
        ({"tensor_backend": "megatron"}, "needs tp above 1"),
        ({**MEGATRON, "sequence_parallel": True}, "megatron-core divides axis 0"),
        ({**MEGATRON, "activation_checkpointing": "selective"}, "adds up in place"),
        ({**MEGATRON, "compile": True}, "compile is tensor_backend=native's"),
    ],
)
def test_what_can_not_be(parallel: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        layout_of(make_config("hope", parallel), 2)
