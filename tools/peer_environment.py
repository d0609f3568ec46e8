"""Virtual environments for what a benchmark is compared with, apart from the project's own."""

from __future__ import annotations

import hashlib
import site
import subprocess
import sys
from pathlib import Path

import torch


class PeerError(Exception):
    """A peer could not be installed or run; one line says why."""


def prepare(environment: Path, requirements: Path) -> Path:
    """The Python of an environment with the packages of the file `requirements`, made if absent.

    It sees this interpreter's packages through a .pth file, so torch is the running one. Raises
    PeerError when the environment or its packages can't be had, for instance without a network.
    """
    shared = _shared_packages()
    wanted = "\n".join([requirements.read_text(), sys.executable, sys.version, *shared])
    stamp, expected = environment / "peers.sha256", hashlib.sha256(wanted.encode()).hexdigest()
    python = environment.absolute() / "bin" / "python"
    if stamp.exists() and stamp.read_text() == expected:
        return python
    print(f"installing the peers in {environment}", flush=True)
    _call(sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment))
    # Before torch can be seen from there, or pip would mix up the two places.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    _call(*pip, "install", "--quiet", "--no-deps", "--requirement", str(requirements))
    purelib = _call(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(purelib.strip()) / "running_environment.pth").write_text("\n".join(shared) + "\n")
    stamp.write_text(expected)
    return python


def _shared_packages() -> list[str]:
    """The folders in which this interpreter finds torch and its other packages."""
    known = {*site.getsitepackages(), site.getusersitepackages()}
    found = [path for path in sys.path if path in known]
    return list(dict.fromkeys([str(Path(torch.__file__).parent.parent), *found]))


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        reasons = [line for line in lines if line.startswith("ERROR")] or lines
        raise PeerError(f"can't install the peers: {reasons[-1].removeprefix('ERROR: ')}")
    return done.stdout
