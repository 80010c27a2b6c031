"""Reads as of a snapshot: the key first, then its markers, then perhaps the pre-image.

The fast way, for plain reads of one key in a slot at rest: the read and the question for its markers go to the slot's
owner in one pipeline (``snapshot_slots``). Everything else, and everything that is not as expected,
goes the slow way (``read_at``), step by step.

Why the value read in place is right when no marker is found: whoever writes the key has set a marker before, for the
newest id of the chain. The markers were asked after the value was read, at the same node or where the slot's keys went,
so no write had come before. The chain that is asked must not be older than the value: so a fast read whose chain has
changed meanwhile is read anew, and a slow one takes the chain when it asks for the markers.

While this proxy alone writes, it knows which keys have no marker, and asks for none (``proxy.snapshots.own_writes``):
such a read costs as much as one of what is there now.

That holds within one history. A primary that fails over may lose a marker, and the write behind it, which was read
before; or a pre-image, and the marker that named it. So all steps of a read are asked of the same history of the slot's
owner, or begun anew; what a migration's other side lost ends the snapshot (``routing.snapshot_floors``).

All of it goes over read lanes, for it changes nothing; a client's snapshot reads may overtake its writes, which they do
not show anyway.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import trio

from proxy.bounded import for_each
from proxy.cache.memory import SnapshotCache
from proxy.exchange.failures import not_ready
from proxy.exchange.snapshot_replicas import SnapshotReplicas
from proxy.protocol.canonical import canonical
from proxy.protocol.encode import array, error, frame, integer
from proxy.protocol.replies import elements
from proxy.snapshots.histories import Histories
from proxy.snapshots.service import Snapshots
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from routing.command import Command
from routing.slot import slot_of
from routing.snapshot import Chain
from routing.snapshot_names import absent, marker, marker_prefix, preimage, preimage_prefix
from routing.snapshot_reads import ReadPlan, plan, rewrite
from routing.topology import Address

if TYPE_CHECKING:
    from proxy.exchange.exchange import Exchange
    from proxy.exchange.snapshot_slots import SnapshotSlot

NIL = {2: b"$-1\r\n", 3: b"_\r\n"}
PREIMAGE, ABSENT, TOO_LARGE = b"$1\r\np\r\n", b"$1\r\na\r\n", b"$1\r\nx\r\n"
# Of one slot: the request for a pre-image and its marker, to be filled with size, key, size, key; and by how much a
# size is larger than the key's.
Pair = tuple[bytes, int]
Asked = list[tuple[Address, bytes]]  # nodes, each with its history, in the order in which they were asked


class MayAsk(Protocol):
    """Whether a connection may be asked now; if so, the guard is queued on it. ``is_asking``: after ASK."""

    def __call__(self, connection: NodeConnection, is_asking: bool = False) -> bool: ...


OWNER_CHANGES = "its owner changes while it is read"
SPLIT = frozenset({"MGET", "EXISTS", "TOUCH"})  # over several slots: key by key


class TooLargeError(Exception):
    """A key was too large to be kept when it was first written after the cut."""


class SnapshotReads:
    """One per proxy."""

    def __init__(self, exchange: Exchange, snapshots: Snapshots, cache: SnapshotCache) -> None:
        self.exchange = exchange
        self.snapshots = snapshots
        self.cache = cache
        snapshots.on_end = cache.end
        self.histories: Histories = snapshots.histories
        self.reads_total = 0  # commands of clients
        self.slow_total = 0  # of them, those that took the slow way
        self.replicas = SnapshotReplicas(exchange.replicas, self.histories, snapshots.settings.read_at)
        self._chain: Chain | None = None
        self._prefixes: dict[
            int, dict[int, tuple[bytes, ...]]
        ] = {}  # id -> hash slot -> of the markers' names
        self._pairs: dict[int, Pair] = {}
        self._pairs_for = 0  # the snapshot
        self._judging: set[NodeConnection] = set()

    # -- the fast way

    def connection_for(self, hash_slot: int, kind: int, snapshot_id: int) -> NodeConnection | None:
        """The owner's read connection, if the slot is at rest there and its history was judged."""
        route = self.exchange.routes.of_slot[hash_slot][kind]
        if (
            isinstance(route, NodeConnection)
            and route.ready
            and self.histories.has_floors_of(snapshot_id, route)
            and not self.histories.is_in_doubt(hash_slot)
            and self.snapshots.is_view_fresh(snapshot_id)
        ):
            return route
        return None

    def question(self, slot: SnapshotSlot) -> bytes:
        """The request for the markers of a read, by the chain as it is now, which the slot notes."""
        slot.chain = self.snapshots.preserver.chain
        prefixes = self.prefixes_of(slot.snapshot_id)
        found = prefixes.get(slot.hash_slot) or self.add_prefixes(slot.snapshot_id, slot.hash_slot)
        key = slot.key
        if len(found) == 1:
            prefix = found[0]
            return b"*2\r\n$3\r\nGET\r\n$%d\r\n%b%b\r\n" % (len(prefix) + len(key), prefix, key)
        return frame([b"MGET", *[prefix + key for prefix in found]])

    def histories_of(self, snapshot_id: int) -> Container[bytes]:
        """The replication histories whose nodes may be read at the snapshot now."""
        floors = self.histories.floors.get(snapshot_id)
        if (
            floors is None
            or self.histories.is_in_doubt(None)
            or not self.snapshots.is_view_fresh(snapshot_id)
        ):
            return ()  # each slot is looked at by itself
        return floors

    def prefixes_of(self, snapshot_id: int) -> dict[int, tuple[bytes, ...]]:
        """Hash slot -> what the names of the markers begin with that a read asks for, by the chain as it is now.

        Those that were not asked for yet are missing: see ``add_prefixes``.
        """
        chain = self.snapshots.preserver.chain
        if chain is not self._chain:
            self._chain = chain
            self._prefixes.clear()
        return self._prefixes.setdefault(snapshot_id, {})

    def add_prefixes(self, snapshot_id: int, hash_slot: int) -> tuple[bytes, ...]:
        """Those of one slot."""
        ids = self.snapshots.preserver.chain.markers_of(snapshot_id)
        found = tuple([marker_prefix(hash_slot, number) for number in ids])
        self._prefixes[snapshot_id][hash_slot] = found
        return found

    def pairs_of(self, snapshot_id: int) -> dict[int, Pair]:
        """Hash slot -> how a pre-image and its marker are asked for. Those that are missing: see ``add_pair``."""
        if snapshot_id != self._pairs_for:
            self._pairs_for = snapshot_id
            self._pairs = {}
        return self._pairs

    def add_pair(self, snapshot_id: int, hash_slot: int) -> Pair:
        """Of one slot."""
        before = marker_prefix(hash_slot, snapshot_id)
        form = b"*3\r\n$4\r\nMGET\r\n$%%d\r\n%b%%b\r\n$%%d\r\n%b%%b\r\n" % (
            preimage_prefix(hash_slot, snapshot_id),
            before,
        )
        found = self.pairs_of(snapshot_id)[hash_slot] = form, len(before)
        return found

    # -- the slow way

    def may_ask(self, snapshot_id: int, asked: Asked | None = None, hash_slot: int | None = None) -> MayAsk:
        """For ``Exchange.execute``: queue the guard in front, on a connection whose history was judged.

        ``asked`` gets who was asked in the last attempt: the slot's owner, then perhaps the node that it named in ASK.
        ``hash_slot``: which it is about; None: all.
        """

        def before(connection: NodeConnection, is_asking: bool = False) -> bool:
            if not self.histories.has_floors_of(snapshot_id, connection):
                self.judge_soon(connection)
                return False
            if self.histories.is_in_doubt(hash_slot) or not self.snapshots.is_view_fresh(snapshot_id):
                return False
            if asked is not None:
                if not is_asking:
                    asked.clear()
                asked.append((connection.address, connection.history))
            self.histories.guard(connection, -1)  # a task's request is a step of its own
            return True

        return before

    def judge_soon(self, connection: NodeConnection) -> None:
        """Have the history behind a connection judged; who waits for that is woken."""
        if connection in self._judging:
            return
        self._judging.add(connection)

        async def work() -> bytes:
            try:
                await self.histories.judge(connection, trio.current_time() + self.exchange.deadline_seconds)
            finally:
                self._judging.discard(connection)
                self.exchange.nodes.wake()
            return b""

        self.exchange.start(work, lambda reply: None, trio.CancelScope())

    async def judged_execute(
        self,
        raw: bytes,
        hash_slot: int,
        snapshot_id: int,
        *,
        resp: int,
        deadline: float,
        asked: Asked | None = None,
        priority: int | None = None,
    ) -> bytes:
        """As ``Exchange.execute`` for a read, of nodes whose history has the snapshot's cut. ``asked``: see may_ask."""
        return await self.exchange.execute(
            raw,
            hash_slot,
            resp=resp,
            repeatable=True,
            deadline=deadline,
            lane=Lane.READ,
            before=self.may_ask(snapshot_id, asked, hash_slot),
            priority=priority,
        )

    async def read_at(
        self,
        snapshot_id: int,
        command: Command,
        arguments: Sequence[bytes],
        *,
        resp: int,
        deadline: float,
        priority: int | None = None,
    ) -> bytes:
        """The reply to one command as of a snapshot; error replies included. ``deadline``: on Trio's clock.

        ``priority``: it waits for a permit wherever a value is read; None: it waits for none.
        """
        planned = plan(command, arguments)
        if isinstance(planned, str):
            return error(planned)
        if (refused := self.snapshots.refusal(snapshot_id)) is not None:
            return refused
        self.slow_total += 1
        try:
            if command.name in SPLIT:
                reply = await self._split(snapshot_id, command, planned, resp, deadline, priority)
            else:
                hash_slots = {slot_of(key) for key in planned.keys}
                if len(hash_slots) > 1:
                    return error("CROSSSLOT Keys in request don't hash to the same slot")
                hash_slot = hash_slots.pop() if hash_slots else 0  # without keys any node will do
                reply = await self._in_slot(snapshot_id, planned, hash_slot, resp, deadline, priority)
        except TooLargeError as too_large:
            return error(f"SNAPSHOTTOOOLD {too_large}")
        if not self.snapshots.is_usable(snapshot_id):
            return self.snapshots.refusal(snapshot_id) or error("NOTREADY the snapshot changed; try again")
        return reply

    async def _in_slot(
        self,
        snapshot_id: int,
        planned: ReadPlan,
        hash_slot: int,
        resp: int,
        deadline: float,
        priority: int | None,
    ) -> bytes:
        """K first, then M; with each key that has a marker replaced, anew, until no other one has."""
        replaced: dict[bytes, bytes] = {}
        owner: Asked = []  # of the steps so far
        attempt = 0
        while True:
            raw = frame(rewrite(planned, replaced))
            asked: Asked = []
            reply = await self.judged_execute(
                raw, hash_slot, snapshot_id, resp=resp, deadline=deadline, asked=asked, priority=priority
            )
            in_place = [key for key in planned.keys if key not in replaced]
            found: Mapping[bytes, bytes] | bytes | None = None
            if not replaced and self.snapshots.own_writes.shows(snapshot_id, in_place):
                found = {}
            elif not replaced or asked[:1] == owner:
                owner = asked[:1]
                found = await self._markers(snapshot_id, hash_slot, in_place, asked, deadline)
            if isinstance(found, bytes):
                return found
            if found is None:
                if trio.current_time() >= deadline:
                    return not_ready(f"slot {hash_slot}", self.exchange.deadline_seconds, OWNER_CHANGES)
                await self.exchange.pause(attempt, deadline)
                attempt += 1
                replaced.clear()
                continue
            if not found:
                return canonical(planned.shape, reply, replaced)
            replaced.update(found)

    async def _markers(
        self, snapshot_id: int, hash_slot: int, keys: Sequence[bytes], asked: Asked, deadline: float
    ) -> Mapping[bytes, bytes] | bytes | None:
        """What stands for each key that has a marker; or an error reply. Raises TooLargeError.

        None: the slot's owner, or its history, is another one than was ``asked`` for the values.
        """
        if not self.snapshots.is_usable(snapshot_id):
            return self.snapshots.refusal(snapshot_id) or error("NOTREADY the snapshot changed; try again")
        chain = self.snapshots.chain.markers_of(snapshot_id)
        replies: dict[tuple[bytes, int], bytes] = {}
        is_same = True

        async def ask(question: tuple[bytes, int]) -> None:
            nonlocal is_same
            key, number = question
            raw = frame([b"GET", marker(hash_slot, number, key)])
            now: Asked = []
            replies[(key, number)] = await self.judged_execute(
                raw, hash_slot, snapshot_id, resp=2, deadline=deadline, asked=now
            )
            is_same &= now[:1] == asked[:1]

        await for_each([(key, number) for key in keys for number in chain], ask)
        if not is_same and not any(reply[0] == 45 for reply in replies.values()):
            return None
        found: dict[bytes, bytes] = {}
        for key in keys:
            for number in chain:
                reply = replies[(key, number)]
                if reply == NIL[2]:
                    continue
                if reply[0] == 45:
                    return reply
                found[key] = stands_for(reply, hash_slot, number, key)
                break
        return found

    async def _split(
        self,
        snapshot_id: int,
        command: Command,
        planned: ReadPlan,
        resp: int,
        deadline: float,
        priority: int | None,
    ) -> bytes:
        name = planned.arguments[0]
        keys = [planned.arguments[position] for position in planned.positions]
        replies: dict[bytes, bytes] = {}
        failures: list[TooLargeError] = []

        async def one(key: bytes) -> None:
            single = ReadPlan((name, key), (1,), planned.shape)
            try:
                replies[key] = await self._in_slot(
                    snapshot_id, single, slot_of(key), resp, deadline, priority
                )
            except TooLargeError as too_large:
                failures.append(too_large)

        await for_each(dict.fromkeys(keys), one)
        if failures:
            raise failures[0]
        if refused := next((reply for reply in replies.values() if reply[0] == 45), None):
            return refused
        if command.name == "MGET":
            return array([elements(replies[key])[0] for key in keys])
        return integer(sum(int(replies[key][1:-2]) for key in keys))


def stands_for(reply: bytes, hash_slot: int, snapshot_id: int, key: bytes) -> bytes:
    """The key to read instead of one whose marker is ``reply``. Raises TooLargeError."""
    if reply == PREIMAGE:
        return preimage(hash_slot, snapshot_id, key)
    if reply == ABSENT:
        return absent(hash_slot)
    if reply == TOO_LARGE:
        raise TooLargeError(
            "the key was too large to be kept when it was first written after the snapshot"
            " (setting snapshots.key_bytes_max)"
        )
    raise AssertionError(f"a marker of an unknown kind: {reply!r}")
