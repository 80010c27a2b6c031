"""Proxies that share a store: one looks at the cluster for all, and no failure of the store stops any of them.

The store is the real one in memory; the cluster is a model that answers as nodes do. The clock is virtual.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio

from proxy.store.interface import Batch, Delete, Entry, LeaseExpiredError, Put, StoreUnavailableError, Watch
from proxy.store.memory import MemoryStore
from proxy.store.records import DISCOVERER, EVENT_HEAD, EVENTS, numbered, pack_number, unpack_event
from proxy.topology.discovery import Look
from proxy.topology.keeper import LEASE_SECONDS, RECORD_SECONDS, SILENCE_SECONDS, Keeper
from proxy.topology.service import Topology
from routing.cluster_nodes import NodeLine, Report
from routing.slot import SLOT_COUNT
from routing.timeline import Event, EventKind, TimelineLimits
from routing.topology import Address, Node, Role, TopologyView, ranges

WALL_OFFSET = 1_700_000_000.0  # Unix seconds at trio time 0
REFRESH_SECONDS = 0.5
SOON = 0.05  # more than any step takes that waits for no timer


def wall_clock() -> float:
    return WALL_OFFSET + trio.current_time()


@dataclass
class ClusterModel:
    """Primaries that share the slots evenly. ``owners`` and ``is_down`` may be changed at any time."""

    primaries: int = 3
    first_port: int = 7000
    name: str = "a"
    owners: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    is_down: bool = False

    def __post_init__(self) -> None:
        self.owners = [slot * self.primaries // SLOT_COUNT for slot in range(SLOT_COUNT)]
        self.epochs = list(range(1, self.primaries + 1))

    def id_of(self, index: int) -> str:
        return f"{self.name}{index:039d}"

    def address_of(self, index: int) -> Address:
        return Address("node", self.first_port + index)

    def move(self, slot: int, target: int) -> None:
        self.owners[slot] = target
        self.epochs[target] = max(self.epochs) + 1

    def reports(self) -> tuple[Report, ...]:
        lines = [
            NodeLine(
                Node(self.id_of(index), self.address_of(index), Role.PRIMARY, None, self.epochs[index]),
                tuple(ranges(slot for slot, owner in enumerate(self.owners) if owner == index)),
            )
            for index in range(self.primaries)
        ]
        return tuple(
            Report(line, tuple(other for other in lines if other is not line), max(self.epochs), True)
            for line in lines
        )


class ModelDiscovery:
    """Asks a ClusterModel, in no time."""

    def __init__(self, cluster: ClusterModel) -> None:
        self.cluster = cluster
        self.seeds = (cluster.address_of(0),)
        self.looks_total = 0
        self.heard_of: list[Address] = []
        self.answered_at: float | None = None
        self.engine_version = "7.0.0"

    async def look(self, view: TopologyView, *, with_seeds: bool, heard_of: Sequence[Address] = ()) -> Look:
        began = trio.current_time()
        await trio.sleep(0.001)
        self.looks_total += 1
        self.heard_of += heard_of
        addresses = tuple(map(self.cluster.address_of, range(self.cluster.primaries)))
        if self.cluster.is_down:
            return Look(began, addresses, (), dict.fromkeys(addresses, "down"), {})
        self.answered_at = trio.current_time()
        return Look(began, addresses, self.cluster.reports(), {}, {})

    def problems(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class FailingStore:
    """One process's way to a store; it can be cut. What is not said here goes through unchanged."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.name = "a file"
        self.is_cut = False
        self.is_hung = False
        self.is_locked = False  # takes no writes
        self.is_stuck = False  # writes never end

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name in ("problems", "run"):
            return method

        async def guarded(*arguments: Any, **named: Any) -> Any:
            await self._pass(is_write=name not in ("get", "read", "revision"))
            return await method(*arguments, **named)

        return guarded

    def exchange(self, store: MemoryStore) -> None:
        """Another store is at the same place from now on."""
        self._store = store

    def watch(self, prefix: str, after: int) -> Watch:
        return CutWatch(self, self._store.watch(prefix, after))

    async def _pass(self, is_write: bool) -> None:
        if self.is_hung or (self.is_stuck and is_write):
            await trio.sleep_forever()
        if self.is_cut or (self.is_locked and is_write):
            raise StoreUnavailableError("the file is locked by another process")


