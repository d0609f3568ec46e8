"""What a resume may change about levels and batch, and what becomes of a level's gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hope import HopeConfig, HopeModel
from hope.config import CMSConfig, LevelConfig
from tests.train.test_trainer import STREAM, final_tensors, store_of
from train.__main__ import main
from train.callbacks.metrics import read_metrics
from train.checkpoint.levels import describe_levels, map_levels
from train.checkpoint.load import load_run
from train.config import RunConfig
from train.run import train

STOP = 4 * 256  # one step into the second period of level b, four into the first of level c

A: dict[str, Any] = {"name": "a", "hidden_size": 8, "update_every_tokens": "step"}
B: dict[str, Any] = {"name": "b", "hidden_size": 8, "update_every_tokens": 3 * 256}
C: dict[str, Any] = {"name": "c", "hidden_size": 8, "update_every_tokens": 5 * 256}
NEW: dict[str, Any] = {"name": "new", "hidden_size": 12, "update_every_tokens": 4 * 256}


def fired(config: RunConfig) -> dict[str, list[int]]:
    """The tokens at which each level fired."""
    found: dict[str, list[int]] = {}
    for row in read_metrics(config.run_dir / "metrics.jsonl"):
        for name in row["lr"] if row["kind"] == "step" else ():
            found.setdefault(name, []).append(row["tokens"])
    return found


def resume(make_config, **changes: Any) -> RunConfig:
    """Stop at STOP, then go on with `changes`."""
    assert train(make_config(**{"training.stop_at_tokens": STOP}), resume=False) == 0
    config = make_config(**{"training.stop_at_tokens": None, **changes})
    assert train(config, resume=True) == 0
    return config


def test_a_longer_period_keeps_what_was_accumulated(make_config) -> None:
    """At 4 steps b holds one step and c four; both fire next at multiples of their new periods."""
    longer = {**C, "update_every_tokens": 7 * 256}
    config = resume(
        make_config,
        **{"model.cms.levels": [A, {**B, "update_every_tokens": 5 * 256 + 1}, longer]},
    )
    found = fired(config)
    assert found["b"] == [3 * 256, 6 * 256, 11 * 256]
    assert found["c"] == [7 * 256]
    store = store_of(config)
    assert store.plain(store.newest())["cadence"]["tokens"]["c"] == 5 * 256


def test_a_period_changed_before_its_first_gradient_is_as_if_it_had_always_been_so(
    make_config, tmp_path: Path
) -> None:
    """Nothing but the clock depends on the period: c's sum of 4 + 3 steps is that of 7."""
    seven = {**C, "update_every_tokens": 7 * 256}
    changed = resume(make_config, **{"model.cms.levels": [A, B, seven]})
    straight = make_config(run_dir=str(tmp_path / "straight"))
    train(straight, resume=False)
    first, second = final_tensors(changed), final_tensors(straight)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_an_added_level_starts_as_zero_and_learns(make_config) -> None:
    config = make_config(**{"training.stop_at_tokens": STOP})
    train(config, resume=False)
    _, before = load_run(config.run_dir)
    more = make_config(
        **{
            "model.cms.levels": [A, B, NEW, C],
            "training.stop_at_tokens": STOP + 1,  # one step
            "optimizer.levels": {
                name: {"lr_scale": 0.0} for name in ("fast", "a", "b", "c", "new")
            },
        }
    )
    # Rates are part of the run; take them up as if it had been started with them.
    saved = yaml.safe_load((config.run_dir / "config.yaml").read_text())
    saved["optimizer"]["levels"] = {n: {"lr_scale": 0.0} for n in ("fast", "a", "b", "c")}
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
    assert train(more, resume=True) == 0
    _, after = load_run(config.run_dir)
    tokens = torch.arange(32).unsqueeze(0)
    assert len(after.layers[0].cms.levels) == 4
    assert torch.equal(before(tokens)[0], after(tokens)[0])
    for layer in after.layers:
        assert not layer.cms.levels[2].down.weight.any()
        assert layer.cms.levels[2].up.weight.any()


def test_an_added_level_leaves_the_others_as_they_were(make_config) -> None:
    config = resume(make_config, **{"model.cms.levels": [A, B, NEW, C]})
    assert fired(config)["new"] == [8 * 256, 12 * 256]
    assert fired(config)["c"] == [5 * 256, 10 * 256]
    _, model = load_run(config.run_dir)
    assert all(layer.cms.levels[2].down.weight.any() for layer in model.layers)
    moments = [name for name in final_tensors(config) if "levels.3." in name and "exp_avg" in name]
    assert moments


