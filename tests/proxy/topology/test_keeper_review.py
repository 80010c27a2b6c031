"""Interleavings in which a proxy could be led astray: by its own old look, by a dead proxy's record, by its own memory.

The models are those of test_keeper; the clock is virtual.
"""

from __future__ import annotations

from typing import Any

import trio

from proxy.store.interface import Put
from proxy.store.memory import MemoryStore
from proxy.store.records import DISCOVERER
from proxy.topology.discovery import Look
from proxy.topology.history import History
from proxy.topology.keeper import LEASE_SECONDS, RECORD_SECONDS, RETRY_SECONDS, SILENCE_SECONDS
from routing.timeline import EventKind
from routing.topology import Address, TopologyView
from tests.proxy.topology.test_keeper import (
    REFRESH_SECONDS,
    SOON,
    ClusterModel,
    ProxyModel,
    a_fleet,
    eventually,
    wall_clock,
)


async def test_an_own_look_that_ends_late_does_not_last(autojump_clock: trio.testing.MockClock) -> None:
    """A proxy that was asleep finishes a look that began before others recorded newer maps. It adopts that look, and
    does not look again, since another one is the discoverer: so it must come back to the record."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        await trio.sleep(1)
        old = fleet.cluster.reports()
        is_awake = trio.Event()
        look = one.discovery.look

        async def late(view: TopologyView, **named: Any) -> Look:
            one.discovery.look = look  # type: ignore[method-assign]
            began = trio.current_time()
            await is_awake.wait()
            return Look(began, (), old, {}, {})

        one.discovery.look = late  # type: ignore[method-assign]
        await trio.sleep(2 * REFRESH_SECONDS)
        one.store.is_cut = True  # its lease ends as it sleeps
        await eventually(lambda: two.keeper.is_discoverer, LEASE_SECONDS + 1)
        fleet.cluster.move(7, 2)
        await eventually(lambda: two.owner(7) == fleet.cluster.address_of(2), 1)
        one.store.is_cut = False
        await eventually(lambda: one.owner(7) == fleet.cluster.address_of(2), 1)
        is_awake.set()
        await trio.sleep(5)
        assert not one.keeper.is_discoverer
        assert one.owner(7) == fleet.cluster.address_of(2)


async def test_the_record_of_one_that_has_just_died_is_not_believed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A supervisor starts a proxy again before the lease of the former one has ended. What the new one sees itself
    is newer than what that one recorded."""
    async with a_fleet() as fleet:
        one = await fleet.start("one")
        await trio.sleep(3)
        one.kill()
        fleet.cluster.move(7, 2)
        await trio.sleep(LEASE_SECONDS / 4)
        two = ProxyModel("two", fleet.cluster, fleet.store)
        seen: list[Address | None] = []
        two.topology.subscribe(lambda old, new: seen.append(two.owner(7)))
        fleet.nursery.start_soon(two.run)
        await trio.sleep(2 * LEASE_SECONDS)
        assert set(seen) == {fleet.cluster.address_of(2)}
        assert two.keeper.is_discoverer


async def test_a_wrong_redirection_does_not_last(autojump_clock: trio.testing.MockClock) -> None:
    """A node that was slow to hear of a failover names the dead primary. The discoverer sees no change by that, and so
    records none; the follower must come back to the record nevertheless."""
    async with a_fleet() as fleet:
        await fleet.start("one")
        two = await fleet.start("two")
        await trio.sleep(3)
        two.topology.on_moved(7, Address("node", 6999))
        assert two.owner(7) == Address("node", 6999)
        await eventually(lambda: two.owner(7) == fleet.cluster.address_of(0), 3)


async def test_one_that_joins_follows_the_record_soon(autojump_clock: trio.testing.MockClock) -> None:
    """Its own first look may be poorer than what the living discoverer recorded."""
    async with a_fleet() as fleet:
        await fleet.start("one")
        poor = ClusterModel()
        poor.owners[7] = 1
        two = await fleet.start("two", poor)
        await eventually(lambda: two.owner(7) == fleet.cluster.address_of(0), 4)


async def test_a_stranger_takes_the_place_of_those_who_have_gone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A proxy of another cluster keeps away from the record while someone keeps it, and no longer."""
    async with a_fleet() as fleet:
        one = await fleet.start("one")
        other = ClusterModel(first_port=8000, name="b")
        stranger = await fleet.start("stranger", other)
        await trio.sleep(1)
        assert "another cluster" in " ".join(stranger.keeper.problems())
        one.stop()
        await trio.sleep(2 * LEASE_SECONDS)
        assert stranger.keeper.is_discoverer
        assert not stranger.keeper.problems()
        assert len(await fleet.events_of(EventKind.CLUSTER_REPLACED)) == 1


async def test_what_another_recorded_was_not_missed(autojump_clock: trio.testing.MockClock) -> None:
    """A follower that lost its store for some seconds tells of no gap when it becomes the discoverer much later."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        two.store.is_cut = True
        await trio.sleep(4)
        two.store.is_cut = False
        await trio.sleep(120)
        one.stop()
        await eventually(lambda: two.keeper.is_discoverer, 1)
        fleet.cluster.move(7, 2)
        await trio.sleep(2)
        assert not await fleet.events_of(EventKind.OBSERVATION_GAP)


