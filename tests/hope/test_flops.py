"""Declared floating-point operations against what torch counts while the blocks run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hope import AttentionConfig, CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.flops import Flops, scan_flops
from hope.scan import ScanConfig, scan
from hope.scan.contract import ScanImplementation
from tests.hope.counting import executed_flops
from tests.hope.scan.cases import IMPLEMENTATIONS, make_problem

TOLERANCE = 0.02
OF_A_SCAN = 1e-3
"""The smallest line of its tables is more."""
LEVELS = (LevelConfig(name="a", hidden_size=48), LevelConfig(name="b", hidden_size=80))
BASE = HopeConfig(
    vocab_size=101,
    dim=64,
    num_layers=1,
    num_heads=2,
    titans=TitansConfig(scan=ScanConfig(16, 32, implementation="chunked")),
    cms=CMSConfig(levels=LEVELS),
)
MODELS = {
    "titans": BASE,
    "wide_memories": replace(BASE, titans=replace(BASE.titans, memory_expansion=2)),
    "adaptive_query": replace(BASE, titans=replace(BASE.titans, adaptive_query=True)),
    "writes_off": replace(BASE, titans=replace(BASE.titans, writes=False)),
    "writes_off_adaptive": replace(
        BASE, titans=replace(BASE.titans, writes=False, adaptive_query=True)
    ),
    "independent": replace(BASE, cms=replace(BASE.cms, mode="independent"), tie_embeddings=False),
    "attention": replace(BASE, mixer="attention", attention=AttentionConfig(conv_width=4)),
    "hybrid": replace(BASE, num_layers=2, pattern=("titans", "attention")),
}


def assert_close(declared: Flops, executed: Flops, tolerance: float = TOLERANCE) -> None:
    for name, one, other in zip(Flops._fields, declared, executed, strict=True):
        assert one == pytest.approx(other, rel=tolerance), f"{name}: {one / other:.4f} of executed"


@pytest.mark.parametrize("rule", ["normalised", "target", "input", "off"])
@pytest.mark.parametrize("decay_to", ["initial", "zero"])
@pytest.mark.parametrize("read", ["causal", "chunk_start"])
def test_the_scan_under_every_option(rule: str, decay_to: str, read: str) -> None:
    check_scan(ScanConfig(16, 32, 0.1, rule, decay_to, read), 32, 32, memories=6)


@pytest.mark.parametrize(
    ("config", "tokens", "width", "expansion"),
    [
        (ScanConfig(16, 16), 32, 32, 1),
        (ScanConfig(64, 64), 64, 16, 4),
        (ScanConfig(32, 128), 128, 48, 1),
        (ScanConfig(64, 256), 256, 64, 1),
        (ScanConfig(32, 32, checkpoint_chunks=1), 64, 32, 2),
        (ScanConfig(96, 96, checkpoint_chunks=3), 384, 16, 1),  # too long to keep
        (ScanConfig(32, 96), 160, 16, 1),  # the last memory chunks padded or partial
        (ScanConfig(16, 64), 9, 16, 1),
        (ScanConfig(16, 64), 1, 16, 1),
    ],
)
def test_the_scan_at_other_sizes(
    config: ScanConfig, tokens: int, width: int, expansion: int
) -> None:
    check_scan(config, tokens, width, expansion)


def check_scan(
    config: ScanConfig, tokens: int, width: int, expansion: int = 1, memories: int = 5
) -> None:
    config = replace(config, implementation="chunked")
    p = make_problem(2, 1, tokens, width, expansion, memories, with_state=False).to(torch.float32)
    executed = executed_flops(lambda: scan(p.x, p.q, p.weights, config)[0])
    declared = scan_flops(config, 1, width, expansion * width, memories, tokens)
    assert_close(Flops(*(2 * tokens * flops for flops in declared)), executed, OF_A_SCAN)


@pytest.mark.parametrize("inside", [True, False], ids=["as_executed", "as_registered"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, inside: bool) -> None:
    model, seq_len = HopeModel(MODELS[name]), 72  # two whole chunks and a rest
    tokens = torch.randint(0, 101, (2, seq_len))
    executed = executed_flops(lambda: model(tokens)[0], inside=inside)
    declared = model.flops_per_token(seq_len)
    assert_close(Flops(*(tokens.numel() * flops for flops in declared)), executed)


@pytest.mark.parametrize("mixer", ["titans", "attention"])
@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_blocks(mixer: str, mode: str) -> None:
    layer = HopeModel(replace(BASE, mixer=mixer, cms=replace(BASE.cms, mode=mode))).layers[0]
    x = torch.randn(2, 64, 64, requires_grad=True)
    for block in (layer, layer.mixer, layer.cms):
        executed = executed_flops(lambda block=block: block(x)[0])
        declared = block.flops_per_token(64)
        assert_close(Flops(*(2 * 64 * flops for flops in declared)), executed)


def test_attention_as_plain_products() -> None:
    """torch's unfused kernel, product by product: the same, but it keeps the scores."""
    attention = HopeModel(MODELS["attention"]).layers[0].mixer
    x = torch.randn(1, 64, 64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        executed = executed_flops(lambda: attention(x)[0])
    scores = 2 * 64 * 64 * 64
    declared = Flops(*(64 * flops for flops in attention.flops_per_token(64)))
    assert_close(declared, Flops(executed.forward, executed.backward + scores))


def test_what_is_needed_is_less_than_what_runs() -> None:
    """Half the square of attention, nothing twice; products of weights are needed as they are."""
    seq_len = 256
    attention = HopeModel(MODELS["attention"]).layers[0].mixer
    executed, needed = (attention.flops_per_token(seq_len, e) for e in (True, False))
    square = 2 * 2 * 64 * seq_len
    assert executed.forward - needed.forward == pytest.approx(square / 2, rel=0.01)
    assert executed.backward - needed.backward == pytest.approx(1.5 * square, rel=0.01)
    titans = HopeModel(BASE).layers[0].mixer
    executed, needed = (titans.flops_per_token(seq_len, e) for e in (True, False))
    assert needed.forward == executed.forward
    recomputed = scan_flops(titans.scan_config, 2, 32, 32, 5, seq_len).forward
    assert executed.backward - needed.backward == pytest.approx(recomputed)
    level = HopeModel(BASE).layers[0].cms
    assert level.flops_per_token(seq_len, True) == level.flops_per_token(seq_len, False)
    assert level.flops_per_token(seq_len) == Flops(2 * 3 * 64 * 128, 4 * 3 * 64 * 128)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_plain_counter_sees_the_scan_and_attention(implementation: ScanImplementation) -> None:
    """FlopCounterMode as a user has it: custom operators and the CPU's attention count too."""
    hybrid = MODELS["hybrid"]
    scan_config = ScanConfig(64, 128, implementation=implementation)
    model = HopeModel(replace(hybrid, titans=replace(hybrid.titans, scan=scan_config)))
    executed = executed_flops(lambda: model(torch.randint(0, 101, (1, 200)))[0], inside=False)
    assert_close(Flops(*(200 * flops for flops in model.flops_per_token(200))), executed)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 101, (1, 64)))
    counted = {str(name) for name in counter.get_flop_counts()["Global"]}
    attention = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert {f"hope.scan_{implementation}", attention} <= counted
