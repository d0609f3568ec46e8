"""Forward-mode derivatives: right where torch's own operators compute, refused where ours do, which
know reverse mode only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jvp

from hope import HopeModel
from hope.fused import causal_convolution, cross_entropy, gated_rms_norm
from tests.hope.test_layer import MODELS


def loss_of(implementation: str) -> tuple[HopeModel, Callable[[dict[str, Tensor]], Tensor]]:
    config = MODELS["titans"]
    scan = replace(config.titans.scan, implementation=implementation)
    model = HopeModel(replace(config, titans=replace(config.titans, scan=scan))).double()
    tokens = torch.arange(38).view(2, 19) % 19
    return model, lambda p: functional_call(model, p, (tokens,))[0].square().mean()


def test_the_token_loop_has_them() -> None:
    """They are what the gradients say of the same direction."""
    model, loss = loss_of("reference")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, slope = jvp(loss, (parameters,), (along,))
    loss(dict(model.named_parameters())).backward()
    expected = sum((p.grad * along[name]).sum() for name, p in model.named_parameters())
    assert abs(float(slope - expected)) < 1e-9 * abs(float(expected))


@pytest.mark.parametrize("implementation", ["chunked", "auto"])
def test_the_closed_form_refuses(implementation: str) -> None:
    model, loss = loss_of(implementation)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    along = {name: torch.zeros_like(p) for name, p in parameters.items()}
    along["layers.0.mixer.memory_w1"] += 1
    with pytest.raises(ValueError, match="forward mode is implementation=reference's alone"):
        jvp(loss, (parameters,), (along,))


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_fused_operators_leave_it_to_torchs(argument: int) -> None:
    """... with "auto"; what is named and has none is an error."""
    convolution = (torch.randn(2, 5, 6), torch.randn(3, 6), torch.randn(2, 2, 6))
    norm = (torch.randn(2, 3, 5, 4), torch.randn(3, 4), torch.randn(2, 5, 12))
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda kind, *z: causal_convolution(*z, implementation=kind), convolution),
        (lambda kind, *z: gated_rms_norm(*z, 1e-6, kind), norm),
    ]
    for operator, inputs in cases:
        inputs = tuple(z.double().requires_grad_() for z in inputs)
        given = inputs[argument]
        along = torch.randn_like(given)

        def of_one(z: Tensor, kind: str = "auto", f=operator, inputs=inputs) -> Tensor:  # type: ignore
            return f(kind, *inputs[:argument], z, *inputs[argument + 1 :])

        out, slope = jvp(of_one, (given.detach(),), (along,))
        weight = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(
            (of_one(inputs[argument]) * weight).sum(), inputs[argument]
        )
        torch.testing.assert_close((slope * weight).sum(), (gradient * along).sum())
        with pytest.raises(ValueError, match="implementation=native has no forward mode"):
            jvp(lambda z: of_one(z, "native"), (given.detach(),), (along,))


def test_the_loss_leaves_it_to_torchs() -> None:
    logits, labels = torch.randn(5, 7), torch.arange(5)
    _, slope = jvp(lambda z: cross_entropy(z, labels, -1), (logits,), (logits,))
    probabilities = logits.softmax(1) - torch.nn.functional.one_hot(labels, 7)
    torch.testing.assert_close(slope, (probabilities * logits).sum())
    with pytest.raises(ValueError, match="implementation=triton has no forward mode"):
        jvp(lambda z: cross_entropy(z, labels, -1, "triton"), (logits,), (logits,))