@dataclass
class CutWatch:
    store: FailingStore
    watch: Watch

    async def next_batch(self) -> Batch:
        while True:
            if self.store.is_cut:
                raise StoreUnavailableError("the file is gone")
            with trio.move_on_after(SOON):
                return await self.watch.next_batch()


class ProxyModel:
    """A keeper with what it keeps."""

    def __init__(self, name: str, cluster: ClusterModel, store: MemoryStore) -> None:
        self.store = FailingStore(store)
        self.topology = Topology()
        self.discovery = ModelDiscovery(cluster)
        self.keeper = Keeper(
            self.topology,
            self.discovery,  # type: ignore[arg-type]  # it has what the keeper uses
            self.store,  # type: ignore[arg-type]
            name,
            refresh_seconds=REFRESH_SECONDS,
            limits=TimelineLimits(),
            clock=wall_clock,
        )
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        with self.scope:
            await self.keeper.run()

    def stop(self) -> None:
        self.scope.cancel()

    def kill(self) -> None:
        """As SIGKILL does: nothing more reaches the store."""
        self.store.is_cut = True
        self.scope.cancel()

    def owner(self, slot: int) -> Address | None:
        primary = self.topology.view.primary_of(slot)
        return primary and primary.address


class Fleet:
    def __init__(self, nursery: trio.Nursery, store: MemoryStore) -> None:
        self.nursery = nursery
        self.store = store
        self.cluster = ClusterModel()

    async def start(self, name: str, cluster: ClusterModel | None = None) -> ProxyModel:
        proxy = ProxyModel(name, cluster or self.cluster, self.store)
        self.nursery.start_soon(proxy.run)
        await trio.sleep(SOON)
        return proxy

    async def events(self) -> list[Event]:
        entries: Sequence[Entry] = await self.store.read(EVENTS, EVENTS + "~", limit=1000)
        return [unpack_event(int(entry.key.rpartition("/")[2]), entry.value) for entry in entries]

    async def events_of(self, kind: EventKind) -> list[Event]:
        return [event for event in await self.events() if event.kind is kind]


@asynccontextmanager
async def a_fleet() -> AsyncIterator[Fleet]:
    store = MemoryStore()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        yield Fleet(nursery, store)
        nursery.cancel_scope.cancel()


async def eventually(is_true: Callable[[], bool], seconds: float) -> float:
    """Return after how many seconds it became true; fail if it did not within ``seconds``."""
    began = trio.current_time()
    while not is_true():
        assert trio.current_time() - began <= seconds, "it did not become true"
        await trio.sleep(0.01)
    return trio.current_time() - began


async def test_a_lone_proxy_records_what_it_sees(autojump_clock: trio.testing.MockClock) -> None:
    """Each view that is adopted is a version on record, with the events that explain it."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")
        assert proxy.keeper.is_discoverer
        assert proxy.keeper.recorded.number == 1
        fleet.cluster.move(7, 2)
        await eventually(lambda: proxy.owner(7) == fleet.cluster.address_of(2), REFRESH_SECONDS + SOON)
        assert proxy.keeper.recorded.number == 2
        kinds = [event.kind for event in await fleet.events()]
        assert kinds[:2] == [EventKind.DISCOVERER_CHANGED, EventKind.CLUSTER_SEEN]
        assert EventKind.MIGRATION_BEGUN in kinds


async def test_one_proxy_of_a_store_looks_for_all(autojump_clock: trio.testing.MockClock) -> None:
    """A fleet does not ask a cluster once for each proxy; all of them see each change."""
    async with a_fleet() as fleet:
        proxies = [await fleet.start(name) for name in ("one", "two", "three")]
        looks = [proxy.discovery.looks_total for proxy in proxies]
        fleet.cluster.move(7, 2)
        await trio.sleep(10)
        more = [proxy.discovery.looks_total - before for proxy, before in zip(proxies, looks, strict=True)]
        assert more[0] >= 10
        assert more[1:] == [0, 0]
        assert all(proxy.owner(7) == fleet.cluster.address_of(2) for proxy in proxies)
        assert not any(proxy.keeper.problems() for proxy in proxies)


async def test_a_redirection_at_any_proxy_makes_the_discoverer_look(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It adopts what MOVED says at once, and the others see it long before the next look is due."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        one.keeper.refresh_seconds = 60.0
        await trio.sleep(1)
        fleet.cluster.move(7, 2)
        two.topology.on_moved(7, fleet.cluster.address_of(2))
        assert two.owner(7) == fleet.cluster.address_of(2)
        assert await eventually(lambda: one.owner(7) == fleet.cluster.address_of(2), 1.0) < 0.5
        await trio.sleep(5)
        assert two.owner(7) == fleet.cluster.address_of(2)


async def test_a_dead_discoverer_is_replaced(autojump_clock: trio.testing.MockClock) -> None:
    """Within the lease's time; and an event says that nobody looked meanwhile."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        one.kill()
        fleet.cluster.move(7, 2)
        seconds = await eventually(lambda: two.keeper.is_discoverer, LEASE_SECONDS + 2 * SOON)
        assert seconds > LEASE_SECONDS / 2
        await eventually(lambda: two.owner(7) == fleet.cluster.address_of(2), 2 * SOON)
        change = (await fleet.events_of(EventKind.DISCOVERER_CHANGED))[-1]
        assert change.evidence["former"] == "one"
        assert change.evidence["former_said_so"] is False


