"""torchrun's agent with our exit statuses, restarts and messages; ranks are small scripts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from launch.agent import Agent, main
from train.callbacks.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def agent(folder: Path, body: str, *options: str, ranks: int = 2) -> subprocess.Popen:
    """Start `python -m launch.agent` over a module that appends a line to `log` and runs `body`."""
    (folder / "rank_program.py").write_text(
        "import os, signal, sys, time\n"
        "rank, attempt = os.environ['RANK'], int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        f"with open({str(folder / 'log')!r}, 'a') as log:\n"
        "    log.write(f'{rank} {attempt}\\n')\n"
        f"while len(open({str(folder / 'log')!r}).readlines()) < {ranks} * (attempt + 1):\n"
        "    time.sleep(0.02)\n" + textwrap.dedent(body)
    )
    where = () if "--rdzv-backend" in options else ("--standalone",)
    command = [sys.executable, "-m", "launch.agent", "--no-preflight", *where, *options]
    command += ["--nproc-per-node", str(ranks), "-m", "rank_program"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen, folder: Path) -> tuple[int, str, list[str]]:
    _, errors = process.communicate(timeout=120)
    log = folder / "log"
    return process.returncode, errors, sorted(log.read_text().split("\n")[:-1])


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("final", [75, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_input_and_a_walltime_that_is_over_are_not_tried_again(
    tmp_path: Path, final: int
) -> None:
    body = f"sys.exit({final}) if rank == '1' else time.sleep(60)"
    status, errors, log = finish(agent(tmp_path, body, "--max-restarts", "3"), tmp_path)
    assert (status, log) == (final, ["0 0", "1 0"])
    assert errors == ""


def test_a_rank_that_is_killed_is_started_again_and_named(tmp_path: Path) -> None:
    body = "rank == '0' and attempt == 0 and os.kill(os.getpid(), signal.SIGKILL)"
    status, _, log = finish(agent(tmp_path, body, "--max-restarts", "1"), tmp_path)
    assert (status, log) == (0, ["0 0", "0 1", "1 0", "1 1"])
    (tmp_path / "log").unlink()
    body = "rank == '0' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)"
    status, errors, _ = finish(agent(tmp_path, body, "--max-restarts", "0"), tmp_path)
    assert status == 137
    assert errors.startswith("error: rank 0 on ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_all_processes_at_once_leaves_ranks_time_to_save(
    tmp_path: Path, number: int
) -> None:
    """As Slurm signals a step: ranks are signalled, and once more by their agent."""
    log = str(tmp_path / "log")
    body = f"""
        from train.signals import stop_signals
        with stop_signals() as signals:
            open({str(tmp_path / "pid")!r} + rank, 'w').write(str(os.getpid()))
            while signals.received is None:
                time.sleep(0.02)
            open({str(tmp_path / "asked")!r} + rank, 'w').close()
            time.sleep(3)
            open({log!r}, 'a').write(f'{{rank}} saved\\n')
        sys.exit(143)
    """
    process = agent(tmp_path, body, "--max-restarts", "3")
    pids = [tmp_path / f"pid{rank}" for rank in (0, 1)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pids))
    for path in pids:
        os.kill(int(path.read_text()), number)
    wait_for(lambda: all((tmp_path / f"asked{rank}").exists() for rank in (0, 1)))
    process.send_signal(number)
    status, _, lines = finish(process, tmp_path)
    assert (status, lines) == (128 + number, ["0 0", "0 saved", "1 0", "1 saved"])


def test_sigusr1_to_an_agent_is_the_ranks_own_and_its_status(tmp_path: Path) -> None:
    body = f"""
        from train.signals import stop_signals
        with stop_signals() as signals:
            open({str(tmp_path / "ready")!r} + rank, 'w').close()
            while signals.received is None:
                time.sleep(0.02)
            open({str(tmp_path / "log")!r}, 'a').write(f'{{rank}} got {{int(signals.received)}}\\n')
        sys.exit(75)
    """
    process = agent(tmp_path, body, "--max-restarts", "3")
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)))
    process.send_signal(signal.SIGUSR1)
    status, _, lines = finish(process, tmp_path)
    told = int(signal.SIGUSR1)
    assert (status, lines) == (75, ["0 0", f"0 got {told}", "1 0", f"1 got {told}"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_before_there_are_ranks_starts_none(
    tmp_path: Path, number: int, status: int
) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "launch.agent", "--standalone"]
    command += ["-m", "train", str(tmp_path / "config.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.split()[-1] == "argparse" for line in process.stderr)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert not {"error", "traceback"} & set(errors.lower().split())


def test_a_python_without_torch_is_one_line() -> None:
    """What the scripts take where the environment is not active."""
    command = [sys.executable, "-S", "-m", "launch.agent", "--standalone", "-m", "train", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sys.executable} has no torch; ")
    assert done.stderr.count("\n") == 1


def test_a_torch_that_takes_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """2.11's agent ends its ranks without saying how long they have."""
    sent: list[signal.Signals] = []
    monkeypatch.setattr(LocalElasticAgent, "_shutdown", lambda _, death_sig: sent.append(death_sig))
    agent = object.__new__(Agent)
    agent._shutdown(signal.SIGTERM)
    agent._shutdown()
    assert sent == [signal.SIGINT, signal.SIGTERM]


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    options = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    options += ["--rdzv-conf", "is_host=1,join_timeout=2,read_timeout=5", "--rdzv-id", "test"]
    process = agent(tmp_path, "", *options, "--this-node", "0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == (
        "error: 2 nodes did not come together at 127.0.0.1:0 within 2 s: node 1 is missing; "
        f"node 0 ({socket.gethostname()}) came\n"
    )
    assert not (tmp_path / "log").exists()


@pytest.fixture
def launched(
    raw_config: dict[str, Any], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """launch/torchrun.sh with nothing replaced, two ranks."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw_config))

    def start(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "launch/torchrun.sh"), "2", str(config), *overrides]
        environment = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return start


@pytest.mark.slow
def test_what_the_checks_refuse_is_not_started(launched, tmp_path: Path) -> None:
    refused = launched("data.validation=/nowhere")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: node 0 (")
    assert refused.stderr.count("\n") == 1
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_checks_come_first_then_the_training(launched, tmp_path: Path) -> None:
    trained = launched()
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.startswith("pre-flight, 1 node, 2 ranks: python")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["kind"] == "step" for row in rows) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--standalone", "--nproc-per-node", "0"], "--nproc-per-node=0 must be 1 or more"),
        (["--standalone", "--nproc-per-node", "two"], "Unsupported nproc_per_node value: two"),
        (["--rdzv-backend", "c10d", "--nnodes", "4:2"], "min_nodes"),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:99999"], "port number"),
        (["--standalone", "--preflight-args", "--hosts 'a,b"], "No closing quotation"),
    ],
)
def test_impossible_options_are_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*options, "-m", "train", "c.yaml"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
