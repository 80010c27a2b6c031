"""The store in memory: for an embedded cluster, which is gone when the proxy is, and for tests.

It keeps what the durable twins keep, for as long as the process lives.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import trio

from proxy.store.interface import (
    ABSENT,
    NO_LEASE,
    Batch,
    Change,
    CompactedError,
    ConflictError,
    Delete,
    Entry,
    Expect,
    LeaseExpiredError,
    Operation,
    Put,
    StoreUnavailableError,
    refuse_repeated_keys,
)

SWEEP_SECONDS = 0.05  # between two looks for ended leases
BATCH_CHANGES_MAX = 1000  # of one batch, whole revisions aside


@dataclass(slots=True)
class _Lease:
    ttl_seconds: float
    ends_at: float
    keys: set[str]


class MemoryStore:
    """The in-memory twin of ``proxy.store.interface.TopologyStore``. ``now`` is a clock that never goes back."""

    name = "memory"
    is_shared = False

    def __init__(self, now: Callable[[], float] = trio.current_time) -> None:
        self._now = now
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []  # of _entries, ascending
        self._log: list[Change] = []  # ascending by revision
        self._revision = 0
        self._compacted = 0  # the log begins after this revision
        self._leases: dict[int, _Lease] = {}
        self._lease_count = 0
        self._news = trio.Event()
        self._is_closed = False

    def problems(self) -> list[str]:
        return []

    async def run(self) -> None:
        while True:
            await trio.sleep(SWEEP_SECONDS)
            self._end_leases()

    async def revision(self) -> int:
        await self._enter()
        return self._revision

    async def get(self, key: str) -> Entry | None:
        await self._enter()
        return self._entries.get(key)

    async def read(self, first: str, last: str, *, limit: int, descending: bool = False) -> list[Entry]:
        await self._enter()
        low, high = bisect_left(self._keys, first), bisect_left(self._keys, last)
        if descending:
            keys = self._keys[max(low, high - limit) : high][::-1]
        else:
            keys = self._keys[low : min(high, low + limit)]
        return [self._entries[key] for key in keys]

    async def commit(
        self, operations: Sequence[Operation], expect: Sequence[Expect] = (), *, durable: bool = False
    ) -> int:
        refuse_repeated_keys(operations)
        await self._enter()
        self._end_leases()
        for condition in expect:
            entry = self._entries.get(condition.key)
            found = ABSENT if entry is None else entry.revision
            if found != condition.revision:
                raise ConflictError(condition.key, condition.revision, found)
        for operation in operations:
            if isinstance(operation, Put) and operation.lease != NO_LEASE:
                self._lease(operation.lease)
        return self._apply(operations)

    async def grant(self, ttl_seconds: float) -> int:
        await self._enter()
        self._lease_count += 1
        self._leases[self._lease_count] = _Lease(ttl_seconds, self._now() + ttl_seconds, set())
        return self._lease_count

    async def renew(self, lease: int) -> None:
        await self._enter()
        self._end_leases()
        held = self._lease(lease)
        held.ends_at = self._now() + held.ttl_seconds

    async def revoke(self, lease: int) -> None:
        await self._enter()
        self._end(lease)

    def watch(self, prefix: str, after: int) -> MemoryWatch:
        return MemoryWatch(self, prefix, after)

    def attentive(self) -> AbstractContextManager[None]:
        return nullcontext()  # a commit tells its watches at once, and nobody else commits

    async def compact(self, revision: int) -> None:
        await self._enter()
        revision = min(revision, self._revision)
        self._log = [
            change
            for change in self._log
            if change.revision > revision
            or ((entry := self._entries.get(change.key)) is not None and entry.revision == change.revision)
        ]
        self._compacted = max(self._compacted, revision)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._is_closed = True
        self._tell()

    # -- for the watch

    def changes_after(self, prefix: str, after: int) -> Batch:
        """At once: the changes under ``prefix`` after a revision, whole revisions, some BATCH_CHANGES_MAX at most."""
        if self._is_closed:
            raise StoreUnavailableError("the store in memory is closed")
        if after < self._compacted:
            raise CompactedError(after, self._compacted)
        found: list[Change] = []
        for place in range(
            bisect_left(self._log, after + 1, key=lambda change: change.revision), len(self._log)
        ):
            change = self._log[place]
            if len(found) >= BATCH_CHANGES_MAX and change.revision != found[-1].revision:
                return Batch(tuple(found), found[-1].revision)
            if change.key.startswith(prefix):
                found.append(change)
        return Batch(tuple(found), max(self._revision, after))

    async def wait_news(self) -> None:
        """Return after the next commit, or when the store is closed."""
        await self._news.wait()

    # -- inside

    async def _enter(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._is_closed:
            raise StoreUnavailableError("the store in memory is closed")

    def _apply(self, operations: Sequence[Operation]) -> int:
        """Synchronous: all of them, at the next revision."""
        self._revision += 1
        for operation in operations:
            old = self._entries.get(operation.key)
            if old is not None and old.lease in self._leases:
                self._leases[old.lease].keys.discard(old.key)
            match operation:
                case Put(key, value, lease):
                    if old is None:
                        insort(self._keys, key)
                    self._entries[key] = Entry(key, value, self._revision, lease)
                    if lease != NO_LEASE:
                        self._leases[lease].keys.add(key)
                    self._log.append(Change(self._revision, key, value))
                case Delete(key):
                    if old is not None:
                        del self._entries[key]
                        del self._keys[bisect_left(self._keys, key)]
                        self._log.append(Change(self._revision, key, None))
        self._tell()
        return self._revision

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def _lease(self, lease: int) -> _Lease:
        held = self._leases.get(lease)
        if held is None:
            raise LeaseExpiredError(f"lease {lease} has ended")
        return held

    def _end_leases(self) -> None:
        for lease, held in list(self._leases.items()):
            if held.ends_at <= self._now():
                self._end(lease)

    def _end(self, lease: int) -> None:
        held = self._leases.pop(lease, None)
        if held is not None and held.keys:
            self._apply([Delete(key) for key in sorted(held.keys)])


class MemoryWatch:
    """A watch of a MemoryStore."""

    def __init__(self, store: MemoryStore, prefix: str, after: int) -> None:
        self._store = store
        self._prefix = prefix
        self._after = after

    async def next_batch(self) -> Batch:
        await trio.lowlevel.checkpoint()
        while True:
            batch = self._store.changes_after(self._prefix, self._after)
            self._after = batch.revision
            if batch.changes:
                return batch
            await self._store.wait_news()
