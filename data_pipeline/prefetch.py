"""Make the items of a sequence ahead of their consumer, in a background thread."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Prefetcher:
    """Iterator over make(0), make(1), ... that keeps `depth` of them in the making.

    What make(i) raises, next() raises in its place. There is one thread: a frame takes microseconds
    to decode, and a second thread loses more to Python's lock than it gains.
    """

    def __init__(self, make: Callable[[int], Any], depth: int) -> None:
        self._make, self._depth, self._next = make, depth, 0
        self._pool = ThreadPoolExecutor(1, "data_pipeline")
        self._items: deque[Future[Any]] = deque()
        self._finalizer = weakref.finalize(self, self._pool.shutdown, cancel_futures=True)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        while len(self._items) < self._depth:
            self._items.append(self._pool.submit(self._make, self._next))
            self._next += 1
        item = self._items.popleft().result()
        self._items.append(self._pool.submit(self._make, self._next))
        self._next += 1
        return item

    def close(self) -> None:
        """Stop the threads and wait for them."""
        self._finalizer()
