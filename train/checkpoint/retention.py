"""Which checkpoints stay, and deleting the others without ever harming one that stays.

A checkpoint is deleted marker first: from then on it does not count, whatever happens to the
rest. Behind a URL a checkpoint may refer to files of another one; those stay until nothing refers
to them. On a local disk each folder has its own (linked) name for every file. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from train.checkpoint.manifest import (
    MARKER,
    PLAIN,
    ManifestError,
    position,
    read_files,
)
from train.checkpoint.places import Place, URLPath, names, read, remove

DRAFT = ".saving-"
TAG = "TAG"


@dataclass(frozen=True)
class Retention:
    """Rules, each of which keeps checkpoints; what none of them keeps is deleted after a save.

    last: the newest so many. every_tokens: the first at or after each multiple of it. best: so
    many with the lowest held-out loss. A checkpoint with a tag is kept by that alone.
    """

    last: int = 2
    every_tokens: int | None = None
    best: int = 0


def complete(folder: Place) -> list[Place]:
    """Checkpoints whose marker stands, or where that can't be known, oldest first: what counts is
    verified before it is used, and what does not is deleted."""
    found = [name for name in names(folder) if position(name) is not None]
    found.sort(key=lambda name: position(name) or (0, 0))
    return [folder / name for name in found if _may_count(folder / name)]


def _may_count(checkpoint: Place) -> bool:
    try:
        return (checkpoint / MARKER).exists()
    except OSError:
        return True


def metric(checkpoint: Place) -> float | None:
    """The last held-out loss before the checkpoint, in nats per token; None without one."""
    try:
        evaluation = json.loads(read(checkpoint / PLAIN))["evaluation"]
        loss = float(evaluation["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if math.isfinite(loss) else None


def tag(checkpoint: Place) -> str | None:
    """The tag of a checkpoint, or None."""
    try:
        return read(checkpoint / TAG).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None


def superfluous(checkpoints: list[Place], rules: Retention) -> list[Place]:
    """Those that no rule keeps, oldest first; of several at one token count the latest counts."""
    latest: dict[int, Place] = {}
    for one in checkpoints:
        latest[(position(one.name) or (0, 0))[0]] = one
    candidates = list(latest.values())
    keep = set(candidates[-rules.last :])
    if rules.every_tokens is not None:
        first: dict[int, Place] = {}
        for tokens, one in latest.items():
            first.setdefault(tokens // rules.every_tokens, one)
        keep |= {one for multiple, one in first.items() if multiple > 0}
    if rules.best > 0:
        losses = [(loss, one) for one in candidates if (loss := metric(one)) is not None]
        losses.sort(key=lambda pair: pair[0])  # stable: the older of equal ones comes first
        keep |= {one for _, one in losses[: rules.best]}
    return [one for one in checkpoints if one not in keep and tag(one) is None]


def apply(
    folder: Place, rules: Retention, entering: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Delete what the rules don't keep, markers first; the names of what was deleted.

    entering: told of "delete" when the markers are gone. Raises what stood in the way of one (a
    file that is open over NFS, a permission) when the others are gone.
    """
    doomed = superfluous(complete(folder), rules)
    failed = _failures(remove, (one / MARKER for one in doomed))
    if doomed:
        entering("delete")
    sweep(folder)
    if failed:
        raise failed.pop(0)
    return [one.name for one in doomed]


def sweep(folder: Place, drafts: bool = False) -> None:
    """Remove what is left of checkpoints without a marker; drafts: of unfinished saves, too.

    Not to be called while a save is under way, except by the one who ends it. Raises what stood in
    the way of one when the others are gone.
    """
    referenced: set[tuple[str, str]] = set()
    whole = {one.name for one in complete(folder)}
    if isinstance(folder, URLPath):
        for name in whole:
            try:
                files = read_files(folder / name)
            except (ManifestError, OSError):
                return  # what it refers to is not known: nothing may go
            referenced |= {(e.folder, file) for file, e in files.items() if e.folder is not None}
    there = names(folder)
    left = [folder / name for name in there if position(name) is not None and name not in whole]
    failed = _failures(lambda one: _remove_unreferenced(one, referenced), left)
    if drafts:
        failed += _failures(remove, (folder / name for name in there if name.startswith(DRAFT)))
    if failed:
        raise failed.pop(0)


def _failures(action: Callable[[Place], None], places: Iterable[Place]) -> list[Exception]:
    """Do it to every place; what went wrong, without the frames, which hold what is saved."""
    failed: list[Exception] = []
    for place in places:
        try:
            action(place)
        except Exception as error:
            failed.append(error.with_traceback(None))
    return failed


def _remove_unreferenced(leftover: Place, referenced: set[tuple[str, str]]) -> None:
    if not any(owner == leftover.name for owner, _ in referenced):
        remove(leftover)
        return
    for file in names(leftover):
        if (leftover.name, file) not in referenced:
            remove(leftover / file)


def describe(rules: Retention) -> dict[str, Any]:
    """The rules as plain data; `Retention(**describe(rules))` is the same."""
    return dict(vars(rules))
