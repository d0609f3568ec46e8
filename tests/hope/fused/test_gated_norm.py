"""RMSNorm and gate in one pass against their formula in float64."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hope import CMSConfig, HopeConfig, LevelConfig, TitansConfig
from hope.fused import convolution, gated_norm, gated_rms_norm
from hope.init import initialise
from hope.scan import ScanConfig
from hope.titans import SelfModifyingTitans
from tests.hope.fused.cases import (
    DEVICE,
    IN_DTYPES,
    KERNELS,
    ON_GPU,
    PRECISIONS,
    TOLERANCES,
    native,
    ramp_gradients,
    relative_error,
)

pytest.importorskip("triton")

EPS = 1e-3


class Inputs(NamedTuple):
    read: Tensor
    weight: Tensor
    gate: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(z.detach().to(DEVICE, dtype).requires_grad_() for z in self))


def make(rows: int = 2, heads: int = 3, tokens: int = 7, width: int = 5) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, heads, tokens, width), (heads, width), (rows, tokens, heads * width))
    parts = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Inputs(*(2 * part for part in parts))


def formula(read: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    length = (read.square().mean(-1, keepdim=True) + eps).sqrt()
    scaled = (read / length * weight.unsqueeze(1)).transpose(1, 2).flatten(2)
    return scaled * gate * torch.sigmoid(gate)


def results(function, inputs: Inputs, *options: object) -> list[Tensor]:
    return ramp_gradients(function(*inputs, EPS, *options), inputs)


def expected_of(inputs: Inputs) -> list[Tensor]:
    return results(formula, Inputs(*(z.detach().double().cpu().requires_grad_() for z in inputs)))


@pytest.mark.parametrize(("implementation", "dtype"), IN_DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 7, 5), (1, 2, 33, 64), (2, 1, 19, 96), (1, 1, 1, 3), (1, 2, 9, 256), (2, 2, 300, 4)],
)
def test_output_and_gradients(
    shape: tuple[int, ...], implementation: str, dtype: torch.dtype
) -> None:
    inputs = make(*shape).to(dtype)
    expected = expected_of(inputs)
    for actual, wanted in zip(
        results(gated_rms_norm, inputs, implementation), expected, strict=True
    ):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < 3 * TOLERANCES[dtype]


def test_partial_sums_of_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program takes several groups of tokens, the last of them not whole; twice the same."""
    monkeypatch.setattr(gated_norm, "ELEMENTS", 64)
    monkeypatch.setattr(gated_norm, "PROGRAMS", 3)
    dtype, tolerance = next(iter(PRECISIONS.items()))
    inputs = make(2, 2, 29, 12).to(dtype)
    once, again = (results(gated_rms_norm, inputs, "triton") for _ in range(2))
    for actual, same, wanted in zip(once, again, expected_of(inputs), strict=True):
        assert torch.equal(actual, same)
        assert relative_error(actual, wanted) < tolerance


@pytest.mark.parametrize("how", KERNELS)
def test_reads_that_do_not_lie_together(how: str) -> None:
    """A scan's output for padded heads is a slice; others may be transposed."""
    dtype, tolerance = next(iter(PRECISIONS.items()))
    whole = make(2, 2, 10, 8).to(dtype)
    gate = whole.gate[..., :12]
    for read in (whole.read[..., :6], whole.read[..., :6].mT.contiguous().mT):
        inputs = Inputs(read, whole.weight[:, :6], gate)
        for actual, wanted in zip(
            results(gated_rms_norm, inputs, how), expected_of(inputs), strict=True
        ):
            assert relative_error(actual, wanted) < tolerance


@pytest.mark.parametrize("how", KERNELS)
def test_mixed_dtypes(how: str) -> None:
    """A gain kept in float32 and a gate in another dtype: the result has the gate's."""
    inputs = make().to(torch.float32)
    wide = inputs._replace(gate=inputs.gate.detach().double().requires_grad_())
    kernel, plain = (results(gated_rms_norm, wide, name) for name in (how, "torch"))
    for actual, wanted in zip(kernel, plain, strict=True):
        assert actual.dtype == wanted.dtype
        assert relative_error(actual, wanted) < 1e-5


