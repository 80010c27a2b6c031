"""The audit log in the store: an act, its record and its events are one commit, and pages for who reads it.

Never: an act without its record, a record without its act, a record written over another. ``routing.audit`` says what
a record is and what the chain proves; each record's hash also goes to the proxy's log, which is somewhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy.log import get_logger
from proxy.store.interface import (
    ABSENT,
    ConflictError,
    Expect,
    Operation,
    Put,
    StoreRefusedError,
    TopologyStore,
    prefix_range,
)
from proxy.store.records import (
    AUDIT,
    AUDIT_HEAD,
    EVENT_HEAD,
    numbered,
    pack_audit,
    pack_audit_head,
    unpack_audit,
    unpack_audit_head,
)
from proxy.topology.append import append_events
from routing.audit import EMPTY_HEAD, AuditHead, AuditRecord, Damaged, next_record
from routing.timeline import Event, Plain

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Operator:
    """Who acts."""

    who: str  # a claimed name
    origin: str  # where the request came from


@dataclass(frozen=True, slots=True)
class Act:
    """What an operator does. ``before`` and ``after`` are what it changes, as JSON carries it."""

    name: str  # "mode", "snapshot", ...
    operator: Operator
    at: float  # Unix seconds
    before: Plain
    after: Plain


@dataclass(frozen=True, slots=True)
class Page:
    """Some records, in the order of their keys, and the head that they go with."""

    records: tuple[AuditRecord | Damaged, ...]
    head: AuditHead | Damaged | None  # None: there is none
    next: int | None  # where the next page begins; None after the last


async def commit_audited(
    store: TopologyStore,
    act: Act,
    operations: Sequence[Operation],
    expect: Sequence[Expect] = (),
    *,
    events: Sequence[Event] = (),
    seen_by: str = "",
) -> int:
    """Commit ``operations``, the act's record and its ``events``, all or nothing, durably; the new revision.

    When others record acts or events meanwhile, it tries again. Raises ConflictError when a condition of the
    caller's does not hold; StoreUnavailableError; StoreRefusedError when the log is damaged where the record must
    go. If cancelled, the commit may have happened.
    """
    while True:
        entry = await store.get(AUDIT_HEAD)
        head = EMPTY_HEAD if entry is None else unpack_audit_head(entry.value)
        record = next_record(
            head,
            at=act.at,
            who=act.operator.who,
            origin=act.operator.origin,
            act=act.name,
            before=act.before,
            after=act.after,
        )
        appended, at_event_head = await append_events(store, events, seen_by)
        key = numbered(AUDIT, record.number)
        own = [
            Put(key, pack_audit(record)),
            Put(AUDIT_HEAD, pack_audit_head(AuditHead(record.number, record.hash))),
        ]
        at_head = [Expect(AUDIT_HEAD, ABSENT if entry is None else entry.revision), Expect(key, ABSENT)]
        try:
            revision = await store.commit(
                [*operations, *own, *appended], [*expect, *at_head, *at_event_head], durable=True
            )
        except ConflictError as conflict:
            if conflict.key not in (AUDIT_HEAD, EVENT_HEAD, key):
                raise
            in_the_way = conflict.key == key
        else:
            log.info(
                "audited",
                number=record.number,
                hash=record.hash,
                act=record.act,
                who=record.who,
                origin=record.origin,
            )
            return revision
        if in_the_way and await store.get(AUDIT_HEAD) == entry:
            raise StoreRefusedError(
                f"the audit log has a record {record.number} already, and its head says that {head.number} is the "
                "newest: nothing was done. `steadyread audit verify` tells more; to act again, restore the store "
                "from a backup, or move it aside for a new one"
            )
        # Otherwise someone else's commit has succeeded meanwhile: this one goes after it.


async def read_page(store: TopologyStore, first: int, limit: int) -> Page:
    """At most ``limit`` records from number ``first`` on, and the head as it was when they were read.

    Raises StoreUnavailableError, and StoreRefusedError when a key stands among the records that is none of ours.
    """
    last = prefix_range(AUDIT)[1]
    while True:
        head = await store.get(AUDIT_HEAD)
        entries = await store.read(numbered(AUDIT, first), last, limit=limit + 1)
        if await store.get(AUDIT_HEAD) == head:
            break  # else an act was recorded meanwhile, and the two need not fit
    numbers = [_number_of(entry.key) for entry in entries]
    records = tuple(unpack_audit(number, entry.value) for number, entry in zip(numbers, entries, strict=True))
    return Page(
        records[:limit], _head_of(head.value) if head else None, numbers[limit] if numbers[limit:] else None
    )


def _number_of(key: str) -> int:
    digits = key.removeprefix(AUDIT)
    if not digits.isdecimal() or key != numbered(AUDIT, int(digits)):
        raise StoreRefusedError(
            f"the store has {key!r} among its audit records, and no Steadyread wrote that"
        )
    return int(digits)


def _head_of(value: bytes) -> AuditHead | Damaged:
    try:
        return unpack_audit_head(value)
    except StoreRefusedError as error:
        return Damaged(0, str(error))
