"""python -m tools.bench_gpu: our kernels and whole models on one GPU.

Five parts, in this order (--parts): the scan alone, by Triton's kernels and by those in CUDA C++,
whose parity comes first; parity of all kernels in float32 and bfloat16 against float64 on the same
device; microseconds of each kernel beside its floor (tools.kernel_costs); one layer; the 340M, 760M
and 1.3B sizes with their loss. Layers and models take one step's forward and backward of 32K
tokens, in rows of 2K to 32K, in bfloat16: Hope, Hope-Attention and a Transformer++, each eager, as
a CUDA graph, and as one of compiled layers, and flash-linear-attention's Gated DeltaNet where it is
installed. What does not fit is run in 2, 4, ... micro-batches. Prints tables and writes
docs/gpu/NAME.json with the chip, date and versions, after every size what there is so far.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from data_pipeline.command import as_command
from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig
from hope.init import initialise
from hope.layer import HopeLayer
from hope.model import num_parameters
from hope.scan.contract import ScanImplementation
from tools.figures import table
from tools.gpu_kernels import as_graph, kernels, milliseconds, parity, scans
from tools.kernel_costs import PEAK_FLOPS
from tools.kernel_parity import Figures
from train.config import load_config
from train.evaluate.perplexity import summed_loss
from train.parallel.activations import checkpoint_activations, compile_layers
from train.parallel.config import ActivationCheckpointing

STEP_TOKENS = 32_768
LENGTHS = (2048, 4096, 8192, 16_384, 32_768)
MLP_OF_TWIN = {"340m": 2784, "760m": 4416, "1b3": 8624}
"""Hidden width of the Transformer++ of equal parameters; the files in configs/ say the same."""
PARTS = ("scan", "parity", "kernels", "layer", "models")
SCANS: tuple[ScanImplementation, ...] = ("auto", "triton", "cuda", "chunked")
KINDS = ("eager", "graph", "compiled")
"""How a step is run; compiled: every layer by torch.compile, the step as a graph."""
GATED_DELTANET_HEAD = 128
"""Width of its keys; a layer has so many that they are 3/4 of its width, as its authors say."""
COLUMNS = ["tokens/s", "MFU", "GiB", "micro-batches"]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 2 no GPU or bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_gpu", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--sizes", nargs="+", choices=MLP_OF_TWIN, default=list(MLP_OF_TWIN))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--scan", choices=SCANS, default="auto", help="Hope's scan.implementation (%(default)s)"
    )
    parser.add_argument(
        "--checkpointing",
        choices=get_args(ActivationCheckpointing),
        default="none",
        help="of Hope's models and Hope-Attention's (%(default)s)",
    )
    parser.add_argument("--repetitions", type=int, default=10, help="steps timed (%(default)s)")
    parser.add_argument("--name", default="bench_gpu", help="of the file in docs/gpu (%(default)s)")
    options = parser.parse_args(arguments)
    if any(length < 1 or STEP_TOKENS % length for length in options.lengths):
        parser.error(f"--lengths must divide {STEP_TOKENS}, the tokens of a step")
    if options.repetitions < 1:
        parser.error("--repetitions must be positive")
    if not torch.cuda.is_available():
        print("bench_gpu: this machine has no CUDA device that torch can use", file=sys.stderr)
        return 2
    figures: Figures = {}
    path = Path("docs/gpu") / f"{options.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"name": options.name, **versions()}
    for found in parts(options):
        figures |= found
        path.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")
    print(f"figures: {path}")
    return 0


def parts(options: argparse.Namespace) -> Iterator[Figures]:
    """The figures of the parts that were asked for, size by size."""
    if "scan" in options.parts:
        yield scans(options.repetitions)
    if "parity" in options.parts:
        yield parity()
    if "kernels" in options.parts:
        yield kernels(options.repetitions)
    if "layer" in options.parts:
        for length in options.lengths:
            yield layers(length, options.kinds, options.repetitions, options.scan)
    if "models" in options.parts:
        for size, length in itertools.product(options.sizes, options.lengths):
            yield models(size, length, options)


def versions() -> dict[str, str]:
    """The chip, the date and what was installed."""
    found = {
        "machine": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }
    for name in ("triton", "flash_attn", "fla"):
        try:
            found[name] = getattr(importlib.import_module(name), "__version__", "installed")
        except ImportError:
            found[name] = "not installed"
    return found


def step_of(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward of a model of tokens x with its loss, or of a layer of activations x."""
    leaves = [x] if x.is_floating_point() else []
    leaves += list(module.parameters())

    def step() -> None:
        result = module(x)
        y = result[0] if isinstance(result, tuple) else getattr(result, "logits", result)
        loss = y.float().square().mean() if x.is_floating_point() else summed_loss(y, x)
        torch.autograd.grad(loss, leaves, allow_unused=True)

    return step


