"""MULTI ... EXEC: a client's queued commands, sent to one node as one block.

The client's commands between MULTI and EXEC are kept here and answered +QUEUED. At EXEC the whole block goes to the
node of its slot in one step, so that no other client's command comes between, and the shared connection serves.
If the client watches keys, the block goes over the connection of its own on which it watched them.

A node checks each command of a block for redirection when it is queued, and the block again at EXEC: the block runs
whole or not at all, so a block that was turned away can be sent again whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from proxy.exchange.exchange import HOPS_MAX, Exchange
from proxy.exchange.failures import not_ready
from proxy.exchange.open_requests import OpenRequests, RequestSlot
from proxy.protocol.encode import EMPTY_ARRAY, array, error, frame
from proxy.protocol.replies import elements
from proxy.upstream.connect import ConnectError
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ASKING, ConnectionLostError, Discard, Slot, Waiter
from routing.command import Command, lookup
from routing.redirect import Ask, Moved, Redirect, Wait, needs_attention

MULTI = frame([b"MULTI"])
EXEC = frame([b"EXEC"])
_EXEC_COMMAND = lookup([b"EXEC"])
assert _EXEC_COMMAND is not None


@dataclass(frozen=True, slots=True)
class Queued:
    """One command between MULTI and EXEC."""

    command: Command
    raw: bytes
    hash_slot: int  # -1: it names no key and runs wherever the block runs
    keys: tuple[bytes, ...]


@dataclass(slots=True)
class Transaction:
    """What a client has queued since MULTI. ``failed``: a command was refused, so EXEC must discard."""

    queued: list[Queued] = field(default_factory=list)
    failed: bool = False
    bytes_queued: int = 0

    def blocks(self) -> list[list[Queued]]:
        """The commands by slot, in the order in which the slots were first named; keyless ones join the first."""
        by_slot: dict[int, list[Queued]] = {}
        first = next((item.hash_slot for item in self.queued if item.hash_slot >= 0), -1)
        for item in self.queued:
            by_slot.setdefault(item.hash_slot if item.hash_slot >= 0 else first, []).append(item)
        return list(by_slot.values())


class BlockStep(Slot):
    """The slot of MULTI, of a queued command or of EXEC within one sending of a block."""

    __slots__ = ("attempt", "hash_slot", "is_exec", "raw", "requester")

    def __init__(self, attempt: BlockAttempt, raw: bytes, *, is_exec: bool) -> None:
        self.attempt = attempt
        self.requester = attempt.requester
        self.hash_slot = attempt.hash_slot
        self.raw = raw
        self.is_exec = is_exec

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if self.is_exec:
            self.attempt.on_exec(reply, connection)
        elif self.raw is MULTI:
            self.attempt.multi_reply = reply
        elif needs_attention(reply) and self.attempt.refused is None:
            self.attempt.refused = reply

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        if self.is_exec:
            self.attempt.on_lost(sent, connection)


class BlockAttempt:
    """One sending of a block: MULTI, the commands, EXEC. Its result is a reply, a redirect or a loss."""

    def __init__(self, slot: BlockSlot) -> None:
        self.slot = slot
        self.requester = slot.requester
        self.hash_slot = slot.hash_slot
        self.multi_reply = b""
        self.refused: bytes | None = None  # the first step's error that is about the cluster

    def queue(self, connection: NodeConnection, *, asking: bool = False) -> None:
        """Queue the whole block in one step."""
        slots: list[Slot] = [Discard(ASKING)] if asking else []
        slots.append(BlockStep(self, MULTI, is_exec=False))
        slots += [BlockStep(self, item.raw, is_exec=False) for item in self.slot.queued]
        slots.append(BlockStep(self, EXEC, is_exec=True))
        connection.queue_all(slots)

    def on_exec(self, reply: bytes, connection: NodeConnection) -> None:
        if self.multi_reply[:1] == b"-":
            # Nothing but missing rights makes a node refuse MULTI; what followed ran outside a transaction.
            self.slot.on_result(multi_refused(self.multi_reply))
            return
        exchange = self.slot.open_requests.exchange
        refusal = self.refused if self.refused is not None and reply[0] == 45 else reply
        redirect = exchange.understand(refusal, connection) if needs_attention(refusal) else None
        self.slot.on_result(reply if redirect is None else redirect)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        reason = f"the connection to {connection.address} ended"
        if sent and self.slot.may_write:
            self.slot.on_result(self.slot.open_requests.exchange.outcome_unknown(reason))
        else:
            self.slot.on_result(Wait(reason), connection.waiting_since)


class BlockSlot(RequestSlot):
    """The client's slot for EXEC over one hash slot."""

    __slots__ = ("_result_event", "open_requests", "queued", "result")

    def __init__(self, open_requests: OpenRequests, queued: Sequence[Queued], hash_slot: int) -> None:
        assert _EXEC_COMMAND is not None
        super().__init__(open_requests, _EXEC_COMMAND, b"", hash_slot)
        self.open_requests = open_requests
        self.queued = tuple(queued)
        self.result: bytes | Redirect | None = None
        self._result_event: trio.Event | None = None  # set while a task, and not the client's queue, waits

    def keys(self) -> set[bytes]:
        return {key for item in self.queued for key in item.keys}

    def keys_written(self) -> list[bytes]:
        return written_keys(self.queued)

    @property
    def may_write(self) -> bool:
        return any(not item.command.is_readonly for item in self.queued)

    @property
    def only_reads(self) -> bool:
        """A node that pauses writes runs it."""
        return all(item.command.only_reads for item in self.queued)

    def on_result(self, result: bytes | Redirect, since: float | None = None) -> None:
        """One sending ended. ``since``: when a lost one was sent."""
        self.result = result
        if self._result_event is not None:
            self._result_event.set()
        elif isinstance(result, bytes):
            self.reply = result
            self.open_requests.hub.touched(self.open_requests)
        else:
            self.open_requests.retry(self, "the transaction's slot moved", since)

    async def resolve(self, exchange: Exchange, resp: int, deadline: float) -> bytes:
        """Send the block again until it runs or the deadline is over."""
        lane = Lane.READ if self.only_reads else Lane.WRITE
        redirect = self.result
        hops = attempt = 0
        reason = "the slot's node takes no requests"
        writes = self.keys_written()
        while trio.current_time() < deadline:
            if writes and exchange.preserver.needs(self.hash_slot, writes, resp):
                refused = await exchange.preserver.preserve({self.hash_slot: writes}, resp, deadline)
                if refused is not None:
                    return refused
            match redirect:
                case Ask(_, address):
                    connection = exchange.routes.node(address, resp, lane)
                    hops += 1
                case Moved():
                    connection = exchange.routes.owner(self.hash_slot, resp, lane)
                    hops += 1
                case _:
                    if isinstance(redirect, Wait):
                        reason = redirect.reason
                        hops = HOPS_MAX
                    connection = exchange.routes.owner(self.hash_slot, resp, lane)
            if connection is None or hops >= HOPS_MAX:
                await exchange.pause(attempt, deadline)
                attempt += 1
                hops = 0
                redirect = None
                continue
            self.result = None
            self._result_event = trio.Event()
            BlockAttempt(self).queue(connection, asking=isinstance(redirect, Ask))
            with trio.move_on_at(deadline):
                await self._result_event.wait()
            if isinstance(self.result, bytes):
                return self.result
            redirect = self.result
            if redirect is None:
                reason = f"{connection.address} did not reply within {exchange.deadline_seconds:g} s"
                if self.may_write:
                    return exchange.outcome_unknown(reason)
        exchange.expired_total += 1
        return not_ready(f"the transaction on slot {self.hash_slot}", exchange.deadline_seconds, reason)


