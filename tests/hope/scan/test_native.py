"""The C++ scan: what it computes regardless of threads, strides and old memory, what it counts, and
how it is compiled. Parity with the token loop stands in test_chunked.py, for both."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hope.native import build
from hope.scan import ScanConfig, ScanWeights, scan
from hope.scan.native import call, operators
from hope.scan.native.flops import call_products
from hope.scan.triton import warn_once
from tests.hope.scan.cases import everything, make_problem, run, worst_error

NO_SCAN = build.why_not()
pytestmark = pytest.mark.skipif(bool(NO_SCAN), reason=f"no native scan: {NO_SCAN}")
NATIVE = ScanConfig(16, 32, implementation="native")


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing compiled yet, and nothing said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    warn_once.cache_clear()
    yield tmp_path / "hope"
    build.load.cache_clear()


def test_threads_do_not_change_a_bit() -> None:
    """Not in the gradients either, and not where denormal numbers are flushed to zero."""
    problem = make_problem(rows=3, heads=2, tokens=70, width=16, resets=((1, 32),))
    assert problem.state is not None
    tiny = problem.to(torch.float32)
    assert tiny.state is not None
    tiny.state.w1.data.mul_(1e-38)
    for flushed in (False, True):
        results = []
        torch.set_flush_denormal(flushed)
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(everything(tiny, NATIVE))
        finally:
            torch.set_num_threads(1)
            torch.set_flush_denormal(False)
        for name, z in results[0].items():
            assert all(torch.equal(z, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("checkpoint_chunks", [1, 20])
@pytest.mark.parametrize("memories", [5, 6])
def test_nothing_is_read_that_was_not_written(
    memories: int, checkpoint_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(tokens=75, width=10, memories=memories, resets=((0, 32),))
    config = replace(NATIVE, checkpoint_chunks=checkpoint_chunks)
    expected = everything(problem, config)
    honest = Tensor.new_empty

    def poisoned(like: Tensor, *args: object, **kwargs: object) -> Tensor:
        made = honest(like, *args, **kwargs)  # type: ignore[arg-type]
        made.view(torch.uint8).fill_(0xFF)  # NaN in every dtype
        return made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    actual = everything(problem, config)
    for name, z in expected.items():
        assert torch.equal(z, actual[name]), name


def test_tokens_may_lie_anywhere() -> None:
    """As the mixer has them: heads beside each other in a token, and not all of a tensor's."""
    problem = make_problem(rows=2, heads=3, tokens=40, width=8, with_state=False)
    expected = everything(problem, NATIVE)

    def inside(z: Tensor) -> Tensor:
        rows, heads, tokens, width = z.shape
        whole = z.new_full((rows, tokens + 3, heads + 1, width), float("nan"))
        whole[:, 2:-1, 1:] = z.detach().transpose(1, 2)
        return whole[:, 2:-1, 1:].transpose(1, 2).requires_grad_()

    actual = everything(problem._replace(x=inside(problem.x), q=inside(problem.q)), NATIVE)
    for name, z in expected.items():
        assert torch.equal(z, actual[name]), name


def test_nan_goes_where_it_must() -> None:
    """Into what comes after its block and into no other row."""
    problem = make_problem(rows=2, heads=1, tokens=64, width=16, with_state=False)
    x = problem.x.detach().clone()
    x[1, 0, 20, 3] = float("nan")
    out, state = run(problem._replace(x=x.requires_grad_()), NATIVE)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    for z in (out[0], out[1, :, :16], state.w1[:, 0], gradient[0]):
        assert z.isfinite().all()
    for z in (out[1, :, 32:], state.w1[:, 1], gradient[1, :, 20]):
        assert z.isnan().all()


