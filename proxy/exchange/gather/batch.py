"""Several requests of the proxy's own to one node, in one pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from proxy.upstream.connection import NodeConnection
from proxy.upstream.reply_slot import ConnectionLostError, Slot


class Batch:
    """Requests queued in one step on one connection, and their replies."""

    def __init__(self, connection: NodeConnection, raws: Sequence[bytes]) -> None:
        self._replies: list[bytes] = []
        self._missing = len(raws)
        self._lost: ConnectionLostError | None = None
        self._done = trio.Event()
        if connection.is_closed:
            self.on_lost(ConnectionLostError(f"{connection.address} closed the connection", False))
            return
        connection.queue_all([_Batched(self, raw) for raw in raws])

    def on_reply(self, reply: bytes) -> None:
        self._replies.append(reply)
        self._missing -= 1
        if not self._missing:
            self._done.set()

    def on_lost(self, lost: ConnectionLostError) -> None:
        self._lost = lost
        self._done.set()

    async def wait_replies(self) -> list[bytes]:
        """All replies in order, error replies included. Raises ConnectionLostError.

        If cancelled, the requests may run.
        """
        await self._done.wait()
        if self._lost is not None:
            raise self._lost
        return self._replies


class _Batched(Slot):
    __slots__ = ("_batch", "hash_slot", "raw", "requester")

    def __init__(self, batch: Batch, raw: bytes) -> None:
        self._batch = batch
        self.raw = raw
        self.hash_slot = -1
        self.requester = None

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        self._batch.on_reply(reply)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self._batch.on_lost(ConnectionLostError(f"{connection.address} closed the connection", sent))
