"""The CUDA kernels, as loops on the CPU (`on_host.py`), against the float64 token loop; as compiled
code they are tests/tools/test_ptx.py's."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from hope.scan import ScanConfig, chosen, scan
from hope.scan.cuda import device, nvrtc
from hope.scan.cuda.call import (
    HIDDEN,
    Options,
    record_size,
    shared_bytes,
    stash_size,
    sums_size,
)
from hope.scan.cuda.device import why_not
from hope.scan.cuda.nvrtc import NAMES, candidates, compiled, library
from tests.hope.scan import on_host as host
from tests.hope.scan.cases import (
    RULES,
    OnGpu,
    Problem,
    every_option,
    everything,
    forgotten,
    make_problem,
    worst_error,
)
from tests.hope.scan.on_host import on_host

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not host.COMPILER, reason="there is no C++ compiler")

RESETS = ((0, 32), (1, 0))


def check_parity(problem: Problem, config: ScanConfig, tolerance: float = 1e-11) -> None:
    expected = everything(problem, replace(config, implementation="reference"))
    with on_host():
        actual = everything(problem, replace(config, implementation="cuda"))
    error, name = worst_error(expected, actual)
    assert error < tolerance, f"{name} is off by {error:.1e}"


def problem(tokens: int = 37, **options: object) -> Problem:
    return make_problem(**{"rows": 2, "heads": 1, "tokens": tokens, "width": 64, **options})  # type: ignore


@pytest.mark.parametrize(
    ("rule", "decay_to", "read"),
    every_option(
        ("zero", "chunk_start"),
        ("initial", "causal"),
        ("zero", "causal"),
        ("initial", "chunk_start"),
    ),
)
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
    ("rule", "decay_to", "read", "memories"),
    [
        ("normalised", "initial", "causal", 6),
        *(
            pytest.param(*options, marks=pytest.mark.slow)
            for options in (
                ("target", "zero", "chunk_start", 5),
                ("input", "zero", "causal", 5),
                ("off", "initial", "chunk_start", 6),
                ("target", "initial", "causal", 6),
                ("normalised", "zero", "chunk_start", 5),
                ("input", "initial", "chunk_start", 6),
                ("off", "zero", "causal", 5),
            )
        ),
    ],
)
@pytest.mark.parametrize(
    ("width", "expansion"), [(64, 2), pytest.param(128, 1, marks=pytest.mark.slow)]
)
def test_memories_of_two_shards(
    width: int, expansion: int, rule: str, decay_to: str, read: str, memories: int
) -> None:
    """A memory's hidden features over two programs, which add up what each has of a sum."""
    eta_max = 0.5 if rule in ("normalised", "target") else 0.1
    config = ScanConfig(16, 32, eta_max, rule, decay_to, read, checkpoint_chunks=1)  # type: ignore
    shape = {"width": width, "expansion": expansion, "memories": memories, "resets": RESETS}
    check_parity(problem(69, with_state=memories == 5, **shape), config)


@pytest.mark.parametrize(
    ("chunks", "width"), [((16, 16), 96), pytest.param((64, 64), 128, marks=pytest.mark.slow)]
)
def test_heads_of_128(chunks: tuple[int, int], width: int) -> None:
    """... and of 96, which are run as such; with blocks that share a frozen state."""
    config = ScanConfig(*chunks, checkpoint_chunks=1)
    check_parity(problem(75, width=width, rows=1, resets=((0, 64),)), config)


@pytest.mark.parametrize(
    ("chunks", "checkpoint_chunks", "shape"),
    [
        ((32, 64), None, {"tokens": 70, "resets": ((0, 64),)}),
        ((48, 48), 1, {"tokens": 65, "rows": 1}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((16, 16), 2, {"tokens": 5}),
                ((16, 64), 2, {"tokens": 200, "rows": 1, "with_state": False}),
                ((16, 16), 1, {"tokens": 40, "heads": 3}),
                ((16, 48), 1, {"tokens": 60, "rows": 1}),
                ((64, 64), 1, {"tokens": 130, "rows": 1}),
                ((64, 128), 1, {"tokens": 150, "rows": 1, "memories": 6}),
            )
        ),
    ],
)
def test_shapes_and_chunks(
    chunks: tuple[int, int], checkpoint_chunks: int | None, shape: dict
) -> None:
    """Blocks that share a frozen state, or do not; chunks cut short in every place."""
    check_parity(problem(**shape), ScanConfig(*chunks, checkpoint_chunks=checkpoint_chunks))


@pytest.mark.parametrize("seed", [0, *(pytest.param(z, marks=pytest.mark.slow) for z in (1, 2))])
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


def test_memories_that_are_forgotten() -> None:
    """|act(W2 k)| is below the floor of its norm, but the length in W1's step has no floor."""
    forgetful = forgotten(problem(52, rows=1, with_state=False), 0.5)
    check_parity(forgetful, ScanConfig(16, 32, decay_to="zero"))


