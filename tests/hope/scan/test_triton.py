"""The scan's Triton kernels against the float64 token loop, and as operators.

Without a GPU they run in Triton's interpreter (tests/__init__.py), also in float64, where the
agreement is to round-off; on a GPU in float32, at the widths compiled for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hope import CMSConfig, HopeConfig, LevelConfig, TitansConfig
from hope.flops import scan_flops
from hope.init import initialise
from hope.layer import HopeLayer
from hope.scan import ScanConfig, scan
from hope.scan.triton import _scan_triton
from tests.hope.scan.cases import (
    READS,
    RULES,
    Problem,
    every_option,
    everything,
    forgotten,
    make_problem,
    worst_error,
)

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
WIDTH = 64 if ON_GPU else 16
SINGLE, DOUBLE = {torch.float32: 1e-4}, {torch.float64: 1e-10}
EXACT = SINGLE if ON_GPU else DOUBLE
RESETS = ((0, 32), (1, 0))


@pytest.fixture(scope="module", autouse=True)
def quick_device_functions() -> Iterator[None]:
    """The interpreter patches triton.language anew in every call of a device function, which the
    launch has done already: that is most of its time. Triton's own functions, such as sigmoid, see
    it as another module, which is patched here."""
    if ON_GPU:
        yield
        return
    from triton.language import sigmoid
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang

    core = _patch_lang(sigmoid.fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", lambda f, *a, **k: f.rewrite()(*a, **k))
        yield
    core.restore()


def small(tokens: int = 37, width: int = WIDTH, **options: object) -> Problem:
    return make_problem(2, 1, tokens, width, **options)  # type: ignore[arg-type]


def check_parity(
    problem: Problem,
    config: ScanConfig,
    precisions: dict[torch.dtype, float] = EXACT,
    floor: float = 1e-12,
) -> None:
    expected = everything(problem, replace(config, implementation="reference"))
    for dtype, tolerance in precisions.items():
        moved = Problem(*(to_device(part, dtype) for part in problem))
        actual = everything(moved, replace(config, implementation="triton"))
        actual = {name: z.cpu() for name, z in actual.items()}
        error, name = worst_error(expected, actual, floor)
        assert error < tolerance, f"{name} is off by {error:.1e} in {dtype}"


def to_device(part: object, dtype: torch.dtype) -> object:
    if isinstance(part, torch.Tensor):
        if part.dtype == torch.bool:
            return part.to(DEVICE)
        return part.detach().to(DEVICE, dtype).requires_grad_()
    return None if part is None else type(part)(*(to_device(z, dtype) for z in part))  # type: ignore


@pytest.mark.parametrize(
    ("rule", "decay_to", "read"),
    every_option(
        ("initial", "causal"),
        ("zero", "chunk_start"),
        ("initial", "chunk_start"),
        ("zero", "causal"),
    ),
)
def test_every_option(rule: str, decay_to: str, read: str) -> None:
    """With resets and a partial last chunk; six memories and a carried state half the time."""
    number = RULES.index(rule)
    eta_max = 0.5 if rule in ("normalised", "target") else 0.1
    config = ScanConfig(16, 32, eta_max, rule, decay_to, read, checkpoint_chunks=1)
    memories = 5 + (number + (decay_to == "zero")) % 2
    with_state = (number // 2 + (read == "causal")) % 2 == 0
    check_parity(small(memories=memories, with_state=with_state, resets=RESETS), config)


@pytest.mark.parametrize(
    ("chunks", "checkpoint_chunks", "shape"),
    [
        ((16, 16), 2, {"tokens": 5}),
        ((16, 48), 1, {"tokens": 60, "rows": 1}),
        pytest.param(
            (16, 16), 2, {"tokens": 70, "rows": 1, "expansion": 2}, marks=pytest.mark.slow
        ),
        ((32, 64), None, {"tokens": 70, "rows": 1, "expansion": 2, "resets": ((0, 64),)}),
        pytest.param((48, 48), 1, {"tokens": 65, "rows": 1}, marks=pytest.mark.slow),
        pytest.param((64, 64), 1, {"tokens": 30, "rows": 1}, marks=pytest.mark.slow),
        ((16, 16), 1, {"tokens": 20, "width": 12, "expansion": 2}),
        pytest.param(
            (16, 32),
            2,
            {"tokens": 33, "rows": 3, "heads": 2, "resets": ((0, 32), (2, 0))},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_shapes_and_chunks(
    chunks: tuple[int, int], checkpoint_chunks: int | None, shape: dict
) -> None:
    config = ScanConfig(*chunks, checkpoint_chunks=checkpoint_chunks)
    shape = {"rows": 2, "heads": 1, "width": WIDTH, **shape}
    if ON_GPU:
        shape |= {"width": WIDTH, "expansion": 1}
    check_parity(make_problem(**shape), config)


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_states_that_begin_as_the_weights_leave_them_alone(rows: int) -> None:
    config = ScanConfig(16, 16, decay_to="zero", checkpoint_chunks=1)
    problem = make_problem(rows, 1, 40, WIDTH, with_state=False, resets=((0, 32),))
    check_parity(problem, config)


@pytest.mark.parametrize(
    ("rule", "read", "rows"),
    [
        ("normalised", "causal", 1),
        *(
            pytest.param(rule, read, 2, marks=pytest.mark.slow)
            for rule, read in itertools.product(RULES, READS)
        ),
    ],
)
def test_several_tiles_and_blocks_of_a_chunk(
    rule: str, read: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiles of the hidden width; two blocks that share a frozen state in M_mem, four in the
    other memories; rows that start again at the first token and later, with carried states."""
    from hope.scan import launch, layouts

    monkeypatch.setattr(layouts, "BLOCK", 16)
    chosen = launch.options
    monkeypatch.setattr(launch, "options", lambda *kind: (4, min(16, chosen(*kind)[1])))
    eta_max = 0.5 if rule in ("normalised", "target") else 0.1
    config = ScanConfig(32, 64, eta_max, rule, read=read, checkpoint_chunks=1)  # type: ignore
    resets = ((0, 0), (rows - 1, 64))
    check_parity(make_problem(rows, 1, 85, 16, 2, memories=6, resets=resets), config)


