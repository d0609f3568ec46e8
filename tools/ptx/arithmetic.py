"""PTX's instructions on registers: arithmetic, logic, conversions.

Registers are arrays over the threads: uint16, uint32, uint64 or bool, whatever they mean; an
instruction's type says how they are read. Approximate operations (ex2, sqrt, div.full) are
computed as float32 has them: a device is off by 2 units in the last place at most.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
TYPES: dict[str, type[np.generic]] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "pred": np.bool_,
}  # fmt: skip
WIDER = {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32"}
COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
    "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def bfloat16(x: Array) -> Array:
    """float32 -> the bits of bfloat16, to the nearest, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    """The inverse, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def tf32(x: Array) -> Array:
    """float32 -> TF32, to the nearest, ties away from zero."""
    bits = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


def _compare(flags: list[str], a: Array, b: Array) -> Array:
    name = flags[0]
    if name in COMPARE:
        result = COMPARE[name](a, b)
        return result & ~(np.isnan(a) | np.isnan(b)) if a.dtype.kind == "f" else result
    if name == "nan":
        return np.isnan(a) | np.isnan(b)
    if name == "num":
        return ~(np.isnan(a) | np.isnan(b))
    return COMPARE[name.removesuffix("u")](a, b) | np.isnan(a) | np.isnan(b)


def _shift(a: Array, by: Array, left: bool) -> Array:
    """Shifts beyond the width give zero, or the sign."""
    width = a.dtype.itemsize * 8
    amount = np.minimum(by.astype(np.int64), width - 1).astype(a.dtype)
    shifted = np.left_shift(a, amount) if left else np.right_shift(a, amount)
    if left or a.dtype.kind == "u":
        shifted = np.where(by.astype(np.int64) >= width, a.dtype.type(0), shifted)
    return shifted


def _extract(a: Array, start: Array, length: Array) -> Array:
    """bfe: a field of bits, its sign extended for signed types."""
    width = a.dtype.itemsize * 8
    first, size = int(start.flat[0]), int(length.flat[0])
    left = width - first - size
    return np.right_shift(np.left_shift(a, a.dtype.type(left)), a.dtype.type(width - size))


def _insert(a: Array, into: Array, start: Array, length: Array) -> Array:
    """bfi: the lowest bits of a in place of some of another number's."""
    first, size = int(start.flat[0]), int(length.flat[0])
    field = a.dtype.type(((1 << size) - 1) << first)
    return (into & ~field) | (np.left_shift(a, a.dtype.type(first)) & field)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes picked out of eight."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    both, selector = np.broadcast_arrays(both, selector)
    result = np.zeros(both.shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint8)
        sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint8)
        byte = np.where(nibble & np.uint32(8), sign, byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _select(a: Array, b: Array, first: Array) -> Array:
    """selp: a where `first` is true, b elsewhere."""
    return np.where(first, a, b)


def _divide(a: Array, b: Array) -> Array:
    """Integers towards zero."""
    if a.dtype.kind == "f":
        return a / b
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a) // np.maximum(np.abs(b), b.dtype.type(1))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


SIMPLE: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "div": _divide,
    "rem": lambda a, b: (a - _divide(a, b) * b).astype(a.dtype),
    "neg": np.negative, "abs": np.abs, "min": np.fmin, "max": np.fmax,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rcp": np.reciprocal, "tanh": np.tanh,
    "rsqrt": lambda a: (1 / np.sqrt(a)).astype(a.dtype), "mov": lambda a: a,
}  # fmt: skip
"""Instructions whose operands and result all have the type that the name ends with."""
ONE_OPERAND = ("neg", "abs", "not", "mov", "ex2", "lg2", "sqrt", "rcp", "tanh", "rsqrt")


