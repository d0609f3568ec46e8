"""python -m tools.adapt RUN --input FILE --level NAME=EVERY: a model that learns as it reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline import DataError
from data_pipeline.arguments import at_least
from data_pipeline.command import as_command
from data_pipeline.redaction import redact
from tools.figures import table
from train.checkpoint import CheckpointError
from train.checkpoint.load import load_run_and_tokenizer
from train.config import ConfigError
from train.evaluate.perplexity import perplexity
from train.online import OnlineAdapter


def main(arguments: list[str] | None = None) -> int:
    """Print the perplexity of a text with and without adaptation; exit status 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.adapt", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder, e.g. runs/quickstart")
    parser.add_argument("--input", type=Path, required=True, help="UTF-8 text, read as one stream")
    parser.add_argument(
        "--level",
        action="append",
        required=True,
        metavar="NAME=EVERY",
        help="a CMS level that learns, and every how many tokens it steps; may be repeated",
    )
    parser.add_argument(
        "--lr", type=_learning_rate, default=1e-3, help="learning rate (default 1e-3)"
    )
    parser.add_argument("--max-tokens", type=at_least(2), help="read no more than so many")
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    try:
        every = _levels(options.level)
        config, model, tokenizer = load_run_and_tokenizer(options.run)
        text = _text(options.input)
        tokens = [tokenizer.bos_id, *tokenizer.encode(text)][: options.max_tokens]
        if len(tokens) < 2:
            raise ValueError(f"{options.input} holds no text to predict")
        stream = torch.tensor([tokens])
        idle = [f"{name}={number}" for name, number in every.items() if number >= len(tokens)]
        rows = []
        for label, rate in (("trained weights", 0.0), (f"adapted, lr {options.lr:g}", options.lr)):
            with OnlineAdapter(model.eval(), config.model, every, lr=rate) as adapter:
                losses = _read(adapter, stream, label)
                quarter = losses[-(len(losses) // 4 or 1) :]
                rows.append([label, *map(_perplexity, (losses, quarter))])
    except (CheckpointError, ConfigError, DataError, ValueError, OSError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return 2
    if idle:
        print(f"never stepped, the text is too short: {', '.join(idle)}", file=sys.stderr)
    print(table([f"perplexity of {len(tokens) - 1:,} tokens", "all", "last quarter"], rows))
    return 0


def _learning_rate(text: str) -> float:
    """The type of a learning rate: a finite number of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a finite number of 0 or more")
    return value


def _levels(given: list[str]) -> dict[str, int]:
    """From NAME=EVERY, each name once, to tokens between steps by name."""
    every: dict[str, int] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if not equals or not (number.isascii() and number.isdecimal()):
            raise ValueError(f"--level {text!r} is not of the form NAME=EVERY, e.g. slow=2048")
        if name in every:
            raise ValueError(f"--level names {name!r} twice")
        every[name] = int(number)
    return every


def _text(path: Path) -> str:
    """The content of a file, its line ends as they are."""
    try:
        return path.read_bytes().decode()
    except IsADirectoryError:
        raise ValueError(f"--input {path} is a folder; name one file of text") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} of it") from None


def _read(adapter: OnlineAdapter, stream: Tensor, label: str) -> Tensor:
    """Losses [n] of the whole stream, with progress; ValueError where one is not finite."""
    found = []
    size = min(adapter.segment, stream.shape[1])
    for part in tqdm(stream.split(size, dim=1), desc=label, unit="segment", disable=None):
        found.append(adapter.feed(part))
    losses = torch.cat([*found, adapter.rest()], dim=1)[0]
    if len(bad := (~losses.isfinite()).nonzero()):
        hint = "; lower --lr" if adapter.settings.lr else ""
        raise ValueError(f"{label}: the loss is not finite from token {int(bad[0]) + 1:,} on{hint}")
    return losses


def _perplexity(losses: Tensor) -> str:
    return f"{perplexity(float(losses.double().mean())):.3f}"


if __name__ == "__main__":
    sys.exit(as_command(main))
