"""Proxies that share a topology store open, end and abort snapshots, and none of them reads what others write past.

There are no nodes here but for what a test makes: what is tested is who tells whom what, and when. The simulation and
tests/live have clusters. What one proxy hears of the store can be held back, as a slow watch would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from proxy.settings import OnPreserveFailure, SnapshotSettings
from proxy.snapshots import service as service_module
from proxy.snapshots.barrier import CutFailedError
from proxy.snapshots.facts import SnapshotError
from proxy.snapshots.service import Snapshots
from proxy.store.interface import Batch, LeaseExpiredError, StoreUnavailableError
from proxy.store.memory import MemoryStore
from proxy.topology.audit import Operator
from proxy.topology.service import Topology
from proxy.upstream.abandoned import Abandoned
from routing.snapshot import SnapshotRecord, SnapshotState

WHO = Operator("test", "test")
SETTINGS = SnapshotSettings(member_ttl_seconds=3.0, hold_seconds=0.25, open_deadline_seconds=5.0)


class SharedStore(MemoryStore):
    is_shared = True


class StoreView:
    """The store as one proxy has it."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.is_late = False  # its watches tell nothing
        self._in_time = trio.Event()
        self.on_commit: Callable[[], None] = lambda: None
        self.is_down = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, *arguments: Any, **options: Any) -> int:
        self.on_commit()
        if self.is_down:
            raise StoreUnavailableError("it is down")
        return await self._store.commit(*arguments, **options)

    async def renew(self, lease: int) -> None:
        if self.is_down:
            raise StoreUnavailableError("it is down")
        await self._store.renew(lease)

    def watch(self, prefix: str, after: int) -> LateWatch:
        return LateWatch(self, prefix, after)

    def catch_up(self) -> None:
        self.is_late = False
        self._in_time.set()
        self._in_time = trio.Event()


class LateWatch:
    def __init__(self, view: StoreView, prefix: str, after: int) -> None:
        self._view, self._prefix, self._after = view, prefix, after

    async def next_batch(self) -> Batch:
        while True:
            watch = self._view._store.watch(self._prefix, self._after)
            batch = await watch.next_batch()
            if not self._view.is_late:
                self._after = batch.revision
                return batch
            await self._view._in_time.wait()


class NoLinks:
    """No connection to any node."""

    blocked: Mapping[Any, Any] = {}

    def shared(self) -> Iterable[Any]:
        return []

    reading = private = shared

    def writing_to(self, address: object) -> Iterable[Any]:
        return []

    def asking(self, address: object) -> None:
        return None


class Proxy:
    def __init__(self, store: MemoryStore, name: str, settings: SnapshotSettings) -> None:
        self.view = StoreView(store)
        links: Any = NoLinks()
        view: Any = self.view
        self.snapshots = Snapshots(
            settings,
            Topology(),
            links,
            view,
            Abandoned(),
            name,
            now=lambda: 1_800_000_000 + trio.current_time(),
        )

    @property
    def newest(self) -> int:
        return self.snapshots.preserver.newest

    def state_of(self, number: int) -> SnapshotState:
        return self.snapshots.book.records[number].state


@asynccontextmanager
async def proxies(count: int, settings: SnapshotSettings = SETTINGS) -> AsyncIterator[list[Proxy]]:
    store = SharedStore()
    async with trio.open_nursery() as nursery:
        found = []
        for number in range(count):
            proxy = Proxy(store, f"proxy{number}", settings)
            await proxy.snapshots.recover(1.0)
            nursery.start_soon(proxy.snapshots.run)
            found.append(proxy)
        await wait_all_tasks_blocked()
        yield found
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def joining(other: Proxy, name: str) -> AsyncIterator[Proxy]:
    """One more proxy with the other's store."""
    async with trio.open_nursery() as nursery:
        proxy = Proxy(other.view._store, name, SETTINGS)
        await proxy.snapshots.recover(1.0)
        nursery.start_soon(proxy.snapshots.run)
        yield proxy
        nursery.cancel_scope.cancel()


async def test_all_proxies_serve_what_one_opens_until_another_closes_it(autojump_clock: MockClock) -> None:
    async with proxies(3) as (a, b, c):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        assert {proxy.newest for proxy in (a, b, c)} == {record.id}
        assert all(proxy.snapshots.refusal(record.id) is None for proxy in (a, b, c))
        assert (await b.snapshots.close(record.id, WHO)).state is SnapshotState.CLOSED
        await wait_all_tasks_blocked()
        assert {proxy.newest for proxy in (a, b, c)} == {0}
        assert all(proxy.snapshots.refusal(record.id) is not None for proxy in (a, b, c))


