"""A client's plain read of one key at a snapshot: where the key stands, or what stands for it; with or without markers.

``FastReads`` chooses. By what this proxy knows while it alone writes, no marker is asked for: ``UnwrittenRead``,
``ReplicaRead``, ``KeptRead``; or it is asked for with the pre-image: ``WrittenGet``. Else ``SnapshotGet`` asks for it
with the key, and ``SnapshotSlot`` behind it. What is not as expected is read the slow way (``snapshot_reads``).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import TYPE_CHECKING, Protocol

import trio

from proxy.exchange.open_requests import OpenRequests, RequestSlot
from proxy.exchange.snapshot_reads import ABSENT, PREIMAGE, Pair, SnapshotReads, stands_for
from proxy.protocol.absence import could_mean_absence
from proxy.protocol.canonical import canonical
from proxy.protocol.encode import array, frame
from proxy.protocol.replies import decode, elements
from proxy.protocol.requests import key_of_simple, with_key
from proxy.snapshots.own_writes import Kept, Written
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import Slot
from routing.command import Command
from routing.redirect import needs_attention
from routing.snapshot import Chain
from routing.snapshot_names import preimage
from routing.snapshot_reads import AS_IS, GET, PLAIN

if TYPE_CHECKING:
    from proxy.exchange.exchange import Exchange

NILS = (b"$-1\r\n", b"_\r\n")
NO_KEY = -2  # as PTTL says it


class SnapshotSlot(RequestSlot):
    """A client's plain read of one key at a snapshot."""

    __slots__ = ("chain", "fill", "is_instead", "key", "snapshot_id", "value")
    direct = False

    def __init__(
        self,
        requester: OpenRequests,
        command: Command,
        raw: bytes,
        hash_slot: int,
        key: bytes,
        snapshot_id: int,
    ) -> None:
        self.requester = requester  # not by ``super``: one is made for each read
        self.command = command
        self.raw = raw
        self.hash_slot = hash_slot
        self.reply = None
        self.redirect = None
        self.key = key
        self.snapshot_id = snapshot_id
        self.fill: Fill | None = None
        self.value = b""  # what was read in place; b"": nothing yet
        self.chain: Chain | None = None  # whose markers were asked
        self.is_instead = False  # what was sent last reads what stands for the key

    def send(self, exchange: Exchange, connection: NodeConnection) -> None:
        """Queue the read and the question behind it, in one step."""
        step = exchange.hub.step
        if connection.guarded_step != step:
            exchange.snapshots.histories.guard(connection, step)
        connection.queue_all((self, MarkerSlot(self, exchange.snapshot_reads.question(self))))

    def fill_for(self, keeper: Keeper) -> LifetimeSlot:
        """Have the reply kept, if it is used as right; what to queue in front of the read."""
        self.fill = Fill(keeper)
        return self.fill.ask_lifetime(self._read_first())

    def _read_first(self) -> bytes:
        """The key whose value is read first."""
        return self.key

    def keys(self) -> set[bytes]:
        return set()  # a write of the same key may come before or after it: it shows neither

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if not self.is_instead:
            self.value = reply
            return
        self._finish(reply)

    def on_marker(self, reply: bytes, connection: NodeConnection) -> None:
        """The markers were read behind the value."""
        requester = self.requester
        assert isinstance(requester, OpenRequests)
        snapshots = requester.exchange.snapshots
        chain = snapshots.preserver.chain
        if chain is self.chain:
            if _no_marker(reply):
                self._finish(self.value)
                return
            if reply in (PREIMAGE, ABSENT) and connection.ready:  # of the only id that was asked
                instead = stands_for(reply, self.hash_slot, self.snapshot_id, self.key)
                self.is_instead = True
                self.raw = with_key(self.raw, instead)
                snapshots.histories.guard(connection, requester.hub.step)
                if self.fill is None:
                    connection.queue(self)
                else:
                    connection.queue_all((self.fill.ask_lifetime(instead), self))
                return
        self.wait("its value was being written, or moved")

    def _finish(self, reply: bytes) -> None:
        requester = self.requester
        assert isinstance(requester, OpenRequests)
        snapshots = requester.exchange.snapshots
        if not snapshots.is_usable(self.snapshot_id) or (reply[0] == 45 and needs_attention(reply)):
            self.wait("it was turned away")
            return
        if self.is_instead and reply[0] == 45:
            instead = {self.key: key_of_simple(self.raw)}
            reply = canonical(AS_IS, reply, instead)  # which may name the key
        self.reply = reply
        if self.fill is not None:
            self.fill.use(reply)
        requester.hub.touched(requester)

    def wait(self, reason: str) -> None:
        """Read it the slow way."""
        fill, self.fill = self.fill, None
        requester = self.requester
        assert isinstance(requester, OpenRequests)
        if self.is_instead:
            self.raw = with_key(self.raw, self.key)
            self.is_instead = False
        requester.retry(self, reason)
        if fill is not None:
            fill.keeper.give_up()

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self.wait(f"the connection to {connection.address} ended")

    async def resolve(self, exchange: Exchange, resp: int, deadline: float) -> bytes:
        arguments: list[bytes] = decode(self.raw)
        return await exchange.snapshot_reads.read_at(
            self.snapshot_id,
            self.command,
            arguments,
            resp=resp,
            deadline=deadline,
            priority=self.requester.priority,
        )


