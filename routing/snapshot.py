"""A snapshot's record, and the rules of the protocol: which snapshot a write preserves for, which markers a read asks.

    opening -> serving -> closing -> closed
       `----------`----------`-----> aborted

Nothing leaves ``closed`` or ``aborted``. docs/decisions/0009-snapshots.md has the argument for the chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum


class SnapshotState(Enum):
    OPENING = "opening"  # no reads yet; once cut, writes are preserved
    SERVING = "serving"
    CLOSING = "closing"  # no new readers
    CLOSED = "closed"  # what was preserved may be swept, unless an older snapshot counts on it
    ABORTED = "aborted"  # its readers are refused; the same


_NEXT: Mapping[SnapshotState, frozenset[SnapshotState]] = {
    SnapshotState.OPENING: frozenset({SnapshotState.SERVING, SnapshotState.ABORTED}),
    SnapshotState.SERVING: frozenset({SnapshotState.CLOSING, SnapshotState.ABORTED}),
    SnapshotState.CLOSING: frozenset({SnapshotState.CLOSED, SnapshotState.ABORTED}),
    SnapshotState.CLOSED: frozenset(),
    SnapshotState.ABORTED: frozenset(),
}

OPEN_STATES = frozenset({SnapshotState.OPENING, SnapshotState.SERVING, SnapshotState.CLOSING})


@dataclass(frozen=True, slots=True)
class Floor:
    """The offset, within one replication history, that a node must have to be asked."""

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
    floors: Mapping[str, Floor] = field(
        default_factory=dict
    )  # replication id of a primary at the barrier -> its floor
    reason: str = ""  # why it was aborted
    owner: str = ""  # the proxy that opens it
    is_cut: bool = False  # writes are, or were, preserved for it

    @property
    def is_open(self) -> bool:
        return self.state in OPEN_STATES

    def moved_to(self, state: SnapshotState, reason: str = "") -> SnapshotRecord:
        """The record in its next state. Raises ValueError if that does not follow."""
        if state not in _NEXT[self.state]:
            raise ValueError(f"snapshot {self.id} is {self.state.value}, and cannot become {state.value}")
        return replace(self, state=state, reason=reason)


@dataclass(frozen=True, slots=True)
class Chain:
    """The ids whose data is kept, ascending: cut, and open or newer than an open one."""

    ids: tuple[int, ...] = ()

    @property
    def newest(self) -> int:
        """The id that writes preserve for; 0: they need not."""
        return self.ids[-1] if self.ids else 0

    def markers_of(self, snapshot_id: int) -> tuple[int, ...]:
        """The ids whose markers a read at ``snapshot_id`` asks; the first that exists decides."""
        return self.ids[self.ids.index(snapshot_id) :]


def chain_of(records: Iterable[SnapshotRecord]) -> Chain:
    """The chain that these records make, in any order.

    The data of a closed or aborted snapshot is kept while an older one is open, because writes since its cut were
    preserved for it and not for the older one.
    """
    cut = sorted((record for record in records if record.is_cut), key=lambda record: record.id)
    for place, record in enumerate(cut):
        if record.is_open:
            return Chain(tuple(kept.id for kept in cut[place:]))
    return Chain()


EMPTY_CHAIN = Chain()
