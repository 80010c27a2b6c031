"""Anomalies: states of the cluster that an operator should know of, however they came about.

``find_anomalies`` judges one moment. ``track`` remembers since when each has lasted, because much that looks wrong for
an instant is gossip on its way; what lasts is found once, and gone once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import groupby

from routing.cluster_nodes import NodeLine, Report
from routing.events import Event, EventKind, Plain, SlotRange
from routing.migrations import MigrationRecord
from routing.names import Names, count, plain_ranges, slot_ranges, slots_text
from routing.observation import Observation
from routing.topology import UNOWNED, Role, TopologyView


class AnomalyKind(Enum):
    """What is wrong."""

    UNCOVERED_SLOTS = "uncovered_slots"  # no primary serves them
    DISPUTED_SLOTS = "disputed_slots"  # two nodes claim them, or nodes disagree about their owner
    REPLICA_WITHOUT_PRIMARY = "replica_without_primary"  # it follows nobody, or nobody that lives
    SHARD_WITHOUT_REPLICA = "shard_without_replica"
    UNEVEN_SLOTS = "uneven_slots"
    UNEVEN_KEYS = "uneven_keys"
    UNEVEN_BYTES = "uneven_bytes"
    STUCK_MIGRATION = "stuck_migration"


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One thing that is wrong. Kind and subject say whether two are the same."""

    kind: AnomalyKind
    message: str  # one sentence for people
    nodes: tuple[str, ...] = ()
    slot_ranges: tuple[SlotRange, ...] = ()
    evidence: Mapping[str, Plain] = field(default_factory=dict)
    since: float = 0.0  # Unix seconds
    subject: str = ""  # what it is about: a node's id, two ids, a migration's id, or the whole cluster


@dataclass(frozen=True, slots=True)
class AnomalyLimits:
    """When a distribution is uneven: the fullest primary is both far above the mean and full enough to matter."""

    uneven_factor: float = 2.0  # times the mean; a cluster doubled by hand passes through less
    uneven_slots_min: int = 512  # 1/32 of all slots: below that, no move changes a node's load much
    uneven_keys_min: int = 100_000  # fewer are no load for any server
    uneven_bytes_min: int = 256 * 1024 * 1024  # less fits every machine that runs a primary


@dataclass(frozen=True, slots=True)
class AnomalyState:
    """An anomaly on its way to be found, found, or on its way to be gone."""

    anomaly: Anomaly  # as it was when it was first seen, or found; ``since`` is right
    is_found: bool = False
    absent_since: float | None = None  # it was not there at the last look, since then


@dataclass(frozen=True, slots=True)
class AnomaliesTracked:
    """The states after a look, the events of it, and the anomalies that count now."""

    states: tuple[AnomalyState, ...]
    events: tuple[Event, ...]
    current: tuple[Anomaly, ...]


def find_anomalies(
    observation: Observation, migrations: Sequence[MigrationRecord], limits: AnomalyLimits
) -> tuple[Anomaly, ...]:
    """What is wrong at this moment, by kind and subject. ``since`` is the moment."""
    view = observation.view
    if not view.shards:
        return ()
    owned = _owned_ranges(view)
    strange = _strange_lines(view, owned, observation.reports)
    names = Names(view.nodes(), (line.node for _, line in strange))
    found = [
        *_uncovered(view),
        *_disputed(view, strange, names),
        *_without_primary(view, strange, names),
        *_without_replica(view, names),
        *_uneven(observation, owned, names, limits),
        *_stuck(migrations, names),
    ]
    return tuple(
        replace(anomaly, since=observation.at)
        for anomaly in sorted(found, key=lambda anomaly: (anomaly.kind.value, anomaly.subject))
    )


