"""Saves a key's value, or its absence, before the key's first write after a cut.

A write may be sent when ``needs`` denies it, in the same synchronous step. Else ``preserve`` is awaited first.
What is known to have a marker stands on the write connection of the slot's owner (``NodeConnection.known``), because
it is only as good as the node's history, and that is only as good as the connection.

Why the check and the sending must be one step: between them the chain's newest id may change (a new cut: everything has
to be preserved anew), the connection may end, or the slot may go elsewhere. Nothing of that happens within a step.

Gates. From a cut until all that was sent before it is answered, a preserve must not run before a write that was sent
before the cut: the snapshot would show that write's other keys, and of this one the value from before. On the
connection on which that write went the node's own order sees to it; on any other the preserve waits at the gate.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from hashlib import sha1
from typing import Protocol

import trio

from proxy.bounded import for_each
from proxy.log import get_logger
from proxy.protocol.encode import error, frame
from proxy.protocol.replies import decode
from proxy.settings import SnapshotSettings
from proxy.snapshots.facts import Costs
from proxy.snapshots.own_writes import OwnWrites
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ConnectionLostError
from routing.redirect import Ask, Moved, Redirect, Wait, needs_attention
from routing.snapshot import EMPTY_CHAIN, Chain
from routing.snapshot_names import is_internal, marker, preimage
from routing.topology import Address

log = get_logger(__name__)

# KEYS: for each key K, its marker M and its pre-image P. ARGV[1]: bytes from which a key is too large, or 0.
# Its answer, for each key: -1 the marker was there, -2 not kept, 0 absent, else the estimated bytes of the copy.
# What cannot be copied, as vector sets on Redis 8.0, is not kept, as what is too large.
# COPY without REPLACE: a pre-image that is there comes from the same value, by single steps that were cut off.
SCRIPT = b"""local answers = {}
local bytes_max = tonumber(ARGV[1])
for i = 1, #KEYS, 3 do
  local answer = -1
  if redis.call('EXISTS', KEYS[i + 1]) == 0 then
    local size = redis.call('MEMORY', 'USAGE', KEYS[i])
    if not size then
      redis.call('SET', KEYS[i + 1], 'a')
      answer = 0
    elseif bytes_max > 0 and size > bytes_max then
      redis.call('SET', KEYS[i + 1], 'x')
      answer = -2
    else
      local copied = redis.pcall('COPY', KEYS[i], KEYS[i + 2])
      if type(copied) == 'table' and copied.err then
        redis.call('SET', KEYS[i + 1], 'x')
        answer = -2
      else
        redis.call('SET', KEYS[i + 1], 'p')
        answer = size
      end
    end
  end
  answers[#answers + 1] = answer
end
return answers"""
SCRIPT_SHA = sha1(SCRIPT).hexdigest().encode()  # the engines name scripts so

# Keys of one script. A node serves nobody else meanwhile, and looks at its memory limit only when a script begins.
SCRIPT_KEYS_MAX = 128

HAD_MARKER, TOO_LARGE = -1, -2

AT_ONCE = ""  # as a reason to try again: no pause is needed

# A node that says so refuses every write, the client's own too: the snapshot is as good as before.
_NODE_REFUSES = (b"-MISCONF", b"-NOREPLICAS", b"-READONLY", b"-NOAUTH", b"-NOPERM", b"-BUSY ")
_SCRIPT_FAILED = (
    b"-ERR Error running script"  # before Redis 7.0 the error of a script's command stands at the end
)

INTERNAL_KEY = error(
    "ERR keys whose names begin as steady{N}:m: or steady{N}:p: belong to the proxy's snapshots and are not written"
)


class Ways(Protocol):
    """How requests reach nodes; the exchange is one."""

    deadline_seconds: float

    def write_connection(self, hash_slot: int, resp: int) -> NodeConnection | None:
        """The shared write connection to the slot's owner; None while there is none that takes requests."""
        ...

    def is_in_flux(self, hash_slot: int) -> bool: ...

    def understand(
        self, reply: bytes, connection: NodeConnection, *, from_script: bool = False
    ) -> Redirect | None: ...

    def pause(self, attempt: int, deadline: float) -> Awaitable[None]: ...

    def execute(
        self,
        raw: bytes,
        hash_slot: int,
        *,
        resp: int,
        repeatable: bool,
        deadline: float | None = None,
        lane: Lane | None = None,
    ) -> Awaitable[bytes]: ...


class Gate:
    """One slot between a cut and the end of what was sent to it before."""

    __slots__ = ("connections", "has_blocked", "opened")

    def __init__(self) -> None:
        self.connections: set[NodeConnection] = set()  # that owe an answer to a pre-cut write on the slot
        self.has_blocked = False  # a blocking command waits whose keys are not preserved yet
        self.opened = trio.Event()

    def lets_through(self, connection: NodeConnection) -> bool:
        return not self.has_blocked and not (self.connections - {connection})

    def open_if_free(self) -> bool:
        if self.connections or self.has_blocked:
            return False
        self.opened.set()
        return True


class _CutMeanwhileError(Exception):
    """Another snapshot was cut between two steps. What is dumped from here on may be from after that."""


class PreserveFailedError(Exception):
    """A node would not store a pre-image. The text is its error."""


class Preserver:
    """See the module's text. One per proxy."""

    def __init__(self, settings: SnapshotSettings) -> None:
        self.settings = settings
        self.chain: Chain = EMPTY_CHAIN
        self.newest = 0  # the chain's; 0: nothing is to be preserved
        self.gates: dict[int, Gate] = {}  # hash slot -> its gate; empty but for some milliseconds after a cut
        self.is_held = False  # new writes wait
        self.released = trio.Event()
        self._holds: set[str] = set()
        self.own_writes = OwnWrites(settings.known_keys_max)
        self.costs: dict[int, Costs] = {}
        self.on_failure: PreserveFailureHandler | None = None
        self.on_split: Callable[[int], None] = lambda hash_slot: (
            None
        )  # a marker was set in a slot that is split
        self.history_at: Callable[[Address], bytes] = lambda address: b""  # of a node, as it last said
        self.ways: Ways

    # -- the hot path

    def needs(self, hash_slot: int, keys: Iterable[bytes], resp: int) -> bool:
        """Whether a write of ``keys`` must be preceded by ``preserve``. Synchronous with what sends the write."""
        if not self.newest:
            return self.is_held
        connection = self.ways.write_connection(hash_slot, resp)
        return connection is None or not connection.known.issuperset(keys)

    # -- holding

    def hold(self, reason: str) -> None:
        """New writes wait until this, and every other reason, is released."""
        self._holds.add(reason)
        self.is_held = True

    def release(self, reason: str) -> None:
        """Nothing if it does not hold."""
        self._holds.discard(reason)
        if self.is_held and not self._holds:
            self.is_held = False
            self.released.set()
            self.released = trio.Event()

    # -- preserving

    async def preserve(
        self, wanted: Mapping[int, Iterable[bytes]], resp: int, deadline: float
    ) -> bytes | None:
        """See that all keys, by hash slot, have a marker. None when they have; else the error reply for their write.

        When it returns, nothing has run since it saw that: ask ``needs`` again only after awaiting.
        ``deadline``: on Trio's clock.
        """
        reason = "it takes too long"
        attempt = 0
        while True:
            while self.is_held:
                with trio.move_on_at(deadline):
                    await self.released.wait()
                if trio.current_time() >= deadline:
                    return _not_ready("proxies that agree on a snapshot take too long")
            if not self.newest:
                return None
            missing = {
                slot: unknown
                for slot, keys in wanted.items()
                if (unknown := self._unknown(slot, keys, resp)) or self._has_no_way(slot, resp)
            }
            if not missing:
                return None
            if trio.current_time() >= deadline:
                return _not_ready(reason)
            if any(is_internal(key) for keys in missing.values() for key in keys):
                return INTERNAL_KEY
            began = trio.current_time()
            newest = self.newest
            try:
                found = await self._round(missing, resp, deadline)
            except PreserveFailedError as failed:
                assert self.on_failure is not None
                if (refused := await self.on_failure(newest, str(failed))) is not None:
                    return refused
                continue
            self._count_wait(newest, trio.current_time() - began)
            if isinstance(found, bytes):
                return found
            if found:  # a reason why it has to be tried again
                reason = found
                await self.ways.pause(attempt, deadline)
                attempt += 1

    def _unknown(self, hash_slot: int, keys: Iterable[bytes], resp: int) -> list[bytes]:
        connection = self.ways.write_connection(hash_slot, resp)
        known = connection.known if connection is not None else ()
        return [key for key in dict.fromkeys(keys) if key not in known]

    def _has_no_way(self, hash_slot: int, resp: int) -> bool:
        return self.ways.write_connection(hash_slot, resp) is None

    async def _round(
        self, missing: Mapping[int, list[bytes]], resp: int, deadline: float
    ) -> bytes | str | None:
        """One attempt at each slot. None: done; text: why one has to be tried again; bytes: an error reply."""
        outcomes: list[bytes | str | None] = []
        if len(missing) == 1:
            ((slot, keys),) = missing.items()
            return await self._one(slot, keys, resp, deadline)

        failures: list[PreserveFailedError] = []

        async def one(item: tuple[int, list[bytes]]) -> None:
            slot, keys = item
            try:
                outcomes.append(await self._one(slot, keys, resp, deadline))
            except PreserveFailedError as failed:
                failures.append(failed)

        await for_each(missing.items(), one)
        if failures:
            raise failures[0]
        replies = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
        texts = [outcome for outcome in outcomes if isinstance(outcome, str)]
        return replies[0] if replies else texts[0] if texts else None

    async def _one(self, slot: int, keys: list[bytes], resp: int, deadline: float) -> bytes | str | None:
        connection = self.ways.write_connection(slot, resp)
        if connection is None:
            return f"the owner of slot {slot} takes no requests"
        gate = self.gates.get(slot)
        if gate is not None and not gate.lets_through(connection):
            with trio.move_on_at(deadline):
                await gate.opened.wait()
            return AT_ONCE
        return await self._at_owner(connection, slot, keys, resp, deadline)

    async def preserve_behind_gate(self, slot: int, keys: Sequence[bytes], deadline: float) -> str | None:
        """For the barrier, while the slot's gate is closed to others. None when done, else why not.

        Raises PreserveFailedError.
        """
        attempt = 0
        while True:
            connection = self.ways.write_connection(slot, 2)
            outcome: bytes | str | None = f"the owner of slot {slot} takes no requests"
            if connection is not None:
                outcome = await self._at_owner(connection, slot, list(keys), 2, deadline, whole=True)
            if not isinstance(outcome, str):
                return outcome if outcome is None else _text(outcome)
            if trio.current_time() >= deadline:
                return outcome
            await self.ways.pause(attempt, deadline)
            attempt += 1

    async def _at_owner(
        self,
        connection: NodeConnection,
        slot: int,
        keys: list[bytes],
        resp: int,
        deadline: float,
        *,
        whole: bool = False,
    ) -> bytes | str | None:
        """``whole``: at one moment, if the slot is at rest."""
        newest = self.newest
        outcome: bytes | str | None = None
        self.own_writes.note(keys)
        if self.ways.is_in_flux(slot):
            outcome = await self._by_steps(slot, keys, newest, resp, deadline)
        else:
            keys_max = len(keys) if whole else SCRIPT_KEYS_MAX
            for first in range(0, len(keys), keys_max):
                some = keys[first : first + keys_max]
                outcome = await self._by_script(connection, slot, some, newest, resp, deadline)
                if outcome is None and newest != self.newest:
                    outcome = AT_ONCE
                if outcome is not None:
                    break
        # While held, what blocked commands may write is preserved, and writes of it must wait all the same.
        if outcome is None and newest == self.newest and not connection.is_closed and not self.is_held:
            self._remember(connection, keys)
        return outcome

    def _remember(self, connection: NodeConnection, keys: Sequence[bytes]) -> None:
        if len(connection.known) + len(keys) > self.settings.known_keys_max:
            connection.known.clear()
        connection.known.update(keys)

    async def _by_script(
        self,
        connection: NodeConnection,
        slot: int,
        keys: list[bytes],
        newest: int,
        resp: int,
        deadline: float,
    ) -> bytes | str | None:
        """At rest: one script on the connection that the write will take."""
        words = [b"%d" % (3 * len(keys))]
        for key in keys:
            words += (key, marker(slot, newest, key), preimage(slot, newest, key))
        words.append(b"%d" % self.settings.key_bytes_max)
        history = self.history_at(connection.address)
        reply: bytes | None = None
        try:
            with trio.move_on_at(deadline):
                # With its slot, so that the gate of a later cut waits for it: behind a write from after that cut it
                # would keep the wrong value.
                reply = await connection.request(frame([b"EVALSHA", SCRIPT_SHA, *words]), hash_slot=slot)
                if reply.startswith(b"-NOSCRIPT"):
                    if newest != self.newest:
                        return AT_ONCE
                    reply = await connection.request(frame([b"EVAL", SCRIPT, *words]), hash_slot=slot)
        except ConnectionLostError as lost:
            return str(lost)
        if reply is None:
            return f"{connection.address} did not reply"
        if reply[0] == 45:
            if (refusal := _refusal_of_node(reply)) is not None:
                return refusal
            redirect = (
                self.ways.understand(reply, connection, from_script=True) if needs_attention(reply) else None
            )
            match redirect:
                case Ask():
                    return await self._by_steps(slot, keys, newest, resp, deadline)
                case Wait(reason) if reason.startswith("TRYAGAIN"):
                    return await self._by_steps(slot, keys, newest, resp, deadline)
                case Moved() | Wait():
                    return f"{connection.address}: {redirect}"
                case _:
                    raise PreserveFailedError(_text(reply))
        answers: list[int] = decode(reply)
        for answer in answers:
            self._count(newest, answer)
        kept = [key for key, answer in zip(keys, answers, strict=True) if answer > 0]
        self.own_writes.kept(newest, [(key, preimage(slot, newest, key)) for key in kept], history)
        return None

    async def _by_steps(
        self, slot: int, keys: list[bytes], newest: int, resp: int, deadline: float
    ) -> bytes | str | None:
        """In a slot that is split between two nodes: single-key steps, each of which goes where its key is.

        Any interleaving of writers is safe, because M is set once, before any of them writes K; a P is never anything
        but the value of the cut, and is never taken back; and ``a`` never looks at P. Each step may be repeated:
        RESTORE finds the key busy, SET NX finds the marker.
        """
        for key in keys:
            try:
                outcome = await self._steps_of(slot, key, newest, resp, deadline)
            except _CutMeanwhileError:
                return AT_ONCE
            if outcome is not None:
                return outcome
        return None

    async def _steps_of(
        self, slot: int, key: bytes, newest: int, resp: int, deadline: float
    ) -> bytes | str | None:
        async def ask(*words: bytes) -> bytes:
            if newest != self.newest:
                raise _CutMeanwhileError
            return await self.ways.execute(
                frame(words), slot, resp=resp, repeatable=True, deadline=deadline, lane=Lane.WRITE
            )

        name, saved = marker(slot, newest, key), preimage(slot, newest, key)
        answer = HAD_MARKER
        found = await ask(b"GET", name)
        if found[0] == 45:
            return _judge_step(found)
        if not _is_nil(found):
            return None
        size_reply = await ask(b"MEMORY", b"USAGE", key)
        if size_reply[0] == 45:
            return _judge_step(size_reply)
        size = 0 if _is_nil(size_reply) else int(size_reply[1:-2])
        kind = b"a"
        bytes_max = self.settings.key_bytes_max
        if bytes_max and size > bytes_max:
            kind, answer = b"x", TOO_LARGE
        elif size:
            lifetime = await ask(b"PTTL", key)
            if lifetime[0] == 45:
                return _judge_step(lifetime)
            payload = await ask(b"DUMP", key)
            if payload[0] == 45:
                return _judge_step(payload)
            if not _is_nil(payload):
                # Had another writer's marker come before, what was dumped could be what that one wrote. As it is,
                # whatever is stored is the value of the cut, and stays: another's marker may come to count on it.
                found = await ask(b"GET", name)
                if found[0] == 45:
                    return _judge_step(found)
                if not _is_nil(found):
                    return None
                left = int(lifetime[1:-2])  # milliseconds; negative: for ever, which RESTORE calls 0
                ttl = max(1, left) if left >= 0 else 0
                restored = await ask(b"RESTORE", saved, b"%d" % ttl, decode(payload))
                if restored[0] == 45 and not restored.startswith(b"-BUSYKEY"):
                    return _judge_step(restored)
                kind, answer = b"p", size
        if kind == b"a":
            answer = 0
        set_reply = await ask(b"SET", name, kind, b"NX")
        if set_reply[0] == 45:
            return _judge_step(set_reply)
        if _is_nil(set_reply):
            answer = HAD_MARKER  # another writer decided
        self.on_split(slot)
        self._count(newest, answer)
        return None

    # -- costs

    def _count(self, snapshot_id: int, answer: int) -> None:
        if answer == HAD_MARKER:
            return
        costs = self.costs.setdefault(snapshot_id, Costs())
        costs.keys_preserved += 1
        if answer == TOO_LARGE:
            costs.keys_too_large += 1
        else:
            costs.bytes_preserved += answer

    def _count_wait(self, snapshot_id: int, seconds: float) -> None:
        costs = self.costs.setdefault(snapshot_id, Costs())
        costs.preserves += 1
        costs.preserve_seconds_sum += seconds
        costs.preserve_seconds_max = max(costs.preserve_seconds_max, seconds)


class PreserveFailureHandler(Protocol):
    """What to do when a pre-image cannot be stored: None, the write may go on; else its error reply."""

    def __call__(self, snapshot_id: int, reason: str) -> Awaitable[bytes | None]: ...


def _is_nil(reply: bytes) -> bool:
    return reply in (b"$-1\r\n", b"_\r\n")


def _text(reply: bytes) -> str:
    return reply[1:-2].decode(errors="replace")


def _refusal_of_node(reply: bytes) -> bytes | None:
    """The error by which the node refuses every write, if that is what the script met."""
    if reply.startswith(_SCRIPT_FAILED):
        reply = reply[reply.rfind(b": -") + 2 :]
    return reply if reply.startswith(_NODE_REFUSES) else None


def _judge_step(reply: bytes) -> bytes:
    """A single step was refused: the write's reply if no write would be served, else a failure."""
    if reply.startswith((*_NODE_REFUSES, b"-NOTREADY")):
        return reply
    raise PreserveFailedError(_text(reply))


def _not_ready(reason: str) -> bytes:
    return error(
        f"NOTREADY the key could not be preserved for the open snapshot: {reason}; nothing was written"
    )
