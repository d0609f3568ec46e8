"""What PTX's statements do to a group of programs: memory, threads of a warp, matrix products;
arithmetic is in `tools.ptx.arithmetic`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx import matrices
from tools.ptx.arithmetic import TYPES, from_bfloat16, operation
from tools.ptx.group import WARP, Copy, Group, ProgramError, listed
from tools.ptx.memory import AccessError, Array
from tools.ptx.parsing import Instruction

MEETING = "barrier.cluster.wait"
"""Where the machine stops whole programs until all have come."""
Step = Callable[[Group], "str | None"]
WITHOUT_EFFECT = (
    "fence", "wgmma.fence", "wgmma.commit_group", "bar.warp.sync", "barrier.cluster.arrive",
)  # fmt: skip
"""Here, where a warp's threads are never apart and every product is waited for."""


def words_of(instruction: Instruction) -> tuple[str, list[str]]:
    """The instruction's first word and its modifiers, without hints for caches."""
    base, *flags = instruction.name.replace("::cta", "").split(".")
    return base, [f for f in flags if not f.startswith(("L1", "L2"))]


def step(instruction: Instruction) -> Step:
    """What a statement does to a group; it returns a label where it jumps."""
    base, flags = words_of(instruction)
    name, operands = instruction.name, instruction.operands

    def active(group: Group) -> Array | None:
        if not instruction.predicate:
            return group.mask
        taken = group.value(instruction.predicate, "pred") != instruction.negated
        return taken if group.mask is None else taken & group.mask

    if base == "bra":
        return lambda group: operands[0]
    if base == "ret":
        return lambda group: ""
    if name.startswith("fence.proxy.async"):
        return lambda group: group.publish()
    if name.startswith("cp.async.commit_group"):
        return lambda group: group.copies.append([])
    if name.startswith(WITHOUT_EFFECT):
        return lambda group: None
    if name.startswith(MEETING):  # by a part of a program, which is an error
        return lambda group: group.barrier()
    if base in ("bar", "barrier"):
        if operands[1:]:
            raise NotImplementedError("a barrier of a part of the program")
        return lambda group: group.barrier()
    if base == "shfl":
        return lambda group: _shuffle(group, flags, operands, active(group))
    if base == "red":
        return _add(flags, operands, active)
    if base in ("ld", "st") and flags[0] in ("global", "shared", "param"):
        return _move(base, flags, operands, active)
    if name.startswith("cp.async.wait_all"):
        return _wait_for_all
    if name.startswith("cp.async.wait"):
        count = int(operands[0]) if operands else 0
        return lambda group: _wait(group, count)
    if name.startswith("cp.async.c"):
        return lambda group: _copy(group, operands, active(group))
    if base in ("ldmatrix", "stmatrix"):
        return lambda group: _matrices(group, base, flags, operands)
    if base == "mma":
        return lambda group: _product(group, flags, operands)
    if name.startswith("wgmma.mma_async"):
        return lambda group: _group_product(group, flags, operands)
    if name.startswith("wgmma.wait_group"):
        if operands != ("0",):
            raise NotImplementedError("wgmma.wait_group for some of the products")
        return lambda group: group.pending.clear()
    if base == "mov" and any(o.startswith("{") for o in operands):
        return lambda group: _pack(group, flags[-1], operands, active(group))
    found = operation(name)
    if found is None:
        raise NotImplementedError(f"{instruction.where()}: the machine does not have it")
    function, kinds = found

    def run(group: Group) -> None:
        values = [group.value(o, k) for o, k in zip(operands[1:], kinds, strict=True)]
        group.assign(operands[0], np.asarray(function(*values)), active(group))

    return run


