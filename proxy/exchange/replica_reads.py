"""Reads at replicas: collected in a turn, sent with a question that proves them, and otherwise asked at the owner.

    a turn's reads of one shard and level ─▶ a group
      caught_up, or a session that needs one: the primary is asked for its offset, the floor; one question for all
        groups of the shard; the reads wait for it
      ─▶ a replica: INFO replication and the reads, in one pipeline
      ─▶ the stamp, which comes first, is judged for each group: proven, or its reads go to the owner at once
      ─▶ each reply: handed out if it is proven and shows that the key is there, else asked at the owner

Why the replies of a proven group are as fresh as their level says
- caught_up: the floor is asked after the read has arrived, so it includes every write that was acknowledged before.
  The replica answers in order, so what it reads is at least as new as the stamp, and the stamp covers the floor.
- bounded_staleness: the stamp covers the offset that the primary had at a known time. Replies that come in a later
  turn than their stamp are judged by the clock again.
- session: the floor includes what the session wrote, and what it read through any other connection.
- eventual: nothing is proven, and nothing promised.

Why one client's reads stay in order. A client with reads in a group is held (``OpenRequests.end_pass``) until they
are answered, so its next command sees all of them done. Within a group, its reads of one key go to one connection, in
order. If one of them goes to the owner, so does each later one of the same slot: else it could be older.

What goes to the owner is an ordinary slot of its client from then on, with everything that ``open_requests`` does for
one. A reply that the replica still owes for it is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf

import trio

from proxy.exchange.failures import internal_fault
from proxy.exchange.read_groups import Asked, ReadCounts, ReadGroup, ReadSlot, SessionFloors
from proxy.exchange.routes import Routes
from proxy.hub import Hub
from proxy.log import get_logger
from proxy.metrics import Histogram
from proxy.protocol.encode import command as encoded
from proxy.replicas.service import RESP_INDEX, Replica, Replicas, ShardReplicas
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import Discard, Slot
from routing.levels import Level, ReadLevel
from routing.offsets import Point, Sample, SampleError
from routing.proof import Refusal, judge

INFO_REPLICATION = encoded("INFO", "replication")
QUIET_SECONDS = 0.5  # without reads at replicas: then their offsets may be known from long ago
# Errors that say that a node cannot serve now.
FAILING = (b"-LOADING", b"-MASTERDOWN", b"-CLUSTERDOWN", b"-BUSY ")
ASKED_MAX = 1000  # levels with their bounds that are remembered
STALENESS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds

log = get_logger(__name__)


class FloorQuestion(Slot):
    """Asks a primary for its offset, for all groups that wait for it."""

    __slots__ = ("asked_at", "groups", "hash_slot", "raw", "reads", "requester", "shard")

    def __init__(
        self, reads: ReplicaReads, shard: ShardReplicas, groups: Sequence[ReadGroup], asked_at: float
    ) -> None:
        self.raw = INFO_REPLICATION
        self.hash_slot = -1
        self.requester = None
        self.reads = reads
        self.shard = shard
        self.groups = groups
        self.asked_at = asked_at

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        self.reads.on_floor(self, reply)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self.reads.on_no_floor(self)


class StampQuestion(Slot):
    """Asks a replica what it has applied, before the reads that follow on the same connection."""

    __slots__ = ("asked_at", "groups", "hash_slot", "raw", "reads", "replica", "requester")

    def __init__(self, reads: ReplicaReads, replica: Replica, asked_at: float) -> None:
        self.raw = INFO_REPLICATION
        self.hash_slot = -1
        self.requester = None
        self.reads = reads
        self.replica = replica
        self.groups: list[ReadGroup] = []
        self.asked_at = asked_at

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        self.reads.on_stamp(self, reply, connection)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        """Its reads are lost with it, and each says so."""


class Confirmation(Slot):
    """A read that a replica answered with what may be an absence, asked at the owner."""

    __slots__ = ("hash_slot", "raw", "reads", "requester", "slot")

    def __init__(self, reads: ReplicaReads, slot: ReadSlot) -> None:
        self.reads = reads
        self.slot = slot
        self.raw = slot.raw
        self.hash_slot = slot.hash_slot
        self.requester = slot.requester

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if not self.slot.lacks(reply):
            self.reads.nils_prevented_total += 1
        self.slot.on_reply(reply, connection)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self.slot.on_lost(sent, connection)


class ReplicaReads:
    """All that is on its way to replicas. One per proxy; flushed by the hub at the end of a turn."""

    def __init__(self, hub: Hub, replicas: Replicas, routes: Routes) -> None:
        self.hub = hub
        self.replicas = replicas
        self.routes = routes
        self.of_slot = replicas.of_slot
        self.dirty = False
        self.strong_total = 0  # reads of level strong
        self.confirmed_total = 0  # replies that could mean absence
        self.nils_prevented_total = 0  # of those, when the owner had the key
        self.floors_total = 0  # questions to primaries
        self.stamps_total = 0  # questions to replicas
        self.refusals: Counter[Refusal] = Counter()
        self.staleness = Histogram(STALENESS_BUCKETS)  # of reads at replicas, when their stamp came: at most
        self.counts = {level: ReadCounts() for level in Level}
        self._asked: dict[tuple[ReadLevel, int], Asked] = {}
        self._groups: list[ReadGroup] = []  # that are not on their way
        self._flushing = self._groups
        self._timed: list[ReadGroup] = []  # proven in this turn, for a while
        self._asking: set[ShardReplicas] = set()  # whose primary owes a floor: new reads wait for the next
        replicas.on_stall = self.recall

    def asked(self, level: ReadLevel, resp: int) -> Asked:
        """The object that stands for this level in this RESP version; reads of one object share their questions."""
        found = self._asked.get((level, resp))
        if found is None:
            if len(self._asked) >= ASKED_MAX:  # clients name bounds in milliseconds; who has one keeps it
                self._asked.clear()
            found = self._asked[level, resp] = Asked(level, resp, self.counts[level.level])
        return found

    def group(self, shard: ShardReplicas, asked: Asked, session: SessionFloors | None = None) -> ReadGroup:
        """The group that leaves at the end of this turn. A read that is put into it has its client held until then.

        It is ``open_groups[shard]`` of the session or else of ``asked``, if it is there already.
        """
        open_groups = (session or asked).open_groups
        group = open_groups.get(shard)
        if group is None:
            group = open_groups[shard] = ReadGroup(self, shard, asked, session)
            self._groups.append(group)
            self._flush_soon()
        return group

    def _flush_soon(self) -> None:
        """At the end of the turn. Not ``touched``: outside a turn it flushes now, before the read is in its group."""
        if not self.dirty:
            self.dirty = True
            self.hub.dirty.append(self)

    def answered(self) -> dict[Level, int]:
        """How many reads of each level replicas answered. Counted when somebody wants to know."""
        pending = Counter(
            slot.group.asked.level.level
            for connection in self.replicas.nodes.connections()
            for slot in connection.owed
            if isinstance(slot, ReadSlot) and slot.group is not None
        )
        return {
            level: counts.sent - counts.returned - pending[level] for level, counts in self.counts.items()
        }

    # -- the turn's end

    def flush(self) -> None:
        for group in self._timed:
            if group.reads[-1].reply is None:  # a later turn may be too late
                for read in group.reads:
                    read.look_closely()
        self._timed.clear()
        if not self._groups:
            return
        groups = self._flushing = self._groups
        self._groups = []
        now = trio.current_time()
        if now - self.replicas.used_at > QUIET_SECONDS:
            self.replicas.on_news()
        self.replicas.used_at = now
        waiting: dict[ShardReplicas, list[ReadGroup]] = {}
        ready: dict[ShardReplicas, list[ReadGroup]] = {}
        for group in groups:
            session = group.session
            if session is not None and group.reads:
                self._prepare(group, session)
            if group.asked.needs_floor and group.floor is None and group.shard in self._asking:
                self._groups.append(group)  # who reads meanwhile joins it: one more question serves all
                continue
            del (session or group.asked).open_groups[group.shard]
            if not group.reads:  # an MGET that went elsewhere after all
                continue
            if group.asked.needs_floor and group.floor is None:
                waiting.setdefault(group.shard, []).append(group)
            else:
                ready.setdefault(group.shard, []).append(group)
        for shard, those in waiting.items():
            self._ask_floor(shard, those, now)
        for shard, those in ready.items():
            self._send(shard, those, now)

    def on_fault(self, error: Exception) -> None:
        """A bug in ``flush``: nobody may wait for ever, and no later read join a group that has been given up."""
        self._groups = []
        for group in self._flushing:
            (group.session or group.asked).open_groups.pop(group.shard, None)
            self._refuse(group, internal_fault("flush"))

    def _prepare(self, group: ReadGroup, session: SessionFloors) -> None:
        """Take over what the session knows; it goes on with the replica that it read at, or gets a new floor."""
        group.floor = session.floor_of(group.shard)
        group.connection = session.line_of(group.shard)
        if group.connection is not None:
            replica = self.readable_at(group.shard, group.connection)
            # Of another RESP version, if its client has changed to this one.
            if replica is None or replica.connections[RESP_INDEX[group.asked.resp]] is not group.connection:
                group.floor = group.connection = None

    def readable_at(self, shard: ShardReplicas, connection: NodeConnection) -> Replica | None:
        """The replica behind a connection, if it can be read now, is not known to be behind and has not just failed."""
        for replica in shard.replicas:
            if connection in replica.connections:
                may_be_read = replica.is_readable and connection.ready and not replica.is_behind
                return replica if may_be_read and not replica.circuit.is_open else None
        return None

    # -- floors

    def _ask_floor(self, shard: ShardReplicas, groups: Sequence[ReadGroup], now: float) -> None:
        connection = self.routes.node(shard.primary.address, 2, Lane.READ)
        if connection is None:
            self.return_groups(groups, Refusal.NO_FLOOR)
            return
        self.floors_total += 1
        self._asking.add(shard)
        connection.queue(FloorQuestion(self, shard, groups, now))

    def on_no_floor(self, question: FloorQuestion) -> None:
        """The primary did not answer."""
        self._asked_for(question.shard)
        self.return_groups(question.groups, Refusal.NO_FLOOR)

    def _asked_for(self, shard: ShardReplicas) -> None:
        """The primary owes no floor any more: ask for those who came meanwhile."""
        self._asking.discard(shard)
        if self._groups:
            self.hub.touched(self)

    def on_floor(self, question: FloorQuestion, reply: bytes) -> None:
        """The primary answered: now the replicas can be asked for more than that."""
        shard = question.shard
        self._asked_for(shard)
        try:
            sample = shard.reader.sample_of(reply)
        except SampleError as error:
            log.warning("no_floor", node=shard.primary.address, reason=error)
            self.return_groups(question.groups, Refusal.NO_FLOOR)
            return
        if not sample.is_primary:  # it was deposed, and the view does not say so yet
            self.routes.refresh_soon()
            self.return_groups(question.groups, Refusal.NO_FLOOR)
            return
        shard.note(sample, question.asked_at)
        going = []
        for group in question.groups:
            if group.session is not None:
                refusal = group.session.on_floor(shard, sample, group.deeds)
                if refusal is not None:
                    self._refuse(group, refusal)
                    continue
            group.asked_at = question.asked_at
            group.connection = None
            if group.is_returned:  # only the session's own proof was missing: see on_stamp
                self._return_all(group)
                continue
            group.floor = sample.point
            going.append(group)
        self._send(shard, going, trio.current_time())

    def _refuse(self, group: ReadGroup, reply: bytes) -> None:
        for slot in group.reads:
            slot.answer(reply)

    # -- stamps

    def _send(self, shard: ShardReplicas, groups: Sequence[ReadGroup], now: float) -> None:
        """Send each group to a replica, behind one question for all groups that go the same way.

        What needs no question goes last: ``on_stamp`` counts on the reads of its groups to be right behind it.
        """
        stamps: dict[NodeConnection, StampQuestion] = {}
        if len(groups) > 1:
            groups = sorted(groups, key=_needs_no_stamp)
        for group in groups:
            asked = group.asked
            found: tuple[Replica, NodeConnection] | None
            if group.connection is not None:
                replica = self.readable_at(shard, group.connection)
                found = None if replica is None else (replica, group.connection)
            else:
                found = self._choose(shard, group, now)
            if found is None:
                self.return_groups((group,), self._why_none(shard, group, now))
                continue
            replica, connection = found
            group.replica = replica
            if not asked.is_eventual:
                stamp = stamps.get(connection)
                if stamp is None:
                    stamp = stamps[connection] = StampQuestion(self, replica, now)
                    self.stamps_total += 1
                    connection.queue(stamp)
                stamp.groups.append(group)
            replica.reads_total += len(group.reads)
            asked.counts.sent += len(group.reads)
            if group.session is not None:
                group.session.on_served(shard, connection)
            connection.queue_all(group.reads)

    def _choose(
        self, shard: ShardReplicas, group: ReadGroup, now: float, *, only_asks: bool = False
    ) -> tuple[Replica, NodeConnection] | None:
        """``only_asks``: whether there is one, if neither circuits nor permits counted."""
        asked = group.asked
        proven_since = now - asked.bound if asked.bound != inf else None
        may_be_behind = asked.is_eventual or proven_since is not None
        count = len(group.reads)
        if not only_asks:
            found = shard.choose(asked.resp, count, may_be_behind=may_be_behind, proven_since=proven_since)
            if found is not None or not shard.has_passed_over(asked.resp) or self.can_owner(shard):
                return found
        return shard.choose(
            asked.resp, count, may_be_behind=may_be_behind, proven_since=proven_since, despite=True
        )

    def can_owner(self, shard: ShardReplicas) -> bool:
        """Whether the primary can be asked instead of a replica."""
        return self.routes.node(shard.primary.address, 2, Lane.READ) is not None

    def _why_none(self, shard: ShardReplicas, group: ReadGroup, now: float) -> Refusal:
        """Why no replica gets the group."""
        if not shard.has_readable:
            return Refusal.NOT_READABLE
        if group.connection is not None or not shard.has_passed_over(group.asked.resp):
            return Refusal.KNOWN_BEHIND
        found = self._choose(shard, group, now, only_asks=True)
        if found is None:
            return Refusal.KNOWN_BEHIND
        return Refusal.CIRCUIT if found[0].circuit.share != 1.0 else Refusal.OVERLOADED

    def on_stamp(self, question: StampQuestion, reply: bytes, connection: NodeConnection) -> None:
        """The replica answered: its groups' replies come next. Those that it does not prove go to the owner now.

        The replies to those reads are still owed, right behind the stamp, with no others between them: they are read
        and dropped.
        """
        replica = question.replica
        now = trio.current_time()
        count = sum(len(group.reads) for group in question.groups)
        try:
            sample = replica.reader.sample_of(reply)
        except SampleError as error:
            log.info("no_stamp", node=replica.address, reason=error)
            self.replicas.fail_reads(replica, count, f"it does not tell its offset: {error}")
            connection.discard_next(0, count)
            for group in question.groups:
                group.asked.counts.returned += len(group.reads)
            self.return_groups(question.groups, Refusal.NO_STAMP)
            return
        self.replicas.note(replica, sample, question.asked_at, now)
        missed: Point | None = None
        first = 0  # of the group's reads, among what the connection owes
        for group in question.groups:
            count = len(group.reads)
            refusal = self._judge(group, sample, now)
            first += count
            if refusal is None:
                group.judged_in = self.hub.turns_total
                continue
            connection.discard_next(first - count, count)
            if refusal is Refusal.BEHIND:
                missed = group.floor
            if refusal is Refusal.OTHER_HISTORY and group.session is not None and group.asked_at == 0.0:
                # The primary may have begun a new history without what the session wrote: it is asked first.
                group.is_returned = True
                self.refusals[refusal] += len(group.reads)
                self._ask_floor(group.shard, (group,), now)
            else:
                self.return_groups((group,), refusal)
            group.asked.counts.returned += count
        if missed is not None:
            replica.missed = missed
            self.stamps_total += 1
            connection.queue(StampQuestion(self, replica, now))  # often it takes but a moment

    def _judge(self, group: ReadGroup, sample: Sample, now: float) -> Refusal | None:
        """``judge`` for a group whose stamp has come; what it proves is kept."""
        asked = group.asked
        refusal, proven_until = judge(asked.bound, group.shard.history, group.floor, sample, now)
        if refusal is None:
            if asked.bound != inf:
                group.proven_until = proven_until + asked.bound
                self._timed.append(group)
                self._flush_soon()
                self.staleness.observe(now - proven_until, len(group.reads))
            elif group.asked_at:
                self.staleness.observe(now - group.asked_at, len(group.reads))
        return refusal

    def _is_too_old(self, group: ReadGroup) -> bool:
        """Whether a reply that comes now, in a later turn than its stamp, is older than its bound."""
        return self.hub.turns_total != group.judged_in and trio.current_time() > group.proven_until

    # -- to the owner

    def return_groups(self, groups: Iterable[ReadGroup], refusal: Refusal) -> None:
        """Have the owner serve all reads of these groups, in their order."""
        for group in groups:
            self.refusals[refusal] += len(group.reads)
            if group.is_returned:  # it had its reads held back for the session's proof, which did not come
                self._refuse(group, UNPROVEN)
            else:
                self._return_all(group)

    def _return_all(self, group: ReadGroup) -> None:
        group.is_returned = True
        group.asked.counts.at_owner += len(group.reads)
        if group.session is not None:
            group.session.on_owner(group.shard)
        for slot in group.reads:
            self._to_owner(group, slot, slot)

    def consider(self, group: ReadGroup, slot: ReadSlot, reply: bytes) -> None:
        """A reply that needs a look: it may mean absence, or come too late, or follow one that went to the owner."""
        if slot.lacks(reply):
            self.confirmed_total += 1
            if reply.startswith(FAILING) and group.replica is not None:
                self.replicas.fail_reads(group.replica, 1, f"it answers {reply[1:40].split()[0].decode()}")
            self._return_read(group, slot, Confirmation(self, slot))
        elif group.returned is not None and (id(slot.requester), slot.hash_slot) in group.returned:
            self._return_read(group, slot, slot)
        elif group.proven_until != inf and self._is_too_old(group):
            self.refusals[Refusal.TOO_OLD] += 1
            self._return_read(group, slot, slot)
        else:
            slot.answer(reply)

    def lose(self, group: ReadGroup, slot: ReadSlot) -> None:
        """The connection to the replica ended."""
        self.refusals[Refusal.LOST] += 1
        if group.replica is not None:
            self.replicas.fail(group.replica, "its connection ended, with reads that it had not answered")
        self._return_read(group, slot, slot)

    def recall(self, replica: Replica) -> None:
        """The replica stalls: who waits for a reply gets it from the owner, if that is there.

        What the replica owes is read and dropped. Its other questions wait, and reads at snapshots.
        """
        if not self.can_owner(replica.shard):
            return
        for connection in replica.connections:
            if connection is None or connection.is_closed:
                continue
            owed = connection.owed
            recalled = [slot for slot in owed if isinstance(slot, ReadSlot) and slot.group is not None]
            if not recalled:
                continue
            are_recalled = {id(slot) for slot in recalled}
            kept = [
                Discard(slot.raw) if id(slot) in are_recalled or isinstance(slot, StampQuestion) else slot
                for slot in owed
            ]
            owed.clear()
            owed.extend(kept)
            for read in recalled:
                assert read.group is not None
                self.refusals[Refusal.STALLED] += 1
                self._return_read(read.group, read, read)

    def _return_read(self, group: ReadGroup, slot: ReadSlot, queued: Slot) -> None:
        """Have the owner serve one read, and each later one of its client on the same slot."""
        if group.returned is None:
            group.returned = set()
            for read in group.reads:
                read.look_closely()
        group.returned.add((id(slot.requester), slot.hash_slot))
        group.asked.counts.returned += 1
        group.asked.counts.at_owner += 1
        if group.session is not None:
            group.session.on_owner(group.shard)
        self._to_owner(group, queued, slot)

    def _to_owner(self, group: ReadGroup, queued: Slot, slot: ReadSlot) -> None:
        """Queue ``queued``, which stands for ``slot``, at the owner if it can be; else its client sees to it."""
        slot.leave_group()
        requester = slot.requester
        if requester is None or requester.is_closed:
            return
        route = self.routes.of_slot[slot.hash_slot][group.asked.kind]
        if isinstance(route, NodeConnection) and route.ready:
            route.queue(queued)
        else:
            slot.wait_for_owner(group.began)


def _needs_no_stamp(group: ReadGroup) -> bool:
    return group.asked.is_eventual


UNPROVEN = b"-NOTREADY the primary did not tell whether it has what this session wrote; try again\r\n"
