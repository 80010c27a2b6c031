"""The shared connections: to each node, RESP version and lane one, kept open by a task of its own.

There are two lanes, because a node that pauses writes (for a manual failover, or the hand-over of Valkey's atomic
migration) stops serving a connection at its first write, and with it every read that is queued behind. On the read
lane nothing but reads is queued, so they go on.

A keeper connects, waits until the connection ends, and connects again with a growing pause. Who needs to know
that a connection came or went is told by ``on_change``; who waits for one to come awaits ``wait_change``.

A cluster may have 1,000 primaries, and so 4,000 keepers. They are started a few at a time, and looking after their
connections goes in short steps too, so that the sockets have their turns in between.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum

import trio

from proxy.log import get_logger
from proxy.upstream.connect import ConnectError, Dialer
from proxy.upstream.connection import NodeConnection
from proxy.upstream.load import Loads
from routing.topology import Address

RECONNECT_SECONDS_FIRST = 0.02
RECONNECT_SECONDS_MAX = 1.0
STOPPING = "stopping"  # the reason of a close that is no trouble
WATCH_SECONDS = 0.1  # the beat at which overdue requests are looked for
WATCHED_PER_STEP = 250  # connections: some tenths of a millisecond
STARTED_PER_STEP = 8  # nodes whose keepers begin to connect at once: about a millisecond

log = get_logger(__name__)


class Lane(IntEnum):
    """Which of a node's shared connections."""

    WRITE = 0  # anything
    READ = 1  # only commands that do not write


RESPS = (2, 3)  # the RESP versions that clients speak


Key = tuple[Address, int, Lane]  # a node, a RESP version, a lane


