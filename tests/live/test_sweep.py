"""Snapshots' keeping on real servers: what is swept while slots move, what a stalled node may still execute, and who
writes past the proxies.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import trio

from proxy.embedded.cluster import Cluster, Node, running_cluster
from proxy.embedded.engine import Engine
from proxy.embedded.moves import move_slot_stepwise, move_slots_atomically
from proxy.exchange.exchange import Exchange
from proxy.hub import Hub
from proxy.protocol.encode import command, frame
from proxy.protocol.replies import decode
from proxy.replicas.service import ReplicaOptions, Replicas
from proxy.snapshots.abandoned import kill_abandoned, kill_strangers, list_clients
from proxy.snapshots.bypass import BypassWatch
from proxy.snapshots.room import INFO_MEMORY, refusals
from proxy.snapshots.sweep import Sweeper, SweepPace
from proxy.store.memory import MemoryStore
from proxy.topology.discovery import Discovery
from proxy.topology.keeper import Keeper
from proxy.topology.service import Topology
from proxy.upstream.connect import Dialer
from proxy.upstream.nodes import Lane, Nodes
from proxy.upstream.private import PrivateConnections
from routing.client_list import ListedClient
from routing.slot import slot_of
from routing.snapshot import Chain
from routing.snapshot_names import marker, preimage
from routing.timeline import TimelineLimits
from routing.topology import Address
from tests.live.conftest import ClusterStarter, engine_named
from tests.proxy.world import idle_snapshots

ENGINES = ["redis-7.0", "valkey-9.1"]
FORMER, KEPT, UNKNOWN = 5, 6, 999  # ids of snapshots
OTHER_KEYS = 20_000
PRESERVED = 400  # keys with a marker and a pre-image, for each id
MOVING = 200  # as many more in the slot that moves
SECONDS_MAX = 60.0
OWN = "test-1-ab12"
pytestmark = pytest.mark.live


@asynccontextmanager
async def exchange_with(cluster: Cluster, proxy_id: str = OWN) -> AsyncIterator[Exchange]:
    """The data plane of a proxy, with a keeper that looks at the cluster."""
    hub = Hub()
    dialer = Dialer(hub, "", "", 2.0, 1 << 24, proxy_id=proxy_id)
    topology, store = Topology(), MemoryStore()
    keeper = Keeper(
        topology,
        Discovery(dialer, cluster.addresses[:1]),
        store,
        "here",
        refresh_seconds=0.1,
        limits=TimelineLimits(),
    )
    shared: list[Nodes] = []
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(hub.run)
            nodes, at_replicas = Nodes(dialer, nursery, 5.0), Nodes(dialer, nursery, 5.0, (Lane.READ,))
            shared += [nodes, at_replicas]
            topology.subscribe(
                lambda old, new: nodes.ensure_all([shard.primary.address for shard in new.shards], 2)
            )
            private = PrivateConnections(dialer, 4)
            exchange = Exchange(
                hub,
                nodes,
                topology,
                private,
                Replicas(at_replicas, topology, ReplicaOptions()),
                idle_snapshots(topology, nodes, private),
                nursery,
                request_deadline_seconds=5.0,
                script_cache_bytes_max=0,
            )
            for task in (store.run, keeper.run):
                nursery.start_soon(task)
            with trio.fail_after(10):
                while len(topology.view.shards) < len(cluster.primaries):
                    await topology.wait_change()
            yield exchange
            nursery.cancel_scope.cancel()
    finally:
        for connection in [connection for nodes in shared for connection in nodes.connections()]:
            connection.close("stopping")
        hub.close()
        with trio.move_on_after(2, shield=True):
            await store.aclose()


async def wait_until(is_so: Callable[[], bool], what: str) -> None:
    with trio.move_on_after(SECONDS_MAX):
        while not is_so():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"not within {SECONDS_MAX:g} s: {what}")


# -- the sweep


def internal_names(snapshot_id: int, keys: Iterable[bytes]) -> set[bytes]:
    return {name(slot_of(key), snapshot_id, key) for key in keys for name in (marker, preimage)}


async def put(cluster: Cluster, names: Iterable[bytes]) -> None:
    """SET each name at its owner."""
    at: dict[Address, list[tuple[str, bytes, str]]] = {}
    owners = await cluster.map_at(cluster.nodes[0])
    for name in names:
        at.setdefault(owners.owner_of(slot_of(name)).address, []).append(("SET", name, "x"))
    for address, commands in at.items():
        async with cluster.connection(address) as connection:
            for first in range(0, len(commands), 1000):
                await connection.call_all(commands[first : first + 1000])


async def all_names(cluster: Cluster) -> set[bytes]:
    names: set[bytes] = set()
    for node in cluster.primaries:
        names.update(await cluster.call(node, "KEYS", "*"))
    return names


@dataclass
class Reader:
    """A late reader of FORMER at slots that rest: where it finds no pre-image, it must find no marker."""

    cluster: Cluster
    keys: list[bytes]
    seen_gone: int = 0
    wrong: list[bytes] = field(default_factory=list)

    async def run(self) -> None:
        owners = await self.cluster.map_at(self.cluster.nodes[0])
        async with trio.open_nursery() as nursery:
            for node in self.cluster.primaries:
                mine = [key for key in self.keys if owners.owner_of(slot_of(key)).address == node.address]
                nursery.start_soon(self._read, node, mine)

    async def _read(self, node: Node, keys: list[bytes]) -> None:
        rng = random.Random(node.address.port)
        async with self.cluster.connection(node) as connection:
            while True:
                key = rng.choice(keys)
                slot = slot_of(key)
                has_preimage = await connection.call("EXISTS", preimage(slot, FORMER, key))
                if not has_preimage:
                    self.seen_gone += 1
                    if await connection.call("EXISTS", marker(slot, FORMER, key)):
                        self.wrong.append(key)


@pytest.mark.parametrize("engine_name", ENGINES)
async def test_a_sweep_takes_what_is_kept_no_more_and_nothing_else_while_slots_move(engine_name: str) -> None:
    """With the half of a slot's keys on either side for a while, and, where the engine can, atomically."""
    engine = engine_named(engine_name)
    others = {b"key:%d" % number for number in range(OTHER_KEYS)} | {b"steady", b"steady{1}:own"}
    resting = [b"key:%d" % number for number in range(PRESERVED)]
    moving = [b"{moving}:%d" % number for number in range(MOVING)]
    slot = slot_of(moving[0])
    made = {n: internal_names(n, resting + moving) for n in (FORMER, KEPT, UNKNOWN)}
    async with running_cluster(engine, primaries=3, replicas=0) as cluster:
        await put(cluster, others | made[FORMER] | made[KEPT] | made[UNKNOWN])
        owner = (await cluster.map_at(cluster.nodes[0])).owner_of(slot).address
        home = cluster.node_at(owner)
        away = next(node for node in cluster.primaries if node.address != owner)
        chain = Chain((KEPT,))
        half_moved = trio.Event()
        singles = 0

        async with exchange_with(cluster) as exchange, trio.open_nursery() as nursery:

            async def execute(raw: bytes, hash_slot: int) -> bytes:
                nonlocal singles
                singles += hash_slot == slot and raw.startswith(b"*2\r\n")
                return await exchange.execute(raw, hash_slot, resp=2, repeatable=True, lane=Lane.WRITE)

            async def no_strangers() -> list[str]:
                await trio.lowlevel.checkpoint()
                return []

            sweeper = Sweeper(
                partial(exchange.execute_at, repeatable=True),
                execute,
                exchange.topology,
                SweepPace(pause_seconds=0.005, interval_seconds=0.5, settle_seconds=1.0),
                chain=lambda: chain,
                sweepable=lambda snapshot_id: snapshot_id < UNKNOWN,
                strangers=no_strangers,
            )

            async def move() -> None:
                for target in (away, home):
                    await move_slot_stepwise(
                        cluster,
                        slot,
                        target,
                        batch_keys=20,
                        half_moved_seconds=1.5,
                        on_half_moved=half_moved.set,
                    )
                if engine.moves_slots_atomically:
                    for target in (away, home):
                        await move_slots_atomically(cluster, [slot], target)

            reader = Reader(cluster, [key for key in resting if slot_of(key) != slot])
            nursery.start_soon(reader.run)
            async with trio.open_nursery() as moves:
                moves.start_soon(move)
                await half_moved.wait()
                await wait_until(lambda: bool(exchange.topology.view.migrations), "the move is seen")
                nursery.start_soon(sweeper.run)
                # The half of a slot on either side is found by its names, whatever else goes on.
                await wait_until(lambda: sweeper.keys_swept_total >= len(made[FORMER]), "the keys are swept")
                assert exchange.topology.view.migrations, "the slot was to be split while it was swept"
                await put_again(cluster, exchange, made[FORMER], slot)  # more, for the moves that follow
            await wait_until(lambda: sweeper.keys_swept_total >= len(made[FORMER]) + MOVING, "swept again")
            passes = sweeper.passes_total
            await wait_until(lambda: sweeper.passes_total > passes + 1, "another pass")
            assert singles > 0
            assert reader.seen_gone > PRESERVED
            assert reader.wrong == []
            assert await all_names(cluster) == others | made[KEPT] | made[UNKNOWN]
            assert sweeper.problems() == []
            assert sweeper.may_have_keys

            chain = Chain()
            sweeper.chain_changed()
            await wait_until(
                lambda: sweeper.keys_swept_total >= len(made[FORMER]) + MOVING + len(made[KEPT]), ""
            )
            assert await all_names(cluster) == others | made[UNKNOWN]
            assert sweeper.may_have_keys  # of a snapshot that is not known to be over
            for node in cluster.primaries:
                owners = await cluster.map_at(node)
                for name in made[UNKNOWN]:
                    if owners.owner_of(slot_of(name)).address == node.address:
                        await cluster.call(node, "DEL", name)
            await wait_until(lambda: not sweeper.may_have_keys, "the cluster is proven to be free of keys")
            nursery.cancel_scope.cancel()