@pytest.mark.parametrize("how", KERNELS)
def test_heads_on_several_ranks_are_those_of_one(how: str) -> None:
    """Heads, their gains and their part of the gate divided, as tensor parallelism does."""
    dtype = next(iter(PRECISIONS))
    whole = make(2, 4, 9, 6).to(dtype)
    parts = [
        Inputs(
            whole.read[:, n : n + 2], whole.weight[n : n + 2], whole.gate[..., 6 * n : 6 * n + 12]
        )
        for n in (0, 2)
    ]
    out = torch.cat([gated_rms_norm(*part, EPS, how) for part in parts], dim=2)
    assert torch.equal(out, gated_rms_norm(*whole, EPS, how))
    divided = torch.autograd.grad(out.square().sum(), whole)
    together = torch.autograd.grad(gated_rms_norm(*whole, EPS, how).square().sum(), whole)
    for actual, wanted in zip(divided, together, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("how", KERNELS)
def test_operators_pass_torchs_own_checks(how: str) -> None:
    inputs = make().to(torch.float32)
    torch.library.opcheck(gated_norm._gated_norm, (*inputs, EPS, how))


@native
def test_nothing_of_a_token_goes_into_others() -> None:
    """Not a NaN, nor what a row of zeros gives with no eps; threads change no bit."""
    inputs = make(tokens=300, width=20).to(torch.float64)
    expected = gated_rms_norm(*inputs, 0.0, "native")
    read = inputs.read.detach().clone()
    read[0, :, 3], read[0, :, 5] = float("nan"), 0.0
    out = gated_rms_norm(read, inputs.weight, inputs.gate, 0.0, "native")
    others = [t for t in range(300) if t not in (3, 5)]
    assert torch.equal(out[:, others], expected[:, others])
    assert out[0, [3, 5]].isnan().all()
    once = results(gated_rms_norm, inputs, "native")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = results(gated_rms_norm, inputs, "native")
    torch.set_num_threads(threads)
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("how", KERNELS)
def test_one_graph_and_checkpointing(how: str) -> None:
    inputs = make().to(torch.float32)

    def call(read: Tensor) -> Tensor:
        return gated_rms_norm(read, inputs.weight, inputs.gate, EPS, how).square()

    plain = torch.autograd.grad(call(inputs.read).sum(), inputs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(inputs.read)
    again = checkpoint(call, inputs.read, use_reentrant=False)
    assert isinstance(again, Tensor)
    for other in (compiled, again):
        for actual, wanted in zip(torch.autograd.grad(other.sum(), inputs), plain, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("writes", [True, False])
def test_the_mixer_takes_it_where_it_takes_the_scans_kernels(
    writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 64 if ON_GPU else 16
    calls = []
    operators = gated_norm._gated_norm, convolution._convolve
    for module, operator in zip((gated_norm, convolution), operators, strict=True):
        name = "_gated_norm" if module is gated_norm else "_convolve"
        counted = partial(lambda own, *z: calls.append(z[-1]) or own(*z), operator)
        monkeypatch.setattr(module, name, counted)
    config = HopeConfig(
        dim=width,
        num_layers=1,
        num_heads=1,
        titans=TitansConfig(writes=writes, scan=ScanConfig(16, 16, implementation="chunked")),
        cms=CMSConfig(levels=(LevelConfig(name="a", hidden_size=16),)),
    )
    mixer = SelfModifyingTitans(config)
    initialise(mixer, seed=0)
    kernels = replace(config.titans.scan, implementation="triton")
    other = SelfModifyingTitans(replace(config, titans=replace(config.titans, scan=kernels)))
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 20, width, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected, _ = mixer.to(DEVICE)(x)
    assert calls == []
    actual, _ = other.to(DEVICE)(x)
    assert calls == ["triton"] * (3 if writes else 2)
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.skipif(ON_GPU, reason="what happens on a CPU")
def test_where_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make().to(torch.bfloat16)
    message = (
        "implementation=triton can't be used: Triton's interpreter computes wrongly in bfloat16"
    )
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(*inputs, EPS, "triton")
    half = [z.detach().half() for z in inputs]
    assert torch.equal(gated_rms_norm(*half, EPS), gated_rms_norm(*half, EPS, "torch"))
    with pytest.raises(ValueError, match=r"native can't be used: x is torch\.float16; take"):
        gated_rms_norm(*half, EPS, "native")
    monkeypatch.setattr("hope.fused.choice.why_not", lambda: "there is no C++ compiler")
    plain = gated_rms_norm(*inputs, EPS)
    assert torch.equal(plain, gated_rms_norm(*inputs, EPS, "torch"))
    with pytest.raises(ValueError, match=r"native can't be used: there is no C\+\+ compiler"):
        gated_rms_norm(*inputs, EPS, "native")


@pytest.mark.parametrize("how", ["torch", *KERNELS])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(1, 5)}, "weight must be [N, d] = [3, 5], got [1, 5]"),
        ({"gate": torch.zeros(1, 7, 15)}, "gate must be [B, T, N * d] = [2, 7, 15]"),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict, words: str, how: str) -> None:
    """And not read beyond its end."""
    inputs = make().to(torch.float32)._replace(**change)
    with pytest.raises(ValueError, match=re.escape(words)):
        gated_rms_norm(*inputs, EPS, how)
