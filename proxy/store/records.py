"""What the values of a store mean: one encoding for each kind of record, and the keys under which they are kept.

A value is msgpack: [version of its encoding, content]. An older version is read by bringing it forward; a newer one is
refused, because what it says beyond our knowledge could not be kept.

    view                      the number of the newest version of the map
    views/N                   version N of the map: slots, migrations, and which nodes part it goes with
    view-nodes/N              the nodes of version N and of later ones, until they change
    views-by-time/MICROS/N    version N was recorded then; the index of "as of a time"
    views-by-epoch/EPOCH/N    the same for "as of an epoch"
    timeline                  what is needed to make the next events; written with each version and each event
    events                    the number of the newest event
    events/N                  event N
    migrations/N              migration m-N and its stages
    replicas/NODE             the state of one replica
    snapshots                 the newest id of a snapshot; it only grows
    snapshots/ID              one snapshot
    members/ID                a proxy that takes part in snapshots; hangs on a lease
    member-acks/ID/PROXY      how far a member is with snapshot ID; hangs on the member's lease
    mode                      the routing mode
    token-secret              what session tokens are signed with, where neither a setting nor a password gives it
    audit                     the number and hash of the newest audit record
    audit/N                   audit record N
    discoverer                who looks at the cluster for all; hangs on a lease
    looked                    when the discoverer last looked
    wanted                    a proxy wants the discoverer to look now
    proxies/ID                a proxy that runs; hangs on a lease
    hooks/NAME                how far a hook has come
    dead-letters/NAME/N       what a hook could not deliver

Numbers in keys have 16 digits, so that the order of the keys is the order of the numbers.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, repeat
from typing import Any, Final
from zlib import compress, decompressobj
from zlib import error as ZlibError

import msgpack

from proxy.store.interface import StoreRefusedError
from routing.anomalies import Anomaly, AnomalyKind, AnomalyState
from routing.audit import AuditHead, AuditRecord, Damaged, facts_of_record, record_of_facts
from routing.events import Event, EventKind
from routing.levels import Level
from routing.migrations import Job, MigrationRecord, Stage, StageEntry
from routing.replicas import ReplicaRecord, ReplicaState
from routing.slot import SLOT_COUNT
from routing.snapshot import Floor, SnapshotRecord, SnapshotState
from routing.timeline import Lost, Timeline
from routing.topology import UNOWNED, Address, Migration, MigrationKind, Node, Role, Shard, TopologyView

VERSION: Final = 1  # of the encodings below
FAST: Final = 1  # of zlib's levels
NODES_KEPT_MAX: Final = 4096  # decoded; more than the nodes of a cluster
TOKEN_SECRET_BYTES: Final = 32  # as many as the signature's hash gives

VIEW = "view"
VIEWS = "views/"
VIEW_NODES = "view-nodes/"
VIEWS_BY_TIME = "views-by-time/"
VIEWS_BY_EPOCH = "views-by-epoch/"
TIMELINE = "timeline"
EVENT_HEAD = "events"
EVENTS = "events/"
MIGRATIONS = "migrations/"
REPLICAS = "replicas/"
SNAPSHOT_HEAD = "snapshots"
SNAPSHOTS = "snapshots/"
MEMBERS = "members/"
MEMBER_ACKS = "member-acks/"
MODE = "mode"
TOKEN_SECRET = "token-secret"
AUDIT_HEAD = "audit"
AUDIT = "audit/"
DISCOVERER = "discoverer"
LOOKED = "looked"
WANTED = "wanted"
PROXIES = "proxies/"
HOOKS = "hooks/"
DEAD_LETTERS = "dead-letters/"


def numbered(prefix: str, number: int) -> str:
    """The key of one of a series: ``events/0000000000000042``."""
    return f"{prefix}{number:016d}"


def number_of(key: str) -> int:
    """The number with which a key ends."""
    return int(key.rpartition("/")[2])


# -- the envelope

Forward = Callable[[Any], Any]  # content of one version -> content of the next
_FORWARD: dict[int, Forward] = {}  # version -> what brings its content to the next version


def pack(content: Any) -> bytes:
    """Plain content (None, bool, int, float, str, bytes, lists, dictionaries) as a value of the store."""
    packed: bytes = msgpack.packb([VERSION, content])
    return packed


def unpack(value: bytes, what: str) -> Any:
    """The content of a value. Raises StoreRefusedError if it is damaged, or newer than this program."""
    try:
        version, content = msgpack.unpackb(value, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise StoreRefusedError(f"the store's {what} is damaged: {error}") from error
    if type(version) is not int or (version < VERSION and version not in _FORWARD):
        raise StoreRefusedError(f"the store's {what} is damaged: there is no version {version!r}")
    if version > VERSION:
        raise StoreRefusedError(
            f"the store's {what} has version {version!r}, and this program knows versions up to {VERSION}: "
            "run the version of Steadyread that wrote it, or a newer one"
        )
    while version < VERSION:
        content = _FORWARD[version](content)
        version += 1
    return content


def _typed(value: Any, type_: type) -> Any:
    """Raises TypeError if a field is not what it must be."""
    if type(value) is not type_:
        raise TypeError(f"expected {type_.__name__}, got {value!r:.50}")
    return value


# -- the map


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """One version of the map."""

    number: int
    at: float  # Unix seconds when it was recorded; later numbers have later times
    writer: str  # the proxy that saw it
    look: int  # which of the writer's looks at the cluster saw it
    nodes_number: int  # the version whose nodes part it goes with
    view: TopologyView


def pack_view(record: ViewRecord) -> bytes:
    """A version of the map, its nodes aside. Its slots are 16-bit numbers, compressed: a tenth of a millisecond to
    read, however scattered they are."""
    view = record.view
    migrations = [
        [list(migration.slots), migration.source_id, migration.target_id, migration.kind.value]
        for migration in view.migrations
    ]
    return pack(
        [
            record.at,
            record.writer,
            record.look,
            record.nodes_number,
            view.epoch,
            compress(_little_endian(array("h", view.shard_of_slot)).tobytes(), FAST),
            migrations,
        ]
    )


def pack_nodes(shards: tuple[Shard, ...]) -> bytes:
    """The nodes part of a version, by columns: few objects to read, however many nodes there are."""
    nodes = [node for shard in shards for node in (shard.primary, *shard.replicas)]
    return pack(
        [
            [len(shard.replicas) for shard in shards],
            [node.id for node in nodes],
            [node.address.host for node in nodes],
            [node.address.port for node in nodes],
            [node.config_epoch for node in nodes],
            [node.is_failing | node.is_linked << 1 for node in nodes],
            [node.hostname for node in nodes],
        ]
    )


def nodes_number_of(value: bytes) -> int:
    """Which nodes part a value of ``views/N`` goes with. Raises StoreRefusedError."""
    try:
        number: int = _typed(unpack(value, "map")[3], int)
    except (TypeError, IndexError, KeyError) as error:
        raise StoreRefusedError(f"the store's map is damaged: {error!r}") from error
    return number


def index_keys(number: int, at: float, epoch: int) -> tuple[str, str]:
    """Under which keys version ``number`` is found by time and by epoch."""
    return (
        numbered(f"{numbered(VIEWS_BY_TIME, micros(at))}/", number),
        numbered(f"{numbered(VIEWS_BY_EPOCH, epoch)}/", number),
    )


def index_keys_of(number: int, value: bytes) -> tuple[str, str]:
    """The same, for the value of ``views/N``. Raises StoreRefusedError."""
    try:
        at, _, _, _, epoch, *_ = unpack(value, "map")
        return index_keys(number, at, epoch)
    except (ValueError, TypeError) as error:
        raise StoreRefusedError(f"the store's map {number} is damaged: {error!r}") from error


def micros(at: float) -> int:
    """Unix seconds as ``views-by-time`` counts them."""
    return round(at * 1_000_000)


def unpack_nodes(value: bytes) -> tuple[Shard, ...]:
    """The nodes part of a version. Raises StoreRefusedError."""
    try:
        replica_counts, ids, *columns = unpack(value, "nodes")
        if {type(column) for column in (replica_counts, ids, *columns)} != {list}:
            raise TypeError("columns that are no lists")
        if {len(column) for column in (ids, *columns)} != {len(replica_counts) + sum(replica_counts)}:
            raise ValueError("columns of different lengths")
        primary_ids: list[str | None] = []
        for count in replica_counts:
            primary_ids += [None, *repeat(ids[len(primary_ids)], count)]
        nodes = map(_node_of, primary_ids, ids, *columns)
        return tuple([Shard(next(nodes), tuple(islice(nodes, count))) for count in replica_counts])
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise StoreRefusedError(f"the store's nodes are damaged: {error!r}") from error


def unpack_view(number: int, value: bytes, shards: tuple[Shard, ...]) -> ViewRecord:
    """A version of the map with its nodes. Raises StoreRefusedError."""
    try:
        at, writer, look, nodes_number, epoch, slots, migrations = unpack(value, "map")
        shard_of_slot = _slots_of(slots)
        owners = set(shard_of_slot)
        if min(owners) < UNOWNED or max(owners) >= len(shards):
            raise ValueError(f"slots of shards that are not among the {len(shards)} there are")
        view = TopologyView(
            revision=number,
            epoch=epoch,
            shards=shards,
            shard_of_slot=shard_of_slot,
            migrations=tuple(
                Migration(tuple(slots), source, target, MigrationKind(kind))
                for slots, source, target, kind in migrations
            ),
        )
    except (ValueError, TypeError, IndexError, KeyError, ZlibError) as error:
        raise StoreRefusedError(f"the store's map {number} is damaged: {error!r}") from error
    return ViewRecord(number, at, writer, look, nodes_number, view)


def _slots_of(compressed: bytes) -> tuple[int, ...]:
    """slot -> index into shards."""
    reader = decompressobj()
    packed = reader.decompress(compressed, SLOT_COUNT * 2 + 1)  # a damaged one may claim to be of any size
    if len(packed) != SLOT_COUNT * 2 or not reader.eof:
        raise ValueError(f"not {SLOT_COUNT} slots")
    return tuple(_little_endian(array("h", packed)))


def _little_endian(numbers: array[int]) -> array[int]:
    """Between the machine's order of bytes and the store's, either way."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _node_content(node: Node) -> list[Any]:
    return [
        node.id,
        node.address.host,
        node.address.port,
        node.config_epoch,
        node.is_failing | node.is_linked << 1,
        node.hostname,
    ]


