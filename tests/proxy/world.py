"""The data plane without a network: real hub, exchange and client connections; nodes are the far ends of socket pairs.

Nothing runs by itself but Trio tasks: a test says when a client's bytes arrive, when the hub takes a turn and when
a node reads or answers. With Trio's virtual clock every interleaving is a script that repeats exactly.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import trio
import trio.testing

from proxy.cache.memory import SnapshotCache
from proxy.exchange.exchange import Exchange
from proxy.frontend.client import ClientConnection
from proxy.frontend.server import Server
from proxy.hub import Hub
from proxy.protocol.replies import decode, end_of_reply
from proxy.protocol.requests import RequestLimits, RequestParser
from proxy.replicas.service import ReplicaOptions, Replicas
from proxy.settings import CacheSettings, ClientSettings, Settings, SnapshotSettings
from proxy.snapshots.links import Links
from proxy.snapshots.service import Snapshots
from proxy.store.memory import MemoryStore
from proxy.topology.service import Topology
from proxy.upstream.abandoned import Abandoned
from proxy.upstream.connect import ConnectError, Dialer
from proxy.upstream.connection import NodeConnection, PushHandler
from proxy.upstream.load import Loads, NodeLoad, rules_of
from proxy.upstream.nodes import Lane, Nodes
from proxy.upstream.private import PrivateConnections
from routing.slot import SLOT_COUNT
from routing.topology import Address, Migration, MigrationKind, Node, Role, Shard, TopologyView

DEADLINE_SECONDS = 5.0


@contextmanager
def in_turn(hub: Hub) -> Iterator[None]:
    """What happens inside is part of one turn, as if sockets had become ready."""
    hub._in_turn = True
    try:
        yield
    finally:
        hub.flush()


class Link:
    """The node's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._unread = b""
        self._parser = RequestParser(RequestLimits())

    def take(self) -> list[list[bytes]]:
        """The whole requests that have come since the last call."""
        while True:
            try:
                data = self.sock.recv(1 << 20)
            except BlockingIOError:
                break
            if not data:
                break
            self._unread += data
        found = []
        while self._unread:
            parsed = self._parser.parse(self._unread, 0)
            if parsed is None:
                break
            found.append(parsed[0])
            self._unread = self._unread[parsed[1] :]
        return found

    def has_unread(self) -> bool:
        """Whether bytes wait to be taken."""
        return bool(select.select([self.sock], [], [], 0)[0])

    def reply(self, *replies: bytes) -> None:
        self.sock.sendall(b"".join(replies))

    def close(self) -> None:
        self.sock.close()


class FakeNode:
    """One server, whatever number of connections it has: requests are taken and answered in one order."""

    def __init__(self, index: int) -> None:
        self.id = f"{index:040x}"
        self.address = Address("node", 7000 + index)
        self.links: list[Link] = []
        self.accepts = True
        self._unanswered: deque[Link] = deque()  # whence each taken request came

    def take(self) -> list[list[bytes]]:
        """The requests that have come, of one connection after the other."""
        found = []
        for link in self.links:
            requests = link.take()
            found += requests
            self._unanswered += [link] * len(requests)
        return found

    def reply(self, *replies: bytes) -> None:
        """Answer the next requests, taken or not."""
        for reply in replies:
            if not self._unanswered:
                self.take()
            self._unanswered.popleft().reply(reply)

    def has_unread(self) -> bool:
        return any(link.has_unread() for link in self.links)

    def lose(self) -> None:
        """Every connection breaks; what was not answered never is."""
        for link in self.links:
            link.close()
        self.links.clear()
        self._unanswered.clear()


@dataclass(frozen=True)
class FakeDialer(Dialer):
    """Connects to fake nodes at once."""

    nodes: tuple[FakeNode, ...] = ()

    async def open(
        self,
        address: Address,
        *,
        resp: int = 2,
        on_closed: Callable[[NodeConnection, str], None] = lambda connection, reason: None,
        on_ready: Callable[[], None] = lambda: None,
        on_push: PushHandler | None = None,
        load: NodeLoad | None = None,
    ) -> NodeConnection:
        await trio.lowlevel.checkpoint()
        node = next((node for node in self.nodes if node.address == address), None)
        if node is None or not node.accepts:
            raise ConnectError(f"{address}: refused")
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        node.links.append(Link(far))
        return NodeConnection(
            self.hub,
            near,
            address,
            unsent_bytes_max=self.unsent_bytes_max,
            on_closed=on_closed,
            on_ready=on_ready,
            on_push=on_push,
            load=load,
        )


