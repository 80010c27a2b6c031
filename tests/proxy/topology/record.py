"""Writes a record of versions, events and migrations into a store, as the discoverer would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from proxy.store.interface import Operation, Put, TopologyStore
from proxy.store.records import (
    EVENT_HEAD,
    EVENTS,
    VIEW,
    VIEW_NODES,
    VIEWS,
    ViewRecord,
    index_keys,
    migration_content,
    migration_key,
    numbered,
    pack,
    pack_event,
    pack_nodes,
    pack_view,
)
from routing.events import Event, EventKind
from routing.migrations import MigrationRecord, Stage, StageEntry
from routing.slot import SLOT_COUNT
from routing.topology import Address, MigrationKind, Node, Role, Shard, TopologyView

BEGAN_AT = 1_800_000_000.0  # Unix seconds: 2027-01-15T08:00:00Z


def a_cluster(node_count: int) -> tuple[Shard, ...]:
    """Half of the nodes are primaries, and each has a replica."""
    shards = []
    for index in range(node_count // 2):
        primary = Node(f"{index:040x}", Address("10.0.0.1", 7000 + index), Role.PRIMARY, None, index)
        replica = Node(
            f"{index + node_count:040x}", Address("10.0.0.2", 7000 + index), Role.REPLICA, primary.id
        )
        shards.append(Shard(primary, (replica,)))
    return tuple(shards)


def an_event(number: int, kind: EventKind = EventKind.NODE_ADDED, **fields: object) -> Event:
    return replace(
        Event(
            kind, BEGAN_AT + number, f"{kind.value} {number}", epoch=number, seen_by="proxy-1", number=number
        ),
        **fields,  # type: ignore[arg-type]
    )


async def write_events(store: TopologyStore, events: Iterable[Event], slice_max: int = 1000) -> None:
    """In order; their numbers go on from those in the store."""
    pending = list(events)
    for start in range(0, len(pending), slice_max):
        part = pending[start : start + slice_max]
        operations: list[Operation] = [Put(numbered(EVENTS, e.number), pack_event(e)) for e in part]
        await store.commit([*operations, Put(EVENT_HEAD, pack(part[-1].number))])


async def write_version(store: TopologyStore, record: ViewRecord) -> None:
    number = record.number
    operations: list[Operation] = [
        Put(VIEW, pack(number)),
        Put(numbered(VIEWS, number), pack_view(record)),
        *(Put(key, b"") for key in index_keys(number, record.at, record.view.epoch)),
    ]
    if record.nodes_number == number:
        operations.append(Put(numbered(VIEW_NODES, number), pack_nodes(record.view.shards)))
    await store.commit(operations)


def a_version(
    number: int, *, epoch: int, at: float, shards: Sequence[Shard], nodes_number: int
) -> ViewRecord:
    """Slots are spread over the shards, and moved on by one with each version, so that all differ."""
    owners = tuple((slot * len(shards) // SLOT_COUNT + number) % len(shards) for slot in range(SLOT_COUNT))
    view = TopologyView(number, epoch, tuple(shards), owners)
    return ViewRecord(number, at, "proxy-1", number, nodes_number, view)


def a_migration(number: int, **fields: object) -> MigrationRecord:
    begun_at = BEGAN_AT + number
    record = MigrationRecord(
        f"m-{number}",
        MigrationKind.STEPWISE,
        "a" * 40,
        "b" * 40,
        begun_at,
        (StageEntry(Stage.MOVING, begun_at, {"keys": 3}),),
        open_slots=(1, 2, 7),
        keys_left={1: 3},
    )
    return replace(record, **fields)  # type: ignore[arg-type]


async def write_migration(store: TopologyStore, record: MigrationRecord) -> None:
    await store.commit([Put(migration_key(record.id), pack(migration_content(record)))])
