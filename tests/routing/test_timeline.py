"""The timeline: what happens in a cluster becomes events, each once, with what proves it."""

from __future__ import annotations

from routing.cluster_nodes import Replication
from routing.events import Event, EventKind
from routing.topology import Address, Role
from tests.routing.cluster_model import Cluster, History, ident


def begun(*names: str) -> tuple[Cluster, History]:
    """A cluster that has been seen, and its history."""
    cluster = Cluster(*names)
    history = History(cluster)
    assert history.kinds() == ["cluster_seen"]
    return cluster, history


def only(events: tuple[Event, ...]) -> Event:
    (event,) = events
    return event


# -- the cluster and its nodes


def test_a_cluster_that_is_seen_for_the_first_time() -> None:
    cluster = Cluster("a", "b", "ra")
    event = only(History(cluster).look())
    assert event.kind is EventKind.CLUSTER_SEEN
    assert event.message == "the cluster is seen for the first time: 2 primaries and 1 replica at epoch 3"
    assert set(event.nodes) == {ident("a"), ident("b"), ident("ra")}
    assert event.shards == (ident("a"), ident("b"))


def test_nothing_happens_while_nothing_changes() -> None:
    _, history = begun("a", "b", "ra", "rb")
    assert history.settle(20) == []


def test_a_node_joins_and_leaves() -> None:
    cluster, history = begun("a", "b", "ra", "rb")
    cluster.add("sa", of="a")
    event = only(history.look())
    assert (event.kind, event.nodes, event.shards) == (
        EventKind.NODE_ADDED,
        (ident("sa"),),
        (ident("a"),),
    )
    assert event.message == "10.0.0.5:6379 joined the cluster as a replica of 10.0.0.1:6379"
    del cluster.servers["sa"]
    event = only(history.look())
    assert event.kind is EventKind.NODE_REMOVED
    assert event.message == "10.0.0.5:6379 left the cluster; it was a replica of 10.0.0.1:6379"
    assert history.settle() == []


def test_a_node_with_a_new_address() -> None:
    cluster, history = begun("a", "b")
    cluster["b"].address = Address("10.1.1.1", 7000)
    event = only(history.look())
    assert event.kind is EventKind.NODE_ADDRESS_CHANGED
    assert event.message == "10.0.0.2:6379 is reached at 10.1.1.1:7000 now"


def test_another_cluster_in_place_of_the_known_one() -> None:
    _, history = begun("a", "b", "ra", "rb")
    history.cluster = Cluster("c", "d", "rc", "rd")
    assert history.kinds() == ["cluster_replaced"]
    assert history.settle() == []


def test_nobody_looked_for_a_while() -> None:
    _, history = begun("a", "b")
    assert history.kinds(5.0) == []
    event = only(history.look(5.1))
    assert event.kind is EventKind.OBSERVATION_GAP
    assert event.evidence["seconds"] == 5.1


def test_a_replica_is_lost_at_once_when_flagged_and_recovers() -> None:
    cluster, history = begun("a", "b", "ra", "rb")
    cluster["ra"].answers, cluster["ra"].is_failing = False, True
    event = only(history.look())
    assert (event.kind, event.nodes, event.shards) == (
        EventKind.REPLICA_LOST,
        (ident("ra"),),
        (ident("a"),),
    )
    assert event.message == (
        "replica 10.0.0.3:6379 of 10.0.0.1:6379 is lost:"
        " 3 nodes of 3 asked flag it as failing (connection refused)"
    )
    assert history.kinds() == []
    cluster["ra"].answers, cluster["ra"].is_failing = True, False
    event = only(history.look(2.0))
    assert event.kind is EventKind.REPLICA_RECOVERED
    assert event.message == "10.0.0.3:6379 is back as replica of 10.0.0.1:6379 after 2.1 s"


def test_a_node_that_its_peers_reach_is_lost_only_after_a_long_silence() -> None:
    cluster, history = begun("a", "b")
    cluster["a"].answers = False
    kinds = {round(step * 0.5, 1): history.kinds(0.5) for step in range(1, 9)}
    assert [at for at, found in kinds.items() if found] == [3.5]  # the first at which it was silent, and 3 s
    assert kinds[3.5] == ["primary_lost"]
    cluster["a"].answers = True
    assert history.kinds() == ["primary_recovered"]