async def test_a_discoverer_that_stops_is_replaced_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """It says so in the store on its way out."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        one.stop()
        await eventually(lambda: two.keeper.is_discoverer, 4 * SOON)
        await trio.sleep(SOON)
        assert (await fleet.events_of(EventKind.DISCOVERER_CHANGED))[-1].evidence["former_said_so"] is True


async def test_a_discoverer_that_sees_nothing_resigns(autojump_clock: trio.testing.MockClock) -> None:
    """Its store is fine, and no node answers it, a changed password for one: another looks and records instead."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        one.discovery.cluster = ClusterModel(is_down=True)
        await eventually(lambda: two.keeper.is_discoverer, SILENCE_SECONDS + LEASE_SECONDS + 1)
        fleet.cluster.move(7, 2)
        await eventually(lambda: one.owner(7) == fleet.cluster.address_of(2), 1.0)
        await trio.sleep(10)
        assert two.keeper.is_discoverer
        one.discovery.cluster = fleet.cluster
        two.stop()
        await eventually(lambda: one.keeper.is_discoverer, 2.0)


async def test_lasting_trouble_is_looked_at_seldom(autojump_clock: trio.testing.MockClock) -> None:
    """A node that is down for good costs as little as one that is well, once nothing changes any more."""
    async with a_fleet() as fleet:
        one = await fleet.start("one")
        fleet.cluster.owners[100:200] = [9] * 100
        await trio.sleep(2)
        before = one.discovery.looks_total
        await trio.sleep(2)
        assert one.discovery.looks_total - before > 10
        await trio.sleep(20)
        before = one.discovery.looks_total
        await trio.sleep(10)
        assert one.discovery.looks_total - before <= 10 / REFRESH_SECONDS
        fleet.cluster.owners[100:200] = [0] * 100
        await eventually(lambda: one.owner(150) == fleet.cluster.address_of(0), REFRESH_SECONDS + SOON)


async def test_a_lone_proxy_before_a_cluster_that_is_down_goes_on_when_it_is_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It resigned meanwhile, and nobody took its place."""
    async with a_fleet() as fleet:
        one = await fleet.start("one")
        fleet.cluster.is_down = True
        await trio.sleep(30)
        assert not one.keeper.is_discoverer
        fleet.cluster.is_down = False
        await eventually(lambda: one.keeper.is_discoverer, REFRESH_SECONDS + 1)
        fleet.cluster.move(7, 2)
        await eventually(lambda: one.keeper.recorded.number == 2, REFRESH_SECONDS + SOON)


async def test_anomalies_are_named_while_nothing_can_be_recorded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What is wrong with the cluster is no less wrong when the store is locked as well."""
    async with a_fleet() as fleet:
        one = await fleet.start("one")
        one.store.is_locked = True
        await trio.sleep(LEASE_SECONDS + 1)
        fleet.cluster.owners[100:200] = [9] * 100
        await trio.sleep(1)
        assert "uncovered_slots" in [anomaly.kind.value for anomaly in one.keeper.anomalies]
        fleet.cluster.owners[100:200] = [0] * 100
        await trio.sleep(1)
        assert "uncovered_slots" not in [anomaly.kind.value for anomaly in one.keeper.anomalies]


