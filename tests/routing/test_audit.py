"""A log that was tampered with is found out, and the finding names the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.audit import (
    EMPTY_HEAD,
    NO_HASH,
    AuditHead,
    AuditRecord,
    Damaged,
    Finding,
    FindingKind,
    facts_of_head,
    facts_of_record,
    hash_of,
    head_of_facts,
    next_record,
    record_of_facts,
    verify,
)
from routing.timeline import Plain

Log = list[AuditRecord | Damaged]


def log_of(count: int) -> tuple[list[AuditRecord], AuditHead]:
    head, records = EMPTY_HEAD, []
    for number in range(1, count + 1):
        before: Plain = {"mode": "strong", "revision": number - 1}
        after: Plain = {"mode": "strong", "revision": number}
        record = next_record(
            head,
            at=1_800_000_000.5 + number,
            who="anna",
            origin="::1",
            act="mode",
            before=before,
            after=after,
        )
        records.append(record)
        head = AuditHead(record.number, record.hash)
    return records, head


def rehashed(record: AuditRecord, **changes: object) -> AuditRecord:
    """As a forger does it who knows how hashes are made."""
    changed = replace(record, **changes)  # type: ignore[arg-type]
    return replace(changed, hash=hash_of(changed))


def named(findings: tuple[Finding, ...]) -> list[tuple[str, int, int]]:
    return [(finding.kind.value, finding.first, finding.last) for finding in findings]


def test_a_hash_covers_every_member_as_the_docstring_says() -> None:
    """Anyone can compute it with a JSON library and SHA-256."""
    [first, second], head = log_of(2)
    assert (first.previous_hash, second.previous_hash, head) == (NO_HASH, first.hash, (2, second.hash))
    text = (
        '["steadyread audit 1",1,1800000001.5,"anna","::1","mode",'
        '{"mode":"strong","revision":0},{"mode":"strong","revision":1},"' + NO_HASH + '"]'
    )
    assert first.hash == sha256(text.encode()).hexdigest()
    others = {
        "number": 2,
        "at": 1.0,
        "who": "bob",
        "origin": "",
        "act": "reload",
        "before": None,
        "after": {},
        "previous_hash": first.hash,
    }
    assert set(others) == set(AuditRecord.__slots__) - {"hash"}
    for name, value in others.items():
        assert hash_of(replace(first, **{name: value})) != first.hash


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_an_untouched_log_has_no_findings(count: int) -> None:
    records, head = log_of(count)
    assert verify(records, head) == ()
    for record in records:
        assert verify(records, head, AuditHead(record.number, record.hash)) == ()
    assert verify([], None) == ()


TAMPERINGS: list[tuple[str, Callable[[Log], object], list[tuple[str, int, int]]]] = [
    ("change", lambda log: log.__setitem__(2, replace(log[2], who="eve")), [("changed", 3, 3)]),
    ("change its hash", lambda log: log.__setitem__(2, replace(log[2], hash=NO_HASH)), [("changed", 3, 3)]),
    (
        "change and rehash one",
        lambda log: log.__setitem__(2, rehashed(log[2], who="eve")),
        [("changed", 3, 3)],
    ),
    ("rehash the last", lambda log: log.__setitem__(-1, rehashed(log[-1], who="eve")), [("changed", 6, 6)]),
    ("rehash the first", lambda log: log.__setitem__(0, rehashed(log[0], at=1.0)), [("changed", 1, 1)]),
    ("damage", lambda log: log.__setitem__(2, Damaged(3, "no msgpack")), [("changed", 3, 3)]),
    ("remove", lambda log: log.pop(2), [("removed", 3, 3)]),
    ("remove two", lambda log: log.__delitem__(slice(2, 4)), [("removed", 3, 4)]),
    ("remove the first", lambda log: log.pop(0), [("removed", 1, 1)]),
    ("cut the tail", lambda log: log.pop(), [("cut_off", 6, 6)]),
    ("cut all", lambda log: log.clear(), [("cut_off", 1, 6)]),
    ("swap", lambda log: log.__setitem__(slice(2, 4), [log[3], log[2]]), [("reordered", 3, 3)]),
    ("move to the end", lambda log: log.append(log.pop(1)), [("reordered", 2, 2)]),
    ("repeat", lambda log: log.insert(3, log[2]), [("inserted", 3, 3)]),
    ("insert a forged", lambda log: log.insert(2, rehashed(log[2], who="eve")), [("inserted", 3, 3)]),
    ("insert beyond", lambda log: log.append(rehashed(log[-1], number=7)), [("inserted", 7, 7)]),
    ("insert before", lambda log: log.insert(0, rehashed(log[0], number=0)), [("inserted", 0, 0)]),
    (
        "name one before the first",
        lambda log: log.__setitem__(0, rehashed(log[0], previous_hash="f" * 64)),
        [("changed", 1, 1), ("changed", 1, 1)],
    ),
    (
        "swap and renumber",
        lambda log: log.__setitem__(slice(2, 4), [replace(log[3], number=3), replace(log[2], number=4)]),
        [("changed", 3, 3), ("changed", 4, 4)],
    ),
    (
        "rehash two",
        lambda log: log.__setitem__(slice(2, 4), [rehashed(log[2], who="eve"), rehashed(log[3], who="eve")]),
        [("unlinked", 3, 4), ("changed", 4, 4)],
    ),
    (
        "change and remove",
        lambda log: (log.__setitem__(1, replace(log[1], at=0.0)), log.pop(4)),
        [("changed", 2, 2), ("removed", 5, 5)],
    ),
]


@pytest.mark.parametrize(
    ("tamper", "expected"), [row[1:] for row in TAMPERINGS], ids=[row[0] for row in TAMPERINGS]
)
def test_each_tampering_is_found_and_named(
    tamper: Callable[[Log], object], expected: list[tuple[str, int, int]]
) -> None:
    records, head = log_of(6)
    log: Log = list(records)
    tamper(log)
    assert named(verify(log, head)) == expected


def test_members_that_no_record_can_have_are_a_finding_and_no_error() -> None:
    records, head = log_of(3)
    for bad in (float("nan"), {1: 2, "a": 3}, b"bytes"):
        log: Log = [records[0], replace(records[1], before=bad), records[2]]  # type: ignore[arg-type]
        assert named(verify(log, head)) == [("changed", 2, 2)]
        assert isinstance(record_of_facts({**facts_of_record(records[1]), "before": bad}), Damaged)


@pytest.mark.parametrize("head", [None, AuditHead(3, "f" * 64), Damaged(0, "torn")])
def test_a_head_survives_json(head: AuditHead | Damaged | None) -> None:
    assert head_of_facts(json.loads(json.dumps(facts_of_head(head)))) == head
    assert isinstance(head_of_facts({"number": "3"}), Damaged)


def test_a_head_that_is_gone_damaged_or_set_back_is_found() -> None:
    records, head = log_of(3)
    assert named(verify(records, None)) == [("head", 0, 0)]
    assert named(verify(records, Damaged(0, "torn"))) == [("head", 0, 0)]
    assert named(verify([], Damaged(0, "torn"))) == [("head", 0, 0)]
    assert named(verify(records, AuditHead(2, records[1].hash))) == [("inserted", 3, 3)]
    assert named(verify(records, EMPTY_HEAD)) == [("inserted", number, number) for number in (1, 2, 3)]
    assert named(verify(records, AuditHead(3, "0" * 64))) == [("changed", 3, 3)]
    assert named(verify(records, AuditHead(10**15, head.hash))) == [("cut_off", 4, 10**15)]


def test_a_log_that_was_computed_anew_passes_unless_a_record_was_noted_elsewhere() -> None:
    """What a chain without a secret cannot see, and what can."""
    records, head = log_of(5)
    noted = AuditHead(4, records[3].hash)
    forged, forged_head = [], EMPTY_HEAD
    for record in records:
        forged.append(rehashed(record, who="eve", previous_hash=forged_head.hash))
        forged_head = AuditHead(record.number, forged[-1].hash)
    assert verify(forged, forged_head) == ()
    [finding] = verify(forged, forged_head, noted)
    assert (finding.kind, finding.first) == (FindingKind.EXPECTED, 4)
    assert noted.hash in finding.message
    cut, cut_head = records[:3], AuditHead(3, records[2].hash)
    assert verify(cut, cut_head) == ()
    [finding] = verify(cut, cut_head, noted)
    assert finding.message == "record 4 was noted with a hash, and is not here; the newest is 3"
    assert named(verify([], None, noted)) == [("expected", 4, 4)]
    assert verify(records, head, noted) == ()


@given(st.data())
def test_any_other_log_than_the_one_that_was_made_has_findings(data: st.DataObject) -> None:
    """Whatever is dropped, repeated, moved or changed, with hashes of the changed made anew or not."""
    records, head = log_of(5)
    log: Log = list(data.draw(st.lists(st.sampled_from(records), max_size=8)))
    if log and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(log) - 1))
        changes = data.draw(
            st.sampled_from(
                [{"who": "eve"}, {"number": 3}, {"after": None}, {"previous_hash": records[2].hash}]
            )
        )
        make = rehashed if data.draw(st.booleans()) else replace
        log[place] = make(log[place], **changes)  # type: ignore[type-var,arg-type]
    assert bool(verify(log, head)) == (log != records)


@pytest.mark.parametrize("record", [log_of(2)[0][1], Damaged(7, "torn")])
def test_a_record_survives_json(record: AuditRecord | Damaged) -> None:
    facts = json.loads(json.dumps(facts_of_record(record)))
    assert record_of_facts(facts) == record


@pytest.mark.parametrize(
    "change", [{"who": 3}, {"at": "now"}, {"extra": 1}, {"number": "x"}, {"number": True}]
)
def test_facts_that_make_no_record_are_damage(change: dict[str, object]) -> None:
    facts = {**facts_of_record(log_of(1)[0][0]), **change}
    assert isinstance(record_of_facts(facts), Damaged)
    assert isinstance(record_of_facts({"number": 4}), Damaged)
