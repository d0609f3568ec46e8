"""The checkpoints of one run folder: save, list, verify, load, and delete old ones.

A checkpoint is a folder `tokens-000000001234` of torch DCP files with the tensors, `trainer.json`
with everything else, a manifest of checksums and, written last, the marker that makes it count.
"""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from train.checkpoint.manifest import MARKER, damage, write_manifest, write_marker
from train.parallel.data_parallel import DataParallel

PLAIN = "trainer.json"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be saved, found or trusted; the message is one line."""


class CheckpointStore:
    """The `checkpoints` folder of a run, shared by all ranks; the first one writes what is common.

    keep_last: how many complete checkpoints stay; older ones are deleted after a save.
    """

    def __init__(self, folder: Path, ranks: DataParallel, keep_last: int) -> None:
        self.folder, self.ranks, self.keep_last = folder, ranks, keep_last

    def complete(self) -> list[Path]:
        """Checkpoints whose marker stands, oldest first."""
        return sorted(marker.parent for marker in self.folder.glob(f"tokens-*/{MARKER}"))

    def save(
        self,
        tokens: int,
        tensors: dict[str, Tensor],
        plain: dict[str, Any],
        replace: bool = False,
    ) -> Path:
        """Save under a token count. Ranks pass the same tensors or, under other names, their own.

        The folder appears under its name only when all files are on disk; a save that dies leaves
        every earlier checkpoint as it was. One that is there already, and verifies, stays unless
        `replace`.
        """
        final = self.folder / f"tokens-{tokens:015d}"
        there = not replace and (final / MARKER).exists() and damage(final) is None
        if self.ranks.broadcast(there):
            return final
        draft = self.folder / f".saving-{final.name}"
        if self.ranks.is_first:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self.ranks.pulse.enter("save")
        self.ranks.barrier()
        alone = self.ranks.size == 1
        together = nullcontext() if alone else self.ranks.pulse.collective("save of all tensors")
        with warnings.catch_warnings(), together:
            warnings.simplefilter("ignore")  # DCP warns of the single-process mode that is meant
            save(tensors, storage_writer=FileSystemWriter(draft), no_dist=alone)
        if self.ranks.is_first:
            (draft / PLAIN).write_text(json.dumps(plain))
            write_manifest(draft)
            _delete(final)
            draft.rename(final)
            self.ranks.pulse.enter("save-before-marker")
            write_marker(final)
            self.ranks.pulse.enter("save-after-marker")
            for old in self.complete()[: -self.keep_last]:
                _delete(old, self.ranks)
        self.ranks.barrier()
        return final

    def newest(self, at_most: int | None = None) -> Path:
        """The newest checkpoint that verifies, agreed by all ranks; of at most so many tokens.

        Damaged ones are passed over with a warning that says why. Raises CheckpointError when
        none is left: a resume never turns into a fresh start.
        """
        found: str | None = None
        reasons: list[str] = []
        if self.ranks.is_first:
            for folder in reversed(self.complete()):
                if at_most is not None and tokens_of(folder) > at_most:
                    continue
                reason = damage(folder)
                if reason is None:
                    found = str(folder)
                    break
                reasons.append(f"{folder.name}: {reason}")
        found, reasons = self.ranks.broadcast((found, reasons))
        for reason in reasons:
            warnings.warn(f"skipping damaged checkpoint {reason}", stacklevel=2)
        if found is None:
            why = "; ".join(reasons) if reasons else "there is none"
            raise CheckpointError(f"no usable checkpoint under {self.folder}: {why}")
        return Path(found)

    def forget_after(self, folder: Path) -> None:
        """Delete every checkpoint newer than `folder`, newest first: their course was left."""
        if self.ranks.is_first:
            for later in reversed(self.complete()):
                if later.name > folder.name:
                    _delete(later)
        self.ranks.barrier()

    def plain(self, folder: Path) -> dict[str, Any]:
        """Everything of a checkpoint that is not a tensor."""
        content: dict[str, Any] = json.loads((folder / PLAIN).read_text())
        return content

    def tensors(self, folder: Path, prefix: str = "") -> dict[str, Tensor]:
        """All tensors whose names start with `prefix`, on the CPU, whatever saved them."""
        reader = FileSystemReader(folder)
        wanted = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in save
            load(wanted, storage_reader=reader, no_dist=True)
        return wanted


def tokens_of(folder: Path) -> int:
    """The tokens read, from the name of a checkpoint."""
    return int(folder.name.removeprefix("tokens-"))


@torch.no_grad()
def load_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy `model/NAME` tensors into the parameters; ValueError unless the names match exactly."""
    named = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
    if named.keys() != tensors.keys():
        raise ValueError(
            f"checkpoint and model differ in {sorted(named.keys() ^ tensors.keys())[:4]}"
        )
    for name, parameter in named.items():
        parameter.copy_(tensors[name])


def _delete(folder: Path, ranks: DataParallel | None = None) -> None:
    """Remove a checkpoint, marker first, so that half of one never counts."""
    (folder / MARKER).unlink(missing_ok=True)
    if ranks is not None:
        ranks.pulse.enter("delete")
    shutil.rmtree(folder, ignore_errors=True)
