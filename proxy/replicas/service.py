"""The replicas of each shard: which there are, which may be read now, and what each has proved.

``Replicas`` follows the topology view and the replicas' connections. Its table names, for each slot, the shard whose
replicas may carry its reads; a slot that is in flux, or changed hands within the settling time, has none there and is
read at its primary. ``proxy.replicas.monitor`` moves replicas through their stages; the exchange sends the reads.

Replicas have connections of their own, on which READONLY was said, so that a primary never serves what was meant for
a replica, and a replica that does not answer is left soon: its reads go to the primary. Each has a circuit
(``routing.circuit``): one that fails or stalls gets no reads for a while, then a growing share.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from math import inf
from operator import is_not, itemgetter, ne

import trio

from proxy.log import get_logger
from proxy.topology.service import Topology
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import RESPS, Lane, Nodes
from routing.circuit import Circuit, CircuitState, Silence
from routing.offsets import NO_POINT, OffsetHistory, Point, Sample, SampleReader, covers
from routing.priority import Priority
from routing.promotion import Stage
from routing.slot import SLOT_COUNT
from routing.topology import EMPTY_VIEW, Address, Node, Role, Shard, TopologyView

log = get_logger(__name__)

RESP_INDEX = {resp: index for index, resp in enumerate(RESPS)}
LATENCY_WEIGHT = 0.2  # of the newest measurement in the moving average
FEW = 8  # shards: when no more were replaced, only their slots are looked at
HISTORY_SECONDS = 300.0  # of the primaries' offsets: the largest staleness that can be proved
STALL_ROUND_TRIPS = 4  # a far replica has not stalled before so many of its round trips have passed
NORMAL = int(Priority.NORMAL)  # an exact int, by which lists are indexed in half the time


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """What operators set. Durations in seconds."""

    settle_seconds: float = 5.0  # slots that changed hands within this time are read at primaries
    zone: str = ""  # this proxy's; replicas there are preferred
    zones: Mapping[Address, str] | None = None  # of nodes that do not tell theirs
    stall_seconds: float = (
        0.1  # owing replies and sending none for so long is a stall; 0: there are no circuits
    )


class Replica:
    """One replica. Made anew when its address or its primary changes, so that nothing is carried over."""

    __slots__ = (
        "circuit",
        "connections",
        "in_zone",
        "is_readable",
        "latency_seconds",
        "mismatched",
        "missed",
        "node",
        "reader",
        "reads_total",
        "sample",
        "shard",
        "silences",
        "stage",
        "stamp",
        "stamped_at",
        "verified_at",
        "why_not",
        "zone",
    )

    def __init__(self, node: Node, shard: ShardReplicas) -> None:
        self.node = node
        self.shard = shard
        self.stage = Stage.JOINING
        self.is_readable = False  # stage is READABLE; apart, because every batch of reads asks
        self.why_not = "it has not told its offset yet"
        self.connections: list[NodeConnection | None] = [None] * len(RESPS)  # by RESP_INDEX; ready or not
        self.latency_seconds: float | None = None  # moving average of a stamp's way there and back
        self.reader = SampleReader()
        self.sample: Sample | None = None  # the newest
        self.stamp = NO_POINT  # of that sample
        self.stamped_at = 0.0  # Trio's clock, when the sample came
        self.missed: Point | None = None  # the floor that a stamp for reads did not reach, until one does
        self.zone = ""
        self.in_zone = True  # it is in this proxy's zone, or no zone is preferred
        self.mismatched: tuple[bytes, ...] = ()  # keys that differed from the primary's
        self.verified_at: float | None = None  # Unix seconds
        self.reads_total = 0
        self.circuit = Circuit()
        self.silences = [Silence() for _ in RESPS]  # of the connections

    @property
    def address(self) -> Address:
        return self.node.address

    def outstanding(self) -> int:
        """Replies that it owes."""
        return sum(len(connection.owed) for connection in self.connections if connection is not None)

    def set_stage(self, stage: Stage, why_not: str = "") -> None:
        self.stage = stage
        self.is_readable = stage is Stage.READABLE
        self.why_not = why_not
        self.shard.count_readable()

    def note(self, sample: Sample, asked_at: float, now: float) -> None:
        """It answered ``sample`` at ``now`` to a question of ``asked_at`` (Trio's clock)."""
        self.sample = sample
        self.stamp = sample.point
        self.stamped_at = now
        took = now - asked_at
        former = self.latency_seconds
        self.latency_seconds = took if former is None else former + LATENCY_WEIGHT * (took - former)
        if self.missed is not None and self._has_caught_up(sample):
            self.missed = None

    def _has_caught_up(self, sample: Sample) -> bool:
        """With what it missed, or, since that may be of a history that is over, with its primary."""
        assert self.missed is not None
        primary = self.shard.sample
        return covers(sample.point, self.missed) or (
            primary is not None and covers(sample.point, primary.point)
        )

    @property
    def is_behind(self) -> bool:
        """Reads that need a floor are not sent to it: it would hardly reach theirs."""
        return self.missed is not None


class ShardReplicas:
    """A primary, the history of its offset, and its replicas. Equal only to itself: it ends with its primary."""

    __slots__ = (
        "has_readable",
        "history",
        "is_gone",
        "left_empty",
        "nodes",
        "primary",
        "reader",
        "replicas",
        "sample",
    )

    def __init__(self, primary: Node) -> None:
        self.primary = primary
        self.nodes: tuple[Node, ...] = ()  # the replicas as the view names them
        self.replicas: tuple[Replica, ...] = ()
        self.has_readable = False
        self.history = OffsetHistory(HISTORY_SECONDS)
        self.reader = SampleReader()
        self.sample: Sample | None = None  # the primary's newest
        self.is_gone = False  # its primary is none any more in the view
        self.left_empty = False  # and owned no slot by then

    @classmethod
    def gone(cls, node_id: str) -> ShardReplicas:
        """Stands for a shard whose primary, of this id, is none any more."""
        shard = cls(Node(node_id, Address("", 0), Role.PRIMARY))
        shard.is_gone = True
        return shard

    def note(self, sample: Sample, asked_at: float) -> None:
        """The primary answered ``sample`` to a question that was sent after ``asked_at`` (Trio's clock)."""
        if sample.is_primary:
            self.sample = sample
            self.history.add(asked_at, sample.point)

    @property
    def replid(self) -> bytes:
        """The primary's history as last seen; b"" if it never told."""
        return b"" if self.sample is None else self.sample.point.replid

    def count_readable(self) -> None:
        self.has_readable = any(replica.is_readable for replica in self.replicas)

    def choose(
        self,
        resp: int,
        count: int = 1,
        *,
        may_be_behind: bool = True,
        proven_since: float | None = None,
        despite: bool = False,
    ) -> tuple[Replica, NodeConnection] | None:
        """The replica that is to serve the next reads: in the zone, with the fewest replies owed, then the quickest.

        ``count``: how many they are; 0: none, somebody only asks. ``may_be_behind`` False: none of which it is known.
        ``proven_since``: its last stamp proved that it has everything until then (Trio's clock), or something later.
        Not one whose node has no permit, nor against its circuit; ``despite``: there is nobody else to ask.
        """
        index = RESP_INDEX[resp]
        best: tuple[Replica, NodeConnection] | None = None
        best_rank: tuple[bool, int, float] = (True, 0, 0.0)
        returning: tuple[Replica, NodeConnection] | None = None  # the best of those that get a share
        returning_rank = best_rank
        for replica in self.replicas:
            connection = replica.connections[index]
            if not replica.is_readable or connection is None or not connection.ready:
                continue
            if replica.missed is not None and not may_be_behind:
                continue
            if proven_since is not None:
                until = self.history.proven_until(replica.stamp)
                if until is None or until < proven_since:
                    continue
            rank = (not replica.in_zone, len(connection.owed), replica.latency_seconds or 0.0)
            if not despite:
                share = replica.circuit.share
                if share == 0.0 or not (connection.is_free or connection.load.has_permit(NORMAL)):
                    continue
                if share != 1.0:
                    if returning is None or rank < returning_rank:
                        returning, returning_rank = (replica, connection), rank
                    continue
            if best is None or rank < best_rank:
                best, best_rank = (replica, connection), rank
        if returning is not None and (best is None or returning_rank < best_rank):
            circuit = returning[0].circuit
            if circuit.admits(count) if count else circuit.would_admit():
                return returning
        return best

    def has_passed_over(self, resp: int) -> bool:
        """Whether a readable replica may be without reads because of its circuit or its permits."""
        index = RESP_INDEX[resp]
        return any(
            replica.is_readable
            and (replica.circuit.share != 1.0 or ((line := replica.connections[index]) and not line.is_free))
            for replica in self.replicas
        )


class Replicas:
    """All shards' replicas. ``of_slot[slot]``: the shard whose replicas may serve the slot's reads, or None."""

    def __init__(self, nodes: Nodes, topology: Topology, options: ReplicaOptions) -> None:
        self.of_slot: list[ShardReplicas | None] = [None] * SLOT_COUNT  # changed in place
        self.used_at = -inf  # Trio's clock, when reads were last sent to replicas
        self.map_version = 0  # counts the changes of any slot's owner
        self.nodes = nodes
        self.topology = topology
        self.options = options
        # Replicas came, or reads begin to be sent to them: who watches them should look now. As the next.
        self.on_news: Callable[[], None] = lambda: None
        # A connection to one of them ended, perhaps with its process. Called at once, must not block.
        self.on_connection_lost: Callable[[Replica], None] = lambda replica: None
        # One of them stalls, with reads that others could serve. Called at once, must not block.
        self.on_stall: Callable[[Replica], None] = lambda replica: None
        self._resps = [2]  # the RESP versions in use
        self._shards: dict[str, ShardReplicas] = {}  # by the primary's node id
        self._entries: list[ShardReplicas | None] = [None]  # by the view's index
        self._shards_seen: tuple[Shard, ...] = ()
        self._by_address: dict[Address, Replica] = {}
        self._of_owner: list[ShardReplicas | None] = [None] * SLOT_COUNT  # slot -> its shard, in flux or not
        self._settling: dict[int, float] = {}  # slot -> until when, Trio's clock
        self._all_settling: float | None = None  # until when, after most slots changed hands at once
        self._in_flux: frozenset[int] = frozenset()
        nodes.on_change = self._on_connection
        topology.subscribe(self._on_view)
        self._on_view(EMPTY_VIEW, topology.view)

    def adopt(self, options: ReplicaOptions) -> None:
        """Go by these options from now on."""
        self.options = options
        for replica in self.replicas():
            self.set_zone(replica, "")
            if not options.stall_seconds:
                replica.circuit = Circuit()

    def set_zone(self, replica: Replica, told: str) -> None:
        """``told``: the zone that the node itself named; "" if it did not."""
        configured = (self.options.zones or {}).get(replica.address, "")
        replica.zone = configured or told or replica.zone
        replica.in_zone = not self.options.zone or replica.zone == self.options.zone

    def use(self, resp: int) -> None:
        """Have connections for clients of this RESP version from now on."""
        if resp not in self._resps:
            self._resps.append(resp)
            self.nodes.ensure_all(self._by_address, resp)

    # -- circuits

    def look_for_stalls(self, until: float) -> None:
        """Take out each replica that owes replies and has sent nothing for too long. Called at a steady beat.

        ``until``: what came by then was read (Trio's clock).
        """
        if not self.options.stall_seconds:
            return
        now = trio.current_time()
        for replica in self.replicas():
            for connection, silence in zip(replica.connections, replica.silences, strict=True):
                if connection is None:
                    continue
                seconds = silence.seconds(bool(connection.owed), connection.arrived(), until, now)
                if seconds and seconds >= self.stall_seconds(replica):
                    self.fail(replica, f"it owes replies, and has sent nothing for {seconds:.3g} s")
                    self.on_stall(replica)
            if replica.circuit.advance(now):
                self._report(replica)

    def stall_seconds(self, replica: Replica) -> float:
        """From when on it stalls, and a question is answered late."""
        connection = replica.connections[0]
        no_load_seconds = 0.0 if connection is None else connection.load.limiter.no_load_seconds
        far_seconds = STALL_ROUND_TRIPS * no_load_seconds if no_load_seconds != inf else 0.0
        return max(self.options.stall_seconds, far_seconds)

    def fail(self, replica: Replica, why: str) -> None:
        """It failed or stalled."""
        if self.options.stall_seconds and replica.circuit.fail(why, trio.current_time(), random.random()):
            self._report(replica)

    def fail_reads(self, replica: Replica, count: int, why: str) -> None:
        """It answered so many reads with errors that are its own."""
        circuit, now = replica.circuit, trio.current_time()
        if self.options.stall_seconds and circuit.fail_reads(
            count, replica.reads_total, why, now, random.random()
        ):
            self._report(replica)

    def note(self, replica: Replica, sample: Sample, asked_at: float, now: float) -> None:
        """It answered ``sample`` at ``now`` to a question of ``asked_at`` (Trio's clock)."""
        replica.note(sample, asked_at, now)
        if replica.is_readable and replica.circuit.share != 1.0:
            if replica.circuit.on_answer(asked_at, now, self.stall_seconds(replica), random.random()):
                self._report(replica)

    def _report(self, replica: Replica) -> None:
        circuit = replica.circuit
        match circuit.state:
            case CircuitState.OPEN:
                log.warning("circuit_opened", node=replica.address, reason=circuit.why)
            case CircuitState.PROBING:
                log.debug("circuit_probing", node=replica.address)
            case CircuitState.RETURNING:
                log.info("circuit_returning", node=replica.address, share=circuit.share)
            case CircuitState.CLOSED:
                log.info("circuit_closed", node=replica.address)

    def shards(self) -> list[ShardReplicas]:
        return [*self._shards.values()]

    def replicas(self) -> Iterator[Replica]:
        return chain.from_iterable(shard.replicas for shard in self._shards.values())

    def owner_of(self, slot: int) -> ShardReplicas | None:
        """The slot's shard, at rest or not; None when nobody owns it."""
        return self._of_owner[slot]

    def settling_until(self, slot: int) -> float | None:
        """Until when (Trio's clock) the slot's reads go to its primary because it changed hands lately."""
        if self._all_settling is not None:
            return self._all_settling
        return self._settling.get(slot)

    def settle(self, now: float) -> None:
        """Let the replicas serve slots whose settling time is over. Called at a steady beat."""
        if self._all_settling is not None and self._all_settling <= now:
            self._all_settling = None
            self._show()
        over = [slot for slot, until in self._settling.items() if until <= now]
        for slot in over:
            del self._settling[slot]
            if slot not in self._in_flux and self._all_settling is None:
                self.of_slot[slot] = self._of_owner[slot]

    def _show(self) -> None:
        """Write the whole table."""
        if self._all_settling is not None:
            self.of_slot[:] = [None] * SLOT_COUNT
            return
        self.of_slot[:] = self._of_owner
        for slot in chain(self._settling, self._in_flux):
            self.of_slot[slot] = None

    # -- following the view and the connections

    def _on_view(self, old: TopologyView, new: TopologyView) -> None:
        """Follow the view. A pass over all slots goes at the speed of C, and is left out where that can be."""
        replaced = self._follow(new.shards) if new.shards is not self._shards_seen else ()
        was = self._of_owner
        if is_all := len(replaced) > FEW:
            self._of_owner = [*itemgetter(*new.shard_of_slot)(self._entries)]
            changed = [*compress(range(SLOT_COUNT), map(is_not, was, self._of_owner))]
        else:
            looked_at: set[int] = set()
            if new.shard_of_slot != old.shard_of_slot:
                looked_at.update(compress(range(SLOT_COUNT), map(ne, old.shard_of_slot, new.shard_of_slot)))
            if replaced:
                looked_at.update(
                    compress(range(SLOT_COUNT), map(set(replaced).__contains__, new.shard_of_slot))
                )
            changed = [slot for slot in looked_at if was[slot] is not self._entries[new.shard_of_slot[slot]]]
            self._of_owner = was.copy()
            for slot in changed:
                self._of_owner[slot] = self.of_slot[slot] = self._entries[new.shard_of_slot[slot]]
        if changed:
            self.map_version += 1
            if old is not EMPTY_VIEW:
                until = trio.current_time() + self.options.settle_seconds
                if len(changed) > SLOT_COUNT // 2:  # one time for all is quicker than one for each
                    self._all_settling = until
                else:
                    self._settling.update((slot, until) for slot in changed if was[slot] is not None)
        were_in_flux = self._in_flux
        self._in_flux = frozenset(slot for migration in new.migrations for slot in migration.slots)
        if is_all or self._all_settling is not None:
            self._show()
            return
        for slot in were_in_flux - self._in_flux:
            self.of_slot[slot] = self._of_owner[slot]
        for slot in chain(self._settling.keys() & {*changed, *were_in_flux}, self._in_flux):
            self.of_slot[slot] = None

    def _follow(self, new: tuple[Shard, ...]) -> Sequence[int]:
        """Have an entry for each shard and replica, and connections to those replicas and no others.

        Returns the indexes whose shard is another one than before, or may be.
        """
        old = self._shards_seen
        first, last = 0, len(new)  # a shard more or less: all before it and behind it is as it was
        if len(old) != len(new):
            first = _common(old, new)
            last -= min(_common(reversed(old), reversed(new)), min(len(old), len(new)) - first)
        shift = len(old) - len(new)
        before = self._entries
        known = before[:-1]
        if shift:
            known[first : last + shift] = [None] * (last - first)
        differing = [
            index
            for index in range(first, last)
            if shift or (old[index] is not new[index] and old[index] != new[index])
        ]
        gone = before[first : last + shift] if shift else [before[index] for index in differing]
        former = {shard.primary.id: shard for shard in gone if shard is not None}
        for shard_id, shard in former.items():
            del self._shards[shard_id]
            for replica in shard.replicas:
                self._by_address.pop(replica.address, None)
        for index in differing:
            entry = known[index] = self._shard_of(new[index], former)
            self._shards[entry.primary.id] = entry
            self._by_address.update((replica.address, replica) for replica in entry.replicas)
        self._entries = [*known, None]  # the last: UNOWNED, which is -1
        self._shards_seen = new
        for shard_id, shard in former.items():
            if self._shards.get(shard_id) is not shard:
                shard.is_gone = True
                shard.left_empty = shard not in self._of_owner
        addresses = [node.address for index in differing for node in new[index].replicas]
        for resp in self._resps:
            self.nodes.ensure_all(addresses, resp)
        if new:
            self.nodes.retain(self._by_address)
        for address in addresses:
            self._on_connection(address)
        if addresses:
            self.on_news()
        if shift:
            return range(len(new))
        return [*compress(range(len(new)), map(is_not, before, self._entries))]

    def _shard_of(self, shard: Shard, former: Mapping[str, ShardReplicas]) -> ShardReplicas:
        """The entry of a shard: the one that there is, with what changed, or a new one."""
        known = former.get(shard.primary.id)
        if known is None or known.primary.address != shard.primary.address:
            known = ShardReplicas(shard.primary)
        known.primary = shard.primary
        if known.nodes != shard.replicas:
            known.nodes = shard.replicas
            known.replicas = tuple(self._replica_of(known, node) for node in shard.replicas)
            known.count_readable()
        return known

    def _replica_of(self, shard: ShardReplicas, node: Node) -> Replica:
        for replica in shard.replicas:
            if replica.node.id == node.id and replica.address == node.address:
                replica.node = node
                return replica
        replica = Replica(node, shard)
        self.set_zone(replica, "")
        return replica

    def _on_connection(self, address: Address) -> None:
        """A connection to one replica came or went."""
        replica = self._by_address.get(address)
        if replica is not None:
            former = [*replica.connections]
            replica.connections[:] = [self.nodes.connection(address, resp, Lane.READ) for resp in RESPS]
            if any(
                was is not None and was is not now
                for was, now in zip(former, replica.connections, strict=True)
            ):
                replica.silences = [Silence() for _ in RESPS]
                self.on_connection_lost(replica)


def _common(some: Iterable[Shard], others: Iterable[Shard]) -> int:
    """How many of them are equal from the beginning on."""
    count = 0
    for one, other in zip(some, others, strict=False):
        if one is not other and one != other:
            break
        count += 1
    return count