def _shuffle(
    group: Group, flags: list[str], operands: tuple[str, ...], active: Array | None
) -> None:
    """shfl.sync among whole warps."""
    if (group.every(operands[3], "u32")[group.lanes(active)] != 31).any():
        raise NotImplementedError("shfl within parts of a warp")
    a = group.every(operands[1], "b32").reshape(-1, WARP)
    b = group.every(operands[2], "u32").reshape(-1, WARP)
    lane = np.arange(WARP)[None, :]
    source = {"bfly": lane ^ b, "idx": b & 31, "up": lane - b, "down": lane + b}[flags[1]]
    source = np.where((source < 0) | (source > 31), lane, source).astype(np.int64)
    target = operands[0].partition("|")[0]  # behind it: whether the source was in range
    group.assign(target, np.take_along_axis(a, source, 1).reshape(-1), active)


def _pack(group: Group, kind: str, operands: tuple[str, ...], active: Array | None) -> None:
    """mov between a register and its parts."""
    target, source = operands
    wide = 8 * TYPES[kind](0).itemsize
    parts = listed(target if target.startswith("{") else source)
    narrow = f"b{wide // len(parts)}"
    if target.startswith("{"):
        split: Array = group.every(source, kind).view(TYPES[narrow]).reshape(-1, len(parts))
        for i, part in enumerate(parts):
            group.assign(part, split[:, i], active)
    else:
        values = [group.every(part, narrow) for part in parts]
        group.assign(target, np.stack(values, 1).view(TYPES[kind])[:, 0], active)


