"""A client's connection: bytes in, commands out, replies back in order. Knows no socket and no Trio.

    receive(bytes) -> requests -> dispatched, or answered here -> reply slots -> flush() -> transport.write(bytes)

The fast way: ``scan_simple`` takes the plain single-key requests at the front of the buffer, and each is queued on
the connection that the routes table names. Everything else is parsed in full and goes through ``_command``.

Invariants
- ``slots`` (of OpenRequests) holds every request that is not answered and written yet, in request order.
- While the client is held, closing or over a limit (pacing.py), nothing more is parsed: its bytes wait unparsed, and
  past HELD_BYTES_MAX its socket is not read.
- ``is_plain`` is true exactly when a single-key command may be relayed without looking at the client's state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import assert_never

import trio

from proxy.exchange.blocking import execute_blocking
from proxy.exchange.exchange import Exchange
from proxy.exchange.explain import explain, reply_of
from proxy.exchange.gather import GATHERED, ask_any_node, gather_keyspace
from proxy.exchange.open_requests import CURRENT, OpenRequests, ReplicaSlot, RequestSlot, Work
from proxy.exchange.read_groups import ReadGroup
from proxy.exchange.read_policy import ReadPolicy, is_strong, uses
from proxy.exchange.routes import KINDS
from proxy.exchange.sessions import Session, token_of_now
from proxy.exchange.snapshot_slots import FastReads, SnapshotSlot
from proxy.exchange.split import SPLIT_RULES, dispatch_split
from proxy.exchange.transaction import (
    Queued,
    Transaction,
    Watch,
    array_nil,
    dispatch_block,
    run_blocks,
    watch,
    written_keys,
)
from proxy.frontend import answers, snapshots, steady
from proxy.frontend.answers import (
    Answer,
    AskAnyNode,
    ClientFigures,
    CloseAfter,
    GatherKeyspace,
    Keyspace,
    Refused,
    ReplyMode,
    ResetAfter,
)
from proxy.frontend.answers.info import reply as info_reply
from proxy.frontend.pacing import Pacer
from proxy.frontend.server import Server
from proxy.frontend.snapshots import operator_of_client
from proxy.frontend.subscriptions import SUBSCRIPTION_COMMANDS, Subscriptions
from proxy.frontend.transport import Transport
from proxy.frontend.users import User
from proxy.log import get_logger
from proxy.protocol import encode
from proxy.protocol.replies import decode
from proxy.protocol.requests import ProtocolError, RequestParser, Simple, remember_simple, scan_simple
from proxy.settings import CrossSlotTransactions
from proxy.upstream.nodes import Lane
from routing.command import Command, lookup, refusal
from routing.explain import ExplainError
from routing.keys import KeysError, blocks, key_positions, routing_positions, write_positions
from routing.levels import Level, ReadLevel
from routing.mode import NO_SNAPSHOT
from routing.priority import Priority
from routing.redirect import SCRIPT_COMMANDS
from routing.slot import slot_of
from routing.snapshot_reads import GET, is_plain
from routing.token_bucket import bucket_of

HELD_BYTES_MAX = 64 * 1024  # unparsed bytes of a held client; past them its socket waits
HITS_BYTES = 64 * 1024  # of the cache's replies in one slot; how many slots there are is bounded, too
PASS_REQUESTS_MAX = 256  # of one client in one pass over its bytes; then it is the others' turn
REPLIES_SUMMED_FROM = 16  # open slots from which finished replies behind an unfinished one are counted

SLOTS_DIFFER = b"-CROSSSLOT Keys in request don't hash to the same slot"
CROSS_SLOT = SLOTS_DIFFER + b"; give them a common {hash tag}, or send one command for each slot\r\n"
CROSS_SLOT_TRANSACTION = SLOTS_DIFFER + (
    b"; a transaction here has one slot: give its keys a common {hash tag}, or set"
    b' cross_slot_transactions = "per_slot" to run it as one transaction per slot\r\n'
)
CROSS_SLOT_WATCH = (
    SLOTS_DIFFER + b"; WATCH and its transaction need one slot: give the keys a common {hash tag}\r\n"
)
NESTED_MULTI = b"-ERR MULTI calls can not be nested\r\n"
WATCH_IN_MULTI = b"-ERR WATCH inside MULTI is not allowed\r\n"
UNBLOCKED = b"-UNBLOCKED client unblocked via CLIENT UNBLOCK\r\n"
EXEC_WITHOUT_MULTI = b"-ERR EXEC without MULTI\r\n"
DISCARD_WITHOUT_MULTI = b"-ERR DISCARD without MULTI\r\n"
MIXED_TRANSACTION = (
    b"-ERR this connection's reads are of a snapshot, and a transaction that writes would read what is there now;"
    b" send the reads before MULTI, or STEADY.READ STRONG first\r\n"
)
EXEC_ABORTED = b"-EXECABORT Transaction discarded because of previous errors.\r\n"

log = get_logger(__name__)

# As Redis: an HTTP request is someone else's browser or a forged one, whose body could hold commands.
_HTTP_WORDS = frozenset({b"POST", b"HOST:"})

# What a client may send in any state; within MULTI it acts at once.
_CHANGING_RESP = frozenset({"HELLO", "RESET"})
_NEVER_QUEUED = frozenset({"EXEC", "DISCARD", "MULTI", "WATCH", "QUIT", "RESET"})


class ClientConnection(OpenRequests):
    """One client, whatever carries its bytes. ``server`` knows what all clients share."""

    def __init__(
        self,
        server: Server,
        exchange: Exchange,
        transport: Transport,
        peer_address: str,
        local_address: str,
        listener_level: ReadLevel | None = None,
        listener_priority: Priority = Priority.NORMAL,
    ) -> None:
        super().__init__(exchange)
        settings = server.settings.clients
        self.read_level: ReadLevel | None = None  # that the client asked for; None: auto
        self._listener_level = listener_level
        self.server = server
        self.transport = transport
        self.id = server.next_client_id()
        self.peer_address = peer_address
        self.local_address = local_address
        self.name = self.library_name = self.library_version = b""
        self.authenticated = not settings.password
        self.reply_mode = ReplyMode.ON
        self.created_at = self.last_command_at = time.time()
        self.received_bytes = self.sent_bytes = self.commands = 0
        self._last_command: Command | None = None
        self.is_plain = self.authenticated
        self.is_blocked = False  # in a blocking command
        self._block_scope = trio.CancelScope()
        self._unblocked_with: bytes | None = None
        self.transaction: Transaction | None = None
        self.watch: Watch | None = None
        self.watched_keys = 0
        self.subscriptions: Subscriptions | None = None
        self.limits = settings  # of this connection; a reload changes those of later ones
        self._parser = RequestParser(server.request_limits)
        self._unread: list[bytes] = []  # bytes not parsed yet, in the chunks they came in
        self._unread_bytes = 0
        self._growing: bytearray | None = None  # a large request that came in part, before _unread
        self._needed = 0  # bytes that make parsing _unread worth while
        self._silent: set[RequestSlot] = set()  # whose replies CLIENT REPLY drops
        self._hot = exchange.hot
        self.listener_priority = listener_priority
        self.owner: User = server.users.default  # whose requests these are
        self._asked_priority: Priority | None = None
        self.set_priority(None)
        self._commands_before = 0  # when it became that user
        self._commands_max = 0  # what ``commands`` may become in this pass
        self._bucket = (
            bucket_of(settings.requests_per_second, settings.requests_burst, server.pacing.clock())
            if settings.requests_per_second
            else None
        )
        self._pacer: Pacer | None = None  # None: neither it nor its user has a limit
        self._choose_pacer()
        self._is_paused = False
        self._is_ended = False  # the client sends nothing more
        self._is_closing = False  # close when all that is owed is sent
        self.choose_policy()

    # -- bytes in

    def receive(self, data: bytes) -> None:
        """Bytes from the client, cut anywhere."""
        self.received_bytes += len(data)
        if self._is_closing:
            return
        self._unread.append(data)
        self._unread_bytes += len(data)
        if not self._retrying and not self._draining and not self.permits.is_waiting:
            self._process()
        if self._unread_bytes > HELD_BYTES_MAX or len(self.slots) >= self.limits.open_requests_max:
            self._pace()

    def _process(self) -> None:
        """Dispatch the complete requests in the unparsed bytes, as far as the client's state and limits allow."""
        unread = self._unread
        if not unread or self._unread_bytes < self._needed:
            return
        if self._is_paused and (self.permits.granted is None or self._has_too_much_open()):
            return
        if self._is_closing or self.is_closed:
            return
        commands = self.commands
        # Reads at replicas go once a round trip, so those of one pass are not parted.
        at_once = PASS_REQUESTS_MAX if self.policy is None else self.limits.open_requests_max
        self._commands_max = commands + at_once
        if self._pacer is not None:
            allowed = self._pacer.begin()
            if not allowed:
                return
            if allowed < at_once:
                self._commands_max = commands + allowed
        growing = self._growing
        if growing is not None:
            for chunk in unread:
                growing += chunk
            buffer: bytes | bytearray = growing
        else:
            buffer = unread[0] if len(unread) == 1 else b"".join(unread)
        unread.clear()
        self._needed = 0
        at, size = 0, len(buffer)
        self.last_command_at = time.time()
        if self.policy is not None:
            self.begin_pass()
            if self.policy.session is not None and self.policy.needs_check:
                # Its reply is empty: then what is read here is looked at.
                self.start_work(_QUIT, self._check_session)
        permits, is_all = self.permits, False
        while at < size and not self.is_held and not self._is_closing:
            room = self.limits.open_requests_max - len(self.slots)
            left = self._commands_max - self.commands
            if room > left:
                room = left
            if room <= 0:
                break
            if (
                self.is_plain
                and not self._parser.resuming
                and permits.refusal is None
                and isinstance(buffer, bytes)
            ):
                found: list[Simple] = []
                if room > permits.scan_max:
                    room = permits.scan_max
                    permits.scan_max *= 2
                end = scan_simple(buffer, at, room, found, self.limits.request_bytes_max)
                if found:
                    untaken = self._relay_simple(found)
                    at = end - untaken
                    hot = self._hot
                    hot.countdown -= len(found)
                    if hot.countdown < 0 or untaken:
                        hot.look(found, untaken)
                    continue
            try:
                parsed = self._parser.parse(buffer, at, authenticated=self.authenticated)
            except ProtocolError as error:
                self._fail(encode.error(f"ERR {error}"))
                at = size
                break
            if parsed is None:
                self._needed = self._parser.needed
                is_all = True
                break
            arguments, end = parsed
            raw = bytes(buffer[at:end])
            at = end
            if growing is not None:
                self._growing = growing = None
                buffer, at, size = bytes(buffer[end:]), 0, size - end
            if arguments:
                self.commands += 1
                # An inline command is no frame that a node could be sent.
                raw = raw if raw[0] == 42 else encode.frame(arguments)
                if not self._command(arguments, raw):
                    self.commands -= 1
                    buffer, at = raw + bytes(buffer[at:]), 0
                    size = len(buffer)
                    if permits.refusal is None:
                        break
        if self._is_collecting:
            self.end_pass()
        permits.end_pass(is_all=is_all or at >= size)
        if at < size and not self.is_closed and growing is None:
            rest = buffer[at:] if at else buffer
            if self._parser.resuming and HELD_BYTES_MAX < len(rest) > self._needed // 2:
                # Many arguments are to come, each worth a look: it grows in place, so that the whole costs
                # linear time. Joining chunks costs as little when the next look is far off.
                self._growing = bytearray(rest)
            else:
                unread.append(bytes(rest))
        self._unread_bytes = size - at
        if self._pacer is not None:
            self._pacer.end(self.commands - commands)
        if at < size and self.commands >= self._commands_max and not self.is_held and not self._is_closing:
            self.server.pacing.hold_for_turn(self)

    def _relay_simple(self, found: Sequence[Simple]) -> int:
        """Queue plain requests where the routes table says; how many bytes of them were not taken in the end."""
        only_reads = True
        for command, _, _, _ in found:
            if not command.only_reads:
                only_reads = False
                break
        if not only_reads and self.preserver.newest:
            if self.policy is None and not self.snapshot_id:
                return self._relay_known(found)
            return self._relay_preserved(found)
        return self._relay_found(found, only_reads)

    def _relay_known(self, found: Sequence[Simple]) -> int:
        """``_relay_found`` while a snapshot is open, as long as what is to be written is known to be preserved."""
        kind = self.choose_kind(False)
        if kind is None:
            self.hold_until_drained()
            return sum(len(item[1]) for item in found)
        routes_of_slot = self.routes_of_slot
        slots = self.slots
        touched = self.hub.touched
        count = reads = 0
        for command, raw, hash_slot, key in found:
            route = routes_of_slot[hash_slot][kind]
            if not route.is_free:
                break
            if command.only_reads:
                reads += 1
            elif key not in route.known:  # type: ignore[union-attr]  # as in ``_relay_found``
                break
            count += 1
            slot = RequestSlot(self, command, raw, hash_slot)
            slots.append(slot)
            route.owed.append(slot)  # type: ignore[union-attr]
            route.out.append(raw)  # type: ignore[union-attr]
            if not route.dirty:  # type: ignore[union-attr]
                touched(route)  # type: ignore[arg-type]
        if count:
            self.end_preserving()
            self.commands += count
            self._last_command = found[count - 1][0]
            self.exchange.reads.strong_total += reads
        return self._relay_preserved(found[count:]) if count < len(found) else 0

    def _relay_preserved(self, found: Sequence[Simple]) -> int:
        """While a snapshot is open: those before the first write whose key is not preserved, which then is."""
        kind = self._kinds[Lane.WRITE]
        routes_of_slot = self.routes_of_slot
        for place, (command, _, hash_slot, key) in enumerate(found):
            if not command.only_reads:
                route = routes_of_slot[hash_slot][kind]
                if route.ready and key not in route.known:  # type: ignore[union-attr]  # as in ``_relay_found``
                    return self._preserve_first(found, place)
        self.end_preserving()
        return self._relay_found(found, False)

    def _preserve_first(self, found: Sequence[Simple], first: int) -> int:
        """``_relay_preserved`` where the write at place ``first`` has to wait until its key is preserved."""
        kind = self._kinds[Lane.WRITE]
        missing: dict[int, list[bytes]] = {}
        for command, _, hash_slot, key in found[first:]:
            route = self.routes_of_slot[hash_slot][kind]
            if not command.only_reads and route.ready and key not in route.known:  # type: ignore[union-attr]
                missing.setdefault(hash_slot, []).append(key)
        untaken = 0
        taken = found[:first]
        if taken:
            self.end_preserving()
            untaken = self._relay_found(taken, all(item[0].only_reads for item in taken))
        rest = found[first:]
        if not untaken and not self.is_held:
            command, _, hash_slot, key = rest[0]
            if self._preserve_refusal is not None and self._preserves_several:
                self._preserve_refusal = None
                self.preserve({hash_slot: [key]})  # alone, for the refusal may be another's
            elif (refusal := self.take_preserve_refusal()) is None:
                if not self.has_permit(hash_slot, self.priority_of(key), only_reads=False):
                    return untaken + sum(len(item[1]) for item in rest)
                self.preserve(missing, several=sum(map(len, missing.values())) > 1)
            else:
                self.commands += 1
                self._reply(command, refusal)
                rest = rest[1:]
        return untaken + sum(len(item[1]) for item in rest)

    def _relay_found(self, found: Sequence[Simple], only_reads: bool) -> int:
        if self.snapshot_id:
            return self._relay_at_snapshot(found)
        if self.policy is not None:
            return self._relay_by_policy(self.policy, found, only_reads)
        if only_reads:
            self.exchange.reads.strong_total += len(found)
        elif len(found) > 1:
            self.exchange.reads.strong_total += sum([item[0].only_reads for item in found])
        kind = self.choose_kind(only_reads)
        if kind is None:
            self.hold_until_drained()
            return sum(len(item[1]) for item in found)
        routes_of_slot = self.routes_of_slot
        slots = self.slots
        touched = self.hub.touched
        self.commands += len(found)
        self._last_command = found[-1][0]
        for command, raw, hash_slot, key in found:
            route = routes_of_slot[hash_slot][kind]
            if route.is_free:
                slot = RequestSlot(self, command, raw, hash_slot)
                slots.append(slot)
                route.owed.append(slot)  # type: ignore[union-attr]  # only a NodeConnection is ever free
                route.out.append(raw)  # type: ignore[union-attr]
                if not route.dirty:  # type: ignore[union-attr]
                    touched(route)  # type: ignore[arg-type]
                continue
            if not self.has_permit(hash_slot, self.priority_of(key), only_reads=command.only_reads):
                return self._untaken(found, raw, 0)
            if route.ready:
                slot = RequestSlot(self, command, raw, hash_slot)
                slots.append(slot)
                route.queue(slot)  # type: ignore[union-attr]
                continue
            self.relay(command, raw, hash_slot)
            # It waits, or its node takes reads only and it changed the lane: the rest must choose anew (rule 5).
            if self._retrying or self._kind != kind:
                return self._untaken(found, raw, 1)
        return 0

    def _untaken(self, found: Sequence[Simple], raw: bytes, taken: int) -> int:
        """Bytes from the request ``raw`` on, or from the next if it was ``taken``; they were counted as commands."""
        place = next(place for place, item in enumerate(found) if item[1] is raw) + taken
        self.commands -= len(found) - place
        return sum(len(item[1]) for item in found[place:])

    def _relay_by_policy(self, policy: ReadPolicy, found: Sequence[Simple], only_reads: bool) -> int:
        """The same for a client whose reads may go to replicas."""
        if only_reads and (refusal := policy.take_refusal()) is not None:
            self.commands += len(found)
            for item in found:
                self._reply(item[0], refusal)
            return 0
        is_free = self.may_read_elsewhere(only_reads)
        kind = self.choose_kind(only_reads)
        if kind is None:
            self.hold_until_drained()
            return sum(len(item[1]) for item in found)
        reads = self.exchange.reads
        if not only_reads:
            policy.note_write([item[2] for item in found if not item[0].only_reads])
        self.commands += len(found)
        self._last_command = found[-1][0]
        of_slot, slots, looks_at_keys = reads.of_slot, self.slots, policy.looks_at_keys
        asked = policy.asked
        session = policy.session if asked is not None and asked.is_session else None
        for command, raw, hash_slot, key in found:
            if command.only_reads:
                if looks_at_keys:
                    asked = policy.of_key(key)
                    session = policy.session if asked is not None and asked.is_session else None
                is_suited = command.is_read_at_replicas
                shard = of_slot[hash_slot] if is_free and is_suited else None
                group: ReadGroup | None
                # As group_elsewhere finds, at less cost.
                if shard is not None and asked is not None and shard.has_readable:
                    self._is_collecting = True
                    group = (session or asked).open_groups.get(shard)
                    if group is None:
                        group = reads.group(shard, asked, session)
                else:
                    group = self.group_elsewhere(hash_slot, asked, is_free=is_free, is_suited=is_suited)
                if group is not None:
                    read = ReplicaSlot(self, command, raw, hash_slot, group)
                    slots.append(read)
                    group.reads.append(read)
                    continue
                is_free = False  # see ``may_read_elsewhere``
            if not self.routes_of_slot[hash_slot][kind].is_free and not self.has_permit(
                hash_slot, self.priority_of(key), only_reads=command.only_reads
            ):
                return self._untaken(found, raw, 0)
            slot = RequestSlot(self, command, raw, hash_slot)
            self.slots.append(slot)
            self.send(slot, None if self._is_collecting and not command.is_read_at_replicas else kind)
            if self._retrying:
                return self._untaken(found, raw, 1)
        return 0

    async def _check_session(self) -> bytes:
        """After a change of the map. What it finds stands in the session."""
        if self.policy is not None:
            await self.policy.check(self.exchange, trio.current_time() + self.exchange.deadline_seconds)
        return b""

    # -- commands that need a look

    def _command(self, arguments: list[bytes], raw: bytes) -> bool:
        """Take one request; False when it was not taken, because what it writes has to be preserved first."""
        command = lookup(arguments)
        if (shed := self.permits.take_refusal()) is not None:
            if self.transaction is not None:  # it was EXEC
                self.transaction = None
                self._update_plain()
            self._reply(command or _QUIT, shed)
            return True
        if command is None and arguments[0][:7].upper() == steady.PREFIX:
            self._steady(arguments)
            return True
        if command is None and arguments[0].upper() in _HTTP_WORDS:
            log.warning("http_refused", client=self.id, address=self.peer_address)
            self.close("spoke HTTP")
            return True
        if (closed := answers.gate(self, command)) is not None:
            self._reply(command or _QUIT, closed)
            return True
        failure = refusal(command, arguments)
        if command is None or failure is not None:
            if self.transaction is not None:
                self.transaction.failed = True
            self._reply(_QUIT, encode.error(failure or "ERR unknown command"))
            return True
        if self.preserver.newest and (held := self._hold_for_preserving(command, arguments)) is not None:
            return held
        return self._dispatch(command, arguments, raw)

    def _dispatch(self, command: Command, arguments: list[bytes], raw: bytes) -> bool:
        """False when it was not taken, because it has no permit."""
        name = command.name
        self._last_command = command
        if command.has_keys:
            self._hot.countdown -= 1
            if self._hot.countdown < 0:
                self._hot.look_at(command, arguments)
        if (
            self.policy is not None
            and self.transaction is None
            and not self._note_by_policy(command, arguments)
        ):
            return True
        if self.transaction is not None and name not in _NEVER_QUEUED:
            self._queue(command, arguments, raw)
        elif self.snapshot_id and name not in _NEVER_QUEUED and _is_of_snapshot(command, arguments):
            return self._read_at_snapshot(command, arguments, raw)
        elif name in SPLIT_RULES:
            return self._split(command, arguments, raw)
        elif name == "EXEC" and not self._may_exec():
            return False
        elif (handler := _HANDLERS.get(name)) is not None:
            handler(self, command, arguments, raw)
        elif name in _CHANGING_RESP and self.in_flight():
            # What is in flight is still owed in the RESP version in which it was asked for.
            self._work(command, partial(self._answer_later, command, arguments))
        elif name in answers.ANSWERED:
            self._act_on(command, arguments, answers.answer(self, arguments, time.time()))
        elif name in SUBSCRIPTION_COMMANDS:
            self._subscribe(command, arguments)
        elif name in GATHERED:
            self._work(command, partial(GATHERED[name], self, arguments))
        else:
            return self._relay_keyed(command, arguments, raw)
        return True

    def _hold_for_preserving(self, command: Command, arguments: list[bytes]) -> bool | None:
        """While a snapshot is open: None when the command may go on, False when it waits, True when it is refused."""
        missing = self.unpreserved(self._keys_to_preserve(command, arguments))
        if not missing:
            return None
        refusal = self.take_preserve_refusal()
        if refusal is None:
            # A node that is asked for too much is not asked to preserve for what it would not do then.
            if self.has_permits(missing, self.priority, only_reads=False):
                self.preserve(missing)
            return False
        if self.transaction is not None:
            self.transaction = None
            self._update_plain()
        self._reply(command, refusal)
        return True

    def _keys_to_preserve(self, command: Command, arguments: list[bytes]) -> dict[int, list[bytes]]:
        """The keys that are written by what this command sends at once, by hash slot."""
        keys: list[bytes] = []
        if self.transaction is not None:
            if command.name != "EXEC" or self.transaction.failed or self.watch is not None:
                return {}
            keys = written_keys(self.transaction.queued)
        elif command.has_keys and not command.only_reads and command.name not in answers.ANSWERED:
            try:
                if not blocks(command, arguments):  # else by its task
                    keys = [arguments[position] for position in write_positions(command, arguments)]
            except KeysError:
                return {}  # who dispatches it says so
        found: dict[int, list[bytes]] = {}
        for key in keys:
            found.setdefault(slot_of(key), []).append(key)
        if len(found) > 1 and command.name not in SPLIT_RULES:
            return {}  # refused, or sent slot by slot in a task
        return found

    # -- reads as of a snapshot

    def snapshot_now(self) -> int | bytes:
        """The id of the snapshot that this client's reads are of now; or the error reply that says why they are not."""
        snapshots = self.exchange.snapshots
        number = self.snapshot_id
        if number == CURRENT:
            current = snapshots.current()
            if current is None:
                return encode.error(NO_SNAPSHOT)
            number = current
        return snapshots.refusal(number) or number

    def _relay_at_snapshot(self, found: Sequence[Simple]) -> int:
        """``_relay_found`` for a client whose reads are of a snapshot; its writes are as any other's."""
        number = self.snapshot_now()
        reads = self.exchange.snapshot_reads
        kind = self._kinds[Lane.READ]
        routes_of_slot = self.routes_of_slot
        touched, step = self.hub.touched, self.hub.step
        at_replicas = reads.replicas.is_used
        shelf = reads.cache.shelf(number, self.resp) if isinstance(number, int) else None
        fast: FastReads | None = None
        hits: list[bytes] = []
        untaken = 0
        permits = self.permits
        self.commands += len(found)
        self._last_command = found[-1][0]
        for command, raw, hash_slot, key in found:
            if shelf is not None and command is GET:
                # ``snapshot_now`` has said in this step that the snapshot serves; if it ends in it, the shelf is empty.
                reply = shelf.get(key)
                if reply is not None:
                    hits.append(reply)
                    continue
                # One that waited for its permit was seen already, when it came.
                if permits.granted is None and reads.cache.is_read_again(key):
                    if hits:
                        self._reply_all(hits)
                    self.exchange.snapshot_fetches.read(self, raw, hash_slot, key, shelf)
                    if self.is_held:
                        untaken = self._untaken(found, raw, 1)
                        break
                    continue
            if hits:
                self._reply_all(hits)
            if isinstance(number, int) and command.only_reads:
                if fast is None:
                    fast = FastReads(self, reads, number)
                if at_replicas and (read := fast.at_replica(command, raw, hash_slot, key)) is not None:
                    self.slots.append(read)
                    continue
            route = routes_of_slot[hash_slot][kind]
            if not route.is_free and not self.has_permit(
                hash_slot, self.priority_of(key), only_reads=command.only_reads
            ):
                untaken = self._untaken(found, raw, 0)
                break
            if isinstance(number, int) and command.only_reads:
                assert fast is not None
                slot = fast.slot(command, raw, hash_slot, key, route.history) if route.ready else None  # type: ignore[union-attr]  # as in ``_relay_found``
                if slot is not None:
                    self.slots.append(slot)
                    if route.guarded_step != step:  # type: ignore[union-attr]
                        reads.histories.guard(route, step)  # type: ignore[arg-type]
                    route.load.in_flight += 1  # type: ignore[union-attr]
                    route.owed.append(slot)  # type: ignore[union-attr]
                    route.out.append(slot.raw)  # type: ignore[union-attr]
                    if not route.dirty:  # type: ignore[union-attr]
                        touched(route)  # type: ignore[arg-type]
                    continue
            if not command.only_reads:
                self.relay(command, raw, hash_slot)
            elif is_plain(command):
                self._read_plain(command, raw, hash_slot, key)
            else:
                self._read_at_snapshot(command, decode(raw), raw)
            if self.is_held:
                untaken = self._untaken(found, raw, 1)
                break
        if hits:
            self._reply_all(hits)
        return untaken

    def _reply_all(self, hits: list[bytes]) -> None:
        """Answer reads of a snapshot from the cache; in one slot, for one each would cost more than the look-up."""
        reads = self.exchange.snapshot_reads
        reads.cache.hits_total += len(hits)
        reads.reads_total += len(hits)
        joined = b"".join(hits)
        for reply in (joined,) if len(joined) <= HITS_BYTES else tuple(hits):
            slot = RequestSlot(self, GET, b"", -1)
            slot.reply = reply
            self.slots.append(slot)
        hits.clear()
        if not self.dirty:
            self.hub.touched(self)

    def _read_plain(self, command: Command, raw: bytes, hash_slot: int, key: bytes) -> None:
        number = self.snapshot_now()
        if isinstance(number, bytes):
            self._reply(command, number)
            return
        reads = self.exchange.snapshot_reads
        reads.reads_total += 1
        slot = SnapshotSlot(self, command, raw, hash_slot, key, number)
        slot_count = len(self.slots)
        self.slots.append(slot)
        self._mute(slot_count)
        connection = reads.connection_for(hash_slot, self._kinds[Lane.READ], number)
        if connection is None:
            slot.wait("its slot is moving, or its node has not shown yet that it has the snapshot's data")
        else:
            slot.send(self.exchange, connection)

    def _read_at_snapshot(self, command: Command, arguments: list[bytes], raw: bytes) -> bool:
        """False when it was not taken, because it has no permit."""
        if is_plain(command):
            remember_simple(raw, 0, command, len(arguments))
            key = arguments[1]
            hash_slot = slot_of(key)
            if not self.has_permit(hash_slot, self.priority_of(key), only_reads=True):
                return False
            self._read_plain(command, raw, hash_slot, key)
        else:
            self._work(command, partial(self._read_in_steps, command, arguments))
        return True

    async def _read_in_steps(self, command: Command, arguments: Sequence[bytes]) -> bytes:
        number = self.snapshot_now()
        if isinstance(number, bytes):
            return number
        self.exchange.snapshot_reads.reads_total += 1
        deadline = trio.current_time() + self.exchange.deadline_seconds
        return await self.exchange.snapshot_reads.read_at(
            number, command, arguments, resp=self.resp, deadline=deadline, priority=self.priority
        )

    async def _read_block(self, transaction: Transaction) -> bytes:
        """A transaction that only reads, as of the snapshot: its commands all show the same moment anyway."""
        replies = [await self._read_in_steps(item.command, decode(item.raw)) for item in transaction.queued]
        return encode.array(replies)

    def _note_by_policy(self, command: Command, arguments: list[bytes]) -> bool:
        """Let the session know of what goes to owners; False when it is answered here, because it is refused."""
        policy = self.policy
        assert policy is not None
        if command.only_reads and command.has_keys and (refusal := policy.take_refusal()) is not None:
            self._reply(command, refusal)
            return False
        session = policy.session
        if session is not None:
            if command.only_reads:
                session.read_somewhere()
            elif command.may_write:
                session.wrote_somewhere()
        return True

    def _relay_keyed(self, command: Command, arguments: list[bytes], raw: bytes) -> bool:
        """A command whose keys, found by its specifications, must share a slot; or one that any node can run.

        False when it was not taken, because it has no permit.
        """
        try:
            positions = routing_positions(command, arguments)
        except KeysError as error:
            self._reply(command, encode.error(str(error)))
            return True
        hash_slots = {slot_of(arguments[position]) for position in positions}
        if len(hash_slots) > 1:
            self._reply(command, CROSS_SLOT)
            return True
        # Without keys any node will do: a slot by the first argument spreads scripts and keeps a channel's order.
        hash_slot = hash_slots.pop() if hash_slots else slot_of(arguments[min(1, len(arguments) - 1)])
        if command.name in ("EVAL", "EVAL_RO"):
            self.exchange.scripts.remember(arguments[1])
        if blocks(command, arguments):
            writes = tuple(arguments[position] for position in write_positions(command, arguments))
            self._work(command, partial(self._block, command, raw, hash_slot, writes), cancel_on_close=True)
            return True
        priority = self.priority_of(arguments[positions[0]]) if positions else self.priority
        # Without a permit a read by policy may go to a replica; else it waits in ``send``.
        if (self.policy is None or not command.only_reads) and not self.has_permit(
            hash_slot, priority, only_reads=command.only_reads
        ):
            return False
        if command.is_single_key_first and raw[0] == 42:
            remember_simple(raw, 0, command, len(arguments))
        if self.policy is None and command.only_reads:
            self.exchange.reads.strong_total += 1
        slot_count = len(self.slots)
        self.relay(command, raw, hash_slot)
        self._mute(slot_count)
        return True

    async def _block(self, command: Command, raw: bytes, hash_slot: int, writes: tuple[bytes, ...]) -> bytes:
        self.is_blocked = True
        if self._pacer is not None:
            self._pacer.recount()
        self._unblocked_with = None
        try:
            with trio.CancelScope() as self._block_scope:
                return await execute_blocking(
                    self.exchange, raw, hash_slot, writes, resp=self.resp, repeatable=command.is_readonly
                )
        finally:
            self.is_blocked = False
        return self._unblocked_with or array_nil(self.resp)

    def unblock(self, *, with_error: bool) -> bool:
        """End this client's blocking command, as by its timeout or with an error. False if it is in none."""
        if not self.is_blocked:
            return False
        self._unblocked_with = UNBLOCKED if with_error else None
        self._block_scope.cancel()
        return True

    def _split(self, command: Command, arguments: list[bytes], raw: bytes) -> bool:
        if command.name == "MSET" and len(arguments) % 2 == 0:
            self._reply(command, encode.error("ERR wrong number of arguments for 'mset' command"))
            return True
        slot_count = len(self.slots)
        if not dispatch_split(self, command, arguments, raw, self.priority_of(arguments[1])):
            return False
        self._mute(slot_count)
        return True

    def _act_on(self, command: Command, arguments: list[bytes], answer: Answer) -> None:
        """Carry out what the proxy's own answer asks for."""
        match answer:
            case bytes():
                if self._kinds is not KINDS[self.resp]:
                    self.set_resp(self.resp)
                self._update_plain()
                if answer:
                    self._reply(command, answer)
            case Refused(reply):
                self._reply(command, reply)
            case CloseAfter(reply):
                self._fail(reply)
            case ResetAfter(reply):
                self.set_resp(2)
                self._work(command, partial(self._reset, reply))
            case GatherKeyspace(sections):
                self._work(command, partial(self._info, sections))
            case AskAnyNode():
                self._work(command, partial(ask_any_node, self, arguments))
            case _:
                assert_never(answer)

    async def _answer_later(self, command: Command, arguments: list[bytes]) -> bytes:
        """HELLO or RESET, when all that came before is answered."""
        answer = answers.answer(self, arguments, time.time())
        if isinstance(answer, ResetAfter):
            self.set_resp(2)
            return await self._reset(answer.reply)
        assert isinstance(answer, bytes)
        self.set_resp(self.resp)
        self._update_plain()
        return answer

    async def _info(self, sections: Sequence[str]) -> bytes:
        bodies = await gather_keyspace(self)
        keyspace = None if bodies is None else Keyspace.merge(bodies)
        return info_reply(self, sections, time.time(), keyspace)

    async def _reset(self, reply: bytes) -> bytes:
        self.transaction = None
        self.read_level = None
        self.choose_policy()
        self.set_priority(None)
        self._unwatch()
        if self.subscriptions is not None:
            self.subscriptions.close()
            self.subscriptions = None
        self._update_plain()
        return reply

    # -- the proxy's own commands

    def choose_policy(self, session: Session | None = None) -> None:
        """Find out anew what reads get, from who chose what. ``session``: to go on with, if not the one there is."""
        choice = self.server.level_choice(self.read_level, self._listener_level)
        usual = choice.usual
        if usual.level is Level.SNAPSHOT:  # of all keys: a connection's reads are of one snapshot or of none
            self.snapshot_id = CURRENT if usual.snapshot_id is None else usual.snapshot_id
            self.policy = None
            return
        self.snapshot_id = 0
        if is_strong(choice):
            self.policy = None
            return
        if session is None and uses(choice, Level.SESSION):
            session = self.policy.session if self.policy is not None else None
            session = session or Session(self.exchange.replicas)
        self.policy = ReadPolicy(choice, self.exchange.reads, self.resp, session)

    def set_resp(self, resp: int) -> None:
        super().set_resp(resp)
        self.choose_policy()

    def set_priority(self, asked: Priority | None) -> None:
        """``asked``: by the client for all that it sends; None: as rules for keys, its user and listener say."""
        self._asked_priority = asked
        usual = self.listener_priority if self.owner.priority is None else self.owner.priority
        self.priority = int(usual if asked is None else asked)
        self.priority_rules = self.server.priority_rules if asked is None else ()

    def _steady(self, arguments: list[bytes]) -> None:
        if (closed := answers.gate(self, None)) is not None:
            self._reply(_QUIT, closed)
            return
        try:
            asked = steady.parse(arguments)
            if self.transaction is not None:
                self.transaction.failed = True
                name = arguments[0].upper().decode()
                raise steady.SteadyError(f"ERR {name} is not run in a transaction; send it before MULTI")
        except steady.SteadyError as problem:
            self._reply(_QUIT, encode.error(str(problem)))
            return
        match asked:
            case steady.AskLevel():
                level = "auto" if self.read_level is None else str(self.read_level)
                self._reply(_QUIT, encode.bulk(level.encode()))
            case steady.SetLevel(level, token):
                if token is None and (level is None or level.level is not Level.SESSION):
                    # At another level, a read of the same key could overtake reads elsewhere. And a snapshot may have
                    # to be looked up in the store.
                    is_snapshot = level is not None and level.level is Level.SNAPSHOT
                    if self.has_reads_elsewhere or is_snapshot:
                        self._work(_QUIT, partial(self._set_level_later, level))
                    else:
                        self._reply(_QUIT, self._set_level(level))
                else:  # in a task, so that it comes after everything that is in flight
                    self._work(_QUIT, partial(self._begin_session, level, token))
            case steady.AskPriority():
                self._reply(_QUIT, encode.bulk(str(Priority(self.priority)).encode()))
            case steady.SetPriority(priority):
                self.set_priority(priority)
                self._reply(_QUIT, encode.OK)
            case steady.MakeToken():
                self._work(_QUIT, self._make_token)
            case steady.Explain(read):
                self._work(_QUIT, partial(self._explain, read))
            case steady.OpenSnapshot():
                operator = operator_of_client(self.name, self.peer_address)
                self._work(_QUIT, partial(snapshots.open_, self.exchange.snapshots, asked, operator))
            case steady.CloseSnapshot():
                self._work(_QUIT, partial(self._close_snapshot, asked))
            case steady.ListSnapshots() | steady.ShowSnapshot():
                reply = snapshots.show(self.exchange.snapshots, asked, resp3=self.resp == 3)
                self._reply(_QUIT, reply)
            case _:
                assert_never(asked)

    def _set_level(self, level: ReadLevel | None) -> bytes:
        if level is not None and level.level is Level.SNAPSHOT:
            bound = snapshots.bound(self.exchange.snapshots, level)
            if isinstance(bound, bytes):
                return bound
            level = bound
        self.read_level = level
        self.choose_policy()
        return encode.OK

    async def _set_level_later(self, level: ReadLevel | None) -> bytes:
        if level is not None and level.level is Level.SNAPSHOT:
            await self.exchange.snapshots.catch_up(level.snapshot_id)  # another proxy may just have opened it
        return self._set_level(level)

    async def _close_snapshot(self, asked: steady.CloseSnapshot) -> bytes:
        operator = operator_of_client(self.name, self.peer_address)
        return await snapshots.close(self.exchange.snapshots, asked, operator, self.server.mode)

    async def _begin_session(self, level: ReadLevel | None, token: bytes | None) -> bytes:
        if token is None:
            session: Session | bytes = Session(self.exchange.replicas)
        else:
            deadline = trio.current_time() + self.exchange.deadline_seconds
            session = await Session.of_token(token, self.exchange, deadline)
        if isinstance(session, bytes):
            return session
        self.read_level = level
        self.choose_policy(session)
        return encode.OK

    async def _make_token(self) -> bytes:
        deadline = trio.current_time() + self.exchange.deadline_seconds
        if self.policy is not None and self.policy.session is not None:
            return await self.policy.session.token(self.exchange, deadline)
        return await token_of_now(self.exchange, deadline)

    async def _explain(self, read: Sequence[bytes]) -> bytes:
        choice = self.server.level_choice(self.read_level, self._listener_level)
        session = None if self.policy is None else self.policy.session
        deadline = trio.current_time() + self.exchange.deadline_seconds
        try:
            explanation = await explain(self.exchange, read, choice, session, deadline, resp=self.resp)
        except ExplainError as problem:
            return encode.error(f"ERR {problem}")
        return reply_of(explanation, resp3=self.resp == 3)

    # -- transactions

    def _multi(self, command: Command, arguments: list[bytes], raw: bytes) -> None:
        if self.transaction is not None:
            self._reply(command, NESTED_MULTI)
            return
        self.transaction = Transaction()
        self._update_plain()
        self._reply(command, encode.OK)

    def _queue(self, command: Command, arguments: list[bytes], raw: bytes) -> None:
        """Keep a command for EXEC, or refuse it now, which makes EXEC discard."""
        transaction = self.transaction
        assert transaction is not None
        refused: bytes | None = None
        keys: tuple[bytes, ...] = ()
        hash_slots: set[int] = set()
        if (
            command.name in answers.ANSWERED
            or command.name in GATHERED
            or command.name in SUBSCRIPTION_COMMANDS
        ):
            refused = encode.error(
                f"ERR {command.name} is not run in a transaction here: it does not belong to one slot;"
                " send it before MULTI or after EXEC"
            )
        else:
            try:
                keys = tuple(arguments[position] for position in key_positions(command, arguments))
            except KeysError as error:
                refused = encode.error(str(error))
            hash_slots = {slot_of(key) for key in keys}
            if len(hash_slots) > 1:
                refused = CROSS_SLOT
        if transaction.bytes_queued + len(raw) > self.limits.request_bytes_max:
            refused = encode.error(
                f"ERR transaction over {self.limits.request_bytes_max} bytes (setting clients.request_bytes_max)"
            )
        if refused is not None:
            transaction.failed = True
            self._reply(command, refused)
            return
        if command.name in ("EVALSHA", "EVALSHA_RO"):
            # Within a block, NOSCRIPT could not be healed any more.
            raw = self.exchange.scripts.heal(raw) or raw
        transaction.bytes_queued += len(raw)
        transaction.queued.append(Queued(command, raw, hash_slots.pop() if hash_slots else -1, keys))
        self._reply(command, encode.QUEUED)

    def _exec(self, command: Command, arguments: list[bytes], raw: bytes) -> None:
        transaction, watched = self.transaction, self.watch
        if transaction is None:
            self._reply(command, EXEC_WITHOUT_MULTI)
            return
        self.transaction = None
        self._update_plain()
        hash_slots = {item.hash_slot for item in transaction.queued if item.hash_slot >= 0}
        refusal = self.policy.take_refusal() if self.policy is not None else None
        if self.policy is not None and (session := self.policy.session) is not None:
            if all(item.command.only_reads for item in transaction.queued):
                session.read_somewhere()
            else:
                session.wrote_somewhere()
        if transaction.failed:
            self._unwatch()
            self._reply(command, EXEC_ABORTED)
        elif refusal is not None and any(item.command.only_reads for item in transaction.queued):
            self._unwatch()
            self._reply(command, refusal)
        elif self.snapshot_id and any(item.command.only_reads for item in transaction.queued):
            self._unwatch()
            if all(item.command.only_reads for item in transaction.queued):
                self._work(command, partial(self._read_block, transaction))
            else:
                self._reply(command, MIXED_TRANSACTION)
        elif watched is not None:
            if hash_slots - {watched.hash_slot}:
                self._unwatch()
                self._reply(command, CROSS_SLOT_WATCH)
            else:
                self._work(command, partial(self._exec_watched, watched, transaction))
        elif not transaction.queued:
            self._reply(command, encode.EMPTY_ARRAY)
        elif len(hash_slots) <= 1:
            slot_count = len(self.slots)
            dispatch_block(self, transaction.queued, hash_slots.pop() if hash_slots else self.id % 16384)
            self._mute(slot_count)
        elif self.server.settings.commands.cross_slot_transactions is CrossSlotTransactions.PER_SLOT:
            self._work(command, partial(run_blocks, self, transaction))
        else:
            self._reply(command, CROSS_SLOT_TRANSACTION)

    def _may_exec(self) -> bool:
        """Whether the transaction may be sent now; one that waits for something else asks later."""
        transaction = self.transaction
        if transaction is None or transaction.failed or self.watch is not None or self.snapshot_id:
            return True
        items = [item for item in transaction.queued if item.keys]
        if len({item.hash_slot for item in items}) != 1:
            return True
        only_reads = all(item.command.only_reads for item in transaction.queued)
        return self.has_permit(items[0].hash_slot, self.priority_of(items[0].keys[0]), only_reads=only_reads)

    async def _exec_watched(self, watched: Watch, transaction: Transaction) -> bytes:
        try:
            return await watched.run(transaction.queued, self.exchange, self.resp)
        finally:
            self.watch = None
            self.watched_keys = 0
            self.exchange.private.release(watched.connection)

    def _discard(self, command: Command, arguments: list[bytes], raw: bytes) -> None:
        if self.transaction is None:
            self._reply(command, DISCARD_WITHOUT_MULTI)
            return
        self.transaction = None
        self._unwatch()
        self._update_plain()
        self._reply(command, encode.OK)

    def _watch(self, command: Command, arguments: list[bytes], raw: bytes) -> None:
        if self.transaction is not None:
            self._reply(command, WATCH_IN_MULTI)
            return
        hash_slots = {slot_of(key) for key in arguments[1:]}
        if self.watch is not None:
            hash_slots.add(self.watch.hash_slot)
        if len(hash_slots) > 1:
            self._reply(command, CROSS_SLOT_WATCH)
            return
        self._work(command, partial(self._watch_keys, raw, hash_slots.pop(), len(arguments) - 1))

    async def _watch_keys(self, raw: bytes, hash_slot: int, count: int) -> bytes:
        result = await watch(raw, hash_slot, self.exchange, self.resp, self.watch)
        if isinstance(result, bytes):
            return result
        if self.is_closed:
            self.exchange.private.discard(result.connection)
        else:
            self.watch = result
            self.watched_keys += count
        return encode.OK

    def _unwatch_command(self, command: Command, arguments: list[bytes], raw: bytes) -> None:
        self._unwatch()
        self._reply(command, encode.OK)

    def _unwatch(self) -> None:
        if self.watch is not None:
            self.exchange.private.discard(self.watch.connection)  # which ends the watch at the node
            self.watch = None
            self.watched_keys = 0

    # -- subscriptions

    @property
    def is_subscribed(self) -> bool:
        return self.subscriptions is not None and self.subscriptions.count > 0

    def _subscribe(self, command: Command, arguments: list[bytes]) -> None:
        if self.subscriptions is None:
            self.subscriptions = Subscriptions(self)
        # Past CLIENT REPLY OFF too: confirmations are pushes, and messages come behind them.
        self.start_work(
            command, partial(self._change_subscriptions, command, arguments), cancel_on_close=True
        )
        if self.reply_mode is ReplyMode.SKIP_NEXT:
            self.reply_mode = ReplyMode.ON
            self._update_plain()

    async def _change_subscriptions(self, command: Command, arguments: list[bytes]) -> bytes:
        assert self.subscriptions is not None
        reply = await self.subscriptions.change(command, arguments)
        self._update_plain()
        return reply

    def push(self, data: bytes) -> None:
        """Write a message that is no reply, between two replies."""
        if not self.is_closed:
            self.sent_bytes += len(data)
            self.transport.write(data)
            self._pace()

    # -- whose connection it is, and the limits that follow

    @property
    def user(self) -> bytes:
        """The name of who is logged in."""
        return self.owner.name

    @user.setter
    def user(self, name: bytes) -> None:
        if name == self.owner.name:
            return
        self.owner.commands_before += self.commands_as_user
        self._commands_before = self.commands
        self.owner = self.server.users.of(name)
        self.adopt_user()

    @property
    def commands_as_user(self) -> int:
        """How many it has sent as who it is."""
        return self.commands - self._commands_before

    def adopt_user(self) -> None:
        """Its user, or what that may do, is another now."""
        self.set_priority(self._asked_priority)
        before = self._pacer
        if self.owner.limits is (None if before is None else before.user):
            return
        self._choose_pacer()
        self._commands_max = self.commands  # how much else it may take in this pass, the next one asks
        if before is not None:
            before.leave()

    def _choose_pacer(self) -> None:
        limits = self.owner.limits
        has_limit = self._bucket is not None or limits is not None
        self._pacer = Pacer(self, self.server.pacing, self._bucket, limits) if has_limit else None

    # -- replies out

    def flush(self) -> None:
        """Write the replies that are next in order, then go on with what waits unparsed."""
        if self._retrying or self._draining:
            self.advance()
        slots = self.slots
        if slots and slots[0].reply is not None:
            if len(slots) == 1 and not self._silent:
                data = slots.popleft().reply
            else:
                data = self._take_replies()
            if data:
                self.sent_bytes += len(data)
                self.transport.write(data)
        pacer = self._pacer
        if pacer is not None:
            pacer.recount()
        permits = self.permits
        if self._unread_bytes and not self._retrying and not self._draining and not permits.is_waiting:
            self._process()
        if pacer is not None:
            pacer.end_flush()
        if permits.granted is not None:
            permits.end_pass(is_all=False)
        if self._is_paused or self._is_closing or self._is_ended or slots or self.transport.unsent_bytes:
            self._pace()

    def _take_replies(self) -> bytes:
        slots = self.slots
        replies = []
        while slots and (reply := slots[0].reply) is not None:
            slot = slots.popleft()
            if slot in self._silent:
                self._silent.discard(slot)
            else:
                replies.append(reply)
        return b"".join(replies)

    def on_sent(self) -> None:
        if self._unread_bytes and not self.is_held:
            self._process()
        self._pace()

    def _unsent_bytes(self) -> int:
        unsent = self.transport.unsent_bytes
        if len(self.slots) > REPLIES_SUMMED_FROM:
            unsent += sum(len(slot.reply) for slot in self.slots if slot.reply is not None)
        return unsent

    def _has_too_much_open(self) -> bool:
        """More than may be, whatever it sends: then nothing more is dispatched."""
        limits = self.limits
        return len(self.slots) >= limits.open_requests_max or self._unsent_bytes() > limits.unsent_bytes_max

    def _pace(self) -> None:
        """Pause, resume, or end the client by what it has open, unsent and unparsed."""
        if self.is_closed:
            return
        open_requests, unsent = len(self.slots), self._unsent_bytes()
        limits = self.limits
        if unsent > limits.unsent_bytes_hard_max:
            self.close(f"more than {limits.unsent_bytes_hard_max} reply bytes unsent")
            return
        over = (
            open_requests >= limits.open_requests_max
            or unsent > limits.unsent_bytes_max
            or (
                self._unread_bytes > HELD_BYTES_MAX
                and (self.is_held or open_requests >= limits.open_requests_max)
            )
        )
        if over and not self._is_paused:
            self._is_paused = True
            self.transport.pause()
        elif self._is_paused and not over:
            if open_requests <= limits.open_requests_max // 2 and unsent <= limits.unsent_bytes_max // 2:
                self._is_paused = False
                if not self._is_ended:
                    self.transport.resume()
                if not self.is_held:
                    self._process()
        if not self.slots and not self.transport.unsent_bytes:
            # Unparsed bytes at this point are no whole request: those that were are dispatched.
            if self._is_closing or (self._is_ended and not self.is_held):
                self.close("done")

    # -- ending

    def on_end(self) -> None:
        """The client sends nothing more: finish what it asked for, then close. One that blocks is let go."""
        self._is_ended = True
        self.cancel_work()
        self._pace()

    def on_end_ahead(self) -> None:
        """Paused, and the client will send nothing more: one that blocks is let go, as nobody else would notice."""
        self.cancel_work()

    def close_when_done(self) -> None:
        """The proxy stops: parse nothing more, finish what is in flight, then close."""
        self._is_closing = True
        if not self.slots and not self.transport.unsent_bytes:
            self.close("stopping")

    def on_gone(self, reason: str) -> None:
        self.close(reason)

    def on_fault(self, error: Exception) -> None:
        self.close(f"internal fault: {error!r}")

    def close(self, reason: str) -> None:
        """End the connection. What is in flight for it is read and dropped; its work ends."""
        if self.is_closed:
            return
        self.is_closed = self._is_closing = True  # the latter ends a loop over its requests, too
        self.transport.close()
        self.permits.leave()
        if self._pacer is not None:
            self._pacer.leave()
        self.cancel_work()
        self._unwatch()
        if self.subscriptions is not None:
            self.subscriptions.close()
        self.slots.clear()
        for slot in self._retrying:
            slot.give_up()
        self._retrying.clear()
        self._growing = None
        self._unread.clear()
        self._unread_bytes = 0
        self.server.on_client_closed(self, reason)

    def _fail(self, reply: bytes) -> None:
        """Send a last reply after those that are owed, then close; later bytes are not looked at."""
        self._is_closing = True
        self._growing = None
        self._unread.clear()
        self._unread_bytes = 0
        slot = RequestSlot(self, _QUIT, b"", -1)
        slot.reply = reply
        self.slots.append(slot)
        self.hub.touched(self)

    # -- small steps

    def _reply(self, command: Command, reply: bytes) -> None:
        """Answer a command here, in its place in the order."""
        slot = RequestSlot(self, command, b"", -1)
        slot.reply = reply
        if reply[0] == 45:
            self.server.error_replies += 1
        self.slots.append(slot)
        self._mute(len(self.slots) - 1)
        self.hub.touched(self)

    def _work(self, command: Command, work: Work, *, cancel_on_close: bool = False) -> None:
        slot_count = len(self.slots)
        self.start_work(command, work, cancel_on_close=cancel_on_close)
        self._mute(slot_count)

    def _mute(self, slot_count: int) -> None:
        """Drop the reply of the slot just added, if CLIENT REPLY asked for that."""
        if self.reply_mode is ReplyMode.ON or len(self.slots) == slot_count:
            return
        self._silent.add(self.slots[-1])
        if self.reply_mode is ReplyMode.SKIP_NEXT:
            self.reply_mode = ReplyMode.ON
            self._update_plain()

    def _update_plain(self) -> None:
        self.is_plain = (
            self.authenticated
            and self.transaction is None
            and self.reply_mode is ReplyMode.ON
            and not (self.is_subscribed and self.resp == 2)
        )

    def figures(self) -> ClientFigures:
        subscriptions = self.subscriptions
        return ClientFigures(
            file_descriptor=-1,
            last_command=self._last_command.name.lower().encode() if self._last_command else b"NULL",
            unparsed_bytes=self._unread_bytes,
            unsent_bytes=self.transport.unsent_bytes,
            open_requests=len(self.slots),
            received_bytes=self.received_bytes,
            sent_bytes=self.sent_bytes,
            commands=self.commands,
            channels=len(subscriptions.channels) if subscriptions else 0,
            patterns=len(subscriptions.patterns) if subscriptions else 0,
            shard_channels=len(subscriptions.shard_channels) if subscriptions else 0,
            transaction_commands=len(self.transaction.queued) if self.transaction is not None else None,
            watched_keys=self.watched_keys,
            is_blocked=self.is_blocked,
        )


def _is_of_snapshot(command: Command, arguments: Sequence[bytes]) -> bool:
    """Whether this call only reads keys, so that a connection bound to a snapshot gets it as of that."""
    if command.only_reads or command.name == "PFCOUNT":
        return command.has_keys
    if not command.has_keys or command.name in SCRIPT_COMMANDS:
        return False
    try:
        return not write_positions(command, arguments)
    except KeysError:
        return False


def _known(name: bytes) -> Command:
    command = lookup([name])
    assert command is not None
    return command


_QUIT = _known(b"QUIT")  # stands for what is no command in slots that carry only a reply

_Handler = Callable[[ClientConnection, Command, list[bytes], bytes], None]
_HANDLERS: dict[str, _Handler] = {
    "MULTI": ClientConnection._multi,
    "EXEC": ClientConnection._exec,
    "DISCARD": ClientConnection._discard,
    "WATCH": ClientConnection._watch,
    "UNWATCH": ClientConnection._unwatch_command,
}
