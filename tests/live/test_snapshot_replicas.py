"""Reads at a snapshot by replicas that have applied its cut, against real clusters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from proxy.embedded.cluster import Cluster, Node
from proxy.embedded.connection import Connection, ServerError, connected
from proxy.embedded.moves import move_slot_stepwise
from routing.slot import slot_of
from tests.live.campaign.proxies import Steadyread
from tests.live.conftest import ClusterStarter
from tests.live.levels.links import cut

pytestmark = pytest.mark.live

PROXY = Steadyread(settings=("snapshots.read_at=replicas",))
KEYS = [f"key:{number}" for number in range(300)]
WRITTEN = KEYS[::3]
DELETED = KEYS[1::30]
ABSENT = [f"absent:{number}" for number in range(20)]
SHOWN_SECONDS_MAX = 10.0  # in which replicas come to serve


@asynccontextmanager
async def served(start_cluster: ClusterStarter) -> AsyncIterator[tuple[Cluster, Connection, Connection]]:
    """A cluster with replicas, and two clients of a proxy in front of it."""
    async with (
        start_cluster(replicas=1) as cluster,
        PROXY.serving(cluster) as address,
        connected(address) as writer,
        connected(address) as reader,
    ):
        yield cluster, writer, reader


async def gets_at_replicas(cluster: Cluster) -> int:
    """How many GETs they have run."""
    total = 0
    for node in cluster.replicas:
        for line in bytes(await cluster.call(node, "INFO", "commandstats")).splitlines():
            if line.startswith(b"cmdstat_get:calls="):
                total += int(line[len(b"cmdstat_get:calls=") :].split(b",")[0])
    return total


async def owner_of(cluster: Cluster, slot: int) -> Node:
    known = await cluster.map_at(cluster.primaries[0])
    return cluster.node_at(known.owner_of(slot).address)


async def read_all(client: Connection, keys: Sequence[str]) -> list[bytes | None]:
    """Pipelined, and by themselves."""
    replies: list[bytes | None] = await client.call_all([("GET", key) for key in keys])
    for key, reply in list(zip(keys, replies, strict=True))[::10]:
        assert await client.call("GET", key) == reply
    return replies


async def wait_until_replicas_serve(cluster: Cluster, client: Connection, keys: Sequence[str]) -> None:
    with trio.fail_after(SHOWN_SECONDS_MAX):
        while True:
            before = await gets_at_replicas(cluster)
            await read_all(client, keys)
            if await gets_at_replicas(cluster) - before >= len(keys):
                return
            await trio.sleep(0.05)


@pytest.mark.parametrize("engine", ["valkey-9.1"], indirect=True)
async def test_replicas_serve_what_was_not_written_since_the_cut(start_cluster: ClusterStarter) -> None:
    async with served(start_cluster) as (cluster, writer, reader):
        assert await writer.call_all([("SET", key, "old") for key in KEYS]) == [b"OK"] * len(KEYS)
        await writer.call("HSET", "hash", "field", "old")
        snapshot_id = await writer.call("STEADY.SNAPSHOT", "OPEN")
        await reader.call("STEADY.READ", "SNAPSHOT", snapshot_id)
        unwritten = [key for key in KEYS if key not in {*WRITTEN, *DELETED}]
        await wait_until_replicas_serve(cluster, reader, unwritten)
        await writer.call_all([("SET", key, "new") for key in WRITTEN + ABSENT])
        await writer.call_all([("DEL", key) for key in DELETED])
        before = await gets_at_replicas(cluster)
        assert await read_all(reader, KEYS) == [b"old"] * len(KEYS)
        assert await gets_at_replicas(cluster) - before >= len(unwritten)
        assert await read_all(reader, ABSENT) == [None] * len(ABSENT)
        assert await read_all(reader, ["never:1", "never:2"]) == [None] * 2
        assert await reader.call("HGETALL", "hash") == [b"field", b"old"]
        slot = slot_of(unwritten[0].encode())
        owner = await owner_of(cluster, slot)
        await move_slot_stepwise(cluster, slot, next(node for node in cluster.primaries if node != owner))
        assert await read_all(reader, KEYS) == [b"old"] * len(KEYS)
        # Its former owner ends; the replica takes over, and is none any more.
        await cluster.kill(owner)
        with trio.fail_after(30.0):
            while (replies := await reader.call_all([("GET", key) for key in KEYS])) != [b"old"] * len(KEYS):
                assert all(reply == b"old" or isinstance(reply, ServerError) for reply in replies)
        assert await read_all(reader, KEYS) == [b"old"] * len(KEYS)


@pytest.mark.parametrize("engine", ["redis-7.0"], indirect=True)
async def test_a_replica_that_has_not_applied_the_cut_serves_nothing(start_cluster: ClusterStarter) -> None:
    async with served(start_cluster) as (cluster, writer, reader):
        await writer.call_all([("SET", key, "older") for key in KEYS])
        first = await writer.call("STEADY.SNAPSHOT", "OPEN")
        await reader.call("STEADY.READ", "SNAPSHOT", first)
        await wait_until_replicas_serve(cluster, reader, KEYS)
        for replica in cluster.replicas:
            await cut(cluster, replica, is_full=False)
        await writer.call_all([("SET", key, "old") for key in KEYS])
        second = await writer.call("STEADY.SNAPSHOT", "OPEN")
        await reader.call("STEADY.READ", "SNAPSHOT", second)
        before = await gets_at_replicas(cluster)
        for _ in range(5):
            assert await read_all(reader, KEYS) == [b"old"] * len(KEYS)
            await trio.sleep(0.1)
        assert await gets_at_replicas(cluster) == before
        for replica in cluster.replicas:
            await cluster.call(replica, "CONFIG", "SET", "masterauth", "")
        await wait_until_replicas_serve(cluster, reader, KEYS)
        assert await read_all(reader, KEYS) == [b"old"] * len(KEYS)
