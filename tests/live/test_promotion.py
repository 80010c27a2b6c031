"""Replicas of real clusters become readable under writes, and are taken back for what ends a proof.

The monitor runs in this process, over a hub of its own, beside a keeper that looks at the cluster.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from proxy.embedded.cluster import Cluster, Node, running_cluster
from proxy.embedded.connection import Connection
from proxy.hub import Hub
from proxy.replicas.monitor import Monitor, MonitorOptions
from proxy.replicas.service import Replica, ReplicaOptions, Replicas
from proxy.store.memory import MemoryStore
from proxy.topology.discovery import Discovery
from proxy.topology.keeper import Keeper
from proxy.topology.service import Topology
from proxy.upstream.connect import Dialer
from proxy.upstream.nodes import Lane, Nodes
from routing.promotion import Stage
from routing.timeline import TimelineLimits
from tests.live.conftest import engine_named

ENGINES = ["redis-7.0", "valkey-9.1"]
READABLE_SECONDS = 1.0  # from the first look at the cluster, under writes
SLACK_SECONDS = 2.0  # for a busy test machine
QUARANTINE_SECONDS = 0.4
OPTIONS = MonitorOptions(
    sample_interval_seconds=0.05,
    verify_interval_seconds=0.2,
    verify_keys=16,
    quarantine_seconds=QUARANTINE_SECONDS,
)
pytestmark = pytest.mark.live


@dataclass
class Watching:
    """A cluster of one shard with two replicas, and what the monitor told of them."""

    cluster: Cluster
    replicas: Replicas
    monitor: Monitor
    changes: list[tuple[Node, Stage, Stage, str]] = field(default_factory=list)

    def replica(self, node: Node) -> Replica:
        (found,) = [replica for replica in self.replicas.replicas() if replica.address == node.address]
        return found

    def on_stage(self, replica: Replica, old: Stage, new: Stage, reason: str) -> None:
        self.changes.append((self.cluster.node_at(replica.address), old, new, reason))

    def told(self, node: Node) -> list[tuple[Stage, str]]:
        """The stages that the node came to since the last call, with the reasons."""
        told = [(new, reason) for of, _, new, reason in self.changes if of is node]
        self.changes = [change for change in self.changes if change[0] is not node]
        return told

    async def wait_stage(self, node: Node, stage: Stage, seconds: float = 5.0) -> None:
        with trio.move_on_after(seconds):
            while not any(of is node and new is stage for of, _, new, _ in self.changes):
                await trio.sleep(0.005)
            return
        told = [(str(of), new.value, reason) for of, _, new, reason in self.changes]
        why_not = self.replica(node).why_not
        raise AssertionError(f"{node} is not {stage.value} after {seconds} s: {why_not}; {told}")


@asynccontextmanager
async def watching(cluster: Cluster) -> AsyncIterator[Watching]:
    hub = Hub()
    dialer = Dialer(hub, "", "", 2.0, 1 << 24)
    reading = Dialer(hub, "", "", 2.0, 1 << 24, is_readonly=True)
    topology, store = Topology(), MemoryStore()
    keeper = Keeper(
        topology,
        Discovery(dialer, cluster.addresses[:1]),
        store,
        "here",
        refresh_seconds=1.0,
        limits=TimelineLimits(),
    )
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(hub.run)
            primaries = Nodes(dialer, nursery, 5.0)
            topology.subscribe(
                lambda old, new: primaries.ensure_all([shard.primary.address for shard in new.shards], 2)
            )
            at_replicas = Nodes(reading, nursery, 5.0, lanes=(Lane.READ,))
            replicas = Replicas(at_replicas, topology, ReplicaOptions())
            monitor = Monitor(replicas, primaries, OPTIONS)
            seen = Watching(cluster, replicas, monitor)
            monitor.on_stage = seen.on_stage
            for task in (store.run, keeper.run, monitor.run):
                nursery.start_soon(task)
            yield seen
            nursery.cancel_scope.cancel()
    finally:
        for connection in [*primaries.connections(), *at_replicas.connections()]:
            connection.close("stopping")
        hub.close()
        with trio.move_on_after(2, shield=True):
            await store.aclose()


async def _write(cluster: Cluster) -> None:
    """Few keys of each kind, all the time, beside a few that stand still."""
    async with cluster.connection(cluster.primaries[0]) as connection:
        number = 0
        while True:
            number += 1
            await connection.call("SET", f"string-{number % 4}", f"value-{number}")
            await connection.call("HSET", "hash", f"field-{number % 20}", number)
            await connection.call("SADD", "set", number % 50)
            await connection.call("ZADD", "zset", number / 7, number % 10)
            await connection.call("SET", "passing", number, "PX", 5)
            await trio.sleep(0.001)


STILL = (
    ("SET", "still", "as it was"),
    ("HSET", "still-hash", *range(20)),
    ("SADD", "still-set", *"steadyread"),
    ("ZADD", "still-zset", "0.1", "a", "17", "b", "inf", "c"),
    ("RPUSH", "still-list", *range(100)),
    ("XADD", "still-stream", "1-1", "field", "value"),
)


@pytest.mark.parametrize("engine", ENGINES)
async def test_replicas_prove_themselves_under_writes_and_again_after_each_reset(engine: str) -> None:
    async with running_cluster(engine_named(engine), primaries=1, replicas=2) as cluster:
        for words in STILL:
            await cluster.call(cluster.primaries[0], *words)
        async with watching(cluster) as seen, trio.open_nursery() as nursery:
            nursery.start_soon(_write, cluster)
            await _become_readable(seen)
            await _differ(seen)
            await _freeze(seen)
            await _synchronise_fully(seen)
            nursery.cancel_scope.cancel()


async def _become_readable(seen: Watching) -> None:
    stages = [Stage.SYNCING, Stage.CAUGHT_UP, Stage.VERIFIED, Stage.READABLE]
    for node in seen.cluster.replicas:
        await seen.wait_stage(node, Stage.READABLE, READABLE_SECONDS + SLACK_SECONDS)
        assert [stage for stage, _ in seen.told(node)] == stages
        assert seen.replica(node).is_readable
        assert seen.replica(node).verified_at is not None
    with trio.fail_after(2 * OPTIONS.verify_interval_seconds + SLACK_SECONDS):
        while seen.monitor.comparisons_total < 6:
            await trio.sleep(0.01)
    assert not seen.changes  # they were compared again, and stay readable


async def _differ(seen: Watching) -> None:
    """A key is changed at the primary, and both replicas are not told: the key is named. Mended, they come back."""
    await _unreplicated(seen, "SADD", "still-set", "z")
    for node in seen.cluster.replicas:
        await seen.wait_stage(node, Stage.QUARANTINED)
        assert seen.replica(node).mismatched == (b"still-set",)
        assert not seen.replica(node).is_readable
        reasons = {reason for stage, reason in seen.told(node) if stage is Stage.QUARANTINED}
        assert reasons == {'key "still-set" differed from its primary\'s'}
    await trio.sleep(QUARANTINE_SECONDS + 0.3)
    for node in seen.cluster.replicas:
        assert Stage.READABLE not in [stage for stage, _ in seen.told(node)]  # the key was asked again
        assert seen.replica(node).mismatched == (b"still-set",)
    await _unreplicated(seen, "SREM", "still-set", "z")
    for node in seen.cluster.replicas:
        await seen.wait_stage(node, Stage.READABLE)
        assert seen.replica(node).mismatched == ()
        seen.told(node)


async def _unreplicated(seen: Watching, name: str, key: str, member: str) -> None:
    script = "redis.set_repl(redis.REPL_NONE) return redis.call(ARGV[1], KEYS[1], ARGV[2])"
    await seen.cluster.call(seen.cluster.primaries[0], "EVAL", script, 1, key, name, member)


async def _freeze(seen: Watching) -> None:
    """A silent replica is taken back, and delays nobody else's samples."""
    node, other = seen.cluster.replicas
    seen.cluster.stop_process(node)
    try:
        await seen.wait_stage(node, Stage.JOINING)
        at = trio.current_time() + 2 * OPTIONS.sample_interval_seconds
        with trio.fail_after(SLACK_SECONDS):
            while seen.replica(other).stamped_at < at:
                await trio.sleep(0.01)
        assert seen.told(other) == []
    finally:
        seen.cluster.cont(node)
    await seen.wait_stage(node, Stage.READABLE)
    seen.told(node)


