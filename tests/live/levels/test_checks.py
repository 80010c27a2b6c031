"""The checker names each broken promise, and nothing else: shown on planted replies."""

from __future__ import annotations

import pytest

from routing.levels import Level
from tests.live.levels.checks import (
    NS_PER_MS,
    Bounded,
    Existing,
    Fault,
    Judgement,
    Key,
    Newest,
    Promise,
    Question,
    Session,
    judge,
    keys_in,
    shares,
    value_of,
)
from tests.live.levels.targets import ReadCounts, reads_in

KEY = b"level:{1}:0"
EVERY_PROMISE = [Newest(), Bounded(1000 * NS_PER_MS), Session(), Existing()]


def ms(count: float) -> int:
    return int(count * NS_PER_MS)


def written_at(*milliseconds: float) -> Key:
    """A key whose versions 1, 2, ... were acknowledged at these times."""
    key = Key(KEY)
    for at in milliseconds:
        key.begin_write(ms(at) - 1)
        key.acknowledge(ms(at))
    return key


def read(
    key: Key, version: int, promise: Promise, *, sent: float, answered: float | None = None
) -> Judgement:
    question = Question.of(key, ms(sent))
    return judge(question, value_of(key, version, 0), promise, ms(sent if answered is None else answered))


@pytest.mark.parametrize("promise", EVERY_PROMISE, ids=str)
def test_what_no_level_allows(promise: Promise) -> None:
    """Promise 1: nil for a key that exists; and values that nobody has sent, or that are another key's."""
    key = written_at(10, 20)
    question = Question.of(key, ms(30))
    other = value_of(Key(b"level:{1}:1"), 1, 0)
    assert judge(question, None, promise, ms(31)).fault is Fault.NIL
    for value in (value_of(key, 3, 0), other, b"", b"=2=0=", 7, [b"2"], KEY + b"=-1=0="):
        assert judge(question, value, promise, ms(31)).fault is Fault.WRONG, value
    assert judge(question, value_of(key, 2, 0), promise, ms(31)).fault is None


def test_the_newest_acknowledged_before_the_read_was_sent() -> None:
    """`strong` and `caught_up`: the version before it is stale; one that is still being written may show."""
    key = written_at(10, 20)
    assert read(key, 1, Newest(), sent=20).fault is Fault.STALE
    assert read(key, 2, Newest(), sent=20).fault is None
    question = Question.of(key, ms(25))
    key.begin_write(ms(26))
    assert judge(question, value_of(key, 3, 0), Newest(), ms(27)).fault is None
    key.acknowledge(ms(30))  # after the read was sent, so either version is right
    judged = judge(question, value_of(key, 2, 0), Newest(), ms(34))
    assert judged == Judgement(None, age_when_sent=0, age_when_answered=ms(4))


def test_superseded_for_longer_than_the_bound_when_sent() -> None:
    """`bounded_staleness`: what counts is when the successor was acknowledged, not the newest version."""
    key = written_at(10, 500, 900)
    promise = Bounded(ms(1000))
    assert read(key, 0, promise, sent=1010).fault is None  # superseded for 1000 ms exactly
    assert read(key, 0, promise, sent=1010.001).fault is Fault.OVER_BOUND
    assert read(key, 1, promise, sent=1010.001).fault is None
    assert read(key, 3, promise, sent=99_999).fault is None
    late = read(key, 1, promise, sent=1400, answered=1700)
    assert late == Judgement(None, age_when_sent=ms(900), age_when_answered=ms(1200))


def test_a_session_sees_what_it_wrote_and_does_not_go_back() -> None:
    """`session`: floors are its own; what others wrote may be missed until it was seen once."""
    key, promise = written_at(10, 20, 30), Session()
    assert read(key, 1, promise, sent=40).fault is None
    assert read(key, 2, promise, sent=41).fault is None
    assert read(key, 1, promise, sent=42).fault is Fault.WENT_BACK
    promise.wrote(key)  # version 3
    assert read(key, 2, promise, sent=43).fault is Fault.OWN_MISSED
    assert read(key, 3, promise, sent=44).fault is None
    assert read(key, 0, Session(), sent=45).fault is None


def test_writers_share_no_key() -> None:
    """One writer at a time: what the whole checker rests on. Each has keys in every slot."""
    keys = keys_in((0, 7000, 12000), 20)
    parts = list(shares(keys, 20))
    assert sorted(key.name for part in parts for key in part) == sorted(key.name for key in keys)
    assert all({key.slot for key in part} == {0, 7000, 12000} for part in parts)


def test_reads_are_counted_by_level_and_role() -> None:
    """The share of replicas is of the reads that asked for the level, whatever they were given."""
    page = "\n".join(
        [
            "# TYPE steadyread_reads_total counter",
            'steadyread_reads_total{asked="caught_up",given="caught_up",role="replica"} 80',
            'steadyread_reads_total{asked="caught_up",given="strong",role="primary"} 15',
            'steadyread_reads_total{asked="caught_up",given="caught_up",role="primary"} 5',
            'steadyread_reads_total{asked="strong",given="strong",role="primary"} 1000',
            "",
        ]
    )
    assert reads_in(page, Level.CAUGHT_UP) == ReadCounts(primary=20, replica=80)
    assert ReadCounts(20, 80).replica_share == 0.8
    assert reads_in(page, Level.SESSION) == ReadCounts()
    assert ReadCounts().replica_share is None
    assert reads_in("", Level.CAUGHT_UP) is None