async def test_writes_preserve_for_an_aborted_snapshot_until_all_others_have_heard_of_it(
    autojump_clock: MockClock,
) -> None:
    """Else the others would show, as of the snapshot, what was written after it (promise 1)."""
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        b.view.is_late = True
        a.snapshots._abort([record.id], "it is over its budget")
        await trio.sleep(1.0)
        assert a.state_of(record.id) is SnapshotState.ABORTED
        assert a.snapshots.refusal(record.id) is not None
        assert b.snapshots.is_usable(record.id)
        assert a.newest == record.id  # while b may read at it
        b.view.catch_up()
        await trio.sleep(0.1)
        assert not b.snapshots.is_usable(record.id)
        assert a.newest == b.newest == 0


async def test_writes_do_not_preserve_for_ever_for_a_proxy_that_is_gone(autojump_clock: MockClock) -> None:
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        b.view.is_late = b.view.is_down = True
        a.snapshots._abort([record.id], "it is over its budget")
        await trio.sleep(2 * SETTINGS.member_ttl_seconds + 0.5)
        assert a.newest == 0


async def test_a_write_whose_key_cannot_be_preserved_goes_on_when_no_proxy_reads_any_more(
    autojump_clock: MockClock,
) -> None:
    assert SETTINGS.on_preserve_failure is OnPreserveFailure.ABORT
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        began = trio.current_time()
        assert await a.snapshots._on_preserve_failure(record.id, "OOM") is None
        assert trio.current_time() - began < 1.0
        assert not b.snapshots.is_usable(record.id)
        assert a.newest == 0


async def test_a_write_whose_key_cannot_be_preserved_is_refused_while_another_proxy_may_read(
    autojump_clock: MockClock,
) -> None:
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        b.view.is_late = True
        refusal = await a.snapshots._on_preserve_failure(record.id, "OOM")
        assert refusal is not None
        assert refusal.startswith(b"-NOTREADY ")
        assert b.snapshots.is_usable(record.id)


async def test_a_proxy_that_said_it_reads_no_more_does_not(autojump_clock: MockClock) -> None:
    """It may be the last to hear that the snapshot is closed, and others preserve no more."""
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        acknowledge = b.snapshots.members.acknowledge

        async def then_late(*arguments: Any) -> None:
            await acknowledge(*arguments)
            b.view.is_late = True

        b.snapshots.members.acknowledge = then_late  # type: ignore[method-assign, assignment]
        await a.snapshots.close(record.id, WHO)
        assert a.newest == 0
        assert b.state_of(record.id) is SnapshotState.CLOSING
        assert not b.snapshots.is_usable(record.id)


async def test_a_proxy_whose_lease_is_over_uses_no_reply_at_a_closing_snapshot(
    autojump_clock: MockClock,
) -> None:
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        b.snapshots._start = lambda *arguments: None  # type: ignore[method-assign]  # its readers take long
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.snapshots.close, record.id, WHO)
            await wait_all_tasks_blocked()
            assert b.snapshots.is_usable(record.id)
            b.snapshots.members.valid_until = trio.current_time()
            assert not b.snapshots.is_usable(record.id)
            nursery.cancel_scope.cancel()


async def test_an_opening_that_a_proxy_cannot_acknowledge_fails_and_the_proxy_lives_on(
    autojump_clock: MockClock,
) -> None:
    async with proxies(2) as (a, b):

        async def fail(*arguments: Any) -> None:
            raise LeaseExpiredError("it is over")

        acknowledge, b.snapshots.members.acknowledge = b.snapshots.members.acknowledge, fail  # type: ignore[method-assign, assignment]
        with pytest.raises(SnapshotError, match="did not notice"):
            await a.snapshots.open("", 60.0, WHO)
        b.snapshots.members.acknowledge = acknowledge  # type: ignore[method-assign]
        assert (await a.snapshots.open("", 60.0, WHO)).state is SnapshotState.SERVING


async def test_a_cut_that_is_heard_of_together_with_its_end_is_no_fault(autojump_clock: MockClock) -> None:
    async with proxies(2) as (a, b):
        number = 1_900_000_000
        cut = SnapshotRecord(number, SnapshotState.OPENING, 0.0, owner="proxy1", is_cut=True)
        a.snapshots.book._adopt(cut, 10**6)
        a.snapshots.book._adopt(cut.moved_to(SnapshotState.ABORTED, "given up"), 10**6 + 1)
        await trio.sleep(1.0)
        assert not a.snapshots.preserver.is_held
        assert b.snapshots.members.is_attached()


