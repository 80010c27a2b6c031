"""A replica's record changes when its state does, and says what was seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.cluster_nodes import NodeLine, Replication, Report
from routing.replicas import ReplicaRecord, ReplicaState, replica_records
from routing.slot import SLOT_COUNT
from routing.topology import Address, Node, Role, Shard, TopologyView

PRIMARY = Node("a" * 40, Address("a", 1), Role.PRIMARY)
REPLICA = Node("b" * 40, Address("b", 2), Role.REPLICA, PRIMARY.id)
VIEW = TopologyView(1, 1, (Shard(PRIMARY, (REPLICA,)),), (0,) * SLOT_COUNT)
TOLD = Replication(Role.REPLICA, 100, "r1")


def states(
    known: dict[str, ReplicaRecord], told: Replication | None, now: float, *, is_lost: bool = False
) -> dict[str, ReplicaRecord]:
    reports = [Report(NodeLine(REPLICA), (), 1, True, replication=told)] if told is not None else []
    return replica_records(known, VIEW, reports, {REPLICA.id} if is_lost else (), now)


@pytest.mark.parametrize(
    ("told", "state"),
    [
        (TOLD, ReplicaState.ONLINE),
        (replace(TOLD, is_syncing=True, link_up=False), ReplicaState.SYNCING),
        (replace(TOLD, link_up=False), ReplicaState.DISCONNECTED),
        (None, ReplicaState.UNKNOWN),
    ],
)
def test_the_state_is_what_the_replica_tells(told: Replication | None, state: ReplicaState) -> None:
    record = states({}, told, 5.0)[REPLICA.id]
    assert (record.state, record.since, record.primary_id) == (state, 5.0, PRIMARY.id)


def test_a_record_stands_while_the_state_does() -> None:
    """Offsets move on with each write: they alone write nothing."""
    first = states({}, TOLD, 5.0)
    assert states(first, replace(TOLD, offset=900), 6.0) == first
    assert states(first, None, 7.0) == first  # not asked this time
    lost = states(first, None, 8.0, is_lost=True)
    assert lost[REPLICA.id].state is ReplicaState.LOST
    back = states(lost, replace(TOLD, offset=950), 9.0)[REPLICA.id]
    assert (back.state, back.since, back.offset) == (ReplicaState.ONLINE, 9.0, 950)


def test_a_replica_that_left_has_no_record() -> None:
    known = states({}, TOLD, 5.0)
    assert replica_records(known, replace(VIEW, shards=(Shard(PRIMARY),)), (), (), 6.0) == {}
