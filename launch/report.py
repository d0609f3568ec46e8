"""From what every rank found to one table and one line for each problem, naming the node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from launch.checks import NONE

GIB = 1 << 30


class Nodes:
    """The machines of a launch, as their ranks described themselves.

    reports: of every rank that answered, its `host` and `node`; hosts: names of all machines in
    the order of ranks, where the launcher knows them, so that one that never came has a name.
    """

    def __init__(self, reports: dict[int, dict[str, Any]], hosts: list[str] | None = None) -> None:
        self.reports, self.hosts = reports, hosts or []
        self.ranks: dict[int, list[int]] = {}
        for rank, report in sorted(reports.items()):
            self.ranks.setdefault(report["node"], []).append(rank)

    def name(self, node: int) -> str:
        """A node with the name of its host."""
        return f"node {node} ({self.reports[self.ranks[node][0]]['host']})"

    def lines(self, found: dict[int, list[str]]) -> list[str]:
        """One line for every problem of `found` (by rank): the same one of several ranks is told
        once, with the node and the ranks; "every node" where each has it."""
        by_text: dict[str, list[int]] = {}
        for rank, problems in sorted(found.items()):
            for problem in problems:
                by_text.setdefault(problem, []).append(rank)
        lines = []
        for text, ranks in by_text.items():
            everywhere = all(any(rank in ranks for rank in own) for own in self.ranks.values())
            if everywhere and len(self.ranks) > 1:
                lines.append(f"every node: {text}")
                continue
            for node, own in self.ranks.items():
                if having := [rank for rank in own if rank in ranks]:
                    lines.append(f"{self.name(node)}, {spelled(having)}: {text}")
        return lines

    def differing(self) -> dict[int, list[str]]:
        """By rank, the facts in which it differs from most nodes, the first rank's where even."""
        problems: dict[int, list[str]] = {}
        for fact in sorted({name for report in self.reports.values() for name in report["facts"]}):
            values = {rank: report["facts"].get(fact) for rank, report in self.reports.items()}
            votes = Counter(values[own[0]] for own in self.ranks.values())
            most = max(votes.values())
            first = values[min(values)]
            usual = first if votes[first] == most else max(votes, key=lambda value: votes[value])
            having = next(node for node, own in self.ranks.items() if values[own[0]] == usual)
            for rank, value in values.items():
                if value not in (usual, None):
                    problems.setdefault(rank, []).append(
                        f"{kind_of_fact(fact)}: {fact} {value}, but {usual} on {self.name(having)}"
                    )
        return problems

    def missing(self, world_size: int, seconds: float, what: str) -> list[str]:
        """One line for every rank below world_size that did not answer, or for its whole node."""
        gone = [rank for rank in range(world_size) if rank not in self.reports]
        if not gone:
            return []
        told = f"did not {what} within {seconds:g} s"
        if not self.hosts or world_size % len(self.hosts):
            return [f"{spelled(gone)} {told}"]
        each = world_size // len(self.hosts)
        lines = []
        for node, host in enumerate(self.hosts):
            if own := [rank for rank in gone if rank // each == node]:
                lines.append(f"node {node} ({host}), {spelled(own)} {told}")
        return lines

    def table(self, found: dict[int, list[str]]) -> str:
        """What is the same everywhere, then a row for every node. found: problems by rank."""
        first = self.reports[min(self.reports)]
        facts = {name: value for name, value in first["facts"].items() if value != NONE}
        same = ", ".join(f"{name} {value}" for name, value in facts.items())
        head = ["node", "host", "ranks", "memory", "/dev/shm", "network", "device", "clock"]
        kinds = ["versions", "config", "data", "folder", "matmul", "collective"]
        rows = [head + kinds]
        for node, ranks in self.ranks.items():
            own = self.reports[ranks[0]]
            wrong = {problem.split(":")[0] for rank in ranks for problem in found.get(rank, [])}
            rows.append(
                [
                    str(node),
                    own["host"],
                    spelled(ranks).split()[1],
                    f"{own['memory'] / GIB:.1f} GiB",
                    f"{own['shared_memory'] / GIB:.2f} GiB",
                    own["network"],
                    own["device"],
                    _clock(own.get("clock")),
                    *("FAILED" if kind in wrong else "ok" for kind in kinds),
                ]
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        body = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        count = f"{_counted(len(self.ranks), 'node')}, {_counted(len(self.reports), 'rank')}"
        return "\n".join([f"pre-flight, {count}: {same}", *body])


def kind_of_fact(fact: str) -> str:
    """The column of the table that a fact belongs to."""
    return fact if fact in ("data", "config") else "versions"


def spelled(ranks: Iterable[int]) -> str:
    """'rank 3', 'ranks 0-3' or 'ranks 0,2'."""
    numbers = sorted(ranks)
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"ranks {numbers[0]}-{numbers[-1]}"
    return "ranks " + ",".join(map(str, numbers))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _clock(offset: list[float] | None) -> str:
    if offset is None:
        return "-"
    return f"{offset[0] * 1000:+.1f}±{offset[1] * 1000:.1f} ms"
