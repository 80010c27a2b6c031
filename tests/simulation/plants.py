"""Planted faults: each changes the proxy's protocol in one place, as a mistake would. The histories must find each.

Nothing of this is in the product: what is changed is put back after the history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.open_requests import OpenRequests
from proxy.exchange.snapshot_reads import NIL, SnapshotReads, stands_for
from proxy.protocol.canonical import canonical
from proxy.protocol.encode import frame
from proxy.snapshots import histories, service
from proxy.snapshots.abandoned import Strangers
from proxy.snapshots.histories import Histories
from proxy.snapshots.own_writes import OwnWrites
from proxy.snapshots.preserve import Preserver
from proxy.snapshots.service import Snapshots
from proxy.upstream.abandoned import Abandoned
from proxy.upstream.connection import NodeConnection
from routing.snapshot_floors import Proven, retaken
from routing.snapshot_names import marker
from routing.snapshot_reads import rewrite
from routing.topology import Address

PLANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {}


def plant(name: str) -> Callable[[Callable[[], Iterator[None]]], Callable[[], Iterator[None]]]:
    def register(make: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
        PLANTS[name] = contextmanager(make)
        return make

    return register


@plant("a lost write repeated")
def _a_lost_write_repeated() -> Iterator[None]:
    real = OpenRequests.on_lost

    def on_lost(self: Any, slot: Any, sent: bool, connection: Any) -> None:
        real(self, slot, False, connection)

    with patch.object(OpenRequests, "on_lost", on_lost):
        yield


@plant("marker set after the write")
def _marker_set_after_the_write() -> Iterator[None]:
    real = Preserver._at_owner

    async def at_owner(
        self: Any, connection: Any, slot: int, keys: list[bytes], resp: int, deadline: float
    ) -> None:
        async def work() -> bytes:
            await trio.sleep(0.0005)
            await real(self, connection, slot, keys, resp, deadline)
            return b""

        self._remember(connection, keys)
        self.ways.start(work, lambda reply: None, trio.CancelScope())

    with patch.object(Preserver, "_at_owner", at_owner):
        yield


@plant("pre-image with REPLACE")
def _pre_image_with_replace() -> Iterator[None]:
    """In a split slot; and without the second look for a marker before it, behind which REPLACE does no harm."""
    real = Exchange.execute
    dumped: set[Any] = set()  # tasks that have the value, and look next

    async def execute(self: Any, raw: bytes, hash_slot: int, **rest: Any) -> bytes:
        task = trio.lowlevel.current_task()
        if raw.startswith(b"*4\r\n$7\r\nRESTORE\r\n"):
            raw = b"*5" + raw[2:] + b"$7\r\nREPLACE\r\n"
        elif raw.startswith(b"*2\r\n$4\r\nDUMP\r\n"):
            dumped.add(task)
        elif task in dumped:
            dumped.discard(task)
            return NIL[2]
        return await real(self, raw, hash_slot, **rest)

    with patch.object(Exchange, "execute", execute):
        yield


@plant("no cache reset on failover")
def _no_cache_reset_on_failover() -> Iterator[None]:
    """What is known to be preserved outlives the connection and the history that it was true of."""
    known_at: dict[tuple[int, Address], set[bytes]] = {}
    real = NodeConnection.__init__

    def init(self: Any, hub: Any, sock: Any, address: Address, **rest: Any) -> None:
        real(self, hub, sock, address, **rest)
        self.known = known_at.setdefault((id(hub), address), set())

    with (
        patch.object(NodeConnection, "__init__", init),
        patch.object(Histories, "_forget_known", lambda self, address: False),
    ):
        yield


@plant("M read before K")
def _m_read_before_k() -> Iterator[None]:
    """On the slow way: the markers first, then the key."""

    async def in_slot(
        self: Any, snapshot_id: int, planned: Any, hash_slot: int, resp: int, deadline: float
    ) -> bytes:
        async def ask(raw: bytes, resp: int) -> bytes:
            reply: bytes = await self.judged_execute(
                raw, hash_slot, snapshot_id, resp=resp, deadline=deadline, asked=[]
            )
            return reply

        replaced: dict[bytes, bytes] = {}
        for key in planned.keys:
            for number in self.snapshots.chain.markers_of(snapshot_id):
                reply = await ask(frame([b"GET", marker(hash_slot, number, key)]), 2)
                if reply[:1] == b"-":
                    return reply
                if reply != NIL[2]:
                    replaced[key] = stands_for(reply, hash_slot, number, key)
                    break
        return canonical(planned.shape, await ask(frame(rewrite(planned, replaced)), resp), replaced)

    with patch.object(SnapshotReads, "_in_slot", in_slot):
        yield


@plant("recovery after the first write")
def _recovery_after_the_first_write() -> Iterator[None]:
    recover, run = Snapshots.recover, Snapshots.run

    async def recover_later(self: Any, seconds: float) -> None:
        await trio.lowlevel.checkpoint()

    async def run_late(self: Any) -> None:
        await trio.sleep(0.05)
        await recover(self, 1.0)
        await run(self)

    with patch.object(Snapshots, "recover", recover_later), patch.object(Snapshots, "run", run_late):
        yield


@plant("an abandoned connection not killed")
def _an_abandoned_connection_not_killed() -> Iterator[None]:
    async def kill_no_abandoned(abandoned: Abandoned, *rest: Any) -> list[str]:
        for entry in abandoned.pending():
            abandoned.remove(entry)
        return []

    async def kill_no_strangers(*rest: Any) -> Strangers:
        return Strangers()

    with (
        patch.object(service, "kill_abandoned", kill_no_abandoned),
        patch.object(service, "kill_strangers", kill_no_strangers),
    ):
        yield


@plant("a failover floor ignored")
def _a_failover_floor_ignored() -> Iterator[None]:
    def judge(floors: Any, sample: Any, slots: Any, config_epoch: int, *, is_importing: bool) -> Proven:
        return Proven(floors.get(sample.point.replid) or retaken(sample, slots, config_epoch))

    with patch.object(histories, "judge", judge):
        yield


@plant("a retried write that does not preserve")
def _a_retried_write_that_does_not_preserve() -> Iterator[None]:
    real = Exchange.execute

    async def execute(self: Any, raw: bytes, hash_slot: int, *, writes: Any = (), **rest: Any) -> bytes:
        return await real(self, raw, hash_slot, **rest)

    with patch.object(Exchange, "execute", execute):
        yield


@plant("what another proxy writes is taken for known")
def _what_another_proxy_writes_is_taken_for_known() -> Iterator[None]:
    with patch.object(OwnWrites, "end", lambda self: None):
        yield


@plant("a pre-image taken for kept in every history")
def _a_pre_image_taken_for_kept_in_every_history() -> Iterator[None]:
    class Every(bytes):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = bytes.__hash__

    kept = OwnWrites.kept

    def kept_everywhere(self: Any, snapshot_id: int, preimages: Any, history: bytes) -> None:
        kept(self, snapshot_id, preimages, Every(history))

    with patch.object(OwnWrites, "kept", kept_everywhere):
        yield