@pytest.mark.parametrize("rule", ["normalised", pytest.param("target", marks=pytest.mark.slow)])
def test_single_precision(rule: str) -> None:
    check_parity(small(resets=RESETS), ScanConfig(16, 32, delta_rule=rule), SINGLE)


@pytest.mark.parametrize(
    ("b_eta", "b_alpha"),
    [(-200.0, 3.0), pytest.param(0.0, -200.0, marks=pytest.mark.slow), (60.0, 60.0)],
)
def test_saturated_gates(b_eta: float, b_alpha: float) -> None:
    """Steps of exactly zero, decays that underflow, and neither: finite, and the loop's values."""
    problem = small(tokens=17)
    weights = problem.weights._replace(
        b_eta=torch.full_like(problem.weights.b_eta, b_eta).requires_grad_(),
        b_alpha=torch.full_like(problem.weights.b_alpha, b_alpha).requires_grad_(),
    )
    check_parity(problem._replace(weights=weights), ScanConfig(16, 16), SINGLE, floor=1.0)


def test_memories_that_are_forgotten() -> None:
    """|act(W2 k)| is below the floor of its norm, but the length in W1's step has no floor."""
    problem = make_problem(1, 1, 52, WIDTH, with_state=False, seed=1)
    check_parity(forgotten(problem, -0.5), ScanConfig(16, 32, decay_to="zero"))


def test_slow_decay_keeps_its_precision() -> None:
    """At alpha = 0.99999 with a carried state, M_0 matters through a sum of tiny terms only."""
    problem = small()
    weights = problem.weights._replace(
        w_alpha=(0.1 * problem.weights.w_alpha).detach().requires_grad_(),
        b_alpha=torch.full_like(problem.weights.b_alpha, 12.0).requires_grad_(),
    )
    check_parity(problem._replace(weights=weights), ScanConfig(16, 32), SINGLE)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("c", [16, 32, 64])
def test_triangular_inverse_of_equal_keys(c: int, eta: float) -> None:
    """Where every key is the same and every step full, the worst system a chunk can have; powers
    of T, summed one by one, have terms of 1e17 there."""
    from tests.hope.scan.inverse_kernel import invert

    strict = eta * torch.ones(c, c, device=DEVICE).tril(-1)
    out = torch.empty_like(strict)
    invert[(1,)](strict, out, c, "tf32x3")
    eye = torch.eye(c, dtype=torch.float64)
    error = out.double().cpu() @ (eye + strict.double().cpu()) - eye
    assert error.abs().max() < 1e-4


def problem_on_device(**options: object) -> Problem:
    problem = small(**options)  # type: ignore[arg-type]
    return Problem(*(to_device(part, torch.float32) for part in problem))  # type: ignore[arg-type]


CONFIG = ScanConfig(16, 16, checkpoint_chunks=1, implementation="triton")


@pytest.mark.slow
@pytest.mark.parametrize("with_state", [True, False])
def test_operators_pass_torchs_own_checks(with_state: bool) -> None:
    p = problem_on_device(tokens=17, with_state=with_state, resets=((1, 16),))
    options = (16, 16, 0.5, "normalised", "initial", "causal", 1, False, True)
    arguments = (p.x, p.q, *p.weights, *(p.state or (None, None)), p.reset, *options)
    torch.library.opcheck(_scan_triton, arguments)


