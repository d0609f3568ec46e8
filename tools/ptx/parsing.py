"""PTX text -> instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

LABEL = re.compile(r"^([$\w]+):$")
STATEMENT = re.compile(r"^(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+\.global\s+\.align\s+\d+\s+)?(\w+)")


@dataclass(frozen=True)
class Instruction:
    """One statement. predicate: the register that says which threads take part ("" for all), and
    `negated` whether it is those where it is false. operands: registers, numbers, "[address]" or
    "{a, b}", as they are written."""

    name: str
    operands: tuple[str, ...]
    predicate: str
    negated: bool
    line: int
    source: str

    def where(self) -> str:
        """The instruction for an error."""
        return f"line {self.line} ({self.source}): {self.name} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Kernel:
    """A kernel of a PTX file: parameters (name, type), statements, and where labels point."""

    parameters: tuple[tuple[str, str], ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    threads: int


def split_operands(text: str) -> tuple[str, ...]:
    """Operands at the commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return tuple(part for part in parts if part)


def parse(text: str) -> Kernel:
    """The one kernel of a PTX file as LLVM writes it.

    Raises ValueError for more than one kernel, and for what is no statement.
    """
    if text.count(".entry") != 1:
        raise ValueError(f"{text.count('.entry')} kernels in a PTX file, not one")
    head, body = text[text.index(".entry") :].split("\n{", 1)
    parameters = tuple((name, kind) for kind, name in PARAMETER.findall(head))
    threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])  # type: ignore[index]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    first = text[: text.index(body)].count("\n") + 1
    source, pending = "", ""
    for number, raw in enumerate(body.splitlines(), first):
        code, _, comment = raw.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            source = comment.strip().split(" ")[0]
            continue
        if not pending and (not code or code[0] in ".{}"):
            if code.startswith("."):
                if code.startswith((".section", ".file")):
                    break
                continue
            code = code.strip("{} \t")
            if not code:
                continue
        if label := LABEL.match(code):
            labels[label[1]] = len(instructions)
            continue
        pending = f"{pending} {code}".strip()
        while ";" in pending:
            statement, _, pending = (part.strip() for part in pending.partition(";"))
            found = STATEMENT.match(statement)
            if found is None:
                raise ValueError(f"line {number}: {statement!r} is no PTX statement")
            negated, predicate, name, rest = found.groups()
            operands = split_operands(rest)
            instructions.append(
                Instruction(name, operands, predicate or "", bool(negated), number, source)
            )
    return Kernel(parameters, tuple(instructions), labels, threads)
