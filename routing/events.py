"""Events: what happened in the cluster, one sentence with evidence each, and the filter by which people choose them.

An event never changes once it was recorded. Its evidence is plain, so that a store and JSON carry it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase

from routing.slot import SLOT_COUNT

SlotRange = tuple[int, int]  # inclusive
Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]  # what JSON and msgpack carry

PATTERN_CHARACTERS_MAX = 64  # fnmatch keeps some 30,000 patterns in memory, whatever their length
SHARD_PREFIX_MIN = 4  # characters of a node id that a filter needs; fewer fit too many nodes


class EventKind(Enum):
    """What happened. The values are what operators filter by."""

    CLUSTER_SEEN = "cluster_seen"  # the first view of this record
    CLUSTER_REPLACED = "cluster_replaced"  # no node in common with the record
    OBSERVATION_GAP = "observation_gap"  # nobody looked, or nothing could be recorded, for a while
    RECORD_LOST = "record_lost"  # the store is not the one that was written before
    DISCOVERER_CHANGED = "discoverer_changed"
    NODE_ADDED = "node_added"
    NODE_REMOVED = "node_removed"
    NODE_ADDRESS_CHANGED = "node_address_changed"
    PRIMARY_LOST = "primary_lost"  # failing, or it does not answer
    PRIMARY_RECOVERED = "primary_recovered"
    REPLICA_LOST = "replica_lost"
    REPLICA_RECOVERED = "replica_recovered"
    REPLICA_REASSIGNED = "replica_reassigned"  # follows another primary, or became one without a failover
    REPLICA_READABLE = "replica_readable"  # as one proxy has it: it proved what reads at it need
    REPLICA_UNREADABLE = "replica_unreadable"  # a readable one is taken back
    REPLICA_QUARANTINED = "replica_quarantined"  # a key of it differed from its primary's
    REPLICA_STAGE_CHANGED = "replica_stage_changed"  # any other step to being readable, or back
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


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events somebody wants. What is not said does not restrict."""

    kinds: tuple[
        str, ...
    ] = ()  # values of EventKind, or shell patterns such as ``migration_*``; one must fit
    shard: str = ""  # a node id or its beginning: an event fits that concerns such a node or shard
    slot: int | None = None

    def matches(self, event: Event) -> bool:
        """Whether the event is wanted."""
        if self.kinds and not any(fnmatchcase(event.kind.value, kind) for kind in self.kinds):
            return False
        if self.shard and not any(node.startswith(self.shard) for node in (*event.nodes, *event.shards)):
            return False
        return self.slot is None or any(low <= self.slot <= high for low, high in event.slot_ranges)


def parse_filter(kinds: Sequence[str] = (), shard: str = "", slot: str = "") -> EventFilter:
    """A filter from an operator's words. Each of ``kinds`` may hold several, with commas between them.

    The beginning of a node's id fits every node whose id begins so. Raises ValueError that names the word and
    what it may be.
    """
    words = [word for text in kinds for word in (part.strip() for part in text.split(",")) if word]
    known = [kind.value for kind in EventKind]
    for word in words:
        if len(word) > PATTERN_CHARACTERS_MAX:
            raise ValueError(f"a kind, or a pattern of kinds, has up to {PATTERN_CHARACTERS_MAX} characters")
        if not any(fnmatchcase(kind, word) for kind in known):
            raise ValueError(f"{word!r} is no kind of event, and fits none: {', '.join(known)}")
    shard = shard.strip().lower()
    if shard and (len(shard) < SHARD_PREFIX_MIN or set(shard) - set("0123456789abcdef")):
        raise ValueError(
            f"{shard!r} is not a node id, or at least the first {SHARD_PREFIX_MIN} digits of one"
        )
    slot = slot.strip()
    if slot and not (slot.isascii() and slot.isdecimal() and len(slot) <= 5 and int(slot) < SLOT_COUNT):
        raise ValueError(f"{slot!r} is not a slot: those go from 0 to {SLOT_COUNT - 1}")
    return EventFilter(tuple(words), shard, int(slot) if slot else None)
