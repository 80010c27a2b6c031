"""SCAN, KEYS and DBSIZE as of a snapshot, and that nobody sees the keys of one, against real clusters."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from proxy.embedded.cluster import Cluster
from proxy.embedded.connection import Connection, ServerError, connected
from proxy.embedded.moves import move_slot_stepwise, move_slots_atomically
from routing.snapshot_names import is_internal, marker, preimage
from routing.topology import Address
from tests.live.campaign.proxies import Steadyread
from tests.live.conftest import ClusterStarter
from tests.live.test_gather import fill, scan_all, tag_of

pytestmark = [
    pytest.mark.live,
    pytest.mark.parametrize("engine", ["redis-7.0", "valkey-9.1"], indirect=True),
]

SLOTS = (100, 101, 9000)  # that move
UNKNOWN_ID = 10**12
ROUNDS = 6  # listings
MOVES = 5
LOAD_SECONDS_MAX = 120.0
WRITE_SECONDS = 0.001  # between two of the background's writes


@asynccontextmanager
async def proxied(start: ClusterStarter) -> AsyncIterator[tuple[Cluster, Address]]:
    async with start(replicas=0) as cluster, Steadyread().serving(cluster) as address:
        yield cluster, address


@asynccontextmanager
async def bound(address: Address, snapshot_id: int) -> AsyncIterator[Connection]:
    """A client whose reads are of the snapshot."""
    async with connected(address) as client:
        await client.call("STEADY.READ", "SNAPSHOT", snapshot_id)
        yield client


async def held_by_nodes(cluster: Cluster) -> set[bytes]:
    """Every key, by the nodes themselves."""
    return {key for node in cluster.primaries for key in await cluster.call(node, "KEYS", "*")}


async def check_listings(client: Connection, existed: set[bytes]) -> None:
    """All ways to list give just these keys, each once."""
    assert await scan_all(client) == Counter(existed)
    assert await scan_all(client, "COUNT", 1000, "MATCH", "{*1") == Counter(
        {key for key in existed if key[:1] == b"{" and key[-1:] == b"1"}
    )
    assert Counter(await client.call("KEYS", "*")) == Counter(existed)
    assert await client.call("DBSIZE") == len(existed)


async def refusal(client: Connection, *words: str) -> str:
    with pytest.raises(ServerError) as caught:
        await client.call(*words)
    return str(caught.value)


async def test_each_snapshot_lists_the_keys_of_its_cut(share_cluster: ClusterStarter) -> None:
    """Promise 2 for listings: what was deleted since is listed, what was created since is not, for each snapshot."""
    async with proxied(share_cluster) as (cluster, address), connected(address) as client:
        names = [f"{tag_of(slot)}:{number}".encode() for slot in SLOTS for number in range(40)]
        names += [b"key:%d" % number for number in range(300)]
        await fill(client, names)
        await client.call("RPUSH", "list", "x")
        await client.call("HSET", "hash", "f", "v")
        at_first = {*names, b"list", b"hash"}
        first = await client.call("STEADY.SNAPSHOT", "OPEN")

        await client.call("DEL", "list")
        await client.call("SADD", "list", "a set now")
        for name in names[::3]:
            await client.call("DEL", name)
        await client.call("RENAME", f"{tag_of(100)}:1", f"{tag_of(100)}:renamed")
        await fill(client, [f"new:{number}" for number in range(50)])
        at_second = set(await client.call("KEYS", "*"))
        second = await client.call("STEADY.SNAPSHOT", "OPEN")
        await client.call("DEL", "new:7", "hash", *(f"new:{number}" for number in range(20)))
        await client.call("SET", "newer", "v")

        held = await held_by_nodes(cluster)
        now = {key for key in held if not is_internal(key)}
        assert len(held - now) > 300, "nothing was preserved, so nothing is tested"
        await check_listings(client, now)
        assert {await client.call("RANDOMKEY") for _ in range(50)} <= now
        async with bound(address, first) as reader:
            await check_listings(reader, at_first)
            assert await scan_all(reader, "TYPE", "list") == Counter([b"list"])
            assert await scan_all(reader, "TYPE", "hash") == Counter([b"hash"])
            assert "cannot be answered as of a snapshot" in await refusal(reader, "RANDOMKEY")
        async with bound(address, second) as reader:
            await check_listings(reader, at_second)
            assert await scan_all(reader, "TYPE", "set") == Counter([b"list"])
        assert (await refusal(client, "FLUSHALL")).startswith("SNAPSHOTOPEN FLUSHALL did not run")
        assert (await refusal(client, "FLUSHDB")).startswith("SNAPSHOTOPEN FLUSHDB did not run")

        async with bound(address, first) as reader:
            await client.call("STEADY.SNAPSHOT", "CLOSE", first)
            for words in (["SCAN", "0"], ["KEYS", "*"], ["DBSIZE"]):
                assert (await refusal(reader, *words)).startswith("SNAPSHOTTOOOLD"), words
        await client.call("STEADY.SNAPSHOT", "CLOSE", second)
        assert await client.call("FLUSHALL") == b"OK"
        assert await client.call("DBSIZE") == 0


async def test_what_a_former_proxy_left_is_not_shown(share_cluster: ClusterStarter) -> None:
    """Markers and pre-images of a snapshot that nobody knows, in a cluster with a proxy that has just begun.

    Its id is of times to come, so that no sweep takes them: it may be another store's.
    """
    async with share_cluster() as cluster:
        slot, tag = 100, tag_of(100)
        owner = (await cluster.map_at(cluster.primaries[0])).owner_of(slot)
        key = f"{tag}:key".encode()
        async with cluster.connection(owner.address) as node:
            for number in range(200):
                await node.call("SET", marker(slot, UNKNOWN_ID, key + b"%d" % number), "p")
                await node.call("SET", preimage(slot, UNKNOWN_ID, key + b"%d" % number), "v")
            await node.call("SET", key, "v")
        async with Steadyread().serving(cluster) as address, connected(address) as client:
            assert await client.call("RANDOMKEY") == key
            await check_listings(client, {key})
            await client.call("DEL", key)
            assert await client.call("RANDOMKEY") is None
            await check_listings(client, set())
            assert len(await held_by_nodes(cluster)) == 400


async def test_a_slot_between_two_nodes_is_listed_as_of_the_cut(start_cluster: ClusterStarter) -> None:
    """Half of a slot's keys, markers and pre-images are at the target, and keys of both halves are written then."""
    async with proxied(start_cluster) as (cluster, address), connected(address) as client:
        slot, tag = 100, tag_of(100)
        names = [f"{tag}:{number}".encode() for number in range(200)]
        await fill(client, names)
        snapshot_id = await client.call("STEADY.SNAPSHOT", "OPEN")
        for name in names[:60]:
            await client.call("DEL", name)  # so markers move, too
        await fill(client, [f"{tag}:new:{number}" for number in range(20)])
        half_moved = trio.Event()
        owner = (await cluster.map_at(cluster.primaries[0])).owner_of(slot)
        target = next(node for node in cluster.primaries if node.id != owner.id)
        async with trio.open_nursery() as nursery:
            move = partial(
                move_slot_stepwise,
                cluster,
                slot,
                target,
                half_moved_seconds=60.0,
                on_half_moved=half_moved.set,
            )
            nursery.start_soon(move)
            await half_moved.wait()
            for name in names[50:120:2]:
                await client.call("DEL", name)
            await client.call("SET", f"{tag}:newer", "v")
            at_both = [
                await cluster.call(at, "CLUSTER", "COUNTKEYSINSLOT", slot)
                for at in (owner.address, target.address)
            ]
            assert min(at_both) > 50, at_both
            async with bound(address, snapshot_id) as reader:
                await check_listings(reader, set(names))
            held = await held_by_nodes(cluster)
            await check_listings(client, {key for key in held if not is_internal(key)})
            nursery.cancel_scope.cancel()


