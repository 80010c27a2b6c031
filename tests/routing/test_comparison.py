"""What three answers say of a key, when a round counts, and which keys make a mismatch."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.comparison import (
    MEMBERS_MAX,
    STRING_BYTES_MAX,
    Finding,
    Outcome,
    Refused,
    Rounds,
    Subject,
    Told,
    Verdict,
    find,
    is_between,
    told,
)
from routing.offsets import NO_POINT, Point, Sample

ONE, TWO = Told((1, b"one")), Told((1, b"two"))
GONE = Told()
MOVED, ASK = Told(refusal="MOVED 1 node:1"), Told(refusal="ASK 1 node:1")
PASSING = Told((1, b"one"), has_lifetime=True)
OTHER_TYPE = Told((Refused("WRONGTYPE of another kind"),), has_other_type=True)


@pytest.mark.parametrize(
    ("first", "middle", "last", "finding"),
    [
        (ONE, ONE, ONE, Finding.EQUAL),
        (ONE, TWO, ONE, Finding.DIFFERS),
        (ONE, GONE, ONE, Finding.DIFFERS),
        (GONE, ONE, GONE, Finding.DIFFERS),
        (ONE, OTHER_TYPE, ONE, Finding.DIFFERS),
        (ONE, TWO, TWO, Finding.CHANGED),
        (ONE, ONE, GONE, Finding.CHANGED),
        (OTHER_TYPE, OTHER_TYPE, OTHER_TYPE, Finding.CHANGED),
        (GONE, GONE, GONE, Finding.ABSENT),
        (ONE, MOVED, ONE, Finding.REFUSED),
        (ASK, ONE, ASK, Finding.REFUSED),
        (ONE, ONE, MOVED, Finding.REFUSED),
        (MOVED, TWO, MOVED, Finding.ELSEWHERE),
        (PASSING, GONE, PASSING, Finding.EXPIRING),
        (PASSING, GONE, ONE, Finding.EXPIRING),
        (ONE, GONE, PASSING, Finding.EXPIRING),
        (GONE, PASSING, GONE, Finding.EXPIRING),
        (PASSING, TWO, PASSING, Finding.DIFFERS),
        (PASSING, ONE, PASSING, Finding.EQUAL),
    ],
)
def test_what_the_answers_say(first: Told, middle: Told, last: Told, finding: Finding) -> None:
    assert find(first, middle, last) is finding


@pytest.mark.parametrize(
    ("type_", "one", "other"),
    [
        (b"set", [2, [b"a", b"b"]], [2, [b"b", b"a"]]),
        (b"hash", [2, [b"f", b"1", b"g", b"2"]], [2, [b"g", b"2", b"f", b"1"]]),
        (b"zset", [1, [b"a", b"0.10000000000000001"]], [1, [b"a", b"0.1"]]),
        (b"zset", [1, [b"a", b"inf"]], [1, [b"a", b"inf"]]),
    ],
)
def test_order_and_writing_make_no_difference(type_: bytes, one: list[Any], other: list[Any]) -> None:
    subject = Subject(b"k", type_)
    assert told(subject, [*one, -1]) == told(subject, [*other, -1])
    assert told(subject, [*one, 500]).has_lifetime


@pytest.mark.parametrize(
    ("type_", "one", "other"),
    [
        (b"list", [2, [b"a", b"b"]], [2, [b"b", b"a"]]),
        (b"hash", [2, [b"f", b"1", b"g", b"2"]], [2, [b"f", b"2", b"g", b"1"]]),
        (b"zset", [2, [b"a", b"1", b"b", b"1"]], [2, [b"a", b"1", b"b", b"2"]]),
        (b"string", [3, b"abc"], [4, b"abc"]),
        (b"string", [3, b"abc"], [Refused("WRONGTYPE"), Refused("WRONGTYPE")]),
        (b"ReJSON-RL", [b"ReJSON-RL"], [b"string"]),
    ],
)
def test_what_differs_is_told_apart(type_: bytes, one: list[Any], other: list[Any]) -> None:
    subject = Subject(b"k", type_)
    answers = [told(subject, [*values, -1]) for values in (one, other)]
    assert answers[0].value != answers[1].value
    assert not any(answer.refusal for answer in answers)
    assert find(answers[0], answers[1], answers[0]) is Finding.DIFFERS


def test_a_key_whose_lifetime_ended_is_gone_and_a_refusal_is_no_value() -> None:
    subject = Subject(b"k")
    assert told(subject, [0, b"", -2]) == GONE
    assert told(subject, [3, Refused("TRYAGAIN later"), -1]) == Told(refusal="TRYAGAIN later")
    assert told(subject, [3, b"abc", Refused("NOPERM")]).refusal


@pytest.mark.parametrize("type_", [b"string", b"list", b"set", b"hash", b"zset", b"stream", b"module"])
def test_questions_are_bounded(type_: bytes) -> None:
    """Of a large value only the length is asked, and of a string its beginning."""
    small, large = (Subject(b"k", type_, is_whole).questions() for is_whole in (True, False))
    assert large[-1] == small[-1] == (b"PTTL", b"k")
    if type_ == b"string":
        assert large == small
        assert small[1] == (b"GETRANGE", b"k", 0, STRING_BYTES_MAX - 1)
    else:
        assert len(large) == 2
    if type_ in (b"list", b"zset"):
        assert small[1][3] == MEMBERS_MAX - 1


offsets = st.integers(0, 3)


@given(offsets, offsets, offsets, offsets, st.sampled_from([b"a", b"b"]), st.sampled_from([b"a", b"b"]))
def test_a_round_counts_only_between_two_states_of_one_history(
    p1: int, r1: int, r2: int, p2: int, of_r: bytes, of_p2: bytes
) -> None:
    def sample(is_primary: bool, replid: bytes, offset: int) -> Sample:
        return Sample(is_primary, Point(replid, offset), NO_POINT)

    counts = is_between(
        sample(True, b"a", p1), sample(False, of_r, r1), sample(False, of_r, r2), sample(True, of_p2, p2)
    )
    assert counts == (p1 <= r1 <= r2 <= p2 and of_r == of_p2 == b"a")


def test_a_round_with_a_replica_that_synchronises_counts_not() -> None:
    primary, replica = Sample(True, Point(b"a", 5), NO_POINT), Sample(False, Point(b"a", 5), NO_POINT)
    assert is_between(primary, replica, replica, primary)
    assert not is_between(primary, replica._replace(is_syncing=True), replica, primary)
    assert not is_between(primary, replica, replica._replace(is_syncing=True), primary)
    assert not is_between(replica, replica, replica, primary)
    assert not is_between(primary, primary, primary, primary)


Answers = tuple[Told, Told, Told]
EQUAL, DIFFERS, CHANGED = (ONE, ONE, ONE), (ONE, TWO, ONE), (ONE, TWO, TWO)


def outcome_of(*rounds_of: dict[bytes, Answers], suspects: tuple[bytes, ...] = ()) -> Outcome:
    rounds = Rounds(rounds_of[0], suspects)
    for answers in rounds_of:
        assert set(rounds.keys) == set(answers)
        rounds.note(answers)
    assert rounds.keys == ()
    return rounds.outcome()


def test_only_what_differs_three_times_in_the_same_way_is_a_mismatch() -> None:
    key, other = b"k", b"other"
    differs = {key: DIFFERS}
    assert outcome_of({**differs, other: EQUAL}, differs, differs) == Outcome(equal=1, mismatched=(key,))
    assert outcome_of(differs, {key: EQUAL}) == Outcome(equal=1)
    assert outcome_of(differs, differs, {key: CHANGED}) == Outcome(undecided=1)
    for toggled in ((TWO, ONE, TWO), (ONE, GONE, ONE)):
        assert outcome_of(differs, {key: toggled}) == Outcome(undecided=1)
    assert outcome_of(differs, differs, {key: (TWO, ONE, TWO)}).verdict is Verdict.UNDECIDED


def test_what_was_gone_proves_nothing_but_for_a_suspect() -> None:
    gone = {b"k": (GONE, GONE, GONE)}
    assert outcome_of(gone) == Outcome(undecided=1)
    assert outcome_of(gone, suspects=(b"k",)) == Outcome(equal=1)


def test_suspects_must_be_decided_unless_their_slot_went_elsewhere() -> None:
    equal = {b"fine": EQUAL}
    changed = outcome_of({b"k": CHANGED, **equal}, suspects=(b"k",))
    assert (changed.verdict, changed.open_suspects) == (Verdict.UNDECIDED, 1)
    assert outcome_of({b"k": EQUAL, **equal}, suspects=(b"k",)).verdict is Verdict.EQUAL
    assert outcome_of({b"k": (MOVED, ONE, MOVED), **equal}, suspects=(b"k",)).verdict is Verdict.EQUAL
    assert outcome_of({b"k": (ASK, ONE, ASK), **equal}, suspects=(b"k",)).verdict is Verdict.UNDECIDED


def test_an_empty_primary_is_verified_and_one_that_showed_no_equal_key_is_not() -> None:
    assert Rounds((), ()).outcome(is_empty=True).verdict is Verdict.EQUAL
    assert Rounds((), ()).outcome().verdict is Verdict.UNDECIDED
    assert outcome_of({b"a": CHANGED, b"b": CHANGED}).why_undecided() == (
        "all of 2 keys changed meanwhile, or could not be asked"
    )
    assert Outcome(equal=9, problem="it was cut").verdict is Verdict.UNDECIDED


def test_a_key_that_was_not_asked_is_undecided() -> None:
    rounds = Rounds((b"a", b"b", b"a"), (b"b",))
    assert rounds.keys == (b"b", b"a")
    rounds.note({b"a": EQUAL})
    assert rounds.outcome() == Outcome(equal=1, undecided=1, open_suspects=1)
