"""The campaign of snapshots as a table: one row for each engine and movement."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from tests.live.snapshots.campaign import Outcome
from tests.live.snapshots.checks import Check, Fault

COLUMNS = (
    "engine", "movement", "faults done", "slots moved", "opened", "not opened", "aborted", "survived", "reads",
    "refused", "lost", *[check.value for check in Check], "writes", "writes refused", "writes lost",
    *[fault.value for fault in Fault], "open ms p50", "open ms max", "swept s max",
)  # fmt: skip


def row_of(outcome: Outcome) -> dict[str, Any]:
    tally = outcome.tally
    row: dict[str, Any] = {
        "engine": outcome.engine,
        "movement": outcome.movement.value,
        "faults done": ", ".join(f"{count} {what}" for what, count in tally.faults_done.items()) or "none",
        "slots moved": outcome.hand_overs,
        "opened": tally.opened,
        "not opened": tally.opens_refused.total() + tally.opens_lost,
        "aborted": tally.ended,
        "survived": tally.survived,
        "reads": tally.reads,
        "refused": tally.reads_refused.total(),
        "lost": tally.reads_lost,
        "writes": tally.writes,
        "writes refused": tally.writes_refused.total(),
        "writes lost": tally.writes_lost,
        "open ms p50": round(1000 * median(tally.open_seconds), 1) if tally.open_seconds else "-",
        "open ms max": round(1000 * max(tally.open_seconds), 1) if tally.open_seconds else "-",
        "swept s max": round(max(tally.swept_seconds, default=0.0), 1),
    }
    row |= {check.value: tally.checked[check] for check in Check}
    row |= {fault.value: tally.faults[fault] for fault in Fault}
    return row


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown; columns in which nothing ever was are left out."""
    rows = [row_of(outcome) for outcome in outcomes]
    always = {"engine", "movement", "opened", "reads", "writes", *[check.value for check in Check]}
    columns = [
        name for name in COLUMNS if name in always or any(row[name] not in (0, "none") for row in rows)
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def remarks(outcome: Outcome) -> str:
    """One line of figures, what was missing, and examples of each fault."""
    tally = outcome.tally
    faults = ", ".join(f"{count} {fault.value}" for fault, count in tally.faults.items()) or "no fault"
    lines = [
        f"{outcome.engine}, {outcome.options.target.value}, moving {outcome.movement.value}, seed"
        f" {outcome.options.seed}: {tally.reads} reads of {tally.opened} snapshots in {outcome.seconds:.0f} s: {faults}"
    ]
    refusals = {
        "openings refused": tally.opens_refused,
        "reads refused": tally.reads_refused,
        "writes refused": tally.writes_refused,
    }
    lines += [f"  {what}: {dict(codes)}" for what, codes in refusals.items() if codes]
    lines += [f"  refused: {example}" for told in tally.refusals.values() for example in told]
    lines += [f"  too little: {words}" for words in outcome.missing]
    for fault, told in tally.examples.items():
        lines += [f"  {fault.value}: {example}" for example in told]
    return "\n".join(lines)


def as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        **row_of(outcome),
        "seed": outcome.options.seed,
        "target": outcome.options.target.value,
        "proxies": outcome.options.proxies,
        "seconds": outcome.seconds,
        "acts": outcome.acts,
        "missing": outcome.missing,
        "examples": {fault.value: told for fault, told in outcome.tally.examples.items()},
    }
