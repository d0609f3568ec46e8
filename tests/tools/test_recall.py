"""The recall task is what it says, and its bench trains, tests, reports and stops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools import bench_recall
from tools.bench_recall import KEYS, VALUES, VARIANTS, Recipe, Stage, accuracy, draw, run, train

TINY = Recipe(
    stages=(Stage(2, 8, 3), Stage(4, 32, 2)), step_tokens=64, test=Stage(4, 32, 1), test_rows=8
)


@pytest.mark.parametrize("repeat", [False, True])
def test_every_question_has_its_key_before_it_and_its_value_as_answer(repeat: bool) -> None:
    pairs, tokens = 6, 48
    inputs, labels = draw(5, pairs, tokens, torch.Generator().manual_seed(1), repeat)
    for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        stated = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(stated) == pairs
        assert all(key < KEYS <= value < KEYS + VALUES for key, value in stated.items())
        asked = [t for t, answer in enumerate(answers) if answer >= 0]
        assert asked[0] >= 2 * pairs
        assert all(stated[row[t]] == answers[t] for t in asked)
        counts = {key: [row[t] for t in asked].count(key) for key in stated}
        assert set(counts.values()) == ({(tokens - 2 * pairs) // pairs} if repeat else {1})
        rest = [row[t] for t in range(2 * pairs, tokens) if t not in asked]
        assert all(token >= KEYS + VALUES for token in rest)


def test_training_and_test_sequences_differ_and_follow_the_seed() -> None:
    first, second = (draw(4, 4, 16, torch.Generator().manual_seed(s))[0] for s in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(4, 4, 16, torch.Generator().manual_seed(0))[0])


def test_the_control_differs_in_the_writes_alone() -> None:
    hope, control = VARIANTS["hope"][1], VARIANTS["no_writes"][1]
    assert replace(control, titans=replace(control.titans, writes=True)) == hope
    assert set(hope.mixers) == {"titans"}
    assert hope.num_layers == 2


def test_the_curriculum_ends_on_what_is_tested() -> None:
    recipe = Recipe()
    assert (recipe.test.pairs, recipe.test.tokens) == (64, 512)
    assert recipe.stages[-1].pairs == recipe.test.pairs
    assert recipe.stages[-1].tokens == recipe.test.tokens
    rates = [recipe.rate(step) for step in range(1, recipe.steps + 1)]
    assert max(rates) == recipe.lr
    assert 0 < rates[-1] < rates[recipe.steps // 2]


def test_both_runs_give_figures(capsys: pytest.CaptureFixture[str]) -> None:
    figures, shown = run(["hope", "no_writes"], TINY, seed=0)
    assert set(figures) == {
        f"{name}{ending}"
        for name in ("mqar_accuracy", "mqar_repeated_accuracy")
        for ending in ("", "_no_writes")
    }
    assert all(0 <= value <= 1 for value in figures.values())
    assert "writes off" in shown
    assert "Hope | 5/5 | 4 pairs | loss" in capsys.readouterr().out


def test_a_run_follows_its_seed() -> None:
    def trained(seed: int) -> torch.Tensor:
        losses = []
        train(VARIANTS["hope"][1], TINY, seed, lambda *figures: losses.append(figures[2]))
        return torch.tensor(losses)

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_accuracy_counts_right_answers() -> None:
    class Oracle:
        def __call__(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
            logits = torch.zeros(*inputs.shape, 320)
            for row, scores in zip(inputs.tolist(), logits, strict=True):
                stated = dict(zip(row[0:8:2], row[1:8:2], strict=True))
                for t in range(8, len(row)):
                    scores[t, stated.get(row[t], 0)] = 1
            return logits, None

    assert accuracy(Oracle(), TINY, seed=0) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [False, True])
def test_the_command_saves_figures_or_stops_cleanly(
    stop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_recall, "Recipe", lambda: TINY)
    if stop:
        monkeypatch.setattr(bench_recall, "accuracy", interrupted)
    assert bench_recall.main([]) == (130 if stop else 0)
    saved = Path("runs/bench/recall.json")
    assert saved.exists() != stop
    if not stop:
        content = json.loads(saved.read_text())
        assert set(content) == {"name", "machine", "date", "figures"}
        assert {"mqar_accuracy", "mqar_accuracy_no_writes"} <= set(content["figures"])
        assert bench_recall.main(["--variants", "weak"]) == 0
        both = json.loads(saved.read_text())["figures"]
        assert set(both) > set(content["figures"])
