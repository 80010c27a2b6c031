"""The past is answered exactly as it was recorded, in bounded pieces, and without holding up the event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from time import thread_time

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.store.interface import Delete, Put, StoreRefusedError, StoreUnavailableError
from proxy.store.memory import MemoryStore
from proxy.store.records import EVENTS, VIEW_NODES, numbered
from proxy.topology import history as history_module
from proxy.topology.history import EventPage, History
from routing.events import EventFilter, EventKind
from tests.proxy.topology.record import (
    BEGAN_AT,
    a_cluster,
    a_migration,
    a_version,
    an_event,
    write_events,
    write_migration,
    write_version,
)

FAILOVERS = EventFilter(kinds=("failover",))


async def all_pages(
    history: History, after: int, filter: EventFilter, limit: int, scan_max: int
) -> list[EventPage]:
    pages = [await history.events(after, filter=filter, limit=limit, scan_max=scan_max)]
    while not pages[-1].is_at_end:
        pages.append(
            await history.events(pages[-1].next_after, filter=filter, limit=limit, scan_max=scan_max)
        )
    return pages


# -- the map


async def a_record_of_versions(store: MemoryStore) -> None:
    """Five versions: epochs 3, 3, 5, 5, 9; a second apart; new nodes with versions 1 and 4."""
    for number, epoch, nodes_number in ((1, 3, 1), (2, 3, 1), (3, 5, 1), (4, 5, 4), (5, 9, 4)):
        shards = a_cluster(6 if nodes_number == 1 else 8)
        await write_version(
            store,
            a_version(number, epoch=epoch, at=BEGAN_AT + number, shards=shards, nodes_number=nodes_number),
        )


@pytest.mark.parametrize(
    ("epoch", "expected"), [(2, None), (3, 2), (4, 2), (5, 4), (8, 4), (9, 5), (10**20, 5), (-1, None)]
)
async def test_the_map_as_of_an_epoch_is_the_last_one_of_it_or_below(
    epoch: int, expected: int | None
) -> None:
    store = MemoryStore()
    await a_record_of_versions(store)
    record = await History(store).view_at(epoch=epoch)
    assert (record and record.number) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.999, None), (1, 1), (1.999, 1), (4, 4), (4.5, 4), (1e9, 5), (1e300, 5), (-BEGAN_AT - 1, None)],
)
async def test_the_map_as_of_a_time_is_the_last_one_recorded_by_then(
    seconds: float, expected: int | None
) -> None:
    store = MemoryStore()
    await a_record_of_versions(store)
    record = await History(store).view_at(at=BEGAN_AT + seconds)
    assert (record and record.number) == expected
    if expected == 4:
        assert record == a_version(4, epoch=5, at=BEGAN_AT + 4, shards=a_cluster(8), nodes_number=4)


async def test_one_of_epoch_and_time_is_wanted() -> None:
    with pytest.raises(ValueError, match="an epoch or a time"):
        await History(MemoryStore()).view_at(epoch=1, at=1.0)
    with pytest.raises(ValueError, match="an epoch or a time"):
        await History(MemoryStore()).view_at()


async def test_versions_come_newest_first_and_the_oldest_is_known() -> None:
    store = MemoryStore()
    history = History(store)
    assert await history.versions(3) == []
    assert await history.oldest_version() is None
    await a_record_of_versions(store)
    assert [record.number for record in await history.versions(3)] == [5, 4, 3]
    assert [record.number for record in await history.versions(9)] == [5, 4, 3, 2, 1]
    oldest = await history.oldest_version()
    assert oldest is not None
    assert oldest.number == 1


async def test_a_map_without_its_nodes_is_refused_and_one_that_went_is_none() -> None:
    """What retention removes between two reads is gone; what is lost otherwise is damage."""
    store = MemoryStore()
    await a_record_of_versions(store)
    await store.commit([Delete(numbered(VIEW_NODES, 1))])
    with pytest.raises(StoreRefusedError, match="has lost its nodes"):
        await History(store).view_at(epoch=3)
    await store.commit([Delete(numbered("views/", 5))])
    with pytest.raises(StoreRefusedError, match="names a map that is not there"):
        await History(store).view_at(epoch=9)


async def test_an_as_of_question_takes_less_than_5_ms_on_a_large_record() -> None:
    """1,000 versions of 1,000 nodes, asked in an order that no cache helps, each nodes part used by 100 versions."""
    store = MemoryStore()
    shards = a_cluster(1000)
    record = a_version(1, epoch=1, at=BEGAN_AT, shards=shards, nodes_number=1)
    for number in range(1, 1001):
        nodes_number = (number - 1) // 100 * 100 + 1
        await write_version(
            store,
            replace(
                record,
                number=number,
                at=BEGAN_AT + number,
                nodes_number=nodes_number,
                view=replace(record.view, revision=number, epoch=number),
            ),
        )
    history = History(store)
    took = []
    for number in range(7, 1000, 37):
        began = thread_time()  # the machine's other work is no property of ours
        found = await history.view_at(epoch=number)
        took.append(thread_time() - began)
        assert found is not None
        assert found.number == number
    assert sorted(took)[len(took) // 4] < 0.005  # a slow minute of the machine is no property of ours, either


# -- pages of events

KINDS = st.sampled_from([EventKind.FAILOVER, EventKind.NODE_ADDED, EventKind.NODE_REMOVED])


@settings(max_examples=60)
@given(
    kinds=st.lists(KINDS, max_size=40),
    wanted=st.sampled_from([(), ("failover",), ("node_*",), ("no_such",)]),
    removed=st.integers(0, 45),
    after=st.integers(0, 45),
    limit=st.integers(1, 7),
    scan_max=st.integers(1, 9),
    read=st.integers(1, 5),
)
def test_pages_joined_are_all_events_that_match(
    kinds: list[EventKind],
    wanted: tuple[str, ...],
    removed: int,
    after: int,
    limit: int,
    scan_max: int,
    read: int,
) -> None:
    """Whatever the sizes of pages, scans and reads: no event twice, none left out but those that are told as gone."""
    events = [an_event(number, kind) for number, kind in enumerate(kinds, start=1)]
    filter_ = EventFilter(kinds=wanted)

    async def check() -> None:
        store = MemoryStore()
        await write_events(store, events)
        if gone := events[:removed]:
            await store.commit([Delete(numbered(EVENTS, event.number)) for event in gone])
        history = History(store)
        pages = await all_pages(history, after, filter_, limit, scan_max)
        joined = [event for page in pages for event in page.events]
        left = events[removed:]
        assert joined == [event for event in left if event.number > after and filter_.matches(event)]
        first = left[0].number if left else len(events) + 1
        is_missing = after + 1 < first
        assert pages[0].missing_before == (first if is_missing else None)
        assert all(len(page.events) <= limit for page in pages)
        assert all(page.missing_before is None for page in pages[1:])
        assert pages[-1].next_after == max(after, len(events))
        for before, page in pairwise(pages):
            assert page.looked_from == before.next_after + 1
        newest = await history.newest(limit, filter_, scan_max=scan_max)
        matching = [event for event in left if filter_.matches(event) and event.number >= newest.looked_from]
        assert list(newest.events) == matching
        looked_at = len(events) + 1 - newest.looked_from
        assert len(matching) == limit or looked_at == min(scan_max, len(left))
        assert newest.next_after == len(events)

    history_module.READ_EVENTS, kept = read, history_module.READ_EVENTS
    try:
        trio.run(check)
    finally:
        history_module.READ_EVENTS = kept


async def test_a_rare_kind_gives_short_pages_and_a_place_to_go_on() -> None:
    """One call looks at scan_max events, whatever it finds."""
    store = MemoryStore()
    await write_events(
        store,
        [an_event(n, EventKind.FAILOVER if n in (5, 95) else EventKind.NODE_ADDED) for n in range(1, 101)],
    )
    history = History(store)
    page = await history.events(0, filter=FAILOVERS, limit=10, scan_max=30)
    assert [event.number for event in page.events] == [5]
    assert (page.looked_from, page.next_after, page.is_at_end, page.newest) == (1, 30, False, 100)
    page = await history.events(30, filter=FAILOVERS, limit=10, scan_max=30)
    assert (page.events, page.looked_from, page.next_after, page.is_at_end) == ((), 31, 60, False)


async def test_events_that_go_while_they_are_read_are_told_by_the_next_page() -> None:
    """Retention between two reads of one call: the page ends before the gap, and the gap is never passed over."""
    store = MemoryStore()
    await write_events(store, [an_event(number) for number in range(1, 1001)])
    history = History(store)
    read, reads = store.read, 0

    async def read_and_trim(*arguments: str, limit: int, descending: bool = False) -> object:
        nonlocal reads
        reads += 1
        if reads == 2:
            await store.commit([Delete(numbered(EVENTS, number)) for number in range(1, 901)])
        return await read(*arguments, limit=limit, descending=descending)

    store.read = read_and_trim  # type: ignore[method-assign, assignment]
    page = await history.events(0, limit=1000)
    assert (len(page.events), page.next_after, page.is_at_end) == (256, 256, False)
    page = await history.events(page.next_after, limit=1000)
    assert (page.missing_before, len(page.events), page.is_at_end) == (901, 100, True)


async def test_who_asks_beyond_the_end_gets_to_know_where_it_is() -> None:
    """A number from another record is recognised by ``newest``."""
    store = MemoryStore()
    await write_events(store, [an_event(1)])
    page = await History(store).events(7, limit=5)
    assert (page.events, page.next_after, page.is_at_end, page.newest) == ((), 7, True, 1)


async def test_reading_a_long_record_leaves_the_loop_to_others() -> None:
    """Decoding steps aside every millisecond: nine of ten times that others wait are under 2 ms of our work."""
    store = MemoryStore()
    await write_events(store, [an_event(number) for number in range(1, 20_001)])
    turns: list[float] = []

    async def tick() -> None:
        while True:
            turns.append(thread_time())
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        page = await History(store).events(0, filter=FAILOVERS, limit=1)
        nursery.cancel_scope.cancel()
    assert page.next_after == 20_000
    held = sorted(later - earlier for earlier, later in pairwise(turns))
    assert len(held) > 20_000 / history_module.READ_EVENTS
    assert held[len(held) * 9 // 10] < 0.002


# -- waiting


async def test_a_waiter_wakes_for_the_event_it_waits_for_and_for_no_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Neither a removed event nor one with a lesser number wakes it; one that is there already does not let it wait."""
    store = MemoryStore()
    await write_events(store, [an_event(1), an_event(2)])
    history = History(store)
    with trio.fail_after(1):
        await history.wait(1)
    woken_at: list[float] = []

    async def wait() -> None:
        await history.wait(3)
        woken_at.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(1)
        await store.commit([Delete(numbered(EVENTS, 1))])
        await trio.sleep(1)
        await write_events(store, [an_event(3)])
        await trio.sleep(1)
        assert woken_at == []
        await write_events(store, [an_event(4)])
        began = trio.current_time()
    assert woken_at == [began]


