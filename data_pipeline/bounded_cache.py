"""A bounded dictionary that several threads may use."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """Keeps the last `size` values put in; an older one is dropped for each new one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: dict[K, V] = {}
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        return self._values.get(key)

    def drop(self, key: K) -> None:
        with self._lock:
            self._values.pop(key, None)

    def put(self, key: K, value: V) -> None:
        values = self._values
        with self._lock:
            values[key] = value
            while len(values) > self.size:
                del values[next(iter(values))]
