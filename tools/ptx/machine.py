"""The machine: programs of a launch, their threads, and PTX's statements on them.

All threads of all programs of a group take each statement together, as arrays; where programs
branch apart the group is split. Within a program a branch must be the same for all threads, which
it is in what Triton makes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tools.ptx.arithmetic import TYPES
from tools.ptx.group import Group, ProgramError
from tools.ptx.memory import AccessError, GlobalMemory
from tools.ptx.parsing import Kernel
from tools.ptx.statements import step

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

        arguments: the values of the kernel's parameters (addresses, integers, floats).
        Raises ProgramError with the statement at which something went wrong.
        """
        programs = np.arange(grid[0] * grid[1] * grid[2])
        done = 0
        for start in range(0, programs.size, TOGETHER):
            group = Group(self.kernel, grid, programs[start : start + TOGETHER], shared, memory)
            for (name, kind), value in zip(self.kernel.parameters, arguments, strict=True):
                dtype = TYPES[kind]
                bits = np.array([value], dtype).view(TYPES[f"u{8 * dtype(0).itemsize}"])
                group.registers[name] = np.repeat(bits, group.slot.size)
            done += self._run(group, 0)
        return done

    def _run(self, group: Group, at: int) -> int:
        """A group from a statement on, to its end."""
        done = 0
        while at < len(self.steps):
            instruction = self.kernel.instructions[at]
            try:
                jump = self.steps[at](group)
            except (AccessError, ProgramError) as fault:
                raise ProgramError(f"{fault}; {instruction.where()}") from None
            done += 1
            at += 1
            if jump is None:
                continue
            goes = np.ones(group.programs.size, bool)
            if instruction.predicate:
                taken = group.value(instruction.predicate, "pred") != instruction.negated
                each = taken.reshape(group.programs.size, -1)
                if (each != each[:, :1]).any():
                    raise ProgramError(f"threads of a program part; {instruction.where()}")
                goes = each[:, 0]
            there = self.kernel.labels[jump] if jump else len(self.steps)
            if goes.all():
                at = there
            elif goes.any():
                done += self._run(group.part(np.flatnonzero(goes)), there)
                group = group.part(np.flatnonzero(~goes))
        return done
