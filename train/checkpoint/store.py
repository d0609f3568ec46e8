"""The checkpoints of one run: save, list, verify, load, and delete old ones.

A checkpoint is a folder `tokens-000000000001234` of safetensors files, `trainer.json` with
everything that is not a tensor, a manifest of checksums and, written last, the marker that makes
it count: docs/checkpoint-format.md.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.checkpoint import retention
from train.checkpoint.background import BackgroundWriter, DirectWriter, Save, Writer
from train.checkpoint.errors import CheckpointError, SaveError
from train.checkpoint.manifest import damage, position
from train.checkpoint.pieces import Described, Owners, assign, local_pieces, plan_files
from train.checkpoint.places import Place, as_place, make_folder, names, remove, rename
from train.checkpoint.reading import TensorReader, read_plain
from train.checkpoint.retention import DRAFT, Retention
from train.checkpoint.writer import Target, attempt, discard
from train.parallel.placement import Stored, fill
from train.parallel.ranks import Ranks
from train.run_files import CHECKPOINTS

if TYPE_CHECKING:
    from train.config import RunConfig

WORTH_SAYING = 1.0  # seconds that training waited for the save before
AGAIN = "the next save, if any, tries again"  # this may have been the last

__all__ = ["CheckpointError", "CheckpointStore", "SaveError", "load_parameters", "open_store"]


class CheckpointStore:
    """The checkpoints of a run, shared by all ranks.

    folder: local, or an fsspec URL. keep_last, keep_every_tokens, keep_best: see `Retention`.
    asynchronous: a save returns when the tensors are copied; a process beside this one writes.
    At most one save is under way: the next one waits for it.

    `save`, `wait`, `finish`, `newest`, `find` and `rewind_to` are called by all ranks together.
    """

    def __init__(
        self,
        folder: Place | str,
        ranks: Ranks,
        keep_last: int = 2,
        *,
        keep_every_tokens: int | None = None,
        keep_best: int = 0,
        asynchronous: bool = False,
    ) -> None:
        self.folder, self.ranks = as_place(folder), ranks
        self.rules = Retention(keep_last, keep_every_tokens, keep_best)
        self.asynchronous = asynchronous
        self.failure: str | None = None  # of the last save
        self.report: dict[str, Any] = {}  # of the last save: see `train.checkpoint.writer.finish`
        self.on_complete: Callable[[Any], None] | None = None  # told of each folder that counts
        self._writer: Writer = (
            BackgroundWriter() if asynchronous else DirectWriter(ranks.pulse.enter)
        )
        weakref.finalize(self, self._writer.close)  # at the latest when the program ends
        self._under_way: Target | None = None
        self._described: list[Described] | None = None
        self._owners: Owners = {}
        self.still_there: str | None = None  # why `rewind_to` could not set everything aside
        self._undone: list[str] = []  # what it could not, first rank

    def complete(self) -> list[Any]:
        """Checkpoints whose marker stands, oldest first: paths, or what stands for them in URLs."""
        return [one for one in retention.complete(self.folder) if one.name not in self._undone]

    def save(
        self,
        tokens: int,
        tensors: dict[str, Tensor],
        plain: dict[str, Any],
        replace: bool = False,
    ) -> Any:
        """Save under a token count; returns the checkpoint's folder, or None where that failed.

        Asynchronous, the folder is there and counts once `wait` returns it.

        tensors: each rank's own, under names that only it passes, or the same on all ranks that
        pass a name, or DTensors of which each rank has its part. A checkpoint that is there
        already, and verifies, stays unless `replace`; then the new one takes its place when it is
        complete. Until then, whatever happens, every earlier checkpoint stays as it was.

        A save that fails (disk full, quota, permission) warns, here or when the next one is
        asked for. Raises ValueError where the ranks' tensors do not fit together.
        """
        self.wait()
        self.ranks.pulse.enter("save")
        pieces = local_pieces(tensors)
        owners = self._assign([piece.describe() for piece in pieces])
        answer: dict[str, Any] = {}
        if self.ranks.is_first:
            answer = attempt(lambda: self._begin(tokens, replace))
        answer = self.ranks.broadcast(answer)
        if "error" in answer:
            return self._failed(f"tokens-{tokens:015d}", answer["error"])
        final, draft, there = answer["result"]
        self.failure = None
        if there:
            return as_place(final)
        target = Target(as_place(draft), as_place(final), self.ranks.rank, self.ranks.size)
        files = plan_files(pieces, owners, self.ranks.rank)
        self._under_way = target
        self._writer.start(Save(target, files, plain, self.rules))
        return target.final if self.asynchronous else self.wait()

    def wait(self, last: bool = False) -> Any:
        """Wait for the save under way; its folder, or None when there is none or it failed.

        last: who calls says it when it failed; otherwise a warning does.
        """
        target, self._under_way = self._under_way, None
        if target is None:
            return None
        started = time.perf_counter()
        parts = _gather(self.ranks, self._writer.part())
        error = None
        for rank, answer in enumerate(parts):
            if error is None and "error" in answer:
                error = answer["error"] if len(parts) == 1 else f"rank {rank}: {answer['error']}"
        if error is None:
            answer = self.ranks.broadcast(self._writer.outcome() if self.ranks.is_first else None)
            error = answer.get("error")
            self.report = answer.get("result", {})
        seconds = time.perf_counter() - started
        if error is not None:
            self._writer.abandon()
            if self.ranks.is_first:
                attempt(lambda: discard(target))
            return self._failed(target.final.name, error, warn=not last)
        if self.asynchronous and seconds > WORTH_SAYING and self.ranks.is_first:
            warnings.warn(
                f"training waited {seconds:.1f} s for checkpoint {target.final.name}", stacklevel=2
            )
        if self.report["undeleted"] is not None and self.ranks.is_first:
            warnings.warn(
                f"what {target.final.name} supersedes can't be deleted: "
                f"{self.report['undeleted']}; {AGAIN}",
                stacklevel=2,
            )
        if self.on_complete is not None:
            self.on_complete(target.final)
        return target.final

    def finish(self) -> None:
        """Wait for the save under way. Raises SaveError when the last save failed."""
        self.wait(last=True)
        if self.failure is not None:
            raise SaveError(f"the last checkpoint could not be written: {self.failure}")

    def close(self) -> None:
        """End the process that writes, once it has written what it was given; not collective."""
        self._writer.close()

    def clean(self) -> None:
        """On the first rank, before the first save: remove what a run that died has left."""
        if self.ranks.is_first:
            attempt(lambda: retention.sweep(self.folder, drafts=True))

    def newest(self, at_most: int | None = None) -> Any:
        """The newest checkpoint that verifies, agreed by all ranks; of at most so many tokens.

        Damaged ones are passed over with a warning that says why. Raises CheckpointError when
        none is left: a resume never turns into a fresh start.
        """
        reasons: list[str] = []
        for name in self._agreed_names():
            if at_most is not None and (position(name) or (0, 0))[0] > at_most:
                continue
            reason = self._damage(self.folder / name)
            if reason is None:
                return self.folder / name
            reasons.append(f"{name}: {reason}")
            if self.ranks.is_first and name in (one.name for one in self.complete()):
                warnings.warn(f"skipping damaged checkpoint {reasons[-1]}", stacklevel=2)
        none = (
            "there is none" if at_most is None else f"there is none of {at_most:,} tokens or less"
        )
        why = "; ".join(reasons) or none
        raise CheckpointError(f"no usable checkpoint under {self.folder}: {why}")

    def find(self, name: str) -> Any:
        """The checkpoint of that name. Raises CheckpointError when it is missing or damaged."""
        there = self._agreed_names()
        if name not in there:
            listed = f"there are {', '.join(reversed(there))}" if there else "there is none"
            raise CheckpointError(f"no checkpoint {name!r} under {self.folder}: {listed}")
        if reason := self._damage(self.folder / name):
            raise CheckpointError(f"{self.folder / name}: {reason}")
        return self.folder / name

    def rewind_to(self, folder: Any) -> list[str]:
        """Set aside every checkpoint after this one, as `aside-NAME`; the names of those.

        The run goes on from here, and another past must not be found by a later resume. Where the
        disk does not let them be moved they count no longer, `still_there` says why, and each save
        begins with another try.
        """
        later: list[str] = []
        answer: dict[str, Any] = {}
        if self.ranks.is_first:
            here = position(folder.name) or (0, 0)
            later = [o.name for o in self.complete() if (position(o.name) or (0, 0)) > here]
            self._undone += later
            answer = attempt(self._set_aside)
        later, self.still_there = self.ranks.broadcast((later, answer.get("error")))
        return later

    def _set_aside(self) -> None:
        """On the first rank: move what was gone back on out of the way."""
        while self._undone:
            old, aside = self.folder / self._undone[0], self.folder / f"aside-{self._undone[0]}"
            remove(aside)
            if old.exists():
                rename(old, aside)
            del self._undone[0]

    def plain(self, folder: Any) -> dict[str, Any]:
        """Everything of a checkpoint that is not a tensor."""
        return read_plain(folder)

    def reader(self, folder: Any) -> TensorReader:
        """The tensors of a checkpoint; of a thousand ranks it takes long to make."""
        return TensorReader(folder)

    def tensors(self, folder: Any, prefix: str = "") -> dict[str, Tensor]:
        """All tensors whose names start with `prefix`, whole, on the CPU, whatever saved them."""
        return self.reader(folder).all_whole(prefix)

    def _begin(self, tokens: int, replace: bool) -> tuple[str, str, bool]:
        """(final folder, draft folder, whether there is nothing to do), on the first rank."""
        self._set_aside()
        name = f"tokens-{tokens:015d}"
        there = [position(one) for one in names(self.folder)]
        generations = [found[1] for found in there if found is not None and found[0] == tokens]
        whole = [one for one in self.complete() if (position(one.name) or (0, 0))[0] == tokens]
        if whole and not replace and damage(whole[-1]) is None:
            return str(whole[-1]), "", True
        if generations:
            name = f"{name}-{max(generations) + 1}"
        final = self.folder / name
        if not isinstance(final, Path):
            return str(final), str(final), False
        draft = self.folder / f"{DRAFT}{name}"
        remove(draft)
        make_folder(draft)
        return str(final), str(draft), False

    def _failed(self, name: str, error: str, warn: bool = True) -> None:
        self.failure = f"{name}: {error}"
        if warn and self.ranks.is_first:
            warnings.warn(f"checkpoint {self.failure}; {AGAIN}", stacklevel=3)

    def _assign(self, described: list[Described]) -> Owners:
        """Who writes what; asked of all ranks only when some rank's tensors are not as before."""
        if self.ranks.sum([float(described != self._described)])[0] > 0:
            self._owners = assign(_gather(self.ranks, described))
            self._described = described  # not of what was refused: it would pass the next time
        return self._owners

    def _agreed_names(self) -> list[str]:
        """Names of the complete checkpoints as the first rank sees them, newest first."""
        answer: dict[str, Any] = {}
        if self.ranks.is_first:
            answer = attempt(lambda: [one.name for one in self.complete()])
        answer = self.ranks.broadcast(answer)
        if "error" in answer:
            raise CheckpointError(f"can't look under {self.folder}: {answer['error']}")
        return list(reversed(answer["result"]))

    def _damage(self, folder: Place) -> str | None:
        """Why a checkpoint can't be trusted, each rank having looked at its share of the files."""
        found = _gather(self.ranks, damage(folder, self.ranks.rank, self.ranks.size))
        return next((reason for reason in found if reason is not None), None)


