"""Finds the items that come most often in a stream, in bounded memory, and forgets what was long ago.

Space-Saving: A. Metwally, D. Agrawal, A. El Abbadi, "Efficient Computation of Frequent and Top-k Elements in Data
Streams", ICDT 2005, with the paper's Stream-Summary: counters lie in buckets by their count, so that an addition is a
few dictionary operations whatever the capacity.

Invariants, of ``capacity`` counters and ``total`` additions
- The counts add up to ``total``, so the smallest of a full set is at most ``total / capacity``.
- An item has come at most ``count`` times, and at least ``count - error``; no ``error`` exceeds the smallest count.
- What has no counter has come at most ``count_max_of_others`` times. So all that came oftener have one.

Decay is by windows: the one that fills and the one before are looked at together, and all before are forgotten. Bounds
of two sets of counters add up (P. K. Agarwal et al., "Mergeable Summaries", PODS 2012).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from heapq import nlargest
from operator import attrgetter
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Counted(Generic[Item]):
    """How often an item has come: at most ``count`` times, and at least ``count - error`` times."""

    item: Item
    count: int
    error: int

    @property
    def at_least(self) -> int:
        return self.count - self.error


class SpaceSaving(Generic[Item]):
    """At most ``capacity`` items with how often each has come."""

    __slots__ = ("_buckets", "_counts", "_errors", "_least", "capacity", "total")

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"at least one counter is needed, not {capacity}")
        self.capacity = capacity
        self.total = 0
        self._counts: dict[Item, int] = {}
        self._errors: dict[Item, int] = {}  # of those whose count may be too high
        # count -> the items that have it, oldest first; none is empty
        self._buckets: dict[int, dict[Item, None]] = {}
        self._least = 0  # the smallest count; 0 without items

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, item: Item) -> None:
        """It has come once more. One that is new takes the counter of the one that has come least, if all are taken."""
        self.total += 1
        counts, buckets = self._counts, self._buckets
        count = counts.get(item)
        if count is None:
            if len(counts) < self.capacity:
                count = 0
                self._least = 1
            else:
                count = self._least
                bucket = buckets[count]
                loser = next(iter(bucket))
                del bucket[loser], counts[loser]
                self._errors.pop(loser, None)
                self._errors[item] = count
                if not bucket:
                    del buckets[count]
                    self._least = count + 1
        else:
            bucket = buckets[count]
            del bucket[item]
            if not bucket:
                del buckets[count]
                if count == self._least:
                    self._least = count + 1  # where it goes now
        count += 1
        counts[item] = count
        bucket = buckets.get(count)  # type: ignore[assignment]  # None is seen to at once
        if bucket is None:
            buckets[count] = {item: None}
        else:
            bucket[item] = None

    @property
    def count_max_of_others(self) -> int:
        """How often an item without a counter may have come, at most."""
        return self._least if len(self._counts) == self.capacity else 0

    def counted(self, item: Item) -> Counted[Item]:
        """What is known of ``item``, with a counter or without."""
        return Counted(item, *self.bounds(item))

    def bounds(self, item: Item) -> tuple[int, int]:
        """The same as count and error."""
        count = self._counts.get(item)
        if count is None:
            least = self.count_max_of_others
            return least, least
        return count, self._errors.get(item, 0)

    def __iter__(self) -> Iterator[Item]:
        """The items that have a counter."""
        return iter(self._counts)


class RecentCounts(Generic[Item]):
    """The same of the last one to two windows of ``window_seconds``. ``now`` never goes back.

    Windows follow each other without a gap, so that those of two counts that began together always are the same.
    """

    __slots__ = ("_ends_at", "_filling", "_full", "_since", "window_seconds")

    def __init__(self, capacity: int, window_seconds: float, now: float) -> None:
        self.window_seconds = window_seconds
        self._filling: SpaceSaving[Item] = SpaceSaving(capacity)
        self._full: SpaceSaving[Item] = SpaceSaving(capacity)  # of the window before
        self._since = now  # when what is counted began
        self._ends_at = now + window_seconds

    def add(self, item: Item, now: float) -> None:
        if now >= self._ends_at:
            self._turn(now)
        self._filling.add(item)

    def seconds(self, now: float) -> float:
        """The time that the counts are of."""
        self._turn(now)
        return now - self._since

    def total(self, now: float) -> int:
        """Additions in that time."""
        self._turn(now)
        return self._filling.total + self._full.total

    def counted(self, item: Item, now: float) -> Counted[Item]:
        self._turn(now)
        return self._counted(item)

    def top(self, number: int, now: float) -> list[Counted[Item]]:
        """The ``number`` items that have come most often for certain, most first; of equals the one seen first."""
        self._turn(now)
        found = (self._counted(item) for item in dict.fromkeys([*self._full, *self._filling]))
        return nlargest(number, found, key=attrgetter("at_least", "count"))

    def _counted(self, item: Item) -> Counted[Item]:
        count, error = self._filling.bounds(item)
        count_before, error_before = self._full.bounds(item)
        return Counted(item, count + count_before, error + error_before)

    def _turn(self, now: float) -> None:
        """Begin the window that ``now`` is in."""
        if now < self._ends_at:
            return
        capacity = self._filling.capacity
        passed = int((now - self._ends_at) // self.window_seconds)  # windows in which nothing came
        begins_at = self._ends_at + passed * self.window_seconds
        self._full = SpaceSaving(capacity) if passed else self._filling
        self._since = begins_at - self.window_seconds
        self._filling = SpaceSaving(capacity)
        self._ends_at = begins_at + self.window_seconds
