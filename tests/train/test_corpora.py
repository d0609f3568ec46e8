"""What the corpora of a run have to have in common, found by a run and by the pre-flight checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline import train_tokenizer
from data_pipeline.tokenizing import tokenize
from launch.checks import check_data
from train.config import ConfigError
from train.corpora import open_corpora, with_total_tokens, with_vocabulary
from train.run import train


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (420, r"data: the corpora have different vocabularies, of sizes \[400, 420\]"),
        (400, "was made with another tokenizer than .*: its ids stand for other text"),
    ],
)
def test_tokenizers_that_differ(make_config: Any, tmp_path: Path, size: int, reason: str) -> None:
    text = Path(__file__).read_text() * 5
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(text)
    tokenize([str(tmp_path / "text")], train_tokenizer([text], size), tmp_path / "other")
    config = make_config(**{"data.validation": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match=reason) as caught:
        open_corpora(config)
    assert check_data(config)[1] == [str(caught.value)]
    with pytest.raises(ConfigError, match=reason):
        train(config, resume=False)
    assert not config.run_dir.exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model.vocab_size": 399}, "model.vocab_size=399 is below the data's vocabulary of 400"),
        (
            {"mode": "continual", "data.order": "stream", "training.state_carry": "stream",
             "training.total_tokens": 10**9},
            "training.total_tokens=1000000000 is more than the",
        ),
    ],
)  # fmt: skip
def test_data_that_does_not_do_for_the_configuration(
    make_config: Any, corpora: dict[str, Path], changes: dict[str, Any], reason: str
) -> None:
    if "mode" in changes:
        place = str(corpora["train"])
        changes |= {"data.train": [{"path": place, "validation": place, "name": "a"}]}
    config = make_config(**changes)
    opened = open_corpora(config)
    with pytest.raises(ConfigError, match=reason) as caught:
        with_total_tokens(with_vocabulary(config, opened), opened)
    assert check_data(config)[1] == [str(caught.value)]