def test_a_layer_compiles_to_one_graph() -> None:
    scan_config = replace(CONFIG, checkpoint_chunks=None)
    config = HopeConfig(
        dim=2 * WIDTH,
        num_layers=1,
        num_heads=2,
        titans=TitansConfig(scan=scan_config),
        cms=CMSConfig(levels=(LevelConfig(name="a", hidden_size=16),)),
    )
    layer = HopeLayer(config, "titans")
    initialise(layer, seed=0)
    layer.to(DEVICE)
    x = torch.randn(1, 16, 2 * WIDTH, device=DEVICE)
    parameters = [z for z in layer.parameters() if z.requires_grad]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return layer(x)[0].square().sum()

    plain = loss(x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, plain)
    expected = torch.autograd.grad(plain, parameters)
    torch.testing.assert_close(torch.autograd.grad(compiled, parameters), expected)


@pytest.mark.slow
def test_activation_checkpointing_and_no_gradients() -> None:
    p = problem_on_device(tokens=20)
    leaves = [p.x, p.weights.w1]

    def call(x: torch.Tensor) -> torch.Tensor:
        out, final = scan(x, p.q, p.weights, CONFIG, p.state)
        return out.square().sum() + final.w1.sum()

    plain = call(p.x)
    again = torch.utils.checkpoint.checkpoint(call, p.x, use_reentrant=False)
    gradients = torch.autograd.grad(again, leaves)
    assert all(map(torch.equal, torch.autograd.grad(plain, leaves), gradients))
    with torch.no_grad():
        assert torch.equal(call(p.x), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_states_are_exact_and_what_products_take_is_rounded(dtype: torch.dtype) -> None:
    from hope.scan.layouts import Layouts
    from hope.scan.segments import Segment

    p = small()
    layouts = Layouts(CONFIG, p.x.to(dtype), p.q.to(dtype), list(p.weights), None)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert (layouts.fresh.dtype, layouts.base.dtype) == (exact, dtype)
    segment = Segment(layouts, keep=True)
    segment.begin(layouts, layouts.start(None))
    for writer in (segment.projections, segment.mem):
        assert (writer.state.dtype, writer.work.dtype) == (exact, exact)
        assert (writer.frozen.dtype, writer.deltas.dtype) == (dtype, dtype)
        begun = layouts.base[writer.which].repeat_interleave(2, 0).view_as(writer.frozen[:, :, 0])
        assert torch.equal(writer.frozen[:, :, 0], begun)  # two rows of one head


@pytest.mark.slow
@pytest.mark.parametrize("read", ["causal", "chunk_start"])
@pytest.mark.parametrize("memories", [6, 5])
def test_memory_that_nothing_has_written_is_not_used(memories: int, read: str) -> None:
    """Tokens that fill up the last chunk are among what nothing writes."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills it with NaN
    try:
        assert torch.zeros(1).new_empty(1).isnan().all()
        config = replace(CONFIG, read=read)  # type: ignore[arg-type]
        check_parity(small(tokens=69, memories=memories, resets=RESETS), config)
    finally:
        torch.use_deterministic_algorithms(False)


def test_tensors_may_lie_in_any_order() -> None:
    p = problem_on_device(tokens=5)
    weight = torch.randn(*p.x.mT.shape, device=DEVICE)
    results = []
    for apart in (False, True):
        x, q = (z.mT.contiguous().mT if apart else z for z in (p.x, p.q))
        out, final = scan(x, q, p.weights, CONFIG, p.state)
        loss = (out.mT * weight).sum() if apart else (out * weight.mT.contiguous()).sum()
        gradients = torch.autograd.grad(loss, [p.x, p.q, p.weights.w1])
        results.append([out, final.w1, *gradients])
    assert all(map(torch.equal, *results))


def test_double_backward_is_refused() -> None:
    p = problem_on_device(tokens=8)
    out, _ = scan(p.x, p.q, p.weights, CONFIG, p.state)
    (gradient,) = torch.autograd.grad(out.square().sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="scan: no second derivative"):
        gradient.sum().backward()


def test_operations_are_counted() -> None:
    """Backward: its own, and forward twice again."""
    p = problem_on_device(tokens=16, with_state=False)
    with FlopCounterMode(display=False) as counter:
        out, _ = scan(p.x, p.q, p.weights, CONFIG)
        torch.autograd.grad(out.sum(), p.x)
    counts = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    once = scan_flops(CONFIG, 1, WIDTH, WIDTH, 5, 16, executed=False)
    assert counts["hope.scan_triton"] == 2 * 16 * once.forward
    assert counts["hope.scan_triton_backward"] == 2 * 16 * (once.backward + 2 * once.forward)