async def test_a_long_interval_is_neither_a_gap_nor_silence(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever sets 20 s between two looks gets one look per 20 s, by one proxy, and no event that says otherwise."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        one.keeper.refresh_seconds = two.keeper.refresh_seconds = 20.0
        await trio.sleep(SILENCE_SECONDS + 25)
        looks = two.discovery.looks_total
        await trio.sleep(200)
        assert two.discovery.looks_total == looks
        assert not await fleet.events_of(EventKind.OBSERVATION_GAP)


async def test_a_discoverer_that_was_replaced_still_ends_its_lease(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its last words are refused; its entry as a running proxy goes nevertheless, at once."""
    async with a_fleet() as fleet:
        one = await fleet.start("one")
        discoverer = await fleet.store.get("discoverer")
        assert discoverer is not None
        await fleet.store.commit([Put("discoverer", discoverer.value)])  # as if it were another's
        one.stop()
        await trio.sleep(SOON)
        assert await fleet.store.get("proxies/one") is None


async def test_a_fault_in_making_events_stops_no_view(autojump_clock: trio.testing.MockClock) -> None:
    """Promise 8: even a bug of the timeline, or a record that no program could have written, leaves the view alone;
    health says what it was."""
    async with a_fleet() as fleet:
        proxy = await fleet.start("one")

        async def broken(*arguments: object) -> None:
            raise KeyError("a node that nobody knows")

        proxy.keeper.recorder.record = broken  # type: ignore[method-assign,assignment]
        fleet.cluster.move(7, 2)
        await eventually(
            lambda: proxy.owner(7) == fleet.cluster.address_of(2), REFRESH_SECONDS + RECORD_SECONDS + SOON
        )
        assert "a node that nobody knows" in " ".join(proxy.keeper.problems())


async def test_a_store_that_was_exchanged_is_read_anew(autojump_clock: trio.testing.MockClock) -> None:
    """Its versions have the same numbers and say something else. Neither the view nor a question about the past goes
    by what is remembered of the former store."""
    async with a_fleet() as fleet:
        one = await fleet.start("one")
        await fleet.start("two")
        follower = await fleet.start("follower")
        follower.discovery.cluster = ClusterModel(is_down=True)  # it has the record alone
        history = History(follower.store, follower.keeper.views)  # type: ignore[arg-type]
        before = await history.view_at(at=wall_clock())
        assert before is not None
        assert before.number == 1 == one.keeper.recorded.number
        exchanged = MemoryStore()
        fleet.nursery.start_soon(exchanged.run)
        fleet.cluster.move(7, 2)
        fleet.nursery.start_soon(ProxyModel("other", fleet.cluster, exchanged).run)
        await trio.sleep(1)
        follower.store.is_cut = True
        await trio.sleep(1)
        follower.store.exchange(exchanged)
        follower.store.is_cut = False
        await trio.sleep(3)
        after = await history.view_at(at=wall_clock())
        assert after is not None
        assert after.number == 1
        owner = after.view.primary_of(7)
        assert owner is not None
        assert owner.address == fleet.cluster.address_of(2)
        assert follower.owner(7) == fleet.cluster.address_of(2)


async def test_a_fault_shorter_than_the_lease_changes_no_discoverer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The lease is renewed when the store is back, and not given up for a new one."""
    async with a_fleet() as fleet:
        one, two = await fleet.start("one"), await fleet.start("two")
        await trio.sleep(3)
        before = await fleet.store.get(DISCOVERER)
        one.store.is_cut = True
        await trio.sleep(LEASE_SECONDS / 2)
        one.store.is_cut = False
        await trio.sleep(RETRY_SECONDS + SOON)
        assert one.keeper.is_discoverer
        await trio.sleep(2 * LEASE_SECONDS)
        assert one.keeper.is_discoverer
        assert not two.keeper.is_discoverer
        assert await fleet.store.get(DISCOVERER) == before


async def test_one_that_became_discoverer_unheard_finds_out(autojump_clock: trio.testing.MockClock) -> None:
    """A commit that was given up for its time may have happened nevertheless."""
    async with a_fleet() as fleet:
        one = ProxyModel("one", fleet.cluster, fleet.store)
        commit = fleet.store.commit
        is_unheard = True

        async def unheard(operations: Any, expect: Any = (), **named: Any) -> int:
            revision = await commit(operations, expect, **named)
            if is_unheard and operations[0].key == DISCOVERER:
                await trio.sleep_forever()
            return revision

        fleet.store.commit = unheard  # type: ignore[method-assign]
        fleet.nursery.start_soon(one.run)
        await trio.sleep(1)
        is_unheard = False
        assert (await fleet.store.get(DISCOVERER)) is not None
        assert not one.keeper.is_discoverer
        await eventually(lambda: one.keeper.is_discoverer, LEASE_SECONDS + 1)
        await eventually(lambda: one.keeper.recorded.number == 1, SOON)
