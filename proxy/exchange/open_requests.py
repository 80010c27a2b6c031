"""One client's open requests: their order, and what happens to those that the nodes turn away.

Slots stand in request order and leave from the front, once answered (promise 6). A slot that a node turned away
(MOVED, ASK, TRYAGAIN, a lost connection ...) is *retrying*. The rules that keep the client's order (design 4):

1. While a slot retries, none of the client's later commands is sent.
2. A retry is sent only when all else that the client has in flight is answered: what was sent after the turned
   away request may have run already.
3. If such a later request on the same key did run, and one of the two may write, sending the earlier one now would
   turn the order around. It did not run, so it is refused, and says so.
4. When a slot's owner changes, clients with requests in flight to the former owner wait for those answers first
   (``hold_until_drained``); in a slot that is moving, a client's requests go one by one.

5. What is in flight at one time goes over one lane (``upstream.nodes.Lane``), so that the node sees it in order. A
   client with nothing in flight chooses anew: the read lane if only reads come. When a write comes while its reads
   are in flight it waits for them once, and from then on this client, which mixes, stays on the write lane.

Retries that can be queued at once go in the same turn, in their order. All others are handled one after the other
by one task. Either way the client is held (``is_held``) until every retry is answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from proxy.exchange.failures import overtaken
from proxy.exchange.permits import NORMAL, Permits
from proxy.exchange.read_groups import Asked, ReadGroup, ReadSlot
from proxy.exchange.read_policy import ReadPolicy
from proxy.exchange.routes import KINDS, Route
from proxy.protocol.absence import could_mean_absence
from proxy.protocol.replies import decode
from proxy.upstream.connection import NodeConnection
from proxy.upstream.load import NodeLoad
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ReplySlot, Requester
from routing.command import Command
from routing.keys import key_positions, write_positions
from routing.priority import PriorityRule
from routing.proof import Refusal
from routing.redirect import SCRIPT_COMMANDS, Ask, Moved, NoScript, Wait

if TYPE_CHECKING:
    from proxy.exchange.exchange import Exchange

CURRENT = -1  # as a snapshot id
RESENDS_MAX = 4  # retries of one batch that go at once; after that a task waits in between

Work = Callable[[], Awaitable[bytes]]


class RequestSlot(ReplySlot):
    """A client's slot that knows how to be retried. This class: one command, one hash slot, one node."""

    __slots__ = ()

    def keys(self) -> set[bytes]:
        """The keys that it names; for the order check only, so it is computed when that is needed."""
        if not self.raw:  # answered by the proxy
            return set()
        arguments: list[bytes] = decode(self.raw)
        return {arguments[position] for position in key_positions(self.command, arguments)}

    def keys_run(self) -> set[bytes]:
        """Those of its keys on which it has run, as far as is known."""
        return self.keys() if self.reply is not None else set()

    @property
    def priority(self) -> int:
        """Whose permits it may have."""
        client = self.requester
        assert isinstance(client, OpenRequests)
        if not client.priority_rules or not self.raw:
            return client.priority
        arguments: list[bytes] = decode(self.raw)
        positions = key_positions(self.command, arguments)
        return client.priority_of(arguments[positions[0]]) if positions else client.priority

    @property
    def may_write(self) -> bool:
        return self.command.may_write

    def keys_written(self) -> list[bytes]:
        """The keys that it may write."""
        if self.command.only_reads or not self.raw:
            return []
        arguments: list[bytes] = decode(self.raw)
        return [arguments[position] for position in write_positions(self.command, arguments)]

    def give_up(self) -> None:
        """Its client left while it waited to be sent again: it never is."""

    def answer(self, reply: bytes) -> None:
        """Take ``reply`` as it is."""
        assert isinstance(self.requester, OpenRequests)
        self.reply = reply
        self.requester.hub.touched(self.requester)

    def wait_for_owner(self, since: float) -> None:
        """A read that went elsewhere at ``since``: send it to its owner as soon as that takes requests."""
        assert isinstance(self.requester, OpenRequests)
        self.requester.send_to_owner(self, since)

    def overtaken_reply(self) -> bytes:
        """The error when it may not be sent again, because a later request on its key has run."""
        return overtaken(self.command.name)

    async def resolve(self, exchange: Exchange, resp: int, deadline: float) -> bytes:
        """Send it again, as often as it takes until the deadline (Trio's clock); the reply."""
        return await exchange.execute(
            self.raw,
            self.hash_slot,
            resp=resp,
            repeatable=self.command.is_readonly,
            deadline=deadline,
            lane=Lane.READ if self.command.only_reads else Lane.WRITE,
            from_script=self.command.name in SCRIPT_COMMANDS,
            writes=self.keys_written(),
            priority=self.priority,
            is_repeated=isinstance(self.redirect, Wait) and self.redirect.was_sent,
        )


