"""A private connection that carries one client's subscriptions. It always speaks RESP3.

There, confirmations and messages are pushes, apart from replies: a subscription command that succeeds has no
reply at all, and one that fails has an error. So each is sent with a PING behind it, whose PONG ends either.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from proxy.protocol.encode import command, frame
from proxy.upstream.connection import NodeConnection
from proxy.upstream.private import PrivateConnections
from proxy.upstream.reply_slot import ConnectionLostError, Slot
from routing.topology import Address

RESP = 3
PING = command("PING")


class SubscriptionLine:
    """One connection to one node. ``on_push`` and ``on_closed`` are called at once and must not block."""

    __slots__ = ("_connection", "_on_closed", "_on_push", "address", "load")

    def __init__(
        self,
        address: Address,
        on_push: Callable[[SubscriptionLine, bytes], None],
        on_closed: Callable[[SubscriptionLine, str], None],
    ) -> None:
        self.address = address
        self.load = 0  # how many names it carries; the owner counts
        self._on_push = on_push
        self._on_closed = on_closed
        self._connection: NodeConnection | None = None

    async def open(self, private: PrivateConnections) -> None:
        """Connect. Raises ConnectError, also when the node has the most private connections it may have."""
        self._connection = await private.acquire(
            self.address,
            RESP,
            on_push=lambda push: self._on_push(self, push),
            on_closed=lambda connection, reason: self._on_closed(self, reason),
        )

    @property
    def connection(self) -> NodeConnection:
        assert self._connection is not None, "open comes first"
        return self._connection

    async def run(self, *words: bytes) -> bytes | None:
        """Send one subscription command. None once the node did it: what it confirms was pushed before.

        Else its error reply. Raises ConnectionLostError. If cancelled, the command may have run.
        """
        fence = _Fence(frame(words) + PING)
        if self.connection.is_closed:
            fence.on_lost(False, self.connection)
        else:
            self.connection.queue(fence)
        return await fence.wait()

    def close(self) -> None:
        """End the connection, and with it all that it carries. ``on_closed`` is told."""
        self.connection.close("not needed any more")


class _Fence(Slot):
    """Owed for a subscription command and the PING behind it: an error and a PONG, or the PONG alone."""

    __slots__ = ("_done", "_failure", "_lost", "hash_slot", "raw", "requester")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.hash_slot = -1
        self.requester = None
        self._done = trio.Event()
        self._failure: bytes | None = None
        self._lost: ConnectionLostError | None = None

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if reply[0] == 45 and self._failure is None:
            self._failure = reply
            connection.owed.appendleft(self)  # the PONG is still to come
        else:
            self._done.set()

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self._lost = ConnectionLostError(f"{connection.address} closed the connection", sent)
        self._done.set()

    async def wait(self) -> bytes | None:
        await self._done.wait()
        if self._lost is not None:
            raise self._lost
        return self._failure