async def test_two_proxies_that_open_at_the_same_time_do_so_one_after_the_other(
    autojump_clock: MockClock,
) -> None:
    """Each cut has its own hold and gates, which the end of the other must not end."""
    async with proxies(3) as (a, b, c):
        opening: set[int] = set()
        most = 0
        tell = c.snapshots.book.on_change

        def watch(old: SnapshotRecord | None, new: SnapshotRecord) -> None:
            nonlocal most
            (opening.add if new.state is SnapshotState.OPENING else opening.discard)(new.id)
            most = max(most, len(opening))
            tell(old, new)

        c.snapshots.book.on_change = watch
        found: list[SnapshotRecord] = []

        async def open_at(proxy: Proxy) -> None:
            found.append(await proxy.snapshots.open("", 60.0, WHO))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_at, a)
            nursery.start_soon(open_at, b)
        await wait_all_tasks_blocked()
        assert [record.state for record in found] == [SnapshotState.SERVING] * 2
        assert most == 1
        assert not any(proxy.snapshots.preserver.is_held for proxy in (a, b, c))


async def test_the_end_of_one_opening_does_not_end_the_hold_of_another(autojump_clock: MockClock) -> None:
    async with proxies(2) as (a, _):
        one, two = 1_900_000_000, 1_900_000_001
        for number in (one, two):
            cut = SnapshotRecord(number, SnapshotState.OPENING, 0.0, owner="proxy1", is_cut=True)
            a.snapshots.book._adopt(cut, 10**6 + number)
        a.snapshots.book._adopt(
            a.snapshots.book.records[one].moved_to(SnapshotState.ABORTED, "given up"), 10**6 + two + 1
        )
        assert a.snapshots.preserver.is_held
        a.snapshots.book._adopt(
            a.snapshots.book.records[two].moved_to(SnapshotState.ABORTED, "given up"), 10**6 + two + 2
        )
        assert not a.snapshots.preserver.is_held


async def test_an_allocation_whose_opening_was_given_up_does_not_stay_open(autojump_clock: MockClock) -> None:
    async with proxies(1) as (a,):
        commit = a.view._store.commit

        async def done_and_lost(*arguments: Any, **options: Any) -> int:
            await commit(*arguments, **options)
            raise StoreUnavailableError("the answer was lost")

        a.view._store.commit = done_and_lost  # type: ignore[method-assign]
        with pytest.raises(SnapshotError, match="the answer was lost"):
            await a.snapshots.open("", 60.0, WHO)
        a.view._store.commit = commit  # type: ignore[method-assign]
        await trio.sleep(2.0)
        assert [record.state for record in a.snapshots.book.records.values()] == [SnapshotState.ABORTED]


async def test_what_a_proxy_leaves_opening_is_ended_when_its_lease_is_over(autojump_clock: MockClock) -> None:
    async with proxies(2) as (a, b):
        async with trio.open_nursery() as nursery:
            store = a.view._store
            dead = Proxy(store, "dead", SETTINGS)
            await dead.snapshots.recover(1.0)
            record = await dead.snapshots.book.allocate("", None, WHO, open_max=8)
            nursery.cancel_scope.cancel()
        await trio.sleep(SETTINGS.member_ttl_seconds + 2.0)
        assert a.state_of(record.id) is b.state_of(record.id) is SnapshotState.ABORTED
        assert (await a.snapshots.open("", 60.0, WHO)).state is SnapshotState.SERVING


async def test_attempts_that_failed_do_not_count_as_open(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SnapshotSettings(open_max=1)
    monkeypatch.setattr(service_module, "ATTEMPT_PAUSE_SECONDS", 0.0)
    async with proxies(1, settings) as (a,):
        take = a.snapshots._take_floors
        failures = [CutFailedError("lost")] * 3

        async def fail_first(deadline: float) -> Any:
            if failures:
                raise failures.pop()
            return await take(deadline)

        a.snapshots._take_floors = fail_first  # type: ignore[method-assign]
        assert (await a.snapshots.open("", 60.0, WHO)).state is SnapshotState.SERVING


async def test_a_close_that_another_proxy_completes_is_done(autojump_clock: MockClock) -> None:
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        closed: list[SnapshotState] = []

        async def close(proxy: Proxy) -> None:
            closed.append((await proxy.snapshots.close(record.id, WHO)).state)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close, a)
            nursery.start_soon(close, b)
        assert closed == [SnapshotState.CLOSED] * 2


