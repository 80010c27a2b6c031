"""An act, its record and its events stand in the store together or not at all, whoever else acts meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import pytest
import trio

from proxy.store.interface import ConflictError, Delete, Entry, Expect, Operation, Put, StoreRefusedError
from proxy.store.memory import MemoryStore
from proxy.store.records import AUDIT, AUDIT_HEAD, EVENT_HEAD, EVENTS, numbered, unpack_event, unpack_number
from proxy.topology.append import append_events
from proxy.topology.audit import Act, Operator, commit_audited, read_page
from routing.audit import AuditHead, AuditRecord, Damaged, verify
from routing.timeline import Event, EventKind

ANNA = Operator("anna", "10.0.0.7:4711")
EVENT = Event(EventKind.MODE_CHANGED, 1_800_000_000.0, "anna did it")


def act(name: str = "mode", operator: Operator = ANNA) -> Act:
    return Act(name, operator, 1_800_000_000.0, before={"x": 1}, after={"x": 2.5})


class SpyStore(MemoryStore):
    """Notes what was asked of ``commit``; ``on_read`` may change the store in between."""

    def __init__(self) -> None:
        super().__init__()
        self.durable: list[bool] = []
        self.on_read: list[Act] = []

    async def commit(
        self, operations: Sequence[Operation], expect: Sequence[Expect] = (), *, durable: bool = False
    ) -> int:
        self.durable.append(durable)
        return await super().commit(operations, expect, durable=durable)

    async def read(self, first: str, last: str, *, limit: int, descending: bool = False) -> list[Entry]:
        found = await super().read(first, last, limit=limit, descending=descending)
        if self.on_read:
            await commit_audited(self, self.on_read.pop(), [])
        return found


async def test_act_record_and_events_are_one_durable_commit() -> None:
    store = SpyStore()
    revision = await commit_audited(store, act(), [Put("x", b"2")], events=[EVENT, EVENT], seen_by="p1")
    for key in ("x", AUDIT_HEAD, numbered(AUDIT, 1), EVENT_HEAD, numbered(EVENTS, 1), numbered(EVENTS, 2)):
        entry = await store.get(key)
        assert entry is not None, key
        assert entry.revision == revision
    assert store.durable == [True]
    page = await read_page(store, 1, 10)
    [record] = page.records
    assert isinstance(record, AuditRecord)
    assert (record.who, record.origin, record.act) == ("anna", "10.0.0.7:4711", "mode")
    assert (record.before, record.after, record.at) == ({"x": 1}, {"x": 2.5}, 1_800_000_000.0)
    assert page.head == AuditHead(1, record.hash)
    assert verify(page.records, page.head) == ()


async def test_a_condition_that_does_not_hold_leaves_neither_act_nor_record() -> None:
    store = MemoryStore()
    await commit_audited(store, act(), [Put("x", b"1")])
    before = await store.revision()
    with pytest.raises(ConflictError, match="x is at revision 1, and not at 0"):
        await commit_audited(store, act(), [Put("x", b"2")], [Expect("x", 0)], events=[EVENT])
    assert await store.revision() == before


async def test_acts_and_events_at_the_same_time_all_get_their_place() -> None:
    """The chain is whole and the events have no gap, with twelve operators and a recorder at once."""
    store = MemoryStore()

    async def record_events() -> None:
        for _ in range(10):
            while True:
                operations, expect = await append_events(store, [EVENT], "recorder")
                with suppress(ConflictError):
                    await store.commit(operations, expect)
                    break

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(record_events)
            for index in range(12):
                who = act(operator=Operator(f"operator-{index}", ""))
                nursery.start_soon(
                    lambda who=who: commit_audited(store, who, [], events=[EVENT], seen_by="p")
                )
    page = await read_page(store, 1, 100)
    assert verify(page.records, page.head) == ()
    names = {record.who for record in page.records if isinstance(record, AuditRecord)}
    assert names == {f"operator-{index}" for index in range(12)}
    entries = await store.read(EVENTS, EVENTS + "z", limit=100)
    assert [entry.key for entry in entries] == [numbered(EVENTS, number) for number in range(1, 23)]
    head = await store.get(EVENT_HEAD)
    assert head is not None
    assert unpack_number(head.value, "head") == 22


async def test_appended_events_know_their_number_and_who_saw_them() -> None:
    store = MemoryStore()
    assert await append_events(store, [], "p1") == ([], [])
    for _ in range(2):
        await store.commit(*await append_events(store, [EVENT, EVENT], "p1"))
    event = unpack_event(4, (await store.read(numbered(EVENTS, 4), EVENTS + "z", limit=9))[0].value)
    assert (event.number, event.seen_by, event.message) == (4, "p1", "anna did it")


async def test_the_hash_of_each_record_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It is the copy that someone who writes the store need not be able to write."""
    store = MemoryStore()
    with caplog.at_level(logging.INFO):
        await commit_audited(store, act(), [])
    page = await read_page(store, 1, 1)
    [line] = [line for line in caplog.records if line.getMessage() == "audited"]
    fields = vars(line)["steadyread_fields"]
    assert isinstance(page.head, AuditHead)
    assert (fields["number"], fields["hash"]) == page.head
    assert (fields["who"], fields["origin"], fields["act"]) == ("anna", "10.0.0.7:4711", "mode")


async def test_a_record_is_never_written_over_another() -> None:
    """With a head that was set back the act is refused, and what stands there stays as it was."""
    store = MemoryStore()
    for _ in range(3):
        await commit_audited(store, act(), [])
    second = await store.get(numbered(AUDIT, 2))
    await store.commit([Delete(AUDIT_HEAD)])
    with pytest.raises(
        StoreRefusedError, match="has a record 1 already, and its head says that 0 is the newest"
    ):
        await commit_audited(store, act(), [Put("x", b"1")])
    assert await store.get(numbered(AUDIT, 2)) == second
    assert await store.get("x") is None
    await store.commit([Put(AUDIT_HEAD, b"\xc1")])
    with pytest.raises(StoreRefusedError, match="audit head is damaged"):
        await commit_audited(store, act(), [Put("x", b"1")])


async def test_pages_follow_one_another_and_show_damage_where_it_is() -> None:
    store = MemoryStore()
    for _ in range(5):
        await commit_audited(store, act(), [])
    await store.commit([Put(numbered(AUDIT, 4), b"\xc1")])
    first = await read_page(store, 1, 2)
    second = await read_page(store, 3, 2)
    third = await read_page(store, 5, 2)
    assert (first.next, second.next, third.next) == (3, 5, None)
    assert [record.number for page in (first, second, third) for record in page.records] == [1, 2, 3, 4, 5]
    assert isinstance(second.records[1], Damaged)
    await store.commit([Put(AUDIT_HEAD, b"\xc1")])
    assert isinstance((await read_page(store, 1, 2)).head, Damaged)
    await store.commit([Put(AUDIT + "0003", b"")])
    with pytest.raises(StoreRefusedError, match="has 'audit/0003' among its audit records"):
        await read_page(store, 1, 10)


async def test_a_page_and_its_head_fit_while_acts_are_recorded() -> None:
    """An act that is recorded between reading the one and the other is no finding."""
    store = SpyStore()
    await commit_audited(store, act(), [])
    store.on_read = [act(), act()]
    page = await read_page(store, 1, 10)
    assert len(page.records) == 3
    assert verify(page.records, page.head) == ()