async def put_again(cluster: Cluster, exchange: Exchange, names: set[bytes], slot: int) -> None:
    """Markers of the moving slot anew, by whichever node has them to be."""
    again = sorted(name for name in names if slot_of(name) == slot and b":m:" in name)
    assert len(again) == MOVING
    for name in again:
        reply = await exchange.execute(
            command("SET", name, "p"), slot, resp=2, repeatable=True, lane=Lane.WRITE
        )
        assert reply == b"+OK\r\n"


# -- abandoned connections

WRITES = 20_000
SLOW_INCR = "for i = 1, 5000 do end return redis.call('INCR', KEYS[1])"  # so that they take a second or two
SUCCESSOR = "test-2-ef56"


@pytest.mark.parametrize("how", ["nothing", "kill_abandoned", "kill_strangers"])
@pytest.mark.parametrize("engine_name", ENGINES)
async def test_a_stalled_node_executes_nothing_of_an_abandoned_connection_once_the_kill_is_answered(
    engine_name: str, how: str
) -> None:
    """Of the writes in its socket some may run before that; without the kill all of them run, as late as may be."""
    async with running_cluster(engine_named(engine_name), primaries=1, replicas=0) as cluster:
        (node,) = cluster.primaries
        hub = Hub()
        dialer = Dialer(hub, "", "", 5.0, 1 << 30, proxy_id=OWN)
        async with trio.open_nursery() as nursery:
            await nursery.start(hub.run)
            asking = await replace(dialer, proxy_id=SUCCESSOR).open(node.address)
            writing = await dialer.open(node.address)

            async def ask(address: Address, raw: bytes) -> bytes:
                return await asking.request(raw)

            async def count() -> int:
                return int(decode(await asking.request(command("GET", "count"))) or 0)

            # Its replies are lost, as with a node behind a broken link; else they would end the connection.
            sha = decode(await asking.request(command("SCRIPT", "LOAD", SLOW_INCR)))
            writing.start(command("CLIENT", "REPLY", "OFF"))
            cluster.stop_process(node)
            try:
                writing.start(command("EVALSHA", sha, 1, "count") * WRITES)
                writing.close("no reply within 5 s")
                (entry,) = dialer.abandoned.pending()
                assert (entry.address, entry.client_id) == (node.address, writing.client_id)
                killing = trio.Event()
                done: list[object] = []

                async def kill() -> None:
                    killing.set()
                    if how == "kill_abandoned":
                        done.append(await kill_abandoned(dialer.abandoned, ask, lambda address: True, OWN))
                    elif how == "kill_strangers":
                        # The next proxy after a crash: the name tells.
                        successor = await kill_strangers(ask, [node.address], {"peer"}, SUCCESSOR)
                        done.append([*successor.problems, len(successor.found)])
                    else:
                        done.append(await count())

                nursery.start_soon(kill)
                await killing.wait()
            finally:
                cluster.cont(node)
            with trio.fail_after(10):
                while not done:
                    await trio.sleep(0.001)
            at_barrier = await count()
            assert at_barrier < WRITES / 2, "too quick to show anything"
            if how == "nothing":
                with trio.fail_after(10):
                    while await count() == at_barrier:
                        await trio.sleep(0.001)
            else:
                assert done == [[]] if how == "kill_abandoned" else done == [[1]]
                # All that was in the node's socket is gone: the kernel dropped it with the client.
                for _ in range(500):
                    assert await count() == at_barrier
                listed: list[ListedClient] = []
                assert await list_clients(ask, node.address, each=listed.append) == ""
                assert [client.id for client in listed if client.id == writing.client_id] == []
            if how == "kill_abandoned":
                assert dialer.abandoned.pending() == []
            asking.close("end of test")
            nursery.cancel_scope.cancel()
        hub.close()