def _move(
    base: str,
    flags: list[str],
    operands: tuple[str, ...],
    active: Callable[[Group], Array | None],
) -> Step:
    """ld and st."""
    space = flags[0]
    vector = next((int(f[1:]) for f in flags if f in ("v2", "v4", "v8")), 1)
    kind = flags[-1]
    halfwords = max(vector * TYPES[kind](0).itemsize // 2, 1)
    if kind.endswith("8") and (base, space, vector, kind[0] in "bu") != ("ld", "global", 1, True):
        raise NotImplementedError(f"{base}.{'.'.join(flags)}")
    names = listed(operands[0 if base == "ld" else 1])

    def load(group: Group) -> None:
        mask = active(group)
        if space == "param":
            for name, value in zip(names, group.parameter(operands[1], kind, vector), strict=True):
                if name.startswith("%rd"):  # a narrower parameter is extended
                    value = value.astype(TYPES["s64" if kind[0] == "s" else "u64"])
                group.assign(name, value, mask)
            return
        lanes = group.lanes(mask)
        words = np.zeros((group.slot.size, halfwords), np.uint16)
        if lanes.size:
            if space == "global":
                where = group.address(operands[1], "u64")[lanes]
                if kind.endswith("8"):
                    words[lanes] = _byte(group, where, lanes)
                else:
                    words[lanes] = group.memory.read(where, halfwords, group.access(lanes))
            else:
                where = group.address(operands[1], "u32")[lanes]
                index = group.shared.index(where, halfwords, group.slot[lanes])
                words[lanes] = group.shared.read(index, group.access(lanes))
        if kind.endswith("8"):
            group.assign(names[0], words[:, 0], mask)
            return
        for i, value in enumerate(words.view(TYPES[kind]).T):
            group.assign(names[i], np.ascontiguousarray(value), mask)

    def store(group: Group) -> None:
        lanes = group.lanes(active(group))
        if not lanes.size:
            return
        values = [group.every(name, kind) for name in names]
        words = np.stack(values, 1).view(np.uint16)[lanes]
        if space == "global":
            group.memory.write(group.address(operands[0], "u64")[lanes], words, group.access(lanes))
        else:
            where = group.address(operands[0], "u32")[lanes]
            index = group.shared.index(where, halfwords, group.slot[lanes])
            _untouched(group, index)
            group.shared.write(index, words, group.access(lanes))

    return load if base == "ld" else store


def _add(
    flags: list[str], operands: tuple[str, ...], active: Callable[[Group], Array | None]
) -> Step:
    """red.global.add.f32 of words that no other warp touches: the order of several is not decided
    here."""
    if flags[:2] != ["global", "add"] or flags[-1] != "f32":
        raise NotImplementedError(f"red.{'.'.join(flags)}")
    names = listed(operands[1])

    def add(group: Group) -> None:
        lanes = group.lanes(active(group))
        if not lanes.size:
            return
        where, access = group.address(operands[0], "u64")[lanes], group.access(lanes)
        values = np.stack([group.every(name, "f32") for name in names], 1)[lanes]
        there = group.memory.read(where, 2 * len(names), access).view(np.float32)
        group.memory.write(where, (there + values).view(np.uint16), access)

    return add


def _byte(group: Group, where: Array, lanes: Array) -> Array:
    """The bytes at addresses [lanes] of global memory, each as a word [lanes, 1]."""
    odd = (where % np.uint64(2)).astype(np.uint16)
    words = group.memory.read(where - odd, 1, group.access(lanes))
    return (words >> (np.uint16(8) * odd[:, None])) & np.uint16(0xFF)


def _untouched(group: Group, index: Array) -> None:
    """Whether a write leaves alone what a wgmma under way is reading."""
    if any(np.isin(index, reading).any() for reading in group.pending):
        raise AccessError("write over what a wgmma is reading")


def _copy(group: Group, operands: tuple[str, ...], active: Array | None) -> None:
    """cp.async begins: what it brings is unreadable until it is waited for."""
    lanes = group.lanes(active)
    if not lanes.size:
        return
    size = int(operands[2], 0)
    target = group.address(operands[0], "u32")[lanes]
    source = group.address(operands[1], "u64")[lanes]
    given = np.full(lanes.size, size)
    if len(operands) > 3:
        given = group.every(operands[3], "u32")[lanes]
    if not np.isin(given, (0, size)).all():
        raise NotImplementedError("cp.async of a part of what it copies")
    copy = Copy(lanes, target, source, given > 0, np.zeros((lanes.size, size // 2), np.uint16))
    index = copy.index(group)
    _untouched(group, index)
    group.shared.expect(index, group.access(lanes))
    copy.words = _fetched(group, copy)
    group.copies[-1].append(copy)


def _fetched(group: Group, copy: Copy) -> Array:
    """What a copy finds at its source now [lanes, count]."""
    words = np.zeros_like(copy.words)
    some = copy.filled
    if some.any():
        access = group.access(copy.lanes[some])
        words[some] = group.memory.read(copy.source[some], words.shape[1], access)
    return words


def _wait(group: Group, count: int) -> None:
    """The copies of all groups but the last `count` arrive. A source that has changed since they
    began is an error, since a device may read it at either time."""
    *closed, is_open = group.copies
    ended = len(closed) - count
    for copy in (c for copies in closed[: max(ended, 0)] for c in copies):
        if (_fetched(group, copy) != copy.words).any():
            raise AccessError("the source of an asynchronous copy changed while it ran")
        group.shared.arrive(copy.index(group), copy.words, group.access(copy.lanes))
    group.copies = [*closed[max(ended, 0) :], is_open]


def _wait_for_all(group: Group) -> None:
    """All copies arrive, also those of no group yet."""
    group.copies.append([])
    _wait(group, 0)


def _matrices(group: Group, base: str, flags: list[str], operands: tuple[str, ...]) -> None:
    """ldmatrix and stmatrix: one to four 8 x 8 matrices of halfwords a warp."""
    count = int(next(f for f in flags if f in ("x1", "x2", "x4"))[1:])
    transposed = "trans" in flags
    where = group.address(operands[base == "ldmatrix"], "u32")
    names = listed(operands[base != "ldmatrix"])
    threads = group.whole_warps()
    lanes = threads.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
    index = group.shared.index(where[lanes], 8, group.slot[lanes])
    if base == "ldmatrix":
        rows = group.shared.read(index, group.access(lanes)).reshape(-1, count, 8, 8)
        for i, name in enumerate(names):
            found = np.zeros(group.slot.size, np.uint32)
            found[threads] = matrices.from_matrix(rows[:, i], transposed)
            group.assign(name, found, group.mask)
    else:
        if group.mask is not None:
            raise ProgramError("stmatrix of some warps")
        parts = [matrices.to_matrix(group.every(name, "b32"), transposed) for name in names]
        _untouched(group, index)
        group.shared.write(index, np.stack(parts, 1).reshape(-1, 8), group.access(lanes))


def _product(group: Group, flags: list[str], operands: tuple[str, ...]) -> None:
    """mma.sync: D = A B + C of a warp."""
    shape = next(f for f in flags if f.startswith("m16"))
    if shape not in ("m16n8k16", "m16n8k8") or flags[-3] not in ("bf16", "tf32"):
        raise NotImplementedError(f"mma of {shape} in {flags[-3]}")
    bf16 = flags[-3] == "bf16"
    d, a, b, c = (listed(o) for o in operands)
    left = matrices.left_fragment([group.every(r, "b32") for r in a], bf16)
    right = matrices.right_fragment([group.every(r, "b32") for r in b], bf16)
    total = left @ right + matrices.sums([group.every(r, "b32") for r in c], 8)
    group.whole_warps()
    for name, value in zip(d, matrices.scatter_sums(total), strict=True):
        group.assign(name, value, group.mask)


def _group_product(group: Group, flags: list[str], operands: tuple[str, ...]) -> None:
    """wgmma.mma_async: D = A B (+ D) of four warps, B (and A, where it is no registers) in shared
    memory."""
    shape = next(f for f in flags if f.startswith("m64"))
    columns = int(shape[4 : shape.index("k")])
    if flags[-1] not in ("bf16", "tf32"):
        raise NotImplementedError(f"wgmma in {flags[-1]}")
    bf16 = flags[-1] == "bf16"
    d, a = listed(operands[0]), operands[1]
    added = group.every(operands[3], "pred").reshape(-1, WARP)[:, 0]
    signs = [int(o) for o in operands[4:6]]
    turns = [int(o) for o in operands[6:]]
    if signs != [1, 1]:
        raise NotImplementedError("wgmma with a sign")
    if a.startswith("{"):
        left = matrices.left_fragment([group.every(r, "b32") for r in listed(a)], bf16)
        left = left.reshape(-1, 64, left.shape[-1])
    else:
        left = _operand(group, a, 64, bf16, turns)
    right = _operand(group, operands[2], columns, bf16, turns).swapaxes(1, 2)
    total = (left @ right).reshape(-1, 16, columns)
    if added.any():
        before = matrices.sums([group.every(r, "b32") for r in d], columns)
        total = np.where(added[:, None, None], total + before, total)
    for name, value in zip(d, matrices.scatter_sums(total), strict=True):
        group.assign(name, value, None)


def _operand(group: Group, register: str, rows: int, bf16: bool, turns: list[int]) -> Array:
    """An operand of wgmma in shared memory: float32 [warpgroups, rows, 16 (8 in TF32)]. turns:
    which of bfloat16's operands are transposed, those of this one and later ones."""
    descriptors = group.value(register, "u64").reshape(-1, 4 * WARP)
    if (descriptors != descriptors[:, :1]).any():
        raise ProgramError("a warpgroup has several matrix descriptors")
    size, turned = 2 if bf16 else 4, bool(turns.pop(0)) if bf16 else False
    lanes = np.arange(0, group.slot.size, WARP)
    found = []
    for first, descriptor in zip(lanes[::4], descriptors[:, 0], strict=True):
        where = matrices.described(int(descriptor), rows, size, turned).reshape(-1)
        index = group.shared.index(where, size // 2, np.full(where.size, group.slot[first]))
        for warp in lanes[first // WARP :][:4]:
            words = group.shared.read(
                index, group.access(np.full(where.size, warp)), by_tensor_cores=True
            )
        group.pending.append(np.unique(index))
        z = from_bfloat16(words) if bf16 else matrices.cut(words.view(np.uint32))
        found.append(z.reshape(rows, -1))
    return np.stack(found)
