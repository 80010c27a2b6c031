"""Anomalies: what is wrong with a cluster is named, and what passes by itself is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.anomalies import Anomaly, AnomalyKind, AnomalyLimits, find_anomalies, track
from routing.cluster_nodes import AtomicMigration
from routing.events import EventKind
from routing.timeline import Timeline, advance
from tests.routing.cluster_model import Cluster, History, ident

LIMITS = AnomalyLimits()


def found(cluster: Cluster) -> dict[str, Anomaly]:
    """What is wrong at this moment, by kind; a kind twice would be a surprise."""
    anomalies = find_anomalies(History(cluster).observe(), (), LIMITS)
    assert len({anomaly.kind for anomaly in anomalies}) == len(anomalies)
    return {anomaly.kind.value: anomaly for anomaly in anomalies}


def test_a_sound_cluster_has_none() -> None:
    assert found(Cluster("a", "b", "c", "ra", "rb", "rc")) == {}
    assert found(Cluster("a", "b", "c")) == {}  # no shard has a replica: that is somebody's choice


def test_slots_that_nobody_serves() -> None:
    cluster = Cluster("a", "b")
    cluster["a"].slots -= {7, 8, 100}
    anomaly = found(cluster)["uncovered_slots"]
    assert anomaly.message == "no primary serves 3 slots (7-8, 100)"
    assert anomaly.slot_ranges == ((7, 8), (100, 100))


def test_two_nodes_that_both_claim_a_slot() -> None:
    cluster = Cluster("a", "b")
    cluster["b"].slots |= {3}  # b has the higher epoch, so the view gives it the slot
    anomaly = found(cluster)["disputed_slots"]
    assert anomaly.message == "10.0.0.2:6379 and 10.0.0.1:6379 both claim slot 3"
    assert (anomaly.nodes, anomaly.slot_ranges) == ((ident("b"), ident("a")), ((3, 3),))


def test_a_node_that_takes_another_for_the_owner() -> None:
    """A replica's stale view that lasts: it refuses reads, and clients that ask it go astray."""
    cluster = Cluster("a", "b", "ra", "rb")
    history = History(cluster)
    stale = cluster.reports(["ra"])
    cluster.own("b", {3})
    observation = history.observe(["a", "b", "rb"])
    (anomaly,) = find_anomalies(
        type(observation)(1.0, observation.view, (*observation.reports, *stale)), (), LIMITS
    )
    assert anomaly.kind is AnomalyKind.DISPUTED_SLOTS
    assert anomaly.message == (
        "10.0.0.3:6379 takes 10.0.0.1:6379 for the owner of slot 3, which 10.0.0.2:6379 serves"
    )
    assert anomaly.evidence["said_by"] == [ident("ra")]


def test_a_replica_whose_primary_is_failing() -> None:
    cluster = Cluster("a", "b", "ra", "rb")
    cluster["a"].is_failing, cluster["a"].answers = True, False
    anomaly = found(cluster)["replica_without_primary"]
    assert anomaly.message == "replica 10.0.0.3:6379 follows 10.0.0.1:6379, which is failing"


def test_a_replica_that_follows_a_replica() -> None:
    cluster = Cluster("a", "b", "ra", "rb", "sa")
    cluster["sa"].primary_id = ident("ra")
    anomaly = found(cluster)["replica_without_primary"]
    assert anomaly.message == "replica 10.0.0.5:6379 follows 10.0.0.3:6379, which is no primary"


def test_a_shard_whose_only_replica_fails() -> None:
    cluster = Cluster("a", "b", "ra", "rb")
    cluster["ra"].is_failing, cluster["ra"].answers = True, False
    anomaly = found(cluster)["shard_without_replica"]
    assert anomaly.subject == ident("a")
    assert anomaly.message == ("primary 10.0.0.1:6379 has no replica that could take over; 1 replica failing")


@pytest.mark.parametrize(("slots", "is_uneven"), [(10_900, False), (10_930, True)])
def test_slots_are_uneven_from_twice_the_mean(slots: int, is_uneven: bool) -> None:
    """The mean of three primaries is 5,461."""
    cluster = Cluster("a", "b", "c")
    cluster.own("a", range(slots))
    cluster.own("b", range(slots, slots + 100))
    assert ("uneven_slots" in found(cluster)) is is_uneven


@pytest.mark.parametrize(
    ("fullest", "is_uneven"),
    [(99_999, False), (100_000, True)],  # below 100,000 keys nothing matters
)
def test_keys_are_uneven_only_when_there_are_many(fullest: int, is_uneven: bool) -> None:
    cluster = Cluster("a", "b", "c")
    for name, keys in (("a", fullest), ("b", 10), ("c", 10)):
        cluster[name].key_count = keys
    assert ("uneven_keys" in found(cluster)) is is_uneven