class Nodes:
    """Shared connections by (address, RESP version, lane), in ``lanes``. ``nursery`` runs their keepers."""

    def __init__(
        self,
        dialer: Dialer,
        nursery: trio.Nursery,
        request_deadline_seconds: float,
        lanes: Sequence[Lane] = tuple(Lane),
        loads: Loads | None = None,
    ) -> None:
        self.dialer = dialer
        self.loads = loads or Loads()
        self.on_change: Callable[[Address], None] = lambda address: None  # its connections came or went
        self.connect_failures_total = 0
        self.overdue_total = 0
        self._nursery = nursery
        self._lanes = lanes
        self.deadline_seconds = request_deadline_seconds
        # node -> RESP version -> what ends its keepers; empty until they are started
        self._keepers: dict[Address, dict[int, list[trio.CancelScope]]] = {}
        self._unstarted: deque[tuple[Address, int, list[trio.CancelScope]]] = deque()
        self._connections: dict[Key, NodeConnection] = {}
        self._leaving: dict[Key, NodeConnection] = {}  # of nodes that left the view
        self._failures: defaultdict[Address, dict[Key, str]] = defaultdict(dict)  # why there is none now
        self._changed = trio.Event()

    def connection(self, address: Address, resp: int, lane: Lane) -> NodeConnection | None:
        """The open shared connection, or None while there is none."""
        return self._connections.get((address, resp, lane))

    def failure(self, address: Address) -> str:
        """Why ``address`` has no connection, for error texts; "" when it has one or was not tried."""
        failures = self._failures.get(address)
        return next(iter(failures.values()), "") if failures else ""

    def connections(self) -> Iterable[NodeConnection]:
        return self._connections.values()

    def on_lane(self, lane: Lane) -> list[NodeConnection]:
        """The open ones of one lane, also those to nodes that left the view, which still owe replies."""
        return [
            connection
            for connections in (self._connections, self._leaving)
            for key, connection in connections.items()
            if key[2] is lane
        ]

    def ensure(self, address: Address, resp: int) -> None:
        """Keep connections to this node open from now on."""
        self.ensure_all((address,), resp)

    def ensure_all(self, addresses: Iterable[Address], resp: int) -> None:
        """Keep connections to these nodes open from now on."""
        is_starting = bool(self._unstarted)
        for address in addresses:
            kept = self._keepers.setdefault(address, {})
            if resp not in kept:
                kept[resp] = []
                self._unstarted.append((address, resp, kept[resp]))
        if self._unstarted and not is_starting:
            self._nursery.start_soon(self._start_keepers)

    def retain(self, addresses: Iterable[Address]) -> None:
        """Let go of the connections to all other nodes, once what they owe is answered."""
        for address in set(self._keepers).difference(addresses):
            for scopes in self._keepers.pop(address).values():
                for scope in scopes:
                    scope.cancel()

    async def wait_change(self) -> None:
        """Return when a connection has come or gone, or takes requests again."""
        await self._changed.wait()

    def notify(self, address: Address) -> None:
        """A connection to this node came or went."""
        self.on_change(address)
        self.wake()

    def wake(self) -> None:
        """Let who waits look again: something changed that may let a request through."""
        self._changed.set()
        self._changed = trio.Event()

    async def watch(self) -> None:
        """Close connections that owe a reply for longer than the deadline. Runs until cancelled.

        When this process itself stood still, replies may wait unread: that time is not held against the nodes.
        """
        due = trio.current_time() + WATCH_SECONDS
        while True:
            await trio.sleep_until(due)
            stood_still = max(0.0, trio.current_time() - due)
            due = trio.current_time() + WATCH_SECONDS
            connections = list(self.connections())
            for first in range(0, len(connections), WATCHED_PER_STEP):
                now = trio.current_time()
                for connection in connections[first : first + WATCHED_PER_STEP]:
                    if not connection.is_closed and connection.overdue(
                        now, self.deadline_seconds + stood_still
                    ):
                        self.overdue_total += 1
                        connection.close(f"no reply within {self.deadline_seconds:g} s")
                await trio.lowlevel.checkpoint()

    async def _start_keepers(self) -> None:
        """Start those that are due. What is in ``_unstarted`` has this task to see to it."""
        while self._unstarted:
            for _ in range(min(len(self._unstarted), STARTED_PER_STEP)):
                address, resp, scopes = self._unstarted.popleft()
                if self._keepers.get(address, {}).get(resp) is not scopes:
                    continue  # not wanted any more
                for lane in self._lanes:
                    scope = trio.CancelScope()
                    scopes.append(scope)
                    self._nursery.start_soon(self._keep, (address, resp, lane), scope)
            if self._unstarted:
                await trio.lowlevel.checkpoint()

    async def _keep(self, key: Key, scope: trio.CancelScope) -> None:
        address, resp, lane = key
        pause = RECONNECT_SECONDS_FIRST
        connection: NodeConnection | None = None
        with scope:
            while True:
                ended = trio.Event()

                def on_closed(closed: NodeConnection, reason: str, ended: trio.Event = ended) -> None:
                    report = log.info if reason == STOPPING else log.warning
                    report(
                        "node_disconnected", node=address, resp=resp, lane=lane.name.lower(), reason=reason
                    )
                    if self._connections.get(key) is closed:
                        del self._connections[key]
                        self._failures[address][key] = reason
                    ended.set()
                    self.notify(address)

                try:
                    connection = await self.dialer.open(
                        address,
                        resp=resp,
                        on_closed=on_closed,
                        on_ready=self.wake,
                        load=self.loads.of(address),
                    )
                except ConnectError as error:
                    self.connect_failures_total += 1
                    if self._failures[address].get(key) != str(error):
                        log.warning(
                            "node_unreachable",
                            node=address,
                            resp=resp,
                            lane=lane.name.lower(),
                            error=str(error),
                        )
                    self._failures[address][key] = str(error)
                    await trio.sleep(pause * (0.5 + random.random() / 2))
                    pause = min(pause * 2, RECONNECT_SECONDS_MAX)
                    continue
                pause = RECONNECT_SECONDS_FIRST
                connection.only_reads = lane is Lane.READ
                self._connections[key] = connection
                self._forget_failure(key)
                log.info("node_connected", node=address, resp=resp, lane=lane.name.lower())
                self.notify(address)
                await ended.wait()
                await trio.sleep(pause)
        # No longer wanted: the node left the view. What it still owes gets its deadline, then the end.
        self._forget_failure(key)
        self.loads.forget(address)
        if connection is not None and not connection.is_closed:
            if self._connections.get(key) is connection:
                del self._connections[key]
                self.notify(address)  # a node that returned before this took it up again
            self._leaving[key] = connection
            try:
                with trio.move_on_after(self.deadline_seconds):
                    while connection.owed:
                        await trio.sleep(WATCH_SECONDS)
            finally:
                connection.close("the node left the cluster")
                if self._leaving.get(key) is connection:
                    del self._leaving[key]

    def _forget_failure(self, key: Key) -> None:
        failures = self._failures[key[0]]
        failures.pop(key, None)
        if not failures:
            del self._failures[key[0]]
