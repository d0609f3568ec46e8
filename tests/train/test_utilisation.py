"""Operations a second and what share of a device that is; what a step tells of itself."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from data_pipeline import Loader
from hope import CMSConfig, HopeConfig, LevelConfig
from hope.model import num_parameters
from train.callbacks.metrics import read_metrics
from train.run import train
from train.utilisation import PEAK_TFLOPS, Utilisation, known_peak, needed_flops


@pytest.mark.parametrize("seq_len", [64, 1000])
def test_a_transformer_needs_what_the_usual_formula_says(seq_len: int) -> None:
    """6 N + 12 L H Q T of PaLM, appendix B, of causal attention the half; N: parameters of matrix
    products, the table of embeddings and the gains of norms left out."""
    layers, dim, heads, vocabulary = 3, 32, 4, 100
    config = HopeConfig(
        vocab_size=vocabulary,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        mixer="attention",
        tie_embeddings=False,
        cms=CMSConfig(levels=(LevelConfig(name="mlp", hidden_size=96),)),
    )
    products = 4 * dim * dim + 3 * dim * 96
    assert num_parameters(config) - layers * products - 2 * vocabulary * dim < 20 * dim
    attention = 12 * layers * dim * (seq_len + 1) / 2
    wanted = 6 * (layers * products + vocabulary * dim) + attention
    assert needed_flops(config, seq_len) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H200", 989.4),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_by_their_names(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_a_peak_counts_for_bfloat16_on_a_gpu_or_where_it_is_given(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    config = make_config(**{"model.vocab_size": 400})
    assert Utilisation.of_run(config, 2, gpu).mfu(1e3) is None
    config = make_config(**{"parallel.precision": "bf16"})
    assert Utilisation.of_run(config, 2, cpu).mfu(1e3) is None
    there = Utilisation.of_run(config, 2, gpu)
    flops = needed_flops(config.model, config.data.seq_len)
    assert there.mfu(1e3) == pytest.approx(1e3 * flops / 2 / (PEAK_TFLOPS["H200"] * 1e12))
    given = make_config(**{"training.peak_tflops": 0.5})
    assert Utilisation.of_run(given, 1, gpu).mfu(1e3) == pytest.approx(1e3 * flops / 0.5e12)
    assert replace(there, ranks=4).tflops_per_rank(1e3) == pytest.approx(1e3 * flops / 4e12)


def test_steps_tell_speed_waits_and_memory(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        **{
            "training.total_tokens": 3 * 256,
            "training.peak_tflops": 0.25,
            "mlflow.enabled": False,
            "checkpoint.asynchronous": False,
        }
    )
    read = Loader.__next__

    def slow(loader: Loader) -> Any:
        if loader.position == config.batch_rows:  # the second batch's first row
            time.sleep(0.3)
        return read(loader)

    monkeypatch.setattr(Loader, "__next__", slow)
    assert train(config, resume=False) == 0
    rows = [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row["kind"] == "step"]
    assert [row["data_seconds"] >= 0.3 for row in rows] == [False, True, False]
    flops = needed_flops(replace(config.model, vocab_size=400), config.data.seq_len)
    for row in rows:
        assert row["tflops_per_rank"] == pytest.approx(flops * row["tokens_per_second"] / 1e12)
        assert row["mfu"] == pytest.approx(row["tflops_per_rank"] / 0.25)
        assert 2**24 < row["peak_memory"] < 2**36
