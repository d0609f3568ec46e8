"""Look after the checkpoints of runs: list, verify, compare, export, convert, tag and delete them.

RUN is a run folder, or a folder or URL of checkpoints; CHECKPOINT is one checkpoint, or a run, for
its newest that verifies. Exit status: 0, 1 damage or a difference was found, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from data_pipeline.arguments import at_least, utf8
from data_pipeline.command import as_command
from data_pipeline.redaction import redact
from tools import deepspeed_checkpoints
from tools.figures import table
from train.checkpoint import CheckpointError, retention
from train.checkpoint.manifest import (
    MARKER,
    PLAIN,
    ManifestError,
    damage,
    position,
    read_manifest,
)
from train.checkpoint.pieces import bytes_of, safetensors_header
from train.checkpoint.places import Place, as_place, names, remove, rename, size, write
from train.checkpoint.reading import TensorReader, read_plain
from train.checkpoint.store import CheckpointStore
from train.config import CheckpointConfig, ConfigError, flatten, load_config
from train.parallel.ranks import Ranks
from train.run_files import CHECKPOINTS, CONFIG
from train.run_folder import RunFolderError, owner_of, run_folder_of, run_lock

RULES = ("keep_last", "keep_every_tokens", "keep_best")


class DamagedError(CheckpointError):
    """A checkpoint that was asked for by name does not verify."""


def list_run(folder: Place, options: argparse.Namespace) -> int:
    """What checkpoints there are, what they hold and what they take up."""
    rows = []
    for one in retention.complete(folder):
        tokens, _ = position(one.name) or (0, 0)
        loss = retention.metric(one)
        try:
            total, shared = _bytes(one)
            size_of = [f"{total / 1e6:,.1f}", f"{shared / 1e6:,.1f}"]
        except (ManifestError, OSError) as error:
            size_of = [f"damaged: {error}", ""]
        rows.append(
            [
                one.name,
                f"{tokens:,}",
                "" if loss is None else f"{loss:.4f}",
                *size_of,
                retention.tag(one) or "",
            ]
        )
    print(
        table(
            [redact(str(folder)), "tokens", "held-out loss", "MB", "of which shared", "tag"], rows
        )
    )
    return 0


def verify(folder: Place, options: argparse.Namespace) -> int:
    """Read every file of every checkpoint, and compare its checksum."""
    status = 0
    there = retention.complete(folder)
    if not there:
        raise CheckpointError(f"there is no checkpoint under {folder}")
    for one in there:
        reason = damage(one)
        status = status if reason is None else 1
        print(redact(f"{one}: {reason or 'good'}"))
    return status


def prune(folder: Place, options: argparse.Namespace) -> int:
    """Delete what no rule keeps."""
    rules = _rules(options, _run_of(options.owners, folder))
    doomed = retention.superfluous(retention.complete(folder), rules)
    for one in doomed:
        print(redact(f"{'would delete' if options.dry_run else 'deleting'} {one}"))
    if not options.dry_run:
        retention.apply(folder, rules)
    return 0


def tag(folder: Place, options: argparse.Namespace) -> int:
    """Tag a checkpoint, which keeps it from deletion; without a text, take its tag away."""
    checkpoint = folder / options.name
    if position(options.name) is None or not (checkpoint / MARKER).exists():
        raise CheckpointError(f"no checkpoint {options.name!r} under {folder}")
    if options.text:
        write(checkpoint / retention.TAG, [options.text.encode()])
    else:
        remove(checkpoint / retention.TAG)
    return 0


def diff(options: argparse.Namespace) -> int:
    """Every tensor and every plain value in which two checkpoints differ."""
    one, other = (TensorReader(checkpoint(text)) for text in (options.one, options.other))
    lines = [*_different_tensors(one, other), *_different_values(one.folder, other.folder)]
    for line in lines:
        print(line)
    return 1 if lines else 0


def export(options: argparse.Namespace) -> int:
    """One safetensors file of whole tensors, a tensor in memory at a time."""
    output: Path = options.output.resolve()
    if output.exists() and not output.is_file():  # the new file would take the place of a device
        raise CheckpointError(f"{options.output} is there and is no file; give the name of one")
    folder = checkpoint(options.checkpoint)
    reader = TensorReader(folder)
    chosen = reader.names(options.prefix)
    if not chosen:
        raise CheckpointError(f"{folder} holds no tensor whose name starts with {options.prefix!r}")
    entries = [reader.manifest.tensors[name] for name in chosen]
    header, _ = safetensors_header(
        [
            (name.removeprefix(options.prefix), entry.dtype, entry.shape)
            for name, entry in zip(chosen, entries, strict=True)
        ],
        {"format": "pt", "config": json.dumps(read_plain(folder).get("config"))},
    )

    def content() -> Iterator[bytes | memoryview]:
        yield header
        for name in chosen:
            yield bytes_of(reader.whole(name))

    draft = output.with_name(f".writing-{output.name}")
    try:
        write(draft, content())
        rename(draft, output)
    except BaseException as error:
        if draft.exists():
            remove(draft)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise CheckpointError(f"can't make {options.output}: {reason}") from None
        raise
    print(f"{options.output}: {len(chosen)} tensors, {size(output):,} bytes")
    return 0


def store_folder(text: str) -> Place:
    """The folder of checkpoints that RUN stands for. Raises CheckpointError."""
    place = as_place(text)
    if isinstance(place, Path) and (place / CONFIG).exists():
        config = load_config(place / CONFIG)
        return as_place(config.checkpoint.url or place / CHECKPOINTS)
    if any(position(name) is not None for name in names(place)):
        return place
    raise CheckpointError(f"{place} is neither a run folder nor a folder of checkpoints")


def checkpoint(text: str) -> Place:
    """The checkpoint that CHECKPOINT stands for, verified. Raises CheckpointError."""
    place = as_place(text)
    if (place / MARKER).exists():
        if reason := damage(place):
            raise DamagedError(f"{place}: {reason}")
        return place
    found: Place = CheckpointStore(store_folder(text), Ranks.alone()).newest()
    return found


def _bytes(one: Place) -> tuple[int, int]:
    """(bytes of a checkpoint, bytes that another checkpoint has too)."""
    total = shared = 0
    for name, entry in read_manifest(one).files.items():
        total += entry.bytes
        file = entry.place(one, name)
        if entry.folder is not None or (isinstance(file, Path) and file.stat().st_nlink > 1):
            shared += entry.bytes
    return total, shared


def _different_tensors(one: TensorReader, other: TensorReader) -> Iterator[str]:
    names_one, names_other = set(one.names()), set(other.names())
    for name in sorted(names_one | names_other):
        if name not in names_one or name not in names_other:
            yield f"{name}: only in {(one if name in names_one else other).folder}"
            continue
        a, b = one.whole(name), other.whole(name)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        elif bytes_of(a) != bytes_of(b):
            largest = (a.to(torch.float64) - b.to(torch.float64)).abs().max()
            yield f"{name}: differs by up to {float(largest):.3g}"


def _different_values(one: Place, other: Place) -> Iterator[str]:
    a, b = flatten(read_plain(one)), flatten(read_plain(other))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            yield f"{PLAIN} {key}: {a.get(key)!r} and {b.get(key)!r}"


def _owners(run: str, folder: Place) -> list[Path]:
    """The run folders that RUN, whose checkpoints are in `folder`, may stand for."""
    writes = run_folder_of(owner_of(folder))
    around = (Path(run), Path(run).resolve().parent, writes)
    there = dict.fromkeys(path.resolve() for path in around if path is not None)
    return [owner for owner in there if (owner / CONFIG).exists()]


def _run_of(owners: list[Path], folder: Place) -> Path | None:
    """The run whose checkpoints are in `folder`: not whatever has a config.yaml above them."""
    here = folder.resolve() if isinstance(folder, Path) else folder
    foreign = [here.parent] if isinstance(here, Path) and here.name != CHECKPOINTS else []
    return next((owner for owner in owners if owner not in foreign), None)


def _rules(options: argparse.Namespace, run: Path | None) -> retention.Retention:
    """What the command line says `prune` keeps; where it says nothing, the run. ConfigError."""
    settings = CheckpointConfig() if run is None else load_config(run / CONFIG).checkpoint
    given = {name: getattr(options, name) for name in RULES}
    last, every_tokens, best = (
        getattr(settings, name) if value is None else value for name, value in given.items()
    )
    return retention.Retention(last, every_tokens or None, best)


def _add_rules(command: argparse.ArgumentParser) -> None:
    """What `prune` keeps; None: as the run does."""
    command.add_argument(
        "--keep-last", type=at_least(1), metavar="N", help="the newest N (the run's, else 2)"
    )
    command.add_argument(
        "--keep-every-tokens",
        type=at_least(0),
        metavar="TOKENS",
        help="the first at or after each multiple of TOKENS; 0: none (the run's, else none)",
    )
    command.add_argument(
        "--keep-best",
        type=at_least(0),
        metavar="N",
        help="the N of lowest held-out loss (the run's, else 0)",
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    on_runs = {"list": list_run, "verify": verify, "prune": prune, "tag": tag}
    for name, action in on_runs.items():
        command = commands.add_parser(name, help=(action.__doc__ or "").splitlines()[0])
        command.set_defaults(on_run=action)
        command.add_argument("run", metavar="RUN", nargs=None if name == "tag" else "+")
        if name == "prune":
            command.description = "Delete what has no tag and none of these rules keeps. One that "
            command.description += "is not given is as in the `checkpoint` section of the run's "
            command.description += "configuration, where RUN has one."
            _add_rules(command)
            command.add_argument("--dry-run", action="store_true", help="say what would go")
        elif name == "tag":
            command.add_argument("name", metavar="NAME", help="e.g. tokens-000000001048576")
            command.add_argument("text", metavar="TEXT", nargs="?", type=utf8)
    command = commands.add_parser("diff", help=(diff.__doc__ or "").splitlines()[0])
    command.set_defaults(action=diff)
    command.add_argument("one", metavar="CHECKPOINT")
    command.add_argument("other", metavar="CHECKPOINT")
    command = commands.add_parser("export", help=(export.__doc__ or "").splitlines()[0])
    command.set_defaults(action=export)
    command.add_argument("checkpoint", metavar="CHECKPOINT")
    command.add_argument("output", metavar="FILE", type=Path)
    command.add_argument("--prefix", default="model/", help="of the tensors (default model/)")
    deepspeed_checkpoints.add_commands(commands, checkpoint)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is the highest of its runs'."""
    options = parse(arguments)
    try:
        if "action" in options:
            status: int = options.action(options)
            return status
        runs = options.run if isinstance(options.run, list) else [options.run]
        status = 0
        for run in runs:
            with ExitStack() as stack:
                folder = store_folder(run)
                if options.command == "prune":
                    options.owners = _owners(run, folder)
                    for owner in options.owners:
                        stack.enter_context(run_lock(owner))
                status = max(status, options.on_run(folder, options))
        return status
    except DamagedError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return 1
    except BrokenPipeError:  # `as_command` has a status for it
        raise
    except (CheckpointError, ConfigError, RunFolderError, OSError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(as_command(main))
