"""The CUDA kernels, as loops on the CPU (`on_host.py`), against the float64 token loop; as compiled
code they are tests/tools/test_ptx.py's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from hope.scan import ScanConfig, chosen, scan
from hope.scan.cuda import device
from hope.scan.cuda.call import Options, record_size, shared_bytes
from hope.scan.cuda.device import why_not
from hope.scan.cuda.nvrtc import compiled, library
from tests.hope.scan import on_host as host
from tests.hope.scan.cases import OnGpu, Problem, everything, make_problem, worst_error
from tests.hope.scan.on_host import on_host

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not host.COMPILER, reason="there is no C++ compiler")

RULES = ("normalised", "target", "input", "off")
RESETS = ((0, 32), (1, 0))


def check_parity(problem: Problem, config: ScanConfig, tolerance: float = 1e-11) -> None:
    expected = everything(problem, replace(config, implementation="reference"))
    with on_host():
        actual = everything(problem, replace(config, implementation="cuda"))
    error, name = worst_error(expected, actual)
    assert error < tolerance, f"{name} is off by {error:.1e}"


def problem(tokens: int = 37, **options: object) -> Problem:
    return make_problem(**{"rows": 2, "heads": 1, "tokens": tokens, "width": 64, **options})  # type: ignore


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay_to", ["initial", "zero"])
@pytest.mark.parametrize("read", ["causal", "chunk_start"])
def test_every_option(rule: str, decay_to: str, read: str) -> None:
    """With resets and a partial last chunk, in three segments; blocks of 32 in the memories that
    project, of 16 in M_mem; six memories and a carried state half the time."""
    number = RULES.index(rule)
    eta_max = 0.5 if rule in ("normalised", "target") else 0.1
    config = ScanConfig(16, 32, eta_max, rule, decay_to, read, checkpoint_chunks=1)  # type: ignore
    memories = 5 + (number + (decay_to == "zero")) % 2
    with_state = (number // 2 + (read == "causal")) % 2 == 0
    check_parity(problem(69, memories=memories, with_state=with_state, resets=RESETS), config)


@pytest.mark.parametrize(
    ("chunks", "checkpoint_chunks", "shape"),
    [
        ((16, 16), 2, {"tokens": 5}),
        ((16, 16), 1, {"tokens": 40, "heads": 3}),
        ((16, 48), 1, {"tokens": 60, "rows": 1}),
        ((16, 64), 2, {"tokens": 200, "rows": 1, "with_state": False}),
        ((32, 64), None, {"tokens": 70, "resets": ((0, 64),)}),
        ((48, 48), 1, {"tokens": 65, "rows": 1}),
        ((64, 64), 1, {"tokens": 130, "rows": 1}),
        ((64, 128), 1, {"tokens": 150, "rows": 1, "memories": 6}),
    ],
)
def test_shapes_and_chunks(
    chunks: tuple[int, int], checkpoint_chunks: int | None, shape: dict
) -> None:
    """Blocks that share a frozen state, or do not; chunks cut short in every place."""
    check_parity(problem(**shape), ScanConfig(*chunks, checkpoint_chunks=checkpoint_chunks))


@pytest.mark.parametrize("seed", range(3))
def test_random_shapes(seed: int) -> None:
    draw = random.Random(seed)
    memory = draw.choice((16, 32))
    config = ScanConfig(
        memory, memory * draw.choice((1, 2, 3)), draw.uniform(0.1, 1),
        checkpoint_chunks=draw.choice((1, 2, None)),
    )  # fmt: skip
    shape = {
        "rows": draw.randint(1, 2), "heads": draw.randint(1, 2), "tokens": draw.randint(1, 150),
        "seed": seed,
    }  # fmt: skip
    check_parity(problem(**shape), config)


def test_memory_that_nothing_has_written_is_not_used() -> None:
    """Shared memory is NaN at first in any case."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        assert torch.zeros(1).new_empty(1).isnan().all()
        config = ScanConfig(16, 32, checkpoint_chunks=1)
        check_parity(problem(69, memories=6, resets=RESETS), config)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rule", RULES)
