"""A cluster in memory: nodes that answer as the engines do, slots that migrate, replicas that lag, failovers.

Each command, and each key that MIGRATE moves, is one atomic step. What a node believes of the cluster is its own: a
change is told to the others by gossip, some milliseconds later, and to a node that stands still when it goes on.

What the engines do and this model does not: a primary that is replaced while it moves slots away has told its
successor at least of the keys that it gave away. (Without that the engines bring such keys back, and lose writes.)

Known by its conformance test, tests/live/test_model_conformance.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Final

from proxy.protocol.encode import EMPTY_ARRAY, OK, QUEUED, array, bulk, integer
from proxy.protocol.requests import RequestLimits, RequestParser
from routing.slot import SLOT_COUNT, slot_of
from routing.topology import Address
from tests.simulation.engine import (
    BLOCKING,
    COMMANDS,
    EVALS,
    NIL,
    NIL_ARRAY,
    Change,
    CommandError,
    Engine,
    blocking_seconds,
    glob,
    is_write,
    keys_of,
    try_blocking,
    wrong_number,
)

if TYPE_CHECKING:
    from tests.simulation.ledger import Ledger, Version
    from tests.simulation.world import World

MIXED_KEYS: Final = b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"
CROSS_SLOT: Final = b"-CROSSSLOT Keys in request don't hash to the same slot\r\n"
CLUSTER_DOWN: Final = b"-CLUSTERDOWN The cluster is down\r\n"
NOT_SERVED: Final = b"-CLUSTERDOWN Hash slot not served\r\n"
LOADING: Final = b"-LOADING Redis is loading the dataset in memory\r\n"
EXEC_ABORTED: Final = b"-EXECABORT Transaction discarded because of previous errors.\r\n"
UNBLOCKED: Final = (
    b"-UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)\r\n"
)
NO_REPLID: Final = "0" * 40
PING_BYTES: Final = 14  # what a primary sends its replicas now and then, without any write
_LIMITS = RequestLimits()
_WITHIN_TRANSACTION = frozenset({b"EXEC", b"DISCARD", b"MULTI", b"WATCH", b"RESET", b"QUIT"})
_TOLD_BEFORE_LOADED = frozenset(
    {b"INFO", b"CLUSTER", b"PING", b"CLIENT", b"HELLO", b"AUTH", b"ROLE", b"READONLY"}
)


@dataclass(slots=True)
class Item:
    """One step of a replication history: what changed, and the offset after it."""

    at: float
    end: int
    changes: Sequence[Change]
    versions: dict[bytes, Version | None]
    gone: Sequence[bytes] = ()  # keys that another shard has now


@dataclass(slots=True)
class Blocked:
    """What a connection waits with."""

    words: list[bytes]
    until: float
    in_asking: bool


class Peer:
    """A node's end of one connection. ``reply`` and ``reset`` go to the far end, some time later."""

    def __init__(
        self, node: ServerNode, reply: Callable[[bytes], None], reset: Callable[[], None], address: str
    ) -> None:
        self.node = node
        self.reply = reply
        self.reset = reset
        self.address = address
        self.id = node.next_peer_id()
        self.name = b""
        self.requests: deque[list[bytes]] = deque()
        self.is_open = True
        self.is_asking = False
        self.is_readonly = False
        self.queue: list[list[bytes]] | None = None  # since MULTI
        self.is_dirty = False  # a queued command was refused
        self.watched: dict[bytes, int] = {}
        self.blocked: Blocked | None = None
        self.last_command = b"NULL"
        self.born_at = node.world.now
        self._parser = RequestParser(_LIMITS)
        self._unread = b""

    def take(self, data: bytes) -> None:
        """Bytes came: the whole requests among them wait to be run."""
        buffer = self._unread + data if self._unread else data
        at = 0
        while at < len(buffer):
            parsed = self._parser.parse(buffer, at)
            if parsed is None:
                break
            words, at = parsed
            self.requests.append(words)
        self._unread = buffer[at:]


@dataclass(slots=True)
class Claim:
    """Who serves a shard, or a slot that left its first shard, and since which epoch."""

    epoch: int
    who: int  # a node's index; of a slot, a shard's


@dataclass(slots=True)
class Belief:
    """What one node, or in truth the cluster, holds of the map."""

    primary_of: list[Claim]  # shard -> its primary
    shard_of: dict[int, Claim] = field(default_factory=dict)  # slots that left the shard of the even split

    def copy(self) -> Belief:
        return Belief(
            [Claim(claim.epoch, claim.who) for claim in self.primary_of],
            {slot: Claim(claim.epoch, claim.who) for slot, claim in self.shard_of.items()},
        )

    def shard(self, slot: int) -> int:
        claim = self.shard_of.get(slot)
        return slot * len(self.primary_of) // SLOT_COUNT if claim is None else claim.who

    def owner(self, slot: int) -> int:
        return self.primary_of[self.shard(slot)].who

    def adopt_primary(self, shard: int, claim: Claim) -> bool:
        """Whether that was news."""
        if claim.epoch <= self.primary_of[shard].epoch:
            return False
        self.primary_of[shard] = Claim(claim.epoch, claim.who)
        return True

    def adopt_slot(self, slot: int, claim: Claim) -> bool:
        known = self.shard_of.get(slot)
        if known is not None and claim.epoch <= known.epoch:
            return False
        self.shard_of[slot] = Claim(claim.epoch, claim.who)
        return True


