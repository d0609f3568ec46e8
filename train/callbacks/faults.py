"""Faults on purpose, so that a run's recovery can be rehearsed: `faults:` in the configuration.

Each fault happens once in the life of a run folder: faults.jsonl remembers it before it happens, so
that the resumed run passes the place unharmed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from train.callbacks.base import Callback
from train.checkpoint.manifest import MARKER
from train.line_file import tell
from train.parallel.pulse import FIRST_RANK_PHASES, PHASES, STEP_PHASES
from train.section import Section

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.parallel.ranks import Ranks
    from train.trainer import Trainer

FIRED = "faults.jsonl"

Kind = Literal[
    "kill", "term", "int", "usr1", "stop", "slow", "raise", "oom", "nan_loss", "nan_gradient",
    "disk_full", "flip_shard", "truncate_shard", "remove_shard", "flip_checkpoint",
    "truncate_checkpoint", "remove_from_checkpoint",
]  # fmt: skip
Phase = Literal[
    "open", "start", "data", "forward", "backward", "reduce", "optimizer", "evaluation", "save",
    "save-before-marker", "save-after-marker", "delete",
]  # fmt: skip

SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr1": signal.SIGUSR1,
    "stop": signal.SIGSTOP,
}
# Where a fault can be, for those that can't be anywhere.
ONLY = {
    "nan_loss": ("forward",),
    "nan_gradient": ("reduce",),
    "disk_full": ("save-before-marker",),
    "flip_checkpoint": STEP_PHASES,
    "truncate_checkpoint": STEP_PHASES,
    "remove_from_checkpoint": STEP_PHASES,
}
BEFORE_STEPS = ("open", "start")


class FaultConfig(Section):
    """One fault. What is left out is drawn from `seed`: step, rank, phase (of a step), byte, file;
    in the phases open and start the step is then 0, before the first one.

    kind: kill, term, int, usr1, stop (SIGSTOP: a hang) are signals; slow sleeps for `seconds`;
        raise, oom and disk_full are errors; nan_loss, nan_gradient spoil one step; the others
        damage the largest file of the first training corpus or, once there is one, of the newest
        checkpoint.
    phase: of the training thread, see `train.parallel.pulse`; the fault comes the first time that
        it is entered in step `step` or later. The marker and deletions are the first rank's.
    """

    kind: Kind
    rank: int | None = Field(None, ge=0)
    step: int | None = Field(None, ge=0)
    phase: Phase | None = None
    seed: int = Field(0, ge=0)
    seconds: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> FaultConfig:
        allowed = ONLY.get(self.kind, PHASES)
        if self.phase is not None and self.phase not in allowed:
            raise ValueError(f"faults: {self.kind} happens in {', '.join(allowed)} only")
        if self.phase in FIRST_RANK_PHASES and self.rank not in (None, 0):
            raise ValueError(f"faults: phase {self.phase} is of rank 0 alone")
        if self.phase == "open" and self.step:
            raise ValueError("faults: phase open comes before any step: leave step out")
        return self

    @property
    def possible_phases(self) -> tuple[str, ...]:
        """Those that it may happen in."""
        return (self.phase,) if self.phase else ONLY.get(self.kind, STEP_PHASES)


class Faults(Callback):
    """Makes the configured faults happen on this rank; used on every rank."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.pulse = config, ranks.pulse
        self.path = config.run_dir / FIRED
        self._trainer: Trainer | None = None
        self._undo: Callable[[], None] | None = None
        steps = max(1, config.training.total_tokens // config.training.batch_tokens)
        done = {row["number"] for row in read_fired(self.path)}
        drawn = {
            number: _drawn(given, number, steps, ranks.size)
            for number, given in enumerate(config.faults)
            if number not in done
        }
        self._waiting = {n: fault for n, fault in drawn.items() if fault.rank == ranks.rank}
        for number, fault in drawn.items() if ranks.is_first else ():
            if fault.rank not in range(ranks.size):
                tell(f"faults.{number} is of rank {fault.rank}, and there are {ranks.size} ranks")
            elif fault.step not in range(steps + 1) and config.mode == "pretrain":
                tell(f"faults.{number} is of step {fault.step}, and the last one is {steps}")
        if self._waiting:
            self.pulse.listeners.append(self.at)

    def on_start(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def at(self, phase: str) -> None:
        """The training thread enters `phase`: whatever waits for it happens, one after another."""
        if self._undo is not None and phase == "reduce":
            self._undo()
            self._undo = None
        for number, fault in list(self._waiting.items()):
            if fault.phase == phase and fault.step is not None and self.pulse.step >= fault.step:
                if fault.kind.endswith("checkpoint") and _newest(self.config) is None:
                    continue
                del self._waiting[number]
                self._remember(number, fault)
                self._happen(fault)

    def _remember(self, number: int, fault: FaultConfig) -> None:
        """On disk before it happens."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"number": number, "time": time.time(), **fault.model_dump(mode="json")}
        row["at_step"] = self.pulse.step
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _happen(self, fault: FaultConfig) -> None:
        kind = fault.kind
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        elif kind == "slow":
            time.sleep(fault.seconds)
        elif kind == "raise":
            raise RuntimeError(f"injected fault in phase {fault.phase} of step {self.pulse.step}")
        elif kind == "oom":
            raise MemoryError("injected fault")
        elif kind == "disk_full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.config.run_dir))
        elif kind == "nan_loss":
            assert self._trainer is not None
            handle = self._trainer.engine.modules[-1].register_forward_hook(_spoil)
            self._undo = handle.remove
        elif kind == "nan_gradient":
            assert self._trainer is not None
            grads = [grad for grad in self._trainer.cadence.gradients() if grad.numel() > 0]
            grads[fault.seed % len(grads)].view(-1)[0] = math.nan
        else:
            damage_file(_victim(kind, self.config), kind, fault.seed)


def read_fired(path: Path) -> list[dict[str, Any]]:
    """What has happened to a run, in order: the fields of each fault, `time` and `at_step`."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        rows.append(json.loads(line))
    return rows


def damage_file(path: Path, kind: str, seed: int) -> None:
    """Flip one bit of a file, cut off its second half, or remove it, as the kind begins."""
    if kind.startswith("remove"):
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind.startswith("truncate"):
        content = content[: len(content) // 2]
    else:
        content[random.Random(seed).randrange(len(content))] ^= 1
    path.write_bytes(content)


def _victim(kind: str, config: RunConfig) -> Path:
    """The largest file of what the kind damages."""
    folder = Path(config.data.train[0].path) if kind.endswith("shard") else _newest(config)
    assert folder is not None
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: (path.stat().st_size, path.name))


def _newest(config: RunConfig) -> Path | None:
    """The newest checkpoint in the run folder."""
    markers = (config.run_dir / "checkpoints").glob(f"*/{MARKER}")
    return max((marker.parent for marker in markers), default=None)


def _drawn(fault: FaultConfig, number: int, steps: int, ranks: int) -> FaultConfig:
    """The fault with everything decided, the same on every rank."""
    draw = random.Random(f"{fault.seed}/{number}")
    step, phase = draw.randint(1, steps), draw.choice(ONLY.get(fault.kind, STEP_PHASES))
    rank = draw.randrange(ranks)
    phase = fault.phase or phase
    if phase in BEFORE_STEPS:
        step = 0
    return fault.model_copy(
        update={
            "step": step if fault.step is None else fault.step,
            "phase": phase,
            "rank": 0 if phase in FIRST_RANK_PHASES else rank if fault.rank is None else fault.rank,
        }
    )


def _spoil(module: Any, inputs: Any, output: Any) -> Any:
    return output * math.nan
