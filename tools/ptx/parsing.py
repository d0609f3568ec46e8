"""PTX text -> instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

LABEL = re.compile(r"^([$\w]+):$")
STATEMENT = re.compile(r"^(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
PARAMETER = re.compile(
    r"\.param\s+\.(?!align)(\w+)\s+(?:\.ptr\s+\.global\s+\.align\s+\d+\s+)?(\w+)"
)

ANY = r"\w+"
STRUCTURE = re.compile(r"\.param\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\d+\]")


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
    """A kernel of a PTX file: parameters (name, type; "bytes" of a structure), statements, and
    where labels point."""

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


def parse(text: str, name: str = "") -> Kernel:
    """A kernel of a PTX file as LLVM writes it: the one of that name, or the only one.

    Raises ValueError where there is no such kernel, or there are several, and for what is no
    statement.
    """
    starts = [at.start() for at in re.finditer(rf"\.entry\s+{name or ANY}\b", text)]
    if len(starts) != 1:
        raise ValueError(f"{len(starts)} kernels in a PTX file, not one")
    head, body = text[starts[0] :].split("\n{", 1)
    body = body.split("\n}", 1)[0]
    parameters = tuple((name, kind) for kind, name in PARAMETER.findall(head))
    parameters += tuple((name, "bytes") for name in STRUCTURE.findall(head))
    threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", head)[1])  # type: ignore[index]
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
