"""The machine: programs of a launch, their threads, and PTX's statements on them.

All threads of all programs of a group take each statement together, as arrays; where programs
branch apart the group is split. Where threads of one program do, those that are furthest behind go
first, until all are together again, which they must be at a barrier.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tools.ptx.arithmetic import TYPES
from tools.ptx.group import Group, ProgramError
from tools.ptx.memory import AccessError, Array, GlobalMemory
from tools.ptx.parsing import Kernel
from tools.ptx.statements import MEETING, step

TOGETHER = 32
"""Programs of a group, at most: more take more memory, and little less time."""


class Machine:
    """A kernel ready to run."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.steps = [step(instruction) for instruction in kernel.instructions]

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: list[Any],
        shared: int,
        memory: GlobalMemory,
    ) -> int:
        """Run all programs of a grid; returns the statements run, counted once a group.

        arguments: the values of the kernel's parameters (addresses, integers, floats, bytes).
        Raises ProgramError with the statement at which something went wrong.
        """
        programs = np.arange(grid[0] * grid[1] * grid[2])
        done = 0
        waiting: list[tuple[Group, int]] = []
        for start in range(0, programs.size, TOGETHER):
            group = Group(self.kernel, grid, programs[start : start + TOGETHER], shared, memory)
            for (name, kind), value in zip(self.kernel.parameters, arguments, strict=True):
                if kind == "bytes":
                    group.structures[name] = value
                    continue
                dtype = TYPES[kind]
                bits = np.array([value], dtype).view(TYPES[f"u{8 * dtype(0).itemsize}"])
                group.registers[name] = np.repeat(bits, group.slot.size)
            done += self._run(group, 0, waiting)
        while waiting:
            # Programs of other clusters are waited for too: they have nothing to do with these.
            there, waiting = waiting, []
            if sum(group.programs.size for group, _ in there) < programs.size:
                raise ProgramError("a barrier of a cluster that some programs do not reach")
            memory.meet()
            interval = 1 + max(group.interval for group, _ in there)
            for group, at in there:
                group.interval = interval
                done += self._run(group, at, waiting)
        return done

    def _run(self, group: Group, at: int, waiting: list[tuple[Group, int]]) -> int:
        """A group from a statement on, to its end or to where it waits for the whole cluster: into
        `waiting`, with the statement behind."""
        done = 0
        while at < len(self.steps):
            if self.kernel.instructions[at].name.startswith(MEETING):
                waiting.append((group, at + 1))
                return done
            jump = self._step(group, at)
            done += 1
            at += 1
            if jump is None:
                continue
            taken, there = self._taken(group, at - 1), self._place(jump)
            each = taken.reshape(group.programs.size, -1)
            goes = each[:, 0]
            if (each != goes[:, None]).any():
                more, at = self._apart(group, np.where(taken, there, at))
                done += more
            elif goes.all():
                at = there
            elif goes.any():
                done += self._run(group.part(np.flatnonzero(goes)), there, waiting)
                group = group.part(np.flatnonzero(~goes))
        return done

    def _apart(self, group: Group, places: Array) -> tuple[int, int]:
        """Threads from their places [threads] on, until they meet: statements run, and where."""
        done = 0
        while (places != places[0]).any():
            at = int(places.min())
            group.mask = places == at
            jump = self._step(group, at)
            done += 1
            after: int | Array = at + 1
            if jump is not None:
                after = np.where(self._taken(group, at), self._place(jump), after)
            places = np.where(group.mask, after, places)
        group.mask = None
        return done, int(places[0])

    def _step(self, group: Group, at: int) -> str | None:
        try:
            return self.steps[at](group)
        except (AccessError, ProgramError) as fault:
            raise ProgramError(f"{fault}; {self.kernel.instructions[at].where()}") from None

    def _taken(self, group: Group, at: int) -> Array:
        """Which threads jump at a statement that does."""
        instruction = self.kernel.instructions[at]
        if not instruction.predicate:
            return np.ones(group.slot.size, bool)
        taken = group.value(instruction.predicate, "pred") != instruction.negated
        return np.broadcast_to(taken, (group.slot.size,))

    def _place(self, label: str) -> int:
        return self.kernel.labels[label] if label else len(self.steps)
