"""Jobs in parallel processes, which never outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
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


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait, and processes started here never get SIGINT.

    Ctrl-C goes to the whole terminal, and a process that is still importing would end with a
    traceback; so would one that its parent was interrupted in starting.
    """
    came: list[int] = []
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda came_now, _: came.append(came_now))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        if came:
            signal.raise_signal(came[0])


def each(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, what: str
) -> Iterator[tuple[int, Result]]:
    """(number of the job, work(job)) of each of `jobs`, as they get done.

    With one worker, in this process and in order. With more, `work` goes once to each process, so
    it and the jobs have to be picklable. What a job raises is raised here, after the processes were
    stopped; DataError, naming `what`, where a process was killed.
    """
    if workers == 1 or len(jobs) <= 1:
        for number, job in enumerate(jobs):
            yield number, work(job)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        multiprocessing.get_context("spawn"),
        _start,
        (work, os.getpid()),
    )
    try:
        with _uninterrupted():
            futures = {pool.submit(_call, job): number for number, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
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