class FakeTransport:
    """Takes what a client connection writes. ``room``: bytes that go at once; None means all."""

    def __init__(self) -> None:
        self.written = b""
        self.unsent_bytes = 0
        self.room: int | None = None
        self.is_paused = False
        self.is_closed = False
        self.pauses = 0

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.written += data
        if self.room is not None:
            sent = min(self.room, len(data))
            self.room -= sent
            self.unsent_bytes += len(data) - sent

    def pause(self) -> None:
        self.is_paused = True
        self.pauses += 1

    def resume(self) -> None:
        self.is_paused = False

    def close(self) -> None:
        self.is_closed = True


class Client:
    """A client connection with its transport, and the replies that came so far."""

    def __init__(self, world: World) -> None:
        self.transport = FakeTransport()
        self.connection = ClientConnection(world.server, world.exchange, self.transport, "peer", "local")
        world.server.add(self.connection)
        self._hub = world.hub
        self._read = 0

    def send(self, data: bytes) -> None:
        """Bytes arrive, within one turn."""
        with in_turn(self._hub):
            self.connection.receive(data)

    def drain(self, size: int | None = None) -> None:
        """The client reads: that many unsent bytes, or all, go out."""
        transport = self.transport
        with in_turn(self._hub):
            transport.unsent_bytes -= (
                transport.unsent_bytes if size is None else min(size, transport.unsent_bytes)
            )
            self.connection.on_sent()

    def end(self) -> None:
        """The client shuts down its sending side."""
        with in_turn(self._hub):
            self.connection.on_end()

    def replies(self) -> list[bytes]:
        """The raw replies since the last call; all that was written must be whole replies."""
        found = []
        while self._read < len(self.transport.written):
            end = end_of_reply(self.transport.written, self._read)
            assert end > 0, f"half a reply: {self.transport.written[self._read :]!r}"
            found.append(self.transport.written[self._read : end])
            self._read = end
        return found

    def values(self) -> list[Any]:
        return [decode(reply) for reply in self.replies()]


def idle_snapshots(topology: Topology, nodes: Nodes, private: PrivateConnections) -> Snapshots:
    """For a data plane that has none open."""
    links = Links(nodes, private)
    return Snapshots(SnapshotSettings(), topology, links, MemoryStore(), Abandoned(), "test")


