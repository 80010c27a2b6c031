"""Asks one primary questions, and before and after them what it owns (routing.slot_listing says what for)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import trio

from proxy.exchange.exchange import Exchange
from proxy.protocol.encode import command
from proxy.protocol.replies import ReplyError, ServerError, decode
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ConnectionLostError, Slot
from routing.cluster_nodes import ReportError, parse_atomic_migrations, parse_nodes
from routing.slot_listing import Testimony, Word
from routing.topology import Address

NODES = command("CLUSTER", "NODES")
JOBS = command("CLUSTER", "GETSLOTMIGRATIONS")

# Whether the engine at the other end has atomic migration. Asked once for each connection, so that engines
# without it do not count an error with each question.
_TELLS_JOBS: WeakKeyDictionary[NodeConnection, bool] = WeakKeyDictionary()


class UnansweredError(Exception):
    """The node gave no testimony; asking again does no harm. The message says why."""


class _Batch:
    """Requests queued in one step on one connection, and their replies."""

    def __init__(self, connection: NodeConnection, raws: Sequence[bytes]) -> None:
        self.replies: list[bytes] = []
        self._missing = len(raws)
        self._lost: ConnectionLostError | None = None
        self._done = trio.Event()
        if connection.is_closed:
            self._lost = ConnectionLostError(f"{connection.address} closed the connection", False)
            self._done.set()
            return
        # As NodeConnection.queue does, but in one send: outside of a turn it would send each by itself.
        connection.owed.extend([_Batched(self, raw) for raw in raws])
        connection.out.extend(raws)
        if not connection.dirty:
            connection.hub.touched(connection)

    def on_reply(self, reply: bytes) -> None:
        self.replies.append(reply)
        self._missing -= 1
        if not self._missing:
            self._done.set()

    def on_lost(self, lost: ConnectionLostError) -> None:
        self._lost = lost
        self._done.set()

    async def wait_replies(self) -> list[bytes]:
        """All replies in order. Raises ConnectionLostError. If cancelled, the requests may run."""
        await self._done.wait()
        if self._lost is not None:
            raise self._lost
        return self.replies


class _Batched(Slot):
    __slots__ = ("_batch", "hash_slot", "raw", "requester")

    def __init__(self, batch: _Batch, raw: bytes) -> None:
        self._batch = batch
        self.raw = raw
        self.hash_slot = -1
        self.requester = None

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        self._batch.on_reply(reply)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self._batch.on_lost(ConnectionLostError(f"{connection.address} closed the connection", sent))


async def testify(
    exchange: Exchange, address: Address, questions: Sequence[bytes]
) -> tuple[Testimony, list[bytes]]:
    """The node's testimony and its raw replies to ``questions`` (request frames that only read).

    Raises UnansweredError. The caller sets the deadline.
    """
    connection = exchange.routes.node(address, 2, Lane.READ)
    if connection is None:
        raise UnansweredError(exchange.nodes.failure(address) or f"{address} takes no requests")
    try:
        words = [NODES, JOBS] if await _tells_jobs(connection) else [NODES]
        replies = await _Batch(connection, [*words, *questions, *words]).wait_replies()
        count = len(words)
        testimony = Testimony(_word(address, *replies[:count]), _word(address, *replies[-count:]))
        return testimony, replies[count:-count]
    except (ConnectionLostError, ReplyError, ReportError) as fault:
        raise UnansweredError(f"{address}: {fault}") from fault


async def _tells_jobs(connection: NodeConnection) -> bool:
    tells = _TELLS_JOBS.get(connection)
    if tells is None:
        reply = await connection.request(JOBS)
        tells = reply[:1] != b"-"
        if not tells and b"unknown subcommand" not in reply.lower():
            raise ReplyError(reply[1:].decode(errors="replace").strip())
        _TELLS_JOBS[connection] = tells
    return tells


def _word(address: Address, nodes: bytes, jobs: bytes = b"*0\r\n") -> Word:
    """Raises ReplyError and ReportError."""
    if nodes[:1] == b"-":
        raise ReplyError(nodes[1:].decode(errors="replace").strip())
    # Its own line is the only one wanted, of maybe a thousand.
    line = next((line for line in nodes.splitlines() if b"myself" in line), b"")
    return _parse_word(address, line, jobs)


@lru_cache(maxsize=256)
def _parse_word(address: Address, line: bytes, jobs: bytes) -> Word:
    """A node says the same words nearly always, and the same object says so fastest."""
    myself, _ = parse_nodes(line.decode(errors="replace"), address)
    decoded: Any = decode(jobs)
    if isinstance(decoded, ServerError):
        raise ReplyError(str(decoded))
    return Word.of(myself, parse_atomic_migrations(decoded))