@lru_cache(maxsize=NODES_KEPT_MAX)
def _node_of(
    primary_id: str | None,
    node_id: str,
    host: str,
    port: int,
    config_epoch: int,
    flags: int,
    hostname: str,
) -> Node:
    """A primary if ``primary_id`` is None. Cached, because most nodes are the same in neighbouring versions."""
    role = Role.PRIMARY if primary_id is None else Role.REPLICA
    address = Address(host, port)
    return Node(node_id, address, role, primary_id, config_epoch, bool(flags & 1), bool(flags & 2), hostname)


# -- the timeline


def pack_timeline(timeline: Timeline) -> bytes:
    """A timeline without its view, which is kept by itself, and without the time of the last look."""
    return pack(
        [
            timeline.begun_at,
            {node_id: [lost.why, lost.since, lost.is_silent] for node_id, lost in timeline.lost.items()},
            dict(timeline.doubted),
            [[_node_content(node), node.role.value, node.primary_id] for node in timeline.hidden],
            dict(timeline.successors),
            [migration_content(record) for record in timeline.migrations],
            timeline.migration_count,
            dict(timeline.newest_jobs),
            [
                [anomaly_content(state.anomaly), state.is_found, state.absent_since]
                for state in timeline.anomalies
            ],
        ]
    )


