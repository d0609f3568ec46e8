"""The causal convolution in one pass against a loop over tokens in float64."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hope.convolution import CausalConvolution
from hope.fused import causal_convolution, convolution
from hope.init import initialise
from tests.hope.fused.cases import (
    DEVICE,
    IN_DTYPES,
    KERNELS,
    PRECISIONS,
    TOLERANCES,
    native,
    ramp_gradients,
    relative_error,
)

pytest.importorskip("triton")


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    tail: Tensor | None
    starts: Tensor | None

    def to(self, dtype: torch.dtype, device: str = DEVICE) -> Inputs:
        leaves = [
            None if z is None else z.detach().to(device, dtype).requires_grad_() for z in self[:3]
        ]
        return Inputs(*leaves, None if self.starts is None else self.starts.to(device))

    @property
    def leaves(self) -> list[Tensor]:
        return [z for z in self[:3] if z is not None and z.numel() > 0]


def make(
    rows: int = 2,
    tokens: int = 21,
    channels: int = 6,
    width: int = 4,
    tail: bool = True,
    starts: bool = True,
) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Inputs(
        draw(rows, tokens, channels),
        draw(width, channels),
        draw(rows, width - 1, channels) if tail else None,
        torch.rand(rows, tokens, generator=generator) < 0.2 if starts else None,
    )


def loop(inputs: Inputs) -> Tensor:
    """Token by token and tap by tap, from the definition."""
    x, weight, tail, starts = inputs
    rows, tokens, channels = x.shape
    width = weight.shape[0]
    out = []
    for row in range(rows):
        for t in range(tokens):
            y = x.new_zeros(channels)
            for back in range(width):
                if t - back >= 0:
                    y = y + weight[width - 1 - back] * x[row, t - back]
                elif tail is not None:
                    y = y + weight[width - 1 - back] * tail[row, width - 1 + t - back]
                if t - back >= 0 and starts is not None and starts[row, t - back]:
                    break
            out.append(y)
    return torch.stack(out).view(rows, tokens, channels)


def results(inputs: Inputs, how: str) -> list[Tensor]:
    return ramp_gradients(causal_convolution(*inputs, how), inputs.leaves)


def expected_of(inputs: Inputs) -> list[Tensor]:
    exact = inputs.to(torch.float64, "cpu")
    return ramp_gradients(loop(exact), exact.leaves)


@pytest.mark.parametrize(("how", "dtype"), IN_DTYPES)
@pytest.mark.parametrize(
    ("shape", "tail", "starts"),
    [
        ((2, 21, 6, 4), True, True),
        ((2, 21, 6, 4), False, False),
        ((1, 70, 130, 3), True, False),
        ((3, 40, 5, 5), False, True),
        ((2, 2, 8, 6), True, True),
        ((1, 1, 3, 4), False, False),
        ((2, 9, 4, 1), True, True),
        ((1, 300, 3, 2), True, True),
    ],
)
def test_output_and_gradients(
    shape: tuple[int, ...], tail: bool, starts: bool, how: str, dtype: torch.dtype
) -> None:
    inputs = make(*shape, tail, starts).to(dtype)
    for actual, wanted in zip(results(inputs, how), expected_of(inputs), strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("how", ["torch", *KERNELS])
def test_no_tokens_have_no_gradient(how: str) -> None:
    """The tail's is zero, whatever lay in memory before."""
    inputs = make(tokens=0, starts=False).to(torch.float32)
    left = torch.full((2, 3, 6), float("nan"), device=DEVICE)
    del left
    y, d_weight, d_tail = (results(inputs, how)[n] for n in (0, 1, 2))
    assert y.shape == (2, 0, 6)
    assert d_weight.count_nonzero() == d_tail.count_nonzero() == 0


