"""What really happened: each client's operations, each version of each key, and where which was lost.

The ledger sees the servers from inside. A version is what a key held after one run of one command; its parent is what
it held before. The *head* is the version at the key's rightful holder. A failover that loses the end of a history
makes an older version the head again, and marks the others as lost then; what a former primary runs that has not heard
of its successor is lost at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from routing.slot import slot_of
from routing.snapshot_names import PREFIX
from tests.simulation.engine import Change, Engine, Entry, is_write, keys_of

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster, ServerNode

_BY_KEY = {
    b"MSET": 2,
    b"DEL": 1,
    b"UNLINK": 1,
}  # arguments to each key, of commands that the proxy sends in parts
_SORTED = frozenset({b"HGETALL", b"SMEMBERS"})


@dataclass(eq=False, slots=True)
class Operation:
    """One command, or one transaction, of one client."""

    number: int
    client: str
    commands: tuple[tuple[bytes, ...], ...]
    is_write: bool
    sent_at: float
    replied_at: float = inf
    is_acknowledged: bool = False
    runs: dict[tuple[bytes, ...], int] = field(default_factory=dict)  # part -> how often it ran

    def parts(self) -> Iterator[tuple[bytes, ...]]:
        """What the servers may be sent apart."""
        for words in self.commands:
            yield from parts_of(words)

    def __str__(self) -> str:
        text = " | ".join(
            " ".join(word.decode(errors="replace") for word in words) for words in self.commands
        )
        return f"{self.client} #{self.number} {text[:120]} [{self.sent_at:.4f}..{self.replied_at:.4f}]"


@dataclass(eq=False, slots=True)
class Version:
    """What a key held from ``at`` on."""

    key: bytes
    entry: Entry | None
    operation: Operation | None
    at: float
    node: int
    parent: Version | None
    depth: int
    lost_at: float = inf

    def line(self) -> Iterator[Version]:
        """It and those before it."""
        version: Version | None = self
        while version is not None:
            yield version
            version = version.parent

    def __str__(self) -> str:
        lost = "" if self.lost_at == inf else f" lost at {self.lost_at:.4f}"
        return f"version {self.depth} at {self.at:.4f} on node {self.node} by {self.operation}{lost}"


@dataclass(eq=False, slots=True)
class Zombie:
    """A former primary that has not heard of its successor, and what it served."""

    node: int
    keys: frozenset[bytes]
    since: float
    until: float = inf


def parts_of(words: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    name = words[0].upper()
    step = _BY_KEY.get(name)
    if step is None:
        return [(name, *words[1:])]
    return [(name, *words[at : at + step]) for at in range(1, len(words), step)]


class Broken(AssertionError):
    """A promise was broken."""


class Ledger:
    """Of one history."""

    def __init__(self) -> None:
        self.cluster: Cluster
        self.keys: list[bytes] = []
        self.operations: list[Operation] = []
        self.head: dict[bytes, Version | None] = {}
        self.holder: dict[bytes, int] = {}
        self.history: dict[bytes, list[tuple[float, Version | None]]] = {}
        self.versions: dict[bytes, list[Version]] = {}
        self.stale: list[tuple[int, float, float]] = []  # slot, from, to: its former owner answers reads
        self.zombies: list[Zombie] = []
        self._expected: dict[tuple[bytes, ...], deque[Operation]] = {}
        self._scratch = Engine(lambda: 0)

    def use(self, keys: Iterable[bytes]) -> None:
        """The clients' keys."""
        for key in keys:
            self.keys.append(key)
            self.head[key] = None
            self.holder[key] = self.cluster.owner(slot_of(key)).index
            self.history[key] = [(-1.0, None)]
            self.versions[key] = []

    # -- clients

    def send(self, client: str, commands: Sequence[Sequence[bytes]], now: float) -> Operation:
        """A client sends this now."""
        operation = Operation(
            len(self.operations),
            client,
            tuple([tuple(words) for words in commands]),
            any(is_write(words) for words in commands),
            now,
        )
        self.operations.append(operation)
        if operation.is_write:
            for part in operation.parts():
                self._expected.setdefault(part, deque()).append(operation)
        return operation

    def is_free(self, words: Sequence[bytes]) -> bool:
        """Whether no operation with a part in these words may still run: then a run tells whose it is."""
        return all(
            all(other.is_acknowledged for other in self._expected.get(part, ())) for part in parts_of(words)
        )

    # -- servers

    def on_run(
        self,
        node: ServerNode,
        words: Sequence[bytes],
        reply: bytes,
        changes: Sequence[Change],
        versions: dict[bytes, Version | None],
        is_asking: bool,
    ) -> None:
        """A node ran a command. ``versions`` takes the versions that it made."""
        if reply[:1] == b"-" or not is_write(words):
            return
        keys = keys_of(words)
        if not keys or keys[0].startswith(PREFIX) or words[0].upper().startswith(b"EVALSHA"):
            return
        now = self.cluster.world.now
        operation_of: dict[bytes, Operation | None] = {}
        for part in parts_of(words):
            operation = self._ran(part)
            for key in keys_of(part):
                operation_of[key] = operation
        for key, entry in dict(changes).items():
            if key not in self.head:
                continue
            slot = slot_of(key)
            owner = self.cluster.owner(slot)
            is_rightful = owner is node or (is_asking and owner.migrating.get(slot) == node.index)
            parent = self.head[key] if is_rightful else versions.get(key, node.versions.get(key))
            version = Version(
                key,
                entry,
                operation_of.get(key),
                now,
                node.index,
                parent,
                0 if parent is None else parent.depth + 1,
            )
            versions[key] = version
            self.versions[key].append(version)
            if is_rightful:
                self._set_head(key, version, node.index)
            else:
                version.lost_at = now

    def _ran(self, part: tuple[bytes, ...]) -> Operation | None:
        waiting = self._expected.get(part)
        if not waiting:
            return None
        operation = waiting[-1]  # of earlier ones it is known that they do not run any more
        operation.runs[part] = operation.runs.get(part, 0) + 1
        return operation

    def _set_head(self, key: bytes, version: Version | None, holder: int) -> None:
        self.head[key] = version
        self.holder[key] = holder
        self.history[key].append((self.cluster.world.now, version))

    def on_migrated(self, key: bytes, target: ServerNode) -> None:
        if key in self.holder:
            self.holder[key] = target.index

    def on_failover(self, old: ServerNode, new: ServerNode) -> None:
        """``new`` holds what ``old`` held, as far as it has it."""
        now = self.cluster.world.now
        held = [key for key in self.keys if self.holder[key] == old.index]
        for key in held:
            head, known = self.head[key], new.versions.get(key)
            self.holder[key] = new.index
            if head is known:
                continue
            kept = set() if known is None else {id(version) for version in known.line()}
            for version in () if head is None else head.line():
                if id(version) in kept:
                    break
                version.lost_at = min(version.lost_at, now)
            self._set_head(key, known, new.index)
        if old is not new and old.is_up:
            self.zombies.append(Zombie(old.index, frozenset(held), now))

    def on_demoted(self, node: ServerNode) -> None:
        """A former primary has heard of its successor."""
        for zombie in self.zombies:
            if zombie.node == node.index and zombie.until == inf:
                zombie.until = self.cluster.world.now

    def on_stale(self, slot: int, since: float, until: float) -> None:
        self.stale.append((slot, since, until))

    # -- what may be read

    def valid(self, key: bytes, since: float, until: float) -> list[Version | None]:
        """What a read of the key's primary between two times may have found."""
        slot = slot_of(key)
        for stale_slot, began, ended in self.stale:
            if stale_slot == slot and began <= until and ended >= since:
                since = min(since, began)
        found: list[Version | None] = []
        for zombie in self.zombies:
            if key in zombie.keys and zombie.since <= until and zombie.until >= since:
                found += [
                    version
                    for version in self.versions[key]
                    if version.at <= until and version.lost_at >= zombie.since
                ]
                since = min(since, zombie.since)
        history = self.history[key]
        for place, (at, version) in enumerate(history):
            next_at = history[place + 1][0] if place + 1 < len(history) else inf
            if at <= until and next_at >= since:
                found.append(version)
        return found

    def replies(
        self, words: Sequence[bytes], version: Version | None, since: float, until: float
    ) -> set[bytes]:
        """What a read of one key says of a version, between two times: it may expire meanwhile."""
        entry = None if version is None else version.entry
        found = set()
        if entry is not None:
            expires_at = inf if entry.expires_at is None else entry.expires_at / 1000 - EPOCH_SECONDS
            if expires_at >= since:
                found.add(self._reply(words, Entry(entry.value)))
            if expires_at <= until + 0.001:
                found.add(self._reply(words, None))
        else:
            found.add(self._reply(words, None))
        return found

    def _reply(self, words: Sequence[bytes], entry: Entry | None) -> bytes:
        engine = self._scratch
        engine.entries = {} if entry is None else {keys_of(words)[0]: entry}
        return canonical(words, engine.run(words))


EPOCH_SECONDS = 1_700_000_000  # Unix time at which every history begins


def canonical(words: Sequence[bytes], reply: bytes) -> bytes:
    """A reply whose order means nothing, in one order."""
    name = words[0].upper()
    if name not in _SORTED or reply[:1] != b"*":
        return reply
    from proxy.protocol.replies import elements

    items = elements(reply)
    if name == b"SMEMBERS":
        return b"".join([b"*%d\r\n" % len(items), *sorted(items)])
    pairs = sorted(zip(items[::2], items[1::2], strict=True))
    return b"".join([b"*%d\r\n" % len(items), *[part for pair in pairs for part in pair]])
