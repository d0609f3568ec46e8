"""Programs that run together: their registers, memory, and what is under way in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.ptx.arithmetic import TYPES
from tools.ptx.memory import Access, Array, GlobalMemory, SharedMemory
from tools.ptx.parsing import Kernel

WARP = 32


SHARED_NAMES = ("global_smem", "shared_memory")
"""What the start of shared memory is called."""


STRUCTURES = 1 << 32


class ProgramError(Exception):
    """A statement that fails, with its place in the source."""


@dataclass
class Copy:
    """An asynchronous copy under way: threads [lanes], where each brings words in its program's
    shared memory (bytes), where from, which of them bring more than zeros, and the words that they
    found when it began [lanes, count]."""

    lanes: Array
    target: Array
    source: Array
    filled: Array
    words: Array

    def index(self, group: Group) -> Array:
        """The words in shared memory [lanes, count]."""
        return group.shared.index(self.target, self.words.shape[1], group.slot[self.lanes])

    def part(self, group: Group, stay: Array) -> Copy | None:
        """The copy as the threads that stay [threads] have it, counted anew."""
        some = stay[self.lanes]
        if not some.any():
            return None
        lanes = (np.cumsum(stay) - 1)[self.lanes[some]]
        rest = (z[some] for z in (self.target, self.source, self.filled, self.words))
        return Copy(lanes, *rest)


class Group:
    """Programs that run together: registers [threads of all programs], their shared memory."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        programs: Array,
        shared: int,
        memory: GlobalMemory,
    ) -> None:
        self.kernel, self.grid, self.programs, self.memory = kernel, grid, programs, memory
        threads, count = kernel.threads, programs.size
        self.registers: dict[str, Array] = {}
        self.structures: dict[str, bytes] = {}  # parameters, each at a multiple of STRUCTURES
        self.shared = SharedMemory(count, shared)
        self.slot = np.repeat(np.arange(count), threads)
        thread = np.tile(np.arange(threads, dtype=np.uint32), count)
        self.warp = (thread // WARP).astype(np.int32)
        self.program = programs[self.slot].astype(np.int32)
        self.interval = 1
        self.mask: Array | None = None  # threads that take the statement, where not all do
        self.copies: list[list[Copy]] = [[]]
        self.pending: list[Array] = []  # operands of wgmma that are still being read
        x, y, _ = grid
        where = self.program.astype(np.uint32)
        self.special = {"%tid.x": thread, "%tid.y": thread * 0, "%tid.z": thread * 0}
        for name, place in (("x", where % x), ("y", where // x % y), ("z", where // (x * y))):
            self.special["%ctaid." + name] = place.astype(np.uint32)
            self.special["%nctaid." + name] = np.full_like(thread, grid["xyz".index(name)])
        self.special["%ntid.x"] = np.full_like(thread, threads)
        self.special["%laneid"] = thread % np.uint32(WARP)

    def part(self, slots: Array) -> Group:
        """The programs in those slots, as a group of their own from here on."""
        size = 2 * self.shared.halfwords
        new = Group(self.kernel, self.grid, self.programs[slots], size, self.memory)
        if self.pending:
            raise ProgramError("programs part while products are under way")
        lanes = np.isin(self.slot, slots)
        new.copies = [[copy for c in g if (copy := c.part(self, lanes))] for g in self.copies]
        new.structures = self.structures
        new.registers = {name: z[lanes] for name, z in self.registers.items()}
        words = np.isin(np.arange(self.slot[-1] + 1), slots).repeat(self.shared.halfwords)
        for name in ("words", "write_warp", "write_interval", "readers", "read_interval"):
            getattr(new.shared.region, name)[:] = getattr(self.shared.region, name)[words]
        for name in ("fences", "arriving"):
            getattr(new.shared, name)[:] = getattr(self.shared, name)[words]
        new.shared.fence, new.interval = self.shared.fence, self.interval
        return new

    def access(self, lanes: Array) -> Access:
        return Access(self.warp[lanes], self.program[lanes], self.interval)

    def value(self, operand: str, kind: str) -> Array:
        """An operand [threads], or [1] if it is a number, read as a type of PTX."""
        dtype = TYPES[kind]
        if operand in self.registers:
            z = self.registers[operand]
            size = dtype(0).itemsize
            if z.itemsize < size:
                raise ProgramError(f"{operand} has {8 * z.itemsize} bits, read as {kind}")
            return (z.astype(f"u{size}") if z.itemsize > size else z).view(dtype)
        if operand in self.special:
            return self.special[operand].view(np.uint32).astype(dtype)
        if operand in self.structures:
            place = STRUCTURES * (1 + list(self.structures).index(operand))
            return np.array([place], np.uint64).astype(dtype)
        if operand.startswith("%"):
            # Compilers leave half of a packed register undefined: a NaN, wherever it is used.
            if kind == "pred":
                raise ProgramError(f"{operand} is read before it is written")
            return np.full(1, -1, f"i{dtype(0).itemsize}").view(dtype)
        return constant(operand, kind)

    def parameter(self, operand: str, kind: str, count: int) -> list[Array]:
        """`count` values [1] of a parameter at "[place + number]"."""
        base = operand.strip("[] ")
        if base in self.registers and not base.startswith("%"):
            return [self.value(base, kind)]
        place = np.unique(self.address(operand, "u64"))
        if place.size > 1:
            raise ProgramError("threads load different parameters")
        which, offset = divmod(int(place[0]), STRUCTURES)
        dtype = np.dtype(TYPES[kind])
        structure = [*self.structures.values()][which - 1]
        return list(np.frombuffer(structure, dtype, count, offset).reshape(-1, 1))

    def every(self, operand: str, kind: str) -> Array:
        """The same [threads], also of a number."""
        value = self.value(operand, kind)
        return np.ascontiguousarray(np.broadcast_to(value, self.slot.shape))

    def assign(self, name: str, value: Array, active: Array | None) -> None:
        """Set a register, of the active threads only."""
        if name == "_":
            return
        size = self.slot.size
        if value.dtype != np.bool_:
            value = value.view(TYPES[f"u{8 * value.itemsize}"])
        value = np.broadcast_to(value, (size,))
        if active is not None:
            old = self.registers.get(name)
            old = np.zeros(size, value.dtype) if old is None else old.astype(value.dtype)
            value = np.where(active, value, old)
        self.registers[name] = np.ascontiguousarray(value)

    def address(self, operand: str, kind: str) -> Array:
        """The byte addresses of "[register + number]"."""
        base, _, offset = operand.strip("[] ").partition("+")
        where = self.value(base.strip(), kind)
        if offset:
            where = where + TYPES[kind](int(offset.strip()) % (1 << 8 * where.itemsize))
        return np.broadcast_to(where, (self.slot.size,))

    def whole_warps(self) -> Array:
        """The threads that take a statement of whole warps."""
        if self.mask is None:
            return np.arange(self.slot.size)
        each = self.mask.reshape(-1, WARP)
        if (each != each[:, :1]).any():
            raise ProgramError("a part of a warp")
        return np.flatnonzero(self.mask)

    def lanes(self, active: Array | None) -> Array:
        return np.arange(self.slot.size) if active is None else np.flatnonzero(active)

    def barrier(self) -> None:
        if self.mask is not None:
            raise ProgramError("a barrier of threads that are not together")
        self.interval += 1

    def publish(self) -> None:
        """fence.proxy.async: what was written to shared memory is there for wgmma."""
        self.shared.fence += 1


def constant(text: str, kind: str) -> Array:
    """A number of PTX [1]."""
    dtype = TYPES[kind]
    if text in SHARED_NAMES:
        return np.array([SharedMemory.BASE], np.uint32).astype(dtype)
    if text.startswith(("0f", "0F")):
        return np.array([int(text[2:], 16)], np.uint32).view(dtype)
    if text.startswith(("0d", "0D")):
        return np.array([int(text[2:], 16)], np.uint64).view(dtype)
    if kind == "pred":
        return np.array([int(text, 0) != 0])
    number = int(text.rstrip("U"), 0) % (1 << 8 * dtype(0).itemsize)
    return np.array([number], TYPES[f"u{8 * dtype(0).itemsize}"]).view(dtype)


def listed(operand: str) -> list[str]:
    """ "{a, b}" or "a" -> names."""
    return [part.strip() for part in operand.strip("{} ").split(",")]