def test_a_resume_with_another_level_survives_being_stopped_at_once(make_config) -> None:
    """The configuration in the folder and its newest checkpoint belong together."""
    make = {"model.cms.levels": [A, B, NEW, C]}
    config = resume(make_config, **make, **{"training.stop_at_tokens": STOP})
    _, model = load_run(config.run_dir)
    assert len(model.layers[0].cms.levels) == 4
    assert train(make_config(**{"training.stop_at_tokens": None}), resume=True) == 0


@pytest.mark.parametrize("batch", [128, 512, 192])
def test_another_batch_size_in_the_middle_of_a_period(make_config, batch: int) -> None:
    """The sum in c's first firing is over all the tokens before it, in batches of both sizes."""
    config = resume(make_config, **{"training.batch_tokens": batch})
    total, expected = STOP, []
    while total < config.training.total_tokens:
        if (total + batch) // 1280 > total // 1280:
            expected.append(total + batch)
        total += batch
    assert fired(config)["c"] == expected
    store = store_of(config)
    assert store.plain(store.newest())["cadence"]["tokens"]["c"] == total - expected[-1]


def test_how_one_level_accumulates_may_change(make_config) -> None:
    """Named for the first time on resume, and not named any more on the next."""
    named = {"c": {"reduce": "at_update", "accumulator_device": "cpu"}}
    config = make_config(**{"training.stop_at_tokens": STOP})
    train(config, resume=False)
    for levels, stop in ((named, STOP + 256), ({}, None)):
        config = make_config(**{"optimizer.levels": levels, "training.stop_at_tokens": stop})
        assert train(config, resume=True) == 0
    assert fired(config)["c"] == [1280, 2560]


CHANGES = [
    ({"model.cms.levels": [A, C]}, "'b' is gone, and what it learned would be lost"),
    ({"model.cms.levels": [A, B, {**C, "hidden_size": 9}]}, "'c' had hidden_size 8 and now 9"),
    ({"model.cms.mode": "independent"}, "model.cms.mode was 'sequential' and is now 'independent'"),
    (
        {"model.cms.levels": [A, {**C, "update_every_tokens": 256}, B]},
        "another order is another model",
    ),
    ({"optimizer.levels": {"c": {"lr_scale": 0.5}}}, "levels.c.lr_scale (1.0 -> 0.5); resume"),
    ({"training.batch_tokens": 512, **STREAM}, "training.batch_tokens (256 -> 512)"),
]


@pytest.mark.parametrize(("changes", "reason"), CHANGES)
def test_what_is_refused_and_why(
    make_config,
    raw_config,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    changes: dict[str, Any],
    reason: str,
) -> None:
    config = make_config(
        **{"training.stop_at_tokens": STOP, **(STREAM if len(changes) > 1 else {})}
    )
    train(config, resume=False)
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    make_config(**changes)
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    capsys.readouterr()
    assert main([str(path), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error
    assert {p: p.read_bytes() for p in config.run_dir.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("independent", "its share would come from"), ("nested", "would have no past")],
)
def test_where_no_level_can_be_added(mode: Any, reason: str) -> None:
    levels = [
        LevelConfig(name=name, hidden_size=8, update_every_tokens=2**i)
        for i, name in enumerate("abc")
    ]
    saved = describe_levels(CMSConfig(mode=mode, levels=tuple(levels[:2])))
    with pytest.raises(ValueError, match=reason):
        map_levels(saved, CMSConfig(mode=mode, levels=tuple(levels)))


def test_what_became_of_every_level_is_told_and_what_is_new_is_a_fresh_models() -> None:
    """Drawn by the run's own seed; only the way back to the residual stream is zero."""
    a, c = LevelConfig(**A), LevelConfig(**C)
    longer = replace(c, update_every_tokens=7 * 256)
    now = CMSConfig(levels=(a, LevelConfig(**NEW), longer))
    mapping = map_levels(describe_levels(CMSConfig(levels=(a, c))), now)
    new, changed = mapping.changes
    assert new == "level 'new' is new and starts as zero"
    assert changed.startswith("level 'c' has period 1792 instead of 1280; what it has accumulated")
    assert map_levels(describe_levels(now), now).changes == ()
    config = HopeConfig(vocab_size=32, dim=16, num_layers=2, num_heads=2, cms=now)
    fresh = dict(HopeModel(config, seed=3).named_parameters())
    started = mapping.start_added(config, seed=3)
    names = [name for name in fresh if ".cms.levels.1." in name]
    assert started.keys() == {f"model/{name}" for name in names}
    for name in names:
        zero = name.endswith("down.weight")
        assert torch.equal(started[f"model/{name}"], fresh[name] * (not zero))
