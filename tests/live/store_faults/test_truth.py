"""The campaign's judgement can fail: each planted fault is found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.events import Event, EventKind, Plain
from tests.live.store_faults.truth import (
    HandOver,
    Truth,
    lives_without_notice,
    numbering_faults,
    tells_loss,
    unrecorded,
)

A, B = "a" * 40, "b" * 40
MOVE = HandOver(slot=7, owner=B, begun_at=100.0, owned_at=100.2, ended_at=100.4)
TOLD = Event(EventKind.MIGRATION_COMPLETED, 101.0, "", slot_ranges=((5, 9),), seen_by="p-1", number=1)


def gap(kind: EventKind, since: float, until: float, **evidence: Plain) -> Event:
    name = "from" if kind is EventKind.OBSERVATION_GAP else "last_look_at"
    return Event(kind, until, "", evidence={name: since, **evidence}, seen_by="p-2", number=2)


@pytest.mark.parametrize(
    "event",
    [
        TOLD,
        replace(TOLD, kind=EventKind.MIGRATION_ADVANCED, at=100.1),
        gap(EventKind.OBSERVATION_GAP, 99.0, 100.1),
        gap(EventKind.OBSERVATION_GAP, 100.3, 110.0),
        gap(EventKind.DISCOVERER_CHANGED, 99.0, 105.0),
        replace(TOLD, kind=EventKind.RECORD_LOST, at=110.0, evidence={"from": None}),
        replace(TOLD, kind=EventKind.RECORD_LOST, at=110.0, evidence={"from": 100.0}),
    ],
)
def test_a_move_is_in_the_record_by_its_event_or_by_a_gap(event: Event) -> None:
    """A migration's event that names the slot in time, or a gap that overlaps the move."""
    assert unrecorded([MOVE], [event]) == []


@pytest.mark.parametrize(
    "event",
    [
        replace(TOLD, slot_ranges=((8, 9),)),
        replace(TOLD, at=99.9),  # it tells of an earlier move of the slot
        replace(TOLD, at=104.0),
        replace(TOLD, kind=EventKind.CLUSTER_SEEN),
        gap(EventKind.OBSERVATION_GAP, 90.0, 99.9),
        gap(EventKind.OBSERVATION_GAP, 100.5, 110.0),
        replace(gap(EventKind.DISCOVERER_CHANGED, 99.0, 105.0), evidence={}),
        replace(TOLD, kind=EventKind.RECORD_LOST, at=110.0, evidence={"from": 101.0}),
    ],
)
def test_a_move_that_is_not_in_the_record_is_found(event: Event) -> None:
    """Other slots, other times and other kinds do not excuse it."""
    assert unrecorded([MOVE], [event]) == [MOVE]


def test_only_maps_that_were_are_true() -> None:
    """A map counts while it held, and until the hand-over that ends it is known to all."""
    truth = Truth(
        (7, 8), (A, A), [MOVE, replace(MOVE, slot=8, begun_at=200.0, owned_at=200.2, ended_at=200.4)]
    )
    assert truth.are_owners((A, A), 50.0)
    assert truth.are_owners((A, A), 100.3)
    assert truth.are_owners((B, A), 100.3)
    assert truth.are_owners((B, B), 300.0)
    assert not truth.are_owners(("", A), 100.3)  # no slot is without an owner while it is handed over
    assert not truth.are_owners((A, ""), 100.3)
    assert not truth.are_owners((A, B), 300.0)  # it never was
    assert not truth.are_owners((B, A), 99.0)  # not yet
    assert not truth.are_owners((A, A), 150.0)  # not any more
    assert not truth.are_owners((B, A), 300.0)


def test_numbers_that_are_missing_doubled_or_not_counted_are_found() -> None:
    """The events are numbered 1, 2, 3 ... and the record's count is the last one's number."""
    events = [replace(TOLD, number=number) for number in (1, 2, 3)]
    assert numbering_faults(events, 3) == []
    assert numbering_faults([], 0) == []
    for wrong, count in (
        (events, 4),
        (events[:1] + events[2:], 3),
        (events[1:], 3),
        ([*events, events[2]], 4),
    ):
        assert numbering_faults(wrong, count)


def test_a_proxy_that_does_not_say_in_whose_place_it_looks_is_found() -> None:
    """Each life begins with the event that names the former proxy and its last look."""
    first = replace(gap(EventKind.DISCOVERER_CHANGED, 0.0, 1.0), evidence={}, seen_by="p-1")
    successor = gap(EventKind.DISCOVERER_CHANGED, 99.0, 105.0, former="p-1")
    assert lives_without_notice([first, TOLD, successor]) == []
    assert lives_without_notice([TOLD])
    assert lives_without_notice([first, TOLD, replace(TOLD, seen_by="p-2")])
    assert lives_without_notice([first, replace(successor, evidence={"former": "p-1"})])
    assert lives_without_notice([first, gap(EventKind.DISCOVERER_CHANGED, 99.0, 105.0, former="p-9")])


def test_a_loss_is_told_by_its_own_kind() -> None:
    """A gap is no confession that earlier events are gone."""
    assert tells_loss(replace(TOLD, kind=EventKind.RECORD_LOST))
    assert not tells_loss(gap(EventKind.OBSERVATION_GAP, 99.0, 105.0))
