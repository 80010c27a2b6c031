"""Commands over several slots that are split, sent in parts and merged: MGET MSET DEL UNLINK EXISTS TOUCH.

A part is the same command on the keys of one slot. Parts go out in one step with the client's other commands, so
the order of one client's commands on one key holds. A part that a node turns away, because its slot is split
between two nodes or has moved, is resolved key by key: a single key is either here or there, never both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.failures import ran_in_part
from proxy.exchange.open_requests import OpenRequests, RequestSlot
from proxy.exchange.read_groups import ReadGroup, ReadSlot
from proxy.exchange.routes import IN_FLUX
from proxy.protocol.absence import lacks_a_value
from proxy.protocol.encode import OK, array, frame, integer
from proxy.protocol.replies import elements
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from routing.command import Command
from routing.redirect import Ask, Moved, Redirect, Wait, needs_attention
from routing.slot import slot_of

SENDINGS_MAX = 6  # of one part; after that a task waits in between

Merge = Callable[[Sequence["Part"], int], bytes]


@dataclass(frozen=True, slots=True)
class SplitRule:
    """How one command is split. ``step`` arguments belong to each key, the key first."""

    step: int
    merge: Merge


class Part(ReadSlot):
    """The command on some keys of one slot. ``indexes`` are the keys' places in the client's request."""

    __slots__ = ("group", "hash_slot", "indexes", "parent", "raw", "reply", "requester", "sendings", "words")

    def __init__(self, parent: SplitSlot, name: bytes, hash_slot: int) -> None:
        self.parent = parent
        self.requester = parent.requester
        self.hash_slot = hash_slot
        self.indexes: list[int] = []
        self.words: list[bytes] = [name]
        self.raw = b""
        self.reply: bytes | None = None
        self.sendings = 1
        self.group: ReadGroup | None = None  # while a replica has it

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if self.group is not None:
            self.group.service.consider(self.group, self, reply)
            return
        exchange = self.parent.open_requests.exchange
        redirect = exchange.understand(reply, connection) if needs_attention(reply) else None
        if redirect is None:
            self.answer(reply)
        elif not self.parent.send_again(self, redirect, connection):
            self.parent.on_part(None)

    def answer(self, reply: bytes) -> None:
        """Take ``reply`` as it is."""
        self.reply = reply
        self.parent.on_part(reply)

    def wait_for_owner(self, since: float) -> None:
        """It went elsewhere: have it done again, at its owner."""
        self.parent.on_part(None, since)

    def leave_group(self) -> None:
        self.group = None

    def look_closely(self) -> None:
        """Each of its replies is."""

    def lacks(self, reply: bytes) -> bool:
        return lacks_a_value(reply)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        if self.group is not None:
            self.group.service.lose(self.group, self)
            return
        if sent and not self.parent.command.is_readonly:
            exchange = self.parent.open_requests.exchange
            self.reply = exchange.outcome_unknown(f"the connection to {connection.address} ended")
        self.parent.on_part(self.reply, connection.waiting_since)


class SplitSlot(RequestSlot):
    """The client's slot of a split command: answered when all its parts are."""

    __slots__ = (
        "arguments",
        "cuts",
        "is_resolving",
        "open_requests",
        "parts",
        "pending",
        "rule",
        "waiting_since",
    )

    def __init__(
        self, open_requests: OpenRequests, command: Command, arguments: list[bytes], rule: SplitRule
    ) -> None:
        super().__init__(open_requests, command, b"", -1)
        self.open_requests = open_requests
        self.arguments = arguments
        self.rule = rule
        self.parts = _parts(self)
        self.pending = 0
        self.waiting_since: float | None = None  # since when a part that is to be done again was owed
        self.cuts = open_requests.exchange.snapshots.cuts  # snapshots' cuts before it
        self.is_resolving = False

    def keys(self) -> set[bytes]:
        step = self.rule.step
        if self.reply is not None:
            return set(self.arguments[1::step])
        return {key for part in self.parts if part.reply is None for key in part.words[1::step]}

    def keys_run(self) -> set[bytes]:
        return super().keys_run() or {
            key for part in self.parts if part.reply is not None for key in part.words[1 :: self.rule.step]
        }

    def on_part(self, reply: bytes | None, since: float | None = None) -> None:
        """One part came back: answered, or with None to be done again. ``since``: when a lost one was sent."""
        self.pending -= 1
        if reply is None and since is not None:
            self.waiting_since = since if self.waiting_since is None else min(since, self.waiting_since)
        if self.pending:
            return
        if any(part.reply is None for part in self.parts):
            self._note_gap()
            self.open_requests.retry(self, "a slot of the command moved", self.waiting_since)
        else:
            self.reply = self._merged()
            self.open_requests.hub.touched(self.open_requests)

    def _note_gap(self) -> None:
        """Of a write, some parts may have run and others not: no snapshot may be cut now, or just have been."""
        if self.may_write:
            snapshots = self.open_requests.exchange.snapshots
            snapshots.spoil(self.cuts, "a write over several slots was turned away in part")
            if not self.open_requests.is_closed:  # else nobody finishes it
                snapshots.add_multi(self)

    def give_up(self) -> None:
        if not self.is_resolving:
            self.open_requests.exchange.snapshots.end_multi(self)

    def send_again(self, part: Part, redirect: Redirect, connection: NodeConnection) -> bool:
        """Send a part that ``connection`` turned away again in this turn; False when it must wait.

        Only if nothing else of the client is in flight (rule 2 of open_requests.py); the client is held
        meanwhile. Keys that are on two nodes go one by one, each to the owner first.
        """
        exchange, resp = self.open_requests.exchange, self.open_requests.resp
        lane = Lane.READ if self.command.is_readonly else Lane.WRITE
        if self.may_write and exchange.preserver.newest:
            return False  # its keys have to be preserved where they go now
        if part.sendings >= SENDINGS_MAX or not self.open_requests.hold_for(self):
            return False
        match redirect:
            case Moved(_, address) | Ask(_, address):
                target = exchange.routes.node(address, resp, lane)
                if target is None:
                    return False
                part.sendings += 1
                if isinstance(redirect, Ask):
                    target.queue_asking(part)
                else:
                    target.queue(part)
                return True
            case Wait(reason) if reason.startswith("TRYAGAIN") and len(part.indexes) > 1:
                owner = exchange.routes.owner(part.hash_slot, resp, lane)
                if owner is None:
                    return False
                singles = self._key_by_key(part)
                at = self.parts.index(part)
                self.parts[at : at + 1] = singles
                self.pending += len(singles) - 1
                owner.queue_all(singles)
                return True
        return False

    async def resolve(self, exchange: Exchange, resp: int, deadline: float) -> bytes:
        """Do the unanswered parts key by key, then merge."""
        self.is_resolving = True
        if not self.may_write:
            return await self._resolve(exchange, resp, deadline)
        async with exchange.snapshots.begin_multi(self):
            return await self._resolve(exchange, resp, deadline)

    async def _resolve(self, exchange: Exchange, resp: int, deadline: float) -> bytes:
        async def one(part: Part, single: Part) -> None:
            single.reply = await exchange.execute(
                single.raw,
                part.hash_slot,
                resp=resp,
                repeatable=self.command.is_readonly,
                deadline=deadline,
                writes=single.words[1 :: self.rule.step] if self.may_write else (),
            )

        undone = [part for part in self.parts if part.reply is None]
        singles = {id(part): self._key_by_key(part) for part in undone}
        async with trio.open_nursery() as nursery:
            for part in undone:
                for single in singles[id(part)]:
                    nursery.start_soon(one, part, single)
        self.parts = [single for part in self.parts for single in singles.get(id(part), [part])]
        return self._merged()

    def _key_by_key(self, part: Part) -> list[Part]:
        """A part for each key. Of a key that MSET names twice the last value counts, so it is sent once."""
        step = self.rule.step
        words_of = [part.words[at : at + step] for at in range(1, len(part.words), step)]
        last = {words[0]: words for words in words_of}
        singles = []
        for index, words in zip(part.indexes, words_of, strict=True):
            if step > 1 and last[words[0]] is not words:
                continue
            single = Part(self, part.words[0], part.hash_slot)
            single.indexes.append(index)
            single.words += words
            single.raw = frame(single.words)
            singles.append(single)
        return singles

    def _merged(self) -> bytes:
        failed = [part.reply for part in self.parts if part.reply is not None and part.reply[0] == 45]
        if not failed:
            return self.rule.merge(self.parts, len(self.arguments[1 :: self.rule.step]))
        failed.sort(
            key=lambda reply: not reply.startswith(b"-OUTCOMEUNKNOWN")
        )  # no other error may speak for it
        ran = len(self.parts) - len(failed)
        return failed[0] if not ran or not self.may_write else ran_in_part(failed[0], ran, len(self.parts))

    def overtaken_reply(self) -> bytes:
        self.open_requests.exchange.snapshots.end_multi(self)
        reply = super().overtaken_reply()
        ran = sum(part.reply is not None for part in self.parts)
        return ran_in_part(reply, ran, len(self.parts)) if ran and self.may_write else reply


