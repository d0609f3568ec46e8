"""torch.profiler over some steps of a run: `profiler:` in the configuration."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from train.callbacks.base import Callback
from train.line_file import tell
from train.run_files import PROFILES
from train.section import Section

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.parallel.ranks import Ranks
    from train.records import StepRecord
    from train.trainer import Trainer

ROWS = 60
"""Of the table: operators that take the most time by themselves."""


class ProfilerConfig(Section):
    """A trace of some steps: which operators and kernels ran when, and in which phase of the step.

    first_step: of those recorded, from 1; None: none are. The step before it warms the recording
        up. steps: how many; skipped ones are recorded, and don't count.
    ranks: whose. memory: allocations too; stacks: Python's lines, which takes time.

    Writes profiles/stepN-rankR.json.gz, for ui.perfetto.dev, and a table of operators, .txt.
    """

    first_step: int | None = Field(None, ge=1)
    steps: int = Field(3, ge=1)
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    memory: bool = False
    stacks: bool = False


class Profiler(Callback):
    """Records the configured steps on this rank; used on every rank that is asked for."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config.profiler, ranks
        self.folder = config.run_dir / PROFILES
        self._profile: profile | None = None
        self._left = 0
        self._phase: record_function | None = None

    def on_start(self, trainer: Trainer) -> None:
        first = self.config.first_step
        assert first is not None
        before = first - 1 - trainer.clock.steps
        if before < 0:
            tell(
                f"profiler.first_step={first} is behind this run, which goes on after step "
                f"{trainer.clock.steps}: nothing is recorded"
            )
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        warmup = min(1, before)
        self._left = before + self.config.steps
        self._profile = profile(
            activities=activities,
            schedule=schedule(
                wait=before - warmup, warmup=warmup, active=self.config.steps, repeat=1
            ),
            on_trace_ready=self._write,
            profile_memory=self.config.memory,
            with_stack=self.config.stacks,
        )
        self._profile.start()
        self.ranks.pulse.listeners.append(self._enter)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if self._profile is None:
            return
        self._leave()
        self._left -= 1
        self._profile.step()
        if self._left == 0:
            self.close()

    def on_end(self, trainer: Trainer) -> None:
        if self._left >= self.config.steps and trainer.finished:
            tell(
                f"profiler.first_step={self.config.first_step} never came: the run ended after "
                f"step {trainer.clock.steps}"
            )
        self.close()

    def close(self) -> None:
        """End the recording, and write what there is of it."""
        if self._profile is None:
            return
        self._leave()
        self.ranks.pulse.listeners.remove(self._enter)
        ended, self._profile = self._profile, None
        ended.stop()

    def _enter(self, phase: str) -> None:
        self._leave()
        self._phase = record_function(f"train/{phase}")
        self._phase.__enter__()

    def _leave(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def _write(self, recorded: profile) -> None:
        if self._left >= self.config.steps:  # the run ended before the first of them
            return
        name = f"step{self.config.first_step}-rank{self.ranks.rank}"
        trace, part = self.folder / f"{name}.json.gz", self.folder / f"{name}.part.json.gz"
        device = "device" if torch.cuda.is_available() else "cpu"
        averages = recorded.key_averages()
        table = averages.table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(part))
            os.replace(part, trace)
            (self.folder / f"{name}.txt").write_text(table)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            tell(f"the profile {trace} can't be written ({error.strerror})")


def profilers(config: RunConfig, ranks: Ranks) -> list[Profiler]:
    """This rank's, if it is asked for. The first rank says which ranks there are not."""
    if config.profiler.first_step is None:
        return []
    if ranks.is_first:
        for rank in sorted(set(config.profiler.ranks) - set(range(ranks.size))):
            tell(f"profiler.ranks names rank {rank}, and there are {ranks.size} ranks")
    return [Profiler(config, ranks)] if ranks.rank in config.profiler.ranks else []
