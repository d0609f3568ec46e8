"""One layer, and a small model, under what a trainer wraps around them."""

from __future__ import annotations

import multiprocessing
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from hope import AttentionConfig, CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.layer import HopeLayer
from hope.sampling import generate
from hope.scan import ScanConfig

LEVELS = (LevelConfig(name="a", hidden_size=24), LevelConfig(name="b", hidden_size=16))
BASE = HopeConfig(
    vocab_size=29,
    dim=32,
    num_layers=2,
    num_heads=2,
    titans=TitansConfig(scan=ScanConfig(4, 8)),
    cms=CMSConfig(levels=LEVELS),
)
MODELS = {
    "titans": BASE,
    "writes_off": replace(BASE, titans=replace(BASE.titans, writes=False)),
    "attention": replace(BASE, mixer="attention", attention=AttentionConfig(conv_width=4)),
    "independent": replace(
        BASE, cms=replace(BASE.cms, mode="independent"), pattern=("titans", "attention")
    ),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> HopeModel:
    return HopeModel(MODELS[request.param])


def tokens_of(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 29, (rows, length), generator=torch.Generator().manual_seed(0))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


def run_layer(layer: Any, parameters: HopeLayer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y, _ = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), {"x": x.grad, **gradients(parameters)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name],
            other[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_layer_compiles_to_one_graph(model: HopeModel) -> None:
    """aot_eager traces forward and backward; generating code from them is the slow test below."""
    layer, x = model.layers[-1], torch.randn(2, 24, 32)
    plain, expected = run_layer(layer, layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, actual = run_layer(compiled, layer, x)
    torch.testing.assert_close(y, plain)
    assert_same(actual, expected, 1e-5)
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[0, 8] = True
    state = layer.mixer.initial_state(2, decoding=True)
    again, _ = compiled(x, state, starts)
    torch.testing.assert_close(again, layer(x, state, starts)[0])


@pytest.mark.slow
def test_a_compiled_layer_in_generated_code(model: HopeModel) -> None:
    layer, x = model.layers[-1], torch.randn(2, 24, 32)
    plain, expected = run_layer(layer, layer, x)
    y, actual = run_layer(torch.compile(layer, fullgraph=True), layer, x)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    assert_same(actual, expected, 1e-3)


def test_activation_checkpointing_gives_the_same_gradients(model: HopeModel) -> None:
    layer, x = model.layers[0], torch.randn(2, 24, 32)
    plain, expected = run_layer(layer, layer, x)

    def recomputed(x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=False)

    y, actual = run_layer(recomputed, layer, x)
    assert torch.equal(y, plain)
    assert_same(actual, expected, 0.0)


def test_inference_mode_gives_the_same_logits(model: HopeModel) -> None:
    tokens = tokens_of()
    expected = model(tokens)[0].detach()
    with torch.inference_mode():
        logits, state = model(tokens)
        model(tokens[:, :3], state)  # and what it leaves can be read on
    assert torch.equal(logits, expected)
    if model.config.pattern is None:
        chosen = generate(model, tokens[0, :5], 4, temperature=0)
        assert len(chosen) == 4


@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_bfloat16_activations_keep_float32_memories(model: HopeModel, how: str) -> None:
    """Both ways of asking for bfloat16: finite gradients, a loss near float32's."""
    tokens = tokens_of(2, 40)
    expected = loss_of(model(tokens)[0], tokens)
    if how == "parameters":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        first, state = model(tokens[:, :19])
        if state.layers[0] is None:  # attention carries nothing unless it decodes
            first, state = model(tokens[:, :19], model.initial_state(2, decoding=True))
        second, state = model(tokens[:, 19:], state)
    for name, tensor in state.named_tensors().items():
        if ".memory." in name:
            assert tensor.dtype == torch.float32
    logits = torch.cat([first, second], dim=1)
    assert logits.dtype == torch.bfloat16
    loss = loss_of(logits, tokens)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0.02)
    loss.backward()
    for name, gradient in gradients(model).items():
        assert bool(gradient.isfinite().all()), name


def test_decoding_token_by_token_is_the_parallel_pass(model: HopeModel) -> None:
    """For a layer alone; tests/hope/test_model.py has whole models at any split."""
    layer, x = model.layers[0].double(), torch.randn(2, 24, 32, dtype=torch.float64)
    state, parts = layer.mixer.initial_state(2, decoding=True), []
    with torch.no_grad():
        for one in x.split(1, dim=1):
            y, state = layer(one, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), layer(x)[0], rtol=1e-9, atol=1e-9)


def train_steps(model: HopeModel, tokens: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three steps of SGD, and the last step's gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses: list[float] = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model(tokens)[0], tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, gradients(model)


def check_fsdp(rank: int, size: int, rendezvous: str, results: Any) -> None:
    """In a process of its own: every model sharded over the ranks, against itself unsharded."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    try:
        mesh, tokens = init_device_mesh("cpu", (size,)), tokens_of(2 * size)
        for config in MODELS.values():
            losses, expected = train_steps(HopeModel(config), tokens)
            sharded = HopeModel(config)
            for layer in sharded.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            own, shards = train_steps(sharded, tokens[2 * rank : 2 * rank + 2])
            mean = torch.tensor(own)
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / size, torch.tensor(losses), rtol=1e-5, atol=1e-5)
            whole = {name: shard.full_tensor() for name, shard in shards.items()}
            assert_same(whole, expected, 1e-4)
        results.put(None)
    except Exception:
        results.put(traceback.format_exc())
    finally:
        dist.destroy_process_group()


def test_fsdp_gives_the_losses_and_gradients_of_one_process(tmp_path: Path) -> None:
    size = 2
    processes = multiprocessing.get_context("forkserver")
    results = processes.Queue()
    arguments = (size, f"file://{tmp_path}/rendezvous", results)
    ranks = [processes.Process(target=check_fsdp, args=(rank, *arguments)) for rank in range(size)]
    for process in ranks:
        process.start()
    try:
        for _ in ranks:
            failure = results.get(timeout=120)
            assert failure is None, failure
    finally:
        for process in ranks:
            process.join(timeout=30)
            process.kill()
