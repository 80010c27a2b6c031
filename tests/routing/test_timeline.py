"""The timeline: what happens in a cluster becomes events, each once, with what proves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.store.records import pack_event, pack_timeline, unpack_event, unpack_timeline
from routing.cluster_nodes import AtomicMigration, Replication
from routing.events import Event, EventKind, parse_filter
from routing.migrations import Stage
from routing.slot import SLOT_COUNT
from routing.timeline import advance
from routing.topology import Address, MigrationKind, Role, TopologyView
from tests.routing.cluster_model import LIMITS, Cluster, History, ident


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


@pytest.mark.parametrize("name", ["sa", "c"])
def test_a_node_that_was_reset_has_left_although_it_answers(name: str) -> None:
    """As ``redis-cli --cluster del-node`` does it: the others forget the node, and then it forgets them."""
    cluster, history = begun("a", "b", "c", "ra", "rb", "sa")
    cluster.own("b", set(cluster["c"].slots))
    history.look()
    history.settle(5.0)
    cluster[name].primary_id, cluster[name].is_reset = None, True
    event = only(history.look())
    assert (event.kind, event.nodes) == (EventKind.NODE_REMOVED, (ident(name),))
    assert "node_added" not in history.settle()


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


def test_silence_is_broken_by_an_answer_alone() -> None:
    """In a large cluster, nodes are asked in turn: not to be asked is not to have answered."""
    cluster, history = begun("a", "b", "c")
    cluster["a"].answers = False
    assert history.kinds(0.5) == []
    cluster["a"].answers = True
    for _ in range(3):
        assert history.kinds(1.0, ["b", "c"]) == []
    cluster["a"].answers = False
    assert history.kinds(0.5) == ["primary_lost"]
    cluster["a"].answers = True
    assert history.kinds(0.5, ["b", "c"]) == []
    assert history.kinds(0.5) == ["primary_recovered"]


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


def test_a_failover_that_is_seen_in_two_parts_is_no_migration() -> None:
    cluster, history = begun("a", "b", "ra", "rb")
    cluster["ra"].primary_id = None
    cluster.own("ra", range(4000))
    assert history.kinds() == ["failover"]
    cluster.own("ra", range(4000, 8192))
    event = only(history.look())
    assert (event.kind, event.slot_ranges) == (EventKind.FAILOVER, ((4000, 8191),))


def test_a_replica_that_joined_and_took_over_between_two_looks() -> None:
    """The old primary follows it by now, so it was a failover and no migration."""
    cluster, history = begun("a", "b")
    cluster.add("na", of="a")
    cluster.fail_over("a", "na", fails=False)
    assert history.kinds() == ["node_added", "failover"]


def test_who_took_its_slots_back_is_a_source_again() -> None:
    cluster, history = begun("a", "b", "ra", "rb")
    cluster.fail_over("a", "ra", fails=False)
    assert history.kinds() == ["failover"]
    cluster.fail_over("ra", "a", fails=False)
    assert history.kinds() == ["failover"]
    cluster.open(5, "a", "b")
    assert history.kinds() == ["migration_begun"]
    assert history.timeline.migrations[0].source_id == ident("a")


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


def test_slots_that_changed_hands_unseen_are_a_migration_too() -> None:
    cluster, history = begun("a", "b")
    cluster.own("b", range(10))
    found = history.look()
    assert [event.kind.value for event in found] == ["migration_begun", "migration_advanced"]
    assert found[1].message == "slots 0-9 went from 10.0.0.1:6379 to 10.0.0.2:6379: 10 slots so far, 0 open"
    assert history.settle() == ["migration_completed"]


def test_two_reshards_with_a_rest_between_are_two_migrations() -> None:
    cluster, history = begun("a", "b")
    for slot in (1, 2):
        cluster.open(slot, "a", "b")
        history.look()
        cluster.move(slot, "a", "b")
        history.look()
        assert history.settle(2.0) == ["migration_completed"]
    assert [event.migration for event in history.of(EventKind.MIGRATION_BEGUN)] == ["m-1", "m-2"]


def test_a_slot_that_comes_back_is_moved_no_more_and_may_go_again() -> None:
    cluster, history = begun("a", "b")
    cluster.own("b", {5, 6})
    history.look()
    cluster.own("a", {5})
    assert history.kinds() == ["migration_begun", "migration_advanced"]  # the way back is another migration
    there, back = history.timeline.migrations
    assert (there.moved_slots, there.returned_slots, back.moved_slots) == ((6,), (5,), (5,))
    cluster.own("b", {5})
    assert history.kinds() == ["migration_advanced"]
    there, back = history.timeline.migrations
    assert (there.moved_slots, there.returned_slots) == ((5, 6), ())
    assert (back.moved_slots, back.returned_slots) == ((), (5,))
    assert sorted(history.settle(2.0)) == ["migration_abandoned", "migration_completed"]


def test_a_migration_that_moved_nothing_is_abandoned() -> None:
    cluster, history = begun("a", "b")
    cluster.open(5, "a", "b")
    assert history.kinds() == ["migration_begun"]
    cluster.close(5, "a", "b")
    assert history.kinds() == []
    event = only(history.look(0.7))
    assert event.kind is EventKind.MIGRATION_ABANDONED
    assert event.message == (
        "the migration from 10.0.0.1:6379 to 10.0.0.2:6379 ended and moved nothing: slot 5 stayed"
    )
    (record,) = history.last.migrations
    assert (record.stage, record.ended_at, record.returned_slots) == (
        Stage.ABANDONED,
        pytest.approx(1000.3),
        (5,),
    )


def test_an_open_slot_without_progress_is_stuck_and_named() -> None:
    cluster, history = begun("a", "b")
    cluster.open(5, "a", "b")
    cluster["a"].keys[5], cluster["b"].keys[5] = 9, 1
    history.look()
    for _ in range(8):
        cluster["a"].keys[5] -= 1  # slow, but it moves
        assert history.settle(10) == []
    assert history.settle(19.5) == []
    event = only(history.look(1.0))
    assert event.kind is EventKind.MIGRATION_STUCK
    assert event.message == (
        "slot 5 is stuck on the way from 10.0.0.1:6379 (1 key) to 10.0.0.2:6379 (1 key): no progress for 30 s"
    )
    (detail,) = event.evidence["slots"]  # type: ignore[misc, union-attr]
    assert detail == {
        "slot": 5,
        "keys_at_source": 1,
        "keys_at_target": 1,
        "open_at_source": True,
        "open_at_target": True,
        "since": event.evidence["since"],
    }
    assert "migration_stuck" not in history.settle(60)
    cluster["a"].keys[5] = 0
    assert history.kinds() == ["migration_resumed"]


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ("migrating", "; only 10.0.0.2:6379 shows it open"),
        ("importing", "; only 10.0.0.1:6379 shows it open"),
    ],
)
def test_a_half_open_slot_is_named_as_such(closed: str, words: str) -> None:
    cluster, history = begun("a", "b")
    cluster.open(5, "a", "b")
    (cluster["a"].migrating if closed == "migrating" else cluster["b"].importing).clear()
    history.look()
    history.settle(31)
    (event,) = history.of(EventKind.MIGRATION_STUCK)
    assert event.message.endswith(words)


def test_one_slot_that_is_left_behind_is_stuck_while_others_move() -> None:
    cluster, history = begun("a", "b")
    cluster.open(500, "a", "b")
    for slot in range(40):
        cluster.open(slot, "a", "b")
        history.look(0.5)
        cluster.move(slot, "a", "b")
        history.look(0.5)
    (event,) = history.of(EventKind.MIGRATION_STUCK)
    assert event.slot_ranges == ((500, 500),)


def test_slots_whose_keys_nobody_counts_are_stuck_when_all_are() -> None:
    """Many slots opened at once wait for their turn; only the first few are counted."""
    cluster, history = begun("a", "b")
    for slot in range(60):
        cluster.open(slot, "a", "b")
    for slot in range(50):
        observation = replace(history.observe(), keys_in_slot={})
        history.last = advance(history.timeline, observation, LIMITS)
        history.timeline = history.last.timeline
        assert not any(event.kind is EventKind.MIGRATION_STUCK for event in history.last.events)
        cluster.move(slot, "a", "b")
        history.at += 1.0
    history.at += 31.0
    last = advance(history.timeline, replace(history.observe(), keys_in_slot={}), LIMITS)
    assert not last.timeline.migrations[0].is_stuck  # slot 49 has just moved
    later = replace(history.observe(), at=history.at + 31.0, keys_in_slot={})
    assert advance(last.timeline, later, LIMITS).timeline.migrations[0].stuck_slots == tuple(range(50, 60))


@pytest.mark.parametrize(("side", "old", "new"), [("source", "a", "ra"), ("target", "b", "rb")])
def test_a_migration_goes_on_when_one_of_its_ends_fails_over(side: str, old: str, new: str) -> None:
    """One record, which follows the new primary. The failover itself is no migration."""
    cluster, history = begun("a", "b", "ra", "rb")
    cluster.open(5, "a", "b")
    history.look()
    cluster.fail_over(old, new, fails=True)
    assert history.kinds() == ["primary_lost", "failover", "migration_advanced"]
    (record,) = history.timeline.migrations
    assert {record.source_id, record.target_id} & {ident(new)}
    assert record.stages[-1].evidence["failover_of"] == side
    source, target = ("ra", "b") if side == "source" else ("a", "rb")
    if side == "source":
        cluster["ra"].migrating[5] = ident("b")
    cluster.move(5, source, target)
    history.look()
    assert history.settle(1.0) == ["migration_completed"]
    assert len(history.of(EventKind.MIGRATION_BEGUN)) == 1


def test_an_end_that_does_not_answer_does_not_close_a_slot() -> None:
    """In a large cluster, nodes are asked in turn, and an open slot is told by its two ends alone."""
    cluster, history = begun("a", "b", "c")
    cluster.open(5, "a", "b")
    assert history.kinds() == ["migration_begun"]
    for asked in (["c"], ["c"], ["a", "c"], ["c"], ["c"], ["b", "c"]):
        assert history.kinds(0.7, asked) == []
    assert history.timeline.migrations[0].open_slots == (5,)
    cluster.close(5, "a", "b")
    for asked in (["c"], ["a", "b"], ["c"]):
        assert history.kinds(0.3, asked) == []
    assert history.kinds(0.4, ["c"]) == ["migration_abandoned"]


# -- atomic migrations


def job(state: str, name: str = "j1", low: int = 0, high: int = 9, at: int = 1000) -> AtomicMigration:
    return AtomicMigration(name, ((low, high),), ident("a"), ident("b"), state, created_at=at, updated_at=at)


def test_an_atomic_migration_from_its_first_state_to_its_last() -> None:
    cluster, history = begun("a", "b")
    told: list[str] = []
    for state in ("snapshotting", "streaming", "failover-granted"):
        cluster["a"].running = [job(state)]
        cluster["b"].running = [job("receiving-" + state)]  # the target names its states differently
        told += [event.message.rpartition(" ")[2] for event in history.look()]
    assert told == ["begins", "streaming", "failover-granted"]
    cluster.own("b", range(10))
    cluster["b"].running, cluster["b"].finished = [], [job("success")]
    assert history.kinds() == ["migration_advanced"]  # the slots; the source has not heard yet
    cluster["a"].running, cluster["a"].finished = [], [job("success")]
    assert history.kinds() == ["migration_advanced"]
    assert history.settle() == ["migration_completed"]
    record = history.of(EventKind.MIGRATION_COMPLETED)[0]
    assert record.evidence["kind"] == "atomic"
    assert record.evidence["moved_count"] == 10
    assert record.evidence["jobs"] == [{"job": "j1", "state": "success", "message": None}]


def test_a_job_that_began_and_ended_between_two_looks_is_told_once() -> None:
    """Also when the two ends are asked at different times, and after a restart from what was stored."""
    cluster, history = begun("a", "b", "c")
    cluster.own("b", range(10))
    cluster["a"].finished = cluster["b"].finished = [job("success")]
    assert history.kinds(asked=["a", "c"]) == ["migration_begun", "migration_advanced", "migration_advanced"]
    assert history.timeline.migrations[0].kind is MigrationKind.ATOMIC
    history.restart(unpack_timeline(pack_timeline(history.timeline)))
    assert history.settle(2.0) == ["migration_completed"]
    for asked in (["b"], ["a"], ["a", "b"], ["c"]):
        assert history.kinds(asked=asked) == []
    cluster["a"].finished = [job("failed", "j2", 50, 50), *cluster["a"].finished]
    history.restart(unpack_timeline(pack_timeline(history.timeline)))
    assert history.kinds() == ["migration_begun", "migration_advanced"]
    assert history.settle(2.0) == ["migration_abandoned"]
    assert history.of(EventKind.MIGRATION_ABANDONED)[0].evidence["returned_slots"] == [[50, 50]]
    assert len(history.of(EventKind.MIGRATION_BEGUN)) == 2


def test_jobs_that_ended_before_the_cluster_was_first_seen_are_history() -> None:
    cluster = Cluster("a", "b", "c")
    cluster["a"].finished = [job("success", at=900)]
    history = History(cluster)
    assert history.kinds(asked=["b", "c"]) == ["cluster_seen"]
    assert history.settle(3.0) == []


def test_a_job_whose_time_of_update_stands_still_is_stuck() -> None:
    cluster, history = begun("a", "b")
    for at in range(1000, 1060, 10):  # a long snapshot, which the target acknowledges
        cluster["a"].running = [job("snapshotting", at=at)]
        history.settle(10)
    assert not history.of(EventKind.MIGRATION_STUCK)
    assert "migration_stuck" in history.settle(30)
    cluster["a"].running = [job("streaming", at=1100)]
    assert history.kinds() == ["migration_advanced", "migration_resumed"]


# -- any history

Act = tuple[str, int, int, float]  # what, two numbers that choose whom and which slot, seconds until the look

ACTS = (
    "open",
    "close",
    "move",
    "move_many",
    "take_back",
    "crash_over",
    "hand_over",
    "stop",
    "start",
    "uncover",
    "cover",
    "add",
    "remove",
    "reassign",
    "readdress",
    "job",
)
HISTORIES = st.lists(
    st.tuples(
        st.sampled_from(ACTS),
        st.integers(0, 5),
        st.integers(0, 5),
        st.sampled_from([0.05, 0.3, 0.7, 2.5, 6.0, 40.0]),
    ),
    min_size=1,
    max_size=10,
)


def perform(cluster: Cluster, act: Act) -> None:
    """Do it to the cluster, if it can be done. It may be nothing."""
    what, one, two, _ = act
    primaries = [name for name, server in cluster.servers.items() if not server.primary_id and server.answers]
    source, target = primaries[one % len(primaries)], primaries[two % len(primaries)]
    slots = sorted(cluster[source].slots)
    slot = slots[two % len(slots)] if slots else 0
    replicas = [name for name, server in cluster.servers.items() if server.primary_id and server.answers]
    replica = replicas[one % len(replicas)] if replicas else ""
    followers = [name for name in replicas if cluster[name].primary_id == cluster[source].id]
    match what:
        case "open" if source != target and slots:
            cluster.open(slot, source, target)
        case "close":
            for opened in list(cluster[source].migrating):
                cluster.close(opened, source, target)
        case "move" if source != target and slots:
            cluster.move(slot, source, target)
        case "move_many" if source != target:
            cluster.own(target, slots[: 100 * two])
        case "take_back" if source != target:
            cluster.own(source, sorted(cluster[target].slots)[:two])
        case "crash_over" | "hand_over" if followers and slots:
            cluster.fail_over(source, followers[0], fails=what == "crash_over")
        case "stop" if replica:
            server = cluster[replica]
            server.answers, server.is_failing, server.is_linked = False, bool(two % 2), False
        case "start":
            for server in cluster.servers.values():
                server.answers, server.is_failing, server.is_linked = True, False, True
        case "uncover":
            cluster[source].slots -= {slot, slot + 1}
        case "cover":
            served = set().union(*(server.slots for server in cluster.servers.values()))
            cluster.own(source, set(range(SLOT_COUNT)) - served)
        case "add" if len(cluster.servers) < 9:
            cluster.add(f"x{cluster.epoch}", of=source)
        case "remove" if replica:
            del cluster.servers[replica]
        case "reassign" if replica:
            cluster[replica].primary_id = cluster[source].id
        case "readdress":
            cluster[source].address = Address("10.9.9.9", 7000 + two)
        case "job" if source != target and slots:
            name = f"job-{cluster.epoch}-{len(cluster[source].finished)}"
            done = AtomicMigration(name, ((slot, slot),), cluster[source].id, cluster[target].id, "success")
            cluster.move(slot, source, target)
            cluster[source].finished = [done, *cluster[source].finished]
        case _:
            pass


def played(acts: list[Act], restart_after: int | None = None) -> tuple[History, list[tuple[Event, ...]]]:
    """The history of these acts, and the events of each look; with a restart from the store after one of them."""
    cluster = Cluster("a", "b", "c", "ra", "rb", "rc", "sa")
    history = History(cluster)
    looks = [history.look()]
    for step, act in enumerate(acts):
        perform(cluster, act)
        looks.append(history.look(act[3]))
        if step == restart_after:
            history.restart(unpack_timeline(pack_timeline(history.timeline)))
    return history, looks


@settings(max_examples=12, deadline=None)
@given(HISTORIES)
def test_what_begins_ends_once(acts: list[Act]) -> None:
    """Migrations, losses, uncovered slots and anomalies: each is told of in turn with its end."""
    history, _ = played(acts)
    for _ in range(5):  # longer than anything needs that ends by itself
        history.look(2.0)
    lost: set[str] = set()
    uncovered: set[int] = set()
    wrong: set[tuple[object, object]] = set()
    running: set[str] = set()
    begun_ids: set[str] = set()
    for event in history.events:
        slots = {slot for low, high in event.slot_ranges for slot in range(low, high + 1)}
        match event.kind:
            case EventKind.PRIMARY_LOST | EventKind.REPLICA_LOST:
                assert event.nodes[0] not in lost
                lost.add(event.nodes[0])
            case EventKind.PRIMARY_RECOVERED | EventKind.REPLICA_RECOVERED:
                lost.remove(event.nodes[0])
            case EventKind.NODE_REMOVED:
                lost.discard(event.nodes[0])
            case EventKind.SLOTS_UNCOVERED:
                assert slots.isdisjoint(uncovered)
                uncovered |= slots
            case EventKind.SLOTS_COVERED:
                assert slots <= uncovered
                uncovered -= slots
            case EventKind.ANOMALY_FOUND | EventKind.ANOMALY_GONE:
                wrong ^= {(event.evidence["anomaly"], event.evidence["subject"])}
            case EventKind.MIGRATION_BEGUN:
                assert event.migration not in begun_ids
                begun_ids.add(event.migration)
                running.add(event.migration)
            case EventKind.MIGRATION_COMPLETED | EventKind.MIGRATION_ABANDONED:
                running.remove(event.migration)
            case _ if event.migration:
                assert event.migration in running
    assert lost == {*history.timeline.lost}
    assert uncovered == {slot for slot in range(SLOT_COUNT) if history.known.view.primary_of(slot) is None}
    assert running == {record.id for record in history.timeline.migrations}
    assert len(begun_ids) == history.timeline.migration_count
    assert wrong == {(anomaly.kind.value, anomaly.subject) for anomaly in history.last.anomalies}
    for record in history.timeline.migrations:
        assert record.open_slots


@settings(max_examples=8, deadline=None)
@given(HISTORIES, st.integers(0, 9))
def test_a_restart_from_the_store_changes_no_event(acts: list[Act], after: int) -> None:
    assert played(acts)[1] == played(acts, after)[1]


@settings(max_examples=12, deadline=None)
@given(HISTORIES)
def test_each_difference_between_views_is_told_and_nothing_else(acts: list[Act]) -> None:
    cluster = Cluster("a", "b", "c", "ra", "rb", "rc", "sa")
    history = History(cluster)
    history.look()
    for act in acts:
        perform(cluster, act)
        before = history.timeline
        old = before.view
        events = history.look(act[3])
        new = history.timeline.view
        told = {
            slot
            for event in events
            for low, high in event.slot_ranges
            for slot in range(low, high + 1)
            if event.kind in SLOT_KINDS
        }
        assert told >= {slot for slot in range(SLOT_COUNT) if owner(old, slot) != owner(new, slot)}
        members = {node.id for node in (*old.nodes(), *before.hidden)}
        joined = {server.id for server in cluster.servers.values()} - members
        left = members - {server.id for server in cluster.servers.values()}
        assert {event.nodes[0] for event in events if event.kind is EventKind.NODE_ADDED} == joined
        assert {event.nodes[0] for event in events if event.kind is EventKind.NODE_REMOVED} == left
        named = {node for event in events for node in event.nodes}
        was = {node.id: (node.address, node.role) for node in old.nodes()}
        for node in new.nodes():
            assert was.get(node.id) in (None, (node.address, node.role)) or node.id in named
        assert history.look(0.0) == ()  # the same again is no news
        for event in events:
            json.dumps(event.evidence)
            assert unpack_event(event.number, pack_event(event)) == event


SLOT_KINDS = (
    EventKind.FAILOVER,
    EventKind.MIGRATION_ADVANCED,
    EventKind.SLOTS_COVERED,
    EventKind.SLOTS_UNCOVERED,
    EventKind.NODE_REMOVED,
)


def owner(view: TopologyView, slot: int) -> str | None:
    primary = view.primary_of(slot)
    return None if primary is None else primary.id


# -- filters


def test_filters() -> None:
    event = Event(
        EventKind.MIGRATION_STUCK, 1.0, "", nodes=("abcdef", "123456"), slot_ranges=((5, 9), (20, 20))
    )
    for kinds, shard, slot, fits in (
        ([], "", "", True),
        (["migration_*"], "", "", True),
        (["failover,migration_stuck"], "", "", True),
        (["failover", "slots_*"], "", "", False),
        ([], "1234", "", True),
        ([], "ABCDE", "", True),
        ([], "ffff", "", False),
        ([], "", "20", True),
        ([], "", "10", False),
        (["migration_*"], "abcd", "10", False),
    ):
        assert parse_filter(kinds, shard, slot).matches(event) is fits


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (lambda: parse_filter(["migration"]), "migration_begun"),
        (lambda: parse_filter([], "abc"), "at least the first 4"),
        (lambda: parse_filter([], "xyzw"), "is not a node id"),
        (lambda: parse_filter([], "", "16384"), "from 0 to 16383"),
        (lambda: parse_filter([], "", "-1"), "from 0 to 16383"),
        (lambda: parse_filter([], "", "9" * 5000), "from 0 to 16383"),
        (lambda: parse_filter(["*" * 65]), "up to 64 characters"),
    ],
)
def test_a_filter_that_cannot_be_says_what_can(parse: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        parse()