async def test_a_wish_names_the_node_that_was_heard_of(autojump_clock: trio.testing.MockClock) -> None:
    """In a large cluster the discoverer asks some nodes in turn, and those first that somebody was sent to."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        await trio.sleep(1)
        two.topology.on_moved(7, Address("elsewhere", 7))
        await eventually(lambda: Address("elsewhere", 7) in one.discovery.heard_of, 0.5)


async def test_a_silent_discoverer_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    """One that holds the lease but tells nothing, because it cannot write: the others look for themselves."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        one.keeper.recorder.touch = one.keeper.recorder.record = hang  # type: ignore[method-assign,assignment]
        await trio.sleep(SOON)
        fleet.cluster.move(7, 2)
        await eventually(lambda: two.owner(7) == fleet.cluster.address_of(2), SILENCE_SECONDS + 1)
        assert not two.keeper.is_discoverer


async def hang(*arguments: object, **named: object) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("fault", ["is_cut", "is_hung", "is_locked"])
async def test_a_store_that_fails_holds_no_view_back(
    fault: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Promise 8: the view follows the cluster; health says what fails; and when the store is back, an event tells
    for how long nothing was recorded."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")
        setattr(proxy.store, fault, True)
        fleet.cluster.move(7, 2)
        limit = REFRESH_SECONDS + RECORD_SECONDS + SOON
        await eventually(lambda: proxy.owner(7) == fleet.cluster.address_of(2), limit)
        await trio.sleep(6)
        fleet.cluster.move(7, 1)
        await eventually(lambda: proxy.owner(7) == fleet.cluster.address_of(1), limit)
        assert "the topology store has been failing" in " ".join(proxy.keeper.problems())
        assert not await fleet.events_of(EventKind.OBSERVATION_GAP)
        setattr(proxy.store, fault, False)
        await trio.sleep(LEASE_SECONDS + 2)
        assert not proxy.keeper.problems()
        gaps = await fleet.events_of(EventKind.OBSERVATION_GAP)
        assert len(gaps) >= 1
        assert gaps[0].evidence["looks_not_recorded"] > 0
        assert proxy.owner(7) == fleet.cluster.address_of(1)
        assert proxy.keeper.recorded.number >= 2


async def test_an_old_record_is_not_believed_over_the_cluster(autojump_clock: trio.testing.MockClock) -> None:
    """A proxy that starts again sees the cluster itself before it reads what was."""
    async with a_fleet() as fleet:
        one = await fleet.start("one")
        one.stop()
        await trio.sleep(3600)
        fleet.cluster.move(7, 2)
        seen = []
        two = ProxyModel("two", fleet.cluster, fleet.store)
        two.topology.subscribe(lambda old, new: seen.append(two.owner(7)))
        fleet.nursery.start_soon(two.run)
        await trio.sleep(2)
        assert set(seen) == {fleet.cluster.address_of(2)}
        assert len(await fleet.events_of(EventKind.OBSERVATION_GAP)) == 1


async def test_the_last_map_serves_where_no_node_answers(autojump_clock: trio.testing.MockClock) -> None:
    """Better than nothing: the seeds are down at the start, and the record knows them."""
    async with a_fleet() as fleet:
        (await fleet.start("one")).stop()
        await trio.sleep(10)
        fleet.cluster.is_down = True
        two = await fleet.start("two")
        assert two.owner(7) == fleet.cluster.address_of(0)
        assert any("no node has answered" in problem for problem in two.keeper.problems())


async def test_the_file_of_another_cluster_is_not_followed(autojump_clock: trio.testing.MockClock) -> None:
    """Else a wrong setting would send one service's writes to another's data."""
    async with a_fleet() as fleet:
        await fleet.start("one")
        other = ClusterModel(first_port=8000, name="b")
        stranger = await fleet.start("stranger", other)
        await trio.sleep(5)
        assert stranger.owner(7) == other.address_of(0)
        assert "another cluster" in " ".join(stranger.keeper.problems())
        other.move(7, 2)
        await eventually(lambda: stranger.owner(7) == other.address_of(2), REFRESH_SECONDS + SOON)
        assert not await fleet.events_of(EventKind.CLUSTER_REPLACED)


