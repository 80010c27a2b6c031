"""A cluster in memory that lists its keys, and the snapshots' side of a proxy, faked.

Nodes answer what commands over all shards ask, by the engines' rules, one command after the other; before each one
``between`` may change what it likes, as other clients do, also in the midst of a pipeline. Writers preserve as
docs/decisions/0009-snapshots.md says.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import trio

from proxy.exchange.gather import GATHERED
from proxy.exchange.open_requests import OpenRequests
from proxy.protocol.encode import array, bulk, integer
from proxy.protocol.replies import decode
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import Discard
from routing import glob
from routing.names import slot_ranges
from routing.slot import slot_of as slot_of_key
from routing.snapshot import Chain
from routing.snapshot_listing import clients_keys
from routing.snapshot_names import marker, preimage, tags
from routing.topology import Address
from tests.proxy.world import Link, World

SLOTS_LISTED = 64  # by what is tested: all would take a test longer than they tell
NIL = b"$-1\r\n"
HISTORY = b"*1\r\n$7\r\nHISTORY\r\n"  # the model's own question, for INFO replication


slot_of = lru_cache(maxsize=10_000)(slot_of_key)


def key_in(slot: int, name: bytes) -> bytes:
    return b"{%b}%b" % (tags()[slot], name)


class FakeSnapshots:
    """``exchange.snapshots``."""

    def __init__(self) -> None:
        self.chain = Chain()
        self.ended: dict[int, bytes] = {}  # id -> the refusal of its reads
        self.may = True
        self.serving: int | None = None
        self.multis = 0

    def may_have_keys(self) -> bool:
        return self.may

    def current(self) -> int | None:
        return self.serving

    def refusal(self, snapshot_id: int) -> bytes | None:
        return self.ended.get(snapshot_id)

    def is_usable(self, snapshot_id: int) -> bool:
        return snapshot_id not in self.ended

    @asynccontextmanager
    async def begin_multi(self, write: object) -> AsyncIterator[None]:
        await trio.lowlevel.checkpoint()
        self.multis += 1
        try:
            yield
        finally:
            self.multis -= 1


class HistoryCheck(Discard):
    """Closes the connection when the node's history is not the one that was judged."""

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if decode(reply) != b"good":
            connection.close("another history")


