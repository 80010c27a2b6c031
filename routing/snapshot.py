"""A snapshot's record: what must be known of it on any proxy, and after any of them died.

    opening -> serving -> closing -> closed
       `----------`----------`-----> aborted

Nothing leaves ``closed`` or ``aborted``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum


class SnapshotState(Enum):
    OPENING = "opening"  # writes are preserved, and the barrier is not complete: no reads yet
    SERVING = "serving"
    CLOSING = "closing"  # no new readers
    CLOSED = "closed"  # what was preserved may be swept
    ABORTED = "aborted"  # its readers are refused; what was preserved may be swept


_NEXT: Mapping[SnapshotState, frozenset[SnapshotState]] = {
    SnapshotState.OPENING: frozenset({SnapshotState.SERVING, SnapshotState.ABORTED}),
    SnapshotState.SERVING: frozenset({SnapshotState.CLOSING, SnapshotState.ABORTED}),
    SnapshotState.CLOSING: frozenset({SnapshotState.CLOSED, SnapshotState.ABORTED}),
    SnapshotState.CLOSED: frozenset(),
    SnapshotState.ABORTED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Floor:
    """The offset, within one replication history, that a replica must have applied."""

    replid: str
    offset: int


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One snapshot. Ids are increasing integers."""

    id: int
    state: SnapshotState
    opened_at: float  # Unix seconds
    name: str = ""
    expires_at: float | None = None  # Unix seconds
    epoch: int = 0  # the cluster's, at the barrier
    floors: Mapping[str, Floor] = field(default_factory=dict)  # id of a primary at the barrier -> its floor
    reason: str = ""  # why it was aborted

    def moved_to(self, state: SnapshotState, reason: str = "") -> SnapshotRecord:
        """The record in its next state. Raises ValueError if that does not follow."""
        if state not in _NEXT[self.state]:
            raise ValueError(f"snapshot {self.id} is {self.state.value}, and cannot become {state.value}")
        return replace(self, state=state, reason=reason)
