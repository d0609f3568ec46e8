"""The checks before a start, on real processes, each with a fault on one of two nodes."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from launch import checks
from launch.meeting import Meeting, NoAnswerError, Place
from launch.preflight import Limits, Preflight, Probes, main
from launch.report import Nodes, spelled
from tools.processes import CONTEXT
from train.config import ConfigError, RunConfig, load_config

HOSTS = ["worker-a", "worker-b"]
Change = Callable[[Preflight], None]


def check(
    config: Path, change: Change | None, seconds: float = 20.0, ranks: int = 4, absent: int = -1
) -> dict[int, tuple[list[str], str]]:
    """Pre-flight on two nodes of ranks / 2 processes; `change` is applied to those of worker-b.

    absent: a rank that is not started. Returns (problems, table) of every rank that was.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers: dict[int, Any] = {}
    processes = {}
    for rank in range(ranks):
        if rank == absent:
            continue
        ours, theirs = CONTEXT.Pipe(duplex=False)
        place = Place(rank, ranks, rank % (ranks // 2), rank // (ranks // 2), "")
        arguments = (theirs, place, port, str(config), change, seconds)
        process = CONTEXT.Process(target=_one_rank, args=arguments, daemon=True)
        process.start()
        theirs.close()
        processes[rank] = (ours, process)
    try:
        patience = 6 * seconds
        for rank, (ours, _) in processes.items():
            answers[rank] = ours.recv() if ours.poll(patience) else "hung"
            patience = 2  # once the first one has its answer, all do
    finally:
        for _, process in processes.values():
            process.kill()
            process.join()
    return answers


def _one_rank(
    end: Any, place: Place, port: int, config: str, change: Change | None, seconds: float
) -> None:
    torch.set_num_threads(1)
    place = dataclasses.replace(place, host=HOSTS[place.node])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    loaded: RunConfig | ConfigError
    try:
        loaded = load_config(config)
        meeting = Meeting.at_master(place, seconds, where)
        preflight = Preflight(meeting, loaded, Limits(seconds=seconds, clock_skew=0.5), hosts=HOSTS)
        if change is not None and place.node == 1:
            change(preflight)
        end.send(preflight.run())
    except NoAnswerError as error:
        end.send(str(error))


@pytest.fixture
def config_file(raw_config: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    return path


def probe(preflight: Preflight, **changed: Any) -> None:
    preflight.probes = dataclasses.replace(preflight.probes, **changed)


def changed_config(preflight: Preflight, **changed: Any) -> None:
    assert isinstance(preflight.config, RunConfig)
    preflight.config = preflight.config.model_copy(update=changed)


def other_torch(preflight: Preflight) -> None:
    found = preflight.probes.versions()
    probe(preflight, versions=lambda: {**found, "torch": "1.0"})


def no_deepspeed(preflight: Preflight) -> None:
    found = preflight.probes.versions()
    probe(preflight, versions=lambda: {**found, "deepspeed": checks.NONE})


def late_clock(preflight: Preflight) -> None:
    probe(preflight, clock=lambda: time.time() - 3)


def wrong_matmul(preflight: Preflight) -> None:
    def product(a: Tensor, b: Tensor) -> Tensor:
        result = a @ b
        result[5, 7] += 1
        return result

    probe(preflight, matmul=product)


def wrong_sum(preflight: Preflight) -> None:
    def all_reduce(tensor: Tensor) -> None:
        Probes().all_reduce(tensor)
        tensor[3] += 2**-10

    probe(preflight, all_reduce=all_reduce)


def little_shared_memory(preflight: Preflight) -> None:
    probe(preflight, memory=lambda: (1 << 34, 1 << 20))


def other_folder(preflight: Preflight) -> None:
    assert isinstance(preflight.config, RunConfig)
    preflight.limits = Limits(seconds=2, clock_skew=0.5)
    changed_config(preflight, run_dir=preflight.config.run_dir / "elsewhere")


def other_data(preflight: Preflight) -> None:
    assert isinstance(preflight.config, RunConfig)
    data = preflight.config.data
    changed_config(preflight, data=data.model_copy(update={"validation": data.train[0].path}))


def no_data(preflight: Preflight) -> None:
    assert isinstance(preflight.config, RunConfig)
    data = preflight.config.data
    changed_config(preflight, data=data.model_copy(update={"validation": "/nowhere"}))


def no_config(preflight: Preflight) -> None:
    preflight.config = ConfigError("can't read configuration c.yaml")


def no_interface(preflight: Preflight) -> None:
    preflight.gloo_interface = "ib7"


NODE = "node 1 (worker-b)"
FAULTS = [
    (other_torch, [f"{NODE}, ranks 2-3: versions: torch 1.0, but {torch.__version__} on node 0"]),
    (no_deepspeed, [f"{NODE}, ranks 2-3: versions: deepspeed none, but 0."]),
    (late_clock, [f"{NODE}, rank 2: clock: -3.0"]),
    (wrong_matmul, [f"{NODE}, ranks 2-3: matmul: a product in float32 on cpu is off by "]),
    (wrong_sum, [f"{NODE}, ranks 2-3: collective: 1 of 1024 sums over the ranks are wrong"]),
    (little_shared_memory, [f"{NODE}, ranks 2-3: /dev/shm: 1 MiB are free, 64 MiB are asked"]),
    (other_folder, [f"{NODE}, ranks 2-3: folder: run folder ", f"{NODE}, ranks 2-3: config: c"]),
    (other_data, [f"{NODE}, ranks 2-3: config: config ", f"{NODE}, rank 2: data: data "]),
    (no_data, [f"{NODE}, rank 2: data: /nowhere: does not exist", f"{NODE}, ranks 2-3: config"]),
    (no_config, [f"{NODE}, ranks 2-3: config: can't read configuration c.yaml"]),
    (no_interface, [f"{NODE}, ranks 2-3: network: GLOO_SOCKET_IFNAME names ib7"]),
]


TOGETHER = ([0, 1, 2, 3, 4, 5], [6, 10], [7], [8], [9])
"""What can be told apart where one node has all of it."""
ALONE = (0, 1, 2, 3, 4, 5, 6, 10)


@dataclasses.dataclass
class Several:
    """Faults that one node has at once."""

    numbers: list[int]

    def __call__(self, preflight: Preflight) -> None:
        for number in self.numbers:
            FAULTS[number][0](preflight)


@pytest.mark.parametrize(
    "numbers",
    [*TOGETHER, *(pytest.param([number], marks=pytest.mark.slow) for number in ALONE)],
    ids=lambda numbers: "+".join(FAULTS[number][0].__name__ for number in numbers),
)
def test_faults_name_their_node(config_file: Path, numbers: list[int]) -> None:
    answers = check(config_file, Several(numbers))
    problems, table = answers[0]
    for start in (start for number in numbers for start in FAULTS[number][1]):
        assert sum(line.startswith(start) for line in problems) == 1, problems
    assert all(line.startswith(NODE) for line in problems), problems
    assert {tuple(answer[0]) for answer in answers.values()} == {tuple(problems)}
    assert "worker-b" in table.splitlines()[3]
    assert "FAILED" not in table.splitlines()[2]


def test_two_fit_nodes_have_no_problem_and_leave_nothing(config_file: Path, tmp_path: Path) -> None:
    answers = check(config_file, None)
    assert [answer[0] for answer in answers.values()] == [[], [], [], []]
    lines = answers[0][1].splitlines()
    assert lines[0].startswith("pre-flight, 2 nodes, 4 ranks: python 3.")
    assert lines[2].split()[:3] == ["0", "worker-a", "0-1"]
    assert lines[3].split()[:3] == ["1", "worker-b", "2-3"]
    assert lines[3].split()[-6:] == ["ok"] * 6
    assert list((tmp_path / "run").iterdir()) == []


def test_a_rank_that_never_starts_is_named_in_time(config_file: Path) -> None:
    started = time.monotonic()
    answers = check(config_file, None, seconds=3, absent=3)
    assert time.monotonic() - started < 30
    assert set(answers) == {0, 1, 2}
    for problems, _ in answers.values():
        assert problems == ["node 1 (worker-b), rank 3 did not arrive within 3 s"]


def test_a_rank_that_stops_in_the_middle_is_named(config_file: Path) -> None:
    answers = check(config_file, stop_in_the_sum, seconds=3)
    assert answers[0][0] == ["node 1 (worker-b), ranks 2-3 did not finish the checks within 3 s"]


def stop_in_the_sum(preflight: Preflight) -> None:
    probe(preflight, all_reduce=lambda _: os.kill(os.getpid(), signal.SIGSTOP))


def test_without_the_first_rank_the_others_say_so(config_file: Path) -> None:
    answers = check(config_file, None, seconds=2, ranks=2, absent=0)
    assert answers[1].startswith("rank 1 on worker-b: nothing answered at 127.0.0.1:")


def test_a_truncated_and_a_missing_shard_are_problems(
    config_file: Path, corpora: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(corpora["train"], copy)
    config = load_config(config_file, [f"data.train=[{{path: {copy}}}]"])
    assert checks.check_data(config)[1] == []
    shard = next(path for path in copy.iterdir() if path.name != "manifest.json")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert f"data: {shard} has {len(content) - 1} bytes" in checks.check_data(config)[1][0]
    shard.unlink()
    assert checks.check_data(config)[1] == [f"data: {shard} is missing"]


def test_a_rank_that_received_nonsense_still_takes_part_in_the_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others, to which nothing is wrong, wait in it."""
    summed: list[Tensor] = []
    place = SimpleNamespace(rank=0, world_size=2)
    preflight = Preflight(
        SimpleNamespace(place=place),  # type: ignore[arg-type]
        ConfigError(),
        probes=Probes(all_reduce=summed.append),
    )
    monkeypatch.setattr(torch.distributed, "all_gather", lambda every, mine: every[0].copy_(mine))
    said = preflight._sum_and_gather(torch.device("cpu"))
    assert said == ["collective: what rank 1 sent on cpu arrived changed"]
    assert len(summed) == 1


def test_the_digest_of_the_code_sees_a_change(tmp_path: Path) -> None:
    for room in checks.SOURCES:
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text("x = 1\n")
    kernels = [tmp_path / "hope" / name for name in ("a.cpp", "a.cu", "a.h")]
    for source in kernels:
        source.write_text("x = 1\n")
    before = checks.code_digest(tmp_path)
    for source in (tmp_path / "launch" / "a.py", *kernels):
        source.write_text("x = 2\n")
        assert checks.code_digest(tmp_path) != before
        source.write_text("x = 1\n")
        assert checks.code_digest(tmp_path) == before


def test_gloo_on_a_loopback_name_is_a_problem_where_nodes_are_apart(monkeypatch) -> None:
    there = {"lo": "127.0.0.1", "eth0": "10.1.2.3"}
    assert checks.network("127.0.0.1", there, None) == ("127.0.0.1 (lo)", [])
    assert checks.network("127.0.0.1", there, "eth0") == ("10.1.2.3 (eth0)", [])

    class Route(socket.socket):
        def connect(self, address: Any) -> None: ...

        def getsockname(self) -> Any:
            return "10.1.2.3", 0

    monkeypatch.setattr(checks.socket, "socket", Route)
    monkeypatch.setattr(checks.socket, "gethostbyname", lambda name: "127.0.1.1")
    shown, problems = checks.network("10.1.2.4", there, None)
    assert shown == "10.1.2.3 (eth0)"
    assert problems[0].endswith("set GLOO_SOCKET_IFNAME=eth0")
    monkeypatch.setattr(checks.socket, "gethostbyname", lambda name: "10.1.2.3")
    assert checks.network("10.1.2.4", there, None)[1] == []


def test_where_a_rank_stands() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "2"}
    deepspeed = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "CROSS_RANK": "1"}
    places = [Place.from_environment(env) for env in (torchrun, deepspeed, {})]
    assert [place.node for place in places] == [2, 1, 0]
    assert [place.rank for place in places] == [5, 5, 0]
    assert [spelled(ranks) for ranks in ([3], [1, 2, 3], [0, 2])] == [
        "rank 3",
        "ranks 1-3",
        "ranks 0,2",
    ]


def test_the_majority_is_right_and_one_line_tells_what_all_share() -> None:
    reports = {
        rank: {"host": f"w{rank}", "node": rank, "facts": {"torch": "2.1" if rank == 0 else "2.2"}}
        for rank in range(3)
    }
    nodes = Nodes(reports)
    assert nodes.lines(nodes.differing()) == [
        "node 0 (w0), rank 0: versions: torch 2.1, but 2.2 on node 1 (w1)"
    ]
    assert nodes.lines({rank: ["no disk"] for rank in range(3)}) == ["every node: no disk"]
    assert nodes.missing(5, 9, "arrive") == ["ranks 3-4 did not arrive within 9 s"]


def test_the_command_for_one_process(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main([str(config_file), "--resume-or-start", "--local_rank=0"]) == 0
    assert capsys.readouterr().out.startswith("pre-flight, 1 node, 1 rank: python")
    assert main([str(config_file), "--resume-from", "tokens-000000000000256"]) == 0
    assert main([str(config_file), "modell.dim=3"]) == 2
    assert capsys.readouterr().err.startswith("error: node 0 (")