class UnwrittenRead(SnapshotSlot):
    """One whose key this proxy, which alone writes, has not begun to write since the cut: there is no marker."""

    __slots__ = ("written",)

    def __init__(
        self,
        requester: OpenRequests,
        command: Command,
        raw: bytes,
        hash_slot: int,
        key: bytes,
        snapshot_id: int,
        written: Written,
    ) -> None:
        self.requester = requester  # not by ``super``: one is made for each read
        self.command = command
        self.raw = raw
        self.hash_slot = hash_slot
        self.reply = None
        self.redirect = None
        self.key = key
        self.snapshot_id = snapshot_id
        self.fill = None
        self.is_instead = False
        self.written = written

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        requester: OpenRequests = self.requester  # type: ignore[assignment]  # a cast costs time
        snapshots = requester.exchange.snapshots
        written = self.written
        if (
            self.key not in written
            and snapshots.own_writes.since.get(self.snapshot_id) is written
            and snapshots.is_usable(self.snapshot_id)
            and (reply[0] != 45 or not needs_attention(reply))
        ):
            self.reply = reply
            if self.fill is not None:
                self.fill.use(reply)
            if not requester.dirty:
                connection.hub.touched(requester)
        else:
            self.wait("its key was being written, or it was turned away")


class ReplicaRead(UnwrittenRead):
    """A read that a replica may serve; once ``history`` is b"", it is with the owner."""

    __slots__ = ("history",)

    def __init__(
        self,
        requester: OpenRequests,
        command: Command,
        raw: bytes,
        hash_slot: int,
        key: bytes,
        snapshot_id: int,
        written: Written,
        history: bytes,
    ) -> None:
        super().__init__(requester, command, raw, hash_slot, key, snapshot_id, written)
        self.history = history

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        reads = self._reads()
        if not self.history:
            super().on_reply(reply, connection)
        elif (
            connection.shown is not None
            and connection.shown.replid == self.history
            and not could_mean_absence(reply)
        ):
            reads.replicas.reads_total += 1
            super().on_reply(reply, connection)
        else:
            self._ask_owner(reads)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        if self.history:
            self._ask_owner(self._reads())
        else:
            super().on_lost(sent, connection)

    def _reads(self) -> SnapshotReads:
        requester: OpenRequests = self.requester  # type: ignore[assignment]  # a cast costs time
        return requester.exchange.snapshot_reads

    def _ask_owner(self, reads: SnapshotReads) -> None:
        self.history = b""
        requester: OpenRequests = self.requester  # type: ignore[assignment]
        owner = reads.connection_for(self.hash_slot, requester.kind_of(Lane.READ), self.snapshot_id)
        if owner is None or requester.is_closed:
            self.wait("a replica did not show that its key is there")
        else:
            reads.histories.guard(owner, requester.hub.step)
            owner.queue(self)


