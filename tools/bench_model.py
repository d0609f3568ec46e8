"""python -m tools.bench_model: what does a Hope layer cost beside a Transformer++ layer?

One layer of each, equal width, heads of 64, the same MLP, one sequence, float32, in one process.
Times are medians over pairs of runs, one of each right after the other, as the ratio Hope over
Transformer++; memory is the peak of what a forward and backward pass allocate; rates are the
operations that FlopCounterMode counts over the time taken.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from data_pipeline.command import as_command
from hope import CMSConfig, HopeConfig, LevelConfig, TitansConfig
from hope.config import MixerName
from hope.init import initialise
from hope.layer import HopeLayer
from hope.scan import ScanConfig
from tools import bench_peers
from tools.figures import table, write_figures

HEAD_DIM = 64
WIDTHS, LENGTHS, THREADS = (256, 512), (1024, 4096, 16384), (1, 2)
CHUNKS = ((16, 64), (64, 256))


@dataclass(frozen=True)
class Case:
    """One comparison: width of the layers, tokens of the sequence, chunks, threads of torch."""

    width: int
    tokens: int
    chunks: tuple[int, int]
    threads: int

    @property
    def key(self) -> str:
        """What its figures are called after their kind."""
        memory, projection = self.chunks
        return f"w{self.width}_t{self.tokens}_c{memory}x{projection}_threads{self.threads}"


def make_layer(mixer: MixerName, width: int, chunks: tuple[int, int]) -> HopeLayer:
    """A layer with the SwiGLU width of a Transformer++, 8/3 of its own in whole eights."""
    memory_chunk, projection_chunk = chunks
    scan = ScanConfig(memory_chunk=memory_chunk, projection_chunk=projection_chunk)
    hidden = width * 8 // 3 // 8 * 8
    config = HopeConfig(
        dim=width,
        num_layers=1,
        num_heads=width // HEAD_DIM,
        mixer=mixer,
        titans=TitansConfig(scan=scan, initial_eta=0.48 / projection_chunk),
        cms=CMSConfig(levels=(LevelConfig(name="every_step", hidden_size=hidden),)),
    )
    layer = HopeLayer(config, mixer)
    initialise(layer, seed=0)
    return layer


def run(layer: HopeLayer, x: Tensor, backward: bool) -> float:
    """Seconds of one pass over x [1, T, width]."""
    for parameter in layer.parameters():
        parameter.grad = None
    ones = torch.ones_like(x)
    start = time.perf_counter()
    if backward:
        y, _ = layer(x.detach().requires_grad_())
        y.backward(ones)
    else:
        with torch.no_grad():
            layer(x)
    return time.perf_counter() - start


def peak_bytes(layer: HopeLayer, x: Tensor) -> int:
    """Most bytes that a forward and backward pass hold at a time, beyond the weights and x."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        run(layer, x, backward=True)
    held = peak = 0
    for event in recording.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def operations(layer: HopeLayer, tokens: int) -> float:
    """Floating-point operations of a forward and backward pass over `tokens` tokens."""
    return tokens * sum(layer.flops_per_token(tokens))


def compare(case: Case, repetitions: int, memory: bool) -> dict[str, float]:
    """All figures of one case, by kind."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    x = torch.randn(1, case.tokens, case.width)
    hope = make_layer("titans", case.width, case.chunks)
    transformer = make_layer("attention", case.width, case.chunks)
    figures = {}
    for kind, backward in (("fwd", False), ("fwdbwd", True)):
        run(transformer, x, backward)
        run(hope, x, backward)
        pairs = [
            (run(transformer, x, backward), run(hope, x, backward)) for _ in range(repetitions)
        ]
        figures[f"{kind}_ratio"] = median(ours / theirs for theirs, ours in pairs)
    work = operations(hope, case.tokens) / operations(transformer, case.tokens)
    figures["flops_rate_ratio"] = work / figures["fwdbwd_ratio"]
    if memory:
        figures["memory_ratio"] = peak_bytes(hope, x) / peak_bytes(transformer, x)
    return figures


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_model",
        description=(__doc__ or "").partition(": ")[2].replace("%", "%%"),
    )
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument(
        "--chunks", nargs="+", default=CHUNKS, type=_chunks, metavar="MEMORYxPROJECTION"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of runs (%(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="leave public layers out")
    options = parser.parse_args(arguments)
    if any(width < HEAD_DIM or width % HEAD_DIM for width in options.widths):
        parser.error(f"--widths must be multiples of {HEAD_DIM}, the width of a head")
    if min(*options.lengths, *options.threads, options.repetitions) < 1:
        parser.error("--lengths, --threads and --repetitions must be positive")
    return options


def _chunks(text: str) -> tuple[int, int]:
    try:
        memory, projection = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 64x256") from None
    if memory < 1 or projection < 1 or projection % memory:
        raise argparse.ArgumentTypeError(
            f"{text!r}: the projection chunk must be a multiple of the memory chunk"
        )
    return memory, projection


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 2 bad input, 130 after Ctrl-C, which writes nothing."""
    options = parse(arguments)
    torch.set_flush_denormal(True)
    cases = [
        Case(width, tokens, chunks, threads)
        for width in options.widths
        for tokens in options.lengths
        for chunks in options.chunks
        for threads in options.threads
    ]
    kinds = ("fwd_ratio", "fwdbwd_ratio", "flops_rate_ratio", "memory_ratio")
    figures: dict[str, float] = {}
    rows = []
    try:
        for case in tqdm(cases, unit="case", disable=None):
            found = compare(case, options.repetitions, memory=case.threads == options.threads[0])
            found.setdefault("memory_ratio", figures.get(_memory_key(case, options.threads), 0.0))
            figures |= {f"{kind}_{case.key}": found[kind] for kind in kinds}
            label = [case.width, case.tokens, "x".join(map(str, case.chunks)), case.threads]
            rows.append([*map(str, label), *(f"{found[kind]:.2f}" for kind in kinds)])
        if not options.no_peers:
            figures |= bench_peers.measure()
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    header = ["width", "tokens", "chunks", "threads", "fwd", "fwd+bwd", "FLOP/s", "memory"]
    print("Hope layer over Transformer++ layer of equal width")
    print(table(header, rows))
    print(f"figures: {write_figures('model', figures)}")
    return 0


def _memory_key(case: Case, threads: tuple[int, ...]) -> str:
    """Memory does not depend on threads: where it was measured."""
    return f"memory_ratio_{Case(case.width, case.tokens, case.chunks, threads[0]).key}"


if __name__ == "__main__":
    sys.exit(as_command(main))
