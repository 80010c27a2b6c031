"""What really happened to the slots, and what the record owes to it. Decisions only: no I/O, no clock.

The promise: what the cluster did is in the record, as an event of its own or within a gap that an event names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from routing.events import Event, EventKind

Owners = tuple[str, ...]  # the node id of the owner of each moved slot, in the order of the slots

TOLD_SECONDS = 2.5  # from the end of a hand-over to its event, on a busy machine
LOOK_SECONDS = 0.3  # the time of a look is that of its end, and nodes may have answered so long before
SEEN_SECONDS = 1.0  # a look may have begun so long before the map that it led to was recorded


@dataclass(frozen=True, slots=True)
class HandOver:
    """One slot changed hands. Times are Unix seconds."""

    slot: int
    owner: str  # node id of the new one
    begun_at: float
    owned_at: float  # the new owner calls it its own
    ended_at: float  # every node agrees

    def __str__(self) -> str:
        return f"slot {self.slot}'s move to {self.owner[:8]} from {self.begun_at:.2f} to {self.ended_at:.2f}"


@dataclass(slots=True)
class Truth:
    """Who owned the slots that are moved, from the beginning on."""

    slots: tuple[int, ...]
    owners: Owners
    hand_overs: list[HandOver] = field(default_factory=list)

    def are_owners(self, owners: Owners, at: float) -> bool:
        """Whether some node of the cluster could tell this map in the time before ``at`` that a look may take."""
        state = self.owners
        since = float("-inf")
        for hand_over in self.hand_overs:
            place = self.slots.index(hand_over.slot)
            is_recent = since <= at and hand_over.ended_at >= at - SEEN_SECONDS
            if is_recent and owners == state:
                return True
            state = (*state[:place], hand_over.owner, *state[place + 1 :])
            since = hand_over.begun_at
        return state == owners and since <= at

    def told(self, owners: Owners, at: float) -> str:
        """A map beside the hand-overs around that time, for people."""
        near = [
            f"{move.slot} to {move.owner[:4]} from {move.begun_at - at:+.3f} to {move.ended_at - at:+.3f}"
            for move in self.hand_overs
            if abs(move.begun_at - at) < 2 * SEEN_SECONDS
        ]
        return f"{[owner[:4] for owner in owners]}, and {near}"

    def within(self, begun_at: float, ended_at: float) -> list[HandOver]:
        """Those that began and ended in this time."""
        return [move for move in self.hand_overs if begun_at <= move.begun_at and move.ended_at <= ended_at]


def unrecorded(hand_overs: Iterable[HandOver], events: Sequence[Event]) -> list[HandOver]:
    """Those of which no event tells, and which fall into no gap that an event names."""
    gaps = [gap for event in events if (gap := gap_of(event)) is not None]
    return [
        move
        for move in hand_overs
        if not any(_tells(event, move) for event in events)
        and not any(since <= move.ended_at and move.begun_at <= until for since, until in gaps)
    ]


def _tells(event: Event, move: HandOver) -> bool:
    return (
        event.kind.value.startswith("migration_")
        and any(low <= move.slot <= high for low, high in event.slot_ranges)
        and move.begun_at <= event.at <= move.ended_at + TOLD_SECONDS
    )


def gap_of(event: Event) -> tuple[float, float] | None:
    """From when to when nothing was recorded, by this event; None if it says nothing of the kind."""
    if event.kind is EventKind.RECORD_LOST and event.evidence["from"] is None:
        return float("-inf"), event.at
    if event.kind in (EventKind.OBSERVATION_GAP, EventKind.RECORD_LOST):
        since = event.evidence.get("from")
    elif event.kind is EventKind.DISCOVERER_CHANGED:
        since = event.evidence.get("last_look_at")
    else:
        return None
    if not isinstance(since, int | float):
        return None
    if event.kind is not EventKind.OBSERVATION_GAP:
        since -= LOOK_SECONDS
    return since, event.at


def tells_loss(event: Event) -> bool:
    """Whether it says that what was recorded before is gone."""
    return event.kind is EventKind.RECORD_LOST


def numbering_faults(events: Sequence[Event], event_count: int) -> list[str]:
    """What is wrong with the numbers: they go 1, 2, 3 ... up to what the record says it holds."""
    numbers = [event.number for event in events]
    if numbers != list(range(1, event_count + 1)):
        return [f"the record counts {event_count} events, and their numbers are {numbers}"]
    return []


def lives_without_notice(events: Sequence[Event]) -> list[str]:
    """Proxies whose first event is not the one that says in whose place they look, and since when nobody did."""
    faults = []
    former = ""
    for event in events:
        if event.seen_by == former:
            continue
        if event.kind is not EventKind.DISCOVERER_CHANGED:
            faults.append(f"the first event of {event.seen_by}, {event.number}, is {event.kind.value}")
        elif former and (event.evidence.get("former") != former or gap_of(event) is None):
            faults.append(f"{event.seen_by} does not say since when nobody looked after {former}")
        former = event.seen_by
    return faults
