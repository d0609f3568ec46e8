"""The invariants every mixer and CMS variant keeps (what peers get wrong)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hope import AttentionConfig, CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.init import initial_value, seed_from
from hope.scan import ScanConfig
from hope.state import ModelState

VOCABULARY = 97
LEVELS = (
    LevelConfig(name="a", hidden_size=24),
    LevelConfig(name="b", hidden_size=16, update_every_tokens=1000),
)
CMS_MODES = ("sequential", "independent", "nested")


def titans(scan: ScanConfig, **options: Any) -> dict[str, Any]:
    return {"titans": TitansConfig(scan=scan, **options)}


CHUNK_16, CHUNK_64 = ScanConfig(16, 16), ScanConfig(64, 64)
LETTER = ScanConfig(16, 16, 0.05, "input", "zero", "chunk_start")  # of Eqs. 88 and 90
MIXERS: dict[str, dict[str, Any]] = {
    "chunk_16": titans(CHUNK_16),
    "chunk_64": titans(CHUNK_64),
    "chunks_16_and_64": titans(ScanConfig(16, 64)),
    "letter_16": titans(LETTER),
    "letter_64": titans(replace(LETTER, memory_chunk=64, projection_chunk=64)),
    "aligned_target": titans(replace(CHUNK_16, delta_rule="target"), start="aligned"),
    "adaptive_query": titans(CHUNK_16, adaptive_query=True),
    "expansion": titans(CHUNK_16, memory_expansion=2),
    "writes_off": titans(CHUNK_16, writes=False),
    "attention": {"mixer": "attention"},
    "attention_conv": {"mixer": "attention", "attention": AttentionConfig(conv_width=4)},
    "hybrid": {"pattern": ("titans", "attention")},
}
BASE = HopeConfig(
    vocab_size=VOCABULARY,
    dim=32,
    num_layers=2,
    num_heads=2,
    titans=TitansConfig(scan=CHUNK_16),
    cms=CMSConfig(levels=LEVELS),
)
VARIANTS = {
    f"{mixer}-{mode}": replace(BASE, cms=CMSConfig(mode=mode, levels=LEVELS), **changes)
    for mixer, changes in MIXERS.items()
    for mode in CMS_MODES
} | {"untied": replace(BASE, tie_embeddings=False)}
VARIANTS |= {
    f"one_level-{mode}": replace(BASE, cms=CMSConfig(mode=mode, levels=LEVELS[:1]))
    for mode in CMS_MODES
}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> HopeConfig:
    return VARIANTS[request.param]


def chunk_of(config: HopeConfig) -> int:
    return config.titans.scan.projection_chunk


def length_of(config: HopeConfig) -> int:
    """Two chunks and a half."""
    return 5 * chunk_of(config) // 2


def tokens_of(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def logits_of(model: HopeModel, tokens: Tensor, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, None, **more)[0]


def test_no_output_depends_on_a_later_token(config: HopeConfig) -> None:
    model, chunk, length = HopeModel(config), chunk_of(config), length_of(config)
    tokens = tokens_of(2, length)
    before = logits_of(model, tokens)
    for position in (0, chunk - 1, chunk, length // 2 + 1, length - 1):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCABULARY
        after = logits_of(model, changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


def test_rows_do_not_touch_each_other(config: HopeConfig) -> None:
    model, length = HopeModel(config), length_of(config)
    tokens = tokens_of(3, length)
    before = logits_of(model, tokens)
    changed = tokens.clone()
    changed[1] = tokens_of(1, length, seed=1)
    after = logits_of(model, changed)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


def test_train_and_eval_agree_and_nothing_is_mutated(config: HopeConfig) -> None:
    model, tokens = HopeModel(config), tokens_of(2, length_of(config))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    first, second = logits_of(model.train(), tokens), logits_of(model.train(), tokens)
    evaluated = logits_of(model.eval(), tokens)
    assert torch.equal(first, second)
    assert torch.equal(first, evaluated)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("split", ["chunks", "ragged", "tokens"])
def test_chunked_equals_whole_at_any_split(config: HopeConfig, split: str) -> None:
    """At chunk boundaries, off them, and token by token before, over and behind one."""
    chunk, length = chunk_of(config), length_of(config)
    cuts = {
        "chunks": [chunk, chunk],
        "ragged": [5, 1, 1, chunk - 2, 7],
        "tokens": [1] * 6 + [chunk - 8] + [1] * 6,
    }[split]
    cuts.append(length - sum(cuts))
    model, tokens = HopeModel(config).double(), tokens_of(2, length)
    whole = logits_of(model, tokens)
    state = model.initial_state(2, decoding=True)
    parts = []
    with torch.no_grad():
        for part in tokens.split(cuts, dim=1):
            logits, state = model(part, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_every_parameter_has_a_gradient(config: HopeConfig) -> None:
    model, tokens = HopeModel(config), tokens_of(2, length_of(config))
    logits, _ = model(tokens)
    cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    idle: tuple[str, ...] = ()
    if not config.titans.writes:  # the control only reads: what decides on writes is idle
        idle = ("x_in.weight", "conv_x.weight", "w_eta", "b_eta", "w_alpha", "b_alpha")
    assert dead == [n for n, _ in model.named_parameters() if n.endswith(idle or ("?",))]


def test_one_level_is_the_same_in_every_mode() -> None:
    models = [HopeModel(VARIANTS[f"one_level-{mode}"]) for mode in CMS_MODES]
    logits = [logits_of(model, tokens_of(2, 40)) for model in models]
    assert all(torch.equal(one, logits[0]) for one in logits)


def test_writes_off_trains_only_the_memory_that_is_read() -> None:
    model, tokens = HopeModel(VARIANTS["writes_off-sequential"]), tokens_of(2, 40)
    model(tokens)[0].square().mean().backward()
    per_box = model.layers[0].mixer.memory_w1.grad.abs().sum(dim=(1, 2, 3))
    assert [bool(box > 0) for box in per_box] == [False, False, False, False, True]


def test_first_loss_is_the_logarithm_of_the_vocabulary(config: HopeConfig) -> None:
    model, tokens = HopeModel(config), tokens_of(8, 64)
    logits = logits_of(model, tokens)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(float(loss) / math.log(VOCABULARY) - 1) < 0.02


@pytest.mark.parametrize("mixer", [name for name in MIXERS if "attention" not in name])
def test_memories_hold_over_a_long_sequence(mixer: str) -> None:
    """Random tokens and one repeated token: nothing fades to zero, runs away, or becomes NaN."""
    model, tokens = HopeModel(replace(BASE, **MIXERS[mixer])), tokens_of(2, 512)
    tokens[1] = 3
    logits, state = model(tokens)
    cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in gradients)
    start = model.initial_state(2).detach().named_tensors()
    for tensor_name, tensor in state.detach().named_tensors().items():
        if ".memory." in tensor_name:
            kept = tensor.flatten(3).norm(dim=3) / start[tensor_name].flatten(3).norm(dim=3)
            assert 0.5 < float(kept.min()) <= float(kept.max()) < 2, tensor_name


def test_a_document_start_forgets_what_came_before(config: HopeConfig) -> None:
    model, chunk = HopeModel(config).double(), chunk_of(config)
    length = length_of(config)
    first, second = tokens_of(2, chunk), tokens_of(2, length - chunk, seed=1)
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[:, chunk] = True
    packed = logits_of(model, torch.cat([first, second], dim=1), document_starts=starts)
    torch.testing.assert_close(packed[:, :chunk], logits_of(model, first), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed[:, chunk:], logits_of(model, second), rtol=1e-9, atol=1e-9)


def test_a_document_start_in_one_row_leaves_the_other_alone(config: HopeConfig) -> None:
    model, chunk, length = HopeModel(config).double(), chunk_of(config), length_of(config)
    tokens, starts = tokens_of(2, length), torch.zeros(2, length, dtype=torch.bool)
    starts[0, chunk] = True
    split, whole = logits_of(model, tokens, document_starts=starts), logits_of(model, tokens)
    torch.testing.assert_close(split[1], whole[1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(split[0, chunk:], whole[0, chunk:])


@pytest.mark.parametrize("beyond", [0, 3])
def test_a_document_start_after_a_carried_state(config: HopeConfig, beyond: int) -> None:
    """A start in a later call equals the same start in one call: conv tails and caches too."""
    model, chunk, length = HopeModel(config).double(), chunk_of(config), length_of(config)
    tokens, starts = tokens_of(2, length), torch.zeros(2, length, dtype=torch.bool)
    starts[0, 2 * chunk] = starts[1, chunk] = True
    whole = logits_of(model, tokens, document_starts=starts)
    state = model.initial_state(2, decoding=True)
    cut = chunk + beyond
    with torch.no_grad():
        head, state = model(tokens[:, :cut], state, starts[:, :cut])
        tail, _ = model(tokens[:, cut:], state, starts[:, cut:])
    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole, rtol=1e-9, atol=1e-9)


def test_initial_weights_do_not_depend_on_the_rest_of_the_model() -> None:
    shallow, deep = HopeModel(BASE, seed=3), HopeModel(replace(BASE, pattern=("titans",)), seed=3)
    other = HopeModel(BASE, seed=4)
    named = dict(deep.named_parameters())
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, named[name])
    assert not torch.equal(shallow.layers[0].mixer.x_in.weight, other.layers[0].mixer.x_in.weight)
    assert seed_from(3, "init", "a") == 4398669661097472859  # on every machine, in every version
    assert seed_from(1, 12) != seed_from(11, 2)
    name, parameter = next(iter(named.items()))
    with torch.device("meta"):
        value = initial_value(deep, name, parameter.shape, seed=3)
    assert torch.equal(value, parameter)


def test_initial_values_are_of_the_stated_sizes() -> None:
    """By hand, for three layers of two levels; eta and alpha of a memory that knows nothing yet."""
    scan = ScanConfig(16, 16, eta_max=0.25)
    config = HopeConfig(
        vocab_size=400,
        dim=64,
        num_layers=3,
        num_heads=2,
        pattern=("titans", "titans", "attention"),
        titans=TitansConfig(memory_expansion=3, initial_eta=0.05, scan=scan),
        cms=CMSConfig(levels=LEVELS),
    )
    named = HopeModel(config).state_dict()
    for name, std in {
        "layers.0.mixer.memory_w1": 0.5 / 96**0.5,
        "layers.0.mixer.memory_w2": 2 / 32**0.5,
        "layers.0.mixer.x_in.weight": 1 / 8,
        "layers.0.mixer.gate.weight": 1 / 8,
        "layers.0.mixer.out.weight": 1 / 8 / 6**0.5,
        "layers.0.mixer.conv_x.weight": 1 / 2 / 3**0.5,  # uniform on [-1/2, 1/2]
        "layers.2.mixer.v.weight": 1 / 8,
        "layers.2.mixer.out.weight": 1 / 8 / 6**0.5,
        "layers.1.cms.levels.0.up.weight": 1 / 8,
        "layers.1.cms.levels.0.down.weight": 1 / 24**0.5 / 12**0.5,
        "layers.1.cms.levels.1.down.weight": 1 / 4 / 12**0.5,
    }.items():
        assert float(named[name].std()) == pytest.approx(std, rel=0.1), name
        assert float(named[name].mean()) == pytest.approx(0, abs=0.15 * std), name
    eta = 0.25 * named["layers.0.mixer.b_eta"].sigmoid()
    alpha = named["layers.0.mixer.b_alpha"].double().sigmoid()
    torch.testing.assert_close(eta, torch.full((2,), 0.05))
    torch.testing.assert_close(1 - alpha, torch.full((2,), 1e-4).double(), rtol=0.01, atol=0.0)


def test_the_norms_epsilon_is_positive() -> None:
    for eps in (0.0, -1.0):
        with pytest.raises(ValueError, match="norm_eps must be positive"):
            HopeConfig(norm_eps=eps)


def test_vocabulary_must_be_known() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        HopeModel(HopeConfig())


@pytest.mark.parametrize(
    ("tokens", "starts", "words"),
    [
        (torch.zeros(8, dtype=torch.int64), None, "tokens must be"),
        (torch.zeros(2, 0, dtype=torch.int64), None, "tokens must be"),
        (torch.zeros(2, 8), None, "tokens must be int32 or int64, got torch.float32"),
        (torch.zeros(2, 8, dtype=torch.uint16), None, "tokens must be int32 or int64"),
        (tokens_of(2, 8), torch.zeros(1, 8, dtype=torch.bool), "document_starts must be bool"),
        (tokens_of(2, 8), torch.zeros(2, 9, dtype=torch.bool), "document_starts must be bool"),
        (tokens_of(2, 8), torch.zeros(2, 8), "document_starts must be bool"),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(
    tokens: Tensor, starts: Tensor | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        HopeModel(BASE)(tokens, document_starts=starts)


def test_a_state_of_another_model_or_batch_is_one_line() -> None:
    """With writes off too, where only the convolution's inputs are carried."""
    model = HopeModel(replace(BASE, titans=replace(BASE.titans, writes=False)))
    with pytest.raises(ValueError, match="tail must be"):
        model(tokens_of(3, 8), model.initial_state(1))
    with pytest.raises(ValueError, match="state is of 1 layers"):
        model(tokens_of(3, 8), ModelState(model.initial_state(3).layers[:1]))


def test_an_aligned_query_meets_what_follows_its_token() -> None:
    """At the start, the query of a token points at the memories' inputs one token later."""
    titans = TitansConfig(start="aligned", scan=CHUNK_16)
    config = replace(BASE, dim=256, titans=titans)
    mixer = HopeModel(config).layers[0].mixer
    x = torch.randn(1, 64, config.dim, generator=torch.Generator().manual_seed(3))
    inputs, queries = (
        mixer.conv_x(mixer.x_in(x), None, None)[0],
        mixer.conv_q(mixer.q_in(x), None, None)[0],
    )
    cosine = (
        torch.nn.functional.normalize(queries[0], dim=-1)
        @ torch.nn.functional.normalize(inputs[0], dim=-1).mT
    )
    assert cosine.diagonal(1).min() > 0.5
    assert cosine.diagonal(2).abs().max() < 0.4
    with pytest.raises(ValueError, match=r"titans\.start must be one of independent, aligned"):
        TitansConfig(start="other")  # type: ignore[arg-type]
