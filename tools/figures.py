"""Where benchmarks leave their figures: runs/bench/NAME.json, with fixed keys."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path

BENCH = Path("runs/bench")


def write_figures(name: str, figures: dict[str, float]) -> Path:
    """Save {"name", "machine", "date", "figures"} and return where."""
    path = BENCH / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "date": datetime.date.today().isoformat(),
        "figures": figures,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def add_figures(name: str, figures: dict[str, float]) -> Path:
    """`write_figures`, keeping what other benchmarks have left under other keys."""
    path = BENCH / f"{name}.json"
    before = json.loads(path.read_text())["figures"] if path.exists() else {}
    return write_figures(name, {**before, **figures})


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        aligned = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
