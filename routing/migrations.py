"""Migrations that others carry out, each followed as one record from the first slot that opens to the last that closes.

A record is of one pair of primaries and one kind. ``redis-cli --cluster reshard`` opens and closes one slot after
another: that is one migration, because a record ends only when its pair has been quiet for a while. Slots that were
seen at the source and then at the target belong to it too, also when nobody saw them open. A failover is no
migration; when the source or the target of one fails over, the record goes on with the new primary.

Progress of a slot that moves by steps: it opened, or fewer of its keys are at the source; when nobody counts its keys,
any progress of its migration. Progress of an atomic job:
its state, the time of its last update or acknowledgement, or the bytes that are left changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from routing.cluster_nodes import FINISHED_STATES, SUCCESS_STATE, AtomicMigration, Report
from routing.events import Event, EventKind, Plain, SlotRange
from routing.names import Names, count, plain_ranges, slot_ranges, slots_text
from routing.topology import MigrationKind, TopologyView

Pair = tuple[str, str, MigrationKind]  # source's id, target's id, kind

SLOTS_DETAILED_MAX = 100  # stuck slots whose keys and open sides an event tells one by one


class Stage(Enum):
    """Of an observed migration; those that Steadyread carries out itself have more."""

    MOVING = "moving"
    COMPLETED = "completed"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class StageEntry:
    """A stage that a migration entered, or entered anew because its source or target failed over."""

    stage: Stage
    at: float  # Unix seconds
    evidence: Mapping[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """An atomic job as it was last seen."""

    name: str
    state: str
    message: str = ""  # why it failed
    updated_at: int | None = None  # Unix seconds by the node's clock
    remaining_bytes: int | None = None

    @property
    def is_finished(self) -> bool:
        return self.state.lower() in FINISHED_STATES


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """Slots on their way from one shard to another, from the first that opened to the last that closed."""

    id: str  # "m-" and a number that counts up
    kind: MigrationKind
    source_id: str
    target_id: str
    begun_at: float  # Unix seconds
    stages: tuple[StageEntry, ...]
    open_slots: tuple[int, ...] = ()  # ascending
    moved_slots: tuple[int, ...] = ()  # changed hands so far, ascending
    returned_slots: tuple[int, ...] = ()  # stayed at the source, or came back to it, ascending
    stuck_slots: tuple[int, ...] = ()  # of the open ones: without progress for too long, ascending
    keys_left: Mapping[int, int] = field(default_factory=dict)  # open slot -> keys still at the source
    slot_progressed_at: Mapping[int, float] = field(default_factory=dict)  # open slot of a stepwise one
    progressed_at: float = 0.0  # Unix seconds of the last sign of progress
    quiet_since: float | None = None  # no slot is open since then
    ended_at: float | None = None  # when it became quiet for good
    jobs: tuple[Job, ...] = ()  # of an atomic migration, in the order in which they were seen

    @property
    def stage(self) -> Stage:
        return self.stages[-1].stage

    @property
    def is_stuck(self) -> bool:
        return bool(self.stuck_slots)

    @property
    def pair(self) -> Pair:
        return self.source_id, self.target_id, self.kind


@dataclass(frozen=True, slots=True)
class MigrationsSeen:
    """What one look at the cluster says of slots on the move. All ids are of primaries as they are now."""

    at: float  # Unix seconds
    view: TopologyView
    reports: tuple[Report, ...]
    names: Names
    opened: Mapping[Pair, frozenset[int]]
    handed_over: Mapping[tuple[str, str], tuple[int, ...]]  # (old owner, new owner) -> slots; no failovers
    jobs: Mapping[
        Pair, tuple[AtomicMigration, ...]
    ]  # that run, and those that are known to have ended only now
    failovers: Mapping[str, str]  # old primary -> new one, of this look
    keys_in_slot: Mapping[tuple[int, str], int]

    def owner_id(self, slot: int) -> str | None:
        primary = self.view.primary_of(slot)
        return None if primary is None else primary.id


@dataclass(frozen=True, slots=True)
class MigrationsFollowed:
    """The records after a look."""

    active: tuple[MigrationRecord, ...]
    changed: tuple[MigrationRecord, ...]  # those that differ from before, ended ones among them
    events: tuple[Event, ...]
    begun_count: int  # all that have ever begun


def follow(
    records: Sequence[MigrationRecord],
    begun_count: int,
    seen: MigrationsSeen,
    *,
    quiet_seconds: float,
    stuck_seconds: float,
) -> MigrationsFollowed:
    """Take one look into the records. ``records`` are those that have not ended."""
    events: list[Event] = []
    active: dict[Pair, MigrationRecord] = {}
    for record in records:
        followed = _after_failovers(record, seen, events)
        active.setdefault(followed.pair, followed)
    moved = _by_pair(active, seen)
    before = {record.id: record for record in records}
    after: list[MigrationRecord] = []
    for pair in sorted({*active, *seen.opened, *moved, *seen.jobs}, key=_sorted_as):
        known = active.get(pair)
        if known is None:
            begun_count += 1
            known = _begun(f"m-{begun_count}", pair, seen)
        step = _Step(known, is_new=pair not in active, seen=seen)
        step.take(seen.opened.get(pair, frozenset()), moved.get(pair, ()), seen.jobs.get(pair, ()))
        step.judge(quiet_seconds, stuck_seconds)
        after.append(step.record)
        events += step.events
    return MigrationsFollowed(
        active=tuple(record for record in after if record.ended_at is None),
        changed=tuple(record for record in after if before.get(record.id) != record),
        events=tuple(events),
        begun_count=begun_count,
    )


def _sorted_as(pair: Pair) -> tuple[str, str, str]:
    return pair[0], pair[1], pair[2].value


def _begun(record_id: str, pair: Pair, seen: MigrationsSeen) -> MigrationRecord:
    source_id, target_id, kind = pair
    return MigrationRecord(
        id=record_id,
        kind=kind,
        source_id=source_id,
        target_id=target_id,
        begun_at=seen.at,
        stages=(StageEntry(Stage.MOVING, seen.at, {"epoch": seen.view.epoch}),),
        progressed_at=seen.at,
    )


def _after_failovers(record: MigrationRecord, seen: MigrationsSeen, events: list[Event]) -> MigrationRecord:
    """The record with the primaries that took its source's or its target's slots over."""
    for side in ("source", "target"):
        old_id = record.source_id if side == "source" else record.target_id
        new_id = seen.failovers.get(old_id)
        if new_id is None or new_id in (record.source_id, record.target_id):
            continue
        evidence: dict[str, Plain] = {"failover_of": side, "old_id": old_id, "new_id": new_id}
        stages = (*record.stages, StageEntry(Stage.MOVING, seen.at, evidence))
        if side == "source":
            record = replace(record, source_id=new_id, stages=stages)
        else:
            record = replace(record, target_id=new_id, stages=stages)
        events.append(
            _event(
                EventKind.MIGRATION_ADVANCED,
                record,
                seen,
                f"the migration from {seen.names[record.source_id]} to {seen.names[record.target_id]} goes on after"
                f" its {side} failed over: {seen.names[new_id]} took over from {seen.names[old_id]}",
                record.open_slots,
                evidence,
            )
        )
    return record


def _by_pair(active: Mapping[Pair, MigrationRecord], seen: MigrationsSeen) -> dict[Pair, tuple[int, ...]]:
    """Slots that changed hands: those of an atomic job belong to its record, all others moved by steps."""
    moved: dict[Pair, tuple[int, ...]] = {}
    for (source_id, target_id), slots in seen.handed_over.items():
        atomic = (source_id, target_id, MigrationKind.ATOMIC)
        record = active.get(atomic)
        of_jobs = set(_slots_of(seen.jobs.get(atomic, ())))
        if record is not None:
            of_jobs.update(record.open_slots, record.moved_slots)
        by_steps = tuple(slot for slot in slots if slot not in of_jobs)
        if by_steps:
            moved[source_id, target_id, MigrationKind.STEPWISE] = by_steps
        if len(by_steps) < len(slots):
            moved[atomic] = tuple(slot for slot in slots if slot in of_jobs)
    return moved


def _slots_of(jobs: Iterable[AtomicMigration]) -> Iterable[int]:
    return (slot for job in jobs for low, high in job.slot_ranges for slot in range(low, high + 1))


class _Step:
    """One record's way through one look."""

    def __init__(self, record: MigrationRecord, *, is_new: bool, seen: MigrationsSeen) -> None:
        self.record = record
        self.events: list[Event] = []
        self._is_new = is_new
        self._seen = seen
        self._source = seen.names[record.source_id]
        self._target = seen.names[record.target_id]

    def take(
        self, told_open: frozenset[int], handed_over: Iterable[int], jobs: Sequence[AtomicMigration]
    ) -> None:
        """What is open now, what changed hands, and what became of the jobs."""
        record, seen = self.record, self._seen
        came_back = seen.handed_over.get((record.target_id, record.source_id), ())
        was_open, was_moved = set(record.open_slots), set(record.moved_slots) - {*came_back}
        opened = {slot for slot in told_open if seen.owner_id(slot) != record.target_id}
        if self._is_half_heard():
            opened |= {slot for slot in was_open if seen.owner_id(slot) == record.source_id}
        all_jobs, jobs_changed, jobs_progressed = _jobs_after(record.jobs, jobs)
        closed = was_open - opened
        succeeded = _slots_of(job for job in jobs if job.state.lower() == SUCCESS_STATE)
        moved_now = {*handed_over, *succeeded} - was_moved
        moved_now |= {slot for slot in closed if seen.owner_id(slot) == record.target_id} - was_moved
        failed = set(_slots_of(job for job in jobs if job.state.lower() in FINISHED_STATES - {SUCCESS_STATE}))
        moved = (was_moved | moved_now) - opened
        went_back = {*record.moved_slots} - was_moved
        returned = ({*record.returned_slots} | closed | failed | went_back) - moved - opened
        keys_left = {
            slot: left
            for slot in sorted(opened)
            if (left := self._keys_at(slot, record.source_id, record.keys_left.get(slot))) is not None
        }
        progress: dict[int, float] = {}  # stays empty for an atomic one, whose jobs tell
        if record.kind is MigrationKind.STEPWISE:
            for slot in sorted(opened):
                since = record.slot_progressed_at.get(slot)
                shrank = keys_left.get(slot, 0) < record.keys_left.get(slot, 0)
                progress[slot] = seen.at if since is None or shrank else since
        progressed = bool(moved_now or went_back or opened != was_open or jobs_progressed)
        progressed = progressed or seen.at in progress.values()
        is_quiet = not opened and not any(job.state.lower() not in FINISHED_STATES for job in jobs)
        quiet_since = record.quiet_since if record.quiet_since is not None and not progressed else seen.at
        self.record = replace(
            record,
            open_slots=tuple(sorted(opened)),
            moved_slots=tuple(sorted(moved)),
            returned_slots=tuple(sorted(returned)),
            keys_left=keys_left,
            slot_progressed_at=progress,
            progressed_at=seen.at if progressed else record.progressed_at,
            quiet_since=quiet_since if is_quiet else None,
            jobs=all_jobs,
        )
        if self._is_new:
            self._say_begun(moved_now | set(returned))
        if moved_now:
            self._say_moved(sorted(moved_now))
        for job in jobs_changed:
            self._say_job(job)

    def judge(self, quiet_seconds: float, stuck_seconds: float) -> None:
        """Whether it is stuck, moves again, or has ended."""
        record, at = self.record, self._seen.at
        stuck = tuple(slot for slot in record.open_slots if at - self._progressed_at(slot) >= stuck_seconds)
        if newly := sorted({*stuck} - {*record.stuck_slots}):
            self._say_stuck(newly)
        elif record.stuck_slots and not stuck:
            self._say_resumed(record.stuck_slots)
        self.record = replace(record, stuck_slots=stuck)
        if record.quiet_since is not None and at - record.quiet_since >= quiet_seconds:
            self._end(record.quiet_since)

    def _is_half_heard(self) -> bool:
        """Whether a side that exists did not answer this time: then what is not told may still be open."""
        answered = {report.myself.node.id for report in self._seen.reports}
        missing = {self.record.source_id, self.record.target_id} - answered
        return bool(missing) and any(shard.primary.id in missing for shard in self._seen.view.shards)

    def _keys_at(self, slot: int, node_id: str, otherwise: int | None) -> int | None:
        return self._seen.keys_in_slot.get((slot, node_id), otherwise)

    def _progressed_at(self, slot: int) -> float:
        """Of the slot by itself if its keys are counted, so that one that was left behind shows; else of all."""
        record = self.record
        if slot in record.keys_left and slot in record.slot_progressed_at:
            return record.slot_progressed_at[slot]
        return record.progressed_at

    def _say_begun(self, closed_already: set[int]) -> None:
        record = self.record
        slots = sorted({*record.open_slots, *closed_already})
        what = "an atomic migration" if record.kind is MigrationKind.ATOMIC else "a migration"
        self._say(
            EventKind.MIGRATION_BEGUN,
            f"{slots_text(slots)}: {what} from {self._source} to {self._target} begins",
            slots,
            {
                "open_slots": plain_ranges(slot_ranges(record.open_slots)),
                "moved_slots": plain_ranges(slot_ranges(record.moved_slots)),
                "keys_left": sum(record.keys_left.values()) if record.keys_left else None,
                "jobs": [job.name for job in record.jobs],
            },
        )

    def _say_moved(self, slots: Sequence[int]) -> None:
        record = self.record
        self._say(
            EventKind.MIGRATION_ADVANCED,
            f"{slots_text(slots)} went from {self._source} to {self._target}:"
            f" {count(len(record.moved_slots), 'slot')} so far, {len(record.open_slots)} open",
            slots,
            {
                "moved_now": len(slots),
                "moved_count": len(record.moved_slots),
                "open_count": len(record.open_slots),
                "target_config_epoch": self._config_epoch(record.target_id),
            },
        )

    def _say_job(self, job: Job) -> None:
        why = f": {job.message}" if job.message else ""
        self._say(
            EventKind.MIGRATION_ADVANCED,
            f"the atomic migration from {self._source} to {self._target} is in state {job.state}{why}",
            self.record.open_slots or self.record.moved_slots or self.record.returned_slots,
            {
                "job": job.name,
                "state": job.state,
                "message": job.message,
                "updated_at": job.updated_at,
                "remaining_bytes": job.remaining_bytes,
            },
        )

    def _say_stuck(self, slots: Sequence[int]) -> None:
        record, at = self.record, self._seen.at
        migrating, importing = _open_sides(self._seen.reports, record)
        details: list[Plain] = [
            {
                "slot": slot,
                "keys_at_source": self._keys_at(slot, record.source_id, record.keys_left.get(slot)),
                "keys_at_target": self._keys_at(slot, record.target_id, None),
                "open_at_source": None if migrating is None else slot in migrating,
                "open_at_target": None if importing is None else slot in importing,
                "since": self._progressed_at(slot),
            }
            for slot in slots[:SLOTS_DETAILED_MAX]
        ]
        since = min(self._progressed_at(slot) for slot in slots)
        sides = [self._side(slots, record.source_id), self._side(slots, record.target_id)]
        half = ""
        if record.kind is MigrationKind.STEPWISE and migrating is not None and importing is not None:
            if not importing & {*slots}:
                half = f"; only {self._source} shows it open"
            elif not migrating & {*slots}:
                half = f"; only {self._target} shows it open"
        verb = "are" if len(slots) > 1 else "is"
        self._say(
            EventKind.MIGRATION_STUCK,
            f"{slots_text(slots)} {verb} stuck on the way from {sides[0]} to {sides[1]}:"
            f" no progress for {at - since:.0f} s{half}",
            slots,
            {
                "since": since,
                "slots": details,
                "stuck_count": len(slots),
                "jobs": [{"job": job.name, "state": job.state} for job in record.jobs if not job.is_finished],
            },
        )

    def _side(self, slots: Sequence[int], node_id: str) -> str:
        """``10.0.0.1:6379 (3 keys)``; without the keys when nobody counted them."""
        name = self._seen.names[node_id]
        counts = [self._seen.keys_in_slot.get((slot, node_id)) for slot in slots]
        known = [keys for keys in counts if keys is not None]
        return f"{name} ({count(sum(known), 'key')})" if len(known) == len(counts) else name

    def _say_resumed(self, slots: Sequence[int]) -> None:
        record = self.record
        still_open = sorted({*slots} & {*record.open_slots})
        how = "moves on" if still_open else "is open no more"
        if len(slots) > 1:
            how = "move on" if still_open else "are open no more"
        self._say(
            EventKind.MIGRATION_RESUMED,
            f"{slots_text(slots)}, stuck on the way from {self._source} to {self._target}, {how}",
            slots,
            {
                "still_open": plain_ranges(slot_ranges(still_open)),
                "keys_left": sum(record.keys_left.values()) if record.keys_left else None,
            },
        )

    def _end(self, ended_at: float) -> None:
        record = self.record
        stage = Stage.COMPLETED if record.moved_slots else Stage.ABANDONED
        seconds = ended_at - record.begun_at
        evidence: dict[str, Plain] = {
            "moved_slots": plain_ranges(slot_ranges(record.moved_slots)),
            "returned_slots": plain_ranges(slot_ranges(record.returned_slots)),
            "moved_count": len(record.moved_slots),
            "begun_at": record.begun_at,
            "ended_at": ended_at,
            "seconds": round(seconds, 3),
            "jobs": [
                {"job": job.name, "state": job.state, "message": job.message or None} for job in record.jobs
            ],
        }
        self.record = replace(
            record, ended_at=ended_at, stages=(*record.stages, StageEntry(stage, ended_at, evidence))
        )
        if stage is Stage.COMPLETED:
            stayed = f"; {count(len(record.returned_slots), 'slot')} stayed" if record.returned_slots else ""
            time = f"in {seconds:.1f} s" if seconds else "between two looks"
            self._say(
                EventKind.MIGRATION_COMPLETED,
                f"{slots_text(record.moved_slots)} went from {self._source} to {self._target} {time}{stayed}",
                sorted({*record.moved_slots, *record.returned_slots}),
                evidence,
            )
        else:
            why = next((f": {job.message}" for job in record.jobs if job.message), "")
            self._say(
                EventKind.MIGRATION_ABANDONED,
                f"the migration from {self._source} to {self._target} ended and moved nothing:"
                f" {slots_text(record.returned_slots)} stayed{why}",
                record.returned_slots,
                evidence,
            )

    def _config_epoch(self, node_id: str) -> int | None:
        return next((s.primary.config_epoch for s in self._seen.view.shards if s.primary.id == node_id), None)

    def _say(
        self, kind: EventKind, message: str, slots: Iterable[int], evidence: Mapping[str, Plain]
    ) -> None:
        self.events.append(_event(kind, self.record, self._seen, message, slots, evidence))


