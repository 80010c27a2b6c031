"""Writes what was seen into the store: a version of the map, the events that lead to it, and their migrations.

One commit holds them all, so the record never shows a map without the events that explain it, or the other way
round. The events are made from what the store holds and from what is seen now. So nothing needs to be kept back
while the store takes no writes: when it does again, the difference is recorded, and an event says for how long
nothing was. If the store is then not the one that was written before, since its file was deleted or replaced, an event
says that the record was lost.

Only the discoverer records, and each commit expects its lease's entry: one that was the discoverer, and does not know
yet that it is no more, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from proxy.log import get_logger
from proxy.store.interface import (
    ABSENT,
    ConflictError,
    Delete,
    Expect,
    Operation,
    Put,
    StoreRefusedError,
    TopologyStore,
    prefix_range,
)
from proxy.store.records import (
    DISCOVERER,
    EVENT_HEAD,
    EVENTS,
    LOOKED,
    REPLICAS,
    TIMELINE,
    VIEW,
    VIEW_NODES,
    VIEWS,
    Looked,
    ViewRecord,
    index_keys,
    migration_key,
    number_of,
    numbered,
    pack_event,
    pack_looked,
    pack_migration,
    pack_nodes,
    pack_number,
    pack_replica,
    pack_timeline,
    pack_view,
    renumbered,
    unpack_looked,
    unpack_number,
    unpack_replica,
    unpack_timeline,
)
from proxy.topology.views import ViewReader
from routing.replicas import ReplicaRecord, replica_records
from routing.timeline import Advance, Event, EventKind, Observation, Plain, Timeline, TimelineLimits, advance
from routing.topology import EMPTY_VIEW

MICROSECOND = 1e-6  # the least difference that the index by time tells apart
REPLICAS_MAX = 10_000  # more than a cluster can have nodes

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Head:
    """Where the record stands: what the next commit builds on, and the revisions that it expects."""

    view: ViewRecord | None
    view_revision: int
    timeline: Timeline
    timeline_value: bytes  # as it is on record; empty before the first
    timeline_revision: int
    event_count: int
    events_revision: int
    looked: Looked | None
    replicas: Mapping[str, ReplicaRecord]  # node id -> as it is on record


class Recorder:
    """Of one proxy, for as long as it is the discoverer."""

    def __init__(self, store: TopologyStore, views: ViewReader, proxy_id: str) -> None:
        self.records_total = 0  # commits
        self.events_total = 0
        self.missed_total = 0  # looks that the store did not take
        # Unix seconds when the last look began that is recorded; earlier changes are, too, or are not ours to tell.
        self.told_until: float | None = None
        self._store = store
        self._proxy_id = proxy_id
        self._views = views
        self._head: _Head | None = None
        self._missed: tuple[float, str] | None = None  # (Unix seconds, why): later changes are not recorded
        self._missed_count = 0  # looks
        self._last_event: tuple[int, bytes] | None = None  # (number, value) of the last recorded here
        self._lost: int | None = None  # the number of that event, when the store has it no more

    @property
    def number(self) -> int:
        """Of the newest version of the map on record, as far as this proxy knows; 0 if it does not."""
        return 0 if self._head is None or self._head.view is None else self._head.view.number

    def miss(self, at: float, reason: str) -> None:
        """A look was not recorded, or this proxy lost the lease to do so. The next commit makes an event of it.

        The gap begins at ``told_until``: what changed since then was seen by this look at the earliest.
        """
        if self._missed is None:
            self._missed = (at if self.told_until is None else self.told_until, reason)
        self._missed_count += 1
        self.missed_total += 1
        self._head = None  # whether the last commit happened, and in which file, is not known: read again

    def forgive(self, at: float) -> None:
        """Another proxy looked at ``at``, and has recorded what there was: no look before that was missed."""
        if self._missed is None or self._missed[0] <= at:
            self.told_until = at
            self._missed, self._missed_count = None, 0

    def start_over(self) -> None:
        """This proxy became the discoverer: others may have recorded, or the file is another. Read it again."""
        self._head = None

    async def record(
        self, observation: Observation, look: int, leadership: int, limits: TimelineLimits
    ) -> Advance:
        """Record one look. ``leadership`` is the revision of the discoverer's entry.

        Returns what was made of it; ``look`` counts this proxy's looks. Nothing is written if nothing is new. Raises
        StoreError, and ConflictError for DISCOVERER when another proxy is the discoverer by now. If cancelled, the
        commit may have happened: call ``miss``.
        """
        while True:
            head = self._head or await self._read_head()
            made = advance(head.timeline, observation, limits)
            events = self._own_events(head, observation)
            # That nobody looked is what a gap in the record looks like to the next look; here it is known better.
            events += [
                event
                for event in made.events
                if self._missed is None or event.kind is not EventKind.OBSERVATION_GAP
            ]
            operations, next_head = self._operations(head, made, events, observation, look)
            try:
                if operations:
                    revision = await self._store.commit(
                        operations,
                        [
                            Expect(DISCOVERER, leadership),
                            Expect(VIEW, head.view_revision),
                            Expect(TIMELINE, head.timeline_revision),
                            Expect(EVENT_HEAD, head.events_revision),
                        ],
                    )
                    next_head = _at(next_head, operations, revision)
                    self.records_total += 1
                    self.events_total += len(events)
                    for event in events:
                        log.info("cluster_event", kind=event.kind, message=event.message)
                    if next_head.view is not None:
                        self._views.remember(next_head.view)
                    if events:
                        self._last_event = _last_event(next_head.event_count, operations)
            except ConflictError as conflict:
                self._head = None
                if conflict.key == DISCOVERER:
                    raise
                continue  # an operator's act put an event on the timeline meanwhile
            self._head = next_head
            self._missed, self._missed_count = None, 0
            self._lost = None
            return made

    async def touch(self, at: float, leadership: int, *, is_last: bool = False) -> None:
        """Say that this proxy looked at ``at``, when nothing new was to be recorded for a while. Raises StoreError."""
        looked = Looked(at, self._proxy_id, is_last)
        await self._store.commit([Put(LOOKED, pack_looked(looked))], [Expect(DISCOVERER, leadership)])
        if self._head is not None:
            self._head = replace(
                self._head, timeline=replace(self._head.timeline, observed_at=at), looked=looked
            )

    async def _read_head(self) -> _Head:
        """The record as it is. Reads again if it changes between two reads."""
        await self._find_lost()
        while True:
            view_entry = await self._store.get(VIEW)
            timeline_entry = await self._store.get(TIMELINE)
            events_entry = await self._store.get(EVENT_HEAD)
            looked_entry = await self._store.get(LOOKED)
            view = (
                None
                if view_entry is None
                else await self._views.version(unpack_number(view_entry.value, "map's number"))
            )
            again = await self._store.get(VIEW)
            if (again and again.revision) == (view_entry and view_entry.revision):
                break
        if view_entry is not None and view is None:
            raise StoreRefusedError(
                f"the store {self._store.name} has lost the version of the map that it names"
            )
        looked = None if looked_entry is None else unpack_looked(looked_entry.value)
        timeline = Timeline() if timeline_entry is None else unpack_timeline(timeline_entry.value)
        return _Head(
            view=view,
            view_revision=ABSENT if view_entry is None else view_entry.revision,
            timeline=replace(
                timeline,
                view=EMPTY_VIEW if view is None else view.view,
                observed_at=0.0 if looked is None else looked.at,
            ),
            timeline_value=b"" if timeline_entry is None else timeline_entry.value,
            timeline_revision=ABSENT if timeline_entry is None else timeline_entry.revision,
            event_count=0 if events_entry is None else unpack_number(events_entry.value, "number of events"),
            events_revision=ABSENT if events_entry is None else events_entry.revision,
            looked=looked,
            replicas={
                record.node_id: record
                for entry in await self._store.read(*prefix_range(REPLICAS), limit=REPLICAS_MAX)
                for record in (unpack_replica(entry.value),)
            },
        )

    async def _find_lost(self) -> None:
        """Whether what this proxy recorded last is still there, or was once and is no longer kept for its age."""
        if self._last_event is None:
            return
        number, value = self._last_event
        entry = await self._store.get(numbered(EVENTS, number))
        if entry is None:
            kept = await self._store.read(*prefix_range(EVENTS), limit=1)
            is_lost = not kept or number_of(kept[0].key) < number
        else:
            is_lost = entry.value != value
        if is_lost:
            self._last_event, self._lost = None, number
            self._views.forget()  # numbers mean other versions now

    def _own_events(self, head: _Head, observation: Observation) -> list[Event]:
        """What the timeline must say of its own making: what was lost, who looks now, and what was not recorded."""
        events = []
        if self._lost is not None:
            events.append(
                Event(
                    EventKind.RECORD_LOST,
                    observation.at,
                    f"the store is not the one that {self._proxy_id} recorded in, up to event {self._lost}: its file "
                    f"was deleted or replaced, and {_count_text(head.event_count)} left",
                    observation.view.epoch,
                    evidence={
                        "from": None if head.looked is None else head.looked.at,  # None: from the beginning
                        "last_recorded": self._lost,
                        "last_left": head.event_count,
                    },
                )
            )
        looked = head.looked
        if looked is None or looked.by != self._proxy_id:
            evidence: dict[str, Plain] = {"discoverer": self._proxy_id}
            message = f"{self._proxy_id} looks at the cluster"
            if looked is not None:
                unseen = max(0.0, observation.at - looked.at)
                evidence |= {
                    "former": looked.by,
                    "former_said_so": looked.is_last,
                    "last_look_at": looked.at,
                    "unseen_seconds": round(unseen, 3),
                }
                ending = "which stopped" if looked.is_last else "which ended without saying so"
                message += f" in place of {looked.by}, {ending}; nobody looked for {unseen:.1f} s"
            events.append(
                Event(
                    EventKind.DISCOVERER_CHANGED,
                    observation.at,
                    message,
                    observation.view.epoch,
                    evidence=evidence,
                )
            )
        if self._missed is not None:
            since, reason = self._missed
            seconds = observation.at - since
            events.append(
                Event(
                    EventKind.OBSERVATION_GAP,
                    observation.at,
                    f"nothing was recorded for {seconds:.1f} s; changes of that time are seen as one: {reason}",
                    observation.view.epoch,
                    evidence={
                        "from": since,
                        "to": observation.at,
                        "looks_not_recorded": self._missed_count,
                        "reason": reason,
                    },
                )
            )
        return events

    def _operations(
        self, head: _Head, made: Advance, events: Sequence[Event], observation: Observation, look: int
    ) -> tuple[list[Operation], _Head]:
        """The commit, and the head after it but for the revisions."""
        operations: list[Operation] = []
        view = head.view
        if view is None or not view.view.says_the_same_as(observation.view):
            operations_of_view, view = self._new_version(head.view, observation, look)
            operations += operations_of_view
        for number, event in enumerate(events, start=head.event_count + 1):
            operations.append(
                Put(numbered(EVENTS, number), pack_event(renumbered(event, number, self._proxy_id)))
            )
        event_count = head.event_count + len(events)
        if events:
            operations.append(Put(EVENT_HEAD, pack_number(event_count)))
        operations += [Put(migration_key(record.id), pack_migration(record)) for record in made.migrations]
        replicas = replica_records(
            head.replicas, observation.view, observation.reports, made.timeline.lost, observation.at
        )
        operations += [
            Put(f"{REPLICAS}{node_id}", pack_replica(record))
            for node_id, record in replicas.items()
            if record is not head.replicas.get(node_id)
        ]
        operations += [Delete(f"{REPLICAS}{node_id}") for node_id in head.replicas.keys() - replicas]
        looked = Looked(observation.at, self._proxy_id, False)
        timeline_value = pack_timeline(made.timeline)
        if operations or timeline_value != head.timeline_value:
            operations.append(Put(TIMELINE, timeline_value))
            operations.append(Put(LOOKED, pack_looked(looked)))
        else:
            looked = head.looked or looked
        return operations, replace(
            head,
            view=view,
            timeline=made.timeline,
            timeline_value=timeline_value,
            event_count=event_count,
            looked=looked,
            replicas=replicas,
        )

    def _new_version(
        self, last: ViewRecord | None, observation: Observation, look: int
    ) -> tuple[list[Operation], ViewRecord]:
        number = 1 if last is None else last.number + 1
        # Later versions have later times, also when the clock was set back.
        at = observation.at if last is None else max(observation.at, last.at + MICROSECOND)
        has_same_nodes = last is not None and last.view.shards == observation.view.shards
        record = ViewRecord(
            number=number,
            at=at,
            writer=self._proxy_id,
            look=look,
            nodes_number=last.nodes_number if last is not None and has_same_nodes else number,
            view=replace(observation.view, revision=number),
        )
        operations: list[Operation] = [
            Put(VIEW, pack_number(number)),
            Put(numbered(VIEWS, number), pack_view(record)),
            *(Put(key, b"") for key in index_keys(number, at, record.view.epoch)),
        ]
        if not has_same_nodes:
            operations.append(Put(numbered(VIEW_NODES, number), pack_nodes(record.view.shards)))
        return operations, record


def _last_event(number: int, operations: Sequence[Operation]) -> tuple[int, bytes]:
    key = numbered(EVENTS, number)
    return number, next(put.value for put in operations if isinstance(put, Put) and put.key == key)


def _count_text(event_count: int) -> str:
    return f"events up to {event_count} are" if event_count else "none are"


def _at(head: _Head, operations: Sequence[Operation], revision: int) -> _Head:
    """The head after a commit got its revision."""
    written = {operation.key for operation in operations}
    return replace(
        head,
        view_revision=revision if VIEW in written else head.view_revision,
        timeline_revision=revision if TIMELINE in written else head.timeline_revision,
        events_revision=revision if EVENT_HEAD in written else head.events_revision,
    )
