"""python -m tools.nodes: training on several nodes, one of them killed in the middle.

Nodes are network namespaces with addresses and host names of their own, where those can be made,
and loopback agents where not. Each trial starts a tiny Hope through launch/torchrun.sh on every
node (or launch/deepspeed.sh with a hostfile, over ssh on loopback), kills all processes of one
node, starts again what has ended, and compares the finished run with one of as many ranks on one
machine that nothing disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline import train_tokenizer
from data_pipeline.command import as_command
from data_pipeline.tokenizing import tokenize
from tools.figures import table
from tools.node_network import (
    Node,
    command_line,
    descendants,
    kill_all,
    loopback,
    namespaces,
    ssh_server,
    why_no_namespaces,
)
from train.callbacks.metrics import read_metrics
from train.checkpoint import CheckpointStore
from train.parallel.ranks import Ranks
from train.run_files import CHECKPOINTS, METRICS

ROOT = Path(__file__).parent.parent
BATCH, STEPS, SAVE_EVERY, KILL_AFTER = 512, 60, 15, 22
MARKER = ".made-by-nodes"
PATIENCE = 300.0  # seconds, for anything that has to happen


@dataclass(frozen=True)
class Trial:
    """What came of one disturbed run, beside the undisturbed one."""

    launcher: str
    nodes: int
    network: str
    killed: int  # the number of the node
    survived: bool  # whether the other nodes' launchers stayed up and took the run on
    step_killed: int
    step_resumed: int
    loss_difference: float  # largest over all steps and evaluations
    same_parameters: bool  # to the bit
    seconds: float

    def row(self) -> list[str]:
        return [
            self.launcher,
            str(self.nodes),
            self.network,
            str(self.killed),
            "the others waited for it" if self.survived else "all were started again",
            f"{self.step_killed} of {STEPS}",
            str(self.step_resumed),
            f"{self.loss_difference:.1e}",
            "equal" if self.same_parameters else "differ",
            f"{self.seconds:.0f}",
        ]


HEADER = ["launcher", "nodes", "network", "killed node", "then", "at step", "went on from"]
HEADER += ["loss difference", "parameters", "seconds"]


class Nodes:
    """Trials in one folder, which holds the corpus, the configuration and the runs.

    What an earlier trial left in it is removed; ValueError when it holds anything else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        if self.folder.exists():
            if any(self.folder.iterdir()) and not (self.folder / MARKER).exists():
                raise ValueError(
                    f"{folder} is not empty and not from here; choose another --folder"
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        (self.folder / MARKER).touch()
        self.config = self.folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(tiny_config(self.folder)))
        self.why_loopback = why_no_namespaces()
        self.environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def undisturbed(self, ranks: int) -> Path:
        """The run folder of a run on one machine; made once for each number of ranks."""
        run = self.folder / f"whole-{ranks}"
        if not run.exists():
            command = [str(ROOT / "launch/torchrun.sh"), str(ranks), *self._what(run)]
            environment = {**self.environment, "PREFLIGHT": "0"}
            log = self.folder / f"whole-{ranks}.log"
            status = Node(0, "127.0.0.1", "lo", []).start(command, environment, log).wait(PATIENCE)
            if status:
                raise RuntimeError(f"exit status {status}; see {log}\n{tail(log)}")
        return run

    def torchrun(self, count: int, killed: int) -> Trial:
        """One rank on each of `count` nodes, their agents meeting over the network.

        When node 0 dies the rendezvous dies with it, and all agents end; else the others wait.
        """
        whole = self.undisturbed(count)
        network = loopback if self.why_loopback else namespaces
        run = self.folder / f"torchrun-{count}-{network.__name__}"
        log = run.with_suffix(".log")
        port = free_port()
        started = time.monotonic()
        with network(count) as nodes:

            def start(node: Node) -> subprocess.Popen[bytes]:
                environment = {
                    **self.environment,
                    "NNODES": str(count),
                    "NODE_RANK": str(node.number),
                    "MASTER_ADDR": nodes[0].address,
                    "MASTER_PORT": str(port),
                    "NODE_ADDR": node.address,
                    "GLOO_SOCKET_IFNAME": node.interface,
                    "MAX_RESTARTS": "3",
                    "RDZV_TIMEOUT": "120",
                }
                what = [*self._what(run), "--resume-or-start"]
                return node.start([str(ROOT / "launch/torchrun.sh"), "1", *what], environment, log)

            agents = {node.number: start(node) for node in nodes}
            at = self._wait_for_middle(run, lambda: [a.poll() for a in agents.values()], log)
            nodes[killed].kill()
            agents.pop(killed)
            if killed == 0:
                wait_until(lambda: all(a.poll() for a in agents.values()), "the agents to end", log)
                agents.clear()
            for node in nodes:
                if node.number not in agents:
                    agents[node.number] = start(node)
            ended = {number: agent.wait(PATIENCE) for number, agent in agents.items()}
        if any(ended.values()):
            raise RuntimeError(f"exit statuses by node: {ended}; see {log}\n{tail(log)}")
        name = network.__name__
        seconds = time.monotonic() - started
        return self._compare("torchrun", count, name, killed, killed != 0, at, run, whole, seconds)

    def deepspeed(self) -> Trial:
        """Two hosts of a hostfile, one rank each, reached by ssh on loopback; the second dies."""
        whole = self.undisturbed(2)
        run, log = self.folder / "deepspeed-2", self.folder / "deepspeed-2.log"
        hosts = ["127.0.0.1", "127.0.0.2"]
        hostfile = self.folder / "hostfile"
        hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))
        port = free_port()
        started = time.monotonic()
        with ssh_server(self.folder / "ssh", hosts, port) as (server, ssh_options):
            environment = {
                **self.environment,
                "MASTER_ADDR": hosts[0],
                "MASTER_PORT": str(free_port()),
                "SSH_PORT": str(port),
                "PDSH_SSH_ARGS_APPEND": ssh_options,
                "GLOO_SOCKET_IFNAME": "lo",
                "DS_ACCELERATOR": "cpu",
            }
            what = [*self._what(run), "--resume-or-start"]
            command = [str(ROOT / "launch/deepspeed.sh"), str(hostfile), *what]
            here = Node(0, hosts[0], "lo", [])
            try:
                first = here.start(command, environment, log)
                at = self._wait_for_middle(run, lambda: [first.poll()], log)
                second_host = [
                    pid for pid in descendants(server) if "--node_rank=1" in command_line(pid)
                ]
                kill_all([child for pid in second_host for child in [pid, *descendants(pid)]])
                wait_until(lambda: first.poll() is not None, "the launcher to end", log)
                if first.returncode == 0:
                    raise RuntimeError(f"a killed host, and exit status 0; see {log}")
                ended = here.start(command, environment, log).wait(PATIENCE)
            finally:
                here.kill()
        if ended:
            raise RuntimeError(f"exit status {ended}; see {log}\n{tail(log)}")
        seconds = time.monotonic() - started
        return self._compare("deepspeed", 2, "ssh, loopback", 1, False, at, run, whole, seconds)

    def _what(self, run: Path) -> list[str]:
        return [str(self.config), f"run_dir={run}"]

    def _wait_for_middle(
        self, run: Path, statuses: Callable[[], list[int | None]], log: Path
    ) -> int:
        """Wait for a checkpoint and some steps after it; returns the step reached."""

        def steps() -> int:
            if any(status is not None for status in statuses()):
                raise RuntimeError(f"ended before it was disturbed; see {log}\n{tail(log)}")
            return sum(row["kind"] == "step" for row in read_metrics(run / METRICS))

        wait_until(lambda: steps() >= KILL_AFTER, f"step {KILL_AFTER}", log)
        return steps()

    def _compare(
        self,
        launcher: str,
        nodes: int,
        network: str,
        killed: int,
        survived: bool,
        at: int,
        run: Path,
        whole: Path,
        seconds: float,
    ) -> Trial:
        losses = [
            {(row["kind"], row["tokens"]): row["loss"] for row in read_metrics(one / METRICS)}
            for one in (whole, run)
        ]
        if losses[0].keys() != losses[1].keys():
            raise RuntimeError(f"{run} and {whole} did not take the same steps")
        tensors = [parameters(one) for one in (whole, run)]
        return Trial(
            launcher,
            nodes,
            network,
            killed,
            survived,
            step_killed=at,
            step_resumed=at // SAVE_EVERY * SAVE_EVERY,
            loss_difference=max(abs(losses[0][key] - losses[1][key]) for key in losses[0]),
            same_parameters=all(torch.equal(tensors[0][n], tensors[1][n]) for n in tensors[0]),
            seconds=seconds,
        )


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """The model in the newest checkpoint of a run."""
    store = CheckpointStore(run / CHECKPOINTS, Ranks.alone(), 2)
    return store.tensors(store.newest(), "model/")


