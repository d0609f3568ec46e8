"""Which file a tensor belongs in, and which of the ranks that have it writes it."""

from __future__ import annotations

import pytest

from train.checkpoint.pieces import Described, assign, group_of

LEVEL = "layers.3.cms.levels.1.up.weight"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("model/layers.0.mixer.w", "model-fast"),
        (f"model/{LEVEL}", "model-level1"),
        (f"optimizer/{LEVEL}/exp_avg", "optimizer-level1"),
        (f"optimizer/{LEVEL}/accumulated_grad", "accumulated-level1"),
        (f"optimizer/{LEVEL}/accumulated_grad.2", "accumulated-level1"),
        (f"optimizer/{LEVEL}@start/value", "optimizer-level1-start"),
        (f"optimizer/{LEVEL}@start/accumulated_grad", "accumulated-level1-start"),
        (f"stream/7/{LEVEL}", "stream"),
    ],
)
def test_what_moves_together_is_one_file(name: str, file: str) -> None:
    """What accumulates moves at every step, moments when their level fires, a start when it is
    set back to."""
    assert group_of(name) == file


def piece(name: str, rows: int, first: int = 0, whole: int = 0) -> Described:
    return name, "F32", (whole or rows, 5), (first, 0), (rows, 5)


def test_ranks_that_have_the_same_write_as_much_and_every_level_by_itself() -> None:
    """A level that another run does not have leaves the files of the others as they were."""
    fast = [piece(f"model/layers.{n}.mixer.w", 8) for n in range(6)]
    level = [piece(f"model/layers.{n}.cms.levels.0.up.weight", 3) for n in range(3)]
    owners = assign([fast + level] * 3)
    for pieces, each in ((fast, 2), (level, 1)):
        mine = [owners[one[0], one[3]] for one in pieces]
        assert [mine.count(rank) for rank in range(3)] == [each] * 3
    assert assign([level] * 3).items() <= owners.items()


def test_a_rank_with_much_of_its_own_writes_less_of_what_others_have_too() -> None:
    name = "model/a"
    own = [piece(name, 9, 0, 10), piece(name, 1, 9, 10)]
    common = piece("model/b", 4)
    owners = assign([[own[0], common], [own[1], common]])
    assert owners == {(name, (0, 0)): 0, (name, (9, 0)): 1, ("model/b", (0, 0)): 1}