class FakeReads:
    """``exchange.snapshot_reads``."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.unjudged: set[Address] = set()
        self.guards = 0

    def may_ask(self, snapshot_id: int) -> Callable[[NodeConnection], bool]:
        def before(connection: NodeConnection) -> bool:
            if connection.address in self.unjudged:
                return False
            self.guards += 1
            connection.queue(HistoryCheck(HISTORY))
            return True

        return before

    async def judged_execute(
        self,
        raw: bytes,
        hash_slot: int,
        snapshot_id: int,
        *,
        resp: int,
        deadline: float,
        asked: list[tuple[Address, bytes]] | None = None,
    ) -> bytes:
        def before(connection: NodeConnection, is_asking: bool) -> bool:
            if asked is not None:
                if not is_asking:
                    asked.clear()
                asked.append((connection.address, b"good"))
            return True

        return await self._world.exchange.execute(
            raw, hash_slot, resp=resp, repeatable=True, deadline=deadline, lane=Lane.READ, before=before
        )


@dataclass
class LinkState:
    link: Link
    pending: list[list[bytes]] = field(default_factory=list)
    is_asking: bool = False


class ModelCluster:
    """The nodes' side of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.data: list[dict[bytes, bytes]] = [{} for _ in world.nodes]  # node -> key -> value
        self.types: dict[bytes, bytes] = {}  # of keys that are no strings
        self.held: set[bytes] = set()  # expired, and not collected
        self.histories = [b"good" for _ in world.nodes]
        self.existed: dict[int, set[bytes]] = {}  # id -> the clients' keys at its cut
        self.between: Callable[[], None] = lambda: None
        self.running: list[bytes] = []  # what is run next
        self.ran: list[list[bytes]] = []
        self.snapshots = FakeSnapshots()
        self.reads = FakeReads(world)
        world.exchange.snapshots = self.snapshots  # type: ignore[assignment]
        world.exchange.snapshot_reads = self.reads  # type: ignore[assignment]
        self.requests: OpenRequests = world.client().connection
        for slot in range(SLOTS_LISTED):
            world.owners[slot] = slot % len(world.nodes)
        world.see()
        self._states: list[list[LinkState]] = [[] for _ in world.nodes]
        self._lines: dict[int, tuple[object, bytes]] = {}  # node -> what its line was made of, and the line

    # -- asking, as a client does

    async def call(self, *words: bytes | str, snapshot_id: int = 0) -> Any:
        """The value of the reply; a ServerError for an error."""
        arguments = [word if isinstance(word, bytes) else word.encode() for word in words]
        self.requests.snapshot_id = snapshot_id
        return decode(
            await self.while_serving(lambda: GATHERED[arguments[0].decode()](self.requests, arguments))
        )

    async def scan(self, *options: str, snapshot_id: int = 0) -> list[bytes]:
        """The keys of one full iteration, as often as they came."""
        found: list[bytes] = []
        cursor = b"0"
        while True:
            cursor, keys = await self.call("SCAN", cursor, *options, snapshot_id=snapshot_id)
            found += keys
            if cursor == b"0":
                return found

    async def while_serving(self, work: Callable[[], Awaitable[bytes]]) -> bytes:
        reply = b""

        async def do_work() -> None:
            nonlocal reply
            reply = await work()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(do_work)
            while True:
                await self.world.settle()
                if not self.serve():
                    await trio.sleep(0.01)
        return reply

    def upcoming(self, index: int) -> list[list[bytes]]:
        """What the node has been sent and has not run, on the connection that it serves."""
        return next((state.pending for state in self._states[index] if self.running in state.pending), [])

    # -- the nodes

    def serve(self) -> bool:
        """Every node runs what it was sent; whether there was anything."""
        done = False
        for index, node in enumerate(self.world.nodes):
            states = self._states[index] = [
                state for state in self._states[index] if state.link in node.links
            ]
            known = [state.link for state in states]
            states += [LinkState(link) for link in node.links if link not in known]
            for state in states:
                state.pending += state.link.take()
                while state.pending:
                    done = True
                    self.running = state.pending[0]
                    self.between()
                    words = state.pending.pop(0)
                    try:
                        state.link.reply(self._handle(index, state, words))
                    except OSError:
                        node.links.remove(state.link)
                        break
        return done

    def _handle(self, index: int, state: LinkState, words: list[bytes]) -> bytes:
        self.ran.append(words)
        is_asking, state.is_asking = state.is_asking, words[0] == b"ASKING"
        data = self.data[index]
        match words:
            case [b"ASKING"]:
                return b"+OK\r\n"
            case [b"HISTORY"]:
                return bulk(self.histories[index])
            case [b"CLUSTER", b"NODES"]:
                return bulk(self._line(index))
            case [b"CLUSTER", b"GETSLOTMIGRATIONS"]:
                return b"-ERR unknown subcommand 'GETSLOTMIGRATIONS'\r\n"
            case [b"CLUSTER", b"GETKEYSINSLOT", slot, limit]:
                keys = [key for key in data if slot_of(key) == int(slot)]
                return array([bulk(key) for key in keys[: int(limit)]])
            case [b"DBSIZE"]:
                return integer(len(data))
            case [b"INFO", _]:
                return bulk(b"# Keyspace\r\ndb0:keys=%d,expires=0,avg_ttl=0\r\n" % len(data))
            case [b"RANDOMKEY"]:
                return bulk(random.choice(sorted(data))) if data else NIL
            case [b"KEYS", pattern]:
                parsed = glob.parse(pattern)
                return array(
                    [bulk(key) for key in data if glob.matches(parsed, key) and key not in self.held]
                )
            case [b"FLUSHALL" | b"FLUSHDB", *_]:
                data.clear()
                return b"+OK\r\n"
        keys = words[1:]
        if refusal := self._refusal(index, keys, is_asking):
            return refusal
        there = [key for key in keys if key in data and key not in self.held]
        match words[0]:
            case b"EXISTS":
                return integer(len(there))
            case b"TYPE":
                return b"+%b\r\n" % (self.types.get(keys[0], b"string") if there else b"none")
            case b"GET":
                return bulk(data[keys[0]]) if there else NIL
            case b"MGET":
                return array([bulk(data[key]) if key in there else NIL for key in keys])
        raise AssertionError(f"the model knows no {words}")

    def _line(self, index: int) -> bytes:
        node = self.world.nodes[index]
        made_of = (list(self.world.owners), dict(self.world.migrations))
        if index in self._lines and self._lines[index][0] == made_of:
            return self._lines[index][1]
        owned = [slot for slot, owner in enumerate(self.world.owners) if owner == index]
        spans = " ".join(f"{low}-{high}" for low, high in slot_ranges(owned))
        moving = " ".join(
            f"[{slot}->-{self.world.nodes[target].id}]"
            for slot, (source, target) in self.world.migrations.items()
            if source == index
        )
        epoch = 1 + index
        line = f"{node.id} {node.address}@1 myself,master - 0 0 {epoch} connected {spans} {moving}\n".encode()
        self._lines[index] = made_of, line
        return line

    def _refusal(self, index: int, keys: list[bytes], is_asking: bool) -> bytes | None:
        """The engines' rules of redirection."""
        slot = slot_of(keys[0])
        assert all(slot_of(key) == slot for key in keys), keys
        missing = sum(key not in self.data[index] for key in keys)
        source, target = self.world.migrations.get(slot, (-1, -1))
        if self.world.owners[slot] == index:
            if source != index or not missing:
                return None
            if missing < len(keys):
                return b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"
            return b"-ASK %d %s\r\n" % (slot, str(self.world.nodes[target].address).encode())
        if target == index and is_asking:
            if missing and len(keys) > 1:
                return b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"
            return None
        return b"-MOVED %d %s\r\n" % (slot, str(self.world.nodes[self.world.owners[slot]].address).encode())

    # -- writers, snapshots, migrations

    def get(self, name: bytes) -> bytes | None:
        return self.data[self._place(name)].get(name)

    def _place(self, name: bytes) -> int:
        """The node that has the key, or would get it."""
        slot = slot_of(name)
        owner = self.world.owners[slot]
        if slot in self.world.migrations and name not in self.data[owner]:
            return self.world.migrations[slot][1]
        return owner

    def put(self, name: bytes, value: bytes) -> None:
        self.data[self._place(name)][name] = value

    def write(self, key: bytes, value: bytes = b"w", *, too_large: bool = False) -> None:
        self._preserve(key, too_large)
        self.put(key, value)

    def delete(self, key: bytes) -> None:
        self._preserve(key, False)
        for data in self.data:
            data.pop(key, None)

    def _preserve(self, key: bytes, too_large: bool) -> None:
        newest, slot = self.snapshots.chain.newest, slot_of(key)
        if not newest or self.get(marker(slot, newest, key)) is not None:
            return
        value = self.get(key)
        if value is not None and not too_large:
            self.put(preimage(slot, newest, key), value)
            if key in self.types:
                self.types[preimage(slot, newest, key)] = self.types[key]
        says = b"a" if value is None else b"x" if too_large else b"p"
        self.put(marker(slot, newest, key), says)

    def cut(self, snapshot_id: int) -> None:
        self.snapshots.chain = Chain((*self.snapshots.chain.ids, snapshot_id))
        self.existed[snapshot_id] = self.keys()

    def keys(self) -> set[bytes]:
        """The clients' keys now."""
        return set(clients_keys([key for data in self.data for key in data]))

    def migrate(self, slot: int, target: int) -> None:
        if slot not in self.world.migrations and self.world.owners[slot] != target:
            self.world.migrations[slot] = (self.world.owners[slot], target)

    def move(self, name: bytes) -> None:
        """One key goes over, if its slot is split and it is still at the source."""
        if (migration := self.world.migrations.get(slot_of(name))) is not None:
            source, target = migration
            if name in self.data[source]:
                self.data[target][name] = self.data[source].pop(name)
