"""What must hold of the snapshot settings beyond the limits of single options. Pure: it looks at values."""

from __future__ import annotations

from collections.abc import Iterator

from proxy.settings.fault import Fault
from proxy.settings.positions import Path
from proxy.settings.values import SnapshotSettings


def snapshot_faults(snapshots: SnapshotSettings) -> Iterator[Fault]:
    """All that is wrong with them, in the order of the options."""
    place: Path = ("snapshots",)
    if snapshots.drain_seconds > snapshots.open_deadline_seconds:
        yield Fault(
            (*place, "drain_seconds"),
            snapshots.drain_seconds,
            f"give at most snapshots.open_deadline_seconds, which is {snapshots.open_deadline_seconds:g}: "
            "it is for one attempt of an opening",
            also=(*place, "open_deadline_seconds"),
        )
    if snapshots.hold_seconds >= snapshots.member_ttl_seconds:
        yield Fault(
            (*place, "hold_seconds"),
            snapshots.hold_seconds,
            f"give less than snapshots.member_ttl_seconds, which is {snapshots.member_ttl_seconds:g}: "
            "a proxy that is gone must not hold the writes of all others",
            also=(*place, "member_ttl_seconds"),
        )
    limit = snapshots.age_seconds_max
    if limit and snapshots.ttl_seconds > limit:
        yield Fault(
            (*place, "ttl_seconds"),
            snapshots.ttl_seconds,
            f"give at most snapshots.age_seconds_max, which is {limit:g}: "
            "a snapshot is over its budget at that age, before it would be closed",
            also=(*place, "age_seconds_max"),
        )
