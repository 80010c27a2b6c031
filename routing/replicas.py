"""How each replica fares, as discovery sees it: the states that the record keeps.

A state is a fact about the cluster, not a permission: whether a replica may answer a read is proved with each reply.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from routing.cluster_nodes import Replication, Report
from routing.topology import Address, Node, TopologyView


class ReplicaState(Enum):
    ONLINE = "online"  # it follows its primary
    SYNCING = "syncing"  # it is being sent the whole data set, and answers as if it had none
    DISCONNECTED = "disconnected"  # its link to its primary is down
    UNKNOWN = "unknown"  # it has not been asked yet, in a cluster too large to ask all at once
    LOST = "lost"  # its peers or this proxy cannot reach it


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """One replica since its state changed last. The offset is of that moment: it moves on with each write."""

    node_id: str
    address: Address
    primary_id: str
    state: ReplicaState
    since: float  # Unix seconds
    replid: str = ""  # of the history that ``offset`` counts in; empty while it has not told
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """One replica as one proxy sees it now, for people. Numbers are finite. Nothing of it is in the record.

    ``address`` and ``primary_id`` are for a replica that the record does not know.
    """

    stage: str  # joining, syncing, caught_up, verified, readable or quarantined
    zone: str  # empty if it is not known
    is_connected: bool
    outstanding: int  # requests sent to it and not yet answered
    latency_seconds: float | None  # recent
    offset: int | None  # of its last sample, in the history ``replid``
    replid: str
    lag_bytes: int | None  # its primary's offset less its own; None if they are not of one history
    staleness_seconds: float | None  # how old its data is at most; None if nothing is proved
    reads_total: int  # answered by it
    mismatched_keys: Sequence[bytes]  # of a quarantined one: whose values differed from its primary's
    why_not: str  # why it is not readable; empty if it is
    verified_at: float | None  # Unix seconds
    address: Address | None = None
    primary_id: str = ""
    circuit: str = "closed"  # or open, probing, returning
    circuit_share: float = 1.0  # of the reads that it would get
    circuit_why: str = ""  # it opened last; empty if it is closed
    circuit_openings_total: int = 0


def replica_records(
    known: Mapping[str, ReplicaRecord],
    view: TopologyView,
    reports: Sequence[Report],
    lost: Collection[str],
    now: float,
) -> dict[str, ReplicaRecord]:
    """Node id -> record, of every replica in ``view``. One whose state, primary and address stand keeps its record.

    A replica that was not asked this time, in a cluster where not all are, keeps the state that is known.
    """
    told = {report.myself.node.id: report.replication for report in reports if report.replication is not None}
    records = {}
    for shard in view.shards:
        for node in shard.replicas:
            former = known.get(node.id)
            state = _state_of(node, told.get(node.id), node.id in lost, former)
            record = ReplicaRecord(node.id, node.address, shard.primary.id, state, now)
            if (replication := told.get(node.id)) is not None:
                record = replace(record, replid=replication.replid, offset=replication.offset)
            records[node.id] = former if former is not None and _is_same(former, record) else record
    return records


def _state_of(
    node: Node, replication: Replication | None, is_lost: bool, former: ReplicaRecord | None
) -> ReplicaState:
    if is_lost or node.is_failing:
        return ReplicaState.LOST
    if replication is None:
        return ReplicaState.UNKNOWN if former is None or former.state is ReplicaState.LOST else former.state
    if replication.is_syncing:
        return ReplicaState.SYNCING
    return ReplicaState.ONLINE if replication.link_up else ReplicaState.DISCONNECTED


def _is_same(some: ReplicaRecord, other: ReplicaRecord) -> bool:
    return (some.state, some.primary_id, some.address) == (other.state, other.primary_id, other.address)
