"""Jobs in parallel processes, which never outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Any, TypeVar

from data_pipeline.errors import DataError

_WATCH_SECONDS = 0.5
Job = TypeVar("Job")
Result = TypeVar("Result")
_work: Callable[[Any], Any]


def _start(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _work = work

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _call(job: Any) -> Any:
    return _work(job)


class _Signals:
    """In a `with`, SIGINT and SIGTERM wait until `deliver`, which the handlers of before then get.

    A handler that raises does so between any two steps of Python. In a pool's own code it would
    leave a lock taken for ever, and the pool's thread waiting for it. `wake` is called by a signal.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake, self._came = wake, list[int]()
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._usual[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._came.append(number)
        self._wake()

    def deliver(self) -> None:
        if self._came:
            try:
                self.__exit__()
            finally:
                self.__enter__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        came, self._came = self._came, []
        for number in came:
            signal.raise_signal(number)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes started here never get SIGINT.

    Ctrl-C goes to the whole terminal, and a process that is still importing would end with a
    traceback.
    """
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def each(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, what: str
) -> Iterator[tuple[int, Result]]:
    """(number of the job, work(job)) of each of `jobs`, as they get done.

    With one worker, in this process and in order. With more, `work` goes once to each process, so
    it and the jobs have to be picklable. What a job raises is raised here, after the processes were
    stopped; DataError, naming `what`, where a process was killed. What a signal's handler raises is
    raised here too, as soon as the next job is waited for.
    """
    if workers == 1 or len(jobs) <= 1:
        for number, job in enumerate(jobs):
            yield number, work(job)
        return
    done: SimpleQueue[Future[Result] | None] = SimpleQueue()
    with _Signals(partial(done.put, None)) as signals:
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)),
            multiprocessing.get_context("spawn"),
            _start,
            (work, os.getpid()),
        )
        futures = {}
        try:
            with _without_ctrl_c():
                for number, job in enumerate(jobs):
                    future = pool.submit(_call, job)
                    futures[future] = number
                    future.add_done_callback(done.put)
            while futures:
                finished = done.get()
                signals.deliver()
                if finished is not None:
                    yield futures.pop(finished), finished.result()
        except BrokenProcessPool:
            raise DataError(
                f"{what}: a worker process was killed (out of memory?); "
                "run the same command again, finished shards are kept"
            ) from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