def track(
    states: Sequence[AnomalyState], found: Sequence[Anomaly], at: float, epoch: int, lasting_seconds: float
) -> AnomaliesTracked:
    """Remember what was found at ``at``. What is wrong, or right again, must last ``lasting_seconds`` to count.

    Slots that nobody serves count at once: requests fail already.
    """
    known = {(state.anomaly.kind, state.anomaly.subject): state for state in states}
    after: list[AnomalyState] = []
    events: list[Event] = []
    current: list[Anomaly] = []
    for fresh in found:
        state = known.pop((fresh.kind, fresh.subject), None) or AnomalyState(fresh)
        state = _going_on(state, fresh)
        since = state.anomaly.since
        if not state.is_found and at - since >= _lasting(fresh.kind, lasting_seconds):
            state = AnomalyState(replace(fresh, since=since), is_found=True)
            events.append(_event(EventKind.ANOMALY_FOUND, state.anomaly, at, epoch, fresh.message))
        after.append(state)
        if state.is_found:
            current.append(replace(fresh, since=since))
    for state in known.values():
        anomaly = state.anomaly
        absent_since = at if state.absent_since is None else state.absent_since
        if not state.is_found:
            continue
        if at - absent_since >= _lasting(anomaly.kind, lasting_seconds):
            message = f"no more, after {at - anomaly.since:.0f} s: {anomaly.message}"
            events.append(_event(EventKind.ANOMALY_GONE, anomaly, at, epoch, message))
        else:
            after.append(replace(state, absent_since=absent_since))
            current.append(anomaly)
    return AnomaliesTracked(tuple(after), tuple(events), tuple(current))


def _going_on(state: AnomalyState, fresh: Anomaly) -> AnomalyState:
    """The state when its anomaly is there again.

    While slots move one by one, two nodes are always at odds about some of them for a moment. So a dispute lasts
    only as long as there is a slot that was disputed all the while.
    """
    if fresh.kind is AnomalyKind.DISPUTED_SLOTS and not state.is_found:
        lasting = tuple(_common(state.anomaly.slot_ranges, fresh.slot_ranges))
        if not lasting:
            return AnomalyState(fresh)
        state = replace(state, anomaly=replace(state.anomaly, slot_ranges=lasting))
    return replace(state, absent_since=None)


def _common(ours: Iterable[SlotRange], theirs: Sequence[SlotRange]) -> Iterable[SlotRange]:
    """What two series of ascending ranges have in common."""
    for low, high in ours:
        for first, last in theirs:
            if max(low, first) <= min(high, last):
                yield max(low, first), min(high, last)


def _lasting(kind: AnomalyKind, lasting_seconds: float) -> float:
    return 0.0 if kind is AnomalyKind.UNCOVERED_SLOTS else lasting_seconds


def _event(kind: EventKind, anomaly: Anomaly, at: float, epoch: int, message: str) -> Event:
    return Event(
        kind=kind,
        at=at,
        message=message,
        epoch=epoch,
        nodes=anomaly.nodes,
        slot_ranges=anomaly.slot_ranges,
        evidence={
            "anomaly": anomaly.kind.value,
            "subject": anomaly.subject,
            "since": anomaly.since,
            **anomaly.evidence,
        },
    )


# -- what the kinds are judged by

_Told = tuple[str, NodeLine]  # who says it, what it says


def _owned_ranges(view: TopologyView) -> dict[str, tuple[SlotRange, ...]]:
    """Primary's id -> its slots, in one pass over the map; only those that own any."""
    owned: dict[int, list[SlotRange]] = {}
    for owner, low, high in _runs(view.shard_of_slot):
        owned.setdefault(owner, []).append((low, high))
    return {view.shards[owner].primary.id: tuple(spans) for owner, spans in owned.items() if owner != UNOWNED}