class KeptRead(SnapshotSlot):
    """One whose pre-image the node is known to have (``proxy.snapshots.own_writes``): it is asked for that at once."""

    __slots__ = ()

    def __init__(
        self,
        requester: OpenRequests,
        command: Command,
        raw: bytes,
        hash_slot: int,
        key: bytes,
        snapshot_id: int,
        request: bytes,
    ) -> None:
        self.requester = requester  # not by ``super``: one is made for each read
        self.command = command
        self.raw = request if command is GET else with_key(raw, preimage(hash_slot, snapshot_id, key))
        self.hash_slot = hash_slot
        self.reply = None
        self.redirect = None
        self.key = key
        self.snapshot_id = snapshot_id
        self.fill = None
        self.is_instead = True

    def _read_first(self) -> bytes:
        return preimage(self.hash_slot, self.snapshot_id, self.key)

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        requester: OpenRequests = self.requester  # type: ignore[assignment]  # a cast costs time
        if reply[0] != 45 and requester.exchange.snapshots.is_usable(self.snapshot_id):
            self.reply = reply
            if self.fill is not None:
                self.fill.use(reply)
            if not requester.dirty:
                connection.hub.touched(requester)
        else:
            self._finish(reply)


class WrittenGet(SnapshotSlot):
    """GET of a key that this proxy has begun to write since the cut: the pre-image and its marker in one MGET.

    A marker that is there was set behind the pre-image, which stays as it is as long as the snapshot serves.
    That such a marker is there is only a guess: without it the read goes the slow way.
    """

    __slots__ = ()

    def __init__(
        self,
        requester: OpenRequests,
        command: Command,
        hash_slot: int,
        key: bytes,
        snapshot_id: int,
        pair: Pair,
    ) -> None:
        self.requester = requester  # not by ``super``: one is made for each read
        self.command = command
        self.hash_slot = hash_slot
        self.reply = None
        self.redirect = None
        self.key = key
        self.snapshot_id = snapshot_id
        self.fill = None
        self.is_instead = False
        form, more = pair
        size = more + len(key)
        self.raw = form % (size, key, size, key)

    def _read_first(self) -> bytes:
        return preimage(self.hash_slot, self.snapshot_id, self.key)

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        requester: OpenRequests = self.requester  # type: ignore[assignment]  # a cast costs time
        # "*2", the value, and the marker: no value ends in one, for it would have a "\r\n" behind it.
        found = reply[-7:]
        is_kept = found == PREIMAGE and reply[4] == 36 and reply[5] != 45
        is_right = is_kept or (found == ABSENT and reply[4:-7] in NILS)
        if is_right and requester.exchange.snapshots.is_usable(self.snapshot_id):
            self.reply = reply[4:-7]
            if self.fill is not None:
                self.fill.use(self.reply)
            if not requester.dirty:
                connection.hub.touched(requester)
        else:
            self.wait("what stands for its key is not there, or of another type than GET reads")

    def wait(self, reason: str) -> None:
        self.raw = frame([b"GET", self.key])
        super().wait(reason)