async def test_a_snapshot_ends_when_its_time_is_over(autojump_clock: MockClock) -> None:
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 5.0, WHO)
        await trio.sleep(4.0)
        assert b.snapshots.refusal(record.id) is None
        await trio.sleep(2.0)
        assert a.state_of(record.id) is b.state_of(record.id) is SnapshotState.CLOSED
        assert a.newest == b.newest == 0


async def test_a_snapshot_is_not_closed_while_a_live_proxy_may_read_at_it(autojump_clock: MockClock) -> None:
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        b.view.is_late = True
        with pytest.raises(SnapshotError, match="proxy1 may still read"):
            await a.snapshots.close(record.id, WHO)
        assert a.newest == record.id
        assert b.snapshots.is_usable(record.id)
        b.view.catch_up()
        await trio.sleep(service_module.CLOSE_SECONDS + 1.0)
        assert a.state_of(record.id) is SnapshotState.CLOSED


async def test_a_proxy_that_joins_while_a_snapshot_closes_does_not_keep_it_from_that(
    autojump_clock: MockClock,
) -> None:
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        b.view.is_late = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.snapshots.book.move, record.id, SnapshotState.CLOSING)
            await trio.sleep(0.1)
            joiner = Proxy(a.view._store, "joiner", SETTINGS)
            await joiner.snapshots.recover(1.0)
            nursery.start_soon(joiner.snapshots.run)
            await trio.sleep(0.1)
            b.view.catch_up()
            began = trio.current_time()
            assert (await a.snapshots.close(record.id, WHO)).state is SnapshotState.CLOSED
            assert trio.current_time() - began < 1.0
            nursery.cancel_scope.cancel()


async def test_a_proxy_that_joins_writes_when_the_only_other_one_has_heard_of_it(
    autojump_clock: MockClock,
) -> None:
    """Until then the other one reads as if nobody else could write."""
    async with proxies(1) as (a,):
        record = await a.snapshots.open("", 60.0, WHO)
        assert a.snapshots.own_writes.shows(record.id, [b"key"])
        a.view.is_late = True
        async with joining(a, "joiner") as joiner:
            await trio.sleep(0.3)
            assert a.snapshots.own_writes.shows(record.id, [b"key"])
            assert joiner.snapshots.preserver.is_held
            a.view.catch_up()
            await trio.sleep(0.1)
            assert not a.snapshots.own_writes.shows(record.id, [b"key"])
            assert not joiner.snapshots.preserver.is_held
            assert a.snapshots.is_usable(record.id)
            assert joiner.snapshots.is_usable(record.id)
        await trio.sleep(2 * SETTINGS.member_ttl_seconds)
        assert not a.snapshots.own_writes.shows(record.id, [b"key"])  # the other one has written, maybe
        later = await a.snapshots.open("", 60.0, WHO)
        assert a.snapshots.own_writes.shows(later.id, [b"key"])


async def test_what_several_proxies_cut_is_not_known_of_by_one_alone(autojump_clock: MockClock) -> None:
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        assert not a.snapshots.own_writes.since
        assert not b.snapshots.own_writes.since
        async with joining(a, "joiner") as joiner:
            await trio.sleep(0.1)
            assert not joiner.snapshots.preserver.is_held
            assert joiner.snapshots.is_usable(record.id)


async def test_a_proxy_that_joins_does_not_wait_for_one_that_is_gone(autojump_clock: MockClock) -> None:
    async with proxies(1) as (a,):
        record = await a.snapshots.open("", 60.0, WHO)
        a.view.is_late = a.view.is_down = True
        async with joining(a, "joiner") as joiner:
            assert joiner.snapshots.preserver.is_held
            await trio.sleep(SETTINGS.member_ttl_seconds + 0.1)
            assert not a.snapshots.is_usable(record.id)
            assert not a.snapshots.own_writes.since
            assert not joiner.snapshots.preserver.is_held
            assert joiner.state_of(record.id) is SnapshotState.SERVING


async def test_an_owner_whose_watch_stands_still_hears_when_it_renews_its_lease(
    autojump_clock: MockClock,
) -> None:
    async with proxies(1) as (a,):
        record = await a.snapshots.open("", 60.0, WHO)
        a.view.is_late = True
        async with joining(a, "joiner") as joiner:
            await trio.sleep(SETTINGS.member_ttl_seconds)
            assert not a.snapshots.own_writes.since
            assert a.snapshots.is_usable(record.id)
            a.view.catch_up()
            await trio.sleep(0.1)
            assert not joiner.snapshots.preserver.is_held


