"""python -m launch.agent [torchrun's options] -m train CONFIG ...: torchrun, for runs of ours.

Beyond torchrun: the pre-flight checks run first; the exit status is that of the rank that failed
first; a bad input or a request to stop is not restarted; a rendezvous that fails says in one line
which nodes came.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec

from train.signals import REQUEUE

if __name__ == "__main__":  # until ranks are started nothing can be lost: torchrun listens then
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(REQUEUE))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    if find_spec("torch") is None:
        print(
            f"error: {sys.executable} has no torch; activate its environment, or set PYTHON",
            file=sys.stderr,
        )
        sys.exit(2)

import argparse
import copy
import json
import logging
import shlex
import socket
import uuid
from typing import Any

from torch.distributed import DistError, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args
from torch.distributed.run import parse_args as parse_torchrun

BAD, FAILED = 2, 1
PROCESS_LOG = "torch.distributed.elastic.multiprocessing.api"
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
PASSED_ON = {signal.SIGTERM: signal.SIGINT, signal.SIGINT: signal.SIGTERM}
# Exit statuses of a rank that another attempt here would not change: bad input, SIGINT, SIGTERM,
# and the walltime, which is over for all attempts: it is the scheduler that starts the job again.
FINAL = (BAD, REQUEUE, 128 + signal.SIGINT, 128 + signal.SIGTERM)


class Agent(LocalElasticAgent):
    """torchrun's agent, which restarts ranks that failed, unless they ended for good."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _shutdown(  # type: ignore[override]
        self, death_sig: signal.Signals | None = None, **timeout: int
    ) -> None:
        # Slurm signals every process of a step, ranks too, and a rank dies of a second signal of
        # the same kind: a request to stop is passed on as the other one.
        other = PASSED_ON.get(death_sig, death_sig) if death_sig is not None else signal.SIGTERM
        super()._shutdown(other, **timeout)  # torch 2.11 has no timeout


def hide_what_we_say(record: logging.LogRecord) -> bool:
    """A filter for torchrun's log without the lines that our own one line replaces."""
    return not record.getMessage().startswith(("Sending process", "failed (exitcode"))


def launch(args: argparse.Namespace, job: str, this_node: int | None, stores: list[Store]) -> int:
    """Start the ranks of this node, once the others are there; returns the exit status.

    job: the rendezvous of the training itself; this_node: its number, where known; stores: keeps
    what this process hosts alive for the other nodes. Raises SignalException on a signal to this
    process, once the ranks have ended of it.
    """
    config, command, command_args = config_from_args(args)
    seconds = int(config.rdzv_configs.get("join_timeout", 600))
    host = socket.gethostname()
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    try:
        backend, store = create_backend(parameters)
    except (RendezvousError, DistError):
        return _complain(
            f"{host} can't reach the rendezvous at {config.rdzv_endpoint}: is node 0 up and the "
            "address right?",
            BAD,
        )
    stores.append(store)
    running = f"running/{job}"
    if config.run_id != job:  # the checks
        if store.check([running]):
            print(f"{host} joins a job that is running already, without the checks", flush=True)
            return 0
    else:
        store.set(running, "")
    _sign_in(store, config.run_id, this_node, host)
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(command_args),
        rdzv_handler=create_handler(store, backend, parameters),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
    )
    assert config.logs_specs is not None
    # How long ranks have between SIGTERM and SIGKILL; older torch knows 30 s only.
    grace = getattr(config, "shutdown_timeout", None)
    more = {} if grace is None else {"shutdown_timeout": grace}
    agent = Agent(spec, config.logs_specs, start_method=config.start_method, **more)
    ended = FAILED
    try:
        result = agent.run()
        if result is not None:  # None: other nodes closed the rendezvous
            ended = status_of(result, host)
    except RendezvousTimeoutError:
        ended = _complain(
            f"{config.min_nodes} nodes did not come together at {config.rdzv_endpoint} within "
            f"{seconds} s: {_attendance(store, config)}",
            BAD,
        )
    except (RendezvousError, DistError) as error:
        ended = _complain(f"{host} lost the other nodes: {str(error).splitlines()[0]}", FAILED)
    spec.rdzv_handler.shutdown()
    return ended