def _event(
    kind: EventKind,
    record: MigrationRecord,
    seen: MigrationsSeen,
    message: str,
    slots: Iterable[int],
    evidence: Mapping[str, Plain],
) -> Event:
    spans: tuple[SlotRange, ...] = slot_ranges(slots)
    return Event(
        kind=kind,
        at=seen.at,
        message=message,
        epoch=seen.view.epoch,
        nodes=(record.source_id, record.target_id),
        shards=(record.source_id, record.target_id),
        slot_ranges=spans,
        migration=record.id,
        evidence={
            "kind": record.kind.value,
            "source_id": record.source_id,
            "source": seen.names[record.source_id],
            "target_id": record.target_id,
            "target": seen.names[record.target_id],
            **evidence,
        },
    )


def _jobs_after(
    known: tuple[Job, ...], told: Sequence[AtomicMigration]
) -> tuple[tuple[Job, ...], list[Job], bool]:
    """(all jobs, those whose state changed since they were first seen, whether any made progress)."""
    jobs = {job.name: job for job in known}
    changed: list[Job] = []
    progressed = False
    for one in told:
        before = jobs.get(one.name)
        job = Job(one.name, one.state, one.message, one.updated_at, one.remaining_bytes)
        if job == before:
            continue
        jobs[one.name] = job
        progressed = True
        if (before is None and job.is_finished) or (before is not None and before.state != job.state):
            changed.append(job)
    return tuple(jobs.values()), changed, progressed


def _open_sides(
    reports: Iterable[Report], record: MigrationRecord
) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """The slots that the source shows as migrating and the target as importing; None for who did not answer."""
    migrating = importing = None
    for report in reports:
        if report.myself.node.id == record.source_id:
            migrating = frozenset(slot for slot, _ in report.myself.migrating)
        elif report.myself.node.id == record.target_id:
            importing = frozenset(slot for slot, _ in report.myself.importing)
    return migrating, importing