def test_keys_and_bytes_are_judged_only_when_all_are_known() -> None:
    cluster = Cluster("a", "b", "c")
    for name, used in (("a", 2**30), ("b", 2**20), ("c", 2**20)):
        cluster[name].used_bytes = used
    anomaly = found(cluster)["uneven_bytes"]
    assert anomaly.nodes[0] == ident("a")
    assert anomaly.evidence["amount"] == 2**30
    cluster["c"].used_bytes = None
    assert found(cluster) == {}
    cluster["c"].answers = False
    assert found(cluster) == {}


# -- what lasts


def test_a_state_counts_once_it_lasts_and_goes_once_it_is_gone_for_as_long() -> None:
    cluster = Cluster("a", "b", "ra", "rb")
    history = History(cluster)
    history.look()
    cluster["rb"].primary_id = ident("ra")
    history.look()
    assert history.last.anomalies == ()
    assert history.kinds(1.9) == []
    assert history.kinds(0.2) == ["anomaly_found", "anomaly_found"]  # b has no replica, and rb no primary
    assert [anomaly.kind.value for anomaly in history.last.anomalies] == [
        "replica_without_primary",
        "shard_without_replica",
    ]
    assert history.last.anomalies[0].since == pytest.approx(1000.2)
    assert history.settle(10) == []
    cluster["rb"].primary_id = ident("b")
    history.look()
    assert len(history.last.anomalies) == 2  # it may be back at once
    assert history.kinds(2.1) == ["anomaly_gone", "anomaly_gone"]
    assert history.last.anomalies == ()
    assert history.of(EventKind.ANOMALY_GONE)[0].message.startswith("no more, after ")


def test_what_flickers_is_neither_found_nor_gone_again_and_again() -> None:
    cluster = Cluster("a", "b", "ra", "rb")
    history = History(cluster)
    history.look()
    kinds = []
    for step in range(40):
        cluster["rb"].primary_id = ident("ra") if step % 2 else ident("b")
        kinds += history.kinds(1.0)
    assert "anomaly_found" not in kinds


def test_slots_that_nobody_serves_count_at_once() -> None:
    cluster = Cluster("a", "b")
    cluster["a"].slots -= {7}
    history = History(cluster)
    assert history.kinds() == ["cluster_seen", "slots_uncovered", "anomaly_found"]


def test_a_dispute_lasts_only_while_the_same_slot_is_disputed() -> None:
    """Slots that move one by one are disputed one by one, until the gossip is through."""

    def dispute(slot: int, at: float) -> Anomaly:
        return Anomaly(
            AnomalyKind.DISPUTED_SLOTS, "", slot_ranges=((slot, slot + 1),), since=at, subject="a b"
        )

    states = track((), [dispute(0, 0.0)], 0.0, 1, 2.0).states
    for step in range(1, 20):
        tracked = track(states, [dispute(2 * step, 0.5 * step)], 0.5 * step, 1, 2.0)
        assert tracked.events == ()
        states = tracked.states
    lasting = [track(states, [dispute(38, at)], at, 1, 2.0) for at in (10.0, 11.5)]
    assert [len(tracked.events) for tracked in lasting] == [0, 1]


def test_a_migration_that_is_stuck_is_an_anomaly_until_it_moves() -> None:
    cluster = Cluster("a", "b", "ra", "rb")
    history = History(cluster)
    cluster.open(5, "a", "b")
    history.look()
    assert history.settle(29.5) == []
    assert history.kinds(1.0) == ["migration_stuck"]
    assert history.settle(2.0) == ["anomaly_found"]
    (anomaly,) = history.last.anomalies
    assert anomaly.message == "slot 5 stuck on the way from 10.0.0.1:6379 to 10.0.0.2:6379"
    cluster.move(5, "a", "b")
    assert set(history.settle(5.0)) == {
        "migration_advanced",
        "migration_resumed",
        "migration_completed",
        "anomaly_gone",
    }


def test_a_migration_becomes_an_anomaly_while_every_answer_stays_the_same() -> None:
    """What the last look found is taken for this one's only when nothing it depends on has changed."""
    cluster = Cluster("a", "b", "ra", "rb")
    history = History(cluster)
    cluster.open(5, "a", "b")
    first = history.observe()
    timeline = Timeline()
    for seconds in (0, 1, 31, 34):
        last = advance(timeline, replace(first, at=first.at + seconds), history.limits)
        timeline = last.timeline
    assert [anomaly.kind for anomaly in last.anomalies] == [AnomalyKind.STUCK_MIGRATION]


def test_an_atomic_job_is_no_reason_for_a_dispute() -> None:
    cluster = Cluster("a", "b")
    job = AtomicMigration("job", ((0, 9),), ident("a"), ident("b"), "snapshotting")
    cluster["a"].running = [job]
    assert found(cluster) == {}
