"""The audit log: every act of an operator as a record that carries the hash of the one before.

Owns what a record holds, how it is hashed, and how a log is verified. It keeps nothing and reads no clock.

What such a chain proves. The hash of a record covers all its members and the hash before it, and the head names the
last record. So whoever changes, removes, adds or moves records and does not compute everything after them anew is
found, and so is damage. There is no secret in it: whoever can write the store and knows this page can compute a
whole new chain, with a head that fits, and nothing *within* the store tells it from the true one. What does is a
record's number and hash kept where that person cannot write: each is written to the proxy's log when it is made, and
an operator can note the head. A log that verifies and holds the noted record is, up to that record, the log as it
was then. A chain never proves who acted, for a name is what the caller claimed, nor that acts which were not made
through a proxy have a record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from hashlib import sha256
from typing import NamedTuple, TypeGuard

from routing.timeline import Plain

_FORM = "steadyread audit 1"  # in every hash: a record can never be taken for one of another form


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One act. ``before`` and ``after`` are what it changed, as JSON carries it."""

    number: int  # 1, 2, 3 ... without a gap
    at: float  # Unix seconds
    who: str  # the name that the operator claimed
    origin: str  # where the request came from: the peer's address
    act: str  # "mode", "snapshot", ...
    before: Plain
    after: Plain
    previous_hash: str  # of the record before; NO_HASH for the first
    hash: str = ""  # SHA-256, 64 hexadecimal digits


class AuditHead(NamedTuple):
    """The newest record's number and hash."""

    number: int
    hash: str


NO_HASH = "0" * 64
EMPTY_HEAD = AuditHead(0, NO_HASH)  # of a log without a record


@dataclass(frozen=True, slots=True)
class Damaged:
    """What stands where a record, or the head, should, and cannot be read."""

    number: int  # of the place; 0 for the head
    reason: str


def next_record(
    head: AuditHead, *, at: float, who: str, origin: str, act: str, before: Plain, after: Plain
) -> AuditRecord:
    """The record that follows ``head``. Raises ValueError if ``before`` or ``after`` is not what JSON carries."""
    record = AuditRecord(head.number + 1, at, who, origin, act, before, after, head.hash)
    return replace(record, hash=hash_of(record))


def hash_of(record: AuditRecord) -> str:
    """SHA-256 of the record's members but ``hash``, as one JSON array.

    In ASCII, names sorted, no spaces, numbers as Python prints them. Raises ValueError if a number is not finite.
    """
    members = [
        _FORM,
        record.number,
        record.at,
        record.who,
        record.origin,
        record.act,
        record.before,
        record.after,
        record.previous_hash,
    ]
    text = json.dumps(members, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode("ascii")).hexdigest()


def facts_of_record(record: AuditRecord | Damaged) -> dict[str, object]:
    """For JSON. ``record_of_facts`` makes the same record of it, with the same hash."""
    if isinstance(record, Damaged):
        return {"number": record.number, "damage": record.reason}
    return {name: getattr(record, name) for name in AuditRecord.__slots__}


def record_of_facts(facts: Mapping[str, object]) -> AuditRecord | Damaged:
    """What ``facts_of_record`` was made of. Members of the wrong kind make it Damaged, never an error."""
    number = facts.get("number")
    if not _is_number(number):
        return Damaged(0, "it has no number")
    if isinstance(reason := facts.get("damage"), str):
        return Damaged(number, reason)
    try:
        record = AuditRecord(**facts)  # type: ignore[arg-type]  # checked next
    except TypeError as error:
        return Damaged(number, f"its members are wrong: {error}")
    texts = (record.who, record.origin, record.act, record.previous_hash, record.hash)
    if not isinstance(record.at, int | float) or not all(isinstance(text, str) for text in texts):
        return Damaged(number, "its members are of the wrong kind")
    try:
        hash_of(record)
    except (TypeError, ValueError, RecursionError) as error:
        return Damaged(number, f"JSON cannot carry its members: {error}")
    return record


def facts_of_head(head: AuditHead | Damaged | None) -> dict[str, object] | None:
    """For JSON; ``head_of_facts`` makes the same head of it."""
    match head:
        case None:
            return None
        case Damaged(_, reason):
            return {"damage": reason}
    return {"number": head.number, "hash": head.hash}


def head_of_facts(facts: object) -> AuditHead | Damaged | None:
    """What ``facts_of_head`` was made of; Damaged for anything else."""
    match facts:
        case None:
            return None
        case {"number": int(number), "hash": str(hash_)}:
            return AuditHead(number, hash_)
        case {"damage": str(reason)}:
            return Damaged(0, reason)
    return Damaged(0, "it is no number and hash")


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


# -- verification