def unpack_timeline(value: bytes) -> Timeline:
    """A timeline whose view and time of the last look are still to be given. Raises StoreRefusedError."""
    try:
        begun_at, lost, doubted, hidden, successors, migrations, count, newest_jobs, anomalies = unpack(
            value, "timeline"
        )
        return Timeline(
            begun_at=float(begun_at),
            lost={node_id: Lost(*fields) for node_id, fields in lost.items()},
            doubted=dict(doubted),
            hidden=tuple(
                replace(_node_of(None, *content), role=Role(role), primary_id=primary_id)
                for content, role, primary_id in hidden
            ),
            successors=dict(successors),
            migrations=tuple(migration_of(content) for content in migrations),
            migration_count=_typed(count, int),
            newest_jobs=dict(newest_jobs),
            anomalies=tuple(
                AnomalyState(_anomaly_of(content), is_found, absent_since)
                for content, is_found, absent_since in anomalies
            ),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreRefusedError(f"the store's timeline is damaged: {error!r}") from error


def anomaly_content(anomaly: Anomaly) -> Mapping[str, Any]:
    """An anomaly as plain content, for the store and for JSON."""
    return {
        "kind": anomaly.kind.value,
        "subject": anomaly.subject,
        "message": anomaly.message,
        "nodes": list(anomaly.nodes),
        "slot_ranges": [list(span) for span in anomaly.slot_ranges],
        "evidence": dict(anomaly.evidence),
        "since": anomaly.since,
    }


def _anomaly_of(content: Mapping[str, Any]) -> Anomaly:
    return Anomaly(
        **{
            **content,
            "kind": AnomalyKind(content["kind"]),
            "nodes": tuple(content["nodes"]),
            "slot_ranges": tuple((low, high) for low, high in content["slot_ranges"]),
        }
    )


# -- events and migrations


def pack_event(event: Event) -> bytes:
    return pack(
        [
            event.kind.value,
            event.at,
            event.message,
            event.epoch,
            event.nodes,
            event.shards,
            event.slot_ranges,
            event.migration,
            event.evidence,
            event.seen_by,
        ]
    )


def unpack_event(number: int, value: bytes) -> Event:
    """Raises StoreRefusedError."""
    try:
        kind, at, message, epoch, nodes, shards, slot_ranges, migration, evidence, seen_by = unpack(
            value, "event"
        )
        return Event(
            EventKind(kind),
            at,
            message,
            epoch,
            tuple(nodes),
            tuple(shards),
            tuple((low, high) for low, high in slot_ranges),
            migration,
            evidence,
            seen_by,
            number,
        )
    except (ValueError, TypeError) as error:
        raise StoreRefusedError(f"the store's event {number} is damaged: {error!r}") from error


def migration_content(record: MigrationRecord) -> Mapping[str, Any]:
    """A migration as plain content, for the store and for JSON."""
    return {
        "id": record.id,
        "kind": record.kind.value,
        "source_id": record.source_id,
        "target_id": record.target_id,
        "begun_at": record.begun_at,
        "stages": [[entry.stage.value, entry.at, dict(entry.evidence)] for entry in record.stages],
        "open_slots": list(record.open_slots),
        "moved_slots": list(record.moved_slots),
        "returned_slots": list(record.returned_slots),
        "stuck_slots": list(record.stuck_slots),
        "keys_left": dict(record.keys_left),
        "slot_progressed_at": dict(record.slot_progressed_at),
        "progressed_at": record.progressed_at,
        "quiet_since": record.quiet_since,
        "ended_at": record.ended_at,
        "jobs": [
            [job.name, job.state, job.message, job.updated_at, job.remaining_bytes] for job in record.jobs
        ],
    }


def migration_of(content: Mapping[str, Any]) -> MigrationRecord:
    """Raises StoreRefusedError."""
    try:
        return MigrationRecord(
            **{
                **content,
                "kind": MigrationKind(content["kind"]),
                "stages": tuple(
                    StageEntry(Stage(name), at, evidence) for name, at, evidence in content["stages"]
                ),
                "open_slots": tuple(content["open_slots"]),
                "moved_slots": tuple(content["moved_slots"]),
                "returned_slots": tuple(content["returned_slots"]),
                "stuck_slots": tuple(content["stuck_slots"]),
                "jobs": tuple(Job(*job) for job in content["jobs"]),
            }
        )
    except (ValueError, TypeError, KeyError) as error:
        raise StoreRefusedError(f"a migration in the store is damaged: {error!r}") from error


def migration_key(migration_id: str) -> str:
    """``m-12`` is under the key with number 12."""
    return numbered(MIGRATIONS, int(migration_id.removeprefix("m-")))


def pack_migration(record: MigrationRecord) -> bytes:
    return pack(migration_content(record))


def unpack_migration(value: bytes) -> MigrationRecord:
    """Raises StoreRefusedError."""
    return migration_of(unpack(value, "migration"))


# -- who looks


@dataclass(frozen=True, slots=True)
class Looked:
    """The discoverer's last look at the cluster."""

    at: float  # Unix seconds
    by: str
    is_last: bool  # it stopped, and said so


def pack_looked(looked: Looked) -> bytes:
    return pack([looked.at, looked.by, looked.is_last])


def unpack_looked(value: bytes) -> Looked:
    """Raises StoreRefusedError."""
    try:
        at, by, is_last = unpack(value, "last look")
        return Looked(_typed(at, float), _typed(by, str), _typed(is_last, bool))
    except (ValueError, TypeError) as error:
        raise StoreRefusedError(f"the store's last look is damaged: {error!r}") from error


def renumbered(event: Event, number: int, seen_by: str) -> Event:
    """The event as it is recorded."""
    return replace(event, number=number, seen_by=seen_by)


# -- the routing mode, the secret of tokens, and the audit log


def pack_number(number: int) -> bytes:
    """The value of a head that counts, ``events``."""
    return pack(number)


def unpack_number(value: bytes, what: str) -> int:
    """Raises StoreRefusedError."""
    number = unpack(value, what)
    if not isinstance(number, int):
        raise StoreRefusedError(f"the store's {what} is damaged: {number!r} is no number")
    return number


@dataclass(frozen=True, slots=True)
class ModeRecord:
    """The routing mode as an operator chose it."""

    mode: Level
    at: float  # Unix seconds
    who: str


def pack_mode(record: ModeRecord) -> bytes:
    return pack([record.mode.value, record.at, record.who])


def unpack_mode(value: bytes) -> ModeRecord:
    """Raises StoreRefusedError, also for a mode that this version does not know."""
    try:
        name, at, who = unpack(value, "mode")
        return ModeRecord(Level(name), at, who)
    except (ValueError, TypeError) as error:
        raise StoreRefusedError(f"the store's mode is damaged, or of a newer version: {error}") from error


def pack_token_secret(secret: bytes) -> bytes:
    """What session tokens are signed with, TOKEN_SECRET_BYTES of randomness."""
    return pack(secret)


def unpack_token_secret(value: bytes) -> bytes:
    """Raises StoreRefusedError, whose text holds nothing of the secret."""
    secret = unpack(value, "secret of session tokens")
    if not isinstance(secret, bytes) or len(secret) != TOKEN_SECRET_BYTES:
        raise StoreRefusedError(
            f"the store's secret of session tokens is damaged: it is not {TOKEN_SECRET_BYTES} bytes"
        )
    return secret


def pack_audit(record: AuditRecord) -> bytes:
    return pack(facts_of_record(record))


def unpack_audit(number: int, value: bytes) -> AuditRecord | Damaged:
    """What stands at ``audit/number``: a damaged record is a finding for whoever verifies, and no error."""
    try:
        facts = unpack(value, f"audit record {number}")
    except StoreRefusedError as error:
        return Damaged(number, str(error))
    return record_of_facts(facts) if isinstance(facts, dict) else Damaged(number, "it is no record")


def pack_audit_head(head: AuditHead) -> bytes:
    return pack(list(head))


def unpack_audit_head(value: bytes) -> AuditHead:
    """Raises StoreRefusedError."""
    content = unpack(value, "audit head")
    match content:
        case [int(number), str(hash_)]:
            return AuditHead(number, hash_)
    raise StoreRefusedError(f"the store's audit head is damaged: {content!r} is no number and hash")


# -- replicas and snapshots


def pack_replica(record: ReplicaRecord) -> bytes:
    return pack(
        [
            record.node_id,
            list(record.address),
            record.primary_id,
            record.state.value,
            record.since,
            record.replid,
            record.offset,
        ]
    )


def unpack_replica(value: bytes) -> ReplicaRecord:
    """Raises StoreRefusedError."""
    try:
        node_id, (host, port), primary_id, state, since, replid, offset = unpack(value, "replica")
        return ReplicaRecord(
            node_id, Address(host, port), primary_id, ReplicaState(state), since, replid, offset
        )
    except (ValueError, TypeError) as error:
        raise StoreRefusedError(f"a replica in the store is damaged: {error!r}") from error


def pack_snapshot(record: SnapshotRecord) -> bytes:
    return pack(
        [
            record.id,
            record.state.value,
            record.opened_at,
            record.name,
            record.expires_at,
            record.epoch,
            {node_id: [floor.replid, floor.offset] for node_id, floor in record.floors.items()},
            record.reason,
            record.owner,
            record.is_cut,
        ]
    )


def unpack_snapshot(value: bytes) -> SnapshotRecord:
    """Raises StoreRefusedError."""
    try:
        number, state, opened_at, name, expires_at, epoch, floors, reason, owner, is_cut = unpack(
            value, "snapshot"
        )
        return SnapshotRecord(
            number,
            SnapshotState(state),
            opened_at,
            name,
            expires_at,
            epoch,
            {node_id: Floor(replid, offset) for node_id, (replid, offset) in floors.items()},
            reason,
            owner,
            is_cut,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreRefusedError(f"a snapshot in the store is damaged: {error!r}") from error
