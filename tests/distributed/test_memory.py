"""The dry run's peak memory, against the resident set's high-water mark in real steps."""

from __future__ import annotations

from typing import Any

import pytest

from tools.peak_memory import CASES, DEEPSPEED_CASES, prediction_errors

QUICK = [0, 8, 10, 14]
"""One process, tensor, pipeline and sharded data parallel; the rest is for `make test-slow`."""
QUICK_DEEPSPEED = 16
"""ZeRO 3 on two processes, with more parameters than activations."""


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
        pytest.param(*case, marks=[] if number == QUICK_DEEPSPEED else pytest.mark.slow)
        for number, case in enumerate(DEEPSPEED_CASES)
    ],
)
def test_peak_memory_under_deepspeed_is_predicted_within_a_tenth(
    world: int, stage: int, parallel: dict[str, Any], model: dict[str, Any]
) -> None:
    assert max(map(abs, prediction_errors(world, parallel, stage, **model))) < 0.1
