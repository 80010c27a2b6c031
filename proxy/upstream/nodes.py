"""The shared connections: to each node, RESP version and lane one, kept open by a task of its own.

There are two lanes, because a node that pauses writes (for a manual failover, or the hand-over of Valkey's atomic
migration) stops serving a connection at its first write, and with it every read that is queued behind. On the read
lane nothing but reads is queued, so they go on.

A keeper connects, waits until the connection ends, and connects again with a growing pause. Who needs to know
that a connection came or went is told by ``on_change``; who waits for one to come awaits ``changed``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from enum import IntEnum

import trio

from proxy.log import get_logger
from proxy.upstream.connect import ConnectError, Dialer
from proxy.upstream.connection import NodeConnection
from routing.topology import Address

RECONNECT_SECONDS_FIRST = 0.02
RECONNECT_SECONDS_MAX = 1.0
STOPPING = "stopping"  # the reason of a close that is no trouble
WATCH_SECONDS = 0.1  # the beat at which overdue requests are looked for

log = get_logger(__name__)


class Lane(IntEnum):
    """Which of a node's shared connections."""

    WRITE = 0  # anything
    READ = 1  # only commands that do not write


Key = tuple[Address, int, Lane]  # a node, a RESP version, a lane


class Nodes:
    """Shared connections by (address, RESP version, lane). ``nursery`` runs the keepers."""

    def __init__(self, dialer: Dialer, nursery: trio.Nursery, request_deadline_seconds: float) -> None:
        self.dialer = dialer
        self.on_change: Callable[[], None] = lambda: None
        self.connect_failures_total = 0
        self.overdue_total = 0
        self._nursery = nursery
        self._deadline_seconds = request_deadline_seconds
        self._keepers: dict[Key, trio.CancelScope] = {}
        self._connections: dict[Key, NodeConnection] = {}
        self._failures: dict[Key, str] = {}  # why there is no connection now
        self._changed = trio.Event()

    def connection(self, address: Address, resp: int, lane: Lane) -> NodeConnection | None:
        """The open shared connection, or None while there is none."""
        return self._connections.get((address, resp, lane))

    def failure(self, address: Address) -> str:
        """Why ``address`` has no connection, for error texts; "" when it has one or was not tried."""
        return next((text for key, text in self._failures.items() if key[0] == address), "")

    def connections(self) -> Iterable[NodeConnection]:
        return self._connections.values()

    def ensure(self, address: Address, resp: int) -> None:
        """Keep connections to this node open from now on."""
        for lane in Lane:
            key = (address, resp, lane)
            if key not in self._keepers:
                scope = self._keepers[key] = trio.CancelScope()
                self._nursery.start_soon(self._keep, key, scope)

    def retain(self, addresses: Iterable[Address]) -> None:
        """Let go of the connections to all other nodes, once what they owe is answered."""
        wanted = set(addresses)
        for key, scope in list(self._keepers.items()):
            if key[0] not in wanted:
                del self._keepers[key]
                scope.cancel()

    async def wait_change(self) -> None:
        """Return when a connection has come or gone, or takes requests again."""
        await self._changed.wait()

    def notify(self) -> None:
        """A connection came or went, or takes requests again."""
        self.on_change()
        self.wake()

    def wake(self) -> None:
        """Let who waits look again: something changed that may let a request through."""
        self._changed.set()
        self._changed = trio.Event()

    async def watch(self) -> None:
        """Close connections that owe a reply for longer than the request deadline. Runs until cancelled."""
        while True:
            await trio.sleep(WATCH_SECONDS)
            now = trio.current_time()
            for connection in list(self._connections.values()):
                if connection.overdue(now, self._deadline_seconds):
                    self.overdue_total += 1
                    connection.close(f"no reply within {self._deadline_seconds:g} s")

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
                    self._failures[key] = reason
                    ended.set()
                    self.notify()

                try:
                    connection = await self.dialer.open(
                        address, resp=resp, on_closed=on_closed, on_ready=self.notify
                    )
                except ConnectError as error:
                    self.connect_failures_total += 1
                    if self._failures.get(key) != str(error):
                        log.warning(
                            "node_unreachable",
                            node=address,
                            resp=resp,
                            lane=lane.name.lower(),
                            error=str(error),
                        )
                    self._failures[key] = str(error)
                    await trio.sleep(pause * (0.5 + random.random() / 2))
                    pause = min(pause * 2, RECONNECT_SECONDS_MAX)
                    continue
                pause = RECONNECT_SECONDS_FIRST
                self._connections[key] = connection
                self._failures.pop(key, None)
                log.info("node_connected", node=address, resp=resp, lane=lane.name.lower())
                self.notify()
                await ended.wait()
                await trio.sleep(pause)
        # No longer wanted: the node left the view. What it still owes gets its deadline, then the end.
        self._failures.pop(key, None)
        if connection is not None and not connection.is_closed:
            if self._connections.get(key) is connection:
                del self._connections[key]
            try:
                with trio.move_on_after(self._deadline_seconds):
                    while connection.owed:
                        await trio.sleep(WATCH_SECONDS)
            finally:
                connection.close("the node left the cluster")
