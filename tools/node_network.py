"""Machines that aren't there: network namespaces, or loopback where those can't be made.

Each node of `Namespaces` has its own network stack, address and host name, and reaches the others
through a virtual switch that nothing else is connected to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


class Node:
    """One machine. address: IPv4; interface: the one that has it."""

    def __init__(self, number: int, address: str, interface: str, prefix: list[str]) -> None:
        self.number, self.address, self.interface = number, address, interface
        self._prefix = prefix
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, command: list[str], environment: dict[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Run a command on the node; what it prints is added to `log`."""
        with log.open("a") as output:
            process = subprocess.Popen(
                [*self._prefix, *command], env=environment, stdout=output, stderr=output
            )
        self._started.append(process)
        return process

    def kill(self) -> None:
        """SIGKILL to everything that was started on the node, as if its power had gone."""
        for process in self._started:
            pids = [process.pid, *descendants(process.pid)]
            kill_all(pids)
            process.wait()
        self._started.clear()


class NamespaceNode(Node):
    """A node in a network namespace, which knows its processes whoever started them."""

    def __init__(self, number: int, name: str) -> None:
        hostname = f'hostname worker-{number}; exec "$@"'
        prefix = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", hostname, "sh"]
        super().__init__(number, f"10.77.0.{number + 1}", "eth0", prefix)
        self.name = name

    def kill(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            listed = subprocess.run(
                ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
            )
            if not listed.stdout.split():
                break
            kill_all([int(pid) for pid in listed.stdout.split()])
            time.sleep(0.05)
        super().kill()


def why_no_namespaces() -> str | None:
    """Why network namespaces can't be made here; None where they can."""
    name = f"hope{os.getpid()}try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        _ip("netns", "del", name)
    except FileNotFoundError:
        return "there is no `ip` (package iproute2)"
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        return " ".join(error.stderr.split())
    return None


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Node]]:
    """So many nodes at 10.77.0.1, 10.77.0.2, ... on one switch; all gone at the end."""
    switch = f"hope{os.getpid()}switch"
    nodes = [NamespaceNode(number, f"hope{os.getpid()}n{number}") for number in range(count)]
    made: list[str] = []
    try:
        for name in (switch, *(node.name for node in nodes)):
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for node in nodes:
            port = f"port{node.number}"
            veth = ("eth0", "netns", node.name, "type", "veth", "peer", "name", port)
            _ip("link", "add", *veth, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", "eth0")
            _ip("-n", node.name, "link", "set", "eth0", "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield list(nodes)
    finally:
        for node in nodes:
            if node.name in made:
                node.kill()
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextlib.contextmanager
def loopback(count: int) -> Iterator[list[Node]]:
    """So many nodes that share this machine's loopback interface."""
    nodes = [Node(number, "127.0.0.1", "lo", []) for number in range(count)]
    try:
        yield nodes
    finally:
        for node in nodes:
            node.kill()


@contextlib.contextmanager
def ssh_server(folder: Path, addresses: list[str], port: int) -> Iterator[tuple[int, str]]:
    """An sshd of our own on loopback addresses, for a key of its own made in `folder`; yields its
    process id and the options with which ssh reaches it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in ("host_key", "key"):
        (folder / name).unlink(missing_ok=True)
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(make, check=True)
    lines = [
        f"Port {port}",
        *(f"ListenAddress {address}" for address in addresses),
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'key.pub'}",
        "PasswordAuthentication no",
        "StrictModes no",
        "PidFile none",
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "sshd.log").open("w") as log:
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
        process = subprocess.Popen(command, stderr=log)
    options = (
        f"-i {folder / 'key'} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no "
        "-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    )
    try:
        probe = ["ssh", *options.split(), "-p", str(port), addresses[0], "true"]
        deadline = time.monotonic() + 20
        while subprocess.run(probe, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"no sshd: {(folder / 'sshd.log').read_text()}")
            time.sleep(0.2)
        yield process.pid, options
    finally:
        kill_all([process.pid, *descendants(process.pid)])
        process.wait()


def descendants(pid: int) -> list[int]:
    """Process ids of the children of a process, their children, and so on."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def command_line(pid: int) -> list[str]:
    """The arguments of a process; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def kill_all(pids: list[int]) -> None:
    """SIGKILL to each of these processes that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
