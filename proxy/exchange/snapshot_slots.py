"""A client's plain read of one key at a snapshot, and the question for the key's markers behind it."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.exchange.exchange import Exchange
from proxy.exchange.open_requests import OpenRequests, RequestSlot
from proxy.exchange.snapshot_reads import ABSENT, PREIMAGE, stands_for
from proxy.protocol.canonical import canonical
from proxy.protocol.replies import decode, elements
from proxy.protocol.requests import key_of_simple, with_key
from proxy.upstream.connection import NodeConnection
from proxy.upstream.reply_slot import Slot
from routing.command import Command
from routing.redirect import needs_attention
from routing.snapshot import Chain
from routing.snapshot_reads import AS_IS


class SnapshotSlot(RequestSlot):
    """A client's plain read of one key at a snapshot."""

    __slots__ = ("chain", "is_instead", "key", "snapshot_id", "value")
    direct = False

    def __init__(
        self,
        requester: OpenRequests,
        command: Command,
        raw: bytes,
        hash_slot: int,
        key: bytes,
        snapshot_id: int,
    ) -> None:
        self.requester = requester  # not by ``super``: one is made for each read
        self.command = command
        self.raw = raw
        self.hash_slot = hash_slot
        self.reply = None
        self.redirect = None
        self.key = key
        self.snapshot_id = snapshot_id
        self.value = b""  # what was read in place; b"": nothing yet
        self.chain: Chain | None = None  # whose markers were asked
        self.is_instead = False  # what was sent last reads what stands for the key

    def send(self, exchange: Exchange, connection: NodeConnection) -> None:
        """Queue the read and the question behind it, in one step."""
        step = exchange.hub.step
        if connection.guarded_step != step:
            exchange.snapshots.histories.guard(connection, step)
        connection.queue_all((self, MarkerSlot(self, exchange.snapshot_reads.question(self))))

    def keys(self) -> set[bytes]:
        return set()  # a write of the same key may come before or after it: it shows neither

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if not self.is_instead:
            self.value = reply
            return
        self._finish(reply)

    def on_marker(self, reply: bytes, connection: NodeConnection) -> None:
        """The markers were read behind the value."""
        requester = self.requester
        assert isinstance(requester, OpenRequests)
        snapshots = requester.exchange.snapshots
        chain = snapshots.preserver.chain
        if chain is self.chain:
            if _no_marker(reply):
                self._finish(self.value)
                return
            if reply in (PREIMAGE, ABSENT) and connection.ready:  # of the only id that was asked
                instead = stands_for(reply, self.hash_slot, self.snapshot_id, self.key)
                self.is_instead = True
                self.raw = with_key(self.raw, instead)
                snapshots.histories.guard(connection, requester.hub.step)
                connection.queue(self)
                return
        self.wait("its value was being written, or moved")

    def _finish(self, reply: bytes) -> None:
        requester = self.requester
        assert isinstance(requester, OpenRequests)
        snapshots = requester.exchange.snapshots
        if not snapshots.is_usable(self.snapshot_id) or (reply[0] == 45 and needs_attention(reply)):
            self.wait("it was turned away")
            return
        if self.is_instead and reply[0] == 45:
            instead = {self.key: key_of_simple(self.raw)}
            reply = canonical(AS_IS, reply, instead)  # which may name the key
        self.reply = reply
        requester.hub.touched(requester)

    def wait(self, reason: str) -> None:
        """Read it the slow way."""
        requester = self.requester
        assert isinstance(requester, OpenRequests)
        if self.is_instead:
            self.raw = with_key(self.raw, self.key)
            self.is_instead = False
        requester.retry(self, reason)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        if self.is_instead:
            self.wait(f"the connection to {connection.address} ended")

    async def resolve(self, exchange: Exchange, resp: int, deadline: float) -> bytes:
        arguments: list[bytes] = decode(self.raw)
        return await exchange.snapshot_reads.read_at(
            self.snapshot_id, self.command, arguments, resp=resp, deadline=deadline
        )


class MarkerSlot(Slot):
    """The question for the markers of a read, behind it on the same connection."""

    __slots__ = ("hash_slot", "raw", "read", "requester")

    def __init__(self, read: SnapshotSlot, raw: bytes) -> None:
        self.read = read
        self.raw = raw
        self.hash_slot = read.hash_slot
        self.requester = read.requester

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        self.read.on_marker(reply, connection)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self.read.wait(f"the connection to {connection.address} ended")


def _no_marker(reply: bytes) -> bool:
    """Whether the reply to GET or MGET says that there is none."""
    if reply == b"$-1\r\n" or reply == b"_\r\n":
        return True
    return reply[0] == 42 and (
        reply.count(b"\r\n$-1\r\n") + reply.count(b"\r\n_\r\n") > 0 and _all_nil(elements(reply))
    )


def _all_nil(found: Iterable[bytes]) -> bool:
    return all(element in (b"$-1\r\n", b"_\r\n") for element in found)
