"""Dependencies point one way: hope <- train <- launch, tools; data_pipeline depends on none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = {"hope", "train", "tools", "data_pipeline", "launch", "tests"}
ALLOWED = {
    "hope": {"hope"},
    "data_pipeline": {"data_pipeline"},
    "train": {"train", "hope", "data_pipeline"},
    "launch": {"launch", "train", "hope", "data_pipeline"},
    "tools": {"tools", "train", "hope", "data_pipeline"},
}
FORBIDDEN_IN_HOPE = {"os", "io", "pathlib", "time", "pydantic", "yaml", "torch.distributed"}
COMPILES = {Path("hope/compile_cache.py"), Path("hope/native/build.py")}
"""Keeps what compilers made in the user's cache, as Triton does with its kernels; calls one."""


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = list(Path(room).rglob("*.py"))
    assert files
    for path in files:
        used = {name.split(".")[0] for name in imports_of(path)} & ROOMS
        assert used <= ALLOWED[room], path


def test_the_model_knows_no_files_clocks_or_ranks() -> None:
    for path in set(Path("hope").rglob("*.py")) - COMPILES:
        bad = {
            name
            for name in imports_of(path)
            for forbidden in FORBIDDEN_IN_HOPE
            if name == forbidden or name.startswith(forbidden + ".")
        }
        assert not bad, path


KERNELS = [*sorted(Path("hope/scan/kernels").glob("*.py")), Path("hope/fused/kernels.py")]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_what_a_kernel_is_given_it_reads(path: Path) -> None:
    """Each value of a constexpr is a kernel of its own, compiled for minutes."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            given = [argument.arg for argument in function.args.args]
            assert [name for name in given if name not in read] == [], function.name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("hope", ["pydantic", "yaml", "mlflow", "deepspeed", "megatron", "data_pipeline"]),
        ("data_pipeline", ["torch", "hope", "train"]),
        ("train.trainer", ["mlflow", "deepspeed", "megatron", "matplotlib"]),
    ],
)
def test_what_an_import_does_not_bring(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
