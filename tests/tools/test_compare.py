"""The comparison is fair: equal parameters, and only what the row's name says is changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hope import HopeModel
from hope.model import num_parameters
from tools import compare, quickstart
from tools.compare import make_variants
from tools.figures import table
from train.config import load_config

CONFIG = "configs/quickstart.yaml"


@pytest.mark.parametrize("main", [compare.main, quickstart.main])
def test_wrong_overrides_are_told_before_anything_is_fetched(main, monkeypatch, capsys) -> None:
    for module in (compare, quickstart):
        monkeypatch.setattr(module, "prepare_sotu", lambda: pytest.fail("fetched"))
    assert main(["foo=1"]) == 2
    assert capsys.readouterr().err == f"error: {CONFIG}: unknown key 'foo'\n"


def test_a_comparison_wants_at_least_a_seed(monkeypatch) -> None:
    monkeypatch.setattr(compare, "prepare_sotu", lambda: pytest.fail("fetched"))
    with pytest.raises(SystemExit):
        compare.main(["--seeds", "0"])


def test_every_variant_has_the_parameters_of_hope(corpora: dict[str, Path]) -> None:
    base = load_config(CONFIG, [f"data.validation={corpora['validation']}"])
    sizes = {}
    for variant in make_variants(base):
        model = replace(load_config(CONFIG, list(variant.overrides)).model, vocab_size=400)
        sizes[variant.key] = num_parameters(model)
        assert sizes[variant.key] == sum(p.numel() for p in HopeModel(model).parameters())
    assert list(sizes) == ["hope", "hope_no_writes", "transformer", "transformer_conv"]
    assert all(abs(size / sizes["hope"] - 1) < 0.001 for size in sizes.values())


def test_the_control_differs_in_the_writes_alone(corpora: dict[str, Path]) -> None:
    base = load_config(CONFIG, [f"data.validation={corpora['validation']}"])
    control = next(v for v in make_variants(base) if v.key == "hope_no_writes")
    changed = load_config(CONFIG, list(control.overrides))
    titans = replace(changed.model.titans, writes=True)
    assert replace(changed.model, titans=titans) == load_config(CONFIG).model


def test_tables_line_up() -> None:
    assert table(["a", "b"], [["long", "1"], ["x", "200"]]).splitlines() == [
        "a       b",
        "----  ---",
        "long    1",
        "x     200",
    ]
