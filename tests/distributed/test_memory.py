"""The dry run's peak memory, against the resident set's high-water mark in real steps."""

from __future__ import annotations

from typing import Any

import pytest

from tools.peak_memory import CASES, DEEPSPEED_CASES, prediction_errors

QUICK = [0, 9, 11, 15]
"""One process, tensor, pipeline and sharded data parallel; the rest is for `make test-slow`."""
BFLOAT16_PRODUCTS = pytest.mark.xfail(
    reason="what bfloat16 products need on a CPU is not predicted (docs/deepspeed.md)", strict=False
)
TOO_SMALL = dict.fromkeys([9, 21, 27, 29, 31], BFLOAT16_PRODUCTS)
"""ZeRO in bfloat16: little memory, of which that is more than a tenth; of the last two on every
processor that was at hand, of the others (by 10 to 12 %) on one with AVX512-BF16."""


@pytest.mark.parametrize(
    ("world", "parallel", "model"),
    [
        pytest.param(*case, marks=[] if number in QUICK else pytest.mark.slow)
        for number, case in enumerate(CASES)
    ],
)
def test_peak_memory_is_predicted_within_a_tenth(
    world: int, parallel: dict[str, Any], model: dict[str, Any]
) -> None:
    assert max(map(abs, prediction_errors(world, parallel, **model))) < 0.1


@pytest.mark.parametrize(
    ("world", "stage", "parallel", "model"),
    [
        pytest.param(
            *case,
            marks=[pytest.mark.slow, *([TOO_SMALL[number]] if number in TOO_SMALL else [])],
        )
        for number, case in enumerate(DEEPSPEED_CASES)
    ],
)
def test_peak_memory_under_deepspeed_is_predicted_within_a_tenth(
    world: int, stage: int, parallel: dict[str, Any], model: dict[str, Any]
) -> None:
    assert max(map(abs, prediction_errors(world, parallel, stage, **model))) < 0.1
