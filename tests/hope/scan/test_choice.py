"""Which implementation takes a scan, and what is said where Triton's kernels can't."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from hope.scan import ScanConfig, scan
from hope.scan.triton import shared_memory, warn_once, why_not
from tests.hope.scan.cases import OnGpu, make_problem

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()


@pytest.mark.skipif(ON_GPU, reason="what kernels take on a CPU")
def test_what_the_kernels_do_not_take_is_said_in_one_line() -> None:
    p = make_problem(rows=2, heads=1, width=16)
    with pytest.raises(ValueError, match="memory_chunk is 8, not a multiple of 16") as error:
        scan(p.x, p.q, p.weights, ScanConfig(8, 16, implementation="triton"))
    assert "\n" not in str(error.value)


def test_what_the_dispatcher_takes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hope.scan.triton.shared_memory", lambda device: 232_448)
    taken = {
        (str(dtype), d, expansion, chunk)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
        for d in (32, 64, 96, 128, 256)
        for expansion in (1, 2, 3, 4)
        for chunk in (8, 16, 24, 64)
        if not why_not(OnGpu(d, dtype), d * expansion, ScanConfig(chunk, 192))  # type: ignore[arg-type]
    }
    assert taken == {
        (dtype, d, expansion, chunk)
        for dtype in ("torch.bfloat16", "torch.float32")
        for d in (64, 96, 128)
        for expansion in (1, 2, 4)
        for chunk in (16, 64)
    }


def test_a_device_of_little_shared_memory_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hope.scan.triton.shared_memory", lambda device: 101_376)
    taken = {
        (dtype, width): why_not(OnGpu(width, dtype), width, ScanConfig())  # type: ignore[arg-type]
        for dtype in (torch.bfloat16, torch.float32)
        for width in (64, 96, 128)
    }
    assert [key for key, reason in taken.items() if not reason] == [(torch.bfloat16, 64)]
    said = "161,792 B of shared memory are needed and this device has 101,376"
    assert taken[torch.bfloat16, 96] == said


def test_a_device_is_asked_for_its_shared_memory_without_a_graph_break(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = type("Properties", (), {"shared_memory_per_block_optin": 7})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def call(x: torch.Tensor) -> torch.Tensor:
        return x * shared_memory(x.device.index)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(2)).tolist() == [7, 7]


def test_falling_back_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            warn_once("a reason of this test")
    assert [str(one.message) for one in caught] == [
        "scan: chunked instead of triton: a reason of this test"
    ]


CALL = """
import sys, torch
sys.modules["triton"] = {triton}
from hope import HopeModel
from hope.scan import ScanConfig, ScanWeights, scan
shapes = ((5, 1, 16, 16), (5, 1, 16, 16), (1, 16), 1, (1, 16), 1)
weights = ScanWeights(*(torch.zeros(shape) for shape in shapes))
x = torch.randn(1, 1, 1, 16)
scan(x, x, weights, ScanConfig(16, 16))
try:
    scan(x, x, weights, ScanConfig(16, 16, implementation="triton"))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("triton", "words"),
    [
        (
            "__import__('triton')",
            "x is on the CPU, where kernels run under TRITON_INTERPRET=1 only",
        ),
        pytest.param("None", "triton is not installed", marks=pytest.mark.slow),
    ],
)
def test_where_there_is_nothing_to_run_kernels_on(triton: str, words: str) -> None:
    """hope and the scan work; asking for triton is one clear ValueError."""
    result = subprocess.run(
        [sys.executable, "-c", CALL.format(triton=triton)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    expected = f"scan: implementation=triton can't be used: {words}; take auto or chunked\n"
    assert result.stdout == expected
