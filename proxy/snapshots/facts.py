"""What operators and clients are told of snapshots."""

from __future__ import annotations

from dataclasses import dataclass

from routing.snapshot import SnapshotRecord


class SnapshotError(Exception):
    """What was asked for cannot be done. The text begins with its error code and says why and what to do."""


@dataclass(slots=True)
class Costs:
    """What one snapshot has cost this proxy's writes, and the cluster's memory by its count. Counted in place."""

    keys_preserved: int = 0
    bytes_preserved: int = 0  # as the nodes estimate the memory of the keys that were copied
    keys_too_large: int = 0  # marked x
    preserves: int = 0  # round trips that writes waited for
    preserve_seconds_sum: float = 0.0
    preserve_seconds_max: float = 0.0
    barrier_seconds: float | None = (
        None  # from the cut until it served; None: opened elsewhere or before a restart
    )


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """One snapshot now."""

    record: SnapshotRecord
    age_seconds: float
    costs: Costs
    warnings: tuple[str, ...] = ()  # what may make it worth less, one sentence each
