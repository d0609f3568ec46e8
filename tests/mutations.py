"""Small damage to bytes and to plain data, drawn from a generator."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any


def mutations(content: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """Flipped, cut, doubled, moved and replaced bytes; JSON with values changed in kind."""
    words = [b"-1", b"1e99", b"null", b'"../x"', b"[]", b"{}", b"true", b"99999999999999999999"]
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(len(changed)) if changed else 0
            end = min(len(changed), at + rng.randint(1, 20))
            match rng.randrange(6):
                case 0 if changed:
                    changed[at] ^= 1 << rng.randrange(8)
                case 1:
                    del changed[at:end]
                case 2:
                    changed[at:at] = changed[at:end]
                case 3:
                    del changed[at:]
                case 4:
                    changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
                case _:
                    numbers = [i for i in range(at, len(changed)) if chr(changed[i]).isdigit()]
                    if numbers:
                        first = numbers[0]
                        last = first
                        while last < len(changed) and chr(changed[last]).isdigit():
                            last += 1
                        changed[first:last] = rng.choice(words)
        yield bytes(changed)


STRANGE: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf")),
    *("", "x", "../x", "/", "\x00", "1", [], [None], {}, {"x": 1}, [[]]),
]


def strange_values(tree: Any, rng: random.Random, count: int) -> Iterator[Any]:
    """Plain data with values replaced, removed, renamed, doubled or exchanged."""
    for _ in range(count):
        changed = copy.deepcopy(tree)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            holders = list(_holders(changed))
            if not holders:
                break
            holder = rng.choice(holders)
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key, other = rng.choice(keys), rng.choice(keys)
            match rng.randrange(6):
                case 0:
                    del holder[key]
                case 1:
                    holder[key], holder[other] = holder[other], holder[key]
                case 2 if isinstance(holder, dict):
                    holder[f"{key}x"] = holder.pop(key)
                case 2:
                    holder.append(copy.deepcopy(holder[key]))
                case _:
                    holder[key] = copy.deepcopy(rng.choice(STRANGE))
        yield changed


def _holders(tree: Any) -> Iterator[Any]:
    """Every dictionary and list of a tree that holds something."""
    if isinstance(tree, (dict, list)) and tree:
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _holders(value)
