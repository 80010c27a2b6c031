"""Replicas as this proxy sees them: what is not known is None, and nothing is made up."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from proxy.replicas.facts import replica_facts
from routing.offsets import NO_POINT, Point, Sample
from routing.promotion import Stage
from routing.replicas import ReplicaFacts
from tests.proxy.world import World, world_of

X, Y = b"a" * 40, b"b" * 40


def of_first(world: World, now: float) -> ReplicaFacts:
    return replica_facts(world.replicas, now)[world.replica_nodes[0].id]


async def test_a_new_replica_has_told_nothing(autojump_clock: MockClock) -> None:
    async with world_of(2, replicas=1) as world:
        facts = replica_facts(world.replicas, trio.current_time())
        assert list(facts) == [node.id for node in world.replica_nodes]
        node = world.replica_nodes[1]
        assert facts[node.id] == ReplicaFacts(
            stage="joining",
            zone="",
            is_connected=True,
            outstanding=0,
            latency_seconds=None,
            offset=None,
            replid="",
            lag_bytes=None,
            staleness_seconds=None,
            reads_total=0,
            mismatched_keys=(),
            why_not="it has not told its offset yet",
            verified_at=None,
            address=node.address,
            primary_id=world.nodes[1].id,
        )


async def test_lag_and_staleness_count_in_one_history_only(autojump_clock: MockClock) -> None:
    async with world_of(1, replicas=1) as world:
        [shard] = world.replicas.shards()
        [replica] = shard.replicas
        now = trio.current_time()
        for seconds_ago, offset in ((3.0, 60), (1.0, 100)):
            shard.note(Sample(True, Point(X, offset), NO_POINT), now - seconds_ago)
        replica.note(Sample(False, Point(X, 70), NO_POINT), now - 0.25, now)
        facts = of_first(world, now)
        assert (facts.offset, facts.replid, facts.lag_bytes) == (70, X.decode(), 30)
        assert (facts.staleness_seconds, facts.latency_seconds) == (3.0, 0.25)
        replica.note(Sample(False, Point(X, 120), NO_POINT), now, now)
        facts = of_first(world, now + 0.5)
        assert (facts.lag_bytes, facts.staleness_seconds) == (0, 1.5)  # newer than what the primary told last
        replica.note(Sample(False, Point(Y, 120), NO_POINT), now, now)
        facts = of_first(world, now)
        assert (facts.offset, facts.lag_bytes, facts.staleness_seconds) == (120, None, None)


async def test_stage_quarantine_and_connection(autojump_clock: MockClock) -> None:
    async with world_of(1, replicas=1) as world:
        [replica] = world.replicas.replicas()
        replica.set_stage(Stage.QUARANTINED, "a key differed")
        replica.mismatched = (b"k",)
        replica.verified_at = 12.5
        replica.reads_total = 7
        connection = replica.connections[0]
        assert connection is not None
        connection.start(b"*1\r\n$4\r\nPING\r\n")
        facts = of_first(world, trio.current_time())
        assert (facts.stage, facts.why_not, facts.mismatched_keys) == (
            "quarantined",
            "a key differed",
            (b"k",),
        )
        assert (facts.verified_at, facts.reads_total, facts.outstanding) == (12.5, 7, 1)
        replica.set_stage(Stage.READABLE, "not shown")
        world.replica_nodes[0].accepts = False
        world.replica_nodes[0].lose()
        await world.settle()
        facts = of_first(world, trio.current_time())
        assert (facts.is_connected, facts.why_not) == (False, "")