def measure(
    key: str,
    make: Callable[[], nn.Module],
    x: Tensor,
    flops: float,
    repetitions: int,
    kinds: Sequence[str],
) -> tuple[Figures, list[list[str]]]:
    """Tokens a second, model FLOPs utilisation and peak GiB of a module on x [rows, ...], for each
    kind of run; what does not fit at once is run in twice as many micro-batches."""
    figures: Figures = {}
    rows = []
    for kind in kinds:
        name, parts = f"{key}_{kind}", 1
        found = timed(make, x, repetitions, kind)
        while found is None and parts < len(x):
            parts *= 2
            found = timed(make, x[: len(x) // parts], repetitions, kind)
        if found is None:
            row = [name, "out of memory", "", "", ""]
        else:
            elapsed, peak = found
            rate = STEP_TOKENS / parts / elapsed * 1e3
            utilisation = rate * flops / PEAK_FLOPS
            figures |= {
                f"tokens_per_second_{name}": rate,
                f"mfu_{name}": utilisation,
                f"gib_{name}": peak,
                f"micro_batches_{name}": parts,
            }
            row = [name, f"{rate:,.0f}", f"{utilisation:.1%}", f"{peak:.1f}", str(parts)]
        print(" ".join(row), file=sys.stderr, flush=True)
        rows.append(row)
    return figures, rows


def timed(
    make: Callable[[], nn.Module], x: Tensor, repetitions: int, kind: str
) -> tuple[float, float] | None:
    """Milliseconds and peak GiB of a step on x, or None if they do not fit."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        module = make()
        if kind == "compiled" and isinstance(module, HopeModel):
            compile_layers(module)
        elif kind == "compiled":
            module.compile()
        step = step_of(module, x.detach().requires_grad_(x.is_floating_point()))
        if kind == "eager":
            step()  # compiles and tunes what it needs
        elapsed = milliseconds(step if kind == "eager" else as_graph(step), repetitions)
        return elapsed, torch.cuda.max_memory_allocated() / 2**30
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return None


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether that was the error, or what came before it: where memory ends while a graph is
    captured, the end of the capture is an error of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


def variants(
    config: HopeConfig, mlp: int, scan: ScanImplementation = "auto"
) -> dict[str, HopeConfig]:
    """The same size as Hope (with that implementation of its scan), Hope-Attention and
    Transformer++ (an MLP of that width)."""
    attention = replace(config, mixer="attention", pattern=None)
    plain = replace(attention, cms=CMSConfig(levels=(LevelConfig(name="mlp", hidden_size=mlp),)))
    titans = replace(config.titans, scan=replace(config.titans.scan, implementation=scan))
    name = "hope" if scan == "auto" else f"hope_{scan}"
    hope = replace(config, titans=titans)
    return {name: hope, "hope_attention": attention, "transformer": plain}


def layers(
    length: int, kinds: Sequence[str], repetitions: int, scan: ScanImplementation
) -> Figures:
    """One layer of the 340M size, in rows of that length."""
    config = load_config("configs/340m.yaml").model
    figures: Figures = {}
    rows = []
    for name, one in variants(config, MLP_OF_TWIN["340m"], scan).items():

        def make(one: HopeConfig = one) -> nn.Module:
            layer = HopeLayer(one, one.mixers[0])
            initialise(layer, seed=0)
            return layer.to("cuda", torch.bfloat16)

        flops = sum(HopeLayer(one, one.mixers[0]).flops_per_token(length, executed=False))
        x = torch.randn(STEP_TOKENS // length, length, one.dim, device="cuda").bfloat16()
        more, lines = measure(f"layer_{name}_t{length}", make, x, flops, repetitions, kinds)
        figures |= more
        rows += lines
    print(table(["layer, 32K tokens a step", *COLUMNS], rows), flush=True)
    return figures


@lru_cache(maxsize=1)
def on_host(size: str, scan: ScanImplementation) -> dict[str, HopeModel]:
    """The models of a size, in bfloat16 on the CPU: their start takes longer than their steps."""
    config = load_config(f"configs/{size}.yaml").model
    found = variants(config, MLP_OF_TWIN[size], scan)
    return {name: HopeModel(one).to(torch.bfloat16) for name, one in found.items()}


def models(size: str, length: int, options: argparse.Namespace) -> Figures:
    """Whole models of a size in rows of that length, and Gated DeltaNet of their width and depth
    where it is installed."""
    repetitions, kinds = options.repetitions, options.kinds
    config = load_config(f"configs/{size}.yaml").model
    figures: Figures = {}
    rows = []
    tokens = torch.randint(config.vocab_size or 1, (STEP_TOKENS // length, length)).cuda()
    for name, host in on_host(size, options.scan).items():
        flops = sum(host.flops_per_token(length, executed=False))
        how: ActivationCheckpointing = "none" if name == "transformer" else options.checkpointing
        name = name if how == "none" else f"{name}_{how}"

        def make(host: HopeModel = host, how: ActivationCheckpointing = how) -> HopeModel:
            model = copy.deepcopy(host).cuda()
            checkpoint_activations(model, how)
            return model

        more, lines = measure(f"{size}_{name}_t{length}", make, tokens, flops, repetitions, kinds)
        figures |= more
        rows += lines
    try:
        make_peer, parameters = gated_deltanet(config)
        key = f"{size}_gated_deltanet_t{length}"
        more, lines = measure(key, make_peer, tokens, 6.0 * parameters, repetitions, ["eager"])
        figures |= more
        rows += lines
    except ImportError as error:
        rows.append([f"{size}_gated_deltanet_t{length}", str(error), "", "", ""])
    print(table(["model, 32K tokens a step", *COLUMNS], rows), flush=True)
    return figures


def gated_deltanet(config: HopeConfig) -> tuple[Callable[[], nn.Module], int]:
    """flash-linear-attention's language model of the same width, depth, vocabulary and (its MLPs
    are as wide as that takes) size, with its parameters. Its kernels tune themselves, for minutes.

    Raises ImportError where it is not installed.
    """
    fla = importlib.import_module("fla.models")

    def make(mlp: int, device: str = "cuda") -> nn.Module:
        settings = fla.GatedDeltaNetConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            num_heads=3 * config.dim // (4 * GATED_DELTANET_HEAD),
            head_dim=GATED_DELTANET_HEAD,
            intermediate_size=mlp,
            vocab_size=config.vocab_size,
            tie_word_embeddings=config.tie_embeddings,
            fuse_cross_entropy=False,
        )
        with torch.device(device):
            return fla.GatedDeltaNetForCausalLM(settings).to(torch.bfloat16)

    def size(mlp: int) -> int:
        return sum(parameter.numel() for parameter in make(mlp, "meta").parameters())

    each = (size(128) - size(64)) // 64
    mlp = 64 + (num_parameters(config) - size(64)) // each // 64 * 64
    return partial(make, mlp), size(mlp)


if __name__ == "__main__":
    sys.exit(as_command(main))