class SnapshotGet(SnapshotSlot):
    """GET, the read that comes most: the value and its markers in one MGET, which the node answers in one step.

    What MGET cannot tell, whether the key is absent or of another type, is asked as of any other read.
    """

    __slots__ = ("is_pair",)

    def __init__(
        self,
        requester: OpenRequests,
        command: Command,
        hash_slot: int,
        key: bytes,
        snapshot_id: int,
        prefixes: tuple[bytes, ...],
        chain: Chain,
    ) -> None:
        self.requester = requester  # not by ``super``: one is made for each read
        self.command = command
        self.hash_slot = hash_slot
        self.reply = None
        self.redirect = None
        self.key = key
        self.snapshot_id = snapshot_id
        self.fill = None
        self.chain = chain
        self.is_instead = False
        self.is_pair = True
        if len(prefixes) == 1:
            (prefix,) = prefixes
            size = len(key)
            self.raw = b"*3\r\n$4\r\nMGET\r\n$%d\r\n%b\r\n$%d\r\n%b%b\r\n" % (
                size,
                key,
                len(prefix) + size,
                prefix,
                key,
            )
        else:
            self.raw = frame([b"MGET", key, *[prefix + key for prefix in prefixes]])

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if not self.is_pair:
            super().on_reply(reply, connection)
            return
        requester: OpenRequests = self.requester  # type: ignore[assignment]  # a cast costs time
        snapshots = requester.exchange.snapshots
        # "*2", the value, and a nil for the marker. A value of no length is two bytes longer than a nil.
        if (
            reply[-5:] == b"$-1\r\n"
            and reply[:4] == b"*2\r\n"
            and reply[5] != 45
            and snapshots.preserver.chain is self.chain
            and snapshots.is_usable(self.snapshot_id)
        ):
            self.reply = reply[4:-5]
            if self.fill is not None:
                self.fill.use(self.reply)
            if not requester.dirty:
                connection.hub.touched(requester)
            return
        self.is_pair = False
        self.raw = frame([b"GET", self.key])
        if reply[0] == 42 and connection.ready and snapshots.is_usable(self.snapshot_id):
            value, *markers = elements(reply)
            if _all_nil(markers):
                if value in NILS:
                    self.send(requester.exchange, connection)
                    return
                self.value = value
            self.on_marker(markers[0] if len(markers) == 1 else array(markers), connection)
        else:
            self.wait("it was turned away")

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        if self.is_pair:
            self.is_pair = False
            self.raw = frame([b"GET", self.key])
            self.wait(f"the connection to {connection.address} ended")
        else:
            super().on_lost(sent, connection)


UNWRITTEN = Kept(b"", b"")  # of a key that is not there


class FastReads:
    """How one client's reads at one snapshot may be sent at once, within one step."""

    __slots__ = (
        "_chain",
        "_client",
        "_histories",
        "_pairs",
        "_prefixes",
        "_reads",
        "_snapshot_id",
        "_written",
    )

    def __init__(self, client: OpenRequests, reads: SnapshotReads, snapshot_id: int) -> None:
        self._client = client
        self._reads = reads
        self._snapshot_id = snapshot_id
        self._histories = reads.histories_of(snapshot_id)
        self._prefixes = reads.prefixes_of(snapshot_id)
        self._pairs = reads.pairs_of(snapshot_id)
        self._written = reads.snapshots.own_writes.since.get(snapshot_id)
        self._chain = reads.snapshots.chain

    def at_replica(self, command: Command, raw: bytes, hash_slot: int, key: bytes) -> ReplicaRead | None:
        """Queued at a replica; None: it is not for one."""
        replicas, written, client = self._reads.replicas, self._written, self._client
        if written is None or key in written or command not in PLAIN:
            return None
        found = replicas.line(self._snapshot_id, hash_slot, client.resp)
        if found is None or not self._reads.snapshots.is_view_fresh(self._snapshot_id):
            return None
        replica, connection = found
        assert connection.shown is not None
        slot = ReplicaRead(
            client, command, raw, hash_slot, key, self._snapshot_id, written, connection.shown.replid
        )
        self._reads.reads_total += 1
        replica.reads_total += 1
        replicas.ask(replica, connection)
        connection.queue(slot)
        return slot

    def slot(
        self, command: Command, raw: bytes, hash_slot: int, key: bytes, history: bytes
    ) -> SnapshotSlot | None:
        """To be queued at the owner behind a guard; ``history``: its, as judged. None: it takes a second look."""
        if history not in self._histories or command not in PLAIN:
            return None
        client, number, written = self._client, self._snapshot_id, self._written
        found: SnapshotSlot
        if written is not None:
            kept = written.get(key, UNWRITTEN)
            if kept is UNWRITTEN:
                found = UnwrittenRead(client, command, raw, hash_slot, key, number, written)
            elif kept is not None and kept[0] == history:
                found = KeptRead(client, command, raw, hash_slot, key, number, kept[1])
            elif command is GET and len(self._chain.ids) == 1:
                pair = self._pairs.get(hash_slot) or self._reads.add_pair(number, hash_slot)
                found = WrittenGet(client, command, hash_slot, key, number, pair)
            else:
                return None
        elif command is GET:
            names = self._prefixes.get(hash_slot) or self._reads.add_prefixes(number, hash_slot)
            found = SnapshotGet(client, command, hash_slot, key, number, names, self._chain)
        else:
            return None
        self._reads.reads_total += 1
        return found


