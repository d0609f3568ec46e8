"""What blocks say they carry against what they carry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hope import AttentionConfig, HopeConfig, HopeModel, ModelState, TitansConfig
from hope.scan import ScanConfig
from hope.state import bytes_per_row, row_axis

BASE = HopeConfig(
    vocab_size=19, dim=24, num_layers=2, num_heads=4, titans=TitansConfig(scan=ScanConfig(4, 8))
)
MODELS = {
    "titans": BASE,
    "wide_memories": replace(BASE, titans=replace(BASE.titans, memory_expansion=2)),
    "adaptive_query": replace(BASE, titans=replace(BASE.titans, adaptive_query=True)),
    "one_tap": replace(BASE, titans=replace(BASE.titans, conv_width=1)),
    "writes_off": replace(BASE, titans=replace(BASE.titans, writes=False)),
    "attention": replace(BASE, mixer="attention"),
    "attention_conv": replace(BASE, mixer="attention", attention=AttentionConfig(conv_width=4)),
    "hybrid": replace(BASE, pattern=("titans", "attention")),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def check(model: HopeModel, state: ModelState, rows: int, decoding: bool, tokens: int) -> None:
    spec, carried = model.state_spec(rows, decoding, tokens), state.named_tensors()
    assert spec.keys() == carried.keys()
    for name, one in spec.items():
        assert carried[name].shape == one.shape, name
        assert carried[name].dtype == one.dtype, name
        assert one.row_axis == row_axis(name), name
        assert one.shape[one.row_axis] == rows, name
    total = sum(z.numel() * z.element_size() for z in carried.values())
    assert bytes_per_row(spec) * rows == total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_specification_is_what_is_carried(name: str, dtype: torch.dtype) -> None:
    """Before the first token, within the first chunk, behind it, and at a chunk's end."""
    model = HopeModel(MODELS[name]).to(dtype)
    for decoding in (False, True):
        state = model.initial_state(3, decoding)
        check(model, state, 3, decoding, 0)
        for more, tokens in ((5, 5), (14, 19), (5, 24)):
            with torch.no_grad():
                _, state = model(torch.randint(0, 19, (3, more)), state)
            check(model, state, 3, decoding, tokens)
    with torch.no_grad():
        _, state = model(torch.randint(0, 19, (3, 19)))
    check(model, state, 3, False, 19)


@pytest.mark.parametrize("tokens", [5, 16, 19])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["titans", "writes_off"])
def test_a_carried_state_keeps_nothing_else_alive(name: str, given: bool, tokens: int) -> None:
    """Its storage is its own: neither a whole batch of activations nor the parameters."""
    model = HopeModel(MODELS[name])
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    first = model.initial_state(1) if given else None
    _, state = model(torch.randint(0, 19, (1, tokens)), first)
    for key, tensor in state.detach().named_tensors().items():
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.numel() * tensor.element_size(), key
        assert storage.data_ptr() not in parameters or storage.nbytes() == 0, key


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize(
    ("name", "change", "rows", "words"),
    [
        ("titans", {"mixer": "attention"}, 2, "carries TitansState, got AttentionState"),
        ("attention", {"mixer": "titans"}, 2, "carries AttentionState, got TitansState"),
        ("hybrid", {"pattern": ("attention", "titans")}, 2, "got AttentionState"),
        ("attention", {}, 1, r"k must be \[B, N, any, d\] = \[2, 4, any, 6\], got \[1, 4, "),
        ("attention", {}, 3, r"state\.k must be"),
        ("attention", {"dim": 32}, 2, r"state\.k must be"),
        ("attention_conv", {"num_heads": 2}, 2, r"state\.k must be"),
        ("titans", {"num_heads": 2}, 2, r"state\.(pending_x|w1) must be"),
        ("one_tap", {}, 3, "tail must be"),
        ("titans", {"titans": MODELS["writes_off"].titans}, 2, "with titans.writes=false"),
        ("writes_off", {"titans": BASE.titans}, 2, "with titans.writes=true"),
    ],
)
def test_a_state_of_another_model_is_one_line(
    name: str, change: dict, rows: int, words: str, tokens: int
) -> None:
    """Before the first token, and with tokens that wait in it."""
    other = HopeModel(replace(MODELS[name], **change))
    state = other.initial_state(rows, decoding=True)
    if tokens > 0:
        _, state = other(torch.zeros(rows, tokens, dtype=torch.int64), state)
    with pytest.raises(ValueError, match=words) as error:
        HopeModel(MODELS[name])(torch.zeros(2, 3, dtype=torch.int64), state)
    assert "\n" not in str(error.value)


def test_bytes_of_a_row() -> None:
    """Five memories of two matrices in float32, and two tails of three inputs."""
    spec = HopeModel(BASE).layers[0].mixer.state_spec(7)
    assert bytes_per_row(spec) == 5 * 4 * (2 * 6 * 6) * 4 + 2 * 3 * 24 * 4
    assert HopeModel(BASE).layers[0].cms.state_spec(7) == {}
    half = HopeModel(BASE).layers[0].mixer.state_spec(7, dtype=torch.bfloat16)
    assert bytes_per_row(half) == 5 * 4 * (2 * 6 * 6) * 4 + 2 * 3 * 24 * 2


def test_one_number_that_is_not_finite_is_found_wherever_it_is() -> None:
    _, state = HopeModel(BASE)(torch.randint(0, 19, (2, 13)))
    state = state.detach()
    assert state.is_finite()
    for broken, tensor in state.named_tensors().items():
        spoiled = tensor.clone(memory_format=torch.contiguous_format)
        spoiled.view(-1)[-1] = float("inf")
        assert not state.map(lambda name, z: spoiled if name == broken else z).is_finite()  # noqa: B023
