"""One training pass of each public implementation and of ours, timed in pairs in one process.

Run by `tools.bench_peers` with the Python of the peers' environment, once for each comparison:
`python -m tools.peer_models NAME --pairs N` prints one line of JSON, a `Result`. Float32, one
thread, denormals flushed. Both sides see the same tokens and run forward and backward with their
memories written; neither has an optimizer.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.layer import HopeLayer
from hope.scan import ScanConfig
from hope.titans import SelfModifyingTitans

DIM, BATCH, VOCAB = 256, 2, 256
PRESET = "pilot_selfmod_paper_faithful"
"""The configuration that nested-learning's README names for its self-modifying Hope."""


@dataclass(frozen=True)
class Side:
    """One implementation: `step` makes a pass and returns how far the memory moved (norm).

    memory: fast-weight floats a batch row that a sequence rewrites; cms: parameters of the
    Continuum Memory System (0 where neither side has one).
    """

    step: Callable[[], float]
    memory: int
    cms: int = 0


@dataclass(frozen=True)
class Result:
    """What a comparison found; pairs: seconds of (theirs, ours), one after the other."""

    tokens: int
    memory: tuple[int, int]
    cms: tuple[int, int]
    pairs: list[tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """A peer and ours on the same work; `build(tokens)` makes both sides."""

    tokens: int
    build: Callable[[int], tuple[Side, Side]]


def titans_config(**changes: Any) -> HopeConfig:
    """One layer of Hope with one head, as the peers have: memory chunk 16, projection chunk 64."""
    scan = ScanConfig(memory_chunk=16, projection_chunk=64)
    titans = TitansConfig(scan=scan)
    return HopeConfig(
        dim=DIM, num_layers=1, num_heads=1, vocab_size=VOCAB, titans=titans, **changes
    )


def memory_floats(mixer: SelfModifyingTitans) -> int:
    """Fast-weight floats of one batch row: (W1, W2) of every memory and head."""
    return mixer.memory_w1.numel() + mixer.memory_w2.numel()


def our_mixer(tokens: int) -> Side:
    """The Titans mixer alone: projections, convolutions, memories, gate and output."""
    layer = cast(HopeLayer, HopeModel(titans_config(), seed=0).layers[0])
    mixer = cast(SelfModifyingTitans, layer.mixer)
    x = torch.randn(BATCH, tokens, DIM)

    def step() -> float:
        mixer.zero_grad()
        y, state = mixer(x.clone().requires_grad_())
        (y * x).sum().backward()
        return _distance(state.memory.w1, mixer.memory_w1.unsqueeze(1))

    return Side(step, memory_floats(mixer))


def our_model(tokens: int, levels: int, cms: int) -> Side:
    """A one-layer Hope whose `levels` CMS levels have at least `cms` parameters together."""
    hidden = -(-cms // (levels * 3 * DIM))
    named = [LevelConfig(name=f"level_{i}", hidden_size=hidden) for i in range(levels)]
    model = HopeModel(titans_config(cms=CMSConfig(levels=tuple(named))), seed=0)
    inputs, targets = draw(tokens)
    layer = cast(HopeLayer, model.layers[0])
    mixer = cast(SelfModifyingTitans, layer.mixer)

    def step() -> float:
        model.zero_grad()
        logits, state = model(inputs)
        cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        return _distance(state.layers[0].memory.w1, mixer.memory_w1.unsqueeze(1))

    return Side(step, memory_floats(mixer), _numel(layer.cms.parameters()))


def lucidrains(tokens: int) -> tuple[Side, Side]:
    """titans-pytorch: NeuralMemory with its defaults at chunk 16, beside the Titans mixer."""
    from titans_pytorch import NeuralMemory

    memory = NeuralMemory(dim=DIM, chunk_size=16)
    starts = memory.memory_model_parameter_dict
    x = torch.randn(BATCH, tokens, DIM)

    def step() -> float:
        memory.zero_grad()
        y, state = memory(x.clone().requires_grad_())
        (y * x).sum().backward()
        return sum(_distance(last, starts[name]) for name, last in state.states[0].items())

    return Side(step, _numel(starts.values())), our_mixer(tokens)


def kmccleary(tokens: int, chunk: int | None = None) -> tuple[Side, Side]:
    """nested-learning: its preset at width 256 and one layer, trained as its loop does.

    The loop takes the sequence in chunks of `train.online_chunk_size` tokens: forward, backward,
    then a second forward that writes the memories and the CMS. The preset leaves the size at 0,
    which means the shortest CMS period, 1; `chunk` replaces it.
    """
    from nested_learning.levels import LevelSpec
    from nested_learning.model import HOPEModel, ModelConfig

    read = _preset(PRESET)
    settings = read["model"] | {"dim": DIM, "num_layers": 1, "vocab_size": VOCAB}
    settings["titan_level"] = LevelSpec(**settings["titan_level"])
    levels = settings["cms_levels"] = [LevelSpec(**level) for level in settings["cms_levels"]]
    model = HOPEModel(ModelConfig(**settings))
    size = chunk or read["train"]["online_chunk_size"] or min(one.update_period for one in levels)
    block = model.blocks[0]
    inputs, targets = draw(tokens)

    def step() -> float:
        model.zero_grad()
        state = model.init_fast_state()
        for start, stop in online_chunks(tokens, size):
            part, wanted = inputs[:, start:stop], targets[:, start:stop]
            logits, _, outputs = model.forward_with_block_outputs(part, fast_state=state)
            loss = cross_entropy(logits.flatten(0, 1), wanted.flatten())
            signals = torch.autograd.grad(loss, outputs, retain_graph=True)
            loss.backward()
            with torch.no_grad():
                model(
                    part,
                    teach_signals=[signal.detach() for signal in signals],
                    fast_state=state,
                    finalize_updates=stop == tokens,
                )
            model.pop_update_metrics()
        return _distance(state.blocks[0].selfmod_state.memory.w1, block.selfmod.m_memory.w1.weight)

    start = model.init_fast_state().blocks[0].selfmod_state
    written = [start.k, start.v, start.eta, start.alpha, start.memory]  # q is not adaptive
    weights = [w for one in written for w in (one.w1, one.w2, one.w_skip) if w is not None]
    theirs = Side(step, _numel(weights), _numel(block.cms.parameters()))
    return theirs, our_model(tokens, len(levels), theirs.cms)


COMPARISONS: dict[str, Comparison] = {
    "kmccleary": Comparison(256, kmccleary),
    "kmccleary_chunk64": Comparison(256, lambda tokens: kmccleary(tokens, 64)),
    "kmccleary_whole": Comparison(256, lambda tokens: kmccleary(tokens, tokens)),
    "lucidrains": Comparison(1024, lucidrains),
}
"""Name -> comparison. One layer each, so a token's time does not depend on how many there are
with kmccleary; lucidrains' grows with the tokens, whose fast weights it keeps all at once."""


def draw(tokens: int) -> tuple[Tensor, Tensor]:
    """Random inputs and the token after each, int64 [BATCH, tokens] both."""
    both = torch.randint(VOCAB, (BATCH, tokens + 1), generator=torch.Generator().manual_seed(0))
    return both[:, :-1], both[:, 1:]


def online_chunks(tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive chunks of at most `size` tokens."""
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def compare(
    comparison: Comparison, pairs: int, report: Callable[[int, float, float], None]
) -> Result:
    """Time theirs and ours in turn, after a shorter pass of both that checks their writes.

    Seconds are the thread's own (process time), which other jobs on the machine disturb least.
    """
    torch.manual_seed(0)
    for side in comparison.build(64):
        assert side.step() > 0, "a memory was not written"
    theirs, ours = comparison.build(comparison.tokens)
    assert ours.memory >= theirs.memory, "our memory is the smaller"
    assert ours.cms >= theirs.cms, "our CMS is the smaller"
    ours.step()
    found = []
    for number in range(1, pairs + 1):
        found.append((_seconds(theirs.step), _seconds(ours.step)))
        report(number, *found[-1])
    memory, cms = (theirs.memory, ours.memory), (theirs.cms, ours.cms)
    return Result(comparison.tokens, memory, cms, found)


def _seconds(step: Callable[[], float]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _distance(now: Tensor, start: Tensor) -> float:
    return float((now.detach() - start.detach()).norm())


def _numel(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _preset(name: str) -> dict[str, Any]:
    """A configuration of nested-learning with the ones it is based on (hydra's `defaults`)."""
    files = importlib.resources.files("nested_learning") / "configs"
    own = yaml.safe_load((files / f"{name}.yaml").read_text())
    merged: dict[str, Any] = {}
    for base in own.pop("defaults", ["_self_"]):
        layer = own if base == "_self_" else _preset(base.lstrip("/"))
        for section in ("model", "train"):
            merged[section] = merged.get(section, {}) | layer.get(section, {})
    return merged


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, the result on stdout; 1, one line, not installed; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tools.peer_models")
    parser.add_argument("name", choices=COMPARISONS)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

    def report(number: int, theirs: float, ours: float) -> None:
        line = f"{options.name} | {number}/{options.pairs} | {theirs:.2f} s, ours {ours:.2f} s"
        print(line, file=sys.stderr, flush=True)

    try:
        result = compare(COMPARISONS[options.name], options.pairs, report)
    except ImportError as error:
        print(f"{options.name}: not installed ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
