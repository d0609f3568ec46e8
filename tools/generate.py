"""python -m tools.generate RUN [--prompt TEXT]: let a trained model write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch

from data_pipeline import DataError
from data_pipeline.arguments import at_least, utf8
from data_pipeline.command import as_command
from data_pipeline.redaction import redact
from data_pipeline.tokenizer import Tokenizer
from hope.sampling import sample
from train.checkpoint import CheckpointError
from train.checkpoint.load import load_run_and_tokenizer
from train.config import ConfigError

CONTEXT = 16  # tokens before a new one that its text may depend on
REPLACED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character are decoded to


def main(arguments: list[str] | None = None) -> int:
    """Print a continuation of the prompt; exit status 2 with one line for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder, e.g. runs/quickstart")
    parser.add_argument(
        "--prompt", type=utf8, default="", help="text to continue (default: a new document)"
    )
    parser.add_argument("--max-tokens", type=at_least(0), default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=at_least(0, below=1 << 63), default=0)
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    try:
        _, model, tokenizer = load_run_and_tokenizer(options.run)
        prompt = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
        tokens = sample(
            model.eval(),
            torch.tensor(prompt),
            options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            stop_token=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
            generator=torch.Generator().manual_seed(options.seed),
        )
        first = next(tokens, None)
        print(options.prompt, end="", flush=True)
        if first is not None:
            for text in texts(tokenizer, prompt, chain([first], tokens)):
                print(text, end="", flush=True)
        print()
    except (CheckpointError, ConfigError, DataError, ValueError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


def texts(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """What each of the tokens adds to the text, as soon as its characters are whole."""
    # As the end of a text: by itself, what follows would lose a space that it begins with to
    # tokenizers that put one before every text.
    window, shown = list(prompt), tokenizer.decode(prompt)
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        if len(text) > len(shown) and not text.endswith(REPLACED):
            yield text[len(shown) :]
            window = window[-CONTEXT:]
            shown = tokenizer.decode(window)
    yield tokenizer.decode(window)[len(shown) :]


if __name__ == "__main__":
    sys.exit(as_command(main))
