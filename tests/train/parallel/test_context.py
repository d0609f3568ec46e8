"""Pieces of sequences in float64 against the whole; layouts: `tests/distributed/test_parity.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.config import AttentionConfig
from hope.scan import ScanConfig
from tools.parity import ROWS, make_batch, make_config
from tools.processes import run
from train.engines import open_engine
from train.parallel.context import Pieces, pass_on
from train.parallel.part import Part
from train.parallel.ranks import Ranks

LENGTH = 24
STARTS: dict[str, tuple[int, ...]] = {"titans": (0, 8), "attention": (3, 6, 7, 14, 16, 17)}
"""Where documents begin: of three pieces of 8 tokens those in reach of a convolution across."""


def gradients(
    mixer: Any, part_of_three: int | None
) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """The loss of a piece of the sequences, or of all; its parameters' gradients; the logits."""
    config = HopeConfig(
        vocab_size=31,
        dim=12,
        num_layers=2,
        num_heads=3,
        mixer=mixer,
        attention=AttentionConfig(conv_width=4),
        titans=TitansConfig(initial_eta=0.1, scan=ScanConfig(memory_chunk=4, projection_chunk=8)),
        cms=CMSConfig(levels=(LevelConfig(name="a", hidden_size=8),)),
    )
    model = HopeModel(config).double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 31, (2, LENGTH + 1), generator=generator)
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[1, list(STARTS[mixer])] = True
    given, pieces = (ids[:, :-1], ids[:, 1:], starts), None
    if part_of_three is not None:
        pieces = pass_on(model, Ranks())
        given = tuple(one.chunk(3, dim=1)[part_of_three] for one in given)  # type: ignore[assignment]
    tokens, labels, documents = given
    part = Part(model, range(2), pieces)
    logits = part(tokens, torch.arange(2), documents)
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    if pieces is not None:
        pieces.settle()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found, [logits.detach()]


def pieces_of(rank: int, mixers: list[str]) -> list[Any]:
    return [gradients(mixer, rank) for mixer in mixers]


def test_three_pieces_are_the_whole() -> None:
    """Exactly, also for documents that begin in the last tokens before a piece ends."""
    found = run(3, pieces_of, list(STARTS))
    for number, mixer in enumerate(STARTS):
        loss, expected, logits = gradients(mixer, None)
        several = [one[number] for one in found]
        assert sum(one[0] for one in several) == pytest.approx(loss, rel=1e-12)
        whole = torch.cat([one[2][0] for one in several], dim=1)
        torch.testing.assert_close(whole, logits[0], rtol=1e-10, atol=1e-12)
        for name, gradient in expected.items():
            total = torch.stack([one[1][name] for one in several]).sum(dim=0)
            torch.testing.assert_close(total, gradient, rtol=1e-9, atol=1e-11, msg=name)


def after(rank: int) -> dict[str, Tensor] | None:
    left = {"w1": torch.full((2, 3), float(rank)), "nothing": torch.empty(0, 3)}
    return Pieces(Ranks()).wrap_around(left)


def test_what_the_last_of_three_pieces_left_is_the_firsts_and_nobody_elses() -> None:
    first, *others = run(3, after)
    assert others == [None, None]
    assert first["w1"].eq(2).all()
    assert first["nothing"].numel() == 0


def unsettled(rank: int) -> list[int]:
    """How much that was sent is still kept after a step, and after an evaluation."""
    engine = open_engine(make_config("hope", {"cp": 2}), Ranks())
    found = []
    for call in (lambda one: engine.forward_backward(one, None), engine.held_out):
        call(make_batch(0, 0, ROWS))
        pieces = engine.modules[0].pieces
        assert pieces is not None
        found.append(len(pieces._sent))
    return found


def test_nothing_that_was_sent_is_kept_beyond_a_step() -> None:
    assert run(2, unsettled) == [[0, 0]] * 2
