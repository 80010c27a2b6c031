"""A snapshot as the plain facts that everyone outside gets: JSON of the admin port, STEADY.SNAPSHOT, the CLI."""

from __future__ import annotations

from proxy.snapshots.facts import SnapshotFacts
from proxy.topology.event_facts import rfc3339


def shown(facts: SnapshotFacts) -> dict[str, object]:
    """What the snapshot is, then what it has cost this proxy's writes."""
    record, costs = facts.record, facts.costs
    mean = costs.preserve_seconds_sum / costs.preserves if costs.preserves else None
    return {
        "id": record.id,
        "name": record.name or None,
        "state": record.state.value,
        "opened_at": rfc3339(record.opened_at),
        "age_seconds": facts.age_seconds,
        "expires_at": None if record.expires_at is None else rfc3339(record.expires_at),
        "epoch": record.epoch,
        "reason": record.reason or None,  # why it was aborted
        "opened_by": record.owner or None,  # a proxy
        "keys_preserved": costs.keys_preserved,
        "bytes_preserved": costs.bytes_preserved,
        "keys_too_large": costs.keys_too_large,
        "preserves": costs.preserves,
        "preserve_seconds_mean": mean,
        "preserve_seconds_max": costs.preserve_seconds_max if costs.preserves else None,
        "barrier_seconds": costs.barrier_seconds,
        "warnings": list(facts.warnings),
    }
