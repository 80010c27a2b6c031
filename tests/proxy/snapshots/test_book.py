"""The records of snapshots: given once, moved by one, told in order, and followed through whatever the store does."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from proxy.snapshots import book as book_module
from proxy.snapshots.book import OWNER_ENDED, RECORD_LOST, SET_BACK, Book, BookError, TooManyOpenError
from proxy.store.interface import (
    Batch,
    Change,
    Delete,
    Entry,
    Expect,
    Operation,
    Put,
    StoreRefusedError,
    StoreUnavailableError,
    TopologyStore,
    Watch,
)
from proxy.store.memory import MemoryStore
from proxy.store.records import (
    SNAPSHOT_HEAD,
    SNAPSHOTS,
    VERSION,
    number_of,
    numbered,
    pack,
    pack_snapshot,
    unpack_number,
    unpack_snapshot,
)
from proxy.store.sqlite import open_store
from proxy.topology.audit import Operator, read_page
from routing.audit import AuditRecord, verify
from routing.snapshot import Floor, SnapshotRecord, SnapshotState
from tests.proxy.failing_store import FailingStore

ANNA = Operator("anna", "10.0.0.7:4711")
AT = 1000.7
OPENING, SERVING, CLOSING, CLOSED, ABORTED = SnapshotState
Told = list[tuple[SnapshotRecord | None, SnapshotRecord]]


def book_of(store: TopologyStore, proxy_id: str = "p1", now: float = AT) -> tuple[Book, Told]:
    book, told = Book(store, proxy_id, lambda: now), Told()
    book.on_change = lambda old, new: told.append((old, new))
    return book, told


async def allocate(book: Book, name: str = "", open_max: int = 8) -> SnapshotRecord:
    return await book.allocate(name, None, ANNA, open_max=open_max)


def cut(record: SnapshotRecord) -> SnapshotRecord:
    return replace(record, is_cut=True)


async def end(book: Book, snapshot_id: int) -> None:
    await book.move(snapshot_id, ABORTED)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.001)


@pytest.fixture(params=["memory", "sqlite"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Sequence[TopologyStore]]:
    """One store as two proxies have it: of the durable twin, two objects over one file."""
    opened: list[TopologyStore]
    if request.param == "memory":
        opened = [MemoryStore()] * 2
    else:
        opened = [await open_store(tmp_path / "store.db") for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for store in dict.fromkeys(opened):
            nursery.start_soon(store.run)
        yield opened
        nursery.cancel_scope.cancel()
    for store in opened:
        await store.aclose()


async def test_a_new_record_is_this_proxys_and_is_told_before_the_caller_goes_on(
    stores: Sequence[TopologyStore],
) -> None:
    book, told = book_of(stores[0])
    await book.load()
    record = await book.allocate("before the move", 2000.0, ANNA, open_max=1)
    assert record == SnapshotRecord(1000, OPENING, AT, "before the move", 2000.0, owner="p1")
    assert told == [(None, record)]
    assert (book.records, book.last_id) == ({1000: record}, 1000)
    entry = await stores[1].get(numbered(SNAPSHOTS, 1000))
    assert entry is not None
    assert (unpack_snapshot(entry.value), book.revision_of) == (record, {1000: entry.revision})
    page = await read_page(stores[0], 1, 10)
    assert verify(page.records, page.head) == ()
    acts = [record for record in page.records if isinstance(record, AuditRecord)]
    after = {
        "id": 1000, "state": "opening", "name": "before the move", "expires_at": 2000.0, "reason": ""
    }  # fmt: skip
    assert [(act.act, act.who, act.before, act.after) for act in acts] == [("snapshot", "anna", None, after)]


async def test_moves_are_told_once_each_to_both(stores: Sequence[TopologyStore]) -> None:
    """Through a whole life, and moves by either; the watch repeats nothing that was told already."""
    (here, heard), (there, heard_there) = book_of(stores[0]), book_of(stores[1], "p2")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        nursery.start_soon(there.run)
        life = [await allocate(here)]
        for book, step in ((here, cut), (here, SERVING), (there, CLOSING), (here, CLOSED)):
            life.append(await book.move(1000, step))
        expected = list(zip([None, *life], life, strict=False))
        assert heard == expected
        await until(lambda: len(heard_there) == len(life))
        await allocate(here)  # comes after all that could be told again
        await until(lambda: len(heard_there) > len(life))
        assert (heard[:-1], heard_there[:-1]) == (expected, expected)
        nursery.cancel_scope.cancel()


async def test_what_a_commit_was_based_on_is_told_before_it(stores: Sequence[TopologyStore]) -> None:
    """Also while nothing brings the others' changes: none is skipped."""
    (here, heard), (there, _) = book_of(stores[0]), book_of(stores[1], "p2")
    await here.load()
    life = [await allocate(there), await there.move(1000, cut), await there.move(1000, SERVING)]
    life.append(await here.move(1000, CLOSING))
    assert [new for _, new in heard] == life
    second = await allocate(there)
    third = await allocate(here)
    assert [new for _, new in heard] == [*life, second, third]


