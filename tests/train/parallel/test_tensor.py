"""Pieces of tensor parallelism against torch's own, on several ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, embedding

from data_pipeline import IGNORE
from tools.processes import run
from train.parallel.collectives import enter, exchange, leave
from train.parallel.tensor import VocabularyParallel, vocabulary_parallel_loss


def losses(rank: int, dtype: torch.dtype) -> None:
    size = dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(3, 7, 12 * size, generator=generator, dtype=dtype)
    labels = torch.randint(0, 12 * size, (3, 7), generator=generator)
    labels[0, :3] = IGNORE
    whole = logits.clone().requires_grad_()
    expected = cross_entropy(
        whole.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    (0.5 * expected).backward()
    own = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
    found = vocabulary_parallel_loss(own, labels, dist.group.WORLD)
    (0.5 * found).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own.grad, whole.grad.chunk(size, dim=-1)[rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_divided_logits(dtype: torch.dtype) -> None:
    run(3, losses, dtype)


class Vectors(VocabularyParallel, torch.nn.Embedding):
    pass


def lookups(rank: int) -> None:
    size = dist.get_world_size()
    table = torch.randn(5 * size, 4, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 5 * size, (2, 9), generator=torch.Generator().manual_seed(2))
    own = Vectors(5, 4)
    own.vocabulary_rank = rank
    own.weight.data.copy_(table[5 * rank : 5 * rank + 5])
    found = leave(own(tokens), dist.group.WORLD, sequence_parallel=False)
    assert torch.equal(found, embedding(tokens, table))
    found.square().sum().backward()
    whole = table.clone().requires_grad_()
    embedding(tokens, whole).square().sum().backward()
    torch.testing.assert_close(own.weight.grad, whole.grad[5 * rank : 5 * rank + 5])


def test_divided_token_vectors() -> None:
    run(2, lookups)


def a_block(rank: int, sequence_parallel: bool) -> None:
    """y = silu(x A) B with A by column and B by row, against the whole, with gradients."""
    size, group = dist.get_world_size(), dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4 * size, 6, generator=generator, dtype=torch.float64)
    a = torch.randn(6, 8 * size, generator=generator, dtype=torch.float64)
    b = torch.randn(8 * size, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4 * size, 6, generator=generator, dtype=torch.float64)
    whole = [t.clone().requires_grad_() for t in (x, a, b)]
    expected = torch.nn.functional.silu(whole[0] @ whole[1]) @ whole[2]
    (expected * weight).sum().backward()
    piece = slice(4 * rank, 4 * rank + 4) if sequence_parallel else slice(None)
    own = [
        x[:, piece].clone().requires_grad_(),
        a.chunk(size, dim=1)[rank].clone().requires_grad_(),
        b.chunk(size, dim=0)[rank].clone().requires_grad_(),
    ]
    hidden = torch.nn.functional.silu(enter(own[0], group, sequence_parallel) @ own[1])
    found = leave(hidden @ own[2], group, sequence_parallel)
    (found * weight[:, piece]).sum().backward()
    torch.testing.assert_close(found, expected[:, piece])
    grads = [t.grad for t in whole]
    wanted = [grads[0][:, piece], grads[1].chunk(size, 1)[rank], grads[2].chunk(size, 0)[rank]]
    for mine, theirs in zip(own, wanted, strict=True):
        torch.testing.assert_close(mine.grad, theirs)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_column_then_row(sequence_parallel: bool) -> None:
    run(2, a_block, sequence_parallel)


def heads_for_tokens(rank: int) -> None:
    size, group = dist.get_world_size(), dist.group.WORLD
    whole = torch.arange(2 * 2 * size * 3 * size * 5.0).view(2, 2 * size, 3 * size, 5)
    own = whole.chunk(size, dim=2)[rank].clone().requires_grad_()
    found = exchange(own, 1, 2, group)
    assert torch.equal(found, whole.chunk(size, dim=1)[rank])
    back = exchange(found, 2, 1, group)
    assert torch.equal(back, own)
    (back * own.detach()).sum().backward()
    assert torch.equal(own.grad, own.detach())


def test_exchange_and_back() -> None:
    run(3, heads_for_tokens)
