"""One key-value store over several attempts at a job: what ranks of this one write must not be
taken for what those of an earlier one left.

torchrun's agents keep their store over restarts, and with it the addresses of ranks that died.
Their own count of restarts tells attempts apart on one machine only: an agent whose ranks failed
counts one more, one that starts them again because another node came back does not.
"""

from __future__ import annotations

import time
import uuid

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_PAUSE = 0.02


def of_this_attempt(store: Store, rank: int, size: int) -> Store:
    """The part of `store` that the `size` ranks which call this together have for themselves.

    The first rank draws a name and tells it every rank that shows itself, until each has said that
    it knows. A rank that is gone left what it was called in its last attempt, and never says that.
    Raises RuntimeError, with the missing ranks, when one does not come within the store's timeout.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"rank {rank} is", own)
        name = store.get(f"{own} is in").decode()
        store.set(f"{own} knows {name}", "")
        return PrefixStore(name, store)
    seconds = store.timeout.total_seconds()  # type: ignore[attr-defined]
    deadline = time.monotonic() + seconds
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if not store.check([f"rank {other} is"]):
                continue
            called = store.get(f"rank {other} is").decode()
            store.set(f"{called} is in", own)
            if store.check([f"{called} knows {own}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise RuntimeError(f"of {size} ranks these did not come: {ranks}")
        time.sleep(_PAUSE if missing else 0)
    return PrefixStore(own, store)
