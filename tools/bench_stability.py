"""python -m tools.bench_stability: do the memories stay bounded over a million tokens?

Streams four kinds of tokens, one a batch row, through a Titans layer with the state carried and
nothing reset: text; one token repeated; two tokens in turn; noise whose vectors have a cosine of
0.95 with one another. The layer is the default one with initial weights as the model draws them,
or, with --run, a trained model's. Fails when a stream stops being finite or grows past --bound.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu
from tqdm import tqdm

from data_pipeline import Corpus, CorruptDataError, DataError
from data_pipeline.command import as_command
from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.init import seed_from
from hope.scan import MEMORIES, MemoryState
from hope.scan.contract import MEM, DeltaRule
from tools.figures import BENCH, table, write_figures
from train.checkpoint import CheckpointError
from train.checkpoint.load import load_run
from train.config import ConfigError

STREAMS = ("text", "repeated", "alternating", "correlated")
COSINE = 0.95
SHARDS = Path("data/sotu/train")


@dataclass
class Record:
    """What was measured at the end of each segment.

    tokens: how many so far. ratio: [M, 4], Frobenius norm of each memory's (W1, W2) over the one
    it started with, the largest over layers and heads, by memory and stream; change: the same of
    the distance from the start. gain: [M, 4], mean of |W1 act(W2 z)| over unit vectors z, heads
    and layers: what reading the memory adds to its query. output: [4], the largest root mean
    square of a token's output. start_gain: the gain of M_mem before the first token.
    finite: tokens of each stream before the first output that is not finite.
    """

    tokens: list[int] = field(default_factory=list)
    ratio: list[Tensor] = field(default_factory=list)
    change: list[Tensor] = field(default_factory=list)
    gain: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)
    start_gain: float = 0.0
    finite: list[int] = field(default_factory=lambda: [0] * len(STREAMS))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 bounded, 1 not, 2 bad input, 130 after Ctrl-C, which writes nothing."""
    options = parse(arguments)
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    try:
        model, tokens = prepare(options)
        record = measure(model, tokens, options.segment)
    except (CheckpointError, ConfigError, DataError, CorruptDataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(report(record, options))
    return 0 if passes(record, options) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; what is not given of the layer keeps its default."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_stability",
        description=(__doc__ or "").partition(": ")[2].replace("%", "%%"),
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each stream")
    parser.add_argument(
        "--segment", type=int, default=4096, help="tokens of one call (%(default)s)"
    )
    parser.add_argument("--run", type=Path, help="measure a trained run, e.g. runs/quickstart")
    parser.add_argument(
        "--text", type=Path, help=f"bytes to read (default: {SHARDS}, else Python's own sources)"
    )
    parser.add_argument("--memory-chunk", type=int, help="tokens written at once in M_mem")
    parser.add_argument("--projection-chunk", type=int, help="the same for the other memories")
    parser.add_argument("--eta-max", type=float, help="upper bound of the write strength")
    parser.add_argument("--initial-eta", type=float, help="write strength that weights start with")
    parser.add_argument("--delta-rule", choices=get_args(DeltaRule))
    parser.add_argument("--bound", type=float, default=10.0, help="of the norm ratio (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--picture", type=Path, default=BENCH / "stability.png")
    options = parser.parse_args(arguments)
    if options.run is not None and (options.text or options.initial_eta is not None):
        parser.error("--run brings its own text and weights: leave out --text and --initial-eta")
    if min(options.tokens, options.segment, options.threads or 1) < 1:
        parser.error("--tokens, --segment and --threads must be positive")
    return options


def prepare(options: argparse.Namespace) -> tuple[HopeModel, Tensor]:
    """The model and the text, int64 [tokens]. Raises ValueError for settings that can't be."""
    scan = {
        name: getattr(options, name)
        for name in ("memory_chunk", "projection_chunk", "eta_max", "delta_rule")
        if getattr(options, name) is not None
    }
    if options.run is not None:
        config, trained = load_run(options.run)
        changed = replace(config.model.titans.scan, **scan)
        titans = replace(config.model.titans, scan=changed)
        model = HopeModel(replace(config.model, titans=titans), seed=None)
        model.load_state_dict(trained.state_dict())
        text, _ = corpus_tokens(Path(config.data.train[0].path), options.tokens)
    else:
        if options.text is None and (SHARDS / "manifest.json").exists():
            text, vocab_size = corpus_tokens(SHARDS, options.tokens)
        else:
            text, vocab_size = file_bytes(options.text, options.tokens), 256
        start = {} if options.initial_eta is None else {"initial_eta": options.initial_eta}
        titans = TitansConfig(scan=replace(TitansConfig().scan, **scan), **start)
        level = LevelConfig(name="mlp", hidden_size=1)
        config_of_layer = HopeConfig(
            vocab_size=vocab_size,
            dim=128,
            num_heads=2,
            num_layers=1,
            titans=titans,
            cms=CMSConfig(levels=(level,)),
        )
        model = HopeModel(config_of_layer, seed=options.seed)
    if "titans" not in model.config.mixers or not model.config.titans.writes:
        raise ValueError("the model has no memory that is written")
    chunk = model.config.titans.scan.projection_chunk
    if options.segment % chunk:
        raise ValueError(f"--segment {options.segment} must be a multiple of the chunk of {chunk}")
    return model.eval(), text


def corpus_tokens(path: Path, count: int) -> tuple[Tensor, int]:
    """The first `count` tokens of a corpus, from its beginning again where it ends; vocabulary."""
    corpus = Corpus.open(path)
    tokens = np.empty(min(count, corpus.num_tokens), dtype=np.int64)
    corpus.read_into(tokens, 0)
    return torch.from_numpy(np.resize(tokens, count)), corpus.vocab_size


def file_bytes(path: Path | None, count: int) -> Tensor:
    """`count` bytes of a file, or of the standard library's sources, repeated where they end."""
    files = [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    content = bytearray()
    for file in files:
        try:
            content += file.read_bytes()
        except OSError as error:
            raise DataError(f"can't read text from {file}: {error.strerror}") from None
        if len(content) >= count:
            break
    if not content:
        raise DataError(f"there is no text in {path or 'the standard library'}")
    return torch.from_numpy(np.resize(np.frombuffer(content, np.uint8), count).astype(np.int64))


def segments(model: HopeModel, text: Tensor, segment: int) -> Iterator[Tensor]:
    """Inputs of the first layer, [4, T, dim] with T at most `segment`, one row a stream."""
    common = torch.argsort(torch.bincount(text), descending=True, stable=True)[:2]
    first, second = int(common[0]), int(common[-1])
    scale = model.embedding_scale
    size = float((model.embedding.weight.detach() * scale).square().mean().sqrt())
    noise = torch.Generator().manual_seed(seed_from("stability", "noise"))
    shared = torch.randn(model.config.dim, generator=noise)
    for start in range(0, len(text), segment):
        part = text[start : start + segment]
        places = torch.arange(start, start + len(part))
        repeated = torch.full_like(part, first)
        alternating = torch.where(places % 2 == 0, first, second)
        embedded = model.embedding(torch.stack([part, repeated, alternating])) * scale
        own = torch.randn(len(part), model.config.dim, generator=noise)
        correlated = size * (COSINE**0.5 * shared + (1 - COSINE) ** 0.5 * own)
        yield torch.cat([embedded, correlated[None].to(embedded.dtype)])


@torch.inference_mode()
def measure(model: HopeModel, text: Tensor, segment: int) -> Record:
    """Stream all tokens, with progress on stderr; stops when no stream is finite any more."""
    record = Record()
    layers: list[Any] = list(model.layers)
    states: list[Any] = [None] * len(layers)
    alive = torch.ones(len(STREAMS), dtype=torch.bool)
    mixers = [layer.mixer for layer in layers if hasattr(layer.mixer, "memory_w1")]
    starts = [MemoryState(m.memory_w1.unsqueeze(1), m.memory_w2.unsqueeze(1)) for m in mixers]
    record.start_gain = float(torch.stack([_gain(start)[MEM, 0] for start in starts]).mean())
    interval = 1.0 if sys.stderr.isatty() else 30.0
    read = 0
    with tqdm(total=len(text), unit="tok", unit_scale=True, mininterval=interval) as bar:
        for x in segments(model, text, segment):
            length = x.shape[1]
            ratios, changes, gains, output = [], [], [], torch.zeros(len(STREAMS))
            for number, layer in enumerate(layers):
                mixed, states[number] = layer.mixer(layer.norm(x), states[number])
                x, _ = layer.cms(x + mixed)
                if states[number] is not None:
                    ratio, change = _norms(layer.mixer, states[number].memory)
                    ratios.append(ratio)
                    changes.append(change)
                    gains.append(_gain(states[number].memory))
                    sizes = _plain(mixed.float().square().mean(dim=-1).sqrt())
                    output = torch.maximum(output, sizes.amax(dim=1))
            finite = x.isfinite().all(dim=-1)
            for row in torch.nonzero(alive).flatten().tolist():
                broken = torch.nonzero(~finite[row]).flatten()
                record.finite[row] += int(broken[0]) if len(broken) else length
                alive[row] = len(broken) == 0
            bar.update(length)
            read += length  # a bar that is switched off counts nothing
            record.tokens.append(read)
            record.ratio.append(torch.stack(ratios).amax(dim=0))
            record.change.append(torch.stack(changes).amax(dim=0))
            record.gain.append(torch.stack(gains).mean(dim=0))
            record.output.append(output)
            bar.set_postfix_str(f"norm ratio {float(record.ratio[-1].max()):.3g}", refresh=False)
            if not alive.any():
                break
    return record


def _norms(mixer: Any, memory: MemoryState) -> tuple[Tensor, Tensor]:
    """Norm and distance from the start of each memory over the start's norm: [M, B] each.

    The largest over heads; float32's largest number where a weight is not finite.
    """
    starts = (mixer.memory_w1.float().unsqueeze(1), mixer.memory_w2.float().unsqueeze(1))
    before = _joint_norm(*starts)
    ratio = _joint_norm(memory.w1, memory.w2) / before
    change = _joint_norm(memory.w1 - starts[0], memory.w2 - starts[1]) / before
    return _plain(ratio).amax(dim=-1), _plain(change).amax(dim=-1)


def _gain(memory: MemoryState) -> Tensor:
    """Mean of |W1 act(W2 z)| over 256 random unit vectors z and all heads: [M, B]."""
    directions = torch.Generator().manual_seed(seed_from("stability", "directions"))
    z = torch.randn(256, memory.w2.shape[-1], generator=directions, dtype=memory.w2.dtype)
    z = z / z.norm(dim=-1, keepdim=True)
    hidden = gelu(z @ memory.w2.mT, approximate="tanh")
    return _plain((hidden @ memory.w1.mT).norm(dim=-1).mean(dim=(-2, -1)))


def _joint_norm(w1: Tensor, w2: Tensor) -> Tensor:
    """Frobenius norm of both layers together: [M, B, N]."""
    return (w1.square().sum(dim=(-2, -1)) + w2.square().sum(dim=(-2, -1))).sqrt()


def _plain(values: Tensor) -> Tensor:
    """Numbers that JSON has: what is not finite becomes the largest one."""
    largest = torch.finfo(values.dtype).max
    return torch.nan_to_num(values, nan=largest, posinf=largest)


def passes(record: Record, options: argparse.Namespace) -> bool:
    """Whether every stream was finite to its end and within the bound."""
    peak = float(torch.stack(record.ratio).max())
    return min(record.finite) == options.tokens and peak <= options.bound


def report(record: Record, options: argparse.Namespace) -> str:
    """The table; writes runs/bench/stability.json and the picture."""
    ratio, change = torch.stack(record.ratio), torch.stack(record.change)
    output = torch.stack(record.output)
    figures: dict[str, float] = {
        "tokens": record.tokens[-1],
        "start_read_gain": record.start_gain,
    }
    rows = []
    for row, stream in enumerate(STREAMS):
        values = {
            "finite_tokens": record.finite[row],
            "max_state_norm_ratio": float(ratio[:, :, row].max()),
            "last_state_norm_ratio": float(ratio[-1, :, row].max()),
            "last_state_change": float(change[-1, :, row].max()),
            "last_read_gain": float(record.gain[-1][MEM, row]),
            "max_output_rms": float(output[:, row].max()),
        }
        figures |= {f"{key}_{stream}": value for key, value in values.items()}
        cells = [f"{value:.3g}" for key, value in values.items() if key != "finite_tokens"]
        by_memory = " ".join(f"{float(value):.2g}" for value in ratio[-1, :, row])
        rows.append([stream, f"{record.finite[row]:,}", *cells, by_memory])
    plot(record, options.picture)
    saved = write_figures("stability", figures)
    names = " ".join(MEMORIES[: ratio.shape[1]])
    header = [
        "",
        "finite tokens",
        "largest |M|",
        "last |M|",
        "last |M - M0|",
        "gain",
        "output",
        names,
    ]
    verdict = "bounded" if passes(record, options) else f"NOT within {options.bound:g} and finite"
    return (
        table(header, rows)
        + "\n\n|M|: norm of a memory's weights over the norm it started with, the largest over "
        + "memories, heads and layers, by memory at the right; gain: mean |W1 act(W2 z)| of M_mem "
        + f"for unit z, {record.start_gain:.3g} at the start\n{verdict} over "
        + f"{record.tokens[-1]:,} tokens; figures {saved}, curves {options.picture}"
    )


def plot(record: Record, path: Path) -> None:
    """Norm ratio over tokens: the largest memory of each stream, and each memory on text."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    ratio = torch.stack(record.ratio)
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, stream in enumerate(STREAMS):
        left.plot(record.tokens, ratio[:, :, row].amax(dim=1), linewidth=1, label=stream)
    for memory in range(ratio.shape[1]):
        curve = ratio[:, memory, STREAMS.index("text")]
        right.plot(record.tokens, curve, linewidth=1, label=f"M_{MEMORIES[memory]}")
    left.set(xscale="log", xlabel="tokens", ylabel="|M| / |M at the start|")
    left.set_title("largest memory", fontsize=9)
    right.set(xscale="log", xlabel="tokens")
    right.set_title("text, by memory", fontsize=9)
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
        axis.xaxis.set_minor_formatter(NullFormatter())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    sys.exit(as_command(main))
