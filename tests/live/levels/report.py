"""The campaign of the levels as a table: one row for each engine, level and movement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.live.levels.campaign import Outcome
from tests.live.levels.checks import NS_PER_MS, Fault

COLUMNS = (
    "engine", "level", "movement", "slots moved", "reads", "writes", *[fault.value for fault in Fault],
    "ms old when sent", "ms old when answered", "by replicas healthy", "by replicas cut",
    "p50 ms", "p99 ms", "p99 ms healthy", "load's delay p99 ms", "links down", "lag kB",
)  # fmt: skip


def faults(outcome: Outcome) -> dict[Fault, int]:
    """Of both phases."""
    return {fault: outcome.healthy.faults[fault] + outcome.cut.faults[fault] for fault in Fault}


def row_of(outcome: Outcome) -> dict[str, Any]:
    """Reads, writes, ages and latencies are of the phase with cut links; faults of both. The ages are the largest."""
    cut, healthy = outcome.cut.summary(), outcome.healthy.summary()
    row: dict[str, Any] = {
        "engine": outcome.engine,
        "level": outcome.level.value,
        "movement": outcome.movement.value,
        "slots moved": outcome.hand_overs,
        "reads": cut["reads"],
        "writes": cut["writes"],
    }
    row |= {fault.value: count for fault, count in faults(outcome).items()}
    row["ms old when sent"] = round(outcome.cut.age_when_sent_max / NS_PER_MS)
    row["ms old when answered"] = round(outcome.cut.age_when_answered_max / NS_PER_MS)
    row["by replicas healthy"] = _percent(outcome.healthy_share)
    row["by replicas cut"] = _percent(outcome.cut_share)
    row["p50 ms"] = cut["latency_ms"].get("p50", "-")
    row["p99 ms"] = cut["latency_ms"].get("p99", "-")
    row["p99 ms healthy"] = healthy["latency_ms"].get("p99", "-")
    # How late the load itself ran: where this is near a p99, the machine was too busy to tell.
    row["load's delay p99 ms"] = cut["own_delay_ms"].get("p99", "-")
    row["links down"] = _percent(outcome.links.down_share)
    row["lag kB"] = outcome.links.lag_bytes_max // 1000
    return row


def _percent(share: float | None) -> str:
    return "not counted" if share is None else f"{share:.1%}"


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row_of(o)[name]) for name in COLUMNS) + " |" for o in outcomes]
    return "\n".join(lines)


def remarks(outcome: Outcome) -> str:
    """What the table has no room for: what was done to the links, and examples of each fault."""
    links, cut, healthy = outcome.links, outcome.cut, outcome.healthy
    lines = [
        f"{outcome.engine}, {outcome.level.value} through {outcome.target}, moving {outcome.movement.value}:"
        f" {links.cuts} cuts, {links.partial_syncs} partial and {links.full_syncs} full resynchronisations,"
        f" {cut.reconnects} sessions taken up by token ({cut.door_changes} at another proxy),"
        f" {healthy.writes / max(healthy.seconds, 0.001):.0f} writes a second while links were healthy,"
        f" {outcome.uncertain} keys given up"
    ]
    for phase, tally in (("healthy", healthy), ("cut", cut)):
        for fault, told in tally.examples.items():
            lines += [f"  {phase}: {fault.value}: {example}" for example in told]
    return "\n".join(lines)
