"""Held-out figures at their edges."""

from __future__ import annotations

import math
import sys

from train.evaluate.perplexity import HeldOut


def test_a_loss_beyond_what_exp_can_tell_is_a_number_all_the_same() -> None:
    """A run that diverged is told of, and does not end on its own log line."""
    diverged = HeldOut(1234.5, 10, 10)
    assert 0.9 * sys.float_info.max < diverged.perplexity < math.inf
    assert HeldOut(2.0, 1, 1).perplexity == math.exp(2.0)
