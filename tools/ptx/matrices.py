"""PTX's matrix instructions: fragments of mma.sync and wgmma, and the 8 x 8 matrices that ldmatrix
and stmatrix move (PTX ISA, "Warp Level Matrix Instructions", "Asynchronous Warpgroup Level Matrix
Instructions").

A thread of a warp is (g, c): g = lane // 4 is a row (of A and D) or column (of B), c = lane % 4 a
pair of the others. Sums are float32, as tensor cores have them but for the order.
"""

from __future__ import annotations

import numpy as np

from tools.ptx.arithmetic import from_bfloat16

Array = np.ndarray


def pairs(register: Array) -> Array:
    """A register of two bfloat16 per thread -> float32 [warps, 8 (g), 8 (2c, 2c + 1)]."""
    return from_bfloat16(register.view(np.uint16)).reshape(-1, 8, 8)


def cut(register: Array) -> Array:
    """A float32 (as uint32) as an operand in TF32: the bits that it lacks are cut off."""
    return (register & np.uint32(0xFFFFE000)).view(np.float32)


def singles(register: Array) -> Array:
    """A register of one TF32 per thread -> float32 [warps, 8 (g), 4 (c)]."""
    return cut(register).reshape(-1, 8, 4)


def left_fragment(registers: list[Array], bf16: bool) -> Array:
    """A [warps, 16, 16 (8 in TF32)] of mma and wgmma."""
    top_left, low_left, top_right, low_right = (
        (pairs if bf16 else singles)(r) for r in registers
    )  # fmt: skip
    top = np.concatenate([top_left, top_right], 2)
    return np.concatenate([top, np.concatenate([low_left, low_right], 2)], 1)


def right_fragment(registers: list[Array], bf16: bool) -> Array:
    """B [warps, 16 (8 in TF32), 8]."""
    halves = [(pairs if bf16 else singles)(r).swapaxes(1, 2) for r in registers]
    return np.concatenate(halves, 1)


def sums(registers: list[Array], columns: int) -> Array:
    """D [warps, 16, columns] from four registers for every 8 columns."""
    z = np.stack([r.view(np.float32).reshape(-1, 8, 4) for r in registers], -1)
    z = z.reshape(-1, 8, 4, columns // 8, 2, 2)  # warp, g, c, tile, row half, column
    return z.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, columns)


def scatter_sums(d: Array) -> list[Array]:
    """The inverse of `sums`: registers [threads]."""
    warps, _, columns = d.shape
    z = d.astype(np.float32).reshape(warps, 2, 8, columns // 8, 4, 2)
    z = z.transpose(3, 1, 5, 0, 2, 4).reshape(columns // 2, warps * 32)
    return [np.ascontiguousarray(r).view(np.uint32) for r in z]


def from_matrix(m: Array, transposed: bool) -> Array:
    """An 8 x 8 matrix of halfwords [warps, 8, 8] as ldmatrix spreads it -> uint32 [threads]."""
    m = m.swapaxes(1, 2) if transposed else m
    return np.ascontiguousarray(m).reshape(-1).view(np.uint32)


def to_matrix(register: Array, transposed: bool) -> Array:
    """The inverse, for stmatrix: uint32 [threads] -> [warps, 8, 8]."""
    m = register.view(np.uint16).reshape(-1, 8, 8)
    return m.swapaxes(1, 2) if transposed else m


def described(descriptor: int, rows: int, size: int, transposed: bool) -> Array:
    """Byte addresses of an operand of wgmma in shared memory: [rows, 32 / size], `rows` along M or
    N and the others along K, of elements of that size in bytes. transposed: M or N runs fastest
    ("MN-major"), in bfloat16 only.

    The layouts are those of the matrix descriptor (PTX ISA): units of 16 bytes in atoms of eight
    rows, a stride between atoms in either direction, and an exclusive-or of address bits.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("a matrix descriptor with a base offset")
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62 & 3]
    units = 1 << swizzle  # in a row of an atom
    i, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    if not transposed:
        unit, inside = k * size // 16, k * size % 16
        offset = i % 8 * units * 16 + i // 8 * stride + unit * (16 if swizzle else leading) + inside
    else:
        unit, inside = i // 8, i % 8 * 2
        along, far = (leading, stride) if swizzle else (stride, leading)
        offset = unit % units * 16 + unit // units * along + inside
        offset = offset + k % 8 * units * 16 + k // 8 * far
    address = start + offset
    return address ^ (address >> 3 & (units - 1) << 4)
