"""The timeline: what changed in the cluster, as events with evidence, and each migration as one record.

Events are a function of what was recorded and what is seen now: nothing else makes them. So a proxy that starts after
a crash compares the cluster with the record, and what happened in between becomes events like any other; that nobody
looked meanwhile is an event of its own.

Who is a member. The view leaves nodes out that still belong to the cluster: a failed primary without slots, and the
replicas of one. A node counts as removed only when no report names it any more; until then it is *hidden*.

When a node is lost. When it is flagged as failing; or its peers' links to it are down, or it does not answer us, for
longer than the limits say. A node that is none of these is recovered.

Invariants: a node that is lost recovers or is removed before it is lost again; slots that are uncovered are covered
before they are uncovered again; a migration that began ends once; each difference between two views makes an event,
epochs and flags that only hint at one aside; equal views make none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from operator import is_, itemgetter, ne

from routing.anomalies import AnomaliesTracked, Anomaly, AnomalyLimits, AnomalyState, find_anomalies, track
from routing.cluster_nodes import FINISHED_STATES, AtomicMigration, NodeLine, Replication, Report
from routing.events import Event, EventFilter, EventKind, Plain, SlotRange
from routing.migrations import (
    Job,
    MigrationRecord,
    MigrationsFollowed,
    MigrationsSeen,
    Pair,
    Stage,
    StageEntry,
    follow,
)
from routing.names import Names, count, slot_ranges, slots_text
from routing.observation import Observation
from routing.slot import SLOT_COUNT
from routing.topology import EMPTY_VIEW, UNOWNED, MigrationKind, Node, Role, TopologyView

__all__ = [
    "Advance",
    "Anomaly",
    "AnomalyLimits",
    "AnomalyState",
    "Event",
    "EventFilter",
    "EventKind",
    "Job",
    "Lost",
    "MigrationRecord",
    "Observation",
    "Plain",
    "SlotRange",
    "Stage",
    "StageEntry",
    "Timeline",
    "TimelineLimits",
    "advance",
    "current_anomalies",
]


@dataclass(frozen=True, slots=True)
class TimelineLimits:
    """When a state of affairs becomes an event."""

    migration_quiet_seconds: float = 0.6  # without an open slot, then a migration has ended
    migration_stuck_seconds: float = 30.0  # an open slot without progress for this long is stuck
    gap_seconds: float = 5.0  # nobody looked for longer: an observation gap
    anomaly_seconds: float = 2.0  # a state that lasts this long is an anomaly; less is gossip on its way
    unlinked_seconds: float = 0.4  # peers without a link to a node; less is a link that is being set up anew
    silent_seconds: float = 3.0  # a node that its peers reach and we do not; less is a slow command
    anomalies: AnomalyLimits = field(default_factory=AnomalyLimits)


@dataclass(frozen=True, slots=True)
class Lost:
    """A node that counts as lost."""

    why: str
    since: float  # Unix seconds
    is_silent: bool = False  # its peers reach it, so only its own answer shows that it is back


@dataclass(frozen=True, slots=True)
class Timeline:
    """What must be known to make the next events. It is kept in the store beside the view it belongs to."""

    view: TopologyView = EMPTY_VIEW
    observed_at: float = 0.0  # Unix seconds of the last observation that was recorded
    begun_at: float = 0.0  # Unix seconds of the first
    lost: Mapping[str, Lost] = field(default_factory=dict)  # node id -> why it counts as lost
    doubted: Mapping[str, float] = field(default_factory=dict)  # node id -> unlinked or silent since
    hidden: tuple[Node, ...] = ()  # members that the view leaves out, by id
    successors: Mapping[str, str] = field(default_factory=dict)  # id -> who took its slots by failover
    migrations: tuple[MigrationRecord, ...] = ()  # those that have not ended
    migration_count: int = 0  # all that have ever begun: the last one's number
    newest_jobs: Mapping[str, str] = field(
        default_factory=dict
    )  # node id -> name of its last ended job known
    anomalies: tuple[AnomalyState, ...] = ()
    # Not kept in the store: the last look's, by which the next one sees that there is nothing new to judge.
    reports: tuple[Report, ...] = field(default=(), compare=False)
    found: tuple[Anomaly, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Advance:
    """What one observation made of a timeline."""

    timeline: Timeline
    events: tuple[Event, ...]
    migrations: tuple[MigrationRecord, ...]  # those that changed, ended ones among them
    anomalies: tuple[Anomaly, ...]  # that count now


def advance(timeline: Timeline, observation: Observation, limits: TimelineLimits) -> Advance:
    """The timeline after ``observation``, with the events that lead there. Pure.

    An observation without any shard changes nothing: no node has answered yet.
    """
    if not observation.view.shards:
        return Advance(replace(timeline, observed_at=observation.at), (), (), current_anomalies(timeline))
    look = _Look(timeline, observation, limits)
    look.see_gap()
    look.see_cluster()
    look.see_members()
    look.see_addresses()
    lost = look.see_lost()
    look.see_owners()
    look.see_roles()
    look.see_migrations()
    look.say_recovered(lost)
    return look.concluded()


def current_anomalies(timeline: Timeline) -> tuple[Anomaly, ...]:
    """Those that count now."""
    return tuple(state.anomaly for state in timeline.anomalies if state.is_found)


class _Look:
    """One observation on its way to events. Its methods run in the order in which ``advance`` calls them."""

    def __init__(self, timeline: Timeline, observation: Observation, limits: TimelineLimits) -> None:
        self.timeline = timeline
        self.old = timeline.view
        self.new = observation.view
        self.observation = observation
        self.limits = limits
        self.events: list[Event] = []
        self.is_same_view = self.new is self.old
        self.has_same_reports = _are_same(timeline.reports, observation.reports)
        self.old_nodes = _by_id(self.old.nodes())
        self.new_nodes = self.old_nodes if self.is_same_view else _by_id(self.new.nodes())
        self.names = Names(timeline.hidden, self.old.nodes(), () if self.is_same_view else self.new.nodes())
        self.hidden: dict[str, Node] = {}
        self.is_first = not self.old.shards
        self.is_replaced = False
        self.lost: dict[str, Lost] = dict(timeline.lost)
        self.doubted: dict[str, float] = {}
        self.successors = dict(timeline.successors)
        self.handed_over: dict[tuple[str, str], tuple[int, ...]] = {}
        self.failovers: dict[str, str] = {}  # of this look: old primary -> new
        self.migrations: MigrationsFollowed | None = None
        self.newest_jobs = dict(timeline.newest_jobs)

    # -- the whole cluster

    def see_gap(self) -> None:
        seconds = self.observation.at - self.timeline.observed_at
        if self.is_first or seconds <= self.limits.gap_seconds:
            return
        self._say(
            EventKind.OBSERVATION_GAP,
            f"nobody looked at the cluster for {seconds:.1f} s, so what changed meanwhile is seen as one change",
            evidence={
                "from": self.timeline.observed_at,
                "to": self.observation.at,
                "seconds": round(seconds, 3),
            },
        )

    def see_cluster(self) -> None:
        if self.is_same_view:
            return
        members = {*self.old_nodes, *(node.id for node in self.timeline.hidden)}
        self.is_replaced = bool(members) and members.isdisjoint(self.new_nodes)
        if not self.is_first and not self.is_replaced:
            return
        primaries = [shard.primary.id for shard in self.new.shards]
        facts: dict[str, Plain] = {
            "primaries": len(primaries),
            "replicas": len(self.new_nodes) - len(primaries),
            "uncovered_slots": self.new.unowned_count,
            "config_epoch": self.new.epoch,
        }
        size = f"{len(primaries)} {'primary' if len(primaries) == 1 else 'primaries'}"
        size += f" and {count(len(self.new_nodes) - len(primaries), 'replica')} at epoch {self.new.epoch}"
        if self.is_first:
            self._say(
                EventKind.CLUSTER_SEEN,
                f"the cluster is seen for the first time: {size}",
                [*self.new_nodes],
                primaries,
                evidence=facts,
            )
        else:
            self._say(
                EventKind.CLUSTER_REPLACED,
                f"another cluster answers: {size}, and none of the {len(members)} nodes known before",
                [*self.new_nodes],
                primaries,
                evidence={**facts, "former_nodes": [*sorted(members)]},
            )
            self.lost = {}
            self.successors = {}
            self.newest_jobs = {}

    # -- nodes

    def see_members(self) -> None:
        """Who came, who left, and who is hidden: named by reports but not in the view."""
        if self.is_same_view and not self.timeline.hidden:
            return
        if self.is_same_view and self.has_same_reports:
            self.hidden = _by_id(self.timeline.hidden)
            return
        told = _lines_beyond(self.new_nodes, self.observation.reports)
        self.hidden = {node_id: line.node for node_id, line in told.items()}
        if self.is_first or self.is_replaced:
            return
        were = {**_by_id(self.timeline.hidden), **self.old_nodes}
        are = {**self.hidden, **self.new_nodes}
        for node_id, node in are.items():
            if node_id not in were:
                self._say_added(node)
        for node_id, node in were.items():
            if node_id not in are:
                self._say_removed(node)

    def _say_added(self, node: Node) -> None:
        role = (
            "a primary" if node.role is Role.PRIMARY else f"a replica of {self.names[node.primary_id or '']}"
        )
        self._say(
            EventKind.NODE_ADDED,
            f"{node.address} joined the cluster as {role}",
            [node.id],
            [node.primary_id or node.id],
            self._ranges_of(self.new, node.id),
            _node_facts(node),
        )

    def _say_removed(self, node: Node) -> None:
        was_lost = self.lost.pop(node.id, None)
        self.successors.pop(node.id, None)
        self.newest_jobs.pop(node.id, None)
        role = (
            "a primary" if node.role is Role.PRIMARY else f"a replica of {self.names[node.primary_id or '']}"
        )
        self._say(
            EventKind.NODE_REMOVED,
            f"{node.address} left the cluster; it was {role}{' and lost' if was_lost else ''}",
            [node.id],
            [node.primary_id or node.id],
            self._ranges_of(self.old, node.id),
            {**_node_facts(node), "lost_because": was_lost.why if was_lost else None},
        )

    def see_addresses(self) -> None:
        if self.is_same_view:
            return
        for node_id, node in self.new_nodes.items():
            before = self.old_nodes.get(node_id)
            if before is None or (before.address == node.address and before.hostname == node.hostname):
                continue
            was, now = str(before.address), str(node.address)
            if was == now:
                message = (
                    f"{now} has the host name {node.hostname or 'none'}, and had {before.hostname or 'none'}"
                )
            else:
                message = f"{was} is reached at {now} now"
            self._say(
                EventKind.NODE_ADDRESS_CHANGED,
                message,
                [node_id],
                [node.primary_id or node_id],
                evidence={
                    "old_address": was,
                    "new_address": now,
                    "old_hostname": before.hostname,
                    "new_hostname": node.hostname,
                },
            )

    def see_lost(self) -> list[Node]:
        """Says who is lost; gives those that were and are not any more."""
        problems, at = self.observation.problems, self.observation.at
        was = self.timeline
        if self.is_same_view and not (problems or was.doubted or was.lost or self.hidden):
            return []
        recovered: list[Node] = []
        answered = {report.myself.node.id for report in self.observation.reports}
        for node in chain(self.new_nodes.values(), self.hidden.values()):
            problem = problems.get(node.id)
            if not node.is_failing and node.is_linked and problem is None:
                is_asked = node.id in answered  # in a large cluster, nodes are asked in turn
                if node.id in self.lost:
                    if is_asked or not self.lost[node.id].is_silent:
                        recovered.append(node)
                elif not is_asked and node.id in was.doubted:
                    self.doubted[node.id] = was.doubted[node.id]
                continue
            if not (node.is_failing or node.id in self.lost):
                since = was.doubted.get(node.id, at)
                self.doubted[node.id] = since
                needed = self.limits.silent_seconds if node.is_linked else self.limits.unlinked_seconds
                if at - since < needed:
                    continue
            if node.id not in self.lost:
                self._say_lost(node, problem)
                self.doubted.pop(node.id, None)
        return recovered

    def _say_lost(self, node: Node, problem: str | None) -> None:
        flagged_by = [
            report.myself.node.id
            for report in self.observation.reports
            if any(line.node.id == node.id and line.node.is_failing for line in report.others)
        ]
        if node.is_failing:
            why = f"{count(len(flagged_by), 'node')} of {len(self.observation.reports)} asked flag it as failing"
        elif not node.is_linked:
            why = "its peers have no link to it"
        else:
            why = "it does not answer"
        if problem:
            why += f" ({problem})"
        before = self.old_nodes.get(node.id, node)
        spans = self._ranges_of(self.old if node.id in self.old_nodes else self.new, node.id)
        is_primary = before.role is Role.PRIMARY
        slots = sum(high - low + 1 for low, high in spans)
        what = (
            f"primary {node.address} with {count(slots, 'slot')}" if is_primary else f"replica {node.address}"
        )
        if not is_primary:
            what += f" of {self.names[before.primary_id or '']}"
        self.lost[node.id] = Lost(why, self.observation.at, not node.is_failing and node.is_linked)
        self._say(
            EventKind.PRIMARY_LOST if is_primary else EventKind.REPLICA_LOST,
            f"{what} is lost: {why}",
            [node.id],
            [before.primary_id or node.id],
            spans,
            {
                **_node_facts(before),
                "is_failing": node.is_failing,
                "is_linked": node.is_linked,
                "problem": problem,
                "flagged_by": [*flagged_by],
                "asked": len(self.observation.reports),
            },
        )

    def say_recovered(self, nodes: Sequence[Node]) -> None:
        """After roles and slots, so that it says as what the node is back."""
        for node in nodes:
            lost = self.lost.pop(node.id)
            is_primary = node.role is Role.PRIMARY
            role = "primary" if is_primary else "replica"
            seconds = self.observation.at - lost.since
            of = "" if is_primary else f" of {self.names[node.primary_id or '']}"
            self._say(
                EventKind.PRIMARY_RECOVERED if is_primary else EventKind.REPLICA_RECOVERED,
                f"{node.address} is back as {role}{of} after {seconds:.1f} s",
                [node.id],
                [node.primary_id or node.id],
                self._ranges_of(self.new, node.id),
                {**_node_facts(node), "lost_because": lost.why, "seconds": round(seconds, 3)},
            )

    # -- slots

    def see_owners(self) -> None:
        """Slots whose owner changed: failovers, uncovered and covered ones, and what migrations are made of."""
        if self.is_same_view:
            return
        uncovered: list[int] = []
        covered: dict[str, list[int]] = {}
        passed: dict[tuple[str, str], list[int]] = {}
        for (before, after), slots in _owner_changes(self.old, self.new).items():
            if after is None:
                if not self.is_first:
                    uncovered += slots
            elif before is None:
                covered[after] = slots
            elif not self.is_replaced:
                passed[before, after] = slots
        if self.is_first:
            covered = {}
            uncovered = [slot for slot, owner in enumerate(self.new.shard_of_slot) if owner == UNOWNED]
        for (before, after), slots in sorted(passed.items()):
            if self._is_failover(before, after):
                self._say_failover(before, after, slots)
            else:
                self.handed_over[before, after] = tuple(slots)
        for _, after in passed:
            self.successors.pop(after, None)  # it owns slots anew
        self.successors.update(self.failovers)
        if uncovered:
            self._say_uncovered(sorted(uncovered))
        for after, slots in sorted(covered.items()):
            self._say(
                EventKind.SLOTS_COVERED,
                f"{self.names[after]} serves {slots_text(slots)}, which nobody served",
                [after],
                [after],
                slot_ranges(slots),
                {"count": len(slots), "still_uncovered": self.new.unowned_count},
            )

    def _is_failover(self, old_id: str, new_id: str) -> bool:
        """Whether ``new_id`` followed ``old_id``, or it is the other way round by now."""
        taker, loser = self.old_nodes.get(new_id), self.new_nodes.get(old_id) or self.hidden.get(old_id)
        return (
            (taker is not None and taker.role is Role.REPLICA and taker.primary_id == old_id)
            or (loser is not None and loser.role is Role.REPLICA and loser.primary_id == new_id)
            or self.timeline.successors.get(old_id) == new_id
        )

    def _say_failover(self, old_id: str, new_id: str, slots: Sequence[int]) -> None:
        self.failovers[old_id] = new_id
        old, new = self.old_nodes[old_id], self.new_nodes[new_id]
        loser = self.new_nodes.get(old_id) or self.hidden.get(old_id)
        has_failed = (
            old.is_failing
            or old_id in self.lost
            or old_id in self.observation.problems
            or loser is None
            or loser.is_failing
        )
        replication = self._replication_of(new_id)
        seen_by = [
            report.myself.node.id
            for report in self.observation.reports
            if any(
                line.node.id == new_id and line.node.role is Role.PRIMARY
                for line in (report.myself, *report.others)
            )
        ]
        before, after = old.config_epoch, new.config_epoch
        why = "which failed" if has_failed else "which lives: it was asked to"
        self._say(
            EventKind.FAILOVER,
            f"{new.address} took {count(len(slots), 'slot')} over from {old.address}, {why}"
            f" (failover, epoch {before} -> {after})",
            [new_id, old_id],
            [new_id, old_id],
            slot_ranges(slots),
            {
                "old_id": old_id,
                "old": str(old.address),
                "new_id": new_id,
                "new": str(new.address),
                "old_config_epoch": before,
                "new_config_epoch": after,
                "epoch_before": self.old.epoch,
                "epoch_after": self.new.epoch,
                "slot_count": len(slots),
                "old_failed": has_failed,
                "offset": replication.offset if replication else None,
                "replid": replication.replid if replication else None,
                "replid2": replication.replid2 if replication else None,
                "second_offset": replication.second_offset if replication else None,
                "seen_by": [*seen_by],
                "asked": len(self.observation.reports),
            },
        )

    def _replication_of(self, node_id: str) -> Replication | None:
        return next(
            (report.replication for report in self.observation.reports if report.myself.node.id == node_id),
            None,
        )

    def _say_uncovered(self, slots: Sequence[int]) -> None:
        owners = {primary.id: None for slot in slots if (primary := self.old.primary_of(slot)) is not None}
        whose = f"; {self.names.of([*owners])} had them" if owners else ""
        self._say(
            EventKind.SLOTS_UNCOVERED,
            f"no primary serves {slots_text(slots)}{whose}",
            [*owners],
            [*owners],
            slot_ranges(slots),
            {"count": len(slots), "uncovered": self.new.unowned_count, "former_owners": [*owners]},
        )

    # -- roles

    def see_roles(self) -> None:
        """Replicas that follow another primary, and roles that changed by no failover."""
        if self.is_same_view or self.is_first or self.is_replaced:
            return
        for node_id, node in self.new_nodes.items():
            before = self.old_nodes.get(node_id)
            if before is None or (before.role is node.role and before.primary_id == node.primary_id):
                continue
            was, now = before.primary_id, node.primary_id
            if now is not None and self.successors.get(was or node_id) == now:
                continue  # it follows who took over from its primary, or from itself
            if now is None and was is not None and self.successors.get(was) == node_id:
                continue  # it took over
            old = f"it followed {self.names[was]}" if was else "it was a primary"
            new = f"follows {self.names[now]}" if now else "is a primary"
            self._say(
                EventKind.REPLICA_REASSIGNED,
                f"{node.address} {new} now; {old}",
                [node_id, *(other for other in (now, was) if other)],
                [other for other in (now or node_id, was or node_id) if other],
                evidence={
                    "old_primary_id": was,
                    "new_primary_id": now,
                    "old_role": before.role.value,
                    "new_role": node.role.value,
                },
            )

    # -- migrations

    def see_migrations(self) -> None:
        records = self.timeline.migrations
        jobs = self._jobs()
        if not (records or self.new.migrations or self.handed_over or jobs):
            return
        opened: dict[Pair, set[int]] = {}
        for migration in self.new.migrations:
            source, target = self._heir(migration.source_id), self._heir(migration.target_id)
            if source != target:
                opened.setdefault((source, target, migration.kind), set()).update(migration.slots)
        seen = MigrationsSeen(
            at=self.observation.at,
            view=self.new,
            reports=self.observation.reports,
            names=self.names,
            opened={pair: frozenset(slots) for pair, slots in opened.items()},
            handed_over=self.handed_over,
            jobs=jobs,
            failovers=self.failovers,
            keys_in_slot=self.observation.keys_in_slot,
        )
        self.migrations = follow(
            records,
            self.timeline.migration_count,
            seen,
            quiet_seconds=self.limits.migration_quiet_seconds,
            stuck_seconds=self.limits.migration_stuck_seconds,
        )
        self.events += self.migrations.events

    def _heir(self, node_id: str) -> str:
        """The primary that has taken over from ``node_id``: open slots name nodes as they were."""
        for _ in range(len(self.successors)):
            if node_id not in self.successors:
                break
            node_id = self.successors[node_id]
        return node_id

    def _jobs(self) -> dict[Pair, tuple[AtomicMigration, ...]]:
        """Atomic jobs that run, and those that ended since the last look; the source's word before the target's."""
        followed = {job.name for record in self.timeline.migrations for job in record.jobs}
        unfinished = {
            job.name for record in self.timeline.migrations for job in record.jobs if not job.is_finished
        }
        told: dict[str, tuple[bool, AtomicMigration]] = {}  # name -> (the source's word, job)
        for report in self.observation.reports:
            node_id = report.myself.node.id
            for job in chain(report.atomic_migrations, self._ended_jobs(report, unfinished)):
                is_source = node_id == job.source_id
                if job.name in followed and not is_source and job.state.lower() not in FINISHED_STATES:
                    continue  # its two ends name their states differently; what is followed is the source's
                if job.name not in told or (is_source and not told[job.name][0]):
                    told[job.name] = (is_source, job)
        by_pair: dict[Pair, list[AtomicMigration]] = {}
        for _, job in told.values():
            pair = (self._heir(job.source_id), self._heir(job.target_id), MigrationKind.ATOMIC)
            if pair[0] != pair[1]:
                by_pair.setdefault(pair, []).append(job)
        return {pair: tuple(jobs) for pair, jobs in by_pair.items()}

    def _ended_jobs(self, report: Report, unfinished: set[str]) -> list[AtomicMigration]:
        """Of one report: those that are followed, and those that began and ended between two looks.

        The latter by the source's word alone, because both ends list a job and are not always asked together.
        """
        if not report.finished_migrations:
            return []
        node_id = report.myself.node.id
        last_known = self.timeline.newest_jobs.get(node_id)
        self.newest_jobs[node_id] = report.finished_migrations[0].name
        ended: list[AtomicMigration] = []
        is_new = True  # the newest come first
        for job in report.finished_migrations:
            is_new = is_new and job.name != last_known
            if job.name in unfinished:
                ended.append(job)
            elif is_new and job.source_id == node_id and not self.is_first and not self.is_replaced:
                # By the node's clock: when that is behind, a job of the first seconds is taken for an older one.
                known_since = int(self.timeline.begun_at) if last_known is None else 0
                if job.created_at is None or job.created_at >= known_since:
                    ended.append(job)
        return ended

    # -- the end

    def concluded(self) -> Advance:
        at = self.observation.at
        followed = self.migrations
        migrations = self.timeline.migrations if followed is None else followed.active
        found = self._find_anomalies(migrations)
        tracked = self._track(found)
        self.events += tracked.events
        timeline = replace(
            self.timeline,
            view=self.new,
            observed_at=at,
            begun_at=at if self.is_first or self.is_replaced else self.timeline.begun_at,
            lost=self.lost,
            doubted=self.doubted,
            hidden=tuple(self.hidden[node_id] for node_id in sorted(self.hidden)),
            successors=self.successors,
            migrations=migrations,
            migration_count=self.timeline.migration_count if followed is None else followed.begun_count,
            newest_jobs=self.newest_jobs,
            anomalies=tracked.states,
            reports=self.observation.reports,
            found=found,
        )
        changed = () if followed is None else followed.changed
        return Advance(timeline, tuple(self.events), changed, tracked.current)

    def _find_anomalies(self, migrations: Sequence[MigrationRecord]) -> tuple[Anomaly, ...]:
        """Those of the last look, when what they are judged by is the same."""
        last = self.timeline.found
        if last is not None and self.is_same_view and self.has_same_reports:
            if _stuck_in(migrations) == _stuck_in(self.timeline.migrations):
                return last
        return find_anomalies(self.observation, migrations, self.limits.anomalies)

    def _track(self, found: tuple[Anomaly, ...]) -> AnomaliesTracked:
        fresh = tuple(replace(anomaly, since=self.observation.at) for anomaly in found)
        return track(
            self.timeline.anomalies, fresh, self.observation.at, self.new.epoch, self.limits.anomaly_seconds
        )

    # -- help

    def _ranges_of(self, view: TopologyView, node_id: str) -> tuple[SlotRange, ...]:
        index = next((i for i, shard in enumerate(view.shards) if shard.primary.id == node_id), None)
        return () if index is None else view.slot_ranges_of(index)

    def _say(
        self,
        kind: EventKind,
        message: str,
        nodes: Sequence[str] = (),
        shards: Sequence[str] = (),
        spans: tuple[SlotRange, ...] = (),
        evidence: Mapping[str, Plain] | None = None,
    ) -> None:
        self.events.append(
            Event(
                kind=kind,
                at=self.observation.at,
                message=message,
                epoch=self.new.epoch,
                nodes=tuple(dict.fromkeys(nodes)),
                shards=tuple(dict.fromkeys(shards)),
                slot_ranges=spans,
                evidence=evidence or {},
            )
        )


def _by_id(nodes: Iterable[Node]) -> dict[str, Node]:
    return {node.id: node for node in nodes}


def _lines_beyond(known: Mapping[str, object], reports: Iterable[Report]) -> dict[str, NodeLine]:
    """Of nodes that are not ``known``, what reports say: a node's own line when it answered, else any.

    One that is named by nobody and names nobody has left: it was reset, and still answers.
    """
    lines: dict[str, NodeLine] = {}
    for report in reports:
        for line in report.others:
            if line.node.id not in known:
                last = lines.get(line.node.id)
                if last is None or (line.node.is_failing and not last.node.is_failing):
                    lines[line.node.id] = line
    for report in reports:
        node_id = report.myself.node.id
        if node_id not in known and (node_id in lines or report.others):
            lines[node_id] = report.myself
    return lines


def _owner_changes(old: TopologyView, new: TopologyView) -> dict[tuple[str | None, str | None], list[int]]:
    """(old owner's id, new one's) -> slots, ascending; None for nobody."""
    old_ids = [*(shard.primary.id for shard in old.shards), None]  # the last is UNOWNED's
    new_ids = [*(shard.primary.id for shard in new.shards), None]
    if old_ids == new_ids and old.shard_of_slot == new.shard_of_slot:
        return {}
    before = itemgetter(*old.shard_of_slot)(old_ids)  # slot -> id; at the speed of C, as the comparison below
    after = itemgetter(*new.shard_of_slot)(new_ids)
    changes: dict[tuple[str | None, str | None], list[int]] = {}
    for slot in compress(range(SLOT_COUNT), map(ne, before, after)):
        changes.setdefault((before[slot], after[slot]), []).append(slot)
    return changes


def _are_same(old: Sequence[Report], new: Sequence[Report]) -> bool:
    """Whether reports are surely the same: by identity of their lines, which costs next to nothing."""
    return len(old) == len(new) and all(
        one is two
        or (
            one.myself is two.myself
            and len(one.others) == len(two.others)
            and all(map(is_, one.others, two.others))
            and one.key_count == two.key_count
            and one.used_bytes == two.used_bytes
        )
        for one, two in zip(old, new, strict=True)
    )


def _stuck_in(migrations: Sequence[MigrationRecord]) -> list[tuple[Pair, tuple[int, ...]]]:
    return [(record.pair, record.stuck_slots) for record in migrations]


def _node_facts(node: Node) -> dict[str, Plain]:
    return {
        "address": str(node.address),
        "hostname": node.hostname,
        "role": node.role.value,
        "primary_id": node.primary_id,
        "config_epoch": node.config_epoch,
    }
