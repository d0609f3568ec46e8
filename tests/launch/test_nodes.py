"""Several nodes for real, one of them killed in the middle: `make nodes`, as tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tools.node_network import namespaces, why_no_namespaces
from tools.nodes import PATIENCE, ROOT, STEPS, Nodes, Trial, main, wait_until


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    return Nodes(tmp_path_factory.mktemp("nodes"))


def assert_undisturbed(trial: Trial) -> None:
    assert trial.step_killed < STEPS
    assert trial.loss_difference == 0
    assert trial.same_parameters


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_the_second_is_replaced_while_the_first_waits(trials: Nodes) -> None:
    trial = trials.torchrun(2, killed=1)
    assert_undisturbed(trial)
    assert trial.survived
    assert trial.network == ("loopback" if why_no_namespaces() else "namespaces")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_nodes_the_one_with_the_rendezvous_dies(trials: Nodes) -> None:
    trial = trials.torchrun(4, killed=0)
    assert_undisturbed(trial)
    assert not trial.survived


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_on_loopback_where_there_are_no_namespaces(trials: Nodes, monkeypatch) -> None:
    monkeypatch.setattr(trials, "why_loopback", "asked for by a test")
    trial = trials.torchrun(2, killed=1)
    assert_undisturbed(trial)
    assert trial.network == "loopback"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()), reason="needs pdsh and sshd"
)
def test_deepspeed_over_ssh_the_second_host_dies(trials: Nodes) -> None:
    assert_undisturbed(trials.deepspeed())


@pytest.mark.slow
@pytest.mark.skipif(why_no_namespaces() is not None, reason="no network namespaces here")
def test_a_node_set_up_differently_is_named_and_nothing_starts(trials: Nodes) -> None:
    """worker-1 has another configuration, and no interface that the others could reach."""
    log, run = trials.folder / "unfit.log", trials.folder / "unfit"
    with namespaces(2) as nodes:
        agents = []
        for node in nodes:
            environment = {
                **trials.environment,
                "NNODES": "2",
                "NODE_RANK": str(node.number),
                "MASTER_ADDR": nodes[0].address,
                "NODE_ADDR": node.address,
                "PREFLIGHT_ARGS": "--timeout 30",
                **({"GLOO_SOCKET_IFNAME": "eth0"} if node.number == 0 else {}),
            }
            command = [str(ROOT / "launch/torchrun.sh"), "1", str(trials.config)]
            command += [f"run_dir={run}", f"seed={node.number}"]
            agents.append(node.start(command, environment, log))
        assert [agent.wait(PATIENCE) for agent in agents] == [2, 2]
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: node")]
    assert any(
        "(worker-1), rank" in line and "set GLOO_SOCKET_IFNAME=eth0" in line for line in errors
    )
    assert any(": config: config " in line for line in errors)
    assert not list(run.iterdir())


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert main(["--folder", str(tmp_path)]) == 2
    assert "is not empty and not from here" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


class BrokenError(Exception):
    """What goes wrong in a test."""


@pytest.mark.skipif(why_no_namespaces() is not None, reason="no network namespaces here")
def test_namespaces_reach_one_another_and_are_gone_afterwards(tmp_path: Path) -> None:
    log, environment = tmp_path / "log", {"PATH": "/usr/bin:/bin"}
    server = (
        "import socket; listening = socket.create_server(('', 7777)); "
        "print(socket.gethostname(), flush=True); print(listening.accept()[1][0])"
    )
    with contextlib.suppress(BrokenError), namespaces(2) as nodes:
        served = nodes[1].start(["python3", "-c", server], environment, log)
        wait_until(lambda: log.exists() and "worker-1" in log.read_text(), "a server", log)
        call = ["bash", "-c", f"exec 3<>/dev/tcp/{nodes[1].address}/7777"]
        assert nodes[0].start(call, environment, log).wait(30) == 0
        assert served.wait(30) == 0
        assert log.read_text() == "worker-1\n10.77.0.1\n"
        left = nodes[0].start(["sleep", "600"], environment, log)
        raise BrokenError
    assert left.wait(10) == -signal.SIGKILL
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert f"hope{os.getpid()}" not in listed.stdout
