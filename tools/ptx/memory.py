"""Shared and global memory with a record of who touched what, so that a race is an error.

Memory is counted in halfwords (two bytes), the narrowest that the kernels use. Threads of a warp
run together; between two barriers a halfword that a warp writes may be touched by no other warp of
the program, and during a launch one that a program writes by no other program. Two things that the
compiler does are no conflict: several warps write the same bits, and several warps read a word
that one of those then writes (each has all values; what the others read late they do not use).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
POISON = np.uint16(0xFFFF)  # a NaN in bfloat16 and in float32


class AccessError(Exception):
    """An access outside of a memory, a misaligned one, or a race."""


@dataclass(frozen=True)
class Access:
    """Which lanes touch memory: their warps in the program, their programs in the launch (both
    [lanes]), and the barrier interval they are in (counted from 1)."""

    warp: Array
    program: Array
    interval: int


class Region:
    """Halfwords with the record of one launch. `across`: whether programs share it."""

    def __init__(self, words: Array, name: str, across: bool) -> None:
        self.words, self.name, self.across = words, name, across
        size = words.size
        self.write_warp = np.zeros(size, np.int32)
        self.write_interval = np.zeros(size, np.int32)
        self.readers = np.zeros(size, np.uint32)
        self.read_interval = np.zeros(size, np.int32)
        if across:
            self.begin()

    def begin(self) -> None:
        """No program has touched anything yet."""
        size = self.words.size
        self.write_program = np.full(size, -1, np.int32)
        self.first_reader = np.full(size, np.iinfo(np.int32).max, np.int32)
        self.last_reader = np.full(size, -1, np.int32)

    def _fail(self, what: str, index: Array, bad: Array) -> None:
        raise AccessError(f"{what} at halfword {int(index[bad][0])} of {self.name}")

    def read(self, index: Array, access: Access) -> Array:
        """The words at index [lanes, count]; marks them as read."""
        warp = np.broadcast_to(access.warp[:, None], index.shape)
        recent = self.write_interval[index] == access.interval
        other = self.write_warp[index] != warp
        if self.across:
            program = np.broadcast_to(access.program[:, None], index.shape)
            writer = self.write_program[index]
            bad = (writer >= 0) & (writer != program)
            if bad.any():
                self._fail("read of what another program writes", index, bad)
            np.minimum.at(self.first_reader, index, program)
            np.maximum.at(self.last_reader, index, program)
        if (bad := recent & other).any():
            self._fail("read of what another warp has written since the last barrier", index, bad)
        self._mark(index, warp, access.interval)
        return self.words[index]

    def _mark(self, index: Array, warp: Array, interval: int) -> None:
        stale = self.read_interval[index] != interval
        self.readers[index[stale]] = 0
        self.read_interval[index] = interval
        np.bitwise_or.at(self.readers, index, np.left_shift(np.uint32(1), warp.astype(np.uint32)))

    def check_write(self, index: Array, access: Access, values: Array | None) -> None:
        """Whether words at index [lanes, count] may be written; values: by what, if it is known."""
        warp = np.broadcast_to(access.warp[:, None], index.shape)
        changed = True if values is None else self.words[index] != values
        own = np.left_shift(np.uint32(1), warp.astype(np.uint32))
        readers = np.where(self.read_interval[index] == access.interval, self.readers[index], 0)
        read = (readers != 0) & (readers & own == 0)
        written = self.write_interval[index] == access.interval
        written &= self.write_warp[index] != warp
        if self.across:
            program = np.broadcast_to(access.program[:, None], index.shape)
            before = self.write_program[index]
            alien = (before >= 0) & (before != program) & changed
            if alien.any():
                self._fail("write of what another program writes", index, alien)
            first, last = self.first_reader[index], self.last_reader[index]
            alien = (last >= 0) & ((first != program) | (last != program))
            if alien.any():
                self._fail("write of what another program reads", index, alien)
        if (bad := read & changed).any():
            self._fail("write of what another warp has read since the last barrier", index, bad)
        if (bad := written & changed).any():
            self._fail("write of what another warp has written since the last barrier", index, bad)

    def write(self, index: Array, values: Array, access: Access) -> None:
        """Set the words at index [lanes, count] to values [lanes, count]."""
        self.check_write(index, access, values)
        self.words[index] = values
        if (bad := self.words[index] != values).any():
            self._fail("two values written at once", index, bad)
        self.write_warp[index] = access.warp[:, None]
        self.write_interval[index] = access.interval
        if self.across:
            self.write_program[index] = access.program[:, None]


class SharedMemory:
    """Shared memory of the programs that run together, each its own; addresses start at `BASE`."""

    BASE = 1024

    def __init__(self, programs: int, size: int) -> None:
        self.halfwords = size // 2
        words = np.full(programs * self.halfwords, POISON, np.uint16)
        self.region = Region(words, "shared memory", across=False)
        self.fence = 0
        self.fences = np.zeros(words.size, np.int32)
        self.arriving = np.zeros(words.size, bool)

    def index(self, address: Array, count: int, slot: Array) -> Array:
        """Halfwords [lanes, count] from byte addresses [lanes] of programs in slots [lanes]."""
        offset = address.astype(np.int64) - self.BASE
        size = 2 * count
        if (offset % min(size, 16)).any():
            raise AccessError(f"{size} B at a misaligned address of shared memory")
        if (bad := (offset < 0) | (offset + size > 2 * self.halfwords)).any():
            raise AccessError(
                f"{size} B at {int(offset[bad][0])} of {2 * self.halfwords} B of shared memory"
            )
        start = slot * self.halfwords + offset // 2
        return start[:, None] + np.arange(count)

    def read(self, index: Array, access: Access, by_tensor_cores: bool = False) -> Array:
        """Words [lanes, count]. by_tensor_cores: by a wgmma, which sees what was written before
        the last fence only."""
        if self.arriving[index].any():
            raise AccessError("read of what an asynchronous copy is still bringing")
        if by_tensor_cores and (self.fences[index] > self.fence).any():
            raise AccessError("wgmma reads what no fence.proxy.async has published")
        return self.region.read(index, access)

    def write(self, index: Array, values: Array, access: Access) -> None:
        """Set words [lanes, count]."""
        if self.arriving[index].any():
            raise AccessError("write over what an asynchronous copy is bringing")
        self.region.write(index, values, access)
        self.fences[index] = self.fence + 1

    def expect(self, index: Array, access: Access) -> None:
        """An asynchronous copy to these words [lanes, count] begins."""
        if self.arriving[index].any():
            raise AccessError("two asynchronous copies to one place")
        self.region.check_write(index, access, None)
        self.region.words[index] = POISON
        self.arriving[index] = True

    def arrive(self, index: Array, values: Array, access: Access) -> None:
        """... and has ended. No fence is asked for before a wgmma reads it: compilers and CUTLASS
        leave it out."""
        self.arriving[index] = False
        self.region.words[index] = values
        self.region.write_warp[index] = access.warp[:, None]
        self.region.write_interval[index] = access.interval
        self.fences[index] = self.fence


class GlobalMemory:
    """The storages that a launch was given, at their own addresses (address, bytes, name). An odd
    byte at an end lies in a word of its own, whose other half no allocator gives to another."""

    def __init__(self, storages: list[tuple[int, int, str]]) -> None:
        self.regions: list[Region] = []
        bases: list[int] = []
        ends: list[int] = []
        for address, size, name in sorted(set(storages)):
            if bases and address < ends[-1]:
                continue  # the same storage under another name
            size += size % 2
            buffer = (ctypes.c_uint8 * size).from_address(address)
            words = np.frombuffer(memoryview(buffer), np.uint16, size // 2)
            self.regions.append(Region(words, name, across=True))
            bases.append(address)
            ends.append(address + size)
        self.bases, self.ends = np.array(bases, np.uint64), np.array(ends, np.uint64)

    def meet(self) -> None:
        """All programs have reached a barrier of their cluster: what they touch from here on is no
        conflict with what they touched before."""
        for region in self.regions:
            region.begin()

    def _places(self, address: Array, count: int) -> list[tuple[Region, Array, Array]]:
        size = 2 * count
        if (address % np.uint64(min(size, 16))).any():
            raise AccessError(f"{size} B at a misaligned address of global memory")
        which = np.searchsorted(self.bases, address, "right") - 1
        bad = (which < 0) | (address + np.uint64(size) > self.ends[which])
        if bad.any():
            near = self.regions[max(int(which[bad][0]), 0)]
            past = int(address[bad][0]) - int(self.bases[max(int(which[bad][0]), 0)])
            raise AccessError(f"{size} B at byte {past:,} of {near.name} ({near.words.size * 2:,})")
        places = []
        for region in np.unique(which):
            lanes = np.flatnonzero(which == region)
            start = ((address[lanes] - self.bases[region]) // np.uint64(2)).astype(np.int64)
            places.append((self.regions[region], lanes, start[:, None] + np.arange(count)))
        return places

    def read(self, address: Array, count: int, access: Access) -> Array:
        """Words [lanes, count] at byte addresses [lanes]."""
        values = np.empty((address.size, count), np.uint16)
        for region, lanes, index in self._places(address, count):
            values[lanes] = region.read(index, _of(access, lanes))
        return values

    def write(self, address: Array, values: Array, access: Access) -> None:
        """Set words [lanes, count] at byte addresses [lanes]."""
        for region, lanes, index in self._places(address, values.shape[1]):
            region.write(index, values[lanes], _of(access, lanes))


def _of(access: Access, lanes: Array) -> Access:
    return Access(access.warp[lanes], access.program[lanes], access.interval)