def _fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once (through float64, whose own rounding a float32 does not see)."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _convert(to: str, source: str, flags: list[str], values: list[Array]) -> Array:
    if to == "bf16x2":
        high, low = (bfloat16(z).astype(np.uint32) for z in values)
        return (high << np.uint32(16)) | low
    (x,) = values
    if to == "bf16":
        return bfloat16(x)
    if source == "bf16":
        return from_bfloat16(x)
    if to == "tf32":
        return tf32(x)
    dtype = TYPES[to]
    if x.dtype.kind == "f" and issubclass(dtype, np.integer):
        ends = np.iinfo(dtype)
        rounded = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(flags[0], np.rint)(x)
        return np.clip(rounded.astype(np.float64), ends.min, ends.max).astype(dtype)
    return x.astype(dtype)


Operation = Callable[..., Array]


def operation(name: str) -> tuple[Operation, list[str]] | None:
    """(function, the operands' types) of an instruction; None if it is none of these."""
    base, *flags = name.split(".")
    kind = flags[-1] if flags else ""
    if base == "cvt":
        flags = [f for f in flags if f not in ("satfinite", "relu", "ftz", "sat")]
        to, source = flags[-2:]
        typed = {"bf16": "b16", "bf16x2": "b32", "tf32": "f32"}
        sources = [typed.get(source, source)] * (2 if to == "bf16x2" else 1)
        rest = flags[:-2]

        def convert(*values: Array) -> Array:
            return _convert(to, source, rest, list(values))

        return convert, sources
    if kind in ("bf16", "bf16x2"):
        return _in_bfloat16(base, kind)
    if kind not in TYPES:
        return None
    if base in SIMPLE:
        return SIMPLE[base], [kind] * (1 if base in ONE_OPERAND else 2)
    if base == "fma" or (base == "mad" and kind[0] == "f"):
        return _fused, [kind] * 3
    if base in ("mul", "mad"):
        return _product(base, flags, kind)
    if base == "setp":
        return (lambda a, b: _compare(flags, a, b)), [kind, kind]
    if base == "selp":
        return _select, [kind, kind, "pred"]
    if base in ("shl", "shr"):
        return (lambda a, by: _shift(a, by, base == "shl")), [kind, "u32"]
    if base == "cvta":  # shared and global addresses are those of all memory
        return (lambda a: a), [kind]
    if base == "bfi":
        return _insert, [kind, kind, "u32", "u32"]
    if base == "bfe":
        return _extract, [kind, "u32", "u32"]
    if base == "prmt":
        return _permute, ["b32"] * 3
    return None


def _in_bfloat16(base: str, kind: str) -> tuple[Operation, list[str]] | None:
    """Arithmetic on bfloat16, or on pairs of them: in float32, then rounded."""
    functions: dict[str, Operation] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative,
        "fma": _fused, "min": np.fmin, "max": np.fmax,
    }  # fmt: skip
    if base not in functions:
        return None
    held = "b16" if kind == "bf16" else "b32"

    def compute(*values: Array) -> Array:
        parts = np.broadcast_arrays(*(np.atleast_1d(z) for z in values))
        wide = [from_bfloat16(np.ascontiguousarray(z).view(np.uint16)) for z in parts]
        return bfloat16(functions[base](*wide)).view(TYPES[held])

    return compute, [held] * {"neg": 1, "fma": 3}.get(base, 2)


def _product(base: str, flags: list[str], kind: str) -> tuple[Operation, list[str]]:
    """mul and mad of integers (lo, hi, wide), mul of floats."""
    if kind[0] == "f":
        return np.multiply, [kind, kind]
    wide, high = "wide" in flags, "hi" in flags

    def multiply(a: Array, b: Array, *c: Array) -> Array:
        if wide or high:
            product: Array = a.astype(TYPES[WIDER[kind]]) * b.astype(TYPES[WIDER[kind]])
            if high:
                product = (product >> product.dtype.type(8 * a.itemsize)).astype(a.dtype)
        else:
            product = a * b
        return product + c[0] if c else product

    added = [WIDER[kind] if wide else kind] if base == "mad" else []
    return multiply, [kind, kind, *added]