def open_store(config: RunConfig, ranks: Ranks) -> CheckpointStore:
    """The checkpoints of a run as its configuration says."""
    settings = config.checkpoint
    return CheckpointStore(
        settings.url or config.run_dir / CHECKPOINTS,
        ranks,
        settings.keep_last,
        keep_every_tokens=settings.keep_every_tokens,
        keep_best=settings.keep_best,
        asynchronous=settings.asynchronous,
    )


@torch.no_grad()
def load_parameters(
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor | Stored],
    elsewhere: Container[str] = (),
) -> None:
    """Copy whole `model/NAME` tensors into parameters, or this rank's parts of them, by name.

    elsewhere: names of parameters that other ranks have. ValueError unless names and shapes match.
    """
    saved = {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}
    wrong = sorted(parameters.keys() - saved.keys())
    wrong += sorted(n for n in saved if n not in parameters and n not in elsewhere)
    if wrong:
        raise ValueError(f"checkpoint and model differ in {wrong[:4]}")
    for name, parameter in parameters.items():
        try:
            fill(parameter, saved[name])
        except ValueError as error:
            raise ValueError(f"checkpoint and model differ in {name}: {error}") from None


def _gather(ranks: Ranks, value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on all of them; plain data only."""
    if ranks.size == 1:
        return [value]
    found: list[Any] = [None] * ranks.size
    with ranks.pulse.collective("gathering of plain data"):
        dist.all_gather_object(found, value)
    return found
