"""Which softmax kernel is taken, with a stand-in for flash-attn (the real one needs a GPU)."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hope import AttentionConfig, HopeConfig, HopeModel
from hope.flash import FlashAttention, load_flash

BASE = HopeConfig(vocab_size=19, dim=16, num_layers=1, num_heads=2, mixer="attention")


FOUR = ("flash_attn", "flash_attn.cute")


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """flash-attn's contract: [B, T, N, d]."""
    heads_first = (z.transpose(1, 2) for z in (q, k, v))
    return scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, causal: bool,
) -> tuple[Tensor, None]:  # fmt: skip
    """flash-attn's contract: documents behind each other, [tokens, N, d]; 3's pair of results."""
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert 0 < max(lengths) <= max_seqlen_q == max_seqlen_k
    documents = zip(*(z.split(lengths) for z in (q, k, v)), strict=True)
    parts = [flash_attn_func(*(z[None] for z in one), causal=causal)[0] for one in documents]
    return torch.cat(parts), None


def install(patch: pytest.MonkeyPatch, *names: str) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        module = None
        if name in names:
            module = ModuleType(name)
            if names != FOUR or name == "flash_attn.cute":  # 4 brings nothing else of flash_attn
                vars(module).update(
                    flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
                )
        patch.setitem(sys.modules, name, module)


def queries(device: str, dtype: torch.dtype, head_dim: int = 64) -> Any:
    return SimpleNamespace(
        is_cuda=device == "cuda",
        device=SimpleNamespace(type=device),
        dtype=dtype,
        shape=(2, 4, 8, head_dim),
    )


@pytest.mark.parametrize("names", [("flash_attn",), ("flash_attn_interface",), FOUR])
def test_it_is_taken_where_it_is_installed_and_fits(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    install(monkeypatch, *names)
    assert load_flash("sdpa") is None
    flash = load_flash("auto")
    assert flash is not None
    assert flash.takes(queries("cuda", torch.bfloat16))
    assert flash.takes(queries("cuda", torch.float16))
    unfit = [
        queries("cpu", torch.bfloat16),
        queries("cuda", torch.float32),
        queries("cuda", torch.float16, head_dim=320),
    ]
    assert not any(flash.takes(q) for q in unfit)
    required = load_flash("flash")
    assert required is not None
    for q in unfit:
        with pytest.raises(ValueError, match=r"backend=flash needs .* got torch") as error:
            required.takes(q)
        assert "\n" not in str(error.value)


def test_what_only_some_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *FOUR)
    four = load_flash("flash")
    assert four is not None
    with pytest.raises(ValueError, match=r"device and heads of 64, 96 or 128, got .* 256;"):
        four.takes(queries("cuda", torch.bfloat16, head_dim=256))
    install(monkeypatch, "flash_attn")
    two = load_flash("auto")
    assert two is not None
    assert two.takes(queries("cuda", torch.bfloat16, head_dim=256))
    install(monkeypatch, "flash_attn_interface")
    three = load_flash("auto")
    assert three is not None
    fits = [n for n in range(2, 300, 2) if three.takes(queries("cuda", torch.bfloat16, n))]
    assert fits == list(range(8, 257, 8))  # 2 pads others itself
    install(monkeypatch, "flash_attn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert load_flash("auto") == two
    install(monkeypatch, *FOUR)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert load_flash("auto") is None
    with pytest.raises(ValueError, match=r"flash_attn.cute needs compute capability 9.0"):
        load_flash("flash")


def test_asked_for_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert load_flash("auto") is None
    with pytest.raises(ValueError, match="backend=flash, but flash-attn can't be used") as error:
        HopeModel(replace(BASE, attention=AttentionConfig(backend="flash")))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be auto, sdpa or flash, got 'fast'"):
        AttentionConfig(backend="fast")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("names", [("flash_attn",), FOUR])
def test_what_goes_through_it_is_what_torch_computes(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], documents: bool
) -> None:
    """Rows of one document, and documents that start anywhere; decoding stays with torch."""
    tokens = torch.randint(0, 19, (3, 12))
    starts = None
    if documents:
        starts = torch.zeros(3, 12, dtype=torch.bool)
        starts[0, [0, 5]] = starts[1, [1, 2, 11]] = True
    expected = HopeModel(BASE)(tokens, None, starts)[0]
    install(monkeypatch, *names)
    calls = []
    monkeypatch.setattr(FlashAttention, "takes", lambda self, q: calls.append(q.shape) or True)
    model = HopeModel(BASE)
    torch.testing.assert_close(model(tokens, None, starts)[0], expected)
    assert calls == [(3, 2, 12, 8)]
    model(tokens, model.initial_state(3, decoding=True), starts)
    assert len(calls) == 1
