"""One client's subscriptions to channels, patterns and sharded channels.

    SUBSCRIBE ... -> change(), a task -> the lines to the nodes -> the confirmations, a reply in its place
    a message -> a turn of the hub -> held, or written to the client at the end of the turn

Channels and patterns are carried by one line to any primary, because the cluster bus takes a PUBLISH to
every node; sharded channels by a line to each of their owners. Lines are this client's own and speak RESP3,
whatever the client speaks; its counts are the proxy's own too. PUBLISH and SPUBLISH are relayed like any
command, so the number that they answer is that of the subscribers of the one node that ran them, as in any
cluster.

Invariants
- ``_carriers`` says what the nodes confirmed: a push that confirms enters a name; one that ends it (a node
  sends ``sunsubscribe`` by itself when a slot leaves it) or the end of the line removes it. A message is
  used only if it comes by the line that carries its name.
- What is wanted and not carried is *lost*: a task subscribes to it again until that works. The client is
  told nothing, and misses what was published meanwhile, as with any server that it has to connect to again.
- No message comes before the confirmation of its name. Messages of a name whose confirmation is *pending*
  are held, and all that come after them, so that their order stays. ``change`` returns the confirmations
  with the held messages behind them as one reply. From that return to the client's write nothing awaits
  (``Exchange._guarded`` delivers at once, and outside a turn the hub flushes at once), and the slot is the
  client's first, because work starts only when all before it is answered. So no turn, and no message, can
  come between the end of holding and the write.
- What a turn brought is written by the end of that turn (``flush``), so it is out before any task goes on.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from proxy.exchange.exchange import HOPS_MAX
from proxy.exchange.failures import not_ready
from proxy.log import get_logger
from proxy.protocol import encode
from proxy.upstream.connect import ConnectError
from proxy.upstream.reply_slot import ConnectionLostError
from proxy.upstream.subscription_line import SubscriptionLine
from routing.command import Command
from routing.redirect import Moved, Redirect, Wait, needs_attention
from routing.slot import slot_of
from routing.topology import Address, TopologyView

if TYPE_CHECKING:
    from proxy.frontend.client import ClientConnection

SUBSCRIPTIONS_MAX = 10_000  # of one client; test_subscriptions holds it
NAME_BYTES_MAX = 4 * 1024 * 1024  # of all its channels and patterns together
ANSWER_SECONDS = 2.0  # a node that has not confirmed by then is left for another
HEAL_SECONDS_FIRST = 0.02  # before a lost subscription is tried again; doubles
HEAL_SECONDS_MAX = 1.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """What one of the three kinds of subscription is called on the wire. Equal only to itself."""

    subscribe: bytes
    unsubscribe: bytes
    message: bytes
    is_sharded: bool = False


CHANNEL = Family(b"subscribe", b"unsubscribe", b"message")
PATTERN = Family(b"psubscribe", b"punsubscribe", b"pmessage")
SHARD_CHANNEL = Family(b"ssubscribe", b"sunsubscribe", b"smessage", is_sharded=True)
FAMILIES = (CHANNEL, PATTERN, SHARD_CHANNEL)

_MESSAGES = {family.message: family for family in FAMILIES}
_BEGUN = {family.subscribe: family for family in FAMILIES}
_ENDED = {family.unsubscribe: family for family in FAMILIES}
_COMMANDS = {
    word.decode().upper(): (family, word is family.subscribe)
    for family in FAMILIES
    for word in (family.subscribe, family.unsubscribe)
}
SUBSCRIPTION_COMMANDS = frozenset(_COMMANDS)

Name = tuple[Family, bytes]


class Subscriptions:
    """See the module's text. ``change`` is called by one task at a time: the client is held meanwhile."""

    def __init__(self, client: ClientConnection) -> None:
        self.client = client
        self.channels: set[bytes] = set()
        self.patterns: set[bytes] = set()
        self.shard_channels: set[bytes] = set()
        self.dirty = False
        self._exchange = client.exchange
        self._topology = client.exchange.topology
        self._wanted = {CHANNEL: self.channels, PATTERN: self.patterns, SHARD_CHANNEL: self.shard_channels}
        self._name_bytes = 0
        self._lines: dict[Address, SubscriptionLine] = {}
        self._home: SubscriptionLine | None = None  # the line of all channels and patterns
        self._carriers: dict[Name, SubscriptionLine] = {}
        self._placing = trio.Lock()  # held by who sends on the lines: change and heal are two tasks
        self._pending: dict[
            Name, None
        ] = {}  # asked for by the command in hand, not confirmed yet; in its order
        self._held: list[tuple[Name, bytes]] = []
        self._held_bytes = 0
        self._outgoing: list[bytes] = []  # messages of this turn, as they came
        self._heal_scope: trio.CancelScope | None = None  # while a task heals
        self._is_closed = False
        self._topology.subscribe(self._on_view)

    @property
    def count(self) -> int:
        return len(self.channels) + len(self.patterns) + len(self.shard_channels)

    # -- the client's commands

    async def change(self, command: Command, arguments: list[bytes]) -> bytes:
        """Carry out one (un)subscription command. The frames that the client gets for it, or an error.

        If cancelled, the subscriptions are those from before the command, or those from after it.
        """
        family, is_subscribing = _COMMANDS[command.name]
        if is_subscribing:
            return await self._subscribe(command, family, arguments[1:])
        return await self._unsubscribe(family, arguments[1:])

    async def _subscribe(self, command: Command, family: Family, names: list[bytes]) -> bytes:
        wanted = self._wanted[family]
        new = [name for name in dict.fromkeys(names) if name not in wanted]
        new_bytes = sum(map(len, new))
        if self.count + len(new) > SUBSCRIPTIONS_MAX or self._name_bytes + new_bytes > NAME_BYTES_MAX:
            return encode.error(
                f"ERR too many subscriptions: a connection may have {SUBSCRIPTIONS_MAX} here, of"
                f" {NAME_BYTES_MAX} bytes together, and has {self.count} of {self._name_bytes} bytes;"
                " use further connections, or a pattern"
            )
        self._pending = dict.fromkeys((family, name) for name in new)
        try:
            if (failure := await self._place_by_deadline(command)) is not None:
                return failure
            # No await from here until the client's flush has written what is returned.
            self._name_bytes += new_bytes
            confirmations = []
            for name in names:
                wanted.add(name)
                confirmations.append(self._confirmation(family, family.subscribe, name))
            self._pending = {}
            return b"".join(confirmations) + self._for_client(self._take_held())
        finally:
            if self._pending:  # it failed: the nodes may have some of the names, nobody wants them
                for key in self._pending:
                    self._set_carrier(key, None)
                self._pending = {}
                if held := self._take_held():
                    self._send(held)
            self._close_idle_lines()

    async def _unsubscribe(self, family: Family, names: list[bytes]) -> bytes:
        wanted = self._wanted[family]
        names = names or list(wanted)
        gone = []
        confirmations = []
        for name in names:
            if name in wanted:
                wanted.discard(name)
                self._name_bytes -= len(name)
                gone.append(name)
            confirmations.append(self._confirmation(family, family.unsubscribe, name))
        if not names:
            confirmations.append(self._confirmation(family, family.unsubscribe, None))
        if gone:
            await self._withdraw(family, gone)
        return b"".join(confirmations)

    def _confirmation(self, family: Family, word: bytes, name: bytes | None) -> bytes:
        """The frame for one name, with the count as it is now."""
        is_resp3 = self.client.resp == 3
        count = len(self.shard_channels) if family.is_sharded else len(self.channels) + len(self.patterns)
        return b"".join(
            (
                b">3\r\n" if is_resp3 else b"*3\r\n",
                encode.bulk(word),
                encode.null(is_resp3) if name is None else encode.bulk(name),
                encode.integer(count),
            )
        )

    # -- messages: called within a turn

    def _on_push(self, line: SubscriptionLine, push: bytes) -> None:
        word, name = _head(push)
        if (family := _MESSAGES.get(word)) is not None:
            key = (family, name)
            if self._carriers.get(key) is not line:
                return
            if self._held or key in self._pending:
                self._hold(key, push)
            else:
                self._send([push])
        elif (family := _BEGUN.get(word)) is not None:
            if self._is_wanted((family, name)):
                self._set_carrier((family, name), line)
        elif (family := _ENDED.get(word)) is not None and self._carriers.get((family, name)) is line:
            self._set_carrier((family, name), None)
            if name in self._wanted[family]:
                self._heal_soon(f"{line.address} does not serve the slot of a sharded channel any more")

    def _hold(self, key: Name, push: bytes) -> None:
        self._held.append((key, push))
        self._held_bytes += len(push)
        if self._held_bytes > self.client.limits.unsent_bytes_hard_max:
            self._exchange.hub.touched(self)  # flush ends the client: a line must not be closed as it is read

    def _take_held(self) -> list[bytes]:
        held = [push for key, push in self._held if self._is_wanted(key)]
        self._held.clear()
        self._held_bytes = 0
        return held

    def _send(self, pushes: Iterable[bytes]) -> None:
        self._outgoing += pushes
        self._exchange.hub.touched(self)

    def flush(self) -> None:
        """Write the turn's messages in one piece. The client's hard limit ends one that does not read."""
        if self._outgoing:
            pushes = self._outgoing.copy()
            self._outgoing.clear()
            self.client.push(self._for_client(pushes))
        if self._held_bytes > (limit := self.client.limits.unsent_bytes_hard_max):
            self.client.close(f"more than {limit} bytes of messages waited for a confirmation")

    def on_fault(self, error: Exception) -> None:
        self.client.on_fault(error)

    def _for_client(self, pushes: Iterable[bytes]) -> bytes:
        """A message has only bulk strings, so that its first byte is all that RESP2 has otherwise."""
        if self.client.resp == 3:
            return b"".join(pushes)
        return b"".join([b"*" + push[1:] for push in pushes])

    # -- carrying: what the lines are asked for

    async def _place_by_deadline(self, command: Command) -> bytes | None:
        """Have what is pending carried. None when it is, else the error for the client."""
        seconds = self._exchange.deadline_seconds
        deadline = trio.current_time() + seconds
        attempt = 0
        failure: Redirect | bytes | None = Wait("no node has answered")
        while True:
            with trio.move_on_at(deadline):
                failure = await self._place(self._pending)
            if failure is None or isinstance(failure, bytes):
                return failure
            if trio.current_time() >= deadline:
                self._exchange.expired_total += 1
                reason = failure.reason if isinstance(failure, Wait) else str(failure)
                return not_ready(command.name, seconds, reason)
            await self._exchange.pause(attempt, deadline)
            attempt += 1

    async def _place(self, names: Collection[Name]) -> Redirect | bytes | None:
        """Try once to have each of ``names`` carried. None when all are; else the first failure.

        A failure is an error reply that is the client's to see, or what stands in the way for now.
        """
        groups: dict[tuple[Family, int], list[bytes]] = {}  # (family, hash slot or -1) -> names
        for family, name in names:
            hash_slot = slot_of(name) if family.is_sharded else -1
            groups.setdefault((family, hash_slot), []).append(name)
        failure = None
        for (family, hash_slot), group in groups.items():
            for _ in range(HOPS_MAX):
                async with self._placing:
                    found = await self._place_group(family, hash_slot, group)
                if not isinstance(found, Moved):
                    break
            failure = failure or found
        return failure

    async def _place_group(
        self, family: Family, hash_slot: int, names: list[bytes]
    ) -> Redirect | bytes | None:
        def missing() -> list[bytes]:
            keys = [(family, name) for name in names]
            return [key[1] for key in keys if key not in self._carriers and self._is_wanted(key)]

        if not (wanted := missing()):
            return None
        failure: bytes | None = None
        try:
            line = await self._line_for(hash_slot)
            with trio.move_on_after(ANSWER_SECONDS) as waiting:
                failure = await line.run(family.subscribe, *wanted)
        except (ConnectError, ConnectionLostError) as error:
            self._topology.refresh_soon()
            return Wait(str(error))
        if waiting.cancelled_caught:
            line.close()
            return Wait(f"{line.address} did not answer within {ANSWER_SECONDS:g} s")
        if failure is not None:
            redirect = (
                self._exchange.understand(failure, line.connection) if needs_attention(failure) else None
            )
            return redirect or failure
        return Wait(f"{line.address} ended it at once") if missing() else None

    async def _withdraw(self, family: Family, names: Iterable[bytes]) -> None:
        """Have ``names`` carried no more. Returns when no message of theirs can come."""
        async with self._placing:
            by_line: dict[SubscriptionLine, list[bytes]] = {}
            for name in names:
                if (line := self._carriers.get((family, name))) is not None:
                    by_line.setdefault(line, []).append(name)
            for line, gone in by_line.items():
                if line.load == len(gone):
                    line.close()
                    continue
                failure: bytes | None = b"-no answer"
                try:
                    with trio.move_on_after(ANSWER_SECONDS):
                        failure = await line.run(family.unsubscribe, *gone)
                except ConnectionLostError:
                    continue  # which ended them too
                if failure is not None:
                    log.warning("unsubscribe_failed", node=line.address, reply=_text(failure))
                    line.close()  # what else it carries is healed

    async def _line_for(self, hash_slot: int) -> SubscriptionLine:
        """The line to the slot's owner; for -1, the one of channels and patterns. Raises ConnectError."""
        if hash_slot >= 0:
            owner = self._topology.view.primary_of(hash_slot)
            if owner is None:
                raise ConnectError(f"no node serves slot {hash_slot}")
            return await self._line_to(owner.address)
        if self._home is None:
            failure = ConnectError("no primary is known")
            for address in [*self._lines, *self._primaries()]:
                try:
                    self._home = await self._line_to(address)
                    break
                except ConnectError as error:
                    failure = error
            else:
                raise failure
        return self._home

    async def _line_to(self, address: Address) -> SubscriptionLine:
        if (line := self._lines.get(address)) is not None:
            return line
        line = SubscriptionLine(address, self._on_push, self._on_line_closed)
        await line.open(self._exchange.private)
        if self._is_closed:  # it was cancelled a moment too late
            line.close()
            raise ConnectError("the client left")
        self._lines[address] = line
        return line

    def _primaries(self) -> list[Address]:
        """Those that may carry channels, in an order that spreads the clients over them."""
        found = [
            shard.primary.address for shard in self._topology.view.shards if not shard.primary.is_failing
        ]
        first = self.client.id % len(found) if found else 0
        return found[first:] + found[:first]

    def _set_carrier(self, key: Name, line: SubscriptionLine | None) -> None:
        before = self._carriers.pop(key, None)
        if before is not None:
            before.load -= 1
        if line is not None:
            self._carriers[key] = line
            line.load += 1

    def _is_wanted(self, key: Name) -> bool:
        return key[1] in self._wanted[key[0]] or key in self._pending

    # -- losing and healing

    def _on_line_closed(self, line: SubscriptionLine, reason: str) -> None:
        if self._lines.get(line.address) is line:
            del self._lines[line.address]
        if self._home is line:
            self._home = None
        for key in [key for key, carrier in self._carriers.items() if carrier is line]:
            self._set_carrier(key, None)
        self._heal_soon(f"the connection to {line.address} ended: {reason}")

    def _on_view(self, old: TopologyView, new: TopologyView) -> None:
        """Leave nodes that left the cluster or fail, and former owners that have not said so yet."""
        if not self._lines or not new.shards:
            return
        if new.shards is not old.shards:
            for line in [line for line in self._lines.values() if not new.is_serving(line.address)]:
                line.close()
        for name in self.shard_channels:
            index = new.shard_of_slot[slot_of(name)]
            carrier = self._carriers.get((SHARD_CHANNEL, name))
            if carrier is None or index < 0:
                continue
            shard = new.shards[index]
            if carrier.address not in [node.address for node in (shard.primary, *shard.replicas)]:
                self._set_carrier((SHARD_CHANNEL, name), None)
                self._heal_soon(f"{carrier.address} does not own the slot of a sharded channel any more")

    def _lost(self) -> list[Name]:
        return [
            (family, name)
            for family, names in self._wanted.items()
            for name in names
            if (family, name) not in self._carriers
        ]

    def _heal_soon(self, reason: str) -> None:
        if self._is_closed or self._heal_scope is not None or not (lost := self._lost()):
            return
        log.warning("subscriptions_lost", client=self.client.id, names=len(lost), reason=reason)
        self._heal_scope = trio.CancelScope()
        self._exchange.start(self._heal, self._on_healed, self._heal_scope)

    async def _heal(self) -> bytes:
        """Subscribe again to what is lost, as often as it takes; the empty reply of a task that has none."""
        began = trio.current_time()
        attempt = 0
        while True:
            failure = await self._place(self._lost())
            if not self._lost():
                break
            if attempt == 0:
                log.info("subscriptions_still_lost", client=self.client.id, reason=str(failure))
            seconds = min(HEAL_SECONDS_MAX, HEAL_SECONDS_FIRST * 2.0 ** min(attempt, 10))
            await trio.sleep(seconds * random.uniform(0.5, 1.0))
            attempt += 1
        # No await: what is lost from here on starts a task of its own.
        self._heal_scope = None
        self._close_idle_lines()
        lost_seconds = round(trio.current_time() - began, 3)
        log.info("subscriptions_restored", client=self.client.id, lost_seconds=lost_seconds)
        return b""

    def _on_healed(self, reply: bytes) -> None:
        if reply and not self._is_closed:
            self.client.close(f"its subscriptions could not be restored: {_text(reply)}")

    # -- ending

    def _close_idle_lines(self) -> None:
        """Close what carries nothing: to a node that refused, to a former owner. The last task does it."""
        if self._placing.locked():
            return
        for line in [line for line in self._lines.values() if not line.load]:
            line.close()

    def close(self) -> None:
        """Drop all subscriptions and their connections; nothing is sent to the client any more."""
        if self._is_closed:
            return
        self._is_closed = True
        self._topology.unsubscribe(self._on_view)
        for names in self._wanted.values():
            names.clear()
        self._pending = {}
        self._held.clear()
        self._held_bytes = 0
        self._outgoing.clear()
        if self._heal_scope is not None:
            self._heal_scope.cancel()
        for line in list(self._lines.values()):
            line.close()


def _text(reply: bytes) -> str:
    return reply.strip().decode(errors="replace")


def _head(push: bytes) -> tuple[bytes, bytes]:
    """The first two members of a push, which are bulk strings; b"" for a null."""
    at = push.index(b"\r\n") + 2
    members = []
    for _ in range(2):
        line_end = push.index(b"\r\n", at)
        length = int(push[at + 1 : line_end] or b"-1")
        members.append(push[line_end + 2 : line_end + 2 + max(0, length)])
        at = line_end + 2 + (length + 2 if length >= 0 else 0)
    return members[0], members[1]
