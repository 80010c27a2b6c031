"""A primary and its replicas behind socket pairs: each answers from a dictionary, at an offset that the test moves.

Time is Trio's virtual clock: the servers answer every few milliseconds what has come by then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from proxy.hub import Hub
from proxy.protocol.encode import array, bulk, error, integer, simple
from proxy.replicas.monitor import Monitor, MonitorOptions
from proxy.replicas.service import Replica, ReplicaOptions, Replicas
from proxy.topology.service import Topology
from proxy.upstream.nodes import Lane, Nodes
from routing.promotion import Stage
from routing.slot import SLOT_COUNT
from routing.topology import Node, Role, Shard, TopologyView
from tests.proxy.world import FakeDialer, FakeNode

STEP_SECONDS = 0.004
HISTORY = b"a" * 40
Value = bytes | set[bytes] | dict[bytes, bytes]
NIL = b"$-1\r\n"


@dataclass
class Twin:
    """One server. ``refusals``: key -> error; ``lifetimes``: key -> milliseconds."""

    node: FakeNode
    is_primary: bool
    data: dict[bytes, Value] = field(default_factory=dict)
    offset: int = 100
    replid: bytes = HISTORY
    is_syncing: bool = False
    is_silent: bool = False
    zone: str = ""
    refusals: dict[bytes, str] = field(default_factory=dict)
    lifetimes: dict[bytes, int] = field(default_factory=dict)
    on_request: Callable[[list[bytes]], None] = lambda words: None
    asked: list[list[bytes]] = field(default_factory=list)
    _random: int = 0

    def answer(self, words: list[bytes]) -> bytes:
        self.asked.append(words)
        self.on_request(words)
        match [words[0], *words[1:]]:
            case [b"INFO", b"replication"]:
                return self._replication()
            case [b"INFO", b"server"]:
                line = f"availability_zone:{self.zone}\r\n" if self.zone else ""
                return bulk(f"# Server\r\nredis_version:7.2.4\r\n{line}")
            case [b"DBSIZE"]:
                return integer(len(self.data))
            case [b"RANDOMKEY"]:
                self._random += 1
                return bulk(sorted(self.data)[self._random % len(self.data)]) if self.data else NIL
            case [b"MEMORY", b"USAGE", _]:
                return integer(100)
            case [_, key, *_] if key in self.refusals:
                return error(self.refusals[key])
            case [command, key, *_]:
                return self._value_answer(command, key)
        raise AssertionError(f"an unexpected request: {words}")

    def _value_answer(self, command: bytes, key: bytes) -> bytes:
        value = self.data.get(key)
        if command == b"TYPE":
            names = {bytes: "string", set: "set", dict: "hash"}
            return simple("none" if value is None else names[type(value)])
        if command == b"PTTL":
            return integer(-2 if value is None else self.lifetimes.get(key, -1))
        kinds = {b"STRLEN": bytes, b"GETRANGE": bytes, b"SCARD": set, b"SMEMBERS": set, b"HLEN": dict}
        if value is not None and not isinstance(value, kinds.get(command, dict)):
            return error("WRONGTYPE Operation against a key holding the wrong kind of value")
        value = value or b""
        match command:
            case b"STRLEN" | b"SCARD" | b"HLEN":
                return integer(len(value))
            case b"GETRANGE":
                assert isinstance(value, bytes)
                return bulk(value)
            case b"SMEMBERS":
                return array([bulk(member) for member in value if isinstance(member, bytes)])
            case b"HGETALL":
                pairs = value.items() if isinstance(value, dict) else ()
                return array([bulk(part) for pair in pairs for part in pair])
        raise AssertionError(f"an unexpected request: {command!r}")

    def _replication(self) -> bytes:
        history = [f"master_replid:{self.replid.decode()}", f"master_replid2:{'0' * 40}"]
        if self.is_primary:
            lines = ["role:master", *history, f"master_repl_offset:{self.offset}"]
        else:
            lines = [
                "role:slave",
                "master_link_status:up",
                f"master_sync_in_progress:{int(self.is_syncing)}",
                f"slave_repl_offset:{self.offset}",
                *history,
            ]
        return bulk("# Replication\r\n" + "\r\n".join(lines) + "\r\n")


class ShardWorld:
    """Node 0 is the primary. ``changes``: what the monitor told, as (address's port - 7000, stage, reason)."""

    def __init__(self, nursery: trio.Nursery, count: int, options: MonitorOptions) -> None:
        self.hub = Hub()
        self.twins = [Twin(FakeNode(index), index == 0) for index in range(count)]
        dialer = FakeDialer(self.hub, "", "", 1.0, 1 << 24, nodes=tuple(twin.node for twin in self.twins))
        self.topology = Topology()
        self.primaries = Nodes(dialer, nursery, 60.0)
        self.at_replicas = Nodes(dialer, nursery, 60.0, lanes=(Lane.READ,))
        self.replicas = Replicas(self.at_replicas, self.topology, ReplicaOptions())
        self.changes: list[tuple[int, Stage, str]] = []
        self.monitor = Monitor(self.replicas, self.primaries, options, self._on_stage, clock=lambda: 1.7e9)
        self.primaries.ensure(self.twins[0].node.address, 2)
        self.see(range(1, count))

    def see(self, replicas: range) -> None:
        """The view has these replicas now."""
        primary = Node(self.twins[0].node.id, self.twins[0].node.address, Role.PRIMARY)
        found = tuple(
            Node(twin.node.id, twin.node.address, Role.REPLICA, primary.id)
            for twin in map(self.twins.__getitem__, replicas)
        )
        view = TopologyView(0, 1, (Shard(primary, found),), (0,) * SLOT_COUNT)
        self.topology.adopt(view, trio.current_time())

    @property
    def primary(self) -> Twin:
        return self.twins[0]

    def replica(self, index: int) -> Replica:
        address = self.twins[index].node.address
        return next(replica for replica in self.replicas.replicas() if replica.address == address)

    def write(self, size: int = 10) -> None:
        """The primary's offset moves on, and the replicas'."""
        for twin in self.twins:
            twin.offset += size

    def set_all(self, key: bytes, value: Value) -> None:
        for twin in self.twins:
            twin.data[key] = value

    async def wait_stage(self, index: int, stage: Stage, seconds: float = 10.0) -> float:
        """Seconds until it is told."""
        began = trio.current_time()
        with trio.fail_after(seconds):
            while self.replica(index).stage is not stage:
                await trio.sleep(STEP_SECONDS)
        return trio.current_time() - began

    def told(self, index: int) -> list[Stage]:
        found = [stage for of, stage, _ in self.changes if of == index]
        self.changes = [change for change in self.changes if change[0] != index]
        return found

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            while self.hub.turn():
                pass
            for twin in self.twins:
                if not twin.is_silent:
                    twin.node.reply(*[twin.answer(words) for words in twin.node.take()])
            await trio.sleep(STEP_SECONDS)

    def _on_stage(self, replica: Replica, old: Stage, new: Stage, reason: str) -> None:
        assert replica.stage is new
        self.changes.append((replica.address.port - 7000, new, reason))


@asynccontextmanager
async def shard_of(count: int = 2, options: MonitorOptions | None = None) -> AsyncIterator[ShardWorld]:
    """A primary and count - 1 replicas that are connected; the monitor does not run yet."""
    async with trio.open_nursery() as nursery:
        world = ShardWorld(nursery, count, options or MonitorOptions())
        try:
            await nursery.start(world.serve)
            while len([*world.primaries.connections(), *world.at_replicas.connections()]) < count + 1:
                await trio.sleep(0.01)
            yield world
        finally:
            nursery.cancel_scope.cancel()
            for connection in [*world.primaries.connections(), *world.at_replicas.connections()]:
                connection.close("end of test")
            for twin in world.twins:
                twin.node.lose()
            world.hub.close()
