"""Commands that concern all shards, against real clusters, also while slots move."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from proxy.embedded.cluster import Cluster
from proxy.embedded.connection import Connection, ServerError, connected
from proxy.embedded.moves import move_slot_stepwise, move_slots_atomically
from proxy.exchange.gather.slots import SLOT_KEYS_MAX
from routing import glob
from routing.slot import slot_of
from tests.live.campaign.proxies import Steadyread
from tests.live.conftest import ClusterStarter

pytestmark = [
    pytest.mark.live,
    pytest.mark.parametrize("engine", ["redis-7.0", "valkey-9.1"], indirect=True),
]

BUSY_KEYS = 300  # in each slot that moves
BUSY_SLOTS = (100, 101, 9000)
SWEEP_SECONDS_MAX = 60.0
POLL_SECONDS = 0.05
LOAD_SECONDS = 6.0  # a hundred full iterations, some fifty slots moved


@asynccontextmanager
async def proxied(start_cluster: ClusterStarter, **options: Any) -> AsyncIterator[tuple[Cluster, Connection]]:
    async with (
        start_cluster(replicas=0, **options) as cluster,
        Steadyread().serving(cluster) as address,
        connected(address) as client,
    ):
        yield cluster, client


async def scan_all(client: Connection, *options: bytes | str | int) -> Counter[bytes]:
    """Every key that one full iteration returned, and how often."""
    found: Counter[bytes] = Counter()
    cursor = b"0"
    while True:
        cursor, keys = await client.call("SCAN", cursor, *options)
        found.update(keys)
        if cursor == b"0":
            return found


def tag_of(slot: int) -> str:
    """A hash tag whose keys are in ``slot``."""
    return next(f"{{{number}}}" for number in range(1_000_000) if slot_of(b"%d" % number) == slot)


async def fill(client: Connection, keys: Sequence[str | bytes]) -> None:
    for reply in await client.call_all([("SET", key, "v") for key in keys]):
        assert reply == b"OK"


async def test_each_command_answers_as_one_server(share_cluster: ClusterStarter) -> None:
    """What one server would say of all keys, scripts, functions and subscribers."""
    async with proxied(share_cluster) as (cluster, client):
        assert await client.call("RANDOMKEY") is None
        assert await scan_all(client) == Counter()
        assert await client.call("DBSIZE") == 0
        names = [b"key:%d" % number for number in range(500)]
        await fill(client, names)
        await client.call("RPUSH", "a list", "x")
        assert await client.call("DBSIZE") == 501
        assert await client.call("RANDOMKEY") in {*names, b"a list"}
        assert sorted(await client.call("KEYS", "*")) == sorted([*names, b"a list"])
        assert sorted(await client.call("KEYS", "key:1?")) == [b"key:%d" % n for n in range(10, 20)]
        assert await scan_all(client) == Counter([*names, b"a list"])
        assert await scan_all(client, "MATCH", "key:[1-3]9", "COUNT", 1000) == Counter(
            [b"key:19", b"key:29", b"key:39"]
        )
        assert await scan_all(client, "TYPE", "LIST") == Counter([b"a list"])
        await _check_refusals(client)
        await _check_scripts(cluster, client)
        await _check_functions(cluster, client)
        await _check_pubsub(cluster, client)
        await _wait_swept(client)
        assert b"db0:keys=501" in await client.call("INFO", "keyspace")
        assert await client.call("DBSIZE") == 501  # of the nodes' own counts, now
        assert await client.call("FLUSHALL") == b"OK"
        assert await client.call("DBSIZE") == 0


async def _wait_swept(client: Connection) -> None:
    """Until the proxy knows that no former one has left keys of snapshots: till then INFO counts no keys."""
    with trio.fail_after(SWEEP_SECONDS_MAX):
        while b"unavailable" in await client.call("INFO", "keyspace"):
            await trio.sleep(POLL_SECONDS)


async def _check_refusals(client: Connection) -> None:
    for words, refusal in (
        (("SCAN", "0", "SIDEWAYS"), "ERR syntax error"),
        (("SCAN", "0", "MATCH"), "ERR syntax error"),
        (("SCAN", "0", "COUNT", "0"), "ERR syntax error"),
        (("SCAN", "0", "COUNT", "x"), "ERR value is not an integer or out of range"),
        (("SCAN", "x"), "ERR invalid cursor"),
        (("FLUSHALL", "SOON"), "ERR syntax error"),
        (("SCRIPT", "KILL"), "NOTBUSY No scripts in execution right now."),
        (("FUNCTION", "KILL"), "NOTBUSY No scripts in execution right now."),
    ):
        with pytest.raises(ServerError) as caught:
            await client.call(*words)
        assert str(caught.value) == refusal, words


async def _check_scripts(cluster: Cluster, client: Connection) -> None:
    digest = await client.call("SCRIPT", "LOAD", "return 7")
    for node in cluster.primaries:
        assert await cluster.call(node, "SCRIPT", "EXISTS", digest) == [1]
    assert await client.call("SCRIPT", "EXISTS", digest, "0" * 40) == [1, 0]
    assert await client.call("EVALSHA", digest, 1, "somewhere") == 7
    with pytest.raises(ServerError, match="compiling"):
        await client.call("SCRIPT", "LOAD", "return (")
    assert await client.call("SCRIPT", "FLUSH") == b"OK"
    assert await client.call("SCRIPT", "EXISTS", digest) == [0]
    with pytest.raises(ServerError, match="NOSCRIPT"):
        await client.call("EVALSHA", digest, 1, "somewhere")


async def _check_functions(cluster: Cluster, client: Connection) -> None:
    library = "#!lua name=lib\nredis.register_function('seven', function() return 7 end)"
    assert await client.call("FUNCTION", "LOAD", library) == b"lib"
    assert {await client.call("FCALL", "seven", 1, f"k{n}") for n in range(20)} == {7}
    (listed,) = await client.call("FUNCTION", "LIST")
    assert listed[:2] == [b"library_name", b"lib"]
    assert (await client.call("FUNCTION", "STATS"))[:2] == [b"running_script", None]
    dump = await client.call("FUNCTION", "DUMP")
    first = cluster.primaries[0]
    await cluster.call(first, "FUNCTION", "DELETE", "lib")
    with pytest.raises(ServerError, match=f"node {first} said so, and FUNCTION DELETE was done at 2 of 3"):
        await client.call("FUNCTION", "DELETE", "lib")
    assert await client.call("FUNCTION", "LIST") == []
    assert await client.call("FUNCTION", "RESTORE", dump) == b"OK"
    for node in cluster.primaries:
        assert len(await cluster.call(node, "FUNCTION", "LIST")) == 1
    assert await client.call("FUNCTION", "FLUSH") == b"OK"
    assert await client.call("FUNCTION", "LIST") == []


async def _check_pubsub(cluster: Cluster, client: Connection) -> None:
    one, two, three = cluster.primaries
    async with cluster.connection(one) as a, cluster.connection(two) as b, cluster.connection(three) as c:
        await a.call("SUBSCRIBE", "news")
        await b.call("SUBSCRIBE", "news")
        await b.call("SUBSCRIBE", "olds")
        await c.call("PSUBSCRIBE", "n*")
        assert sorted(await client.call("PUBSUB", "CHANNELS")) == [b"news", b"olds"]
        assert await client.call("PUBSUB", "CHANNELS", "n*") == [b"news"]
        counts = await client.call("PUBSUB", "NUMSUB", "olds", "none", "news")
        assert counts == [b"olds", 1, b"none", 0, b"news", 2]
        assert await client.call("PUBSUB", "NUMPAT") == 1
        assert await client.call("PUBSUB", "SHARDCHANNELS") == []
        assert await client.call("PUBSUB", "SHARDNUMSUB", "news") == [b"news", 0]


async def test_expired_keys_are_not_shown(start_cluster: ClusterStarter) -> None:
    """A key past its time is no key, though a node may hold it still."""
    async with proxied(start_cluster, extra=("--enable-debug-command", "local")) as (cluster, client):
        for node in cluster.primaries:
            await cluster.call(node, "DEBUG", "SET-ACTIVE-EXPIRE", "0")
        await fill(client, [f"{{tag}}:{number}" for number in range(20)])
        await client.call("SET", "{tag}:gone", "v", "PX", 1)
        await client.call("SET", "alone:gone", "v", "PX", 1)
        await trio.sleep(0.05)
        expected = Counter(b"{tag}:%d" % number for number in range(20))
        assert await client.call("DBSIZE") == 22  # they are held still
        assert Counter(await client.call("KEYS", "*gone*")) == Counter()
        assert await scan_all(client, "TYPE", "string") == expected
        assert await client.call("DBSIZE") == 20  # TYPE has collected them


async def test_globs_match_as_the_engine_matches(share_cluster: ClusterStarter) -> None:
    """KEYS of generated patterns, over keys of the same letters, gives what the engine itself gives."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    letters = "ab-]^\\*?[c"
    texts = {"".join(chance.choices(letters, k=chance.randint(1, 5))) for _ in range(300)}
    patterns = {"".join(chance.choices(letters + "**??[[]-", k=chance.randint(1, 7))) for _ in range(1500)}
    patterns |= {"[^]", "[]", "[a-", "[a-]c", "[^a-c]*", "a\\", "[\\]]", "**a", "[c-a]", "[^", "*[^a]"}
    async with (
        share_cluster() as cluster,
        cluster.connection(cluster.primaries[0]) as node,
    ):
        prefix = tag_of(0)  # of a slot that the first node owns
        keys = [f"{prefix}{text}".encode() for text in texts]
        for reply in await node.call_all([("SET", key, "v") for key in keys]):
            assert reply == b"OK"
        wanted = [f"{prefix}{pattern}".encode() for pattern in patterns]
        for pattern, reply in zip(
            wanted, await node.call_all([("KEYS", one) for one in wanted]), strict=True
        ):
            compiled = glob.parse(pattern)
            ours = {key for key in keys if glob.matches(compiled, key)}
            assert ours == set(reply), f"{pattern!r}, seed {seed}"


async def _move_back_and_forth(cluster: Cluster, is_atomic: bool, moves: list[int]) -> None:
    """Until cancelled, one slot at a time; adds each moved slot to ``moves``."""
    while True:
        for slot in BUSY_SLOTS:
            current = (await cluster.map_at(cluster.primaries[0])).owner_of(slot)
            target = random.choice([node for node in cluster.primaries if node.id != current.id])
            if is_atomic:
                await move_slots_atomically(cluster, [slot], target)
            else:
                await move_slot_stepwise(
                    cluster, slot, target, batch_keys=20, half_moved_seconds=random.choice((0, 0.02))
                )
            moves.append(slot)


async def _iterate(
    proxy_clients: Sequence[Connection], expected: set[bytes], seconds: float
) -> tuple[int, Counter[bytes]]:
    """Full iterations by SCAN and KEYS; how many, and the keys that one of them missed."""
    rounds = 0
    missing: Counter[bytes] = Counter()
    ends = trio.current_time() + seconds

    async def run(client: Connection, ask: Callable[[Connection], Any]) -> None:
        nonlocal rounds
        while trio.current_time() < ends:
            found = set(await ask(client))
            missing.update(expected - found)
            assert found <= expected
            rounds += 1

    async with trio.open_nursery() as nursery:
        for index, client in enumerate(proxy_clients):
            asks: Sequence[Callable[[Connection], Any]] = (
                lambda c: scan_all(c, "COUNT", 1000),
                lambda c: scan_all(c, "COUNT", 1000, "TYPE", "string"),
                lambda c: c.call("KEYS", "*"),
            )
            nursery.start_soon(run, client, asks[index % len(asks)])
    return rounds, missing


@pytest.mark.parametrize("is_atomic", [False, True], ids=["stepwise", "atomic"])
async def test_no_key_is_missed_while_slots_move(start_cluster: ClusterStarter, is_atomic: bool) -> None:
    """Promise 1 for iterations: a key that exists throughout a full SCAN or KEYS is in it, whatever moves."""
    expected = {b"elsewhere:%d" % number for number in range(100)}
    for tag in map(tag_of, BUSY_SLOTS):
        expected |= {f"{tag}:{number}".encode() for number in range(BUSY_KEYS)}
    async with start_cluster(replicas=0) as cluster:
        if is_atomic and (cluster.engine.name, int(cluster.engine.version.split(".")[0])) < ("valkey", 9):
            pytest.skip(f"{cluster.engine} has no atomic migration")
        moves: list[int] = []
        async with Steadyread().serving(cluster) as address, trio.open_nursery() as nursery:
            async with connected(address) as a, connected(address) as b, connected(address) as c:
                await fill(a, sorted(expected))
                nursery.start_soon(_move_back_and_forth, cluster, is_atomic, moves)
                rounds, missing = await _iterate((a, b, c), expected, seconds=LOAD_SECONDS)
            nursery.cancel_scope.cancel()
    print(f"\n{rounds} full iterations while {len(moves)} slots moved")
    assert not missing, f"missed in {rounds} iterations: {missing.most_common(3)}"
    assert len(moves) >= 5
    assert rounds >= 30


async def test_a_large_slot_comes_in_parts_and_a_huge_one_is_refused(share_cluster: ClusterStarter) -> None:
    """Promise 7: one slot with all the keys takes bounded memory; past that, an error says what to do."""
    async with proxied(share_cluster) as (_, client):
        names = [b"{app}:%d" % number for number in range(SLOT_KEYS_MAX + 1)]
        for at in range(0, 25_000, 5000):
            await fill(client, names[at : at + 5000])
        sizes = []
        found: Counter[bytes] = Counter()
        cursor = None
        while cursor != b"0":
            cursor, keys = await client.call("SCAN", cursor or b"0", "COUNT", 100)
            sizes.append(len(keys))
            found.update(keys)
        assert found == Counter(names[:25_000])
        assert max(sizes) < 10_000
        for at in range(25_000, len(names), 5000):
            await fill(client, names[at : at + 5000])
        with pytest.raises(ServerError, match=f"has more than {SLOT_KEYS_MAX} keys.*hash tags"):
            await scan_all(client)
        assert len(await client.call("KEYS", "*")) == len(names)
