"""What a terminal may do to a command and its output, for all command lines."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from data_pipeline.redaction import redact

OURS = {"data_pipeline", "hope", "launch", "tools", "train"}
_SHOW = {"warnings", "_py_warnings"}  # from Python 3.14 on the latter


def end_at_once(number: int, _: FrameType | None) -> None:
    """A handler of Ctrl-C while a command still imports its libraries, which takes seconds: as an
    exception it would be a traceback, an abort of a library in C++, or swallowed by one."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def until_it_runs() -> None:
    """Let Ctrl-C end this process in one line, status 130, from here until `as_command`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as after nohup
        signal.signal(signal.SIGINT, end_at_once)


def _ours_warn() -> bool:
    """Whether it is code of ours whose warning is being shown, called from what shows it: the file
    that Python puts it down to is another one, as far up as `stacklevel` says."""
    frame: FrameType | None = sys._getframe(1)
    for shows in (False, True):
        while frame is not None and (frame.f_globals.get("__name__") in _SHOW) is shows:
            frame = frame.f_back
    spec = None if frame is None else frame.f_globals.get("__spec__")  # __main__ has its name here
    return spec is not None and spec.name.partition(".")[0] in OURS


def warn_in_lines() -> None:
    """From now on a warning that code of ours gives is shown as `warning: TEXT`, which is for who
    runs the command; others with their file and line, as Python does. None has a secret."""
    write = warnings.formatwarning
    if getattr(write, "in_lines", False):
        return

    def shown(message: Warning | str, *told: Any, **more: Any) -> str:
        if _ours_warn():
            return redact(f"warning: {' '.join(str(message).split())}\n")
        return redact(write(message, *told, **more))

    shown.in_lines = True  # type: ignore[attr-defined]
    warnings.formatwarning = shown


def as_command(main: Callable[[], int]) -> int:
    """Run `main`; returns its exit status, or 141 in place of 0 when nobody reads the output, and
    130 on a Ctrl-C that it lets through. Warnings of ours are lines (`warn_in_lines`).

    Characters that the output's encoding lacks are shown escaped. A closed standard stream goes
    to the null device, so that no file of ours gets its number and what others write to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the rest of the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warn_in_lines()
    status = 0
    try:
        try:
            if signal.getsignal(signal.SIGINT) is end_at_once:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            status = main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as in `inspect DIR | head`; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return status or 128 + signal.SIGPIPE
    return status