def _runs(shard_of_slot: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """(owner, first slot, last slot) of slots that follow each other."""
    first = 0
    for owner, slots in groupby(shard_of_slot):
        after = first + len(list(slots))
        yield owner, first, after - 1
        first = after


def _strange_lines(
    view: TopologyView, owned: Mapping[str, tuple[SlotRange, ...]], reports: Iterable[Report]
) -> list[_Told]:
    """Lines that differ from the view: in whose slots they are, or in naming a node that it leaves out.

    One pass for all kinds: it reads each line of each report, 16,000 of them in a cluster of 1,000 nodes.
    """
    expected = {node.id: owned.get(node.id, ()) for node in view.nodes()}
    strange: list[_Told] = []
    for report in reports:
        lines = (report.myself, *report.others)
        strange += [
            (report.myself.node.id, line) for line in lines if expected.get(line.node.id) != line.slot_ranges
        ]
    return strange


# -- the kinds, in the order of AnomalyKind


def _uncovered(view: TopologyView) -> Iterable[Anomaly]:
    if UNOWNED not in view.shard_of_slot:
        return
    slots = [slot for slot, owner in enumerate(view.shard_of_slot) if owner == UNOWNED]
    yield Anomaly(
        AnomalyKind.UNCOVERED_SLOTS,
        f"no primary serves {slots_text(slots)}",
        slot_ranges=slot_ranges(slots),
        evidence={"count": len(slots)},
    )


def _disputed(view: TopologyView, strange: Sequence[_Told], names: Names) -> Iterable[Anomaly]:
    """One for each two nodes: the owner by the view, and who else has a slot by its own or another's word."""
    told: dict[tuple[str, str], tuple[set[SlotRange], list[str]]] = {}  # (owner, other) -> spans, who says so
    for witness_id, line in strange:
        for owner_id, span in _foreign(view, line.node.id, line.slot_ranges):
            spans, witnesses = told.setdefault((owner_id, line.node.id), (set(), []))
            spans.add(span)
            witnesses.append(witness_id)
    for (owner_id, other_id), (spans, witnesses) in told.items():
        slots = sorted({slot for low, high in spans for slot in range(low, high + 1)})
        seen_by = sorted(set(witnesses))
        if other_id in seen_by:
            message = f"{names[owner_id]} and {names[other_id]} both claim {slots_text(slots)}"
        else:
            verb = "takes" if len(seen_by) == 1 else "take"
            message = (
                f"{names.of(seen_by)} {verb} {names[other_id]} for the owner of {slots_text(slots)},"
                f" which {names[owner_id]} serves"
            )
        yield Anomaly(
            AnomalyKind.DISPUTED_SLOTS,
            message,
            nodes=(owner_id, other_id),
            slot_ranges=slot_ranges(slots),
            evidence={"owner_id": owner_id, "other_id": other_id, "said_by": [*seen_by]},
            subject=f"{owner_id} {other_id}",
        )


def _foreign(view: TopologyView, node_id: str, spans: Sequence[SlotRange]) -> Iterable[tuple[str, SlotRange]]:
    """(the owner by the view, span) for what a line gives to ``node_id`` and the view to somebody else."""
    owners = view.shard_of_slot
    for low, high in spans:
        for owner, first, last in _runs(owners[low : high + 1]):
            if owner != UNOWNED and (owner_id := view.shards[owner].primary.id) != node_id:
                yield owner_id, (low + first, low + last)


def _without_primary(view: TopologyView, strange: Sequence[_Told], names: Names) -> Iterable[Anomaly]:
    for shard in view.shards:
        if shard.primary.is_failing:
            for replica in shard.replicas:
                yield _orphan(replica.id, shard.primary.id, "is failing", names)
    in_view = {node.id for node in view.nodes()}
    orphans = {  # the view leaves them out, because whom they follow is no primary
        line.node.id: line.node
        for _, line in strange
        if line.node.role is Role.REPLICA and line.node.id not in in_view
    }
    for node in orphans.values():
        yield _orphan(node.id, node.primary_id or "", "is no primary", names)


def _orphan(replica_id: str, primary_id: str, why: str, names: Names) -> Anomaly:
    follows = f"{names[primary_id]}, which {why}" if primary_id else "nobody"
    return Anomaly(
        AnomalyKind.REPLICA_WITHOUT_PRIMARY,
        f"replica {names[replica_id]} follows {follows}",
        nodes=(replica_id, primary_id) if primary_id else (replica_id,),
        evidence={"replica_id": replica_id, "primary_id": primary_id or None},
        subject=replica_id,
    )


def _without_replica(view: TopologyView, names: Names) -> Iterable[Anomaly]:
    """Only primaries that own slots, and only where some shard has replicas: else it is the operator's choice."""
    if not any(shard.replicas for shard in view.shards):
        return
    owners = set(view.shard_of_slot)
    for index, shard in enumerate(view.shards):
        if index in owners and all(replica.is_failing for replica in shard.replicas):
            failing = f"; {count(len(shard.replicas), 'replica')} failing" if shard.replicas else ""
            yield Anomaly(
                AnomalyKind.SHARD_WITHOUT_REPLICA,
                f"primary {names[shard.primary.id]} has no replica that could take over{failing}",
                nodes=(shard.primary.id, *(replica.id for replica in shard.replicas)),
                evidence={"primary_id": shard.primary.id, "failing_replicas": len(shard.replicas)},
                subject=shard.primary.id,
            )


def _uneven(
    observation: Observation,
    owned: Mapping[str, tuple[SlotRange, ...]],
    names: Names,
    limits: AnomalyLimits,
) -> Iterable[Anomaly]:
    """Slots by the view. Keys and bytes only when every primary that owns slots told its own."""
    view = observation.view
    slots = {primary_id: sum(high - low + 1 for low, high in spans) for primary_id, spans in owned.items()}
    empty = {shard.primary.id: 0 for shard in view.shards if not shard.primary.is_failing}
    yield from _fullest(
        AnomalyKind.UNEVEN_SLOTS, {**empty, **slots}, "slots", limits.uneven_slots_min, names, limits
    )
    reports = {report.myself.node.id: report for report in observation.reports}
    if not set(slots) <= set(reports):
        return
    keys = {primary_id: reports[primary_id].key_count for primary_id in slots}
    used = {primary_id: reports[primary_id].used_bytes for primary_id in slots}
    for kind, told, noun, least in (
        (AnomalyKind.UNEVEN_KEYS, keys, "keys", limits.uneven_keys_min),
        (AnomalyKind.UNEVEN_BYTES, used, "bytes of memory", limits.uneven_bytes_min),
    ):
        known = {primary_id: number for primary_id, number in told.items() if number is not None}
        if len(known) == len(told):
            yield from _fullest(kind, known, noun, least, names, limits)


def _fullest(
    kind: AnomalyKind,
    amounts: Mapping[str, int],
    noun: str,
    least: int,
    names: Names,
    limits: AnomalyLimits,
) -> Iterable[Anomaly]:
    if len(amounts) < 2:
        return
    mean = sum(amounts.values()) / len(amounts)
    fullest = max(amounts, key=lambda primary_id: (amounts[primary_id], primary_id))
    amount = amounts[fullest]
    if amount < least or amount < limits.uneven_factor * mean:
        return
    emptiest = min(amounts, key=lambda primary_id: (amounts[primary_id], primary_id))
    yield Anomaly(
        kind,
        f"{names[fullest]} holds {amount} {noun}, {amount / mean:.1f} times the mean of"
        f" {len(amounts)} primaries; {names[emptiest]} holds {amounts[emptiest]}",
        nodes=(fullest, emptiest),
        evidence={
            "fullest_id": fullest,
            "amount": amount,
            "mean": round(mean, 1),
            "least": amounts[emptiest],
        },
    )


def _stuck(migrations: Sequence[MigrationRecord], names: Names) -> Iterable[Anomaly]:
    for record in migrations:
        if record.stuck_slots and record.ended_at is None:
            yield Anomaly(
                AnomalyKind.STUCK_MIGRATION,
                f"{slots_text(record.stuck_slots)} stuck on the way from {names[record.source_id]}"
                f" to {names[record.target_id]}",
                nodes=(record.source_id, record.target_id),
                slot_ranges=slot_ranges(record.stuck_slots),
                evidence={"migration": record.id, "slots": plain_ranges(slot_ranges(record.stuck_slots))},
                subject=record.id,
            )
