"""Connections that one client has for itself, for what cannot share one: blocking commands, WATCH, subscriptions.

An owner acquires one, and releases it when it is clean again or closes it when it is not. Clean ones are kept for
the next, a few for each node.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.upstream.connect import ConnectError, Dialer
from proxy.upstream.connection import NodeConnection, PushHandler
from proxy.upstream.reply_slot import Fence
from routing.topology import Address

IDLE_MAX = 8  # kept for each node and RESP version


class PrivateConnections:
    """See the module's text. ``per_node_max`` bounds those in use on one node."""

    def __init__(self, dialer: Dialer, per_node_max: int) -> None:
        self._dialer = dialer
        self._per_node_max = per_node_max
        self._idle: dict[tuple[Address, int], list[NodeConnection]] = {}
        self._in_use: dict[NodeConnection, int] = {}  # connection -> its RESP version
        self._count_of: dict[Address, int] = {}  # in use, those being opened included
        # In a command that blocks: its hash slot, and the keys that it may write, if any.
        self.blocked: dict[NodeConnection, tuple[int, tuple[bytes, ...]]] = {}

    @property
    def in_use(self) -> int:
        return sum(self._count_of.values())

    def connections_in_use(self) -> list[NodeConnection]:
        return list(self._in_use)

    async def acquire(
        self,
        address: Address,
        resp: int,
        on_push: PushHandler | None = None,
        on_closed: Callable[[NodeConnection, str], None] = lambda connection, reason: None,
    ) -> NodeConnection:
        """A connection of one's own. Raises ConnectError, also when the node has the most it may have.

        ``on_closed`` is told when it ends, and why; only who gives ``on_push`` may ask for that.
        """
        idle = self._idle.get((address, resp))
        while idle and on_push is None:
            connection = idle.pop()
            if not connection.is_closed:
                self._in_use[connection] = resp
                self._count_of[address] = self._count_of.get(address, 0) + 1
                return connection
        if self._count_of.get(address, 0) >= self._per_node_max:
            raise ConnectError(
                f"{address} has {self._per_node_max} private connections in use already"
                " (setting cluster.private_connections_max)"
            )
        self._count_of[address] = self._count_of.get(address, 0) + 1

        def ended(closed: NodeConnection, reason: str) -> None:
            self._forget(closed)
            on_closed(closed, reason)

        try:
            connection = await self._dialer.open(address, resp=resp, on_closed=ended, on_push=on_push)
            connection.only_reads = connection.only_reads or on_push is not None
        except BaseException:
            self._count_of[address] -= 1
            raise
        self._in_use[connection] = resp
        return connection

    def release(self, connection: NodeConnection) -> None:
        """Give a clean connection back: it owes its client nothing, watches nothing, is subscribed to nothing."""
        resp = self._in_use.get(connection)
        if resp is None:
            return
        self._forget(connection)
        idle = self._idle.setdefault((connection.address, resp), [])
        is_owing = any(not isinstance(slot, Fence) for slot in connection.owed)
        if is_owing or connection.is_closed or len(idle) >= IDLE_MAX:
            connection.close("not needed any more")
        else:
            idle.append(connection)

    def discard(self, connection: NodeConnection) -> None:
        """Close a connection that is not clean."""
        connection.close("not needed any more")

    def close_idle(self) -> None:
        """Close all that nobody uses."""
        for idle in self._idle.values():
            for connection in idle:
                connection.close("stopping")
        self._idle.clear()

    def _forget(self, connection: NodeConnection) -> None:
        if self._in_use.pop(connection, None) is not None:
            self._count_of[connection.address] -= 1