async def test_ids_grow_whatever_is_gone(
    stores: Sequence[TopologyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the id of a record that was removed; also not when the clock was set back, or by a proxy that starts."""
    monkeypatch.setattr(book_module, "ENDED_KEPT_MAX", 0)
    book, _ = book_of(stores[0])
    for expected in (1000, 1001):
        assert (await allocate(book)).id == expected
        await end(book, expected)
    await book.trim()
    assert await stores[0].read(SNAPSHOTS, SNAPSHOTS + "z", limit=9) == []
    assert book.records == {}
    assert (await allocate(book_of(stores[1], "p2", now=5.0)[0])).id == 1002
    assert (await allocate(book_of(stores[1], "p3", now=2000.0)[0])).id == 2000
    assert await book.fresh_last_id() == book.last_id == 2000
    assert sorted(book.records) == [1002, 2000]  # whoever asks for the id knows the records up to it


async def test_an_id_is_above_all_that_this_proxy_knew_when_the_store_is_lost() -> None:
    store = FailingStore()
    book, _ = book_of(store, now=5.0)
    await book.load()
    for _ in range(3):
        last = await allocate(book)
    store.become(FailingStore())
    assert (await allocate(book)).id == last.id + 1


async def test_no_more_are_open_than_may_be(stores: Sequence[TopologyStore]) -> None:
    """However many open at once; one that ended makes room."""
    books = [book_of(store, f"p{number}")[0] for number, store in enumerate(stores)]
    opened: list[int] = []
    refused = 0

    async def open_one(book: Book) -> None:
        nonlocal refused
        try:
            opened.append((await allocate(book, open_max=3)).id)
        except TooManyOpenError:
            refused += 1

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(open_one, books[number % 2])
    assert (sorted(opened), refused) == ([1000, 1001, 1002], 5)
    await end(books[0], 1001)
    assert (await allocate(books[1], open_max=3)).id == 1003


async def test_a_move_that_does_not_follow_changes_nothing(stores: Sequence[TopologyStore]) -> None:
    """Somebody else aborted it meanwhile: the caller is told so, and the record stays as it is."""
    here, there = book_of(stores[0])[0], book_of(stores[1], "p2")[0]
    await allocate(here)
    await here.move(1000, cut)
    for wrong in (lambda record: replace(record, is_cut=False), lambda record: replace(record, id=7)):
        with pytest.raises(BookError, match="keeps its id"):
            await here.move(1000, wrong)
    with pytest.raises(BookError, match="is opening, and cannot become closed"):
        await here.move(1000, lambda record: replace(record, state=CLOSED))
    ended = await there.move(1000, ABORTED, reason="no room", operator=ANNA)
    for step in (SERVING, ABORTED, cut, lambda record: record):
        with pytest.raises(BookError, match="aborted"):
            await here.move(1000, step)
    with pytest.raises(BookError, match="no snapshot 7"):
        await here.move(7, ABORTED)
    assert here.records == {1000: ended}
    page = await read_page(stores[0], 1, 10)
    act = page.records[-1]
    assert isinstance(act, AuditRecord)
    assert (act.before["state"], act.after["state"], act.after["reason"]) == ("opening", "aborted", "no room")  # type: ignore[index,call-overload]


async def test_what_makes_the_step_is_asked_again_when_another_was_faster() -> None:
    """The floors of one and the cut of another are both kept."""
    store = MemoryStore()
    here, there = book_of(store)[0], book_of(store, "p2")[0]
    await allocate(here)
    asked: list[bool] = []

    def floors(record: SnapshotRecord) -> SnapshotRecord:
        asked.append(record.is_cut)
        return replace(record, floors={"n1": Floor("r", 7)})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(there.move, 1000, cut)
        record = await here.move(1000, floors)
    record = await here.move(1000, lambda record: record)  # whichever of the two was second
    assert asked in ([False], [False, True])
    assert (record.is_cut, record.floors) == (True, {"n1": Floor("r", 7)})


class DurabilityStore(MemoryStore):
    """Remembers which commits survive a power failure."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bool] = []

    async def commit(
        self, operations: Sequence[Operation], expect: Sequence[Expect] = (), *, durable: bool = False
    ) -> int:
        self.asked.append(durable)
        return await super().commit(operations, expect, durable=durable)


async def test_what_others_count_on_survives_a_power_failure() -> None:
    """A forgotten cut breaks the chain of older snapshots; a forgotten end would serve what was swept."""
    store = DurabilityStore()
    book, _ = book_of(store)
    await allocate(book)
    for step in (cut, SERVING, CLOSING, CLOSED):
        await book.move(1000, step)
    assert store.asked == [True, True, False, True, True]


async def test_the_store_is_away_for_a_while(autojump_clock: MockClock) -> None:
    """Promise 8: it is told as a problem; what happened meanwhile comes change by change when it is back."""
    store = FailingStore()
    (here, heard), (there, _) = book_of(store), book_of(store, "p2")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        life = [await allocate(there)]
        await until(lambda: len(heard) == 1)
        store.go_down()
        await until(lambda: bool(here.problems()))
        assert here.problems() == ["snapshots may have changed unseen: the disk is full"]
        for refused in (here.load(), here.fresh_last_id(), allocate(here), here.move(1000, SERVING)):
            with pytest.raises(StoreUnavailableError):
                await refused
        store.is_down = False
        life += [
            await there.move(1000, cut),
            await there.move(1000, SERVING),
            await there.move(1000, CLOSING),
        ]
        await until(lambda: len(heard) == 4)
        assert [new for _, new in heard] == life
        assert here.problems() == []
        store.go_down()
        await until(lambda: bool(here.problems()))
        store.is_down = False
        await until(lambda: not here.problems())  # also when nothing changes
        nursery.cancel_scope.cancel()


async def test_the_watch_goes_on_after_a_compaction(stores: Sequence[TopologyStore]) -> None:
    """What became of each record is told once, also of one that was removed: if it was open, it counts as aborted."""
    (here, heard), (there, _) = book_of(stores[0]), book_of(stores[1], "p2")
    for _ in range(4):
        await allocate(there)
    await here.load()
    heard.clear()
    await there.move(1000, cut)
    serving = await there.move(1000, SERVING)
    for lost in (1001, 1002):
        await stores[1].commit([Delete(numbered(SNAPSHOTS, lost))])
    await stores[1].compact(await stores[1].revision())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        await until(lambda: len(heard) == 3)
        closing = await there.move(1000, CLOSING)
        await until(lambda: len(heard) == 4)
        nursery.cancel_scope.cancel()
    assert [(new.id, new.state, new.reason) for _, new in heard] == [
        (1000, SERVING, ""),
        (1001, ABORTED, RECORD_LOST),
        (1002, ABORTED, RECORD_LOST),
        (1000, CLOSING, ""),
    ]
    assert heard[0][1] == serving
    assert heard[3] == (serving, closing)


async def test_openings_that_were_left_are_aborted(stores: Sequence[TopologyStore]) -> None:
    """By whoever sees them; never one whose proxy lives, this proxy's own, or one that serves: that lives on."""
    here, there = book_of(stores[0])[0], book_of(stores[1], "gone")[0]
    other = book_of(stores[1], "p2")[0]
    await allocate(there)
    await there.move(1000, SERVING)
    for book in (there, here, other):
        await allocate(book)
    await here.load()
    await here.abort_orphans({"p2"})
    states = {record.id: (record.state, record.reason) for record in here.records.values()}
    assert states == {
        1000: (SERVING, ""), 1001: (ABORTED, OWNER_ENDED), 1002: (OPENING, ""), 1003: (OPENING, "")
    }  # fmt: skip
    with pytest.raises(BookError):
        await there.move(1001, SERVING)
    # What is known here may be old: one that serves by now is left alone.
    await allocate(there)
    await here.load()
    await there.move(1004, SERVING)
    await here.abort_orphans({"p2"})
    assert here.records[1004].state is SERVING


async def test_ended_records_are_removed_but_for_the_latest_and_the_chain(
    stores: Sequence[TopologyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The markers of one that ended after an open one was cut are asked by its readers."""
    monkeypatch.setattr(book_module, "ENDED_KEPT_MAX", 2)
    (here, _), (there, _) = book_of(stores[0]), book_of(stores[1], "p2")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        nursery.start_soon(there.run)
        for snapshot_id in range(1000, 1008):
            await allocate(here)
            await here.move(snapshot_id, cut)
            if snapshot_id != 1002:
                await end(here, snapshot_id)
        await until(lambda: sorted(there.records) == list(range(1002, 1008)))
        await end(there, 1002)
        await until(lambda: sorted(here.records) == sorted(there.records) == [1006, 1007])
        nursery.cancel_scope.cancel()
    assert [number_of(entry.key) for entry in await stores[0].read(SNAPSHOTS, SNAPSHOTS + "z", limit=99)] == [
        1006, 1007
    ]  # fmt: skip


async def test_a_record_that_cannot_be_read_is_kept_and_not_read(stores: Sequence[TopologyStore]) -> None:
    """Damaged, of another id, or of a newer version: writes preserve for it, none reads at it, and it can be ended."""
    (book, heard), (other, _) = book_of(stores[0]), book_of(stores[1], "p2")
    record = await allocate(other)
    await other.move(1000, SERVING)
    await book.load()
    newer = b"\x92" + bytes([VERSION + 1]) + b"\x90"
    for number, value in enumerate((b"\xc1", newer, pack(7), pack_snapshot(replace(record, id=7)))):
        await stores[1].commit([Put(numbered(SNAPSHOTS, 1001 + number), value)])
        await book.load()
        found = book.records[1001 + number]
        assert (found.state, found.is_cut, found.is_open) == (CLOSING, True, True)
        assert f"snapshot {1001 + number} is kept and not read" in book.problems()[number]
    await stores[1].commit([Put(numbered(SNAPSHOTS, 1000), b"\xc1")])
    await book.load()
    assert (heard[-1][0].state, heard[-1][1].state) == (SERVING, CLOSING)  # type: ignore[union-attr]
    for snapshot_id in range(1000, 1005):
        await end(book, snapshot_id)
    assert book.problems() == []
    assert (await allocate(book)).id == 1005


async def test_without_the_newest_id_none_is_given(stores: Sequence[TopologyStore]) -> None:
    """A damaged counter is no reason to guess, nor to stop following."""
    book, _ = book_of(stores[0])
    await stores[1].commit([Put(SNAPSHOT_HEAD, b"\xc1")])
    await book.load()
    for refused in (allocate(book), book.fresh_last_id()):
        with pytest.raises(StoreRefusedError):
            await refused


async def test_what_has_ended_stays_so_when_the_store_is_set_back(stores: Sequence[TopologyStore]) -> None:
    """Its data may be swept: it is not told to be open again, and is ended in the store, too."""
    (book, heard), (other, _) = book_of(stores[0]), book_of(stores[1], "p2")
    record = await allocate(book)
    await end(book, 1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(book.run)
        await stores[1].commit([Put(numbered(SNAPSHOTS, 1000), pack_snapshot(record))])
        await other.load()

        async def is_ended() -> bool:
            await other.load()
            return other.records[1000].reason == SET_BACK

        with trio.fail_after(20):
            while not await is_ended():
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert [new.state for _, new in heard] == [OPENING, ABORTED]


async def test_a_deleted_file_ends_what_was_open(tmp_path: Path) -> None:
    """And ids go on above those that it had."""
    path = tmp_path / "store.db"
    store = await open_store(path)
    book, heard = book_of(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        nursery.start_soon(book.run)
        for _ in range(3):
            await allocate(book)
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink()
        await until(lambda: len(heard) == 6)
        assert {(new.state, new.reason) for _, new in heard[3:]} == {(ABORTED, RECORD_LOST)}
        assert (await allocate(book)).id == 1003
        nursery.cancel_scope.cancel()
    await store.aclose()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


# -- interleavings


class GatedWatch:
    """Delivers what it found when it is let: by then it may be old."""

    def __init__(self, store: GatedStore, inner: Watch) -> None:
        self.store, self.inner = store, inner

    async def next_batch(self) -> Batch:
        batch = await self.inner.next_batch()
        await self.store.gate(is_delivery=True)
        return batch


class GatedStore(MemoryStore):
    """Each call waits until it is let through, or is made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = True
        self.waiting: dict[trio.Event, bool] = {}  # at the gate -> whether it fails
        self.deliveries: set[trio.Event] = set()  # those of them that bring what a watch found
        self.history: list[Change] = []

    async def gate(self, *, is_done: bool = False, is_delivery: bool = False) -> None:
        """``is_done``: the store has done it, and its answer is under way, so it cannot fail any more."""
        if not self.is_open:
            here = trio.Event()
            self.waiting[here] = False
            if is_delivery:
                self.deliveries.add(here)
            try:
                await here.wait()
                if self.waiting[here] and not is_done:
                    raise StoreUnavailableError("the disk is full")
            finally:
                del self.waiting[here]

    def let(self, place: int, *, fails: bool = False) -> None:
        if self.waiting:
            here = list(self.waiting)[place % len(self.waiting)]
            self.waiting[here] = fails
            here.set()

    async def let_calls(self) -> None:
        """All of them, and what follows from them; watches still deliver nothing."""
        while calls := [here for here in self.waiting if here not in self.deliveries]:
            for here in calls:
                here.set()
            await wait_all_tasks_blocked()

    async def let_all(self) -> None:
        self.is_open = True
        for here in self.waiting:
            here.set()
        await wait_all_tasks_blocked()

    async def _enter(self) -> None:
        await super()._enter()
        await self.gate()

    async def read(self, first: str, last: str, *, limit: int, descending: bool = False) -> list[Entry]:
        found = await super().read(first, last, limit=limit, descending=descending)
        await self.gate(is_done=True)
        return found

    async def commit(
        self, operations: Sequence[Operation], expect: Sequence[Expect] = (), *, durable: bool = False
    ) -> int:
        revision = await super().commit(operations, expect, durable=durable)
        await self.gate(is_done=True)
        return revision

    def watch(self, prefix: str, after: int) -> GatedWatch:  # type: ignore[override]
        return GatedWatch(self, super().watch(prefix, after))

    def _apply(self, operations: Sequence[Operation]) -> int:
        count = len(self._log)
        revision = super()._apply(operations)
        self.history += self._log[count:]
        return revision


OPEN_MAX = 3
PLACES = st.sampled_from([0, 0, 0, 1, 2, 3])  # back from the newest id


def count(record: SnapshotRecord) -> SnapshotRecord:
    """A step of which each shows."""
    return replace(record, is_cut=True, epoch=record.epoch + 1)


STEPS = st.one_of(
    *[st.tuples(st.just("let"), st.integers(0, 9))] * 4,
    *[st.tuples(st.just("let calls"), st.just(0))] * 3,
    st.tuples(st.just("fail"), st.integers(0, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("compact"), st.just(0)),
    st.tuples(st.just("allocate"), st.integers(0, 1)),
    *[
        st.tuples(st.just("move"), st.integers(0, 1), PLACES, st.sampled_from(steps), st.booleans())
        for steps in ([*SnapshotState, count], [count, count, SERVING])
    ]
    * 2,
)


async def interleave(steps: Sequence[tuple[object, ...]]) -> None:
    store = GatedStore()
    books = [book_of(store, f"p{number}", now=5.0) for number in range(2)]
    done: list[SnapshotRecord] = []  # what callers were told that they did
    unknown = 0  # calls that were cancelled or failed: none, or one change each
    calls: list[trio.CancelScope] = []

    async def call(book: Book, told: Told, kind: str, *arguments: object) -> None:
        nonlocal unknown
        with trio.CancelScope() as scope:
            calls.append(scope)
            try:
                if kind == "allocate":
                    record = await allocate(book, open_max=OPEN_MAX)
                else:
                    snapshot_id, step, is_audited = arguments
                    operator = ANNA if is_audited else None
                    record = await book.move(snapshot_id, step, operator=operator)  # type: ignore[arg-type]
                assert any(new == record for _, new in told), "not told before the caller goes on"
                done.append(record)
            except StoreUnavailableError:
                pass  # this store fails before it writes
            except BookError:
                pass
        unknown += scope.cancelled_caught

    async with trio.open_nursery() as followers:
        for book, _ in books:
            followers.start_soon(book.run)
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as callers:
            store.is_open = False
            for kind, number, *rest in steps:
                assert isinstance(number, int)
                match kind:
                    case "let" | "fail":
                        store.let(number, fails=kind == "fail")
                    case "let calls":
                        await store.let_calls()
                    case "cancel" if calls:
                        calls[number % len(calls)].cancel()
                    case "compact":
                        store.is_open = True
                        await store.compact(store._revision)
                        store.is_open = False
                    case "allocate":
                        callers.start_soon(call, *books[number], "allocate")
                    case "move":
                        place, step, is_audited = rest
                        assert isinstance(place, int)
                        newest = max((book.last_id for book, _ in books), default=5)
                        snapshot_id = max(5, newest - place)
                        callers.start_soon(call, *books[number], "move", snapshot_id, step, is_audited)
                await wait_all_tasks_blocked()
            await store.let_all()
        await trio.sleep(10 * book_module.RETRY_SECONDS)  # of virtual time
        for book, _ in books:
            assert book.problems() == []
        followers.cancel_scope.cancel()
    judge(store, [(book, told) for book, told in books], done, unknown, is_compacted=("compact", 0) in steps)


def judge(
    store: GatedStore,
    books: Sequence[tuple[Book, Told]],
    done: list[SnapshotRecord],
    unknown: int,
    *,
    is_compacted: bool,
) -> None:
    """The store's history against what a record may do, and what was told against the history."""
    lives: dict[int, list[SnapshotRecord]] = defaultdict(list)
    newest = 0
    removed: set[int] = set()
    for change in store.history:
        if change.value is None:
            assert not lives[number_of(change.key)][-1].is_open
            removed.add(number_of(change.key))
        elif change.key == SNAPSHOT_HEAD:
            given = unpack_number(change.value, "")
            assert given > newest, "an id was given twice"
            newest = given
        elif change.key.startswith(SNAPSHOTS):
            record = unpack_snapshot(change.value)
            if record.id not in lives:
                assert (record.state, record.id) == (OPENING, max([4, *lives]) + 1)
            lives[record.id].append(record)
            assert sum(life[-1].is_open for life in lives.values()) <= OPEN_MAX
    for life in lives.values():
        for before, after in pairwise(life):
            assert before.is_open, "nothing leaves its end"
            assert after.is_cut >= before.is_cut
            if after.state is not before.state:
                before.moved_to(after.state)
    changes = [record for life in lives.values() for record in life]
    assert len(done) <= len(changes) <= len(done) + unknown, "a change was lost, or made twice"
    assert all(record in changes for record in done)
    for book, told in books:
        assert {number: record for number, record in book.records.items() if number not in removed} == {
            number: life[-1] for number, life in lives.items() if number not in removed
        }
        assert not any(book.records[number].is_open for number in removed & book.records.keys())
        for number, life in lives.items():
            heard = [(old, new) for old, new in told if new.id == number]
            news = [new for _, new in heard]
            assert [old for old, _ in heard] == [None, *news][: len(heard)]
            if not is_compacted:
                assert news == life
                continue
            if number in removed and news and news[-1].reason == RECORD_LOST:
                news.pop()
            elif number not in removed:
                assert news[-1] == life[-1]
            rest = iter(life)
            assert all(new in rest for new in news), "out of order, or twice"


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(STEPS, min_size=15, max_size=90), ended_kept_max=st.sampled_from([0, 1, 100]))
def test_two_proxies_in_any_order(steps: list[tuple[object, ...]], ended_kept_max: int) -> None:
    """Whatever calls of two books come to the store in whatever order, fail, are cancelled, or are delivered late."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(book_module, "ENDED_KEPT_MAX", ended_kept_max)
        trio.run(interleave, steps, clock=MockClock(autojump_threshold=0))


class LateStore(MemoryStore):
    """The answers to some calls come when they are let."""

    def __init__(self) -> None:
        super().__init__()
        self.late_commit: trio.Event | None = None
        self.late_read: trio.Event | None = None

    async def commit(
        self, operations: Sequence[Operation], expect: Sequence[Expect] = (), *, durable: bool = False
    ) -> int:
        revision = await super().commit(operations, expect, durable=durable)
        late, self.late_commit = self.late_commit, None
        if late is not None:
            await late.wait()
        return revision

    async def read(self, first: str, last: str, *, limit: int, descending: bool = False) -> list[Entry]:
        found = await super().read(first, last, limit=limit, descending=descending)
        late, self.late_read = self.late_read, None
        if late is not None:
            await late.wait()
        return found


async def test_an_answer_that_comes_late_sets_nothing_back() -> None:
    """The watch was faster than the answer to this proxy's own commit, and brought what another did after it."""
    store = LateStore()
    (here, heard), (there, _) = book_of(store), book_of(store, "p2")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        life = [await allocate(here)]
        late = store.late_commit = trio.Event()
        nursery.start_soon(here.move, 1000, cut)
        await wait_all_tasks_blocked()
        life += [cut(life[0]), await there.move(1000, SERVING)]
        await wait_all_tasks_blocked()
        late.set()
        await wait_all_tasks_blocked()
        assert [new for _, new in heard] == life
        assert here.records == {1000: life[-1]}
        nursery.cancel_scope.cancel()


class RemovingStore(MemoryStore):
    """A record is removed just before the records are read."""

    removes = ""

    async def read(self, first: str, last: str, *, limit: int, descending: bool = False) -> list[Entry]:
        if self.removes:
            await self.commit([Delete(self.removes)])
        return await super().read(first, last, limit=limit, descending=descending)


async def test_a_record_that_went_unseen_is_none() -> None:
    """The watch brings the deletion of what was never known."""
    store = RemovingStore()
    (here, heard), (there, _) = book_of(store), book_of(store, "p2")
    await allocate(there)
    store.removes = numbered(SNAPSHOTS, 1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        await wait_all_tasks_blocked()
        store.removes = ""
        await allocate(there)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [new.id for _, new in heard] == [1001]


async def test_a_reading_that_comes_late_ends_nothing() -> None:
    """A record that was made here since the store was read is not taken for one that is gone."""
    store = LateStore()
    book, heard = book_of(store)
    late = store.late_read = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(book.load)
        await wait_all_tasks_blocked()
        record = await allocate(book)
        late.set()
    assert heard == [(None, record)]
    assert book.records == {1000: record}
