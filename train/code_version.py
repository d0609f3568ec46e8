"""Which code a checkpoint was written by."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[1]


@cache
def code_version() -> dict[str, str]:
    """Commit of this code ("+" behind it where files differ from it), torch and Python.

    The commit is "unknown" where this is no git checkout, or git is missing.
    """
    return {
        "commit": _commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _commit() -> str:
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        found = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
