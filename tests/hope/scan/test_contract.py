"""What the scan refuses, and with which words."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from hope.scan import MemoryState, ScanConfig, scan
from tests.hope.scan.cases import make_problem


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_chunk": 16, "projection_chunk": 40}, "must be a multiple of memory_chunk"),
        ({"memory_chunk": 0}, "memory_chunk must be an integer of at least 1"),
        ({"projection_chunk": 64.0}, "projection_chunk must be an integer"),
        ({"checkpoint_chunks": 0}, "checkpoint_chunks must be an integer of at least 1"),
        ({"eta_max": -0.1}, "eta_max must be finite and at least 0"),
        ({"eta_max": float("nan")}, "eta_max must be finite"),
        ({"eta_max": "0.5"}, "eta_max must be a number"),
        ({"delta_rule": "normalized"}, "delta_rule must be one of normalised, input, off"),
        ({"decay_to": "none"}, "decay_to must be one of initial, zero"),
        ({"read": "future"}, "read must be one of causal, chunk_start"),
        ({"implementation": "tpu"}, "one of auto, .*, native, triton, cuda; got 'tpu'"),
    ],
)
def test_config_values(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        ScanConfig(**options)
    assert "\n" not in str(error.value)


def test_config_is_frozen_and_its_defaults_are_the_contract() -> None:
    config = ScanConfig()
    with pytest.raises(FrozenInstanceError):
        config.eta_max = 1.0  # type: ignore[misc]
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    assert values.pop("checkpoint_chunks") is None
    assert values == {
        "memory_chunk": 16,
        "projection_chunk": 64,
        "eta_max": 0.5,
        "delta_rule": "normalised",
        "decay_to": "initial",
        "read": "causal",
        "implementation": "auto",
    }
    assert config.segment_chunks == 4
    assert ScanConfig(projection_chunk=512).segment_chunks == 1
    assert ScanConfig(checkpoint_chunks=3).segment_chunks == 3


def test_config_embeds_in_a_strict_model() -> None:
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(ScanConfig)
    assert adapter.validate_python({"read": "chunk_start"}) == ScanConfig(read="chunk_start")
    for wrong in ({"memory_chunks": 8}, {"read": "later"}, {"memory_chunk": 24}):
        with pytest.raises(pydantic.ValidationError):
            adapter.validate_python(wrong)


def wrong_inputs() -> list[tuple[str, dict, str]]:
    p = make_problem(tokens=9)
    assert p.state is not None
    w, state = p.weights, p.state
    reset = torch.zeros(2, 9, dtype=torch.bool)
    off_boundary = reset.clone()
    off_boundary[1, 5] = True
    return [
        ("x", {"x": p.x[0]}, r"x must be \[B, N, T, d\], got \[2, 9, 5\]"),
        ("empty", {"x": p.x[:, :, :0], "q": p.q[:, :, :0]}, "no empty dimension"),
        ("integer", {"x": p.x.int(), "q": p.q.int()}, "x must be float32, float64 or bfloat16"),
        ("q", {"q": p.q[:, :, :5]}, r"q must be .* = \[2, 2, 9, 5\], got \[2, 2, 5, 5\]"),
        ("q dtype", {"q": p.q.float()}, "q must have x's dtype"),
        ("memories", {"weights": w._replace(w1=w.w1[:4])}, "M = 5 .* or 6"),
        (
            "no hidden width",
            {"weights": w._replace(w1=w.w1[..., :0], w2=w.w2[:, :, :0])},
            r"no hidden width: \[5, 2, 5, 0\]",
        ),
        ("w2", {"weights": w._replace(w2=w.w2[:, :, :3])}, r"weights.w2 must be \[M, N, h, d\]"),
        ("w_eta", {"weights": w._replace(w_eta=w.w_eta[0])}, r"weights.w_eta must be \[N, d\]"),
        ("b", {"weights": w._replace(b_alpha=w.b_alpha[:1])}, r"weights.b_alpha must be \[N\]"),
        (
            "precision",
            {"x": p.x.float(), "q": p.q.float(), "state": None},
            "without losing precision",
        ),
        ("state", {"state": MemoryState(state.w1[:, :1], state.w2)}, "state.w1 must be"),
        ("state dtype", {"state": MemoryState(state.w1, state.w2.float())}, "state.w2 must be"),
        ("reset", {"reset": reset[:, :8]}, r"reset must be \[B, T\]"),
        ("reset dtype", {"reset": reset.int()}, "reset must be bool"),
        ("boundary", {"reset": off_boundary}, r"reset\[1, 5\] is true, but .* multiple of"),
        ("device", {"q": p.q.to("meta")}, "q is on meta but x is on cpu"),
    ]


@pytest.mark.parametrize(
    ("change", "words"), [pytest.param(*case[1:], id=case[0]) for case in wrong_inputs()]
)
def test_inputs(change: dict, words: str) -> None:
    p = make_problem(tokens=9)
    inputs = {**p._asdict(), "config": ScanConfig(4, 8), **change}
    with pytest.raises(ValueError, match=words) as error:
        scan(**inputs)
    assert "\n" not in str(error.value)


def test_the_reset_check_can_be_skipped() -> None:
    p = make_problem(tokens=9)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 3] = True
    scan(p.x, p.q, p.weights, ScanConfig(4, 8), p.state, reset, validate_reset=False)