def test_in_bfloat16(rule: str) -> None:
    """Operands rounded as on a device: everything to bfloat16's own accuracy, but for one number a
    head, the gradient of alpha's bias, a sum in which much cancels."""
    eta_max = 0.5 if rule in ("normalised", "target") else 0.1
    config = ScanConfig(16, 64, eta_max, rule, checkpoint_chunks=2)  # type: ignore[arg-type]
    rounded = problem(150, with_state=False).to(torch.bfloat16)
    expected = everything(rounded.to(torch.float64), replace(config, implementation="chunked"))
    with on_host(torch.bfloat16):
        actual = everything(rounded, replace(config, implementation="cuda"))
    assert worst_error(expected, actual)[0] < 0.1
    for results in (expected, actual):
        del results["d weights.b_alpha"]
    error, name = worst_error(expected, actual)
    assert error < 0.01, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("kernel", ["write_forward", "write_backward"])
@pytest.mark.parametrize(
    ("block", "read", "initial"), [(16, 1, True), (32, 0, True), (32, 1, False), (16, 2, False)]
)
def test_shared_memory_is_what_a_program_takes(
    kernel: str, block: int, read: int, initial: bool
) -> None:
    options = Options(1, block, 0, read, initial, False, False)
    functions = host.library(options, host.ROUNDED)
    taken = getattr(functions, kernel.split("_")[1] + "_bytes")()
    assert shared_bytes(kernel, options) == taken
    assert record_size(block, ("", "causal", "chunk_start")[read]) == functions.record_size()
    if read == 0:
        # Two programs, and a kilobyte of each that the device keeps, in an H100's 228 KB.
        assert 2 * (taken + 1024) <= 228 * 1024


def test_what_it_does_not_take_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_why_not_on", lambda index: "")
    bf16 = torch.bfloat16
    assert not why_not(OnGpu(64, bf16), 64, 16)  # type: ignore[arg-type]
    for x, hidden, chunk, said in (
        (OnGpu(64, torch.float32), 64, 16, "activations are float32, not bfloat16"),
        (OnGpu(128, bf16), 128, 16, "memories are 128 x 128, not 64 x 64"),
        (OnGpu(64, bf16), 128, 16, "memories are 64 x 128, not 64 x 64"),
        (OnGpu(64, bf16), 64, 8, "memory_chunk is 8, not a multiple of 16"),
        (torch.zeros(1, 1, 1, 64), 64, 16, "x is on the CPU"),
    ):
        assert why_not(x, hidden, chunk) == said  # type: ignore[arg-type]
    p = problem(16)
    with pytest.raises(
        ValueError, match="implementation=cuda can't be used: x is on the CPU; take"
    ):
        scan(p.x, p.q, p.weights, ScanConfig(implementation="cuda"))


def test_auto_takes_the_fastest_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_why_not_on", lambda index: "")
    monkeypatch.setattr("hope.scan.triton.shared_memory", lambda index: 232_448)
    auto, bf16 = ScanConfig(), torch.bfloat16
    for width, hidden, dtype, kind in (
        (64, 64, bf16, "cuda"),
        (64, 64, torch.float32, "triton"),
        (64, 128, bf16, "triton"),
        (128, 128, bf16, "triton"),
    ):
        assert chosen(OnGpu(width, dtype), hidden, auto) == kind  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="chunked instead of triton: heads are 80 wide"):
        assert chosen(OnGpu(80, bf16), 80, auto) == "chunked"  # type: ignore[arg-type]
    old = "the device (A100) is older than an H100"
    monkeypatch.setattr(device, "_why_not_on", lambda index: old)
    assert chosen(OnGpu(64, bf16), 64, auto) == "triton"  # type: ignore[arg-type]


@pytest.mark.skipif(isinstance(library(), str), reason=f"{library()}")
def test_what_the_compiler_says_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match=r"program\.h\(\d+\): error"):
        compiled(["-DTOKENS=oops"])
