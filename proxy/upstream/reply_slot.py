"""Reply slots: who is owed the next reply of an upstream connection.

Queueing a slot on a connection and appending its bytes is one synchronous step (``NodeConnection.queue``), so the
n-th reply always belongs to the n-th slot. A slot is answered exactly once: by a reply, or by ``on_lost``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import trio

from routing.redirect import needs_attention

if TYPE_CHECKING:
    from proxy.upstream.connection import NodeConnection
    from routing.command import Command
    from routing.redirect import Redirect


class Slot(ABC):
    """One reply that an upstream connection owes."""

    __slots__ = ()
    # Whether the connection's read loop fills the slot, a client's own, in place: always (but for an error that needs
    # attention), with a value that is not empty only (None), or never.
    direct: bool | None = False
    raw: bytes  # exactly the bytes that were queued with the slot
    hash_slot: int  # the slot of its keys, or -1
    requester: Requester | None  # the client whose order the slot is part of, if any

    @abstractmethod
    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        """The reply, a whole frame. Called within a turn; must not block."""

    @abstractmethod
    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        """The connection ended first. ``sent`` is False when the node cannot have received the request."""


class Requester(Protocol):
    """What the layers below know of a client connection."""

    dirty: bool
    is_closed: bool
    priority: int

    def on_attention(self, slot: ReplySlot, reply: bytes, connection: NodeConnection) -> None:
        """``slot`` got an error that the client must not see as it is: a redirection, or a node not ready."""

    def on_lost(self, slot: ReplySlot, sent: bool, connection: NodeConnection) -> None:
        """The connection that owed ``slot`` ended."""

    def hold_until_drained(self) -> None:
        """Send nothing more for this client until all that it has in flight is answered."""

    def flush(self) -> None: ...

    def on_fault(self, error: Exception) -> None: ...


class ReplySlot(Slot):
    """A client's slot for one request: in the client's queue in request order, filled when ``reply`` is set."""

    __slots__ = ("command", "hash_slot", "raw", "redirect", "reply", "requester")
    direct: bool | None = True
    requester: Requester

    def __init__(self, requester: Requester, command: Command, raw: bytes, hash_slot: int) -> None:
        self.requester = requester
        self.command = command
        self.raw = raw
        self.hash_slot = hash_slot
        self.reply: bytes | None = None
        self.redirect: Redirect | None = None  # set while the request waits to be sent again

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if reply[0] == 45 and needs_attention(reply):
            self.requester.on_attention(self, reply, connection)
        else:
            self.reply = reply
            connection.hub.touched(self.requester)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self.requester.on_lost(self, sent, connection)


class Discard(Slot):
    """Owed and dropped, e.g. the +OK of ASKING."""

    __slots__ = ("hash_slot", "raw", "requester")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.hash_slot = -1
        self.requester = None

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        """An error here repeats itself in the reply that follows, which is the one that is looked at."""

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        """The slot that follows is told as well."""


ASKING = b"*1\r\n$6\r\nASKING\r\n"


class ConnectionLostError(Exception):
    """The upstream connection ended before the reply. ``sent`` False: the node cannot have run the request."""

    def __init__(self, message: str, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Waiter(Slot):
    """A slot that a Trio task waits for. Cancelling the task marks nothing: the reply is read and dropped."""

    __slots__ = ("_done", "_lost", "_reply", "hash_slot", "raw", "requester")

    def __init__(self, raw: bytes, hash_slot: int = -1) -> None:
        self.raw = raw
        self.hash_slot = hash_slot
        self.requester = None
        self._done = trio.Event()
        self._reply: bytes | None = None
        self._lost: ConnectionLostError | None = None

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        self._reply = reply
        self._done.set()

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self._lost = ConnectionLostError(f"{connection.address} closed the connection", sent)
        self._done.set()

    async def wait_reply(self) -> bytes:
        """The raw reply, error replies included. Raises ConnectionLostError.

        If cancelled, the command may have run; its reply is discarded.
        """
        await self._done.wait()
        if self._reply is None:
            assert self._lost is not None
            raise self._lost
        return self._reply


class Fence(Waiter):
    """Asked for the place of its answer among others, also on a connection that a client has for itself."""

    __slots__ = ()