async def test_a_new_cluster_takes_the_place_of_one_that_is_gone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Nobody looks at the old one any more: the record goes on with the new, and says so."""
    async with a_fleet() as fleet:
        (await fleet.start("one")).stop()
        await trio.sleep(1)
        other = ClusterModel(first_port=8000, name="b")
        two = await fleet.start("two", other)
        await trio.sleep(1)
        assert two.owner(7) == other.address_of(0)
        assert not two.keeper.problems()
        assert len(await fleet.events_of(EventKind.CLUSTER_REPLACED)) == 1


async def test_a_version_comes_too_late_to_undo_a_later_look(autojump_clock: trio.testing.MockClock) -> None:
    """The store hangs while a view is recorded, so that is adopted at once, and a later one after it. When the
    first arrives from the store at last, the later one stays."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")
        commit = fleet.store.commit
        slow = trio.Event()

        async def late(*arguments: Any, **named: Any) -> int:
            with trio.CancelScope(shield=True):
                await slow.wait()
                return await commit(*arguments, **named)

        fleet.store.commit = late  # type: ignore[method-assign]
        seen: list[Address | None] = []
        fleet.cluster.move(7, 2)
        slow_is_over = partial(eventually, lambda: len(seen) >= 1, 5.0)
        proxy.topology.subscribe(lambda old, new: seen.append(proxy.owner(7)))
        fleet.nursery.start_soon(_release, slow, 3.0)
        await slow_is_over()
        fleet.cluster.move(7, 1)
        await trio.sleep(10)
        assert seen[0] == fleet.cluster.address_of(2)
        assert seen[-1] == fleet.cluster.address_of(1)
        assert seen.count(fleet.cluster.address_of(2)) == 1


async def _release(event: trio.Event, seconds: float) -> None:
    await trio.sleep(seconds)
    event.set()


async def test_a_gap_begins_with_the_first_look_that_nobody_recorded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """That a store does not answer is known only after a while; what was seen until then was not recorded either."""
    async with a_fleet() as fleet:
        proxy = ProxyModel("one", fleet.cluster, fleet.store)
        proxy.store.is_stuck = True
        started_at = wall_clock()
        fleet.nursery.start_soon(proxy.run)
        await trio.sleep(3 * LEASE_SECONDS)
        proxy.store.is_stuck = False
        await trio.sleep(LEASE_SECONDS + 1)
        (gap,) = await fleet.events_of(EventKind.OBSERVATION_GAP)
        since = gap.evidence["from"]
        assert isinstance(since, float)
        assert since <= started_at + SOON


async def test_a_gap_begins_with_the_last_look_that_was_recorded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What happened between it and the first look that the store did not take is lost with that one: a slot that went
    and came back shows in no later look."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")
        await trio.sleep(10)
        proxy.topology.refresh_soon()
        await trio.sleep(SOON)
        recorded_at = wall_clock()
        proxy.store.is_locked = True
        fleet.cluster.move(7, 2)
        await trio.sleep(3)
        fleet.cluster.move(7, 0)
        await trio.sleep(3)
        proxy.store.is_locked = False
        await trio.sleep(LEASE_SECONDS + 1)
        (gap,) = await fleet.events_of(EventKind.OBSERVATION_GAP)
        since = gap.evidence["from"]
        assert isinstance(since, float)
        assert recorded_at - 2 * SOON <= since <= recorded_at


async def test_a_lease_that_is_lost_makes_a_gap(autojump_clock: trio.testing.MockClock) -> None:
    """A renewal comes too late, and the entry of the lost lease keeps everyone from recording until it ends. What
    came and went meanwhile is covered by an event."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")
        await trio.sleep(3)
        renew, began_at = fleet.store.renew, wall_clock()

        async def fail(lease: int) -> None:
            fleet.store.renew = renew  # type: ignore[method-assign]
            raise LeaseExpiredError("as after a stop of some seconds")

        fleet.store.renew = fail  # type: ignore[method-assign]
        await eventually(lambda: not proxy.keeper.is_discoverer, 1.0)
        fleet.cluster.move(7, 2)
        proxy.topology.refresh_soon()
        await eventually(lambda: proxy.owner(7) == fleet.cluster.address_of(2), 1.0)
        fleet.cluster.move(7, 0)
        ended_at = wall_clock()
        await trio.sleep(2 * LEASE_SECONDS)
        assert proxy.keeper.is_discoverer
        (gap,) = await fleet.events_of(EventKind.OBSERVATION_GAP)
        since = gap.evidence["from"]
        assert isinstance(since, float)
        assert since <= began_at + REFRESH_SECONDS + SOON
        assert gap.at >= ended_at


async def test_the_record_begins_anew_in_another_file(autojump_clock: trio.testing.MockClock) -> None:
    """The file is exchanged while nothing changes in the cluster and no look is due: the new one gets the map and the
    events all the same."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")
        proxy.keeper.refresh_seconds = 60.0
        await trio.sleep(1)
        renew = fleet.store.renew

        async def exchange(lease: int) -> None:
            fleet.store.renew = renew  # type: ignore[method-assign]
            entries = await fleet.store.read(" ", "~", limit=1000)
            await fleet.store.commit([Delete(entry.key) for entry in entries])
            raise LeaseExpiredError("it is unknown in the new file")

        fleet.store.renew = exchange  # type: ignore[method-assign]
        await trio.sleep(120)
        kinds = [event.kind for event in await fleet.events()]
        assert kinds[:3] == [EventKind.RECORD_LOST, EventKind.DISCOVERER_CHANGED, EventKind.OBSERVATION_GAP]
        assert EventKind.CLUSTER_SEEN in kinds


