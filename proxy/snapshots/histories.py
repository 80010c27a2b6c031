"""Which nodes may be believed about which snapshots: the floors, and what was judged of each connection.

A primary is asked for its replication history (INFO replication) once a second while a snapshot's data is kept,
whenever the view changes, and on each connection before the first snapshot read of a turn. ``routing.snapshot_floors``
judges the answers; what is not proven ends the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple, Protocol

import trio

from proxy.log import get_logger
from proxy.protocol.encode import frame
from proxy.topology.service import Topology
from proxy.upstream.connection import NodeConnection
from proxy.upstream.reply_slot import ConnectionLostError, Slot
from routing.offsets import Point, Sample, SampleError, parse_sample
from routing.snapshot import Floor
from routing.snapshot_floors import Proven, ShardFloor, judge, retaken
from routing.topology import UNOWNED, Address, Node, Shard, TopologyView

INFO_REPLICATION = frame([b"INFO", b"replication"])
INTERVAL_SECONDS = 1.0
INTERVAL_SECONDS_MIN = 0.02  # while slots move, each step in a split slot asks for a look
LOOK_CHECK_SECONDS = 0.01
DOUBT_SECONDS = 5.0  # in which a former owner of slots must show that it had their data
ANSWER_SECONDS = 2.0
ROLE_PRIMARY = b"role:master\r\n"

log = get_logger(__name__)


class Connections(Protocol):
    """The shared connections of this proxy to a node."""

    def writing_to(self, address: Address) -> Iterable[NodeConnection]: ...

    def asking(self, address: Address) -> NodeConnection | None:
        """One over which its history may be asked for; None while there is none."""
        ...


class HistoryGuard(Slot):
    """Asks for the history in front of reads: another one than was judged ends the connection, and them with it."""

    __slots__ = ("hash_slot", "raw", "requester")

    def __init__(self) -> None:
        self.raw = INFO_REPLICATION
        self.hash_slot = -1
        self.requester = None

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        at = reply.find(b"\nmaster_replid:") + 15
        if reply[at : at + 40] != connection.history or reply.find(ROLE_PRIMARY) < 0:
            connection.close("its replication history is not the one that was judged")

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        """So are the reads behind it, and they are told."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a view says of one primary."""

    node: Node
    slots: frozenset[int]
    is_importing: bool

    @staticmethod
    def of(view: TopologyView, address: Address) -> Standing | None:
        """None if no primary of the view listens there."""
        for index, shard in enumerate(view.shards):
            if shard.primary.address == address:
                slots = frozenset(
                    slot for first, last in view.slot_ranges_of(index) for slot in range(first, last + 1)
                )
                is_importing = any(migration.target_id == shard.primary.id for migration in view.migrations)
                return Standing(shard.primary, slots, is_importing)
        return None


class Asking(NamedTuple):
    """When a node was asked (Trio time), and what the view said of it then."""

    at: float
    standing: Standing | None


class Doubt(NamedTuple):
    """About a slot that came from another shard."""

    source: Address
    since: float  # Trio time


class Unseen(NamedTuple):
    """Of one snapshot."""

    histories: set[bytes]
    since: float  # Trio time


