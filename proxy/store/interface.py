"""What a topology store is: ordered keys, revisions, compare-and-set, leases, and a watch that loses nothing.

The model is etcd's, so that etcd can be one of the twins. A store holds entries, ``key -> value``, in the order of
their keys. Each commit applies all its operations or none, and gets the next revision. Every change stays in the
store's log until ``compact``, and a watch reads that log: what notifies a watch carries no data, it only says
"look", so that a notification that is lost, or a process that dies before it sends one, loses no change.

Values are bytes here; ``proxy.store.records`` says what they mean. Keys are ASCII words joined by ``/``.

Twins: ``proxy.store.memory`` and ``proxy.store.sqlite``. They pass the same tests, tests/proxy/store.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

NO_LEASE = 0
ABSENT = 0  # as Expect.revision: the key must have no entry


@dataclass(frozen=True, slots=True)
class Entry:
    """What a key holds now."""

    key: str
    value: bytes
    revision: int  # of the commit that wrote it last
    lease: int = NO_LEASE


@dataclass(frozen=True, slots=True)
class Put:
    """Write ``value``. With a lease, the entry is deleted when that ends."""

    key: str
    value: bytes
    lease: int = NO_LEASE


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the entry; nothing if there is none."""

    key: str


Operation = Put | Delete


@dataclass(frozen=True, slots=True)
class Expect:
    """A condition of a commit: the entry's revision is this one, or ABSENT."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Change:
    """One step of the log."""

    revision: int
    key: str
    value: bytes | None  # None: deleted


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes of whole revisions, in order; the next batch begins after ``revision``."""

    changes: tuple[Change, ...]
    revision: int


class StoreError(Exception):
    """The store could not do it. The text says what, where, and what to do."""


class StoreUnavailableError(StoreError):
    """Locked, full, gone or closed: nothing was written, and a later attempt may work."""


class StoreRefusedError(StoreError):
    """The store must not be used as it is: it is damaged, of a newer version, or not a store. It is left as it was."""


class ConflictError(StoreError):
    """A condition of a commit did not hold; nothing was written."""

    def __init__(self, key: str, expected: int, found: int) -> None:
        super().__init__(f"{key} is at revision {found}, and not at {expected}")
        self.key = key
        self.expected = expected
        self.found = found


class CompactedError(StoreError):
    """The log no longer reaches back that far: read the entries as they are, and watch from there."""

    def __init__(self, asked: int, oldest: int) -> None:
        super().__init__(f"changes after revision {asked} were asked for, and the log begins after {oldest}")
        self.oldest = oldest  # the earliest revision that a watch may begin after


class LeaseExpiredError(StoreError):
    """The lease ended, and the entries that hung on it are gone."""


class Watch(Protocol):
    """A reader of the log, from one revision on."""

    async def next_batch(self) -> Batch:
        """The next changes under the watch's prefix, as soon as there are any. Each change comes exactly once.

        A batch never cuts a revision in two. Raises CompactedError, StoreUnavailableError; after
        StoreUnavailableError the same watch may be asked again and goes on where it was. If cancelled, nothing is lost.
        """
        ...


class TopologyStore(Protocol):
    """Entries, commits, leases and watches. All methods raise StoreUnavailableError when the store cannot be reached.

    ``run`` must run for changes that other processes make to be noticed and for leases to end.
    """

    @property
    def name(self) -> str:
        """What operators call it: the file, or "memory"."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether another process may have it, too."""
        ...

    def problems(self) -> list[str]:
        """What an operator should know, one sentence each; empty when all is well."""
        ...

    async def run(self) -> None:
        """Keep watch until cancelled. Raises nothing else: what is wrong is in ``problems``."""
        ...

    async def revision(self) -> int:
        """Of the last commit; 0 for an empty store."""
        ...

    async def get(self, key: str) -> Entry | None: ...

    async def read(self, first: str, last: str, *, limit: int, descending: bool = False) -> list[Entry]:
        """At most ``limit`` entries with ``first <= key < last`` in the order of the keys, or against it."""
        ...

    async def commit(
        self, operations: Sequence[Operation], expect: Sequence[Expect] = (), *, durable: bool = False
    ) -> int:
        """Apply all operations if all conditions hold; the new revision. A key may stand in it once.

        Not durable: it survives the death of every process, and the newest may be lost to a power failure.
        Raises ConflictError, LeaseExpiredError when a Put names an ended lease. If cancelled, the commit may have
        happened: read again before acting on it.
        """
        ...

    async def grant(self, ttl_seconds: float) -> int:
        """A new lease. It ends ``ttl_seconds`` after its last renewal, whatever becomes of this process."""
        ...

    async def renew(self, lease: int) -> None:
        """Raises LeaseExpiredError."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease at once, and delete its entries. Nothing if it has ended."""
        ...

    def watch(self, prefix: str, after: int) -> Watch:
        """Changes to keys that begin with ``prefix``, of revisions greater than ``after``."""
        ...

    def attentive(self) -> AbstractContextManager[None]:
        """While any is held, ``run`` notices what other processes commit within milliseconds. It costs CPU."""
        ...

    async def compact(self, revision: int) -> None:
        """Forget changes up to ``revision`` that a later one has replaced. Entries stay; watches from before end."""
        ...

    async def aclose(self) -> None:
        """Close it. Everything raises StoreUnavailableError afterwards."""
        ...


def prefix_range(prefix: str) -> tuple[str, str]:
    """(first, last) for ``read``: all keys that begin with ``prefix``, which is not empty."""
    return prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)


def refuse_repeated_keys(operations: Sequence[Operation]) -> None:
    """Raises ValueError if a key stands in a commit more than once: what it would mean differs between twins."""
    if len({operation.key for operation in operations}) != len(operations):
        raise ValueError("a key stands in the commit more than once")
