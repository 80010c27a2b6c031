"""Replies to GET at snapshots, kept in this process.

What a snapshot shows of a key does not change while it serves, but for its expiry. So a reply that was right once is
right until the key's time is over or the snapshot ends.

Who asks knows that the snapshot serves, and asks that at each hit. Who puts something in has used it as a reply.

Invariants
- A shelf is found from ``shelf`` until ``end`` of its snapshot; then it is empty, for good, whoever still holds it.
- What all shelves hold counts at most ``bytes_max``. Room is made in the one that has most, least recently used first.
- A key is kept only when it is read again while it is remembered, so that a look at all keys washes nothing out.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import trio
from cachetools import LRUCache

from proxy.metrics import Family, MetricType, Sample
from proxy.settings import CacheSettings

# What an entry takes beside the bytes of key and reply: the objects, and three tables' share of each. Held by
# test_memory.py::test_the_bound_is_that_of_the_memory_taken.
OVERHEAD_BYTES = 400
SEEN_KEYS = 32_768  # keys read once that are remembered, at least; at the most twice as many
FREED_AT_ONCE = 1_000  # entries of an ended snapshot, in one step of about 0.2 ms


class Held(NamedTuple):
    """A reply."""

    reply: bytes
    until: float  # Trio's clock; inf: as long as the snapshot serves
    size: int  # in bytes, with its key and what is around it


class Shelf:
    """What is kept of one snapshot in one RESP version."""

    __slots__ = ("_cache", "values")

    def __init__(self, cache: SnapshotCache) -> None:
        self._cache: SnapshotCache | None = cache  # None: its snapshot has ended
        self.values: LRUCache[bytes, Held] = LRUCache(cache.bytes_max, getsizeof=_size_of)

    def get(self, key: bytes) -> bytes | None:
        """The reply, if it is kept and its time is not over."""
        values = self.values
        if key not in values:
            return None
        held = values[key]
        if held.until != inf and trio.current_time() >= held.until:
            del values[key]
            return None
        return held.reply

    def put(self, key: bytes, reply: bytes, until: float) -> None:
        """Keep a reply that was used as right. Nothing if the snapshot has ended, or the reply is too large."""
        if self._cache is not None:
            self._cache.put(self, key, reply, until)

    def end(self) -> LRUCache[bytes, Held]:
        """Nothing is kept here any more. What was."""
        values, self.values = self.values, LRUCache(0)
        self._cache = None
        return values


class SnapshotCache:
    """One per proxy."""

    def __init__(self, settings: CacheSettings) -> None:
        self.bytes_max = settings.bytes_max
        self._value_bytes_max = settings.value_bytes_max
        self._shelves: dict[tuple[int, int], Shelf] = {}  # snapshot, RESP version
        self._seen: set[int] = set()  # hashes of keys that were read once
        self._seen_before: set[int] = set()  # the same, older
        self._ended: list[LRUCache[bytes, Held]] = []
        self._has_ended = trio.Event()
        self.hits_total = 0
        self.fills_total = 0
        self.evictions_total = 0

    def shelf(self, snapshot_id: int, resp: int) -> Shelf | None:
        """Of a snapshot that serves; None: nothing is to be kept."""
        found = self._shelves.get((snapshot_id, resp))
        if found is None and self.bytes_max:
            found = self._shelves[(snapshot_id, resp)] = Shelf(self)
        return found

    def is_read_again(self, key: bytes) -> bool:
        """Whether the key was read not long ago; from now on it was."""
        number = hash(key)
        if number in self._seen or number in self._seen_before:
            return True
        self._seen.add(number)
        if len(self._seen) >= SEEN_KEYS:
            self._seen_before, self._seen = self._seen, set()
        return False

    def put(self, shelf: Shelf, key: bytes, reply: bytes, until: float) -> None:
        """See ``Shelf.put``."""
        size = len(key) + len(reply) + OVERHEAD_BYTES
        if len(key) + len(reply) > self._value_bytes_max or size > self.bytes_max:
            return
        values = shelf.values
        values.pop(key, None)
        while self.bytes_held + size > self.bytes_max:
            max([each.values for each in self._shelves.values()], key=_bytes_of).popitem()
            self.evictions_total += 1
        values[key] = Held(reply, until, size)
        self.fills_total += 1

    def end(self, snapshot_id: int) -> None:
        """The snapshot serves no more: nothing is kept of it from now on."""
        for place in [place for place in self._shelves if place[0] == snapshot_id]:
            self._ended.append(self._shelves.pop(place).end())
        self._has_ended.set()

    async def run(self) -> None:
        """Free what ended snapshots have left, in short steps, for it may be much."""
        while True:
            await self._has_ended.wait()
            self._has_ended = trio.Event()
            while self._ended:
                values = self._ended[-1]
                for _ in range(min(FREED_AT_ONCE, len(values))):
                    values.popitem()
                if not values:
                    self._ended.remove(values)
                await trio.sleep(0)

    @property
    def bytes_held(self) -> float:
        return sum([shelf.values.currsize for shelf in self._shelves.values()])

    def samples(self) -> Iterator[Sample]:
        yield Sample(HITS, self.hits_total)
        yield Sample(FILLS, self.fills_total)
        yield Sample(EVICTIONS, self.evictions_total)
        yield Sample(BYTES, self.bytes_held)
        yield Sample(ENTRIES, sum([len(shelf.values) for shelf in self._shelves.values()]))


def _size_of(held: Held) -> int:
    return held.size


def _bytes_of(values: LRUCache[bytes, Held]) -> float:
    return values.currsize


def _family(name: str, help_: str, kind: MetricType) -> Family:
    return Family(f"steadyread_snapshot_cache_{name}", help_, kind, ())


HITS = _family("hits_total", "Reads at snapshots that the cache served.", MetricType.COUNTER)
FILLS = _family("fills_total", "Replies that were put into the cache.", MetricType.COUNTER)
EVICTIONS = _family("evictions_total", "Entries that made room for others.", MetricType.COUNTER)
BYTES = _family("bytes", "Bytes that the cache's entries take.", MetricType.GAUGE)
ENTRIES = _family("entries", "Entries in the cache.", MetricType.GAUGE)