def test_memory_that_nothing_has_written_is_not_used() -> None:
    """Shared memory is NaN at first in any case."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        assert torch.zeros(1).new_empty(1).isnan().all()
        config = ScanConfig(16, 32, checkpoint_chunks=1)
        check_parity(problem(69, memories=6, resets=RESETS), config)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("rule", "expansion"),
    [
        *(pytest.param(z, 1, marks=() if z == "normalised" else pytest.mark.slow) for z in RULES),
        pytest.param("normalised", 2, marks=pytest.mark.slow),
    ],
)
def test_in_bfloat16(rule: str, expansion: int) -> None:
    """Operands rounded as on a device: everything to bfloat16's own accuracy, but for one number a
    head, the gradient of alpha's bias, a sum in which much cancels."""
    eta_max = 0.5 if rule in ("normalised", "target") else 0.1
    config = ScanConfig(16, 64, eta_max, rule, checkpoint_chunks=2)  # type: ignore[arg-type]
    rounded = problem(150, with_state=False, expansion=expansion).to(torch.bfloat16)
    expected = everything(rounded.to(torch.float64), replace(config, implementation="chunked"))
    with on_host(torch.bfloat16):
        actual = everything(rounded, replace(config, implementation="cuda"))
    assert worst_error(expected, actual)[0] < 0.1
    for results in (expected, actual):
        del results["d weights.b_alpha"]
        if expansion == 2:
            del results["d weights.b_eta"]  # `chunked` in bfloat16 is 0.011 off too
    error, name = worst_error(expected, actual)
    assert error < (0.01 if expansion == 1 else 0.015), f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("kernel", ["write_forward", "write_backward"])
@pytest.mark.parametrize(
    ("block", "read", "initial"),
    [
        (32, 0, True),
        (32, 1, False),
        pytest.param(16, 1, True, marks=pytest.mark.slow),
        pytest.param(16, 2, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("width", "hidden"),
    [(64, 64), pytest.param(64, 128, marks=pytest.mark.slow), (128, 128)],
)
def test_shared_memory_is_what_a_program_takes(
    kernel: str, block: int, read: int, initial: bool, width: int, hidden: int
) -> None:
    options = Options(1, block, 0, read, initial, False, False, hidden // HIDDEN, width)
    functions = host.library(options, host.ROUNDED)
    taken = getattr(functions, kernel.split("_")[1] + "_bytes")()
    assert shared_bytes(kernel, options) == taken
    reading = ("", "causal", "chunk_start")[read]
    assert record_size(block, reading, width) == functions.record_size()
    assert stash_size(width) * block == functions.stash_size()
    assert sums_size(block, width) == functions.sums_size()
    if read == 0:
        # 512 threads, and a kilobyte of each program that the device keeps, in an H100's 228 KB.
        assert 128 // width * (taken + 1024) <= 228 * 1024


def test_what_it_does_not_take_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_why_not_on", lambda *device: "")
    bf16 = torch.bfloat16
    for width, hidden in ((64, 64), (64, 128), (96, 96), (128, 128)):
        assert not why_not(OnGpu(width, bf16), hidden, 16)  # type: ignore[arg-type]
    for x, hidden, chunk, said in (
        (OnGpu(64, torch.float32), 64, 16, "activations are float32, not bfloat16"),
        (OnGpu(128, bf16), 256, 16, "memories are 128 x 256, not of 64 x 64, 64 x 128, 128 x 128"),
        (OnGpu(80, bf16), 80, 16, "memories are 80 x 80, not of 64 x 64, 64 x 128, 128 x 128"),
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
    monkeypatch.setattr(device, "_why_not_on", lambda *device: "")
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
    monkeypatch.setattr(device, "_why_not_on", lambda *device: old)
    assert chosen(OnGpu(64, bf16), 64, auto) == "triton"  # type: ignore[arg-type]


@pytest.mark.skipif(isinstance(library(), str), reason=f"{library()}")
def test_what_the_compiler_says_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match=r"program\.h\(\d+\): error"):
        compiled(["-DTOKENS=oops"])


@pytest.mark.parametrize(("cuda", "first"), [("12.8", "12"), ("13.0", "13"), (None, "13")])
def test_the_compiler_is_of_torchs_own_cuda(
    cuda: str | None, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both installed: a driver of CUDA 12 loads nothing that CUDA 13's compiler makes."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    there = list(candidates(["/packages"]))
    assert there[:3] == [
        f"libnvrtc.so.{first}",
        f"/packages/cu13/lib/libnvrtc.so.{first}",
        f"/packages/cuda_nvrtc/lib/libnvrtc.so.{first}",
    ]
    assert {path.rpartition("/")[2] for path in there} == set(NAMES)


def test_both_halves_of_the_compiler_are_loaded_from_one_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NVRTC 13 finds the other one only where something has loaded it."""
    loaded = []

    class Library:
        def __init__(self, name: str) -> None:
            if not name.startswith("/cu13/"):
                raise OSError
            loaded.append(name)

        def nvrtcVersion(self, *numbers: Any) -> None:  # noqa: N802
            for number, value in zip(numbers, (13, 4), strict=True):
                number._obj.value = value

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", Library)
    monkeypatch.setattr(nvrtc, "candidates", lambda _: ["libnvrtc.so.13", "/cu13/libnvrtc.so.13"])
    nvrtc.library.__wrapped__()
    assert loaded == ["/cu13/libnvrtc.so.13", "/cu13/libnvrtc-builtins.so.13.4"]