def test_partial_sums_of_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program takes several groups of inputs, the last of them not whole; twice the same."""
    for name, size in (("ROWS", 4), ("COLUMNS", 4), ("PROGRAMS", 3)):
        monkeypatch.setattr(convolution, name, size)
    dtype, tolerance = next(iter(PRECISIONS.items()))
    inputs = make().to(dtype)
    once, again = results(inputs, "triton"), results(inputs, "triton")
    for actual, same, wanted in zip(once, again, expected_of(inputs), strict=True):
        assert torch.equal(actual, same)
        assert relative_error(actual, wanted) < tolerance


@pytest.mark.parametrize("how", ["torch", *KERNELS])
def test_nothing_of_another_document_is_seen(how: str) -> None:
    """Not a NaN in it either, in outputs or gradients."""
    dtype = next(iter(PRECISIONS))
    inputs = make(rows=1, starts=False).to(dtype)
    starts = torch.zeros(1, 21, dtype=torch.bool, device=DEVICE)
    starts[0, 10] = True
    x = inputs.x.detach().clone()
    x[0, 7:10] = float("nan")
    x.requires_grad_()
    out = causal_convolution(x, inputs.weight, inputs.tail, starts, how)
    assert out[0, :7].isfinite().all()
    assert out[0, 10:].isfinite().all()
    (gradient,) = torch.autograd.grad(out[0, 10:].sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[0, :10] == 0).all()


@pytest.mark.parametrize("tokens", [10, 2])
def test_the_tail_has_nothing_of_an_earlier_document(tokens: int) -> None:
    """Not a NaN in it either: it would come through the next call, and into its gradients."""
    convolution = CausalConvolution(3, 4)
    initialise(convolution, 0)
    before = torch.full((1, 3, 3), float("nan"))
    x = torch.full((1, tokens, 3), float("nan"), requires_grad=True)
    starts = torch.zeros(1, tokens, dtype=torch.bool)
    starts[0, -1] = True
    _, tail = convolution(torch.where(starts.unsqueeze(-1), 1.0, x), before, starts)
    assert tail[0].tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3]
    y, _ = convolution(torch.ones(1, 4, 3), tail, None)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (gradient == 0).all()


@pytest.mark.parametrize("how", KERNELS)
def test_mixed_dtypes_and_strides(how: str) -> None:
    """Taps kept in float32 beside activations in float64, which are a slice."""
    whole = make(channels=8).to(torch.float64)
    inputs = Inputs(
        whole.x[..., 1:7],
        whole.weight[:, 1:7].float().detach().requires_grad_(),
        whole.tail.float()[..., 2:].detach().requires_grad_(),
        whole.starts,
    )
    exact = inputs._replace(weight=inputs.weight.double(), tail=inputs.tail.double())
    for actual, wanted in zip(results(inputs, how), expected_of(exact), strict=True):
        assert relative_error(actual, wanted) < 1e-6
    assert [z.dtype for z in results(inputs, how)[1:]] == [torch.float64, *[torch.float32] * 2]


@native
def test_threads_do_not_change_a_bit() -> None:
    inputs = make(tokens=600, channels=200).to(torch.float32)
    once = results(inputs, "native")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = results(inputs, "native")
    torch.set_num_threads(threads)
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize(("tail", "starts"), [(True, True), (False, False)])
def test_operators_pass_torchs_own_checks(tail: bool, starts: bool, how: str) -> None:
    inputs = make(tail=tail, starts=starts).to(torch.float32)
    reach = None if inputs.starts is None else convolution._reach(inputs.starts, 3)
    torch.library.opcheck(convolution._convolve, (*inputs[:3], reach, how))


@pytest.mark.parametrize("how", KERNELS)
def test_one_graph_and_checkpointing(how: str) -> None:
    inputs = make().to(torch.float32)

    def call(x: Tensor) -> Tensor:
        return causal_convolution(x, *inputs[1:], how).square()

    plain = torch.autograd.grad(call(inputs.x).sum(), inputs.leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(inputs.x)
    again = checkpoint(call, inputs.x, use_reentrant=False)
    assert isinstance(again, Tensor)
    for other in (compiled, again):
        for actual, wanted in zip(
            torch.autograd.grad(other.sum(), inputs.leaves), plain, strict=True
        ):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("how", ["torch", *KERNELS])
@pytest.mark.parametrize("cuts", [(8, 13), (1, 2, 18), (21,), (1,) * 21])
def test_split_sequences_are_the_whole(cuts: tuple[int, ...], how: str) -> None:
    """The tail carried on, over pieces shorter than it and over starts of documents."""
    dtype = next(iter(PRECISIONS))
    inputs = make().to(dtype)
    module = CausalConvolution(6, 4, fused=how).to(DEVICE, dtype)
    initialise(module, seed=0)
    whole, last = module(inputs.x, inputs.tail, inputs.starts)
    tail, pieces = inputs.tail, []
    parts = zip(inputs.x.split(cuts, 1), inputs.starts.split(cuts, 1), strict=True)
    for x, starts in parts:
        y, tail = module(x, tail, starts)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert torch.equal(tail, last)


@pytest.mark.parametrize("how", ["torch", *KERNELS])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(21, 6)}, "x must be [B, T, channels]"),
        ({"weight": torch.zeros(4, 5)}, "weight must be [width, channels] = [4, 6]"),
        ({"tail": torch.zeros(1, 3, 6)}, "tail must be [B, width - 1, channels] = [2, 3, 6]"),
        ({"tail": torch.zeros(2, 2, 6)}, "got [2, 2, 6]"),
        ({"starts": torch.zeros(1, 21, dtype=torch.bool)}, "document_starts must be [B, T]"),
        ({"starts": torch.zeros(2, 20, dtype=torch.bool)}, "got [2, 20]"),
        ({"starts": torch.zeros(2, 21, device=DEVICE)}, "document_starts must be bool"),
        ({"tail": torch.zeros(2, 3, 6, device="meta")}, "tail is on meta"),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict, words: str, how: str) -> None:
    """And not read beyond its end."""
    inputs = make().to(torch.float32)._replace(**change)
    with pytest.raises(ValueError, match=re.escape(words)):
        causal_convolution(*inputs, how)
