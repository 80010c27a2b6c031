"""An explanation tells the whole of a read's way, in words that are worded once, and prints whatever a key holds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import explain
from routing.explain import (
    CandidateFacts,
    ExplainError,
    Explanation,
    Preference,
    as_json,
    as_lines,
    key_of_read,
    key_text,
    lines_of,
    seconds_text,
)
from routing.levels import Level, ReadLevel
from routing.offsets import Point
from routing.topology import Address

HISTORY = b"0123456789" * 4
PRIMARY = CandidateFacts(
    "a" * 40,
    Address("10.0.0.1", 6379),
    "primary",
    "",
    "",
    3,
    None,
    None,
    None,
    False,
    "not asked",
)
REPLICA = CandidateFacts(
    "b" * 40,
    Address("::1", 6380),
    "replica",
    "readable",
    "eu-1a",
    0,
    0.00025,
    Point(HISTORY, 1700),
    0.05,
    True,
    explain.CHOSEN,
)
EXPLANATION = Explanation(
    "GET",
    b"feed:1",
    5474,
    explain.SETTLED,
    PRIMARY.address,
    12,
    None,
    ReadLevel(Level.BOUNDED_STALENESS, 1.0),
    explain.by_rule(b"feed:"),
    Level.BOUNDED_STALENESS,
    Point(HISTORY, 1650),
    0.05,
    REPLICA.address,
    "replica",
    (REPLICA, PRIMARY),
    "",
)


def test_people_get_one_fact_on_a_line_and_the_candidates_as_a_table() -> None:
    assert as_lines(EXPLANATION) == [
        'command    GET "feed:1"',
        "slot       5474, settled, at epoch 12",
        "owner      10.0.0.1:6379",
        'level      bounded_staleness 1000: rule for prefix "feed:"; asked: auto',
        "given      bounded_staleness",
        "floor      1650 of 01234567",
        "staleness  at most 50 ms",
        "served by  [::1]:6380, replica",
        "",
        "   candidate      role     stage     zone   outstanding  latency  stamp             staleness  why",
        "*  [::1]:6380     replica  readable  eu-1a  0            0.25 ms  1700 of 01234567  50 ms      "
        "chosen: its reply is used",
        "   10.0.0.1:6379  primary  -         -      3            -        -                 -          not asked",
    ]


def test_a_read_that_is_refused_says_so() -> None:
    refused = replace(
        EXPLANATION,
        owner=None,
        asked=ReadLevel(Level.STRONG),
        level=ReadLevel(Level.STRONG),
        given=None,
        floor=None,
        staleness_seconds=None,
        served_by=None,
        role="",
        candidates=(),
        refusal="NOTREADY the slot has no owner",
    )
    lines = as_lines(refused)
    assert "owner      none" in lines
    assert "given      none" in lines
    assert "served by  nobody" in lines
    assert "refused    NOTREADY the slot has no owner" in lines
    assert lines[-1] == "no node could have answered"
    assert not any(line.startswith(("floor", "staleness")) for line in lines)
    facts = as_json(refused)
    assert (facts["asked"], facts["role"], facts["refusal"]) == ("strong", None, refused.refusal)


def test_a_hot_key_is_said_to_be_one() -> None:
    hot = replace(EXPLANATION, hot_share=0.0734)
    assert as_lines(hot)[3] == "hot        7.3% of the reads that this proxy has looked at of late"
    assert (as_json(hot)["hot_share"], as_json(EXPLANATION)["hot_share"]) == (0.0734, None)


def test_a_read_of_a_snapshot_says_which_and_which_markers_decide() -> None:
    """The last three of four are in its chain; with one marker there is nothing that could come first."""
    of_snapshot = replace(
        EXPLANATION,
        level=ReadLevel(Level.SNAPSHOT),
        because=explain.BY_MODE,
        given=Level.SNAPSHOT,
        floor=None,
        snapshot_id=7,
        markers=(7, 8, 10),
    )
    lines = as_lines(of_snapshot)
    assert "level      snapshot current: the routing mode; asked: auto" in lines
    assert (
        "snapshot   7; markers of 7, 8, 10: the first that exists decides; without one the key is as it was"
        in lines
    )
    facts = as_json(of_snapshot)
    assert (facts["snapshot"], facts["markers"], facts["given"]) == (7, [7, 8, 10], "snapshot")
    only = as_lines(replace(of_snapshot, markers=(10,), snapshot_id=10))
    assert "snapshot   10; markers of 10: without it the key is as it was" in only
    ended = as_lines(replace(of_snapshot, markers=(), served_by=None))
    assert "snapshot   7" in ended
    assert not any(line.startswith("snapshot") for line in as_lines(EXPLANATION))


def test_json_tells_what_people_are_told() -> None:
    facts = json.loads(json.dumps(as_json(EXPLANATION), allow_nan=False))
    assert facts["floor"] == {"replid": HISTORY.decode(), "offset": 1650}
    assert lines_of(facts) == as_lines(EXPLANATION)


@given(st.binary(max_size=400))
def test_whatever_a_key_holds_can_be_printed_on_one_line(key: bytes) -> None:
    shown = key_text(key)
    assert shown.isprintable()
    assert '"' not in shown.replace('\\"', "")
    lines = as_lines(replace(EXPLANATION, key=key))
    assert all(line.isprintable() for line in lines)
    json.dumps(as_json(replace(EXPLANATION, key=key))).encode()


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (b"user:1", "user:1"),
        ("é{1}".encode(), "é{1}"),
        (b'a"b\\', 'a\\"b\\\\'),
        (b"\x1b[2J\r\n\0", "\\x1b[2J\\r\\n\\x00"),
        (b"\xff\x80", "\\xff\\x80"),
        ("\u202e".encode(), "\\u202e"),  # writes from right to left
        (b"x" * 129, "x" * 128 + "... (129 bytes)"),
    ],
)
def test_what_is_no_text_in_a_key_is_escaped(key: bytes, shown: str) -> None:
    assert key_text(key) == shown


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("get k", b"k"),
        ("MGET a b", b"a"),
        ("HSCAN h 0", b"h"),
        ("OBJECT ENCODING k", b"k"),
        ("EVAL_RO s 1 k", b"k"),
        ("PFCOUNT k", b"k"),
    ],
)
def test_a_read_is_explained_by_its_first_key(words: str, key: bytes) -> None:
    assert key_of_read(words.encode().split()) == key


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", "give the command to explain and its arguments"),
        ("NOSUCH k", "unknown command 'NOSUCH', with args beginning with: 'k'"),
        ("GET", "wrong number of arguments for 'get' command"),
        ("OBJECT NOSUCH k", "unknown subcommand 'NOSUCH'. Try OBJECT HELP."),
        ("SET k v", "SET is not a read, and levels are of reads: no replica gets it"),
        ("EVAL s 1 k", "EVAL is not a read, and levels are of reads: no replica gets it"),
        ("PING", "PING is not a read, and levels are of reads: no replica gets it"),
        ("DBSIZE", "DBSIZE names no key here, so there is no slot that decides where it goes"),
        ("EVAL_RO s 0", "EVAL_RO names no key here, so there is no slot that decides where it goes"),
        ("EVAL_RO s x k", "value is not an integer or out of range"),
    ],
)
def test_what_is_no_read_of_keys_is_not_explained(words: str, reason: str) -> None:
    with pytest.raises(ExplainError) as raised:
        key_of_read(words.encode().split())
    assert str(raised.value) == reason


def test_reasons_with_figures() -> None:
    assert explain.slot_moved(1.234, 5.0) == (
        "the slot changed its owner 1.23 s ago, and is read at primaries for 5.00 s after"
    )
    assert explain.behind(1) == "its stamp is 1 byte behind the floor"
    assert explain.too_old(1.5, 1.0) == "its data may be 1.50 s old, and the bound is 1.00 s"
    assert explain.timed_out(0.25) == "it did not reply within 250 ms"
    assert explain.not_readable("syncing").startswith("it is syncing: it is being sent")
    assert explain.not_readable("resting") == "it is resting, and not readable yet"
    assert explain.quarantined([b"a", b"\xff"]) == (
        'it is quarantined: 2 keys differed from its primary\'s: "a", "\\xff"'
    )
    assert explain.quarantined([b"k"] * 7).endswith('"k" and 2 more')
    assert explain.passed_over(Preference.ZONE) == (
        "not asked, because another is preferred: it is in this proxy's zone"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.00025, "0.25 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (9.99, "9.99 s"),
        (12345, "12345 s"),
    ],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
