"""The monitor with a primary and replicas that answer from dictionaries, on a virtual clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio

from proxy.replicas.monitor import (
    IDLE_INTERVAL_SECONDS,
    IN_USE_SECONDS,
    SILENCE_SECONDS,
    MonitorOptions,
)
from proxy.replicas.service import Replica, ReplicaOptions
from routing.circuit import CircuitState
from routing.promotion import Stage
from routing.topology import UNOWNED
from tests.proxy.replicas.shard import STEP_SECONDS, ShardWorld, shard_of

UP = [Stage.SYNCING, Stage.CAUGHT_UP, Stage.VERIFIED, Stage.READABLE]
OPTIONS = MonitorOptions(verify_interval_seconds=2.0, quarantine_seconds=3.0)


async def start(world: ShardWorld, nursery: trio.Nursery, *replicas: int) -> None:
    """Run the monitor, and wait until these replicas are readable."""
    for number in range(4):
        world.set_all(b"key-%d" % number, b"value")
    nursery.start_soon(world.monitor.run)
    for index in replicas:
        await world.wait_stage(index, Stage.READABLE, 2.0)
        assert world.told(index) == UP


async def test_a_replica_becomes_readable_step_by_step_within_a_second(autojump_clock: Any) -> None:
    async with shard_of() as world, trio.open_nursery() as nursery:
        world.primary.on_request = lambda words: world.write()
        began = trio.current_time()
        await start(world, nursery, 1)
        assert trio.current_time() - began < 1.0
        replica = world.replica(1)
        assert (replica.why_not, replica.verified_at, replica.shard.has_readable) == ("", 1.7e9, True)
        assert replica.latency_seconds == pytest.approx(STEP_SECONDS, abs=2 * STEP_SECONDS)
        assert replica.shard.history.proven_until(replica.stamp) is not None
        nursery.cancel_scope.cancel()


async def test_a_mismatch_is_found_at_the_next_comparison_and_the_keys_are_named(autojump_clock: Any) -> None:
    async with shard_of(options=OPTIONS) as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1)
        world.twins[1].data[b"key-2"] = b"another"
        assert await world.wait_stage(1, Stage.QUARANTINED) < 2.0 + 1.5
        replica = world.replica(1)
        assert (replica.mismatched, replica.is_readable) == ((b"key-2",), False)
        assert replica.why_not == 'key "key-2" differed from its primary\'s'
        assert replica.verified_at is None
        del world.primary.data[b"key-2"], world.twins[1].data[b"key-2"]
        assert 3.0 <= await world.wait_stage(1, Stage.READABLE) < 4.5
        assert replica.mismatched == ()
        assert [b"TYPE", b"key-2"] in world.primary.asked
        nursery.cancel_scope.cancel()


async def test_a_silent_replica_is_taken_back_and_holds_nobody_up(autojump_clock: Any) -> None:
    async with shard_of(3) as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1, 2)
        world.twins[1].is_silent = True
        assert await world.wait_stage(1, Stage.JOINING) <= SILENCE_SECONDS + 0.3
        assert world.replica(1).why_not == f"it has not answered for {SILENCE_SECONDS:g} s"
        assert trio.current_time() - world.replica(2).stamped_at <= 0.11
        connection = world.replica(1).connections[0]
        assert connection is not None
        await trio.sleep(5)
        assert len(connection.owed) <= 1  # it is asked one question at a time
        world.told(1)
        world.twins[1].is_silent = False
        await world.wait_stage(1, Stage.READABLE)
        assert world.told(1) == UP
        assert world.told(2) == []
        nursery.cancel_scope.cancel()


async def test_a_silent_primary_takes_no_replica_back(autojump_clock: Any) -> None:
    """Nor one whose connection broke: its replicas are asked all the same."""
    async with shard_of() as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1)
        replica = world.replica(1)
        world.primary.is_silent = True
        await trio.sleep(3)
        assert trio.current_time() - replica.stamped_at <= IDLE_INTERVAL_SECONDS + 0.1
        world.primary.node.accepts = False
        world.primary.node.lose()
        await trio.sleep(3)
        assert trio.current_time() - replica.stamped_at <= IDLE_INTERVAL_SECONDS + 0.1
        assert world.told(1) == []
        nursery.cancel_scope.cancel()


async def test_a_lost_connection_takes_a_replica_back_at_once(autojump_clock: Any) -> None:
    async with shard_of() as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1)
        connection = world.replica(1).connections[0]
        assert connection is not None
        connection.close("broken")
        assert not world.replica(1).is_readable  # in the very same step
        assert world.replica(1).why_not == "the connection to it ended: broken"
        await world.wait_stage(1, Stage.READABLE)
        assert world.told(1) == [Stage.JOINING, *UP]
        nursery.cancel_scope.cancel()


async def test_a_comparison_over_a_reset_counts_for_nothing(autojump_clock: Any) -> None:
    async with shard_of(options=OPTIONS) as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1)
        world.twins[1].data[b"key-1"] = b"another"
        while [b"STRLEN", b"key-1"] not in world.twins[1].asked[-40:]:
            await trio.sleep(STEP_SECONDS)
        world.twins[1].data[b"key-1"] = b"value"
        world.twins[1].is_syncing = True
        await world.wait_stage(1, Stage.SYNCING)
        world.twins[1].is_syncing = False
        await world.wait_stage(1, Stage.READABLE)
        assert Stage.QUARANTINED not in world.told(1)
        nursery.cancel_scope.cancel()


async def test_what_is_no_sample_is_the_reason(autojump_clock: Any) -> None:
    async with shard_of() as world, trio.open_nursery() as nursery:
        twin = world.twins[1]
        answer = twin.answer
        twin.answer = lambda words: b"-NOPERM no\r\n" if words[0] == b"INFO" else answer(words)  # type: ignore[method-assign]
        nursery.start_soon(world.monitor.run)
        await trio.sleep(1)
        assert world.replica(1).why_not == "it refused to tell its offset: NOPERM no"
        assert world.hub.faults_total == 0
        nursery.cancel_scope.cancel()


async def test_the_beat_is_quick_while_reads_at_replicas_are_in_use(autojump_clock: Any) -> None:
    async with shard_of() as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1)
        await trio.sleep(IN_USE_SECONDS + 1)

        async def samples_in(seconds: float) -> int:
            before = world.primary.asked.count([b"INFO", b"replication"])
            await trio.sleep(seconds)
            return world.primary.asked.count([b"INFO", b"replication"]) - before

        assert await samples_in(3.0) == pytest.approx(3, abs=1)
        world.replicas.used_at = trio.current_time()
        await trio.sleep(IDLE_INTERVAL_SECONDS)
        assert await samples_in(3.0) == pytest.approx(30, abs=2)
        nursery.cancel_scope.cancel()


async def test_a_replica_that_cannot_be_verified_keeps_no_other_from_it(autojump_clock: Any) -> None:
    async with shard_of(3) as world, trio.open_nursery() as nursery:
        world.twins[1].refusals = {b"key-%d" % number: "LOADING" for number in range(4)}
        await start(world, nursery, 2)
        await trio.sleep(1)
        assert world.replica(1).stage is Stage.CAUGHT_UP
        assert "could not be compared" in world.replica(1).why_not
        nursery.cancel_scope.cancel()


async def test_a_zone_is_learnt_on_each_new_connection(autojump_clock: Any) -> None:
    async with shard_of() as world, trio.open_nursery() as nursery:
        world.replicas.adopt(ReplicaOptions(zone="here"))
        world.twins[1].zone = "there"
        await start(world, nursery, 1)
        replica = world.replica(1)
        assert (replica.zone, replica.in_zone) == ("there", False)
        world.twins[1].zone = "here"
        await trio.sleep(2)
        assert replica.zone == "there"
        connection = replica.connections[0]
        assert connection is not None
        connection.close("broken")
        await world.wait_stage(1, Stage.READABLE)
        assert (replica.zone, replica.in_zone) == ("here", True)
        nursery.cancel_scope.cancel()


async def test_a_replica_that_left_is_told_of_no_more(autojump_clock: Any) -> None:
    async with shard_of(3) as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1, 2)
        world.twins[1].is_silent = True
        await trio.sleep(0.2)
        world.see(range(2, 3))
        await trio.sleep(1)
        world.twins[1].is_silent, world.twins[1].is_syncing = (
            False,
            True,
        )  # it answers what it was asked before
        await trio.sleep(3)
        assert world.changes == []
        world.twins[1].is_syncing = False
        world.see(range(1, 3))
        await world.wait_stage(1, Stage.READABLE)
        assert world.told(1) == UP
        nursery.cancel_scope.cancel()


async def test_a_slot_that_changed_hands_is_served_by_replicas_once_it_has_settled(
    autojump_clock: Any,
) -> None:
    async with shard_of() as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1)
        view = world.topology.view
        without = (UNOWNED, *view.shard_of_slot[1:])
        world.topology.adopt(replace(view, shard_of_slot=without), trio.current_time())
        world.topology.adopt(view, trio.current_time())
        await trio.sleep(ReplicaOptions().settle_seconds - 0.5)
        assert world.replicas.of_slot[0] is None
        await trio.sleep(0.5 + IDLE_INTERVAL_SECONDS)
        assert world.replicas.of_slot[0] is world.replica(1).shard
        nursery.cancel_scope.cancel()


async def test_a_replica_that_stalls_is_out_soon_and_returns_slowly(autojump_clock: Any) -> None:
    """It is noticed from the offsets that it owes, long before it counts as silent; and so is its recovery."""
    async with shard_of(3) as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1, 2)
        stalled, well = world.replica(1), world.replica(2)
        told: list[Replica] = []
        world.replicas.on_stall = told.append
        stall_seconds = world.replicas.options.stall_seconds

        async def use() -> None:
            while True:
                world.replicas.used_at = trio.current_time()
                await trio.sleep(0.01)

        nursery.start_soon(use)
        world.replicas.on_news()
        world.twins[1].is_silent = True
        began = trio.current_time()
        while not stalled.circuit.is_open:
            await trio.sleep(STEP_SECONDS)
        assert trio.current_time() - began < OPTIONS.sample_interval_seconds + stall_seconds * 1.5
        assert stalled.shard.choose(2) == (well, well.connections[0])
        assert told[0] is stalled
        await trio.sleep(3.0)
        assert stalled.circuit.is_open
        world.twins[1].is_silent = False
        began = trio.current_time()
        shares = []
        while stalled.circuit.state is not CircuitState.CLOSED:
            shares.append(stalled.circuit.share)
            await trio.sleep(0.1)
        assert sorted(set(shares)) == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8]
        assert shares == sorted(shares)
        assert 5.0 <= trio.current_time() - began < 12.0
        assert (stalled.circuit.openings_total, well.circuit.openings_total) == (1, 0)
        nursery.cancel_scope.cancel()


async def test_while_nobody_reads_nobody_looks_for_stalls(autojump_clock: Any) -> None:
    """The quick beat ends, and begins with the next read."""
    async with shard_of() as world, trio.open_nursery() as nursery:
        await start(world, nursery, 1)
        looks: list[float] = []
        look = world.replicas.look_for_stalls

        def counted(until: float) -> None:
            looks.append(until)
            look(until)

        world.replicas.look_for_stalls = counted  # type: ignore[method-assign]
        await trio.sleep(IN_USE_SECONDS)
        looks.clear()
        await trio.sleep(10.0)
        assert looks == []
        world.replicas.used_at = trio.current_time()
        world.replicas.on_news()
        await trio.sleep(1.0)
        assert len(looks) >= 1.0 / world.replicas.options.stall_seconds
        nursery.cancel_scope.cancel()