async def _write_at_random(client: Connection, names: Sequence[bytes], chance: random.Random) -> None:
    """Until cancelled: keys of the cut come and go, and others, too."""
    while True:
        name = chance.choice(names)
        words: tuple[Any, ...] = chance.choice(
            (("DEL", name), ("SET", name, "w"), ("SADD", name + b":new", "x"))
        )
        await client.call(*words)
        await trio.sleep(WRITE_SECONDS)


async def _move_about(cluster: Cluster, is_atomic: bool, moves: list[int], chance: random.Random) -> None:
    """Until cancelled, one slot at a time."""
    while True:
        for slot in SLOTS:
            current = (await cluster.map_at(cluster.primaries[0])).owner_of(slot)
            target = chance.choice([node for node in cluster.primaries if node.id != current.id])
            if is_atomic:
                await move_slots_atomically(cluster, [slot], target)
            else:
                await move_slot_stepwise(cluster, slot, target, batch_keys=20, half_moved_seconds=0.02)
            moves.append(slot)


async def _keys(client: Connection) -> Counter[bytes]:
    return Counter(await client.call("KEYS", "*"))


@pytest.mark.parametrize("is_atomic", [False, True], ids=["stepwise", "atomic"])
async def test_listings_stay_those_of_the_cut_while_slots_move(
    start_cluster: ClusterStarter, is_atomic: bool
) -> None:
    """Promises 2 and 3 for listings, with writers on the same keys and slots handed to and fro."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    async with proxied(start_cluster) as (cluster, address), connected(address) as client:
        if is_atomic and (cluster.engine.name, cluster.engine.release[0]) < ("valkey", 9):
            pytest.skip(f"{cluster.engine} has no atomic migration")
        names = [f"{tag_of(slot)}:{number}".encode() for slot in SLOTS for number in range(150)]
        names += [b"elsewhere:%d" % number for number in range(100)]
        await fill(client, names)
        existed = Counter(names)
        snapshot_id = await client.call("STEADY.SNAPSHOT", "OPEN")
        moves: list[int] = []
        refusals: list[str] = []
        rounds = 0
        async with trio.open_nursery() as nursery, bound(address, snapshot_id) as reader:
            nursery.start_soon(_write_at_random, client, names, chance)
            nursery.start_soon(_move_about, cluster, is_atomic, moves, chance)
            ways: Sequence[Callable[[], Awaitable[Counter[bytes]]]] = (
                partial(scan_all, reader, "COUNT", 1000),
                partial(scan_all, reader, "COUNT", 1000, "TYPE", "string"),
                partial(_keys, reader),
            )
            with trio.fail_after(LOAD_SECONDS_MAX):
                while rounds < ROUNDS or len(moves) < MOVES:
                    try:
                        found = await ways[rounds % len(ways)]()
                    except ServerError as refused:
                        refusals.append(str(refused))
                        continue
                    wrong = found - existed, existed - found
                    assert found == existed, f"too many and too few, seed {seed}: {wrong}"
                    rounds += 1
            nursery.cancel_scope.cancel()
        assert all(refused.startswith("NOTREADY") for refused in refusals), (
            refusals
        )  # which may be sent again
        assert len(refusals) < rounds, refusals
        now = {key for key in await held_by_nodes(cluster) if not is_internal(key)}
        assert now != set(names), "nothing was written, so nothing is tested"
    print(f"\n{rounds} listings while {len(moves)} slots moved, {len(refusals)} refused")
