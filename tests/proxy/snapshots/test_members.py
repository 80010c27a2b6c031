"""Members: none counts on a lease that may be over, and no snapshot opens without one that does not know of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import combinations
from math import inf
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from proxy.snapshots.book import Book
from proxy.snapshots.members import Member, Members, Phase
from proxy.store.interface import LeaseExpiredError, StoreUnavailableError, TopologyStore
from proxy.store.memory import MemoryStore
from proxy.store.records import MEMBER_ACKS, MEMBERS
from proxy.store.sqlite import open_store
from proxy.topology.audit import Operator
from tests.proxy.failing_store import FailingStore

ANNA = Operator("anna", "10.0.0.7:4711")
AT = 1000.0
TTL_SECONDS = 3.0


class SharedStore(FailingStore):
    """As if other processes had it, too; a grant or a renewal may take its time."""

    is_shared = True
    grant_seconds = 0.0
    renew_seconds = 0.0

    async def grant(self, ttl_seconds: float) -> int:
        await trio.sleep(self.grant_seconds)
        return await super().grant(ttl_seconds)

    async def renew(self, lease: int) -> None:
        await super().renew(lease)
        await trio.sleep(self.renew_seconds)


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


def members_of(
    store: TopologyStore, proxy_id: str = "p1", read_records: Callable[[], Awaitable[None]] = nothing
) -> Members:
    return Members(store, proxy_id, TTL_SECONDS, read_records=read_records, now=lambda: AT)


async def keys(store: TopologyStore) -> list[str]:
    return [entry.key for entry in await store.read("member", "membes", limit=99)]


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.001)


class Heard(list[str]):
    """What a member told of itself, and whether that was so at the time."""

    def __init__(self, members: Members) -> None:
        super().__init__()
        members.on_detached = lambda: self.append("detached" if not members.is_attached() else "not detached")
        members.on_attached = lambda: self.append("attached" if members.is_attached() else "not attached")


@pytest.fixture(params=["memory", "sqlite"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Sequence[TopologyStore]]:
    """One store as two proxies have it: of the durable twin, two objects over one file."""
    opened: list[TopologyStore]
    if request.param == "memory":
        opened = [SharedStore()] * 2
    else:
        opened = [await open_store(tmp_path / "store.db") for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for store in dict.fromkeys(opened):
            nursery.start_soon(store.run)
        yield opened
        nursery.cancel_scope.cancel()
    for store in opened:
        await store.aclose()


@pytest.fixture
async def pair(stores: Sequence[TopologyStore]) -> AsyncIterator[tuple[Members, Members]]:
    """Two members that know each other."""
    here, there = members_of(stores[0]), members_of(stores[1], "p2")
    async with trio.open_nursery() as nursery:
        for members in (here, there):
            await members.join()
            nursery.start_soon(members.run)
        await until(lambda: here.others and there.others)
        yield here, there
        nursery.cancel_scope.cancel()


async def test_members_see_each_other(stores: Sequence[TopologyStore]) -> None:
    """Who joins is seen, who stops leaves at once; and each but itself."""
    here, there = members_of(stores[0]), members_of(stores[1], "p2")
    assert not here.is_attached()
    assert here.problems() == ["this proxy is detached, and serves no snapshot: it joins again"]
    await here.join()
    assert here.is_attached()
    assert here.problems() == []
    assert await here.fresh_others() == {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        async with trio.open_nursery() as other:
            await there.join()
            assert await here.fresh_others() == {"p2": Member("p2", AT)} == here.others
            assert await there.fresh_others() == {"p1": Member("p1", AT)}
            other.start_soon(there.run)
            await until(lambda: there.others)
            other.cancel_scope.cancel()
        assert not there.is_attached()
        await until(lambda: not here.others)
        assert await keys(stores[0]) == [MEMBERS + "p1"]
        nursery.cancel_scope.cancel()
    assert await keys(stores[0]) == []


async def test_alone_it_is_attached_for_ever_and_writes_nothing(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    read: list[bool] = []

    async def read_records() -> None:
        read.append(members.is_attached())

    members = members_of(store, read_records=read_records)
    heard = Heard(members)
    await members.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(members.run)
        await trio.sleep(80_000)
        assert members.is_attached()
        assert (members.valid_until, read) == (inf, [False])
        assert await members.fresh_others() == members.others == {}
        assert await members.wait_acks(7, Phase.CUT, set(), trio.current_time()) == set()
        await members.acknowledge(7, Phase.CUT)
        assert await members.wait_acks(7, Phase.CUT, {"p1"}, trio.current_time()) == set()
        members.forget(7)
        assert await members.wait_acks(7, Phase.CUT, {"p1"}, trio.current_time() + 1) == {"p1"}
        assert (heard, await store.revision(), members.problems()) == ([], 0, [])
        nursery.cancel_scope.cancel()


async def test_a_lease_is_reckoned_from_before_it_was_asked_for(autojump_clock: MockClock) -> None:
    """By a clock that nobody sets, and never longer than the store has it."""
    store = SharedStore()
    store.grant_seconds = store.renew_seconds = 0.5
    members = members_of(store)
    begun = trio.current_time()
    await members.join()
    assert members.valid_until == pytest.approx(begun + TTL_SECONDS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        nursery.start_soon(members.run)
        for _ in range(50):
            await trio.sleep(0.3)
            assert members.is_attached()
            (lease,) = store._leases.values()
            assert members.valid_until <= lease.ends_at
        nursery.cancel_scope.cancel()


async def test_a_lost_lease_is_told_in_time_and_the_records_are_read_before_the_next(
    autojump_clock: MockClock,
) -> None:
    """Promise 8: the store is away. First detached, before the lease is over in the store; then attached; once each."""
    store = SharedStore()
    read: list[bool] = []

    async def read_records() -> None:
        await store.revision()
        read.append(members.is_attached())

    members = members_of(store, read_records=read_records)
    heard = Heard(members)
    await members.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        nursery.start_soon(members.run)
        for round_ in range(1, 4):
            await trio.sleep(1.3 * TTL_SECONDS)
            assert len(heard) == 2 * (round_ - 1)
            until = members.valid_until
            store.go_down()
            await trio.sleep_until(until - 0.001)
            assert members.is_attached()
            await trio.sleep_until(until + 0.001)
            assert (heard[-1], members.is_attached()) == ("detached", False)
            assert "detached, and serves no snapshot: the disk is full" in members.problems()[0]
            with pytest.raises(LeaseExpiredError):
                await members.acknowledge(7, Phase.CUT)
            await trio.sleep(TTL_SECONDS)
            store.is_down = False
            await trio.sleep(1.0)
            assert heard == ["detached", "attached"] * round_
            assert members.is_attached()
            assert members.problems() == []
        nursery.cancel_scope.cancel()
    assert read == [False] * 4
    assert heard == ["detached", "attached"] * 3


async def test_a_renewal_that_hangs_detaches(autojump_clock: MockClock) -> None:
    """It cannot be known what the store has made of it."""
    store = SharedStore()
    members = members_of(store)
    heard = Heard(members)
    await members.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        nursery.start_soon(members.run)
        store.renew_seconds = 100.0
        await trio.sleep(TTL_SECONDS + 0.001)
        assert heard == ["detached"]
        store.renew_seconds = 0.0
        await trio.sleep(2 * TTL_SECONDS)
        assert heard == ["detached", "attached"]
        nursery.cancel_scope.cancel()


async def test_a_proxy_that_starts_without_the_store_joins_when_it_is_there(
    autojump_clock: MockClock,
) -> None:
    """Also one that cannot read the records yet is no member that others may count on."""
    store = SharedStore()
    store.is_down = True
    is_broken = True

    async def read_records() -> None:
        await store.revision()
        if is_broken:
            raise StoreUnavailableError("a disk that reads nothing")

    members = members_of(store, read_records=read_records)
    heard = Heard(members)
    with pytest.raises(StoreUnavailableError):
        await members.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(members.run)
        await trio.sleep(1.0)
        store.is_down = False
        await trio.sleep(1.0)
        assert not members.is_attached()
        is_broken = False
        await trio.sleep(1.0)
        assert members.is_attached()
        assert heard == ["attached"]
        nursery.cancel_scope.cancel()


async def test_an_entry_that_is_gone_detaches_at_once(pair: tuple[Members, Members]) -> None:
    """Whoever ended the lease: the others go on without this proxy, which joins again."""
    here, there = pair
    heard = Heard(here)
    await there._store.revoke(here._lease)
    await until(lambda: len(heard) == 2)
    assert heard == ["detached", "attached"]
    assert set(await there.fresh_others()) == {"p1"}


async def test_acknowledgements(pair: tuple[Members, Members]) -> None:
    """A later phase includes the earlier ones and is not taken back; what is missing at the deadline is told."""
    here, there = pair

    async def missing(phase: Phase, seconds: float = 0.05) -> set[str]:
        return await here.wait_acks(7, phase, {"p1", "p2"}, trio.current_time() + seconds)

    assert await missing(Phase.ATTENTIVE) == {"p1", "p2"}
    await here.acknowledge(7, Phase.CUT)
    await there.acknowledge(7, Phase.ATTENTIVE)
    assert await missing(Phase.ATTENTIVE, 20) == set()
    assert await missing(Phase.CUT) == {"p2"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(there.acknowledge, 7, Phase.CUT)
        nursery.start_soon(there.acknowledge, 7, Phase.ATTENTIVE)
        assert await missing(Phase.CUT, 20) == set()
    await there.acknowledge(7, Phase.DONE)
    await there.acknowledge(7, Phase.CUT)
    await until(lambda: here._has(7, "p2", Phase.DONE))
    assert await here.wait_acks(8, Phase.ATTENTIVE, {"p2"}, trio.current_time()) == {"p2"}


async def test_an_ended_snapshot_leaves_no_key(pair: tuple[Members, Members]) -> None:
    """And one that comes late is not written any more."""
    here, _ = pair
    for members in pair:
        for number in (7, 8):
            await members.acknowledge(number, Phase.CUT)
        members.forget(7)
        members.forget(7)
        await members.acknowledge(7, Phase.DONE)
    with trio.fail_after(20):
        while [key for key in await keys(here._store) if key.startswith(MEMBER_ACKS)] != [
            f"{MEMBER_ACKS}0000000000000008/p1",
            f"{MEMBER_ACKS}0000000000000008/p2",
        ]:
            await trio.sleep(0.01)
    await until(lambda: not here._has(7, "p2", Phase.CUT))


async def test_acknowledgements_are_removed_when_the_store_is_back(autojump_clock: MockClock) -> None:
    store = SharedStore()
    members = members_of(store)
    await members.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(members.run)
        await members.acknowledge(7, Phase.CUT)
        store.is_down = True
        members.forget(7)
        await trio.sleep(0.5)
        store.is_down = False
        await trio.sleep(1.0)
        assert await keys(store) == [MEMBERS + "p1"]
        nursery.cancel_scope.cancel()


async def test_a_member_whose_lease_is_over_is_not_waited_for(pair: tuple[Members, Members]) -> None:
    """It is missing all the same, and what it acknowledged is gone with it."""
    here, there = pair
    third = members_of(there._store, "p3")  # it does not run, so it does not come back
    await third.join()
    await third.acknowledge(7, Phase.CUT)
    assert set(await here.fresh_others()) == {"p2", "p3"}
    assert await here.wait_acks(7, Phase.CUT, {"p3"}, trio.current_time() + 20) == set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(third._store.revoke, third._lease)
        with trio.fail_after(20):
            assert await here.wait_acks(7, Phase.DONE, {"p3"}, inf) == {"p3"}
    await until(lambda: not here._has(7, "p3", Phase.ATTENTIVE))


async def test_a_compaction_hides_nobody(stores: Sequence[TopologyStore]) -> None:
    """Who came and who went is read anew."""
    here, store = members_of(stores[0]), stores[1]
    others = [members_of(store, f"p{number}") for number in range(2, 5)]
    await here.join()
    for other in others[:2]:
        await other.join()
        await other.acknowledge(7, Phase.CUT)
    await here.fresh_others()
    assert set(here.others) == {"p2", "p3"}
    await store.revoke(others[0]._lease)
    await others[2].join()
    await store.compact(await store.revision())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        await until(lambda: set(here.others) == {"p3", "p4"})
        assert here._has(7, "p3", Phase.CUT)
        assert not here._has(7, "p2", Phase.CUT)
        nursery.cancel_scope.cancel()


# -- the order of joining and opening


class Turns:
    """Whose call the store answers next. When one has no more, the other goes on."""

    def __init__(self, order: Sequence[str]) -> None:
        self.order = list(order)
        self.ended: set[str] = set()
        self.news = trio.Event()

    async def wait(self, actor: str) -> None:
        while True:
            while self.order and self.order[0] in self.ended:
                self.order.pop(0)
            if not self.order or self.order[0] == actor:
                return
            await self.news.wait()

    def tell(self) -> None:
        self.news.set()
        self.news = trio.Event()


class TakingTurns:
    """A store as one actor has it."""

    def __init__(self, store: MemoryStore, actor: str, turns: Turns) -> None:
        self._store, self._actor, self._turns = store, actor, turns

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._store, name)
        if name not in ("revision", "get", "read", "commit", "grant", "revoke"):
            return attribute

        async def in_turn(*arguments: Any, **options: Any) -> Any:
            await self._turns.wait(self._actor)
            try:
                return await attribute(*arguments, **options)
            finally:
                if self._turns.order:
                    self._turns.order.pop(0)
                self._turns.tell()

        return in_turn


CALLS = 5  # of each actor, about; what is left when the other has ended goes on by itself


async def is_known(order: Sequence[str], *, opener_reads_first: bool = False) -> bool:
    """Whether the opener sees the new member, or the new member the record when it counts as attached."""
    store, turns = SharedStore(), Turns(order)
    opener = Book(TakingTurns(store, "opener", turns), "p1", lambda: AT)
    opening = members_of(TakingTurns(store, "opener", turns), "p1")
    book = Book(TakingTurns(store, "joiner", turns), "p2", lambda: AT)
    joining = members_of(TakingTurns(store, "joiner", turns), "p2", book.load)
    seen: set[str] = set()
    known: set[int] = set()

    async def open_one() -> None:
        if opener_reads_first:
            seen.update(await opening.fresh_others())
        await opener.allocate("", None, ANNA, open_max=8)
        if not opener_reads_first:
            seen.update(await opening.fresh_others())
        turns.ended.add("opener")
        turns.tell()

    async def join() -> None:
        await joining.join()
        assert joining.is_attached()
        known.update(book.records)
        turns.ended.add("joiner")
        turns.tell()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_one)
            nursery.start_soon(join)
    return bool(seen or known)


def orders() -> list[list[str]]:
    places = range(2 * CALLS)
    return [
        ["opener" if place in of_opener else "joiner" for place in places]
        for of_opener in combinations(places, CALLS)
    ]


async def test_an_opener_sees_the_member_or_the_member_sees_the_record() -> None:
    """In every order in which the store may get their calls."""
    assert [order for order in orders() if not await is_known(order)] == []


async def test_an_opener_that_reads_the_members_first_would_miss_one() -> None:
    """So the check above can fail."""
    assert [order for order in orders() if not await is_known(order, opener_reads_first=True)] != []