def _parts(slot: SplitSlot) -> list[Part]:
    step = slot.rule.step
    arguments = slot.arguments
    by_hash_slot: dict[int, Part] = {}
    for index, at in enumerate(range(1, len(arguments), step)):
        hash_slot = slot_of(arguments[at])
        part = by_hash_slot.get(hash_slot)
        if part is None:
            part = by_hash_slot[hash_slot] = Part(slot, arguments[0], hash_slot)
        part.indexes.append(index)
        part.words += arguments[at : at + step]
    for part in by_hash_slot.values():
        part.raw = frame(part.words)
    return list(by_hash_slot.values())


def dispatch_split(
    open_requests: OpenRequests, command: Command, arguments: list[bytes], raw: bytes, priority: int
) -> bool:
    """Send a splittable command of one client, each part to its slot's node.

    False when it was not taken, because a node has no permit for it: one at each node is enough for all its parts.
    """
    slot = SplitSlot(open_requests, command, arguments, SPLIT_RULES[command.name])
    # With a policy, replicas may serve the parts of a read.
    if (open_requests.policy is None or not command.only_reads) and not open_requests.has_permits(
        [part.hash_slot for part in slot.parts], priority, only_reads=command.is_readonly
    ):
        return False
    lane = Lane.READ if command.is_readonly else Lane.WRITE
    is_alone = not open_requests.in_flight()
    is_behind_reads = open_requests.has_reads_elsewhere
    elsewhere = _parts_elsewhere(open_requests, slot)
    kind = open_requests.choose_kind(command.is_readonly)
    open_requests.slots.append(slot)
    connections: list[NodeConnection] = []
    owners_parts = [part for part in slot.parts if part not in elsewhere]
    if is_behind_reads and owners_parts and _may_share_a_key(open_requests, command):
        open_requests.retry(slot, "it follows reads at replicas")
        return True
    for part in owners_parts:
        route = None if kind is None else open_requests.routes_of_slot[part.hash_slot][kind]
        if route is IN_FLUX and is_alone and not (slot.may_write and open_requests.exchange.preserver.newest):
            # rule 4: one by one
            route = open_requests.exchange.routes.owner(part.hash_slot, open_requests.resp, lane)
        if not isinstance(route, NodeConnection) or not route.ready:
            open_requests.retry(slot, "a slot of the command is moving, or its node takes no requests")
            return True
        connections.append(route)
    slot.pending = len(slot.parts)
    if slot.pending == 1:
        slot.parts[0].raw = raw
    is_moving = not open_requests.exchange.routes.in_flux.isdisjoint(part.hash_slot for part in slot.parts)
    if is_moving:
        open_requests.hold_for(slot)
    for part, connection in zip(owners_parts, connections, strict=True):
        connection.queue(part)
    if owners_parts:
        open_requests.note_at_owner()
    for part, group in elsewhere.items():
        part.group = group
        group.reads.append(part)
    return True


