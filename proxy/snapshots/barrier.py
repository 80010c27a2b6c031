"""One cut on this proxy: from the instant at which writes are preserved until all that was sent before is answered.

Making a ``Barrier`` is that instant, one synchronous step. A write whose bytes were queued on a node connection before
it is *pre-cut*: it belongs to the snapshot, and ``drain`` waits for its answer, by a PING behind it on the same
connection. Every other write finds no marker known, and preserves.

Commands that block cannot be waited for. Their keys are preserved instead, after the pre-cut writes of their slot and
before any later write of it, by the slot's gate: a write after the cut that wakes a blocked BLMOVE changes two keys,
of which it preserves only its own. With several proxies that is after all of them have drained: a write that another
one has sent before its cut may wake a blocked command, too, and belongs before what is preserved.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol

import trio

from proxy.protocol.encode import frame
from proxy.snapshots.preserve import Gate, PreserveFailedError, Preserver
from proxy.upstream.connection import NodeConnection
from proxy.upstream.reply_slot import ConnectionLostError, Fence

PING = frame([b"PING"])


class CutFailedError(Exception):
    """The attempt is given up, and may be made anew. The text says why."""


class Writers(Protocol):
    """The connections over which this proxy writes."""

    def shared(self) -> Iterable[NodeConnection]:
        """The write lanes."""
        ...

    def private(self) -> Iterable[NodeConnection]:
        """Those in use by one client each."""
        ...

    @property
    def blocked(self) -> Mapping[NodeConnection, tuple[int, tuple[bytes, ...]]]:
        """Private connections in a command that blocks: its hash slot and the keys that it may write."""
        ...


class Barrier:
    """See the module's text. Used once."""

    def __init__(self, preserver: Preserver, writers: Writers) -> None:
        self._preserver = preserver
        self._owing: list[NodeConnection] = []
        self._blocked = {connection: waiting for connection, waiting in writers.blocked.items() if waiting[1]}
        not_waited_for = set(writers.blocked)
        gates: dict[int, Gate] = {}
        for connection in writers.shared():
            connection.known.clear()
        for connection in [*writers.shared(), *writers.private()]:
            if connection.owed and not connection.only_reads and connection not in not_waited_for:
                self._owing.append(connection)
                for slot in connection.owed:
                    if slot.hash_slot >= 0:
                        gates.setdefault(slot.hash_slot, Gate()).connections.add(connection)
        for slot_number, _ in self._blocked.values():
            gates.setdefault(slot_number, Gate()).has_blocked = True
        self._gates = preserver.gates = gates

    async def drain(self, deadline: float, all_drained: Callable[[], Awaitable[None]] | None = None) -> None:
        """Wait for the answers to all that was sent before the cut.

        Raises CutFailedError, and what ``all_drained`` raises.
        ``deadline``: on Trio's clock. ``all_drained``: returns when other proxies have come as far; asked for only if
        commands block here.
        """
        failures: list[str] = []

        async def one(connection: NodeConnection) -> None:
            if (failure := await self._answered(connection, deadline)) is not None:
                failures.append(failure)
                return
            for slot, gate in list(self._gates.items()):
                gate.connections.discard(connection)
                self._settle(slot, gate)

        try:
            async with trio.open_nursery() as nursery:
                for connection in self._owing:
                    nursery.start_soon(one, connection)
            if failures:
                raise CutFailedError(failures[0])
            if self._blocked:
                if all_drained is not None:
                    await all_drained()
                await self._preserve_blocked(deadline)
        finally:
            self.open_gates()

    def open_gates(self) -> None:
        """Let all writes through: the cut is complete, or given up."""
        for gate in self._gates.values():
            gate.connections.clear()
            gate.has_blocked = False
            gate.opened.set()
        self._gates.clear()

    def _settle(self, slot: int, gate: Gate) -> None:
        if gate.open_if_free():
            self._gates.pop(slot, None)

    async def _answered(self, connection: NodeConnection, deadline: float) -> str | None:
        """None when what the connection owed is answered; else why that cannot be said."""
        try:
            with trio.move_on_at(deadline):
                fence = Fence(PING)
                connection.queue(fence)
                await fence.wait_reply()
                return None
        except ConnectionLostError as lost:
            return f"{lost}, with writes from before the cut unanswered"
        return f"{connection.address} has not answered the writes from before the cut in time"

    async def _preserve_blocked(self, deadline: float) -> None:
        """The pre-cut writes are answered: what blocked commands may write is preserved before their gates open."""

        async def one(slot: int, keys: tuple[bytes, ...]) -> None:
            try:
                refused = await self._preserver.preserve_behind_gate(slot, keys, deadline)
            except PreserveFailedError as failed:
                refused = str(failed)
            if refused is not None:
                failures.append(f"the keys of a blocked command could not be preserved: {refused}")

        failures: list[str] = []
        keys_of: dict[int, tuple[bytes, ...]] = {}
        for slot, keys in self._blocked.values():
            if len(keys) > 1 and self._preserver.ways.is_in_flux(slot):
                # Step by step: were it only on its way to the node at the cut, it could run between two of them.
                raise CutFailedError(f"a command blocks on several keys of slot {slot}, which is moving")
            keys_of[slot] = (*keys_of.get(slot, ()), *keys)
        async with trio.open_nursery() as nursery:
            for slot, keys in keys_of.items():
                nursery.start_soon(one, slot, keys)
        if failures:
            raise CutFailedError(failures[0])
