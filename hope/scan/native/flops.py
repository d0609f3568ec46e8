"""Multiply-adds of the C++ scan, product by product, as `hope.flops` asks for them.

Rows and columns of a product are padded (`vectors.h`), its inner length is not: for heads and
memories whose widths are multiples of 16 and whole blocks nothing is padded.
"""

from __future__ import annotations

from hope.scan.contract import ScanConfig
from hope.scan.operators import KEEP_TOKENS
from hope.scan.writes import W1_DELTA, W2_DELTA

_PAD = _TOKENS = 16


def blocks(config: ScanConfig, tokens: int) -> int:
    """Blocks of a projection chunk of that many tokens."""
    starts = range(0, tokens, config.memory_chunk)
    lengths = (min(config.memory_chunk, tokens - start) for start in starts)
    return sum(-(-length // _TOKENS) for length in lengths)


class Products:
    """Multiply-adds of one block by what they are for: `forward` and `backward`."""

    def __init__(self, config: ScanConfig, width: int, hidden: int, memories: int) -> None:
        d, h, t, m = width, hidden, _TOKENS, memories
        D, H = (-(-size // _PAD) * _PAD for size in (d, h))
        rule, base = config.delta_rule, config.decay_to == "initial"
        target, delta1, delta2 = rule == "target", rule in W1_DELTA, rule in W2_DELTA
        up, down, outer = H * t * d, D * t * h, D * H * t  # W2 z, W1 act, a sum over tokens
        units = 3 if memories == 6 else 2  # k, v, q
        of_d, of_h = t * t * d, t * t * h  # tokens with tokens
        to_d, to_h = D * t * t, H * t * t
        causal = config.read == "causal"
        read = up + down
        if causal:
            read += base * (up + down) + of_h + to_d + (not target) * (of_d + to_h)
        self.forward = {
            "project": units * (up + down) + 2 * up,
            "frame": delta2 * of_d,
            "frozen terms": m * (2 * up + down + (not target) * up),
            "W1's system and U": m * (delta1 * (down + base * down + of_h) + to_d + outer),
            "W2's U": (not target) * m * (delta2 * (up + base * up) + to_h + outer),
            "read": read,
        }
        back_read = up + down + 2 * outer
        if causal:
            back_read += of_d + 2 * to_h + to_d + base * (up + down + 2 * outer)
            back_read += (not target) * (of_h + 2 * to_d + to_h)
        frozen = outer + up if target else down + 2 * outer + up
        self.backward = {
            "read": back_read,
            "W1": m * (down + to_d + of_d + up + delta1 * (up + to_h + outer)),
            "W2": (not target) * m * (up + to_h + of_h + down + delta2 * (down + outer)),
            "M_0": base * m * (delta1 * (outer + up) + delta2 * (outer + down)),
            "frozen terms": m * (frozen + 2 * outer + 2 * down),
            "frame": delta2 * to_d,
            "project": units * (up + down + 2 * outer) + 2 * (outer + down),
        }


def call_products(
    config: ScanConfig, width: int, hidden: int, memories: int, tokens: int
) -> tuple[int, int, int]:
    """Multiply-adds of a call on one row and head: forward, backward, and what backward runs
    again of forward."""
    size, segment = config.projection_chunk, config.segment_chunks
    products = Products(config, width, hidden, memories)
    once, back = (sum(part.values()) for part in (products.forward, products.backward))
    keep = min(segment, -(-tokens // size)) == 1 or segment * size <= KEEP_TOKENS
    starts = range(0, tokens, size)
    counts = [blocks(config, min(size, tokens - start)) for start in starts]
    again = 0
    for number, count in enumerate(counts):
        last = number % segment == segment - 1 or number == len(counts) - 1
        again += count if keep or last else 2 * count
    return once * sum(counts), back * sum(counts), once * again
