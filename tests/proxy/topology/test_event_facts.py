import json

from proxy.topology.event_facts import facts_of_event, rfc3339
from routing.timeline import Event, EventKind


def test_every_field_of_an_event_is_told_and_survives_json() -> None:
    """What stands in an event reaches those who read JSON, under fixed names."""
    event = Event(
        EventKind.MIGRATION_ADVANCED,
        1_772_366_400.25,
        "slots 5-6 moved",
        epoch=9,
        nodes=("n1", "n2"),
        shards=("s1",),
        slot_ranges=((5, 6),),
        migration="m-1",
        evidence={"moved": 2},
        seen_by="proxy-a",
        number=42,
    )
    assert json.loads(json.dumps(facts_of_event(event))) == {
        "number": 42,
        "kind": "migration_advanced",
        "at": "2026-03-01T12:00:00.250Z",
        "epoch": 9,
        "message": "slots 5-6 moved",
        "nodes": ["n1", "n2"],
        "shards": ["s1"],
        "slot_ranges": [[5, 6]],
        "migration": "m-1",
        "evidence": {"moved": 2},
        "seen_by": "proxy-a",
    }


def test_an_event_without_a_migration_says_null() -> None:
    """No migration is null, so that nobody takes an empty text for an id."""
    assert facts_of_event(Event(EventKind.FAILOVER, 0.0, "x"))["migration"] is None


def test_a_whole_second_shows_its_milliseconds() -> None:
    """All times have one width, so that their order as texts is their order in time."""
    assert rfc3339(1_772_366_400.0) == "2026-03-01T12:00:00.000Z"
