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

from array import array
from collections.abc import Iterator
from math import inf

import trio
from cachetools import LRUCache

from proxy.metrics import Family, MetricType, Sample
from proxy.settings import CacheSettings

# What an entry takes beside the bytes of key and reply: the objects, and four tables' share of each. Held by
# test_memory.py::test_the_bound_is_that_of_the_memory_taken.
OVERHEAD_BYTES = 430
SEEN_KEYS = 65_536  # places for keys that were read; each is overwritten by the next key that falls there
NEVER = -1  # as an age
FILLS_OF_AN_AGE = 16  # a use is noted once in an age; what has few entries has few ages, too
FREED_AT_ONCE = 1_000  # entries of an ended snapshot, in one step of about 0.2 ms


class Held:
    """A reply."""

    __slots__ = ("age", "reply", "size", "until")

    def __init__(self, reply: bytes, until: float, size: int) -> None:
        self.reply = reply
        self.until = until  # Trio's clock; inf: as long as the snapshot serves
        self.size = size  # in bytes, with its key and what is around it
        self.age = NEVER  # of the cache, at its last use that was noted


class Shelf:
    """What is kept of one snapshot in one RESP version."""

    __slots__ = ("_cache", "_held", "resp", "snapshot_id", "values")

    def __init__(self, cache: SnapshotCache, snapshot_id: int, resp: int) -> None:
        self.snapshot_id = snapshot_id
        self.resp = resp
        self._cache: SnapshotCache = cache
        # Not in ``values``, whose look-up costs several times as much, and with it a tenth of a hit.
        self._held: dict[bytes, Held] | None = {}  # None: its snapshot has ended
        self.values: LRUCache[bytes, Held] = LRUCache(cache.bytes_max, getsizeof=_size_of)

    def get(self, key: bytes) -> bytes | None:
        """The reply, if it is kept and its time is not over."""
        if not self._held:
            return None
        held = self._held.get(key)
        if held is None:
            return None
        if held.age == self._cache.age:
            return held.reply
        if held.until != inf:
            if trio.current_time() >= held.until:
                self._remove(key)
                return None
        else:
            held.age = self._cache.age
        self.values[key]  # which notes the use
        return held.reply

    def put(self, key: bytes, reply: bytes, until: float) -> None:
        """Keep a reply that was used as right. Nothing if the snapshot has ended, or the reply is too large."""
        if self._held is None or not self._cache.make_room(key, reply):
            return
        held = Held(reply, until, len(key) + len(reply) + OVERHEAD_BYTES)
        self._held[key] = self.values[key] = held

    def pop(self) -> None:
        """Remove what was not used for longest."""
        assert self._held is not None
        key, _ = self.values.popitem()
        del self._held[key]

    def _remove(self, key: bytes) -> None:
        assert self._held is not None
        del self._held[key], self.values[key]

    def end(self) -> tuple[LRUCache[bytes, Held], dict[bytes, Held]]:
        """Nothing is kept here any more. What was."""
        ended = self.values, self._held or {}
        self.values, self._held = LRUCache(0), None
        return ended


class SnapshotCache:
    """One per proxy."""

    def __init__(self, settings: CacheSettings) -> None:
        self.bytes_max = settings.bytes_max
        # Also where nothing is kept here: a memcached is asked for what its shelf does not have.
        self.is_used = bool(settings.bytes_max or settings.memcached)
        self.age = 0  # goes up as entries come, without which the order of uses is of no use
        self._value_bytes_max = settings.value_bytes_max
        self._shelves: dict[tuple[int, int], Shelf] = {}  # snapshot, RESP version
        # Hashes of keys, each at the place that its last bits say.
        self._seen = array("q", bytes(8 * SEEN_KEYS if self.is_used else 0))
        self._ended: list[tuple[LRUCache[bytes, Held], dict[bytes, Held]]] = []
        self._has_ended = trio.Event()
        self.hits_total = 0
        self.fills_total = 0
        self.evictions_total = 0

    def shelf(self, snapshot_id: int, resp: int) -> Shelf | None:
        """Of a snapshot that serves; None: nothing is to be kept."""
        found = self._shelves.get((snapshot_id, resp))
        if found is None and self.is_used:
            found = self._shelves[(snapshot_id, resp)] = Shelf(self, snapshot_id, resp)
        return found

    def is_read_again(self, key: bytes) -> bool:
        """Whether the key was read not long ago; from now on it was."""
        number = hash(key)
        place = number % SEEN_KEYS
        if self._seen[place] == number:
            return True
        self._seen[place] = number
        return False

    def make_room(self, key: bytes, reply: bytes) -> bool:
        """For one more entry, which then is put in; False: it is too large."""
        length = len(key) + len(reply)
        if length > self._value_bytes_max or length + OVERHEAD_BYTES > self.bytes_max:
            return False
        while self.bytes_held + length + OVERHEAD_BYTES > self.bytes_max:
            max(self._shelves.values(), key=_bytes_of).pop()
            self.evictions_total += 1
        self.fills_total += 1
        if not self.fills_total % FILLS_OF_AN_AGE:
            self.age += 1
        return True

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
                values, held = self._ended[-1]
                for _ in range(min(FREED_AT_ONCE, len(values))):
                    del held[values.popitem()[0]]
                if not values:
                    self._ended.pop()
                await trio.lowlevel.checkpoint()

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


def _bytes_of(shelf: Shelf) -> float:
    return shelf.values.currsize


def _family(name: str, help_: str, kind: MetricType) -> Family:
    return Family(f"steadyread_snapshot_cache_{name}", help_, kind, ())


HITS = _family("hits_total", "Reads at snapshots that the cache served.", MetricType.COUNTER)
FILLS = _family("fills_total", "Replies that were put into the cache.", MetricType.COUNTER)
EVICTIONS = _family("evictions_total", "Entries that made room for others.", MetricType.COUNTER)
BYTES = _family("bytes", "Bytes that the cache's entries take.", MetricType.GAUGE)
ENTRIES = _family("entries", "Entries in the cache.", MetricType.GAUGE)
