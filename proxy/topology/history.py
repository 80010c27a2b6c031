"""Questions about the past: the map as of an epoch or a time, the events of the timeline, the migrations.

It only reads the store, and keeps nothing but a few decoded versions of the map. It never waits for the cluster.

Each call reads a bounded part of the record and says in its answer which: whoever wants more asks again from there.
Decoding is Python at work on the event loop that traffic shares, so it steps aside every DECODE_SECONDS.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import trio

from proxy.store.interface import CompactedError, Entry, StoreRefusedError, TopologyStore, prefix_range
from proxy.store.records import (
    EVENT_HEAD,
    EVENTS,
    MIGRATIONS,
    REPLICAS,
    VIEW,
    VIEWS,
    VIEWS_BY_EPOCH,
    VIEWS_BY_TIME,
    ViewRecord,
    micros,
    number_of,
    numbered,
    unpack,
    unpack_event,
    unpack_migration,
    unpack_replica,
)
from proxy.topology.views import ViewReader
from routing.events import Event, EventFilter
from routing.migrations import MigrationRecord
from routing.replicas import ReplicaRecord

SCAN_EVENTS_MAX = 20_000  # of one call: some 0.2 s of work, in slices
READ_EVENTS = 256  # of one read of the store
REPLICAS_MAX = 10_000
DECODE_SECONDS = 0.001  # then other tasks get their turn; tested in tests/proxy/topology/test_history.py
NUMBER_MAX = 10**16 - 2  # the last that a key's digits have room for, with one to follow

EVERYTHING = EventFilter()


@dataclass(frozen=True, slots=True)
class EventPage:
    """A run of the timeline: ``events`` are all that match with numbers from ``looked_from`` to ``next_after``."""

    events: tuple[Event, ...]  # ascending
    looked_from: int
    next_after: int  # what to ask for next
    is_at_end: bool  # there was nothing behind it when it was read
    newest: int  # the newest event's number then, 0 without one; less than was asked from: another record
    missing_before: int | None = None  # events that were asked for, with lesser numbers, are no longer kept


class History:
    """Reads what was recorded. All methods raise StoreError."""

    def __init__(self, store: TopologyStore, views: ViewReader | None = None) -> None:
        """``views``: a reader to share decoded versions with."""
        self._store = store
        self._views = ViewReader(store) if views is None else views

    # -- the map

    async def view_at(self, *, epoch: int | None = None, at: float | None = None) -> ViewRecord | None:
        """The map as of an epoch, or as of ``at``, Unix seconds. None if nothing had been recorded by then.

        Of an epoch: the last version of that epoch, or of the highest one below it that was recorded.
        """
        if epoch is not None and at is None:
            prefix, last = VIEWS_BY_EPOCH, epoch
        elif at is not None and epoch is None:
            prefix, last = VIEWS_BY_TIME, micros(at)
        else:
            raise ValueError("give an epoch or a time")
        if last < 0:
            return None
        vanished = None
        while True:
            last_key = numbered(prefix, min(last, NUMBER_MAX) + 1)
            entries = await self._store.read(prefix, last_key, limit=1, descending=True)
            if not entries:
                return None
            number = number_of(entries[0].key)
            record = await self._views.version(number)
            if record is not None:
                return record
            if number == vanished:
                raise StoreRefusedError(f"the store's index {entries[0].key} names a map that is not there")
            vanished = number  # by retention, between the two reads

    async def oldest_version(self) -> ViewRecord | None:
        """The first that is still kept. None: none has been recorded."""
        while True:
            entries = await self._store.read(*prefix_range(VIEWS), limit=1)
            if not entries:
                return None
            record = await self._views.version(number_of(entries[0].key))
            if record is not None:
                return record

    async def versions(self, limit: int) -> list[ViewRecord]:
        """The newest versions of the map, newest first."""
        head = await self._store.get(VIEW)
        newest = 0 if head is None else unpack(head.value, "map's number")
        found: list[ViewRecord] = []
        while len(found) < limit and (record := await self._views.version(newest - len(found))) is not None:
            found.append(record)
        return found

    # -- the replicas

    async def replicas(self) -> list[ReplicaRecord]:
        """How each replica fares, by node id."""
        entries = await self._store.read(*prefix_range(REPLICAS), limit=REPLICAS_MAX)
        return [unpack_replica(entry.value) for entry in entries]

    # -- the timeline

    async def newest_number(self) -> int:
        """Of the newest event; 0 before the first."""
        head = await self._store.get(EVENT_HEAD)
        number: int = 0 if head is None else unpack(head.value, "number of events")
        return number

    async def events(
        self,
        after: int,
        *,
        filter: EventFilter = EVERYTHING,
        limit: int,
        scan_max: int = SCAN_EVENTS_MAX,
    ) -> EventPage:
        """Events with numbers above ``after``: at most ``limit``, and of the first ``scan_max`` that there are.

        So a rare kind gives pages with few events or none; ``next_after`` of one is ``after`` of the next.
        """
        newest = await self.newest_number()
        looked_from, at = after + 1, after
        missing_before = None
        found: list[Event] = []
        decoding = _Decoding()
        scan_left = scan_max
        while at < newest and scan_left > 0 and len(found) < limit:
            entries = await self._store.read(
                numbered(EVENTS, at + 1), numbered(EVENTS, newest + 1), limit=min(READ_EVENTS, scan_left)
            )
            first = number_of(entries[0].key) if entries else newest + 1
            if first > at + 1:  # retention was here
                if at > after:
                    break  # since the last read: the next page says so
                looked_from = missing_before = first
                at = first - 1
            for entry in entries:
                event = await decoding.event(entry)
                at = event.number
                if filter.matches(event):
                    found.append(event)
                    if len(found) == limit:
                        break
            scan_left -= len(entries)
        return EventPage(tuple(found), looked_from, at, at >= newest, newest, missing_before)

    async def newest(
        self, limit: int, filter: EventFilter = EVERYTHING, *, scan_max: int = SCAN_EVENTS_MAX
    ) -> EventPage:
        """The newest ``limit`` events that match, of the newest ``scan_max``."""
        newest = await self.newest_number()
        looked_from = newest + 1
        found: list[Event] = []
        decoding = _Decoding()
        scan_left = scan_max
        while scan_left > 0 and len(found) < limit:
            entries = await self._store.read(
                EVENTS, numbered(EVENTS, looked_from), limit=min(READ_EVENTS, scan_left), descending=True
            )
            if not entries:
                break
            for entry in entries:
                event = await decoding.event(entry)
                looked_from = event.number
                if filter.matches(event):
                    found.append(event)
                    if len(found) == limit:
                        break
            scan_left -= len(entries)
        return EventPage(tuple(reversed(found)), looked_from, newest, True, newest)

    async def wait(self, after: int) -> None:
        """Return when there is an event with a number above ``after``. If cancelled, nothing is lost."""
        while True:
            revision = await self._store.revision()  # before the look: what comes after it, the watch sees
            if await self.newest_number() > after:
                return
            watch = self._store.watch(EVENTS, revision)
            try:
                while True:
                    batch = await watch.next_batch()
                    if any(change.value and number_of(change.key) > after for change in batch.changes):
                        return
            except CompactedError:
                continue  # the log was cut before the watch had read it: look again

    # -- migrations

    async def migrations(self, limit: int) -> list[MigrationRecord]:
        """The records of the migrations that began last, the last first."""
        newest = await self._store.read(*prefix_range(MIGRATIONS), limit=limit, descending=True)
        decoding = _Decoding()
        return [await decoding.migration(entry) for entry in newest]


class _Decoding:
    """Decodes entries in one call, and lets other tasks run in between."""

    def __init__(self) -> None:
        self._until = perf_counter() + DECODE_SECONDS

    async def event(self, entry: Entry) -> Event:
        await self._step_aside()
        return unpack_event(number_of(entry.key), entry.value)

    async def migration(self, entry: Entry) -> MigrationRecord:
        await self._step_aside()
        return unpack_migration(entry.value)

    async def _step_aside(self) -> None:
        if perf_counter() >= self._until:
            await trio.lowlevel.checkpoint()
            self._until = perf_counter() + DECODE_SECONDS