def _may_share_a_key(open_requests: OpenRequests, command: Command) -> bool:
    """Whether a part that goes to the owner may name a key that earlier commands of this pass read at replicas.

    A part of MGET goes there for its slot's sake, and then they did, too; or for its keys' rules.
    """
    policy = open_requests.policy
    return command.name != "MGET" or (policy is not None and policy.looks_at_keys)


def _parts_elsewhere(open_requests: OpenRequests, slot: SplitSlot) -> dict[Part, ReadGroup]:
    """The parts that replicas may serve; each part of a read counts as one.

    A part of EXISTS, a number, would not show which of its keys is missing.
    """
    policy, command = open_requests.policy, slot.command
    found: dict[Part, ReadGroup] = {}
    if policy is None:
        if command.only_reads:
            open_requests.exchange.reads.strong_total += len(slot.parts)
        return found
    if not command.only_reads:
        policy.note_write([part.hash_slot for part in slot.parts])
        return found
    is_free = open_requests.may_read_elsewhere(only_reads=True)
    for part in slot.parts:
        asked = policy.of_keys(part.words[1:])
        group = open_requests.group_elsewhere(
            part.hash_slot, asked, is_free=is_free, is_suited=command.name == "MGET"
        )
        if group is not None:
            found[part] = group
    if policy.session is not None and len(found) < len(slot.parts):
        policy.session.read_somewhere()  # the owners may be asked after the floors
    return found


def _merge_values(parts: Sequence[Part], count: int) -> bytes:
    values = [b""] * count
    for part in parts:
        assert part.reply is not None
        for index, value in zip(part.indexes, elements(part.reply), strict=True):
            values[index] = value
    return array(values)


def _merge_sum(parts: Sequence[Part], count: int) -> bytes:
    return integer(sum(int(part.reply[1:-2]) for part in parts if part.reply is not None))


def _merge_ok(parts: Sequence[Part], count: int) -> bytes:
    return OK


SPLIT_RULES = {
    "MGET": SplitRule(1, _merge_values),
    "MSET": SplitRule(2, _merge_ok),
    "DEL": SplitRule(1, _merge_sum),
    "UNLINK": SplitRule(1, _merge_sum),
    "EXISTS": SplitRule(1, _merge_sum),
    "TOUCH": SplitRule(1, _merge_sum),
}