class ReplicaSlot(RequestSlot, ReadSlot):
    """A read that a replica may serve; once it is in no group any more it is like any other of its client's."""

    __slots__ = ("direct", "group")

    def __init__(
        self, requester: Requester, command: Command, raw: bytes, hash_slot: int, group: ReadGroup
    ) -> None:
        self.requester = requester  # not by ``super``: one is made for each read
        self.command = command
        self.raw = raw
        self.hash_slot = hash_slot
        self.reply = None
        self.redirect = None
        self.group: ReadGroup | None = group
        self.direct: bool | None = None  # a value shows that the key is there

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if self.group is None:
            super().on_reply(reply, connection)
        else:
            self.group.service.consider(self.group, self, reply)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        if self.group is None:
            super().on_lost(sent, connection)
        else:
            self.group.service.lose(self.group, self)

    def leave_group(self) -> None:
        self.group = None
        self.direct = True

    def look_closely(self) -> None:
        if self.group is not None:
            self.direct = False

    def lacks(self, reply: bytes) -> bool:
        return could_mean_absence(reply)


class WorkSlot(RequestSlot):
    """A slot whose reply comes from a task and not from one node's queue."""

    __slots__ = ("cancel_on_close", "work")

    def __init__(self, requester: Requester, command: Command, work: Work) -> None:
        super().__init__(requester, command, b"", -1)
        self.work = work
        self.cancel_on_close = False

    def keys(self) -> set[bytes]:
        return set()  # nothing of the client's is in flight while its task runs

    async def resolve(self, exchange: Exchange, resp: int, deadline: float) -> bytes:
        return await self.work()  # which sets its own deadline as it begins