class Histories:
    """See the module's text. ``on_unproven(ids, reason)`` is called, synchronously, for snapshots that end by it."""

    def __init__(
        self,
        topology: Topology,
        connections: Connections,
        on_unproven: Callable[[Iterable[int], str], None],
        on_floors: Callable[[], None],
    ) -> None:
        self.floors: dict[int, dict[bytes, ShardFloor]] = {}  # snapshot id -> replication id -> its floor
        self._topology = topology
        self._connections = connections
        self._on_unproven = on_unproven
        self._on_floors = on_floors  # a new history has floors: the record should have them, too
        self._history_of: dict[Address, bytes] = {}  # of each primary, as it last said
        # Slots that came from another shard, and whose they were, until that node has shown that it had its data until
        # then: one that restarted empty, and was drained before anybody looked, would hand its emptiness on.
        self.in_doubt: dict[int, Doubt] = {}
        # Histories of nodes that owned nothing when they were first seen, and when that was (Trio time): they say
        # nothing of what a node may have had, and handed on, before.
        self._blank_since: dict[bytes, float] = {}
        # Snapshots known from their records: which histories of the cut were not seen yet, since when (Trio time).
        # What their nodes had may have moved while nobody watched, and been lost before that.
        self._unseen: dict[int, Unseen] = {}
        self._begun_at = 0.0  # Trio time at which a snapshot's floors were added last
        self._judged_at: dict[
            Address, float
        ] = {}  # Trio time at which each was asked for what was judged last
        self._wanted = trio.Event()
        topology.subscribe(self._on_view)

    # -- floors

    def begin(self, snapshot_id: int, floors: Mapping[bytes, ShardFloor]) -> None:
        """A snapshot serves from now on: cut here with these floors, or known from its record."""
        self.floors[snapshot_id] = dict(floors)
        if any(floor.slots is None for floor in floors.values()):
            self._unseen[snapshot_id] = Unseen({*floors}, trio.current_time())
        self._begun_at = trio.current_time()
        self._wanted.set()

    def end(self, snapshot_id: int) -> None:
        self.floors.pop(snapshot_id, None)
        self._unseen.pop(snapshot_id, None)
        if not self.floors:
            self._history_of.clear()
            self._judged_at.clear()
            self.in_doubt.clear()
            self._blank_since.clear()

    def recorded(self, snapshot_id: int) -> dict[str, Floor]:
        """For the snapshot's record."""
        return {
            replid.decode(): Floor(replid.decode(), floor.point.offset)
            for replid, floor in self.floors[snapshot_id].items()
        }

    def mark_unsettled(self, hash_slot: int) -> None:
        """A pre-image was stored in a slot that is split, maybe on another node than the key's next write."""
        view = self._topology.view
        targets = {migration.target_id for migration in view.migrations if hash_slot in migration.slots}
        for shard in view.shards:
            if not targets or shard.primary.id in targets:
                standing = Standing.of(view, shard.primary.address)
                if standing is not None:
                    self._see(replace(standing, is_importing=True), [])
        self._wanted.set()

    def is_in_doubt(self, hash_slot: int | None) -> bool:
        """Whether it is not known that the slot came here with its data; None: any slot. It is looked into at once."""
        if not self._unseen and (
            not self.in_doubt or (hash_slot is not None and hash_slot not in self.in_doubt)
        ):
            return False
        self._wanted.set()
        return True

    def has_floors_of(self, snapshot_id: int, connection: NodeConnection) -> bool:
        """Whether the history that was judged on this connection is one of the snapshot's."""
        floors = self.floors.get(snapshot_id)
        return floors is not None and connection.history in floors

    def history_at(self, address: Address) -> bytes:
        """What the primary there last said; b"" if it said nothing lately."""
        return self._history_of.get(address, b"")

    # -- judging

    def guard(self, connection: NodeConnection, step: int) -> None:
        """Queue the question in front of what is queued next, once in each of the hub's steps; -1: in any case."""
        if connection.guarded_step != step or step < 0:
            connection.guarded_step = step
            connection.queue(HistoryGuard())

    async def judge(self, connection: NodeConnection, deadline: float) -> bool:
        """Ask on this very connection; whether it may be read at all snapshots that go on from here."""
        asked = Asking(trio.current_time(), Standing.of(self._topology.view, connection.address))
        sample = await self._sample(connection, deadline)
        if sample is None or not await self._take(connection.address, sample, asked, deadline):
            return False
        connection.history = sample.point.replid
        return True

    async def sample_all(self, addresses: Iterable[Address], deadline: float) -> dict[Address, Sample]:
        """What these nodes say now; those that do not answer, or are no primaries, are missing."""
        found: dict[Address, Sample] = {}

        async def one(address: Address) -> None:
            connection = self._connections.asking(address)
            if connection is not None:
                sample = await self._sample(connection, deadline)
                if sample is not None and sample.is_primary:
                    found[address] = sample

        async with trio.open_nursery() as nursery:
            for address in addresses:
                nursery.start_soon(one, address)
        return found

    async def run(self) -> None:
        """Look after the histories while there are floors."""
        while True:
            if self.floors:
                await self._look()
                await trio.sleep(INTERVAL_SECONDS_MIN)
                with trio.move_on_after(INTERVAL_SECONDS):
                    await self._wanted.wait()
            else:
                await self._wanted.wait()
            self._wanted = trio.Event()

    async def _look(self) -> None:
        deadline = trio.current_time() + ANSWER_SECONDS

        async def one(address: Address) -> None:
            connection = self._connections.asking(address)
            if connection is not None:
                asked = Asking(trio.current_time(), Standing.of(self._topology.view, address))
                sample = await self._sample(connection, deadline)
                if sample is not None:
                    await self._take(address, sample, asked, deadline)

        former = {doubt.source for doubt in self.in_doubt.values()}
        async with trio.open_nursery() as nursery:
            for address in {*former, *(shard.primary.address for shard in self._topology.view.shards)}:
                nursery.start_soon(one, address)
        for snapshot_id, unseen in list(self._unseen.items()):
            if trio.current_time() - unseen.since > DOUBT_SECONDS:
                self._on_unproven(
                    [snapshot_id],
                    "a node that was there at the cut does not show its data, which may have moved on",
                )
        oldest = min((doubt.since for doubt in self.in_doubt.values()), default=trio.current_time())
        if trio.current_time() - oldest > DOUBT_SECONDS:
            sources = ", ".join(sorted({str(doubt.source) for doubt in self.in_doubt.values()}))
            self._on_unproven(
                list(self.floors), f"slots came from {sources}, which cannot show that it had their data"
            )

    async def _sample(self, connection: NodeConnection, deadline: float) -> Sample | None:
        try:
            with trio.move_on_at(deadline):
                return parse_sample(await connection.request(INFO_REPLICATION))
        except (ConnectionLostError, SampleError) as error:
            log.debug("history_not_told", node=connection.address, error=str(error))
        return None

    async def _take(self, address: Address, sample: Sample, asked: Asking, deadline: float) -> bool:
        """Judge what a node said for all snapshots; those for which it is not proven end. False: it cannot be told."""
        if not sample.is_primary:
            self._forget_known(address)
            self._history_of.pop(address, None)
            return False
        if asked.at < max(self._begun_at, self._judged_at.get(address, 0.0)):
            return False  # something newer was judged, or a floor was taken since
        history = sample.point.replid
        for snapshot_id, unseen in list(self._unseen.items()):
            unseen.histories.discard(history)
            if not unseen.histories:
                del self._unseen[snapshot_id]
        if self.floors and all(history in floors for floors in self.floors.values()):
            self._clear_doubts(address, history, asked.at)
        before = self._history_of.get(address)
        if before is not None and before != history and self._forget_known(address):
            self._on_unproven(
                list(self.floors), f"{address} changed its history while writes counted on what it had"
            )
        self._history_of[address] = history
        if any(history not in floors for floors in list(self.floors.values())):
            began = trio.current_time()
            with trio.move_on_at(deadline):  # the view must be no older than the promotion
                while self._topology.looked_at < began:
                    self._topology.refresh_soon()
                    await trio.sleep(LOOK_CHECK_SECONDS)
            if self._topology.looked_at < began:
                return False
        standing = Standing.of(self._topology.view, address)
        if standing is None:
            return False
        # A floor may be taken anew only from what was said after the slots were seen to be there.
        self._judged_at[address] = asked.at
        if not standing.slots and not any(history in floors for floors in self.floors.values()):
            self._blank_since.setdefault(history, asked.at)
        self._judge_all(address, sample, standing, may_retake=standing == asked.standing)
        return True

    def _judge_all(self, address: Address, sample: Sample, standing: Standing, *, may_retake: bool) -> None:
        history, epoch = sample.point.replid, standing.node.config_epoch
        is_changed = False
        for snapshot_id, floors in list(self.floors.items()):
            verdict = judge(floors, sample, standing.slots, epoch, is_importing=standing.is_importing)
            if not isinstance(verdict, Proven):
                self._on_unproven([snapshot_id], f"{address} cannot prove to have its data: {verdict.reason}")
                continue
            is_new = history not in floors
            # Views that came before this history was known have not been held against it.
            floor = verdict.floor.seen(standing.slots, epoch, is_importing=standing.is_importing)
            is_usable = floor.is_settled and floor.slots is not None
            if not is_usable and may_retake and not standing.is_importing:
                floor = retaken(sample, standing.slots, epoch)
            floors[history] = floor
            if is_new:
                # Of the primary that failed over: nobody need look for it.
                floors.pop(sample.second.replid, None)
            is_changed |= is_new
        if is_changed:
            self._on_floors()

    # -- what happens meanwhile

    def _on_view(self, old: TopologyView, new: TopologyView) -> None:
        if not self.floors:
            return
        self._note_moves(old, new)
        standings = [Standing.of(new, address) for address in self._history_of]
        for standing in standings:
            if standing is not None:
                self._see(
                    standing, [other for other in standings if other is not None and other is not standing]
                )
        self._wanted.set()

    def _note_moves(self, old: TopologyView, new: TopologyView) -> None:
        """Slots that went to another shard; a replica that took its shard over is judged by its own history."""
        now = trio.current_time()
        pairs = set(zip(old.shard_of_slot, new.shard_of_slot, strict=True))
        went = {
            (before, after)
            for before, after in pairs
            if before != UNOWNED
            and after != UNOWNED
            and not _is_same_shard(old.shards[before], new.shards[after])
        }
        if not went:
            return
        for slot, pair in enumerate(zip(old.shard_of_slot, new.shard_of_slot, strict=True)):
            if pair in went:
                self.in_doubt[slot] = Doubt(old.shards[pair[0]].primary.address, now)

    def _clear_doubts(self, address: Address, history: bytes, asked_at: float) -> None:
        """A node was asked then, and has the history that it had."""
        blank_since = self._blank_since.get(history, -inf)
        cleared = [
            slot
            for slot, doubt in self.in_doubt.items()
            if doubt.source == address and blank_since < doubt.since <= asked_at
        ]
        for slot in cleared:
            del self.in_doubt[slot]

    def _see(self, standing: Standing, others: Iterable[Standing]) -> None:
        """Note what a primary has. ``others``: primaries whose histories are known, too.

        Slots have left its shard only when one of those has them: a failing primary seems to have none, until the
        replica that took them over is judged.
        """
        history = self._history_of.get(standing.node.address)
        if history is None:
            return
        elsewhere = frozenset().union(*(other.slots for other in others))
        for floors in self.floors.values():
            if (floor := floors.get(history)) is not None:
                slots = standing.slots | ((floor.slots or frozenset()) - elsewhere)
                floors[history] = floor.seen(
                    slots, standing.node.config_epoch, is_importing=standing.is_importing
                )

    def _forget_known(self, address: Address) -> bool:
        """Whether writes counted on something."""
        found = False
        for connection in self._connections.writing_to(address):
            found |= bool(connection.known)
            connection.known.clear()
        return found


def _is_same_shard(old: Shard, new: Shard) -> bool:
    """Whether the second one's primary is that of the first, or was a replica of it."""
    return new.primary.id == old.primary.id or any(node.id == new.primary.id for node in old.replicas)


def restored(floors: Mapping[str, Floor]) -> dict[bytes, ShardFloor]:
    """Floors from a record that another proxy, or an earlier life of this one, has written."""
    return {
        floor.replid.encode(): ShardFloor(Point(floor.replid.encode(), floor.offset), None)
        for floor in floors.values()
    }
