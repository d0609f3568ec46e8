"""The tools for GPUs, as far as they go without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hope.flops import forward_products
from hope.scan import MemoryState, ScanConfig, ScanWeights, scan
from hope.scan.cuda.nvrtc import library
from hope.scan.triton import HEAD_WIDTHS, padded, why_not
from tests.hope.scan.cases import OnGpu
from tests.test_sizes import twin_of
from tools import bench_gpu, compile_kernels, kernel_costs, kernel_parity
from tools.kernel_costs import Shape
from train.config import load_config

SPILLS = {
    "write_forward_d128_h256_c32_bf16": 600,
    "write_backward_mem_d64_h64_c16_bf16": 570,
    "cuda_write_backward_d64_h64_c32_bf16": 410,
    "cuda_write_backward_d128_h128_c32_bf16": 320,
}
"""Bytes a thread that a kernel may spill: what it does now, and a bit; the others, nothing."""
NVRTC = pytest.mark.skipif(isinstance(library(), str), reason=f"{library()}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "bench_gpu: this machine has no CUDA device that torch can use\n"


def test_memory_that_ends_within_a_capture_is_memory_that_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the step is tried in micro-batches; what else fails in a capture is an error still."""

    def capture(step: object) -> None:
        try:
            raise failure
        finally:
            raise RuntimeError("CUDA error: capturing stream has unjoined work")

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(bench_gpu, "as_graph", capture)
    x = torch.zeros(2, 3)
    failure: RuntimeError = torch.OutOfMemoryError("CUDA out of memory")
    assert bench_gpu.timed(torch.nn.Identity, x, 1, "graph") is None
    failure = RuntimeError("CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError, match="unjoined"):
        bench_gpu.timed(torch.nn.Identity, x, 1, "graph")


@pytest.mark.parametrize("size", ["340m", "760m", "1b3"])
def test_the_twin_that_is_timed_is_the_configurations_own(size: str) -> None:
    config = load_config(Path("configs") / f"{size}.yaml").model
    variants = bench_gpu.variants(config, bench_gpu.MLP_OF_TWIN[size])
    assert variants["hope"] == config
    assert variants["hope_attention"].cms == config.cms
    mlp = [level.hidden_size for level in twin_of(size).model.cms.levels]
    assert [level.hidden_size for level in variants["transformer"].cms.levels] == mlp
    assert set(variants["transformer"].mixers) == set(variants["hope_attention"].mixers)


@pytest.mark.parametrize("case", kernel_parity.SCAN_CASES, ids=lambda case: case.key)
def test_parity_is_against_the_same_problem(case: kernel_parity.ScanCase) -> None:
    """On a CPU, in float64: the two implementations that run there agree, with all that a case has
    (narrower)."""
    narrow = replace(case, width=8, hidden=8 * case.hidden // case.width)
    call, leaves = kernel_parity.scan_call(narrow, 2, 1, 136, "cpu")
    assert len(leaves) == (10 if case.state else 8)
    outputs, gradients = kernel_parity.results(call, leaves, "torch", torch.float64)
    assert all(float(z.abs().max()) > 0 for z in gradients)
    loop = replace(narrow.config, implementation="reference")
    reset = torch.zeros(2, 136, dtype=torch.bool)
    reset[-1, loop.projection_chunk] = case.resets
    own = [z.detach().double().requires_grad_() for z in leaves]
    state = MemoryState(*own[8:]) if case.state else None
    out, final = scan(own[0], own[1], ScanWeights(*own[2:8]), loop, state, reset)
    total = sum(kernel_parity.ramp_loss(z) for z in (out, *final))
    expected = torch.autograd.grad(total, own)
    assert kernel_parity.worst(outputs, [out.detach(), *(z.detach() for z in final)]) < 1e-9
    assert kernel_parity.worst(gradients, list(expected)) < 1e-8


@pytest.mark.parametrize("width", [64, 128])
def test_operations_of_the_kernels_are_those_of_the_scan(width: int) -> None:
    config = ScanConfig(64, 64)
    costs = kernel_costs.kernel_costs(config, Shape(2, 3, 256, width, width))
    products = forward_products(config, width, width, 5, 64)
    whole = 2 * 2 * 3 * 4 * sum(products.values())
    forward = [cost.flops for name, cost in costs.items() if name.startswith("forward")]
    # M_mem's blocks are its own, and so is W2's system there, one of six in the table.
    again = 2 * 2 * 3 * 4 * (64 * 64 * width + products["write: inverses"] // 6)
    assert sum(forward) == pytest.approx(whole + again, rel=1e-9)
    assert all(cost.floor > 0 for cost in costs.values())


def test_the_fused_kernels_run_and_have_a_cost() -> None:
    """What is timed on a GPU, on a CPU: torch's operators against themselves in float64."""
    pytest.importorskip("triton")
    import hope.fused.kernels

    shape = Shape(1, 2, 3, 8, 8)
    for _, call, leaves in kernel_parity.fused_calls(shape, "cpu", vocabulary=100):
        expected = kernel_parity.results(call, leaves, "torch", torch.float64)
        actual = kernel_parity.results(call, leaves, "torch", torch.float32)
        for one, exact in zip(actual, expected, strict=True):
            assert kernel_parity.worst(one, exact) < 1e-5
    costs = kernel_costs.fused_costs(shape, 100)
    assert all(hasattr(hope.fused.kernels, name.partition(": ")[2]) for name in costs)
    assert costs["forward: cross_entropy_forward"].bytes == 3 * 100 * 2
    assert costs["backward: gated_norm_backward"].bytes == 5 * 3 * 16 * 2
    assert costs["backward: convolve_backward"].bytes == 3 * 3 * 16 * 2


def test_the_table_in_the_documentation_is_what_the_tool_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert kernel_costs.main([]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    text = Path("docs/gpu.md").read_text()
    for words in printed:
        cells = [" ".join(words[:2]), *words[2:]]
        assert f"| {' | '.join(cells)} |" in text


@pytest.mark.parametrize(
    "arguments", [["--rows", "0"], ["--vocabulary", "0"], ["--chunks", "16", "40"]]
)
def test_bad_sizes_of_the_table(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        kernel_costs.main(arguments)
    assert error.value.code == 2


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("write_forward_d128_h256_c32_bf16", marks=pytest.mark.slow),
        pytest.param("write_backward_mem_d64_h64_c16_bf16", marks=pytest.mark.slow),
        pytest.param("gated_norm_backward_d64_bf16", marks=pytest.mark.slow),
        pytest.param("convolve_backward_bf16", marks=pytest.mark.slow),
        pytest.param("cross_entropy_backward_bf16", marks=pytest.mark.slow),
        pytest.param("cuda_write_backward_d64_h64_c32_bf16", marks=[NVRTC, pytest.mark.slow]),
        pytest.param("cuda_write_backward_d128_h128_c32_bf16", marks=NVRTC),
    ],
)
def test_kernels_compile_for_an_h100(key: str, tmp_path: Path) -> None:
    """In a process of its own, where kernels are not interpreted."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "tools.compile_kernels", "--only", key],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "runs/bench/kernels.json").read_text())["figures"]
    assert 8 < figures[f"registers_{key}"] <= 255
    assert figures[f"spill_bytes_{key}"] <= SPILLS.get(key, 0)
    assert figures[f"shared_bytes_{key}"] <= 232_448


def test_a_kernel_that_does_not_fit_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compile_kernels, "why_not_compiled", lambda: "")
    report = compile_kernels.Report(255, 8, 16, 232_449, 1.0)
    monkeypatch.setattr(compile_kernels, "compile_case", lambda case: report)
    assert compile_kernels.main(["--only", "gated_norm_forward_d64_bf16"]) == 1
    error = "gated_norm_forward_d64_bf16: 232,449 B of 232,448 B shared\n"
    assert capsys.readouterr().err == error
    report = compile_kernels.Report(255, 8, 16, 232_448, 1.0)
    assert compile_kernels.main(["--only", "gated_norm_forward_d64_bf16"]) == 0


def test_everything_that_the_dispatcher_takes_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("hope.scan.triton.shared_memory", lambda device: 232_448)
    sizes = {
        (case.dtype, case.constants["D"], case.constants["H"])
        for case in compile_kernels.scan_cases(16)
    }
    taken = {
        (dtype, padded(width), padded(width * expansion))
        for dtype in (torch.bfloat16, torch.float32)
        for width in HEAD_WIDTHS
        for expansion in (1, 2, 4)
        if not why_not(OnGpu(width, dtype), width * expansion, ScanConfig())  # type: ignore[arg-type]
    }
    assert sizes == taken


def test_interpreted_kernels_are_not_compiled() -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "tools.compile_kernels", "--only", "write_forward_d64_h64_c32_b"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 2
    expected = "compile_kernels: kernels are interpreted: unset TRITON_INTERPRET to compile them\n"
    assert result.stderr == expected