class World:
    """A proxy's data plane in front of fake nodes that share the slots evenly."""

    def __init__(
        self,
        nursery: trio.Nursery,
        node_count: int,
        settings: Settings,
        unsent_bytes_max: int = 64 * 1024 * 1024,
        replicas: int = 0,
    ) -> None:
        self.hub = Hub()
        self.nodes = tuple(FakeNode(index) for index in range(node_count))
        # Of the first primary the first ones, and so on.
        self.replica_nodes = tuple(FakeNode(100 + index) for index in range(node_count * replicas))
        self.replicas_each = replicas
        dialer = FakeDialer(self.hub, "", "", 1.0, unsent_bytes_max, nodes=(*self.nodes, *self.replica_nodes))
        self.topology = Topology()
        self.upstreams = Nodes(dialer, nursery, DEADLINE_SECONDS, loads=Loads(rules_of(settings.overload)))
        nursery.start_soon(self.upstreams.loads.run)
        self.private = PrivateConnections(dialer, 100)
        self.replica_upstreams = Nodes(dialer, nursery, DEADLINE_SECONDS, lanes=(Lane.READ,))
        self.replicas = Replicas(self.replica_upstreams, self.topology, ReplicaOptions(settle_seconds=5.0))
        self.exchange = Exchange(
            self.hub,
            self.upstreams,
            self.topology,
            self.private,
            self.replicas,
            idle_snapshots(self.topology, self.upstreams, self.private),
            nursery,
            request_deadline_seconds=DEADLINE_SECONDS,
            script_cache_bytes_max=1 << 20,
            cache=SnapshotCache(CacheSettings(bytes_max=1 << 26)),
        )
        self.server = Server(settings, self.topology)
        nursery.start_soon(self.server.pacing.run)
        self.clients: list[Client] = []
        share = -(-SLOT_COUNT // node_count)
        self.owners = [slot // share for slot in range(SLOT_COUNT)]
        self.migrations: dict[int, tuple[int, int]] = {}  # slot -> (source, target), as the proxy knows it

    def see(self) -> None:
        """Discovery finds ``owners`` and ``migrations`` as they are now."""
        nodes = [Node(node.id, node.address, Role.PRIMARY) for node in self.nodes]
        seen = TopologyView(
            revision=0,
            epoch=1,
            shards=tuple(Shard(node, self._replicas_of(index)) for index, node in enumerate(nodes)),
            shard_of_slot=tuple(self.owners),
            migrations=tuple(
                Migration((slot,), self.nodes[source].id, self.nodes[target].id, MigrationKind.STEPWISE)
                for slot, (source, target) in sorted(self.migrations.items())
            ),
        )
        self.topology.adopt(seen, trio.current_time())

    def _replicas_of(self, index: int) -> tuple[Node, ...]:
        first = index * self.replicas_each
        return tuple(
            Node(node.id, node.address, Role.REPLICA, self.nodes[index].id)
            for node in self.replica_nodes[first : first + self.replicas_each]
        )

    def client(self) -> Client:
        client = Client(self)
        self.clients.append(client)
        return client

    def upstream(self, index: int, lane: Lane = Lane.WRITE, resp: int = 2) -> NodeConnection:
        """The shared connection to one of ``nodes``."""
        connection = self.upstreams.connection(self.nodes[index].address, resp, lane)
        assert connection is not None
        return connection

    def turn(self) -> None:
        """Turns of the hub until nothing is ready."""
        while self.hub.turn():
            pass

    async def settle(self) -> None:
        """Turns and tasks until all wait for something outside, or for time."""
        for _ in range(3):
            self.turn()
            await trio.testing.wait_all_tasks_blocked()
        self.turn()

    async def connect(self) -> None:
        """Let the keepers connect to all nodes, however long they pause."""
        for _ in range(200):
            await self.settle()
            if all(
                self.upstreams.connection(node.address, 2, lane) is not None
                for node in self.nodes
                for lane in Lane
                if node.accepts
            ) and all(
                self.replica_upstreams.connection(node.address, 2, Lane.READ) is not None
                for node in self.replica_nodes
                if node.accepts
            ):
                return
            await trio.sleep(0.05)
        raise AssertionError("the fake nodes never became connected")

    def close(self) -> None:
        for client in self.clients:
            client.connection.close("end of test")
        for connection in [*self.upstreams.connections(), *self.replica_upstreams.connections()]:
            connection.close("end of test")
        self.private.close_idle()
        for connection in list(self.private._in_use):
            connection.close("end of test")
        for node in (*self.nodes, *self.replica_nodes):
            node.lose()
        self.hub.close()


@asynccontextmanager
async def world_of(
    node_count: int = 3,
    *,
    clients: ClientSettings | None = None,
    settings: Settings | None = None,
    **kwargs: Any,
) -> AsyncIterator[World]:
    """A world whose nodes are connected and whose owners are seen."""
    settings = settings or Settings(clients=clients or ClientSettings())
    async with trio.open_nursery() as nursery:
        world = World(nursery, node_count, settings, **kwargs)
        try:
            world.see()
            await world.connect()
            yield world
        finally:
            nursery.cancel_scope.cancel()
            world.close()


def keys_of(world: World, index: int, count: int = 3) -> list[bytes]:
    """Different keys, in different slots, of one node."""
    from routing.slot import slot_of

    found = (b"key%d" % n for n in range(10_000))
    return [key for key in found if world.owners[slot_of(key)] == index][:count]


def flat(groups: Iterable[Iterable[Any]]) -> list[Any]:
    return [item for group in groups for item in group]