class FindingKind(Enum):
    """What is wrong with a log."""

    CHANGED = "changed"  # not the record that was made under this number
    REMOVED = "removed"  # missing between others, or at the beginning
    CUT_OFF = "cut_off"  # missing at the end
    REORDERED = "reordered"  # stands after a later one
    INSERTED = "inserted"  # one too many under its number, or under a number that no record has
    UNLINKED = "unlinked"  # two neighbours do not fit, and nothing tells which of them is wrong
    HEAD = "head"  # the head itself
    EXPECTED = "expected"  # not what was noted elsewhere


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, with the records ``first`` to ``last``; both 0 for the head."""

    kind: FindingKind
    first: int
    last: int
    message: str  # one sentence for people


def verify(
    records: Sequence[AuditRecord | Damaged],
    head: AuditHead | Damaged | None,
    expected: AuditHead | None = None,
) -> tuple[Finding, ...]:
    """All that is wrong with a log whose records stand in this order, by number; empty when nothing is.

    ``head`` is None where there is none; ``expected`` is a record's number and hash that were noted elsewhere. The
    head vouches for the last record and each record for the one before, so where two do not fit, the later is
    believed, unless it is itself in doubt. What the module says about a chain without a secret holds here.
    """
    findings: list[Finding] = []
    if isinstance(head, AuditHead):
        top, wanted = head
    else:
        top, wanted = max((record.number for record in records), default=0), None
        if head is not None:
            findings.append(_of_head(f"the head cannot be read: {head.reason}"))
        elif records:
            findings.append(_of_head("the head is missing: records may be missing at the end"))
    rivals: dict[
        int, list[AuditRecord | Damaged]
    ] = {}  # number -> those that stand under it; one, if all is well
    for record in records:
        if 1 <= record.number <= top:
            rivals.setdefault(record.number, []).append(record)
        else:
            findings.append(_inserted(record.number, f"the head says that record {top} is the newest"))
    findings.extend(_out_of_order(record.number for record in records if record.number in rivals))
    findings.extend(_gaps(sorted(rivals), top))
    chosen = _walk(rivals, top, wanted, findings)
    if expected is not None:
        findings.extend(_against(expected, chosen.get(expected.number), top))
    return tuple(sorted(findings, key=lambda finding: (finding.first, finding.last)))


def _walk(
    rivals: Mapping[int, Sequence[AuditRecord | Damaged]],
    top: int,
    wanted: str | None,
    findings: list[Finding],
) -> dict[int, AuditRecord]:
    """Follow the chain from its newest record down; the records that belong to it, by number.

    ``wanted`` is the hash that the next record down must have, None where nothing tells.
    """
    chain: dict[int, AuditRecord] = {}
    is_trusted = True  # whether that which named ``wanted`` is vouched for itself
    above = top + 1
    for number in sorted(rivals, reverse=True):
        here = rivals[number]
        if number != above - 1:
            wanted = None  # its name went with the missing record
        intact = [record for record in here if isinstance(record, AuditRecord) and _is_intact(record)]
        record = next((one for one in intact if one.hash == wanted), intact[0] if intact else None)
        if record is None:
            findings.append(_changed(number, _damage_of(here[0])))
            wanted = None
        else:
            if wanted is not None and record.hash != wanted:
                findings.append(_misfit(number, top, is_trusted))
                is_trusted = False
            else:
                is_trusted = True
            chain[number] = record
            wanted = record.previous_hash
        findings.extend(_inserted(number, "another stands under its number") for _ in here[1:])
        above = number
    if above == 1 and wanted not in (None, NO_HASH):
        findings.append(_changed(1, "it is the first, and names one before it"))
    return chain


def _misfit(number: int, top: int, is_trusted: bool) -> Finding:
    """An intact record is not the one that is named above it."""
    if number == top:
        return _changed(number, "the head names another")
    if is_trusted:
        return _changed(number, f"record {number + 1} names another as the one before it")
    return Finding(
        FindingKind.UNLINKED,
        number,
        number + 1,
        f"records {number} and {number + 1} do not fit: one of them was changed",
    )


def _is_intact(record: AuditRecord) -> bool:
    try:
        return hash_of(record) == record.hash
    except (TypeError, ValueError, RecursionError):  # members that JSON does not carry, so never hashed
        return False


def _damage_of(record: AuditRecord | Damaged) -> str:
    if isinstance(record, Damaged):
        return f"it cannot be read: {record.reason}"
    return "its hash is not that of its content"


def _out_of_order(numbers: Iterable[int]) -> Iterator[Finding]:
    highest = 0
    for number in numbers:
        if number < highest:
            yield Finding(
                FindingKind.REORDERED, number, number, f"record {number} stands after record {highest}"
            )
        highest = max(highest, number)


def _gaps(numbers: Sequence[int], top: int) -> Iterator[Finding]:
    """``numbers`` are those that are there, ascending."""
    for before, after in zip((0, *numbers), (*numbers, top + 1), strict=True):
        first, last = before + 1, after - 1
        if first > last:
            continue
        which = f"record {first} is" if first == last else f"records {first} to {last} are"
        if after == top + 1:
            message = f"{which} missing at the end: the head says that record {top} is the newest"
            yield Finding(FindingKind.CUT_OFF, first, last, message)
        else:
            yield Finding(FindingKind.REMOVED, first, last, f"{which} missing before record {after}")


def _against(expected: AuditHead, record: AuditRecord | None, top: int) -> Iterator[Finding]:
    number = expected.number
    if record is None:
        message = f"record {number} was noted with a hash, and is not here; the newest is {top}"
        yield Finding(FindingKind.EXPECTED, number, number, message)
    elif record.hash != expected.hash:
        message = f"record {number} was noted with hash {expected.hash}, and has {record.hash}: the log was rewritten"
        yield Finding(FindingKind.EXPECTED, number, number, message)


def _changed(number: int, why: str) -> Finding:
    return Finding(FindingKind.CHANGED, number, number, f"record {number} was changed: {why}")


def _inserted(number: int, why: str) -> Finding:
    return Finding(FindingKind.INSERTED, number, number, f"a record {number} was inserted: {why}")


def _of_head(message: str) -> Finding:
    return Finding(FindingKind.HEAD, 0, 0, message)
