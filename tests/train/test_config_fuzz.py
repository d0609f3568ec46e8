"""Thousands of mutated configurations: an error of ours, in one line, or a run."""

from __future__ import annotations

import random
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.mutations import mutations, strange_values
from train.__main__ import main
from train.config import ConfigError, RunConfig, dump_config, load_config
from train.engines import layout_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A configuration that takes all of the machine's memory fails its test instead."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check(path: Path) -> RunConfig | None:
    """Load it: None where it was refused, as it should be."""
    try:
        config = load_config(path)
        layout_of(config, 1)
    except ConfigError as error:
        assert "\n" not in str(error), error  # noqa: PT017
        return None
    again = path.with_name("again.yaml")
    again.write_text(dump_config(config))
    assert load_config(again) == config
    return config


def fuzz(texts: list[str], folder: Path, count: int, seed: int) -> Counter[str]:
    """Mutate text and values in turn."""
    rng, outcomes, path = random.Random(seed), Counter[str](), folder / "config.yaml"
    trees = [yaml.safe_load(text) for text in texts]
    for number in range(count):
        which = rng.randrange(len(texts))
        if number % 2:
            path.write_bytes(next(mutations(texts[which].encode(), rng, 1)))
        else:
            path.write_text(yaml.safe_dump(next(strange_values(trees[which], rng, 1))))
        outcomes["refused" if check(path) is None else "accepted"] += 1
    return outcomes


def test_mutated_configurations_are_refused_or_valid(tmp_path: Path) -> None:
    outcomes = fuzz([path.read_text() for path in CONFIGS], tmp_path, 300, seed=0)
    assert min(outcomes["refused"], outcomes["accepted"]) > 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_thousand_mutated_configurations(tmp_path: Path, seed: int) -> None:
    outcomes = fuzz([path.read_text() for path in CONFIGS], tmp_path, 2000, seed)
    assert min(outcomes["refused"], outcomes["accepted"]) > 200


DEAR = ("dim", "vocab_size", "hidden_size", "num_layers", "seq_len", "total_tokens", "batch_tokens")


def affordable(tree: Any) -> bool:
    """Whether a run of it can be tried: no size is much larger than that of the tests."""
    if isinstance(tree, dict):
        return all(
            (key not in DEAR or not isinstance(value, int) or value <= 4096) and affordable(value)
            for key, value in tree.items()
        )
    return not isinstance(tree, list) or all(map(affordable, tree))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_accepted_runs_or_says_why_not(
    raw_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m train` ends with 0, or with 2 and one line; never with a traceback."""
    rng, statuses = random.Random(0), Counter[Any]()
    raw_config["mlflow"] = {"enabled": False}
    raw_config["watchdog"] = {"enabled": False}
    path, run_dir = tmp_path / "config.yaml", Path(raw_config["run_dir"])
    for tree in strange_values(raw_config, rng, 400):
        if not isinstance(tree, dict) or not affordable(tree):
            continue
        path.write_text(yaml.safe_dump({**tree, "run_dir": str(run_dir)}))
        shutil.rmtree(run_dir, ignore_errors=True)
        status = main([str(path)])
        error = capsys.readouterr().err
        assert status in (0, 1, 2), (status, path.read_text())
        statuses[status] += 1
        if status == 2:
            assert len([line for line in error.splitlines() if "error" in line]) == 1, error
        assert "Traceback" not in error, (error, path.read_text())
    assert min(statuses[0], statuses[2]) > 20, statuses
