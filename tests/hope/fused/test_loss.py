"""Cross-entropy in kernels against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hope.fused import cross_entropy, logits_gradient, row_statistics
from tests.hope.fused.cases import DEVICE, ON_GPU, PRECISIONS, relative_error

pytest.importorskip("triton")

IGNORED = -100


@pytest.fixture(autouse=True)
def blocks_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small vocabulary has several."""
    monkeypatch.setattr("hope.fused.loss.BLOCK", 64)


def make(rows: int = 9, columns: int = 150, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, columns, (rows,), generator=generator)
    labels[::4] = IGNORED
    return logits, labels


def leaf(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.detach().to(DEVICE, dtype).requires_grad_()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [(9, 150), (5, 64), (3, 7), (1, 129)])
def test_loss_and_gradient(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels = make(*shape)
    own = leaf(logits, dtype)
    exact = own.detach().double().cpu().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        exact, labels, ignore_index=IGNORED, reduction="sum"
    )
    loss = cross_entropy(own, labels.to(DEVICE), IGNORED, "triton")
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(loss, expected) < min(1e-5, PRECISIONS[dtype])
    (actual,) = torch.autograd.grad(0.25 * loss, own)
    assert actual.dtype == dtype
    (wanted,) = torch.autograd.grad(0.25 * expected, exact)
    assert relative_error(actual, wanted) < PRECISIONS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("shift", [-3e4, 0.0, 3e4])
def test_large_logits(shift: float, dtype: torch.dtype) -> None:
    """Nothing overflows, and a label that has all the weight costs nothing."""
    logits, labels = make()
    logits = (1e3 * logits + shift).float().double()
    labels = logits.argmax(1)
    own = leaf(logits, dtype)
    loss = cross_entropy(own, labels.to(DEVICE), IGNORED, "triton")
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, own)
    assert bool(gradient.isfinite().all())


def test_impossible_columns_and_rows_that_do_not_count() -> None:
    """Logits of -inf in a whole first block; only ignored rows."""
    logits, labels = make()
    logits[:, :70] = -float("inf")
    labels = labels.clamp(75)
    own = leaf(logits, torch.float32)
    loss = cross_entropy(own, labels.to(DEVICE), IGNORED, "triton")
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert relative_error(loss, expected) < 1e-5
    (gradient,) = torch.autograd.grad(loss, own)
    assert bool((gradient[:, :70] == 0).all())
    loss = cross_entropy(own, torch.full_like(labels, IGNORED).to(DEVICE), IGNORED, "triton")
    assert float(loss.detach()) == 0
    assert bool((torch.autograd.grad(loss, own)[0] == 0).all())


@pytest.mark.parametrize("label", [150, -1])
def test_a_label_that_is_no_column_is_not_a_number(label: int) -> None:
    logits, labels = make()
    labels[1] = label
    loss = cross_entropy(leaf(logits, torch.float32), labels.to(DEVICE), IGNORED, "triton")
    assert bool(loss.isnan())


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_columns_on_several_ranks_make_up_the_whole(implementation: str) -> None:
    dtype, tolerance = next(iter(PRECISIONS.items()))
    logits, labels = make()
    exact = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(
        exact, labels, ignore_index=IGNORED, reduction="sum"
    ).backward()
    parts = logits.to(DEVICE, dtype).split([60, 90], dim=1)
    own = [labels.to(DEVICE), labels.to(DEVICE) - 60]
    found = [row_statistics(*one, implementation) for one in zip(parts, own, strict=True)]
    lse = torch.stack([one[0] for one in found]).logsumexp(0)
    assert relative_error(lse, logits.logsumexp(1)) < tolerance
    picked = found[0][1] + found[1][1]
    wanted = logits.gather(1, labels.clamp(0).unsqueeze(1)).squeeze(1).masked_fill(labels < 0, 0)
    assert relative_error(picked, wanted) < tolerance
    share = (labels != IGNORED).to(DEVICE, lse.dtype)
    gradients = [
        logits_gradient(part, where, lse, share, -share, implementation)
        for part, where in zip(parts, own, strict=True)
    ]
    assert exact.grad is not None
    assert relative_error(torch.cat(gradients, dim=1), exact.grad) < tolerance


def test_operators_pass_torchs_own_checks() -> None:
    from hope.fused.loss import _rows

    logits, labels = make()
    torch.library.opcheck(_rows, (leaf(logits, torch.float32), labels.to(DEVICE)))


def test_one_graph_and_twice_backward() -> None:
    logits, labels = make()
    own, labels = leaf(logits, torch.float32), labels.to(DEVICE)

    def call(z: Tensor) -> Tensor:
        return cross_entropy(z, labels, IGNORED, "triton")

    plain = call(own)
    first, second = (torch.autograd.grad(plain, own, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(own)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled, own)[0], first)


def test_no_copy_of_the_logits_in_float32() -> None:
    """What is kept for backward beside the logits and the labels are numbers a row."""
    logits, labels = make()
    own = leaf(logits, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):
        cross_entropy(own, labels.to(DEVICE), IGNORED, "triton")
    assert [z.shape for z in kept if z.dim() == 2] == [own.shape]
    assert all(z.data_ptr() == own.data_ptr() for z in kept if z.dim() == 2)


@pytest.mark.skipif(ON_GPU, reason="what happens on a CPU")
def test_on_a_cpu_it_is_torchs_own() -> None:
    logits, labels = make()
    own = logits.float()
    expected = torch.nn.functional.cross_entropy(own, labels, ignore_index=IGNORED, reduction="sum")
    assert torch.equal(cross_entropy(own, labels, IGNORED), expected)
    with pytest.raises(ValueError, match="Triton's interpreter computes wrongly in bfloat16"):
        cross_entropy(own.bfloat16(), labels, IGNORED, "triton")