async def test_what_another_proxy_recorded_is_no_gap(autojump_clock: trio.testing.MockClock) -> None:
    """One that was cut off for a while, and takes over a minute later, claims no gap: the discoverer had recorded."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        two.store.is_cut = True
        await trio.sleep(5)
        assert two.keeper.recorder.missed_total > 0
        two.store.is_cut = False
        await trio.sleep(60)
        one.stop()
        await trio.sleep(5)
        assert two.keeper.is_discoverer
        assert not await fleet.events_of(EventKind.OBSERVATION_GAP)


async def test_a_gap_is_told_once(autojump_clock: trio.testing.MockClock) -> None:
    """The proxy looked all the time and could not record: no event says that nobody looked."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")
        proxy.store.is_locked = True
        await trio.sleep(60)
        proxy.store.is_locked = False
        await trio.sleep(LEASE_SECONDS + 1)
        (gap,) = await fleet.events_of(EventKind.OBSERVATION_GAP)
        assert "nothing was recorded" in gap.message


async def test_a_record_that_is_lost_is_an_event(autojump_clock: trio.testing.MockClock) -> None:
    """The store's file was exchanged: what this proxy had recorded in it is gone, and the next record says so, once."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")
        last = (await fleet.events())[-1].number
        entries = await fleet.store.read(" ", "~", limit=1000)
        await fleet.store.commit([Delete(entry.key) for entry in entries])
        await trio.sleep(LEASE_SECONDS + 1)
        (lost,) = await fleet.events_of(EventKind.RECORD_LOST)
        assert lost.number == 1
        assert lost.evidence == {"from": None, "last_recorded": last, "last_left": 0}
        proxy.store.is_cut = True
        await trio.sleep(3)
        proxy.store.is_cut = False
        await trio.sleep(LEASE_SECONDS + 1)
        assert len(await fleet.events_of(EventKind.RECORD_LOST)) == 1


async def test_a_record_that_goes_back_is_lost(autojump_clock: trio.testing.MockClock) -> None:
    """An older copy: what has the number of the last event is another event, or none."""
    async with a_fleet() as fleet:
        await fleet.start("one")
        last = (await fleet.events())[-1].number
        entry = await fleet.store.get(numbered(EVENTS, 1))
        assert entry is not None
        await fleet.store.commit([Put(numbered(EVENTS, last), entry.value), Delete(DISCOVERER)])
        await trio.sleep(LEASE_SECONDS + 1)
        fleet.cluster.move(7, 2)
        await trio.sleep(1)
        assert len(await fleet.events_of(EventKind.RECORD_LOST)) == 1


async def test_an_event_that_is_too_old_to_keep_is_not_lost(autojump_clock: trio.testing.MockClock) -> None:
    """Others recorded many events since this proxy's last, and retention has removed that."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")
        events = await fleet.store.read(EVENTS, EVENTS + "~", limit=1000)
        newer = len(events) + 5
        await fleet.store.commit(
            [
                *[Delete(entry.key) for entry in events],
                Put(numbered(EVENTS, newer), events[-1].value),
                Put(EVENT_HEAD, pack_number(newer)),
            ]
        )
        fleet.cluster.move(7, 2)
        await trio.sleep(2)
        assert proxy.keeper.recorder.records_total > 1
        assert not await fleet.events_of(EventKind.RECORD_LOST)