class ServerNode:
    """One server."""

    def __init__(self, cluster: Cluster, index: int, shard: int) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.index = index
        self.shard = shard
        self.id = f"{index + 1:040x}"
        self.address = Address("node", 7000 + index)
        self.belief = Belief([Claim(1, which) for which in range(cluster.shard_count)])
        self.engine = Engine(self.world.now_ms)
        self.engine.no_script = cluster.no_script
        self.versions: dict[bytes, Version | None] = {}  # client's key -> its newest version here
        self.key_counts: dict[bytes, int] = {}  # key -> its changes here, for WATCH
        self.peers: dict[int, Peer] = {}
        self.migrating: dict[int, int] = {}  # slot -> index of the target
        self.importing: dict[int, int] = {}  # slot -> index of the source
        self.is_primary = index < cluster.shard_count
        self.is_up = True
        self.is_stalled = False
        self.is_loading = False
        self.is_cluster_down = False
        self.paused_until = 0.0  # writes wait; reads are served
        self.waiting: deque[tuple[Peer, bytes | None]] = deque()  # what came while it stood still
        self.told: list[Callable[[], None]] = []  # gossip that came meanwhile
        self._peer_count = 0
        # Replication
        self.replid = self.world.token()
        self.replid2 = NO_REPLID
        self.second_offset = -1
        self.offset = 0
        self.stream: list[Item] = []  # of this node as a primary
        self.source: ServerNode | None = None  # of a replica: whose stream
        self.applied = 0  # items of it
        self.lag_seconds = 0.0
        self.link_down_since = inf  # what was written later has not come
        self.saved: tuple[Engine, dict[bytes, Version | None], str, int] | None = None

    # -- connections

    def next_peer_id(self) -> int:
        self._peer_count += 1
        return self._peer_count

    def connect(self, reply: Callable[[bytes], None], reset: Callable[[], None], address: str) -> Peer:
        """A connection was accepted. The kernel does that, whatever the server does."""
        peer = Peer(self, reply, reset, address)
        self.peers[peer.id] = peer
        return peer

    def receive(self, peer: Peer, data: bytes) -> None:
        if not self.is_up:
            return
        if self.is_stalled:
            self.waiting.append((peer, data))
            return
        if not peer.is_open:
            return
        peer.take(data)
        self.run(peer)

    def on_closed(self, peer: Peer) -> None:
        """The other end closed it: seen behind all that was sent before."""
        if self.is_stalled:
            self.waiting.append((peer, None))
        else:
            self.drop(peer)

    def drop(self, peer: Peer) -> None:
        peer.is_open = False
        peer.blocked = None
        peer.requests.clear()
        self.peers.pop(peer.id, None)

    def kill_connections(self) -> None:
        """Each of them breaks; what came already and was not run never is."""
        for peer in list(self.peers.values()):
            peer.reset()
            self.drop(peer)

    # -- life

    def stall(self) -> None:
        """As by SIGSTOP."""
        self.is_stalled = True

    def go_on(self) -> None:
        """Run what came meanwhile, also of connections that are closed; only then hear what happened."""
        if not self.is_stalled:
            return
        self.is_stalled = False
        waiting, self.waiting = list(self.waiting), deque()
        order: dict[Peer, list[bytes | None]] = {}
        for peer, data in waiting:
            order.setdefault(peer, []).append(data)
        peers = list(order)
        self.world.rng.shuffle(peers)
        for peer in peers:
            for data in order[peer]:
                if data is None:
                    self.drop(peer)
                elif peer.is_open:
                    peer.take(data)
                    self.run(peer)
        delay = self.world.rng.uniform(0.0, self.cluster.wake_seconds_max)
        self.world.later(delay, self.hear)

    def hear(self) -> None:
        told, self.told = self.told, []
        for tell in told:
            tell()

    def crash(self) -> None:
        """The process ends: its connections break, and nothing that it had not written down is left."""
        self.is_up = self.is_stalled = False
        self.waiting.clear()
        self.kill_connections()

    # -- running commands

    def run(self, peer: Peer) -> None:
        """What waits on the connection, as far as it may run now."""
        while peer.requests and peer.is_open and peer.blocked is None:
            words = peer.requests[0]
            if self.world.now < self.paused_until and self._pauses(peer, words):
                self.world.later(self.paused_until - self.world.now, lambda: self.run(peer))
                return
            peer.requests.popleft()
            reply = self._answer(peer, words)
            peer.last_command = words[0].lower()
            if words[0].upper() != b"ASKING" and peer.queue is None:
                peer.is_asking = False
            if reply is not None and peer.is_open:
                peer.reply(reply)

    def _pauses(self, peer: Peer, words: Sequence[bytes]) -> bool:
        if words[0].upper() == b"EXEC" and peer.queue is not None:
            return any(is_write(queued) for queued in peer.queue)
        return is_write(words) and peer.queue is None

    def _answer(self, peer: Peer, words: list[bytes]) -> bytes | None:
        name = words[0].upper()
        if self.is_loading and name not in _TOLD_BEFORE_LOADED:
            return LOADING
        if peer.queue is not None and name not in _WITHIN_TRANSACTION:
            return self._enqueue(peer, words)
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(self, peer, words)
        keys = keys_of(words)
        if keys and (refusal := self.redirection(peer, [keys], is_write(words))) is not None:
            return refusal
        if self._must_not_write(words):
            return b"-READONLY You can't write against a read only replica.\r\n"
        if name in BLOCKING:
            return self._block(peer, words)
        return self.execute([words], peer.is_asking)[0]

    def _enqueue(self, peer: Peer, words: list[bytes]) -> bytes:
        assert peer.queue is not None
        spec = COMMANDS.get(words[0].upper())
        if spec is None or not spec.takes(len(words)):
            peer.is_dirty = True
            if spec is not None:
                return wrong_number(words[0])
            return b"-ERR unknown command '%b', with args beginning with: \r\n" % words[0]
        keys = keys_of(words)
        refusal = self.redirection(peer, [keys], is_write(words))
        if refusal is not None and not (
            self.cluster.judges_splits_at_exec and refusal.startswith((b"-ASK", b"-TRY"))
        ):
            peer.is_dirty = True
            return refusal
        peer.queue.append(words)
        return QUEUED

    def _must_not_write(self, words: Sequence[bytes]) -> bool:
        return not self.is_primary and is_write(words) and words[0].upper() not in EVALS

    def execute(self, block: Sequence[list[bytes]], is_asking: bool) -> list[bytes]:
        """Run commands in one step, and note what they changed."""
        if not self.is_primary:
            self.catch_up()
        engine = self.engine
        replies = []
        versions: dict[bytes, Version | None] = {}
        all_changes: list[Change] = []
        for words in block:
            reply = engine.run(words)
            replies.append(reply)
            changes = engine.take_changes()
            if words[0].upper() not in _QUIET:
                self.cluster.ledger.on_run(self, words, reply, changes, versions, is_asking)
            all_changes += changes
        self.publish(all_changes, versions)
        return replies

    def publish(
        self,
        changes: Sequence[Change],
        versions: dict[bytes, Version | None],
        *,
        gone: Sequence[bytes] = (),
    ) -> None:
        """Send the replicas what changed, and wake who waited for it. ``gone``: keys that another shard has now."""
        self.versions.update(versions)
        for key in gone:
            self.versions.pop(key, None)
        if not changes and not versions and not gone:
            return
        size = 0
        for key, entry in changes:
            size += 32 + len(key) + (len(entry.value) if entry is not None else 0)
            self.key_counts[key] = self.key_counts.get(key, 0) + 1
        self.offset += size
        self.stream.append(Item(self.world.now, self.offset, changes, versions, gone))
        for key, entry in changes:
            if entry is not None and type(entry.value) is tuple:
                self._serve_blocked(key)

    # -- redirections

    def redirection(self, peer: Peer, keys_of_each: Sequence[Sequence[bytes]], writes: bool) -> bytes | None:
        """The error for a command, or a transaction's commands, that this node does not run; None if it does.

        As getNodeByQuery of the engines.
        """
        slot = -1
        first = b""
        is_migrating = is_importing = has_several = False
        missing = existing = 0
        for keys in keys_of_each:
            for key in keys:
                its_slot = slot_of(key)
                if slot < 0:
                    slot, first = its_slot, key
                    is_owner = self.belief.owner(slot) == self.index
                    is_migrating = is_owner and slot in self.migrating
                    is_importing = not is_migrating and slot in self.importing
                elif its_slot != slot:
                    return CROSS_SLOT
                elif key != first:
                    has_several = True
                if is_migrating or is_importing:
                    if self.engine.get(key) is None:
                        missing += 1
                    else:
                        existing += 1
        if slot < 0:
            return None
        if self.is_cluster_down:
            return CLUSTER_DOWN
        if is_migrating and missing:
            if existing and self.cluster.knows_mixed_at_source:
                return MIXED_KEYS
            return b"-ASK %d %b\r\n" % (slot, self._name_of(self.migrating[slot]))
        if is_importing and peer.is_asking:
            return MIXED_KEYS if has_several and missing else None
        owner = self.belief.owner(slot)
        if owner == self.index and self.is_primary:
            return None
        if not self.is_primary and peer.is_readonly and not writes and self.belief.shard(slot) == self.shard:
            return None
        return b"-MOVED %d %b\r\n" % (slot, self._name_of(owner))

    def _name_of(self, index: int) -> bytes:
        return str(self.cluster.nodes[index].address).encode()

    # -- blocking

    def _block(self, peer: Peer, words: list[bytes]) -> bytes | None:
        reply = self._try_blocking(words, peer.is_asking)
        if reply is not None:
            return reply
        try:
            seconds = blocking_seconds(words)
        except CommandError as error:
            return b"-%b\r\n" % str(error).encode()
        blocked = peer.blocked = Blocked(words, self.world.now + seconds, peer.is_asking)
        if seconds < inf:
            self.world.later(seconds, lambda: self._time_out(peer, blocked))
        return None

    def _try_blocking(self, words: list[bytes], is_asking: bool) -> bytes | None:
        versions: dict[bytes, Version | None] = {}
        try:
            reply = try_blocking(self.engine, words)
        except CommandError as error:
            return b"-%b\r\n" % str(error).encode()
        changes = self.engine.take_changes()
        if reply is not None:
            self.cluster.ledger.on_run(self, words, reply, changes, versions, is_asking)
            self.publish(changes, versions)
        return reply

    def _serve_blocked(self, key: bytes) -> None:
        for peer in list(self.peers.values()):
            blocked = peer.blocked
            if blocked is None or key not in keys_of(blocked.words):
                continue
            peer.blocked = None  # what it pops is published, too, and must not find it still waiting
            reply = self._try_blocking(blocked.words, blocked.in_asking)
            if reply is None:
                peer.blocked = blocked
            else:
                self._unblock(peer, reply)

    def _time_out(self, peer: Peer, blocked: Blocked) -> None:
        if peer.blocked is blocked and not self.is_stalled:
            self._unblock(peer, NIL if blocked.words[0].upper() == b"BLMOVE" else NIL_ARRAY)

    def _unblock(self, peer: Peer, reply: bytes) -> None:
        peer.blocked = None
        peer.reply(reply)
        self.world.later(0.0, lambda: self.run(peer))

    def release_blocked(self) -> None:
        """Turn away those that wait for what this node does not serve any more."""
        for peer in list(self.peers.values()):
            if peer.blocked is None:
                continue
            slot = slot_of(keys_of(peer.blocked.words)[0])
            if not self.is_primary:
                self._unblock(peer, UNBLOCKED)
            elif self.belief.owner(slot) != self.index and slot not in self.importing:
                moved = b"-MOVED %d %b\r\n" % (slot, self._name_of(self.belief.owner(slot)))
                self._unblock(peer, moved)

    # -- replication

    def catch_up(self, *, until: float | None = None, completely: bool = False) -> None:
        """As a replica: take in what has come by now."""
        source = self.source
        if source is None:
            return
        known_until = min(self.world.now - self.lag_seconds, self.link_down_since) if until is None else until
        stream = source.stream
        while self.applied < len(stream) and (completely or stream[self.applied].at <= known_until):
            item = stream[self.applied]
            self.engine.apply(item.changes)
            for key, _ in item.changes:
                self.key_counts[key] = self.key_counts.get(key, 0) + 1
            self.versions.update(item.versions)
            for key in item.gone:
                self.versions.pop(key, None)
            self.offset = item.end
            self.applied += 1

    def follow(self, primary: ServerNode) -> None:
        """Become its replica, with all that it has by now."""
        self.is_primary = False
        self.source = primary
        self.engine.entries = dict(primary.engine.entries)
        self.versions = dict(primary.versions)
        self.applied = len(primary.stream)
        self.offset = primary.offset
        self.replid, self.replid2 = primary.replid, primary.replid2
        self.second_offset = primary.second_offset
        self.stream = []
        self.migrating.clear()
        self.importing.clear()
        self.link_down_since = inf
        for key in self.key_counts:
            self.key_counts[key] += 1
        self.release_blocked()

    def promote(self) -> None:
        """As a replica: go on with what there is, under a name of its own."""
        source = self.source
        assert source is not None
        self.catch_up(completely=False)
        last_given = max((place for place, item in enumerate(source.stream) if item.gone), default=-1)
        while self.applied <= last_given:
            self.catch_up(until=source.stream[self.applied].at)
        self.stream = source.stream[: self.applied]
        self.migrating, self.importing = dict(source.migrating), dict(source.importing)
        self.replid2, self.second_offset = self.replid, self.offset + 1
        self.replid = self.world.token()
        self.source = None
        self.is_primary = True
        self.belief = self.cluster.truth.copy()  # whoever wins an election knows what it is about

    # -- what it tells

    def info_replication(self) -> str:
        if self.is_primary and self.world.rng.random() < 0.1:
            self.offset += PING_BYTES
            self.stream.append(Item(self.world.now, self.offset, (), {}))
        if not self.is_primary:
            self.catch_up()
        lines = [f"role:{'master' if self.is_primary else 'slave'}"]
        if not self.is_primary:
            assert self.source is not None
            is_linked = self.source.is_up and self.link_down_since == inf
            lines += [
                f"master_host:{self.source.address.host}",
                f"master_port:{self.source.address.port}",
                f"master_link_status:{'up' if is_linked else 'down'}",
                "master_last_io_seconds_ago:0",
                "master_sync_in_progress:0",
                f"slave_read_repl_offset:{self.offset}",
                f"slave_repl_offset:{self.offset}",
            ]
        lines += [
            f"connected_slaves:{len(self.cluster.replicas_of(self))}",
            f"master_replid:{self.replid}",
            f"master_replid2:{self.replid2}",
            f"master_repl_offset:{self.offset}",
            f"second_repl_offset:{self.second_offset}",
        ]
        return "# Replication\r\n" + "".join(f"{line}\r\n" for line in lines)

    def nodes_text(self) -> str:
        """CLUSTER NODES, as this node sees it."""
        lines = []
        belief = self.belief
        owned = self.cluster.ranges_of(belief)
        for node in self.cluster.nodes:
            claim = belief.primary_of[node.shard]
            is_primary = claim.who == node.index
            flags = ("myself," if node is self else "") + ("master" if is_primary else "slave")
            is_known_down = (
                node is not self and (not node.is_up or node.is_stalled) and node.index in self.cluster.down
            )
            flags += ",fail" if is_known_down else ""
            primary = "-" if is_primary else self.cluster.nodes[claim.who].id
            link = "disconnected" if is_known_down else "connected"
            slots = "".join(f" {low}" if low == high else f" {low}-{high}" for low, high in owned[node.index])
            if node is self:
                slots += "".join(
                    f" [{slot}->-{self.cluster.nodes[to].id}]" for slot, to in sorted(self.migrating.items())
                )
                slots += "".join(
                    f" [{slot}-<-{self.cluster.nodes[of].id}]" for slot, of in sorted(self.importing.items())
                )
            lines.append(
                f"{node.id} {node.address}@{node.address.port + 10000} {flags} {primary} 0 0 {claim.epoch}"
                f" {link}{slots}"
            )
        return "\n".join(lines) + "\n"