def written_keys(queued: Sequence[Queued]) -> list[bytes]:
    """All keys of those commands that do not only read: what they may write, and a little more."""
    return [key for item in queued if not item.command.only_reads for key in item.keys]


def dispatch_block(open_requests: OpenRequests, queued: Sequence[Queued], hash_slot: int) -> None:
    """Send a transaction of one slot over the shared connection. The caller has seen that the client is not held."""
    slot = BlockSlot(open_requests, queued, hash_slot)
    kind = open_requests.choose_kind(slot.only_reads)
    open_requests.slots.append(slot)
    route = None if kind is None else open_requests.routes_of_slot[hash_slot][kind]
    if isinstance(route, NodeConnection) and route.ready and not open_requests.has_reads_elsewhere:
        open_requests.note_at_owner()
        BlockAttempt(slot).queue(route)
    else:
        open_requests.retry(slot, "the slot is moving or its node takes no requests, or reads are in flight")


async def run_blocks(open_requests: OpenRequests, transaction: Transaction) -> bytes:
    """Run a transaction over several slots as one transaction per slot, in order; the replies in queued order.

    A block that fails ends the run: the error says how many of the blocks ran.
    """
    exchange = open_requests.exchange
    replies: dict[int, bytes] = {}  # id of the queued command -> its reply
    blocks = transaction.blocks()
    deadline = trio.current_time() + exchange.deadline_seconds
    for number, block in enumerate(blocks):
        slot = BlockSlot(open_requests, block, block[0].hash_slot)
        reply = await slot.resolve(exchange, open_requests.resp, deadline)
        if reply[0] == 45:
            ran = f"; {number} of its {len(blocks)} per-slot transactions ran before it" if number else ""
            return reply[:-2] + ran.encode() + b"\r\n"
        for item, item_reply in zip(block, elements(reply), strict=True):
            replies[id(item)] = item_reply
    if not replies:
        return EMPTY_ARRAY
    return array([replies[id(item)] for item in transaction.queued])


