"""The timeline: what changed in the cluster, as events with evidence, and each migration as one record.

Events are a function of what was recorded and what is seen now: nothing else makes them. So a proxy that starts after
a crash compares the cluster with the record, and what happened in between becomes events like any other; that nobody
looked meanwhile is an event of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from routing.cluster_nodes import Report
from routing.topology import EMPTY_VIEW, MigrationKind, TopologyView

SlotRange = tuple[int, int]  # inclusive
Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]  # what JSON and msgpack carry


class EventKind(Enum):
    """What happened. The values are what operators filter by."""

    CLUSTER_SEEN = "cluster_seen"  # the first view of this record
    CLUSTER_REPLACED = "cluster_replaced"  # no node in common with the record
    OBSERVATION_GAP = "observation_gap"  # nobody looked, or nothing could be recorded, for a while
    DISCOVERER_CHANGED = "discoverer_changed"
    NODE_ADDED = "node_added"
    NODE_REMOVED = "node_removed"
    NODE_ADDRESS_CHANGED = "node_address_changed"
    PRIMARY_LOST = "primary_lost"  # failing, or it does not answer
    PRIMARY_RECOVERED = "primary_recovered"
    REPLICA_LOST = "replica_lost"
    REPLICA_RECOVERED = "replica_recovered"
    REPLICA_REASSIGNED = "replica_reassigned"  # follows another primary
    FAILOVER = "failover"  # a replica took its primary's slots
    SLOTS_UNCOVERED = "slots_uncovered"
    SLOTS_COVERED = "slots_covered"
    MIGRATION_BEGUN = "migration_begun"
    MIGRATION_ADVANCED = "migration_advanced"  # slots changed hands, or an atomic job's state did
    MIGRATION_STUCK = "migration_stuck"
    MIGRATION_RESUMED = "migration_resumed"
    MIGRATION_COMPLETED = "migration_completed"
    MIGRATION_ABANDONED = "migration_abandoned"  # closed, and no slot changed hands
    ANOMALY_FOUND = "anomaly_found"
    ANOMALY_GONE = "anomaly_gone"
    MODE_CHANGED = "mode_changed"
    SETTINGS_RELOADED = "settings_reloaded"
    HOOK_FAILED = "hook_failed"


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the timeline. ``number`` and ``seen_by`` are given when it is recorded."""

    kind: EventKind
    at: float  # Unix seconds at which it was seen
    message: str  # one sentence for people
    epoch: int = 0  # the cluster's, when it was seen
    nodes: tuple[str, ...] = ()  # ids of the nodes concerned, the actor first
    shards: tuple[str, ...] = ()  # ids of the primaries concerned
    slot_ranges: tuple[SlotRange, ...] = ()
    migration: str = ""  # id of the migration's record
    evidence: Mapping[str, Plain] = field(default_factory=dict)
    seen_by: str = ""  # the proxy that recorded it
    number: int = 0  # 1, 2, 3 ... without a gap


class Stage(Enum):
    """Of an observed migration; those that Steadyread carries out itself have more."""

    MOVING = "moving"
    COMPLETED = "completed"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class StageEntry:
    """A stage that a migration entered."""

    stage: Stage
    at: float  # Unix seconds
    evidence: Mapping[str, Plain] = field(default_factory=dict)


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
    returned_slots: tuple[int, ...] = ()  # opened and closed without changing hands, ascending
    keys_left: Mapping[int, int] = field(default_factory=dict)  # open slot -> keys still at the source
    progressed_at: float = 0.0  # Unix seconds of the last sign of progress
    quiet_since: float | None = None  # no slot is open since then
    is_stuck: bool = False
    ended_at: float | None = None
    job: str = ""  # Valkey's name of an atomic migration
    job_state: str = ""

    @property
    def stage(self) -> Stage:
        return self.stages[-1].stage


@dataclass(frozen=True, slots=True)
class Observation:
    """What one round of discovery saw: all that events are made of."""

    at: float  # Unix seconds
    view: TopologyView
    reports: tuple[Report, ...]
    problems: Mapping[str, str] = field(default_factory=dict)  # node id -> why it did not answer
    keys_in_slot: Mapping[tuple[int, str], int] = field(default_factory=dict)  # (open slot, node id) -> keys


@dataclass(frozen=True, slots=True)
class TimelineLimits:
    """When a state of affairs becomes an event."""

    migration_quiet_seconds: float = 0.6  # without an open slot, then a migration has ended
    migration_stuck_seconds: float = 30.0  # an open slot without progress for this long is stuck
    gap_seconds: float = 5.0  # nobody looked for longer: an observation gap
    anomaly_seconds: float = 2.0  # a state that lasts this long is an anomaly; less is gossip on its way


@dataclass(frozen=True, slots=True)
class Timeline:
    """What must be known to make the next events. It is kept in the store beside the view it belongs to."""

    view: TopologyView = EMPTY_VIEW
    observed_at: float = 0.0  # Unix seconds of the last observation that was recorded
    lost: Mapping[str, str] = field(default_factory=dict)  # node id -> why it counts as lost
    migrations: tuple[MigrationRecord, ...] = ()  # those that have not ended
    migration_count: int = 0  # all that have ever begun: the last one's number