_QUIET = frozenset({b"PING", b"ECHO", b"SCAN", b"SCRIPT", b"DBSIZE", b"KEYS"})


# -- what is about the connection or the server


def _multi(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    if peer.queue is not None:
        return b"-ERR MULTI calls can not be nested\r\n"
    peer.queue, peer.is_dirty = [], False
    return OK


def _discard(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    if peer.queue is None:
        return b"-ERR DISCARD without MULTI\r\n"
    peer.queue = None
    peer.watched.clear()
    return OK


def _exec(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    if peer.queue is None:
        return b"-ERR EXEC without MULTI\r\n"
    queue, peer.queue = peer.queue, None
    watched, peer.watched = peer.watched, {}
    if peer.is_dirty:
        return EXEC_ABORTED
    refusal = node.redirection(
        peer, [keys_of(queued) for queued in queue], any(is_write(queued) for queued in queue)
    )
    if refusal is not None:
        return refusal
    if any(node.key_counts.get(key, 0) != count for key, count in watched.items()):
        return NIL_ARRAY
    if any(node._must_not_write(queued) for queued in queue):
        return EXEC_ABORTED[:-2] + b"\r\n"
    return array(node.execute(queue, peer.is_asking)) if queue else EMPTY_ARRAY


def _watch(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    if peer.queue is not None:
        return b"-ERR WATCH inside MULTI is not allowed\r\n"
    refusal = node.redirection(peer, [words[1:]], False)
    if refusal is not None:
        return refusal
    for key in words[1:]:
        peer.watched.setdefault(key, node.key_counts.get(key, 0))
    return OK


def _unwatch(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    peer.watched.clear()
    return OK


def _asking(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    peer.is_asking = True
    return OK


def _readonly(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    peer.is_readonly = words[0].upper() == b"READONLY"
    return OK


def _ok(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    return OK


def _client(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    match [word.upper() for word in words[1:2]]:
        case [b"ID"]:
            return integer(peer.id)
        case [b"SETNAME"]:
            peer.name = words[2]
            return OK
        case [b"GETNAME"]:
            return bulk(peer.name) if peer.name else NIL
        case [b"SETINFO"] | [b"NO-TOUCH"] | [b"NO-EVICT"] | [b"REPLY"]:
            return OK
        case [b"LIST"]:
            ids = {int(word) for word in words[3:]} if words[2:3] and words[2].upper() == b"ID" else None
            lines = [
                _client_line(node, other)
                for other in node.peers.values()
                if other.is_open and (ids is None or other.id in ids)
            ]
            return bulk(b"".join(lines))
        case [b"INFO"]:
            return bulk(_client_line(node, peer))
        case [b"KILL"]:
            return _client_kill(node, peer, words)
    return b"-ERR unknown subcommand '%b'. Try CLIENT HELP.\r\n" % (words[1] if len(words) > 1 else b"")


def _client_line(node: ServerNode, peer: Peer) -> bytes:
    age = int(node.world.now - peer.born_at)
    flags = b"b" if peer.blocked is not None else b"x" if peer.queue is not None else b"N"
    return (
        b"id=%d addr=%b laddr=%b fd=8 name=%b age=%d idle=0 flags=%b db=0 sub=0 psub=0 ssub=0 multi=%d"
        b" qbuf=0 events=r cmd=%b user=default redir=-1 resp=2\n"
    ) % (
        peer.id,
        peer.address.encode(),
        str(node.address).encode(),
        peer.name,
        age,
        flags,
        -1 if peer.queue is None else len(peer.queue),
        peer.last_command,
    )


def _client_kill(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    filters = {words[at].upper(): words[at + 1] for at in range(2, len(words) - 1, 2)}
    killed = 0
    skips_me = filters.pop(b"SKIPME", b"yes").lower() != b"no"
    for other in list(node.peers.values()):
        if other is peer and skips_me and b"ID" not in filters:
            continue
        matches = {
            b"ID": b"%d" % other.id,
            b"ADDR": other.address.encode(),
            b"USER": b"default",
            b"TYPE": b"normal",
        }
        if filters and all(matches.get(name) == value for name, value in filters.items()):
            killed += 1
            other.reset()
            node.drop(other)
    return integer(killed)


def _info(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    sections = [word.lower() for word in words[1:]] or [b"server", b"memory", b"replication", b"keyspace"]
    text = ""
    for section in sections:
        match section:
            case b"replication":
                text += node.info_replication()
            case b"memory":
                text += (
                    f"# Memory\r\nused_memory:{node.cluster.used_bytes}\r\nmaxmemory:{node.cluster.max_bytes}\r\n"
                    f"maxmemory_policy:{node.cluster.eviction}\r\n"
                )
            case b"server":
                text += (
                    f"# Server\r\nredis_version:{node.cluster.engine_version}\r\nredis_mode:cluster\r\n"
                    f"run_id:{node.id}\r\n"
                )
            case b"keyspace":
                count = len(node.engine.entries)
                text += "# Keyspace\r\n" + (f"db0:keys={count},expires=0,avg_ttl=0\r\n" if count else "")
            case b"clients":
                text += f"# Clients\r\nconnected_clients:{len(node.peers)}\r\nblocked_clients:0\r\n"
    return bulk(text)


def _config(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    known = {
        b"maxmemory": str(node.cluster.max_bytes),
        b"maxmemory-policy": node.cluster.eviction,
        b"appendonly": "no",
        b"cluster-node-timeout": "15000",
        b"save": "",
    }
    if words[1].upper() == b"GET":
        found = [
            (name, value) for name, value in known.items() if any(glob(word)(name) for word in words[2:])
        ]
        return array([part for name, value in found for part in (bulk(name), bulk(value))])
    return OK


def _cluster(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    match [word.upper() for word in words[1:2]]:
        case [b"NODES"]:
            return bulk(node.nodes_text())
        case [b"INFO"]:
            state = "fail" if node.is_cluster_down else "ok"
            return bulk(
                f"cluster_enabled:1\r\ncluster_state:{state}\r\ncluster_known_nodes:{len(node.cluster.nodes)}\r\n"
                f"cluster_size:{node.cluster.shard_count}\r\ncluster_current_epoch:{node.cluster.epoch}\r\n"
            )
        case [b"MYID"]:
            return bulk(node.id)
        case [b"COUNTKEYSINSLOT"]:
            return integer(len(node.cluster.keys_in_slot(node, int(words[2]))))
        case [b"GETKEYSINSLOT"]:
            found = node.cluster.keys_in_slot(node, int(words[2]))[: int(words[3])]
            return array([bulk(key) for key in found])
        case [b"KEYSLOT"]:
            return integer(slot_of(words[2]))
        case [b"GETSLOTMIGRATIONS"] if node.cluster.is_atomic:
            return EMPTY_ARRAY
        case [b"SLOTS"]:
            owned = node.cluster.ranges_of(node.belief)
            return array(
                [
                    array(
                        [
                            integer(low),
                            integer(high),
                            *[_slots_node(other) for other in _shard_nodes(node, index)],
                        ]
                    )
                    for index in owned
                    for low, high in owned[index]
                ]
            )
        case [b"SHARDS"]:
            owned = node.cluster.ranges_of(node.belief)
            shards = []
            for index, spans in owned.items():
                if node.belief.primary_of[node.cluster.nodes[index].shard].who != index:
                    continue
                numbers = [integer(number) for span in spans for number in span]
                members = [
                    _shards_node(other, is_primary=other.index == index)
                    for other in _shard_nodes(node, index)
                ]
                shards.append(array([bulk(b"slots"), array(numbers), bulk(b"nodes"), array(members)]))
            return array(shards)
    return b"-ERR unknown subcommand '%b'. Try CLUSTER HELP.\r\n" % (words[1] if len(words) > 1 else b"")


def _shard_nodes(node: ServerNode, index: int) -> list[ServerNode]:
    primary = node.cluster.nodes[index]
    return [
        primary,
        *[other for other in node.cluster.nodes if other.shard == primary.shard and other is not primary],
    ]


def _slots_node(node: ServerNode) -> bytes:
    return array([bulk(node.address.host), integer(node.address.port), bulk(node.id), EMPTY_ARRAY])


def _shards_node(node: ServerNode, *, is_primary: bool) -> bytes:
    fields: list[bytes] = []
    for name, value in (
        (b"id", bulk(node.id)),
        (b"port", integer(node.address.port)),
        (b"ip", bulk(node.address.host)),
        (b"endpoint", bulk(node.address.host)),
        (b"role", bulk(b"master" if is_primary else b"replica")),
        (b"replication-offset", integer(node.offset)),
        (b"health", bulk(b"online")),
    ):
        fields += [bulk(name), value]
    return array(fields)


def _role(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    if node.is_primary:
        return array([bulk(b"master"), integer(node.offset), EMPTY_ARRAY])
    node.catch_up()
    assert node.source is not None
    source = node.source.address
    state = b"connected" if node.source.is_up else b"connect"
    return array([bulk(b"slave"), bulk(source.host), integer(source.port), bulk(state), integer(node.offset)])


def _time(node: ServerNode, peer: Peer, words: list[bytes]) -> bytes:
    now = node.world.now_ms()
    return array([bulk(b"%d" % (now // 1000)), bulk(b"%d" % (now % 1000 * 1000))])


_Handler = Callable[[ServerNode, Peer, list[bytes]], bytes]
_HANDLERS: dict[bytes, _Handler] = {
    b"MULTI": _multi,
    b"EXEC": _exec,
    b"DISCARD": _discard,
    b"WATCH": _watch,
    b"UNWATCH": _unwatch,
    b"ASKING": _asking,
    b"READONLY": _readonly,
    b"READWRITE": _readonly,
    b"SELECT": _ok,
    b"AUTH": _ok,
    b"CLIENT": _client,
    b"INFO": _info,
    b"CONFIG": _config,
    b"CLUSTER": _cluster,
    b"ROLE": _role,
    b"TIME": _time,
}


class Cluster:
    """Nodes 0 to ``shards`` - 1 are primaries at first; then the replicas, of the first shard first."""

    def __init__(
        self, world: World, ledger: Ledger, shards: int, replicas: int, *, engine_version: str = "7.0.15"
    ) -> None:
        self.world = world
        self.ledger = ledger
        self.shard_count = shards
        self.engine_version = engine_version
        release = tuple(int(part) for part in engine_version.split(".")[:2])
        self.knows_mixed_at_source = release >= (7, 0)  # before, a mixed command at the source gets ASK
        self.is_atomic = release >= (9, 0)
        self.judges_splits_at_exec = release >= (9, 0)  # before, a queued command gets ASK or TRYAGAIN itself
        self.no_script = Engine.no_script if release < (8, 1) else "NOSCRIPT No matching script."
        self.wake_seconds_max = (
            0.005  # a node that goes on runs what has come for so long before it hears of the rest
        )
        self.used_bytes, self.max_bytes, self.eviction = 1 << 20, 0, "noeviction"
        self.epoch = 1
        self.down: set[int] = set()  # nodes that count as failed
        self.truth = Belief([Claim(1, which) for which in range(shards)])
        self.nodes: list[ServerNode] = []
        for index in range(shards * (1 + replicas)):
            shard = index if index < shards else (index - shards) // replicas
            self.nodes.append(ServerNode(self, index, shard))
        for node in self.nodes[shards:]:
            node.follow(self.nodes[node.shard])
        self._ranges: dict[
            tuple[tuple[int, ...], tuple[tuple[int, int], ...]], dict[int, list[tuple[int, int]]]
        ] = {}
        self.is_moving = False  # one importing shard at a time
        self.counts = {
            "migrations": 0,
            "atomic": 0,
            "failovers": 0,
            "graceful": 0,
            "stalls": 0,
            "restarts": 0,
            "resets": 0,
        }

    def node_at(self, address: Address) -> ServerNode | None:
        index = address.port - 7000
        return self.nodes[index] if 0 <= index < len(self.nodes) else None

    def primary(self, shard: int) -> ServerNode:
        return self.nodes[self.truth.primary_of[shard].who]

    def owner(self, slot: int) -> ServerNode:
        return self.nodes[self.truth.owner(slot)]

    def replicas_of(self, node: ServerNode) -> list[ServerNode]:
        return [other for other in self.nodes if other.source is node]

    def ranges_of(self, belief: Belief) -> dict[int, list[tuple[int, int]]]:
        """Node -> the slots that it serves."""
        who = tuple([claim.who for claim in belief.primary_of])
        moved = tuple([(slot, claim.who) for slot, claim in sorted(belief.shard_of.items())])
        found = self._ranges.get((who, moved))
        if found is None:
            found = self._ranges[who, moved] = {node.index: [] for node in self.nodes}
            edges = {0, SLOT_COUNT}
            for shard in range(self.shard_count):
                edges.add(-(-shard * SLOT_COUNT // self.shard_count))
            for slot, _ in moved:
                edges |= {slot, slot + 1}
            bounds = sorted(edges)
            for low, after in pairwise(bounds):
                spans = found[belief.owner(low)]
                if spans and spans[-1][1] == low - 1:
                    spans[-1] = (spans[-1][0], after - 1)
                else:
                    spans.append((low, after - 1))
        return found

    def keys_in_slot(self, node: ServerNode, slot: int) -> list[bytes]:
        return sorted(key for key in node.engine.entries if slot_of(key) == slot)

    # -- gossip

    def _tell(self, node: ServerNode, act: Callable[[], None], delay: float) -> None:
        def arrive() -> None:
            if node.is_stalled or not node.is_up:
                node.told.append(act)
            else:
                act()

        self.world.later(delay, arrive)

    def spread_primary(self, shard: int, origin: ServerNode) -> None:
        """Tell all that the shard's primary is as in truth."""
        claim = self.truth.primary_of[shard]
        for node in self.nodes:
            delay = 0.0 if node is origin else self.world.rng.uniform(0.001, 0.015)
            if node is origin:
                self._learn_primary(node, shard, claim)
            else:
                self._tell(node, lambda node=node: self._learn_primary(node, shard, claim), delay)  # type: ignore[misc]

    def _learn_primary(self, node: ServerNode, shard: int, claim: Claim) -> None:
        if not node.belief.adopt_primary(shard, claim):
            return
        if node.shard == shard and claim.who != node.index:
            primary = self.nodes[claim.who]
            if primary.is_primary:
                node.follow(primary)
            self.ledger.on_demoted(node)
        node.release_blocked()

    def spread_slot(
        self, slot: int, origin: ServerNode, seconds: tuple[float, float] = (0.001, 0.015)
    ) -> None:
        claim = self.truth.shard_of[slot]
        for node in self.nodes:
            if node is origin:
                self._learn_slot(node, slot, claim)
            else:
                self._tell(
                    node,
                    lambda node=node: self._learn_slot(node, slot, claim),  # type: ignore[misc]
                    self.world.rng.uniform(*seconds),
                )

    def _learn_slot(self, node: ServerNode, slot: int, claim: Claim) -> None:
        was_owner = node.belief.owner(slot) == node.index
        if node.belief.adopt_slot(slot, claim):
            if node.is_primary and was_owner and node.belief.owner(slot) != node.index:
                node.migrating.pop(slot, None)
                for key in self.keys_in_slot(
                    node, slot
                ):  # as the engines do with keys of a slot that they lost
                    node.engine.remove(key)
                gone = [key for key in node.versions if slot_of(key) == slot]
                node.publish(node.engine.take_changes(), {}, gone=gone)
            node.release_blocked()

    # -- stepwise migration

    def open_slot(self, slot: int, target: ServerNode) -> None:
        """SETSLOT IMPORTING, then SETSLOT MIGRATING."""
        source = self.owner(slot)
        target.importing[slot] = source.index
        source.migrating[slot] = target.index

    def migrate_key(self, slot: int, key: bytes) -> None:
        """MIGRATE of one key."""
        source = self.owner(slot)
        target = self.nodes[source.migrating[slot]]
        entry = source.engine.get(key)
        if entry is None:
            if key in source.engine.entries:  # its time is over: MIGRATE removes it, and says NOKEY
                source.engine.remove(key)
                source.publish(source.engine.take_changes(), {})
            return
        version = source.versions.get(key)
        source.engine.remove(key)
        source.publish(source.engine.take_changes(), {}, gone=[key])
        target.engine._set(key, entry)
        target.publish(target.engine.take_changes(), {key: version} if version is not None else {})
        self.ledger.on_migrated(key, target)

    def close_slot(self, slot: int) -> None:
        """SETSLOT NODE, at the target first. All keys are there."""
        source = self.owner(slot)
        target = self.nodes[source.migrating[slot]]
        self._hand_versions(slot, source, target)
        self.epoch += 1
        self.truth.adopt_slot(slot, Claim(self.epoch, target.shard))
        target.importing.pop(slot, None)
        self.spread_slot(slot, target)
        self.counts["migrations"] += 1

    def _hand_versions(self, slot: int, source: ServerNode, target: ServerNode) -> None:
        """Who takes the slot over knows what was removed there, too."""
        handed = {
            key: version
            for key, version in source.versions.items()
            if slot_of(key) == slot and key not in target.versions
        }
        if handed:
            target.publish((), handed)
        for key in self.ledger.keys:
            if slot_of(key) == slot:
                self.ledger.on_migrated(key, target)

    # -- atomic migration

    def hand_over(self, slot: int, target: ServerNode) -> None:
        """The slot changes hands at once. The former owner holds writes and answers reads until it hears of it."""
        source = self.owner(slot)
        self.counts["atomic"] += 1
        keys = self.keys_in_slot(source, slot)
        for key in keys:
            target.engine._set(key, source.engine.entries[key])
        handed = {key: source.versions[key] for key in source.versions if slot_of(key) == slot}
        target.publish(target.engine.take_changes(), handed)
        for key in self.ledger.keys:
            if slot_of(key) == slot:
                self.ledger.on_migrated(key, target)
        self.epoch += 1
        self.truth.adopt_slot(slot, Claim(self.epoch, target.shard))
        late = self.world.rng.uniform(0.008, 0.014)
        source.paused_until = max(source.paused_until, self.world.now + late)
        self.ledger.on_stale(slot, self.world.now, self.world.now + late)
        target_claim = self.truth.shard_of[slot]
        self._learn_slot(target, slot, target_claim)
        for node in self.nodes:
            if node is source:
                self._tell(node, lambda: self._learn_slot(source, slot, target_claim), late)
            elif node is not target:
                self._tell(
                    node,
                    lambda node=node: self._learn_slot(node, slot, target_claim),  # type: ignore[misc]
                    self.world.rng.uniform(0.001, late),
                )

    # -- failover

    def fail_over(self, shard: int, new: ServerNode) -> None:
        """The replica takes the shard over as it is; what it has not got is lost."""
        old = self.primary(shard)
        new.promote()
        self._take_over(shard, old, new)
        self.counts["failovers"] += 1

    def fail_over_gracefully(self, shard: int, new: ServerNode) -> None:
        """Nothing is lost. The former primary is a replica at once."""
        old = self.primary(shard)
        new.catch_up(completely=True)
        new.promote()
        self._take_over(shard, old, new)
        self._learn_primary(old, shard, self.truth.primary_of[shard])
        self.counts["graceful"] += 1

    def _take_over(self, shard: int, old: ServerNode, new: ServerNode) -> None:
        self.epoch += 1
        self.truth.adopt_primary(shard, Claim(self.epoch, new.index))
        # The other side goes on with who takes over, if it has not closed the slot meanwhile.
        for slot, index in new.migrating.items():
            if slot in self.nodes[index].importing:
                self.nodes[index].importing[slot] = new.index
        for slot, index in new.importing.items():
            if slot in self.nodes[index].migrating:
                self.nodes[index].migrating[slot] = new.index
        self.ledger.on_failover(old, new)
        self.spread_primary(shard, new)

    def restart(self, node: ServerNode) -> None:
        """A crashed node starts again: with what it had saved, or with nothing."""
        node.is_up = True
        node.stream = []
        node.key_counts = {}
        node.replid, node.replid2, node.second_offset = self.world.token(), NO_REPLID, -1
        self.counts["restarts"] += 1
        if self.primary(node.shard) is not node:
            node.follow(self.primary(node.shard))
            node.hear()
            return
        if node.saved is None:
            node.engine.entries, node.versions, node.offset = {}, {}, 0
        else:
            engine, versions, replid, offset = node.saved
            # Keys of slots that have moved away since would be there, and come back to life when the slot returns.
            # Whoever moves it there removes them first, as for any node that says that it has such keys.
            node.engine.entries = {
                key: entry for key, entry in engine.entries.items() if self._has(node, key)
            }
            node.versions = {key: version for key, version in versions.items() if self._has(node, key)}
            node.offset = offset
            if self.knows_mixed_at_source:  # Redis 7.0 and later keep the history's name in the file
                node.replid2, node.second_offset = replid, offset + 1
        self.ledger.on_failover(node, node)
        node.hear()
        for replica in [other for other in self.nodes if other.source is node]:
            replica.follow(node)

    def _has(self, node: ServerNode, key: bytes) -> bool:
        """Whether the key's slot is the node's, or on its way to it."""
        slot = slot_of(key)
        return self.owner(slot) is node or slot in node.importing

    def save(self, node: ServerNode) -> None:
        """As BGSAVE."""
        copy = Engine(self.world.now_ms)
        copy.entries = dict(node.engine.entries)
        node.saved = (copy, dict(node.versions), node.replid, node.offset)