def status_of(result: RunResult, host: str) -> int:
    """0, or the exit status of the rank that failed first, as a shell tells it."""
    if not result.is_failed():
        return 0
    rank, first = min(result.failures.items(), key=lambda item: item[1].timestamp)
    status = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    if status not in FINAL:  # those have said why
        _complain(f"rank {rank} on {host} ended with status {status}", status)
    return status


def _complain(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def _sign_in(store: Store, run_id: str, node: int | None, host: str) -> None:
    number = store.add(f"arrivals/{run_id}", 1)
    store.set(f"arrival/{run_id}/{number}", json.dumps([node, host]))


def _attendance(store: Store, config: LaunchConfig) -> str:
    """Who came to the rendezvous, and who did not where nodes are numbered."""
    try:
        numbers = range(1, store.add(f"arrivals/{config.run_id}", 0) + 1)
        signed = [json.loads(store.get(f"arrival/{config.run_id}/{i}")) for i in numbers]
    except RuntimeError:
        return "node 0 no longer answers"
    came = {f"node {node} ({host})" if node is not None else host: node for node, host in signed}
    told = f"{', '.join(came)} came"
    missing = sorted(set(range(config.min_nodes)) - {n for n in came.values() if n is not None})
    if missing and None not in came.values():
        told = f"node {', '.join(map(str, missing))} is missing; {told}"
    return told


def impossible(args: argparse.Namespace) -> str | None:
    """What torchrun would end on with a traceback, in one line; None where it would not."""
    try:
        config, _, _ = config_from_args(args)
        parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=29400)
    except (ValueError, AssertionError) as error:
        return f"torchrun's options: {' '.join(str(error).split())}"
    if config.nproc_per_node < 1:
        return f"--nproc-per-node={config.nproc_per_node} must be 1 or more"
    return None


def for_preflight(args: argparse.Namespace, more: list[str]) -> argparse.Namespace:
    """The same launch, with the checks in the place of the training and no restarts."""
    checks: Any = copy.copy(args)
    checks.training_script, checks.max_restarts = "launch.preflight", 0
    checks.training_script_args = [*args.training_script_args, *more]
    checks.rdzv_id = f"{args.rdzv_id}-preflight"
    return checks


def main(arguments: list[str] | None = None) -> int:
    """Exit status: the training's; 2 when a check fails or a node does not come; 75 on SIGUSR1 and
    128 + n on another signal n to this process, which the ranks get too; 1 else."""
    own = argparse.ArgumentParser(
        prog="python -m launch.agent",
        description="torchrun with checks before the start; other options are torchrun's",
        allow_abbrev=False,
    )
    own.add_argument("--no-preflight", action="store_true", help="start without the checks")
    own.add_argument("--this-node", type=int, help="the number of this node, from 0")
    own.add_argument("--preflight-args", default="", help="for python -m launch.preflight")
    options, rest = own.parse_known_args(arguments)
    args = parse_torchrun(rest)
    if args.standalone:
        args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"
        args.rdzv_id = str(uuid.uuid4())
    if args.rdzv_backend != "c10d" or not args.module:
        own.error("--rdzv-backend must be c10d (or use --standalone), and -m is needed")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torchrun warns that it is not set
    if wrong := impossible(args):
        own.error(wrong)
    try:
        more = shlex.split(options.preflight_args)
    except ValueError as error:
        own.error(f"--preflight-args={options.preflight_args}: {error}")
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", SIGNALS)  # torchrun's, and SIGUSR1
    # With the shared store (seen in torch 2.13) the survivors of a lost node never tell its
    # replacement where rank 0 is, and both wait until they time out.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    logging.getLogger(PROCESS_LOG).addFilter(hide_what_we_say)
    stores: list[Store] = []
    try:
        if not options.no_preflight:
            checks = for_preflight(args, more)
            if status := launch(checks, args.rdzv_id, options.this_node, stores):
                return status
        return launch(args, args.rdzv_id, options.this_node, stores)
    except SignalException as stop:
        return REQUEUE if stop.sigval == signal.SIGUSR1 else 128 + int(stop.sigval)


if __name__ == "__main__":
    sys.exit(main())