async def test_a_proxy_that_could_not_join_in_time_waits_until_it_is_heard_of(
    autojump_clock: MockClock,
) -> None:
    """It has read that a snapshot serves; its entry is in the store, maybe."""
    async with proxies(1) as (a,):
        record = await a.snapshots.open("", 60.0, WHO)
        a.view.is_late = True
        joiner = Proxy(a.view._store, "joiner", SETTINGS)
        joiner.snapshots.members.fresh_others = trio.sleep_forever  # type: ignore[method-assign, assignment]
        await joiner.snapshots.recover(1.0)
        assert joiner.newest == record.id
        assert joiner.snapshots.preserver.is_held


async def test_a_cut_whose_opening_was_given_up_holds_nobody(autojump_clock: MockClock) -> None:
    """The store may carry out what was cancelled, and the watch brings it."""
    async with proxies(2) as (a, _):
        await a.snapshots.open("", 60.0, WHO)
        number = a.snapshots.book.last_id + 1
        late = SnapshotRecord(number, SnapshotState.OPENING, 0.0, owner="proxy0")
        a.snapshots.book._adopt(late, 1_000)
        a.snapshots.book._adopt(replace(late, is_cut=True), 1_001)
        assert a.newest == number
        assert a.snapshots._barrier is None
        assert not a.snapshots.preserver.is_held
        assert number not in a.snapshots.own_writes.since


async def test_nothing_is_known_of_a_snapshot_that_was_opened_past_other_proxies(
    autojump_clock: MockClock,
) -> None:
    """A proxy that lost its lease has connections still, and writes when it goes on."""
    async with proxies(1) as (a,):
        found = [True, False]

        async def kill_strangers() -> bool:
            return found.pop(0)

        a.snapshots._kill_strangers = kill_strangers  # type: ignore[method-assign]
        await a.snapshots.open("", 60.0, WHO)
        assert not a.snapshots.own_writes.since


async def test_a_proxy_that_joins_preserves_for_what_was_aborted_just_now(autojump_clock: MockClock) -> None:
    """Another one may not have heard of the end yet."""
    async with proxies(2) as (a, b):
        record = await a.snapshots.open("", 60.0, WHO)
        await wait_all_tasks_blocked()
        b.view.is_late = True
        a.snapshots._abort([record.id], "it is over its budget")
        await trio.sleep(0.5)
        async with joining(a, "joiner") as joiner:
            assert b.snapshots.is_usable(record.id)
            assert joiner.newest == record.id
            await trio.sleep(2 * SETTINGS.member_ttl_seconds + 1.0)
            assert joiner.newest == 0


async def test_what_is_known_of_ended_snapshots_is_forgotten(autojump_clock: MockClock) -> None:
    async with proxies(1) as (a,):
        first = await a.snapshots.open("", 600.0, WHO)
        for _ in range(3):
            other = await a.snapshots.open("", 600.0, WHO)
            await a.snapshots.close(other.id, WHO)
        another = await a.snapshots.open("", 600.0, WHO)
        assert set(a.snapshots.own_writes.since) == {first.id, another.id}
        a.snapshots._abort([another.id], "it is over its budget")
        assert set(a.snapshots.own_writes.since) == {first.id}


async def test_proxies_that_begin_anew_together_do_not_wait_for_each_other(autojump_clock: MockClock) -> None:
    store = SharedStore()
    async with trio.open_nursery() as nursery:
        for name in ("first", "second"):
            async with trio.open_nursery() as life:
                proxy = Proxy(store, name, SETTINGS)
                await proxy.snapshots.recover(1.0)
                life.start_soon(proxy.snapshots.run)
                await proxy.snapshots.open("", 600.0, WHO)
                life.cancel_scope.cancel()
        again = [Proxy(store, name, SETTINGS) for name in ("first", "second")]
        for proxy in again:
            await proxy.snapshots.recover(1.0)
        assert again[1].snapshots.preserver.is_held
        for proxy in again:
            nursery.start_soon(proxy.snapshots.run)
        await trio.sleep(0.1)
        assert not any(proxy.snapshots.preserver.is_held for proxy in again)
        assert all(len(proxy.snapshots._serving) == 2 for proxy in again)
        nursery.cancel_scope.cancel()