async def _synchronise_fully(seen: Watching) -> None:
    """Its primary sends it everything anew: it proves itself again. The connections to it last."""
    node = seen.cluster.replicas[0]
    primary = seen.cluster.primaries[0]
    connection = seen.replica(node).connections[0]
    async with seen.cluster.connection(primary) as to_primary:
        seen.cluster.stop_process(node)
        try:
            await to_primary.call("CONFIG", "SET", "repl-backlog-size", 16 * 1024)
            await to_primary.call("SET", "last", "before the data set that is sent")
            await to_primary.call("CLIENT", "KILL", "TYPE", "replica")
            with trio.fail_after(5):
                while await _backlog_start(to_primary) <= seen.replica(node).stamp.offset + 1:
                    await to_primary.call("SETRANGE", "large", 0, "x" * 100_000)
        finally:
            seen.cluster.cont(node)
    await seen.wait_stage(node, Stage.SYNCING)
    await seen.wait_stage(node, Stage.READABLE, 10)
    assert seen.replica(node).connections[0] is connection
    assert Stage.CAUGHT_UP in [stage for stage, _ in seen.told(node)]


async def _backlog_start(connection: Connection) -> int:
    """The first offset from which a replica can go on."""
    info = (await connection.call("INFO", "replication")).decode()
    return int(info.split("repl_backlog_first_byte_offset:")[1].split()[0])
