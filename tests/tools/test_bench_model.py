"""The layer benchmark at sizes of seconds: its cases, its figures, its memory count."""

import json
from pathlib import Path

import pytest
import torch

from tools import bench_model
from tools.bench_model import Case, make_layer, operations, peak_bytes


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_figures_of_every_case_under_their_fixed_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = "--widths 64 --lengths 128 --threads 1 2 --repetitions 1 --no-peers"
    assert bench_model.main([*arguments.split(), "--chunks", "16x64", "64x128"]) == 0
    figures = json.loads((tmp_path / "runs/bench/model.json").read_text())["figures"]
    kinds = ("fwd_ratio", "fwdbwd_ratio", "flops_rate_ratio", "memory_ratio")
    cases = [f"w64_t128_c{c}_threads{n}" for c in ("16x64", "64x128") for n in (1, 2)]
    assert set(figures) == {f"{kind}_{case}" for kind in kinds for case in cases}
    assert all(value > 0 for value in figures.values())


def test_keys() -> None:
    assert Case(512, 1024, (64, 256), 1).key == "w512_t1024_c64x256_threads1"


def test_both_layers_have_the_same_mlp_and_width() -> None:
    hope, transformer = (make_layer(mixer, 128, (16, 64)) for mixer in ("titans", "attention"))
    assert [p.shape for p in hope.cms.parameters()] == [
        p.shape for p in transformer.cms.parameters()
    ]


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    """A layer must hold at least its gradients, and twice the tokens need nearly twice as much."""
    layer = make_layer("attention", 128, (16, 64))
    weights = sum(p.numel() * 4 for p in layer.parameters())
    short, long = (peak_bytes(layer, torch.randn(1, tokens, 128)) for tokens in (512, 1024))
    assert short > weights
    assert 1.7 < (long - weights) / (short - weights) < 2.2


def test_operations_are_those_of_the_mathematics() -> None:
    """Projections and MLP of a Transformer++ layer: 6 per weight and token; attention on top."""
    layer = make_layer("attention", 128, (16, 64))
    linear = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    attention = 7 * 2 * 128 * 256
    assert operations(layer, 256) == 256 * (6 * linear + attention)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--widths 96", "multiples of 64"),
        ("--chunks 64", "not like 64x256"),
        ("--chunks 64x96", "multiple of the memory chunk"),
        ("--repetitions 0", "must be positive"),
    ],
)
def test_bad_options(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_model.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
