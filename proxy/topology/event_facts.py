"""An event of the timeline as the plain facts that everyone outside gets: JSON of the admin port, hooks, the CLI.

One form for all of them, so that what a hook was told can be found again with ``events``. Does no I/O.
"""

from __future__ import annotations

from datetime import UTC, datetime

from routing.timeline import Event


def facts_of_event(event: Event) -> dict[str, object]:
    """``event`` for JSON. Slot ranges are inclusive [first, last] pairs; ``migration`` is null without one."""
    return {
        "number": event.number,
        "kind": event.kind.value,
        "at": rfc3339(event.at),
        "epoch": event.epoch,
        "message": event.message,
        "nodes": list(event.nodes),
        "shards": list(event.shards),
        "slot_ranges": [list(pair) for pair in event.slot_ranges],
        "migration": event.migration or None,
        "evidence": dict(event.evidence),
        "seen_by": event.seen_by,
    }


def rfc3339(at: float) -> str:
    """Unix seconds as UTC to the millisecond: ``2026-03-01T12:00:00.250Z``."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