class Watch:
    """Keys that a client watches, on a connection of its own. They must share one slot, as the transaction must."""

    def __init__(self, connection: NodeConnection, hash_slot: int, asking: bool) -> None:
        self.connection = connection
        self.hash_slot = hash_slot
        self.asking = asking  # the slot is on its way, and the keys were found at its target

    async def run(self, queued: Sequence[Queued], exchange: Exchange, resp: int) -> bytes:
        """MULTI, the commands and EXEC where the keys are watched.

        If the slot moved or the connection ended before EXEC was sent, nothing ran, and the reply is that of a
        watched key that changed: the client starts over from WATCH. Closes the connection if it is not clean.
        """
        writes = written_keys(queued)
        deadline = trio.current_time() + exchange.deadline_seconds
        if writes and exchange.preserver.needs(self.hash_slot, writes, resp):
            # By the owner's shared connection. If the slot has another owner by now, the block does not run at all.
            refused = await exchange.preserver.preserve({self.hash_slot: writes}, resp, deadline)
            if refused is not None:
                self.connection.close("the transaction was not sent")  # it watches the keys still
                return refused
        if self.connection.is_closed:
            return array_nil(resp)
        frames = [MULTI, *[item.raw for item in queued], EXEC]
        waiters = [Waiter(raw, self.hash_slot) for raw in frames]
        replies: list[bytes] = []
        asking = [Discard(ASKING)] if self.asking else []
        self.connection.queue_all([*asking, *waiters])
        try:
            with trio.move_on_at(deadline):
                for waiter in waiters:
                    replies.append(await waiter.wait_reply())  # noqa: PERF401  # flake8-async sees no await in one
        except ConnectionLostError as lost:
            return array_nil(resp) if not lost.sent else exchange.outcome_unknown(str(lost))
        if len(replies) < len(waiters):
            late = f"{self.connection.address} did not reply within {exchange.deadline_seconds:g} s"
            self.connection.close(late)
            return exchange.outcome_unknown(late)
        if replies[0][:1] == b"-":
            self.connection.close("MULTI refused")  # it watches the keys still
            return multi_refused(replies[0])
        refused = next((reply for reply in replies if needs_attention(reply)), None)
        if refused is not None and exchange.understand(refused, self.connection) is not None:
            return array_nil(resp)
        return replies[-1]


async def watch(
    raw: bytes, hash_slot: int, exchange: Exchange, resp: int, held: Watch | None
) -> Watch | bytes:
    """Watch the keys of a WATCH frame, with those of ``held`` if there are any; an error reply if that fails."""
    deadline = trio.current_time() + exchange.deadline_seconds
    attempt = 0
    target = held.connection.address if held is not None else None
    asking = held.asking if held is not None else False
    reason = "no node serves the slot"
    while trio.current_time() < deadline:
        if target is None:
            primary = exchange.topology.view.primary_of(hash_slot)
            target = None if primary is None else primary.address
        if target is not None:
            connection = held.connection if held is not None else None
            reply: bytes | None = None
            try:
                with trio.move_on_at(deadline):
                    if connection is None:
                        connection = await exchange.private.acquire(target, resp)
                    reply = await connection.request(raw, asking=asking)
            except (ConnectError, ConnectionLostError) as error:
                reason = str(error)
                if held is not None:
                    return not_ready(f"WATCH on slot {hash_slot}", 0, reason)
            else:
                if reply is None or connection is None:
                    reason = f"{target} did not reply"
                    if connection is not None:
                        exchange.private.discard(connection)
                    break
                redirect = exchange.understand(reply, connection) if needs_attention(reply) else None
                if redirect is None:
                    if reply[0] == 45:
                        if held is None:  # else it watches the earlier keys still
                            exchange.private.release(connection)
                        return reply
                    return Watch(connection, hash_slot, asking)
                if held is not None:
                    # The earlier keys were watched on the former owner: nothing can watch all of them at once.
                    return held_elsewhere(hash_slot)
                exchange.private.release(connection)
                reason = str(redirect)
                if isinstance(redirect, Moved | Ask):
                    target, asking = redirect.address, isinstance(redirect, Ask)
                    attempt += 1
                    if attempt <= HOPS_MAX:
                        continue
        await exchange.pause(attempt, deadline)
        attempt += 1
        target, asking = None, False
    exchange.expired_total += 1
    return not_ready(f"WATCH on slot {hash_slot}", exchange.deadline_seconds, reason)


def multi_refused(reply: bytes) -> bytes:
    """The error of a transaction whose MULTI the node refused."""
    return reply[:-2] + b"; the node refused MULTI, so the commands may have run one by one\r\n"


def held_elsewhere(hash_slot: int) -> bytes:
    """The error of a WATCH whose slot moved after an earlier WATCH."""
    return error(
        f"NOTREADY slot {hash_slot} moved since this connection's earlier WATCH; UNWATCH and watch all keys again"
    )


def array_nil(resp: int) -> bytes:
    """The reply of an EXEC that a watch aborted."""
    return b"_\r\n" if resp == 3 else b"*-1\r\n"
