"""A campaign's figures as a table: one row for each engine and kind of move."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tests.live.campaign.campaign import MoveKind, Outcome
from tests.live.campaign.keys import FaultKind

COLUMNS = (
    "engine", "move", "slots moved", "reads", "writes", *[kind.value for kind in FaultKind],
    "p50 quiet", "p50 moving", "p99 quiet", "p99 moving", "ratio",
    "free p99 quiet", "free p99 moving", "free ratio",
    "free reads' ratio", "max moving", "load's delay p99",
)  # fmt: skip


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    """The figures of each kind of move; counts are of its quiet and moving stretches together."""
    rows = []
    for kind, moved in outcome.moved.items():
        quiet, moving = outcome.phase(kind, "quiet"), outcome.phase(kind, "moving")
        row: dict[str, Any] = {"engine": outcome.engine, "move": kind.value, "slots moved": moved}
        row |= {name: quiet[name] + moving[name] for name in ("reads", "writes")}
        row |= {fault.value: faults(outcome, kind)[fault] for fault in FaultKind}
        for rank in ("p50", "p99"):
            row |= {f"{rank} quiet": quiet["latency_ms"][rank], f"{rank} moving": moving["latency_ms"][rank]}
        row["ratio"] = round(row["p99 moving"] / row["p99 quiet"], 2)
        # Without EVAL, EXEC and what is pipelined: see workload.Phase.free_latencies.
        row["free p99 quiet"] = quiet["free_latency_ms"]["p99"]
        row["free p99 moving"] = moving["free_latency_ms"]["p99"]
        row["free ratio"] = round(row["free p99 moving"] / row["free p99 quiet"], 2)
        reads = [phase["free_read_latency_ms"]["p99"] for phase in (quiet, moving)]
        row["free reads' ratio"] = round(reads[1] / reads[0], 2)
        row["max moving"] = moving["latency_ms"]["max"]
        # How late the load itself ran: where this is near a p99, the machine was too busy to tell.
        row["load's delay p99"] = max(phase["own_delay_ms"]["p99"] for phase in (quiet, moving))
        rows.append(row)
    return rows


def faults(outcome: Outcome, kind: MoveKind) -> dict[FaultKind, int]:
    """How many of each fault were seen in the stretches of one kind of move."""
    phases = [outcome.phase(kind, name)["faults"] for name in ("quiet", "moving")]
    return {fault: sum(seen[fault.value] for seen in phases) for fault in FaultKind}


def table(outcomes: Sequence[Outcome]) -> str:
    """Columns in aligned text; latencies are in milliseconds."""
    cells = [list(COLUMNS)]
    cells += [[str(row[name]) for name in COLUMNS] for outcome in outcomes for row in rows_of(outcome)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    )


def remarks(outcome: Outcome) -> str:
    """What the table has no room for: examples of each fault, and what the target does not know."""
    lines = [
        f"{outcome.engine} through {outcome.target}: {outcome.load['keys']} keys,"
        f" {outcome.load['scans']} full scans, seed {outcome.load['seed']}"
    ]
    for label, refusal in outcome.load["unsupported"].items():
        lines.append(f"  left out: {label}: {refusal}")
    for kind, told in outcome.load["examples"].items():
        lines += [f"  {kind}: {example}" for example in told]
    return "\n".join(lines)


def as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        **dataclasses.asdict(outcome),
        "moved": {kind.value: count for kind, count in outcome.moved.items()},
        "table": rows_of(outcome),
    }