@pytest.mark.parametrize("rule", ["normalised", "target", "input", "off"])
@pytest.mark.parametrize("decay_to", ["initial", "zero"])
@pytest.mark.parametrize("read", ["causal", "chunk_start"])
@pytest.mark.parametrize(
    ("chunks", "tokens", "width", "expansion", "memories"),
    [
        ((4, 8, 1), 21, 8, 2, 5),
        ((20, 40, 3), 203, 16, 1, 6),
        ((16, 64, None), 300, 20, 2, 5),
        ((64, 256, 1), 513, 16, 1, 6),
    ],
)
def test_products_are_those_declared(
    rule: str,
    decay_to: str,
    read: str,
    chunks: tuple[int, int, int | None],
    tokens: int,
    width: int,
    expansion: int,
    memories: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted by the library itself as it multiplies."""
    library = build.load("-DCOUNT_PRODUCTS")
    assert isinstance(library, ctypes.CDLL)
    library.hope_multiply_adds.restype = ctypes.c_int64
    monkeypatch.setattr(call, "load", lambda: library)
    config = ScanConfig(*chunks[:2], 0.1, rule, decay_to, read, chunks[2], "native")  # type: ignore
    problem = make_problem(1, 1, tokens, width, expansion, memories).to(torch.float32)
    out, state = run(problem, config)
    forward = library.hope_multiply_adds()
    (out.sum() + state.w1.sum()).backward()
    once, back, again = call_products(config, width, expansion * width, memories, tokens)
    assert (forward, library.hope_multiply_adds()) == (once, back + again)


def test_operators_are_what_torch_expects() -> None:
    problem = make_problem(tokens=20)
    assert problem.state is not None
    options = (16, 32, 0.5, "normalised", "initial", "causal", 1)
    inputs = (problem.x, problem.q, *problem.weights, *problem.state, None, *options)
    torch.library.opcheck(operators._scan_native, (*inputs, True))
    out, _, _, *saved = operators._scan_native(*inputs, True)
    detached = [z.detach() if isinstance(z, Tensor) else z for z in inputs]
    found = operators._scan_native_backward(out.detach(), None, None, *saved, *detached)
    assert [z.shape for z in found] == [z.shape for z in problem.leaves().values()]


@pytest.mark.parametrize("capability", ["default", pytest.param("avx2", marks=pytest.mark.slow)])
def test_other_processors(capability: str) -> None:
    """What older processors have: other registers, the same numbers."""
    if capability == "avx2" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor has no AVX2")
    code = """
from dataclasses import replace
import torch
from tests.hope.scan.cases import everything, make_problem, worst_error
from tests.hope.scan.test_native import NATIVE
problem = make_problem(tokens=70, width=20, memories=6, resets=((1, 32),))
expected = everything(problem, replace(NATIVE, implementation="chunked"))
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
    error, name = worst_error(expected, everything(problem.to(dtype), NATIVE))
    assert error < tolerance, (dtype, error, name)
print(torch.backends.cpu.get_cpu_capability())
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().lower() == capability


def test_without_a_compiler(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto says it once and goes on; native is refused in a line."""
    problem = make_problem(tokens=20)
    auto = replace(NATIVE, implementation="auto")
    expected = everything(problem, replace(NATIVE, implementation="chunked"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="chunked instead of native: there is no C\\+\\+ compiler"):
        actual = everything(problem, auto)
    assert worst_error(expected, actual)[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything(problem, auto)
    with pytest.raises(
        ValueError, match=r"^scan: implementation=native can't be used: there is no"
    ):
        everything(problem, NATIVE)
    assert not fresh_cache.exists()


@pytest.mark.parametrize("before", ["", "sh "])
def test_a_compiler_that_fails(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """`CXX` may be several words, as make understands it: `ccache g++`."""
    broken = fresh_cache.parent / "broken"
    broken.write_text("#!/bin/sh\necho 'error: no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", f"{before}{broken}")
    assert build.why_not() == f"it could not be compiled: {before}{broken}: error: no such flag"
    assert [path.name for path in fresh_cache.iterdir()] == ["lock"]


@pytest.mark.slow
def test_compiled_once_and_again_when_damaged(tmp_path: Path) -> None:
    """By processes that start together, too; a process that was killed holds nobody up."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from hope.native.build import why_not; print(why_not())"]

    def compiled(processes: int = 1) -> Path:
        started = [subprocess.Popen(command, env=environment, stdout=-1) for _ in range(processes)]
        assert [one.communicate()[0] for one in started] == [b"\n"] * processes
        (made,) = (tmp_path / "hope").glob("*.so")
        assert {path.name for path in made.parent.iterdir()} == {made.name, "lock"}
        return made

    killed = subprocess.Popen(command, env=environment)
    while not list(tmp_path.glob("hope/.compiling-*")):
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    made = compiled(processes=2)
    at_first = made.stat()
    assert compiled().stat().st_mtime_ns == at_first.st_mtime_ns
    made.write_bytes(b"damaged")
    assert compiled().stat().st_size == at_first.st_size


@pytest.mark.slow
def test_without_a_place_to_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    build.load.cache_clear()
    try:
        assert build.why_not() == ""
        problem = make_problem(tokens=20)
        everything(problem, NATIVE)
    finally:
        build.load.cache_clear()
    assert list(tmp_path.iterdir()) == [file]


def test_other_devices_are_refused() -> None:
    x = torch.empty(1, 1, 4, 8, device="meta")
    weights = ScanWeights(*(x.new_empty(5, 1, 8, 8),) * 2, *(x.new_empty(1, 8), x.new_empty(1)) * 2)
    with pytest.raises(ValueError, match="native can't be used: x is on meta, not on a CPU"):
        scan(x, x, weights, NATIVE)
