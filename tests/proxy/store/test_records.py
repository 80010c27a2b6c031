"""The store's encodings: what is written is read as it was, and what is not as it should be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.store.interface import StoreRefusedError
from proxy.store.records import (
    TOKEN_SECRET_BYTES,
    VERSION,
    ViewRecord,
    anomaly_content,
    migration_content,
    migration_of,
    nodes_number_of,
    numbered,
    pack,
    pack_event,
    pack_nodes,
    pack_replica,
    pack_snapshot,
    pack_timeline,
    pack_token_secret,
    pack_view,
    unpack,
    unpack_event,
    unpack_nodes,
    unpack_replica,
    unpack_snapshot,
    unpack_timeline,
    unpack_token_secret,
    unpack_view,
)
from routing.anomalies import Anomaly, AnomalyKind, AnomalyState
from routing.events import Event, EventKind
from routing.migrations import Job, MigrationRecord, Stage, StageEntry
from routing.replicas import ReplicaRecord, ReplicaState
from routing.slot import SLOT_COUNT
from routing.snapshot import Floor, SnapshotRecord, SnapshotState
from routing.timeline import Lost, Timeline
from routing.topology import UNOWNED, Address, Migration, MigrationKind, Node, Role, Shard, TopologyView

TEXTS = st.text(max_size=8)
IDS = st.text("0123456789abcdef", min_size=1, max_size=40)
TIMES = st.floats(0, 2e9, allow_nan=False)
SLOTS = st.lists(st.integers(0, SLOT_COUNT - 1), unique=True, max_size=6).map(sorted).map(tuple)
SPANS = st.lists(st.tuples(st.integers(0, 99), st.integers(100, 999)), max_size=3).map(tuple)
NUMBERS = st.integers(-(2**63), 2**63)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
EVIDENCE = st.dictionaries(TEXTS, PLAIN, max_size=3)
ADDRESSES = st.builds(Address, TEXTS, st.integers(0, 65535))


def nodes(role: Role, primary_id: str | None) -> st.SearchStrategy[Node]:
    return st.builds(
        Node,
        IDS,
        ADDRESSES,
        st.just(role),
        st.just(primary_id),
        st.integers(0, 2**48),
        st.booleans(),
        st.booleans(),
        TEXTS,
    )


PRIMARIES = nodes(Role.PRIMARY, None)


@st.composite
def shards(draw: st.DrawFn) -> tuple[Shard, ...]:
    heads = draw(st.lists(PRIMARIES, min_size=1, max_size=4))
    return tuple(
        Shard(head, tuple(draw(st.lists(nodes(Role.REPLICA, head.id), max_size=2)))) for head in heads
    )


@st.composite
def view_records(draw: st.DrawFn) -> ViewRecord:
    parts = draw(shards())
    cuts = sorted({0, SLOT_COUNT, *draw(SLOTS)})
    owners: list[int] = []
    for low, high in pairwise(cuts):
        owners += [draw(st.integers(UNOWNED, len(parts) - 1))] * (high - low)
    migrations = st.builds(Migration, SLOTS, IDS, IDS, st.sampled_from(MigrationKind))
    number = draw(st.integers(1, 10**15))
    view = TopologyView(
        number,
        draw(st.integers(0, 2**48)),
        parts,
        tuple(owners),
        tuple(draw(st.lists(migrations, max_size=2))),
    )
    return ViewRecord(number, draw(TIMES), draw(TEXTS), draw(st.integers(0, 10**9)), number, view)


EVENTS = st.builds(
    Event,
    st.sampled_from(EventKind),
    TIMES,
    TEXTS,
    st.integers(0, 2**48),
    st.lists(IDS, max_size=3).map(tuple),
    st.lists(IDS, max_size=3).map(tuple),
    SPANS,
    TEXTS,
    EVIDENCE,
    TEXTS,
    st.integers(1, 10**15),
)
JOBS = st.builds(Job, TEXTS, TEXTS, TEXTS, st.none() | NUMBERS, st.none() | NUMBERS)
RECORDS = st.builds(
    MigrationRecord,
    id=TEXTS,
    kind=st.sampled_from(MigrationKind),
    source_id=IDS,
    target_id=IDS,
    begun_at=TIMES,
    stages=st.lists(st.builds(StageEntry, st.sampled_from(Stage), TIMES, EVIDENCE), max_size=3).map(tuple),
    open_slots=SLOTS,
    moved_slots=SLOTS,
    returned_slots=SLOTS,
    stuck_slots=SLOTS,
    keys_left=st.dictionaries(st.integers(0, SLOT_COUNT - 1), st.integers(0, 10**9), max_size=3),
    slot_progressed_at=st.dictionaries(st.integers(0, SLOT_COUNT - 1), TIMES, max_size=3),
    progressed_at=TIMES,
    quiet_since=st.none() | TIMES,
    ended_at=st.none() | TIMES,
    jobs=st.lists(JOBS, max_size=2).map(tuple),
)
REPLICAS = st.builds(
    ReplicaRecord, IDS, ADDRESSES, IDS, st.sampled_from(ReplicaState), TIMES, IDS, st.none() | NUMBERS
)
SNAPSHOTS = st.builds(
    SnapshotRecord,
    NUMBERS,
    st.sampled_from(SnapshotState),
    TIMES,
    TEXTS,
    st.none() | TIMES,
    NUMBERS,
    st.dictionaries(IDS, st.builds(Floor, IDS, NUMBERS), max_size=3),
    TEXTS,
)
ANOMALIES = st.builds(
    Anomaly,
    st.sampled_from(AnomalyKind),
    TEXTS,
    st.lists(IDS, max_size=2).map(tuple),
    SPANS,
    EVIDENCE,
    TIMES,
    TEXTS,
)
TIMELINES = st.builds(
    Timeline,
    begun_at=TIMES,
    lost=st.dictionaries(IDS, st.builds(Lost, TEXTS, TIMES, st.booleans()), max_size=2),
    doubted=st.dictionaries(IDS, TIMES, max_size=2),
    hidden=st.lists(PRIMARIES | nodes(Role.REPLICA, "aa") | nodes(Role.REPLICA, None), max_size=2).map(tuple),
    successors=st.dictionaries(IDS, IDS, max_size=2),
    migrations=st.lists(RECORDS, max_size=2).map(tuple),
    migration_count=st.integers(0, 10**9),
    newest_jobs=st.dictionaries(IDS, TEXTS, max_size=2),
    anomalies=st.lists(st.builds(AnomalyState, ANOMALIES, st.booleans(), st.none() | TIMES), max_size=2).map(
        tuple
    ),
)
SECRET = b"topsecret".ljust(TOKEN_SECRET_BYTES, b".")


# -- what is written is read as it was


@settings(max_examples=12, deadline=None)
@given(view_records())
def test_views(record: ViewRecord) -> None:
    value = pack_view(record)
    assert nodes_number_of(value) == record.nodes_number
    parts = unpack_nodes(pack_nodes(record.view.shards))
    assert unpack_view(record.number, value, parts) == record


@settings(max_examples=40, deadline=None)
@given(EVENTS)
def test_events(event: Event) -> None:
    """But for the number, which is in the key."""
    assert unpack_event(event.number, pack_event(event)) == event


@settings(max_examples=40, deadline=None)
@given(RECORDS)
def test_migrations(record: MigrationRecord) -> None:
    assert migration_of(unpack(pack(migration_content(record)), "migration")) == record
    json.dumps(migration_content(record))


@settings(max_examples=40, deadline=None)
@given(TIMELINES)
def test_timelines(timeline: Timeline) -> None:
    assert unpack_timeline(pack_timeline(timeline)) == timeline


def test_a_timeline_without_its_view_and_the_time_of_its_last_look() -> None:
    """Both are kept by themselves: a look that sees nothing new must not change the value."""
    timeline = Timeline(observed_at=5.0, begun_at=1.0)
    assert pack_timeline(timeline) == pack_timeline(Timeline(observed_at=6.0, begun_at=1.0))
    assert unpack_timeline(pack_timeline(timeline)).observed_at == 0.0


@settings(max_examples=40, deadline=None)
@given(ANOMALIES)
def test_anomalies_as_json(anomaly: Anomaly) -> None:
    content = json.loads(json.dumps(anomaly_content(anomaly)))
    assert content["kind"] == anomaly.kind.value
    assert content["slot_ranges"] == [list(span) for span in anomaly.slot_ranges]
    assert set(content) == {"kind", "subject", "message", "nodes", "slot_ranges", "evidence", "since"}


@settings(max_examples=40, deadline=None)
@given(REPLICAS)
def test_replicas(record: ReplicaRecord) -> None:
    assert unpack_replica(pack_replica(record)) == record


@settings(max_examples=40, deadline=None)
@given(SNAPSHOTS)
def test_snapshots(record: SnapshotRecord) -> None:
    assert unpack_snapshot(pack_snapshot(record)) == record


@given(st.binary(min_size=TOKEN_SECRET_BYTES, max_size=TOKEN_SECRET_BYTES))
def test_secrets_of_tokens(secret: bytes) -> None:
    assert unpack_token_secret(pack_token_secret(secret)) == secret


@pytest.mark.parametrize("damaged", [SECRET[1:], SECRET * 2, SECRET.decode(), [SECRET], {SECRET: 1}])
def test_a_refused_secret_is_not_told(damaged: Any) -> None:
    for value in (pack(damaged), pack(damaged)[:-1], SECRET, msgpack.packb([VERSION + 1, SECRET])):
        with pytest.raises(StoreRefusedError) as raised:
            unpack_token_secret(value)
        assert "topsecret" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [None, 7, [], ["x"] * 7, ["x"] * 8, [1, "serving", 1.0, "", None, 1, [], ""]]
)
def test_damaged_replicas_and_snapshots_are_refused(content: object) -> None:
    for unpack_one in (unpack_replica, unpack_snapshot):
        with pytest.raises(StoreRefusedError, match="damaged"):
            unpack_one(pack(content))


@given(st.integers(0, 10**16 - 1), st.integers(0, 10**16 - 1))
def test_keys_have_the_order_of_their_numbers(one: int, two: int) -> None:
    assert (numbered("events/", one) < numbered("events/", two)) == (one < two)


# -- what is not as it should be is refused

NODE = Node("a" * 40, Address("10.0.0.1", 6379), Role.PRIMARY)
VIEW = TopologyView(1, 1, (Shard(NODE),), (0,) * SLOT_COUNT)
RECORD = MigrationRecord(
    "m-1",
    MigrationKind.STEPWISE,
    "a",
    "b",
    1.0,
    (StageEntry(Stage.MOVING, 1.0),),
    jobs=(Job("j", "streaming"),),
)
TIMELINE = Timeline(
    lost={"a": Lost("why", 1.0)},
    hidden=(NODE,),
    migrations=(RECORD,),
    anomalies=(AnomalyState(Anomaly(AnomalyKind.UNEVEN_KEYS, "")),),
)
CODECS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "view": (
        pack_view(ViewRecord(1, 1.0, "p", 1, 1, VIEW)),
        lambda value: unpack_view(1, value, VIEW.shards),
    ),
    "nodes number": (pack_view(ViewRecord(1, 1.0, "p", 1, 1, VIEW)), nodes_number_of),
    "nodes": (pack_nodes(VIEW.shards), unpack_nodes),
    "event": (
        pack_event(Event(EventKind.FAILOVER, 1.0, "m", slot_ranges=((1, 2),))),
        lambda value: unpack_event(1, value),
    ),
    "migration": (
        pack(migration_content(RECORD)),
        lambda value: migration_of(unpack(value, "migration")),
    ),
    "timeline": (pack_timeline(TIMELINE), unpack_timeline),
    "token secret": (pack_token_secret(SECRET), unpack_token_secret),
}


@pytest.mark.parametrize("name", list(CODECS))
def test_a_newer_version_is_refused_with_what_to_do(name: str) -> None:
    value, read = CODECS[name]
    _, content = msgpack.unpackb(value, strict_map_key=False)
    with pytest.raises(
        StoreRefusedError, match="run the version of Steadyread that wrote it, or a newer one"
    ):
        read(msgpack.packb([VERSION + 1, content]))


@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("version", [0, -1, "1", None, 1.0, True])
def test_a_version_that_never_was_is_damage(name: str, version: Any) -> None:
    value, read = CODECS[name]
    _, content = msgpack.unpackb(value, strict_map_key=False)
    with pytest.raises(StoreRefusedError):
        read(msgpack.packb([version, content]))


@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("content", [None, 3, "x", [], [[]], [None] * 9, [[1]], {"id": 1}, [{}] * 9])
def test_content_of_another_shape_is_refused(name: str, content: Any) -> None:
    if (name, content) == ("nodes", []):
        return  # a cluster may have no nodes
    with pytest.raises(StoreRefusedError):
        CODECS[name][1](pack(content))


@pytest.mark.parametrize("name", list(CODECS))
def test_a_value_that_was_cut_is_refused_and_a_wrong_byte_raises_nothing_else(name: str) -> None:
    """A value with one wrong byte may still mean something."""
    value, read = CODECS[name]
    for end in range(len(value)):
        with pytest.raises(StoreRefusedError):
            read(value[:end])
    for place in range(len(value)):
        for byte in (0x00, 0xC0, 0xC1, 0xFF, value[place] ^ 1):
            try:
                read(value[:place] + bytes([byte]) + value[place + 1 :])
            except StoreRefusedError:
                continue


def test_a_map_that_does_not_cover_the_slots_or_names_shards_that_are_not_there_is_refused() -> None:
    for owners, parts in (
        ((0,) * (SLOT_COUNT - 1), VIEW.shards),
        ((0,) * SLOT_COUNT, ()),
        ((-2,) * SLOT_COUNT, VIEW.shards),
    ):
        damaged = TopologyView(1, 1, VIEW.shards, owners)
        with pytest.raises(StoreRefusedError):
            unpack_view(1, pack_view(ViewRecord(1, 1.0, "p", 1, 1, damaged)), parts)