def test_a_node_without_links_is_lost_within_half_a_second() -> None:
    cluster, history = begun("a", "b")
    cluster["a"].answers, cluster["a"].is_linked = False, False
    assert history.kinds(0.2) == []
    assert history.kinds(0.3) == []
    assert history.kinds(0.2) == ["primary_lost"]


def test_a_replica_follows_another_primary() -> None:
    cluster, history = begun("a", "b", "ra", "rb", "sa")
    cluster["sa"].primary_id = ident("b")
    event = only(history.look())
    assert event.kind is EventKind.REPLICA_REASSIGNED
    assert event.message == "10.0.0.5:6379 follows 10.0.0.2:6379 now; it followed 10.0.0.1:6379"


# -- failover


def test_a_failover_after_a_crash() -> None:
    cluster, history = begun("a", "b", "ra", "rb")
    cluster["ra"].replication = Replication(Role.PRIMARY, 500, "new", "old", 480)
    cluster["a"].answers, cluster["a"].is_failing, cluster["a"].is_linked = False, True, False
    event = only(history.look())
    assert event.kind is EventKind.PRIMARY_LOST
    assert event.slot_ranges == ((0, 8191),)
    cluster.fail_over("a", "ra", fails=True)
    event = only(history.look())
    assert event.kind is EventKind.FAILOVER
    assert event.message == (
        "10.0.0.3:6379 took 8192 slots over from 10.0.0.1:6379, which failed (failover, epoch 1 -> 5)"
    )
    assert event.nodes == (ident("ra"), ident("a"))
    assert event.evidence["old_failed"] is True
    assert event.evidence["offset"] == 500
    assert event.evidence["second_offset"] == 480
    assert (event.evidence["epoch_before"], event.evidence["epoch_after"]) == (4, 5)
    assert history.settle(1.0) == []  # the old primary is hidden from the view and no member less
    server = cluster["a"]
    server.answers, server.is_failing, server.is_linked, server.primary_id = True, False, True, ident("ra")
    assert history.kinds() == ["replica_recovered"]


def test_a_failover_by_command() -> None:
    cluster, history = begun("a", "b", "ra", "rb", "sa")
    cluster.fail_over("a", "ra", fails=False)
    event = only(history.look())
    assert event.kind is EventKind.FAILOVER
    assert "which lives: it was asked to" in event.message
    assert event.evidence["old_failed"] is False
    assert history.settle() == []


# -- uncovered slots


def test_slots_that_nobody_serves() -> None:
    cluster, history = begun("a", "b")
    cluster["a"].slots -= {5, 6}
    found = history.look()
    assert [event.kind.value for event in found] == ["slots_uncovered", "anomaly_found"]
    assert found[0].message == "no primary serves slots 5-6; 10.0.0.1:6379 had them"
    cluster.own("b", {5, 6})
    assert history.kinds() == ["slots_covered", "anomaly_gone"]


# -- migrations


def test_a_reshard_slot_by_slot_is_one_migration() -> None:
    cluster, history = begun("a", "b", "ra", "rb")
    for slot in range(20):
        cluster.open(slot, "a", "b")
        history.look(0.05)
        if slot % 3:  # sometimes nobody looks between two slots
            cluster.move(slot, "a", "b")
            history.look(0.05)
        else:
            cluster.move(slot, "a", "b")
    assert history.settle() == ["migration_completed"]
    assert len(history.of(EventKind.MIGRATION_BEGUN)) == 1
    assert history.timeline.migrations == ()
    event = history.of(EventKind.MIGRATION_COMPLETED)[0]
    assert event.evidence["moved_slots"] == [[0, 19]]
    assert event.slot_ranges == ((0, 19),)
    assert event.message.startswith("slots 0-19 went from 10.0.0.1:6379 to 10.0.0.2:6379 in ")
