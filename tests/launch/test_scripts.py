"""The shell scripts, with stand-ins for python, srun, scontrol and pdsh that note their use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from train.callbacks.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.s*"))

# In the place of python: notes its arguments and settings, then does as the test says.
PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$STANDIN/calls"
pwd >"$STANDIN/folder"
env >"$STANDIN/environment"
[ -z "${DS_ENV_FILE:-}" ] || cp "$DS_ENV_FILE" "$STANDIN/carried"
[ ! -e "$STANDIN/behaviour" ] || . "$STANDIN/behaviour"
"""
# One process for each node, all on this machine; SIGTERM goes on to them, the largest status out.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$STANDIN/slurm"
while [[ $1 == --* ]]; do shift; done
pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURMD_NODENAME=127.0.0.1 "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
  while true; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  [ "$status" -le "$worst" ] || worst=$status
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$STANDIN/slurm"
[ "$1 $2" != "show hostnames" ] || printf '127.0.0.1\\n127.0.0.1\\n'
"""


@pytest.fixture
def standin(tmp_path: Path) -> Path:
    folder = tmp_path / "standin"
    folder.mkdir()
    for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def environment(standin: Path, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    path = f"{standin}:/usr/local/bin:/usr/bin:/bin"
    return {
        **kept,
        "PATH": path,
        "STANDIN": str(standin),
        "PYTHON": str(standin / "python"),
        **more,
    }


def run(
    script: str, *arguments: str, standin: Path, folder: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    settings = environment(standin, **more)
    return subprocess.run(
        command, capture_output=True, text=True, env=settings, cwd=folder, check=False
    )


def calls(standin: Path) -> list[str]:
    log = standin / "calls"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", str(script)], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


def test_torchrun_on_one_node(standin: Path) -> None:
    assert run("torchrun.sh", "2", "c.yaml", "seed=1", "--resume", standin=standin).returncode == 0
    assert calls(standin) == [
        "-m launch.agent --nproc-per-node 2 --max-restarts 0 --standalone "
        "-m train c.yaml seed=1 --resume"
    ]


@pytest.mark.parametrize(
    "script", ["torchrun.sh", pytest.param("deepspeed.sh", marks=pytest.mark.slow)]
)
def test_paths_are_of_the_folder_in_which_the_command_is_given(
    standin: Path, tmp_path: Path, script: str
) -> None:
    """The code is found all the same, before what lies there under the same names."""
    (tmp_path / "train.py").write_text("raise SystemExit(3)\n")
    (standin / "behaviour").write_text(f"{sys.executable} -m train --help >/dev/null || exit 9\n")
    result = run(script, "2", "c.yaml", standin=standin, folder=tmp_path, PYTHONPATH="/more")
    assert result.returncode == 0, result.stderr
    assert (standin / "folder").read_text() == f"{tmp_path}\n"
    assert f"PYTHONPATH={ROOT}:/more\n" in (standin / "environment").read_text()


def test_torchrun_on_several_nodes(standin: Path) -> None:
    where = {"NNODES": "2:4", "NODE_RANK": "1", "MASTER_ADDR": "w0", "NODE_ADDR": "w1"}
    more = {"MAX_RESTARTS": "3", "PREFLIGHT_ARGS": "--timeout 9"}
    asked = ("8", "c.yaml", "--resume-or-start")
    assert run("torchrun.sh", *asked, standin=standin, **where, **more).returncode == 0
    assert calls(standin) == [
        "-m launch.agent --nproc-per-node 8 --max-restarts 3 --this-node 1 --nnodes 2:4 "
        "--rdzv-backend c10d --rdzv-endpoint w0:29400 --rdzv-id hope "
        "--rdzv-conf join_timeout=600,read_timeout=600,is_host=0 --local-addr w1 "
        "--preflight-args=--timeout 9 -m train c.yaml --resume-or-start"
    ]
    asked = ("8", "c.yaml")
    more = {"NODE_RANK": "0", "RDZV_ENDPOINT": "x:1", "PREFLIGHT": "0"}
    assert run("torchrun.sh", *asked, standin=standin, NNODES="2", **more).returncode == 0
    assert "--rdzv-endpoint x:1 " in calls(standin)[1]
    assert "is_host=1 --no-preflight -m train c.yaml" in calls(standin)[1]


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "message"),
    [
        ("torchrun.sh", ["2"], {}, "usage: launch/torchrun.sh NPROC CONFIG"),
        ("torchrun.sh", ["2", "c"], {"NNODES": "2"}, "error: NNODES=2 needs MASTER_ADDR"),
        ("torchrun.sh", ["2", "c"], {"MAX_RESTARTS": "1"}, "error: MAX_RESTARTS=1 needs --resume"),
        ("torchrun.sh", ["0", "c"], {}, "error: NPROC=0 must be how many ranks"),
        ("torchrun.sh", ["two", "c"], {}, "error: NPROC=two must be how many ranks"),
        ("torchrun.sh", ["2", "c"], {"NNODES": "0"}, "error: NNODES=0 must be a number of nodes"),
        ("torchrun.sh", ["2", "c"], {"NNODES": "2:x"}, "error: NNODES=2:x must be a number"),
        ("torchrun.sh", ["2", "c"], {"NODE_RANK": "-1"}, "error: NODE_RANK=-1 must be the number"),
        (
            "torchrun.sh",
            ["2", "c"],
            {"MASTER_PORT": "ssh"},
            "error: MASTER_PORT=ssh must be a port",
        ),
        ("torchrun.sh", ["2", "c"], {"MAX_RESTARTS": "x"}, "error: MAX_RESTARTS=x must be"),
        ("torchrun.sh", ["2", "c"], {"RDZV_TIMEOUT": "1m"}, "error: RDZV_TIMEOUT=1m must be whole"),
        ("deepspeed.sh", ["0", "c"], {}, "error: NPROC=0 must be how many ranks"),
        ("deepspeed.sh", ["2"], {}, "usage: launch/deepspeed.sh NPROC|HOSTFILE CONFIG"),
        ("deepspeed.sh", ["hosts", "c"], {}, "error: no hostfile hosts"),
        ("deepspeed.sh", ["/", "c"], {}, "error: no hostfile /"),
        ("slurm.sbatch", [], {}, "usage: sbatch"),
    ],
)
def test_what_scripts_refuse(
    standin: Path, script: str, arguments: list[str], settings: dict[str, str], message: str
) -> None:
    result = run(script, *arguments, standin=standin, **settings)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert calls(standin) == []


def test_deepspeed_with_a_hostfile(standin: Path, tmp_path: Path) -> None:
    (standin / "pdsh").write_text("#!/bin/sh\n")
    (standin / "pdsh").chmod(0o755)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two\nw0 slots=4\nw1  slots=4\n")
    settings = {"SSH_PORT": "2222", "MASTER_ADDR": "w0", "NCCL_DEBUG": "INFO"}
    asked = (str(hostfile), "c.yaml", "--resume")
    assert run("deepspeed.sh", *asked, standin=standin, **settings).returncode == 0
    common = (
        "-m deepspeed.launcher.runner --master_port 29500 --no_local_rank --log_level error "
        f"--hostfile {hostfile} --no_ssh_check --force_multi --master_addr w0 --ssh_port 2222 "
    )
    assert calls(standin) == [
        f"{common}--module launch.preflight c.yaml --resume --hosts w0,w1",
        f"{common}--module train c.yaml --resume",
    ]
    carried = (standin / "carried").read_text().splitlines()
    assert sorted(carried) == ["NCCL_DEBUG=INFO", "OMP_NUM_THREADS=1"]
    for text, wrong in (
        ("# two\n\n", "there is no host in it"),
        ("w0 slots=4\nw1\n", 'line 2 is not "host slots=N"'),
        ("w0 slots=0\n", 'line 1 is not "host slots=N"'),
        ("w0 slots=4\nw0 slots=4\n", "line 2 has w0 again"),
    ):
        hostfile.write_text(text)
        result = run("deepspeed.sh", *asked, standin=standin)
        assert (result.returncode, result.stderr) == (2, f"error: hostfile {hostfile}: {wrong}\n")
    assert len(calls(standin)) == 2


def test_deepspeed_starts_nothing_after_a_failed_check(standin: Path) -> None:
    (standin / "behaviour").write_text("exit 2\n")
    assert run("deepspeed.sh", "2", "c.yaml", standin=standin).returncode == 2
    assert len(calls(standin)) == 1
    assert run("deepspeed.sh", "2", "c.yaml", standin=standin, PREFLIGHT="0").returncode == 2
    assert calls(standin)[1].endswith("--module train c.yaml")


def slurm(standin: Path, *arguments: str, nodes: int = 2, **more: str) -> subprocess.Popen:
    known = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "w[0-1]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_ID": "77",
    }
    settings = environment(standin, **(known | more))
    copy = standin / "copy.sbatch"  # as Slurm does
    shutil.copy(ROOT / "launch" / "slurm.sbatch", copy)
    command = ["bash", str(copy), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings)


def wait_for(happened, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_slurm_starts_an_agent_a_node(standin: Path) -> None:
    job = slurm(standin, "c.yaml", "seed=1", RANKS_PER_NODE="8")
    assert job.wait(60) == 0
    asked = sorted(calls(standin))
    assert len(asked) == 2
    for node, call in enumerate(asked):
        assert f"--this-node {node} --nnodes 2 --rdzv-backend c10d" in call
        assert "--rdzv-endpoint 127.0.0.1:20077 --rdzv-id 77.0" in call
        assert call.startswith("-m launch.agent --nproc-per-node 8 --max-restarts 3 ")
        assert call.endswith("-m train c.yaml seed=1 --resume-or-start")
    settings = (standin / "environment").read_text()
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240\n" in settings
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING=1\n" in settings
    assert "requeue" not in (standin / "slurm").read_text()


@pytest.mark.parametrize(
    ("number", "status", "requeued"),
    [
        (signal.SIGUSR1, 143, True),  # the time is up
        (signal.SIGTERM, 143, False),  # preempted: Slurm requeues it
        (signal.SIGUSR1, 0, False),  # finished just in time
        (signal.SIGUSR1, 2, False),  # would fail again
    ],
)
def test_slurm_stops_with_a_checkpoint_and_requeues(
    standin: Path, number: int, status: int, requeued: bool
) -> None:
    (standin / "behaviour").write_text(
        f"trap 'echo saved >>\"$STANDIN/saved\"; exit {status}' TERM\n"
        'echo >>"$STANDIN/ready"; while true; do sleep 0.05; done\n'
    )
    job = slurm(standin, "c.yaml")
    ready, saved = standin / "ready", standin / "saved"
    wait_for(lambda: ready.exists() and len(ready.read_text()) == 2)
    job.send_signal(number)
    assert job.wait(60) == status
    assert saved.read_text() == "saved\n" * 2
    assert ("scontrol requeue 77" in (standin / "slurm").read_text()) == requeued


def test_slurm_from_another_folder_is_one_line(standin: Path, tmp_path: Path) -> None:
    job = slurm(standin, "c.yaml", SLURM_SUBMIT_DIR=str(tmp_path))
    assert job.wait(60) == 2
    assert job.stderr is not None
    told = job.stderr.read()
    assert told.startswith(f"error: no launch/torchrun.sh in {tmp_path}: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(("status", "requeued"), [(1, False), (2, False), (75, True)])
def test_slurm_requeues_at_the_walltime_and_not_what_failed(
    standin: Path, status: int, requeued: bool
) -> None:
    """75: training.walltime_s was over before Slurm said a word."""
    (standin / "behaviour").write_text(f"exit {status}\n")
    assert slurm(standin, "c.yaml").wait(60) == status
    assert ("scontrol requeue 77" in (standin / "slurm").read_text()) == requeued


@pytest.mark.slow
def test_a_training_run_is_stopped_by_slurm_and_goes_on(
    standin: Path, raw_config: dict, tmp_path: Path
) -> None:
    """Two nodes for real, on loopback: time is up, the job is requeued and starts again."""
    config = tmp_path / "config.yaml"
    raw_config["training"]["total_tokens"] = 100 * 256
    raw_config["checkpoint"]["every_tokens"] = 10**6
    config.write_text(yaml.safe_dump(raw_config))
    settings = {"PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "lo", "RANKS_PER_NODE": "1"}
    job = slurm(standin, str(config), **settings)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: len(read_metrics(metrics)) > 5 or job.poll() is not None, 200)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(200) == 143
    assert "scontrol requeue 77" in (standin / "slurm").read_text()
    stopped_at = read_metrics(metrics)[-1]["tokens"]
    assert stopped_at < 100 * 256
    assert slurm(standin, str(config), SLURM_RESTART_COUNT="1", **settings).wait(250) == 0
    rows = read_metrics(metrics)
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 101))