class OpenRequests(Requester):
    """The open requests of one client connection. The frontend's connection builds on it."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.hub = exchange.hub
        self.resp = 2
        self.slots: deque[RequestSlot] = deque()  # in request order, answered and not
        self.dirty = False
        self.is_closed = False
        self._retrying: list[RequestSlot] = []
        self._resends = 0
        self._retrying_since = 0.0  # Trio time from which the deadline of what retries is counted
        self._draining = False
        self._working = False  # a task has the retries, or a piece of work
        self._work_scope: trio.CancelScope | None = None  # of work that ends when the client leaves
        self._is_leaving = False
        self.routes_of_slot = exchange.routes.of_slot
        self._kinds = KINDS[2]  # of connection by lane, for this client's RESP version
        self._kind = self._kinds[Lane.WRITE]  # with the lane that its requests in flight are on
        self._mixes = False  # it has pipelined a write behind reads
        self.policy: ReadPolicy | None = None  # None: all its reads are strong, or of one snapshot
        self.preserver = exchange.preserver
        self.snapshot_id = 0  # that its reads are of; 0: of none, CURRENT: of the one that is current at each
        self._is_preserving = False  # it is held until the keys of its next writes are preserved
        self._preserve_refusal: bytes | None = None  # they could not be: the reply of the first such write
        self._preserve_deadline = 0.0  # on Trio's clock; 0: not begun
        self._preserving_for = 0  # the snapshot for which the above are
        self._preserves_several = False  # the refusal may be because of a key of a later write than the next
        self.priority = NORMAL  # an exact int: see ``permits``
        self.priority_rules: Sequence[PriorityRule] = ()  # for keys
        self.permits = Permits(self)
        self._let_through: RequestSlot | None = (
            None  # it had a permit, and only its connection has to be found
        )
        # Of this pass over its requests, which is one synchronous step:
        self._is_collecting = False  # replicas get reads, which the hub sends at the end of the turn
        self._went_to_owner = False  # something was sent to an owner

    @property
    def is_held(self) -> bool:
        """While true, no further command of this client may be dispatched."""
        return bool(self._retrying) or self._draining or self.permits.is_waiting

    def set_resp(self, resp: int) -> None:
        """Speak this RESP version from the next command on."""
        self.resp = resp
        self.exchange.routes.use(resp)
        self.exchange.replicas.use(resp)
        self._kinds = KINDS[resp]
        self._kind = self._kinds[Lane.WRITE]

    # -- dispatching

    def kind_of(self, lane: Lane) -> int:
        """The kind of connection for this client's requests on a lane, whatever else it has in flight."""
        return self._kinds[lane]

    def choose_kind(self, only_reads: bool) -> int | None:
        """The kind of connection for the client's next command: ``routes_of_slot[slot][kind]`` is its route.

        None: it must wait for what is in flight (rule 5).

        Call it before the command's slot is queued.
        """
        if not self._mixes:
            if not self.slots or not self.in_flight():
                self._kind = self._kinds[Lane.READ if only_reads else Lane.WRITE]
            elif not only_reads and self._kind == self._kinds[Lane.READ]:
                self._mixes = True
                self._kind = self._kinds[Lane.WRITE]
                return None
        return self._kind

    def relay(self, command: Command, raw: bytes, hash_slot: int) -> None:
        """Queue a single-slot command whose route may not be ready."""
        policy = self.policy
        is_free = policy is not None and self.may_read_elsewhere(command.only_reads)
        kind = self.choose_kind(command.only_reads)
        if policy is not None:
            if not command.only_reads:
                policy.note_write((hash_slot,))
            else:
                is_suited = command.is_read_at_replicas
                asked = policy.of_simple(raw) if is_suited else policy.asked
                group = self.group_elsewhere(hash_slot, asked, is_free=is_free, is_suited=is_suited)
                if group is not None:
                    read = ReplicaSlot(self, command, raw, hash_slot, group)
                    self.slots.append(read)
                    group.reads.append(read)
                    return
                if not is_suited and self._is_collecting:
                    kind = None
        slot = RequestSlot(self, command, raw, hash_slot)
        self.slots.append(slot)
        # A read that a replica might have served was not asked for a permit at its owner.
        self.send(slot, kind, has_permit=policy is None or not command.only_reads)

    def send(self, slot: RequestSlot, kind: int | None, *, has_permit: bool = True) -> None:
        """Queue a slot of the client's at its owner; ``kind``: see ``choose_kind``. Without a permit it may wait."""
        self.note_at_owner()
        route = None if kind is None else self.routes_of_slot[slot.hash_slot][kind]
        if (
            isinstance(route, NodeConnection)
            and route.ready
            and (has_permit or route.load.has_permit(slot.priority))
        ):
            route.queue(slot)
        else:
            self._let_through = slot if has_permit else None
            self.send_to_owner(slot)

    def priority_of(self, key: bytes) -> int:
        """Of a request whose first key this is."""
        for rule in self.priority_rules:
            if key.startswith(rule.prefix):
                return rule.priority
        return self.priority

    def has_permit(self, hash_slot: int, priority: int, *, only_reads: bool) -> bool:
        """Whether the client's next request, on this slot, may be sent to its owner now.

        If not, it is not to be taken: it waits, or is refused. Where its owner is not connected it may go on: who sends
        it later asks again.
        """
        return self.has_permits((hash_slot,), priority, only_reads=only_reads)

    def has_permits(self, hash_slots: Iterable[int], priority: int, *, only_reads: bool) -> bool:
        """The same for a request on several slots: one permit at each node, however many slots it has there."""
        kind = self._kinds[Lane.READ if only_reads else Lane.WRITE]
        loads: dict[NodeLoad, None] = {}
        for hash_slot in hash_slots:
            route: Route | None = self.routes_of_slot[hash_slot][kind]
            if not isinstance(route, NodeConnection) or not route.ready:
                route = self.exchange.routes.owner(hash_slot, self.resp, Lane.WRITE)
            if route is not None:
                loads[route.load] = None
        if not all(load.has_permit(priority) or self.permits.may_pass(load, priority) for load in loads):
            return False
        self.permits.go()
        return True

    def may_read_elsewhere(self, only_reads: bool) -> bool:
        """Whether the next command may be served by a replica: it reads, and nothing of this client is in flight.

        But for reads of the same pass that replicas serve: those of one key go the same way, in order. What went to
        an owner in this pass is another matter: a replica could answer with something older.
        Call it before the command's slot is queued.
        """
        if not only_reads or self._went_to_owner:
            return False
        if self._is_collecting:
            return True
        if self.slots and self.in_flight():
            return False
        self._mixes = False  # it is held after each pass with such reads, so its writes wait for them anyway
        return True

    @property
    def has_reads_elsewhere(self) -> bool:
        """Replicas get reads of this pass, at its end: what may name one of their keys must not overtake them."""
        return self._is_collecting

    def note_at_owner(self) -> None:
        """Something was sent to an owner in this pass."""
        self._went_to_owner = True

    def begin_pass(self) -> None:
        """The client's requests are looked at from here on until ``end_pass``, in one synchronous step."""
        self._is_collecting = self._went_to_owner = False

    def end_pass(self) -> None:
        """Replicas have reads of this client: nothing more of it is sent until it has the replies."""
        self._is_collecting = False
        self._draining = True

    def group_elsewhere(
        self, hash_slot: int, asked: Asked | None, *, is_free: bool, is_suited: bool
    ) -> ReadGroup | None:
        """The group that takes such a read to a replica; None when it goes to the owner, which is noted.

        ``is_free``: ``may_read_elsewhere`` said so. ``is_suited``: the command can be read at replicas.
        """
        reads = self.exchange.reads
        if asked is None:
            reads.strong_total += 1
            return None
        shard = reads.of_slot[hash_slot]
        policy = self.policy
        assert policy is not None
        if shard is None:
            refusal = Refusal.IN_FLUX
        elif not is_suited:
            refusal = Refusal.COMMAND
        elif not is_free:
            refusal = Refusal.IN_FLIGHT
        elif not shard.has_readable:
            refusal = Refusal.NOT_READABLE
        else:
            self._is_collecting = True
            return reads.group(shard, asked, policy.session if asked.is_session else None)
        reads.refusals[refusal] += 1
        asked.counts.at_owner += 1
        if policy.session is not None:
            policy.session.read_at_owner(hash_slot)
        return None

    def send_to_owner(self, slot: RequestSlot, since: float | None = None) -> None:
        """After what is in flight: by rule 5, by rule 4 while the slot is moving, or when its node is back.

        ``since``: when it began to wait, if not now.
        """
        owner = self.exchange.routes.owner(slot.hash_slot, self.resp, Lane.WRITE)
        if owner is not None:
            self._retry(slot, Moved(slot.hash_slot, owner.address), since)
            self.hub.touched(self)
        else:
            self.retry(slot, "the slot's node takes no requests", since)

    def start_work(self, command: Command, work: Work, *, cancel_on_close: bool = False) -> None:
        """Run ``work`` for its reply when all earlier requests are answered; the client is held until it is.

        ``cancel_on_close``: nobody but this client wants it done, so it ends when the client leaves.
        """
        slot = WorkSlot(self, command, work)
        slot.cancel_on_close = cancel_on_close
        self.slots.append(slot)
        self.retry(slot, "work")

    def cancel_work(self) -> None:
        """The client left: end the work that only it wanted, also what has not begun."""
        self._is_leaving = True
        if self._work_scope is not None:
            self._work_scope.cancel()

    def hold_for(self, slot: RequestSlot) -> bool:
        """Hold the client until ``slot`` is answered; False when it is not all that the client has in flight."""
        if any(other.reply is None and other is not slot for other in self.slots):
            return False
        if not self._retrying:
            self._retrying_since = trio.current_time()
        if slot not in self._retrying:
            self._retrying.append(slot)
        return True

    def in_flight(self) -> bool:
        """Whether any request is unanswered."""
        for slot in self.slots:  # noqa: SIM110  # asked for each reply, and ``any`` costs twice as much
            if slot.reply is None:
                return True
        return False

    # -- writes while a snapshot is open

    def unpreserved(self, wanted: Mapping[int, Collection[bytes]]) -> Mapping[int, Collection[bytes]]:
        """Of the keys that are to be written, by hash slot, those that may not be in this step.

        Those whose route is not ready may: whoever sends them later sees to it.
        """
        kind = self._kinds[Lane.WRITE]
        missing: dict[int, Collection[bytes]] = {}
        for hash_slot, keys in wanted.items():
            route = self.routes_of_slot[hash_slot][kind]
            if route.ready and not route.known.issuperset(keys):  # type: ignore[union-attr]  # as in ``_relay_simple``
                missing[hash_slot] = keys
        if not missing:
            self.end_preserving()
        return missing

    def take_preserve_refusal(self) -> bytes | None:
        """The reply of a write that may not be sent, if that is because its keys could not be preserved."""
        refusal, self._preserve_refusal = self._preserve_refusal, None
        if refusal is not None and self._preserving_for == self.preserver.newest:
            self._preserve_deadline = 0.0
            return refusal
        return None

    def end_preserving(self) -> None:
        """The write for which the client was held last goes on: what follows has its own time."""
        self._preserve_deadline = 0.0
        self._preserve_refusal = None

    def preserve(self, missing: Mapping[int, Collection[bytes]], *, several: bool = False) -> None:
        """Hold the client until these are preserved, or cannot be. ``several``: they are of more than one write."""
        newest = self.preserver.newest
        if not self._preserve_deadline or self._preserving_for != newest:
            self._preserve_deadline = trio.current_time() + self.exchange.deadline_seconds
        deadline = self._preserve_deadline
        self._preserving_for = newest
        self._preserves_several = several
        self._is_preserving = self._draining = True

        async def work() -> bytes:
            return await self.exchange.preserver.preserve(missing, self.resp, deadline) or b""

        def deliver(reply: bytes) -> None:
            self._is_preserving = False
            self._preserve_refusal = reply or None
            self.hub.touched(self)

        self.exchange.start(work, deliver, trio.CancelScope())

    def hold_until_drained(self) -> None:
        if not self._draining and self.in_flight():
            self._draining = True
            self.hub.touched(self)

    # -- what comes back

    def on_attention(self, slot: ReplySlot, reply: bytes, connection: NodeConnection) -> None:
        redirect = self.exchange.understand(
            reply, connection, from_script=slot.command.name in SCRIPT_COMMANDS
        )
        assert isinstance(slot, RequestSlot)
        if redirect is None:
            slot.reply = reply
        elif isinstance(redirect, NoScript):
            healed = self.exchange.scripts.heal(slot.raw)
            if healed is None:
                slot.reply = reply
            else:
                slot.raw = healed
                self._retry(
                    slot, Moved(slot.hash_slot, connection.address)
                )  # the same node, the whole script
        else:
            self._retry(slot, redirect)
        self.hub.touched(self)

    def on_lost(self, slot: ReplySlot, sent: bool, connection: NodeConnection) -> None:
        assert isinstance(slot, RequestSlot)
        if sent and not slot.command.is_readonly:
            slot.reply = self.exchange.outcome_unknown(f"the connection to {connection.address} ended")
            self.hub.touched(self)
        else:
            self.exchange.topology.refresh_soon()
            self._retry(
                slot,
                Wait(f"the connection to {connection.address} ended", sent),
                connection.waiting_since,
            )
            self.hub.touched(self)

    def retry(self, slot: RequestSlot, reason: str, since: float | None = None) -> None:
        """``slot`` was not run: send it when it can be. ``since``: when it began to wait, if not now."""
        self._retry(slot, Wait(reason, was_sent=False), since)
        self.hub.touched(self)

    def _retry(self, slot: RequestSlot, redirect: Moved | Ask | Wait, since: float | None = None) -> None:
        slot.redirect = redirect
        if not self._retrying:
            self._retrying_since = trio.current_time()
        if since is not None:
            self._retrying_since = min(self._retrying_since, since)
        if slot not in self._retrying:
            self._retrying.append(slot)

    # -- moving on; called when the client is flushed

    def advance(self) -> None:
        """Send retries that may go now, and let go of the client when nothing holds it any more."""
        if self._retrying and not self._working:
            waiting = [slot for slot in self.slots if slot.reply is None and slot.redirect is not None]
            unanswered = sum(1 for slot in self.slots if slot.reply is None)
            if waiting and len(waiting) == unanswered:
                self._send_again(waiting)
            elif not any(slot.reply is None for slot in self._retrying):
                self._retrying.clear()
                self._resends = 0
        if self._draining and not self._is_preserving and not self.in_flight():
            self._draining = False

    def _send_again(self, waiting: list[RequestSlot]) -> None:
        for slot in waiting:
            if self._was_overtaken(slot):
                slot.reply = slot.overtaken_reply()
                slot.redirect = None
        waiting = [slot for slot in waiting if slot.reply is None]
        self._resends += 1
        # Nothing else is in flight, so the lane is free to choose, but it is one for all of them.
        lane = Lane.READ if all(slot.command.only_reads for slot in waiting) else Lane.WRITE
        targets = [self._target(slot, lane) for slot in waiting]
        if self._resends <= RESENDS_MAX and all(targets):
            for slot, target in zip(waiting, targets, strict=True):
                assert target is not None
                asking = isinstance(slot.redirect, Ask)
                slot.redirect = None
                if asking:
                    target.queue_asking(slot)
                else:
                    target.queue(slot)
        elif waiting:
            self._working = True
            self._resolve_next(deque(waiting))
        self.hub.touched(self)

    def _target(self, slot: RequestSlot, lane: Lane) -> NodeConnection | None:
        """Where a plain slot can be queued again at once, or None when a task must see to it."""
        if type(slot) is not RequestSlot and type(slot) is not ReplicaSlot:
            return None
        if self.exchange.preserver.newest and not slot.command.only_reads:
            return None  # it has to be preserved where it goes now
        match slot.redirect:
            case Moved(_, address) | Ask(_, address):
                target = self.exchange.routes.node(address, self.resp, lane)
                if target is None:
                    return None
                if slot is not self._let_through and not target.load.has_permit(slot.priority):
                    return None
                return target
        return None

    def _resolve_next(self, waiting: deque[RequestSlot]) -> None:
        """Resolve the first of ``waiting`` in a task, then the next, in order."""
        if not waiting or self.is_closed:
            self._working = False
            self.hub.touched(self)
            return
        slot = waiting.popleft()

        def deliver(reply: bytes) -> None:
            self._work_scope = None
            slot.reply = reply
            slot.redirect = None
            self.hub.touched(self)
            self._resolve_next(waiting)

        scope = trio.CancelScope()
        if isinstance(slot, WorkSlot) and slot.cancel_on_close:
            self._work_scope = scope
            if self._is_leaving:
                scope.cancel()
        deadline = self._retrying_since + self.exchange.deadline_seconds
        self.exchange.start(lambda: slot.resolve(self.exchange, self.resp, deadline), deliver, scope)

    def _was_overtaken(self, slot: RequestSlot) -> bool:
        """Rule 3: a later request on one of its keys has run, and one of the two may write."""
        later: Iterable[RequestSlot] = (
            other
            for other in list(self.slots)[self.slots.index(slot) + 1 :]
            if other.may_write or slot.may_write
        )
        mine: set[bytes] | None = None
        for other in later:
            theirs = other.keys_run()
            if not theirs:
                continue
            mine = slot.keys() if mine is None else mine
            if mine & theirs:
                return True
        return False