async def test_a_waiter_survives_a_cut_of_the_log() -> None:
    """Compaction between the look and the watch's first read is no reason to stop waiting."""
    store = MemoryStore()
    await write_events(store, [an_event(1)])
    history = History(store)
    watch, watches = store.watch, 0

    def watch_of_a_cut_log(prefix: str, after: int) -> object:
        nonlocal watches
        watches += 1
        return watch(prefix, -1 if watches == 1 else after)  # before the beginning of any log

    store.watch = watch_of_a_cut_log  # type: ignore[method-assign, assignment]
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(history.wait, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert watches == 2
            await write_events(store, [an_event(2)])


QUESTIONS: list[Callable[[History], Awaitable[object]]] = [
    lambda history: history.view_at(epoch=1),
    lambda history: history.versions(1),
    lambda history: history.events(0, limit=1),
    lambda history: history.newest(1),
    lambda history: history.wait(0),
    lambda history: history.migrations(1),
]


@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_store_that_is_gone_is_the_callers_to_know(
    question: Callable[[History], Awaitable[object]],
) -> None:
    store = MemoryStore()
    await store.aclose()
    with pytest.raises(StoreUnavailableError):
        await question(History(store))


async def test_a_store_that_goes_while_one_waits_is_the_callers_to_know() -> None:
    store = MemoryStore()
    with pytest.RaisesGroup(StoreUnavailableError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(History(store).wait, 0)
            await trio.testing.wait_all_tasks_blocked()
            await store.aclose()


async def test_a_damaged_event_is_named() -> None:
    store = MemoryStore()
    await write_events(store, [an_event(1), an_event(2)])
    await store.commit([Put(numbered(EVENTS, 2), b"\xc1")])
    with pytest.raises(StoreRefusedError, match="event is damaged"):
        await History(store).events(0, limit=5)


# -- migrations


async def test_migrations_come_with_the_last_first() -> None:
    """By their number, not by the letters of it: m-10 is after m-9."""
    store = MemoryStore()
    history = History(store)
    assert await history.migrations(5) == []
    for number in range(1, 131):
        await write_migration(store, a_migration(number))
    found = await history.migrations(12)
    assert [record.id for record in found] == [f"m-{number}" for number in range(130, 118, -1)]
    assert found[0] == a_migration(130)
    assert len(await history.migrations(1000)) == 130