class Keeper(Protocol):
    """Who wants a reply. It is told one of these, once."""

    def keep(self, reply: bytes, until: float) -> None:
        """It was used as right in this step, and is right until then (Trio's clock; inf: for good)."""

    def give_up(self) -> None:
        """There is none that may be kept."""


class Fill:
    """What is read is to be kept in the cache, for no longer than its key lives.

    Its lifetime is asked in front of the read. So what shows that the value is the snapshot's, which is looked at
    when the value is there, shows it of the lifetime, too.
    """

    __slots__ = ("_asked_at", "_lifetime", "keeper")

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._asked_at = 0.0  # Trio's clock
        self._lifetime: LifetimeSlot | None = None

    def ask_lifetime(self, key: bytes) -> LifetimeSlot:
        """To be queued in front of the read of ``key``."""
        self._asked_at = trio.current_time()
        self._lifetime = LifetimeSlot(key)
        return self._lifetime

    def use(self, reply: bytes) -> None:
        """It is right."""
        lifetime = self._lifetime.milliseconds if self._lifetime is not None else None
        if lifetime is None or reply[0] == 45 or (lifetime == NO_KEY) != (reply in NILS):
            self.keeper.give_up()  # not told, an error, or gone in between
            return
        until = inf if lifetime < 0 else self._asked_at + lifetime / 1000
        self.keeper.keep(reply, until)


class LifetimeSlot(Slot):
    """The question how long a key lives."""

    __slots__ = ("hash_slot", "milliseconds", "raw", "requester")

    def __init__(self, key: bytes) -> None:
        self.raw = b"*2\r\n$4\r\nPTTL\r\n$%d\r\n%b\r\n" % (len(key), key)
        self.hash_slot = -1
        self.requester = None
        self.milliseconds: int | None = None  # NO_KEY, -1 for ever; None: it was not told

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        if reply[0] == 58:
            self.milliseconds = int(reply[1:-2])

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        """The read behind it is told as well."""


class MarkerSlot(Slot):
    """The question for the markers of a read, behind it on the same connection."""

    __slots__ = ("hash_slot", "raw", "read", "requester")

    def __init__(self, read: SnapshotSlot, raw: bytes) -> None:
        self.read = read
        self.raw = raw
        self.hash_slot = read.hash_slot
        self.requester = read.requester

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        self.read.on_marker(reply, connection)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self.read.wait(f"the connection to {connection.address} ended")


def _no_marker(reply: bytes) -> bool:
    """Whether the reply to GET or MGET says that there is none."""
    return reply in NILS or (reply[0] == 42 and _all_nil(elements(reply)))


def _all_nil(found: Iterable[bytes]) -> bool:
    return all(element in NILS for element in found)
