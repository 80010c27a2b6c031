"""The campaign's tables: rich where people look, Markdown everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.live.store_faults.campaign import Row
from tests.live.store_faults.kills import Kills

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, header, lines
NONE = "-"


def fault_table(rows: Sequence[Row]) -> Table:
    header = (
        "fault", "reads", "writes", "errors", "wrong", "longest ms before", "longest ms", "warned s", "ceased s",
        "integrity", "events", "gaps", "moves", "followed s", "promises",
    )  # fmt: skip
    lines = []
    for row in rows:
        name = f"{row.fault} ({row.remark})" if row.remark else row.fault
        if row.skipped:
            lines.append((name, *[NONE] * (len(header) - 2), f"skipped: {row.skipped}"))
            continue
        lines.append(
            (
                name,
                *map(str, (row.reads, row.writes, row.errors, row.wrong)),
                _number(row.pause_before_ms, 0),
                _number(row.pause_ms, 0),
                _number(row.warned_seconds, 2),
                _number(row.cleared_seconds, 2),
                row.integrity,
                *map(str, (row.events, row.gaps, row.moved)),
                _number(row.followed_seconds, 2),
                "; ".join(row.broken) or "kept",
            )
        )
    return "Faults of the topology store under traffic", header, lines


def kills_table(kills: Kills) -> Table:
    header = (
        "kills", "seed", "while serving", "that recorded", "reads", "writes", "wrong", "moves", "events",
        "nobody looked s", "right map within s", "promises",
    )  # fmt: skip
    line = (
        *map(
            str,
            (
                kills.count,
                kills.seed,
                kills.served,
                kills.discoverers,
                kills.reads,
                kills.writes,
                kills.wrong,
            ),
        ),
        *map(str, (kills.moved, kills.events)),
        _number(kills.gap_seconds, 1),
        _number(kills.slowest_right_seconds, 2),
        "; ".join(kills.broken) or "kept",
    )
    return "The proxy killed at random moments", header, [line]


def show(table: Table) -> None:
    """Print it."""
    title, header, lines = table
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table as RichTable

        drawn = RichTable(*header, title=title)
        for line in lines:
            drawn.add_row(*line, style=None if line[-1] == "kept" else "bold red")
        Console().print(drawn)
        return
    print(f"\n### {title}\n")
    for line in (header, ("---",) * len(header), *lines):
        print(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |")


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