def tiny_config(folder: Path) -> dict[str, Any]:
    """A Hope that trains in seconds, on shards of Python's own sources made in `folder`."""
    texts = [Path(module.__file__ or "").read_text() for module in (random, statistics, textwrap)]
    tokenizer = train_tokenizer(texts, 400)
    for split, part in (("train", texts[:2]), ("validation", texts[2:])):
        text = folder / "text" / split
        text.mkdir(parents=True)
        for number, content in enumerate(part):
            (text / f"{number}.txt").write_text(content)
        tokenize([str(text)], tokenizer, folder / split)
    levels = [
        {"name": "every", "hidden_size": 16, "update_every_tokens": "step"},
        {"name": "slow", "hidden_size": 16, "update_every_tokens": 7 * BATCH},
    ]
    scan = {"memory_chunk": 8, "projection_chunk": 16}
    return {
        "run_dir": str(folder / "run"),
        "num_threads": 1,
        "model": {
            "dim": 32,
            "num_layers": 2,
            "num_heads": 2,
            "titans": {"scan": scan},
            "cms": {"levels": levels},
        },
        "data": {
            "train": [{"path": str(folder / "train")}],
            "validation": str(folder / "validation"),
            "seq_len": 128,
        },
        "training": {"total_tokens": STEPS * BATCH, "batch_tokens": BATCH},
        "optimizer": {"lr": 0.005, "schedule": {"warmup_tokens": 4 * BATCH}},
        "evaluation": {"every_tokens": 20 * BATCH, "max_tokens": 1024, "batch_rows": 4},
        "checkpoint": {"every_tokens": SAVE_EVERY * BATCH},
        "mlflow": {"enabled": False},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(happened: Callable[[], bool], what: str, log: Path) -> None:
    """Poll; RuntimeError with the end of the log when it does not happen in time."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {PATIENCE:g} s for {what}; see {log}\n{tail(log)}")
        time.sleep(0.05)


def tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text().splitlines()[-lines:])


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when every disturbed run ended as the undisturbed one did, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tools.nodes", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="*", default=[2, 4], help="default: 2 4")
    parser.add_argument("--no-deepspeed", action="store_true", help="torchrun only")
    parser.add_argument("--folder", type=Path, default=Path("runs/nodes"))
    options = parser.parse_args(arguments)
    try:
        trials = Nodes(options.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if trials.why_loopback:
        print(f"loopback agents stand in for nodes: no namespaces ({trials.why_loopback})")
    made = []
    for count in options.nodes:
        # Once a node whose death the others survive, once the one that hosts the rendezvous.
        made.append(trials.torchrun(count, killed=0 if count > 2 else 1))
        print(table(HEADER, [made[-1].row()]), flush=True)
    if not options.no_deepspeed:
        made.append(trials.deepspeed())
    print(table(HEADER, [trial.row() for trial in made]))
    return 0 if all(trial.same_parameters for trial in made) else 1


if __name__ == "__main__":
    sys.exit(as_command(main))