# -- who is connected

CARRIED = 50_000  # keys in a slot that is handed over, so that the link that carries them is seen at it


async def test_who_writes_past_the_proxies_is_seen_and_nobody_else(
    engine: Engine, share_cluster: ClusterStarter
) -> None:
    """On each engine, also while it hands slots over with all the writes that come meanwhile."""
    async with (
        share_cluster(replicas=1) as cluster,
        exchange_with(cluster) as exchange,
        exchange_with(cluster, "other-2-cd34") as other,
    ):
        members = {OWN, "other-2-cd34"}
        primaries = [node.address for node in cluster.primaries]
        watch = BypassWatch(
            partial(exchange.execute_at, repeatable=True),
            lambda: primaries,
            lambda: members,
            OWN,
            1.0,
            lambda: 1.0,
        )
        slot = slot_of(b"key")
        for proxy in (exchange, other):
            set_key = command("SET", "key", "x")
            assert await proxy.execute(set_key, slot, resp=2, repeatable=False) == b"+OK\r\n"
        home = cluster.node_at((await cluster.map_at(cluster.nodes[0])).owner_of(slot).address)
        away = next(node for node in cluster.primaries if node is not home)
        carried = [b"{key}%d" % number for number in range(CARRIED)]
        if engine.moves_slots_atomically:
            await put(cluster, carried)
        async with trio.open_nursery() as nursery:
            is_over = False

            async def write_and_look() -> None:
                number = 0
                while not is_over:
                    number += 1
                    set_key = command("SET", "key", number)
                    await exchange.execute(set_key, slot, resp=2, repeatable=False)
                    await watch.look()
                    assert watch.problems() == []
                    assert watch.warnings() == []

            nursery.start_soon(write_and_look)
            if engine.moves_slots_atomically:
                for target in (away, home):
                    await move_slots_atomically(cluster, [slot], target)
                await exchange.execute(frame([b"UNLINK", *carried]), slot, resp=2, repeatable=True)
            for target in (away, home):
                await move_slot_stepwise(cluster, slot, target)
            is_over = True
        looks = watch.looks_total
        assert looks > 10
        assert (
            refusals(
                {home.address: await exchange.execute_at(home.address, INFO_MEMORY, repeatable=True)}, 90
            )
            == []
        )

        async with cluster.connection(home) as past:
            await past.call("SET", "key", "y")
            await watch.look()
        (warning,) = watch.warnings()
        assert warning.startswith("1 client writes past the proxies")
        assert f"(SET) at {home}" in warning
        members.remove("other-2-cd34")
        await watch.look()
        assert watch.strangers() == sorted(f"steadyread:other-2-cd34 at {address}" for address in primaries)
        assert "steadyread:other-2-cd34" in (await watch.find_strangers())[0]
