"""CLUSTER NODES as five engines were seen to write it, with open slots, host names and failing nodes."""

from __future__ import annotations

import re
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.cluster_nodes import (
    AtomicMigration,
    LineCache,
    NodeLine,
    NodesParser,
    Replication,
    ReportError,
    parse_atomic_migrations,
    parse_finished_migrations,
    parse_info,
    parse_key_count,
    parse_nodes,
    parse_replication,
    parse_used_bytes,
)
from routing.topology import Address, Role

A, B, C, D = "a" * 40, "b" * 40, "c" * 40, "d" * 40
ASKED = Address("asked", 1)

# Captured, with the ids shortened to letters. Slot 5 was opened between a and b.
CAPTURED = {
    "redis-6.2": """\
{B} 127.0.0.1:18526@28526 master - 0 1795340283502 2 connected 8192-16383
{C} 127.0.0.1:14265@24265 slave {A} 0 1795340282564 1 connected
{D} 127.0.0.1:13042@23042 slave {B} 0 1795340281783 2 connected
{A} 127.0.0.1:13738@23738 myself,master - 0 1795340281000 1 connected 0-8191 [5->-{B}]
""",
    "redis-7.0": """\
{C} 127.0.0.1:14265@24265 slave {A} 0 1795340284935 1 connected
{B} 127.0.0.1:18526@28526 master - 0 1795340285892 2 connected 8192-16383
{D} 127.0.0.1:13042@23042 slave {B} 0 1795340284169 2 connected
{A} 127.0.0.1:13738@23738,a.example myself,master - 0 1795340284000 1 connected 0-8191 [5->-{B}]
""",
    "redis-8.0": """\
{C} 127.0.0.1:14265@24265 slave {A} 0 1795340288615 1 connected
{B} 127.0.0.1:18526@28526 master - 0 1795340289564 2 connected 8192-16383
{A} 127.0.0.1:13738@23738,a.example myself,master - 0 0 1 connected 0-8191 [5->-{B}]
{D} 127.0.0.1:13042@23042 slave {B} 0 1795340289619 2 connected
""",
    "valkey-8.1": """\
{B} 127.0.0.1:18526@28526 master - 0 1795340293000 2 connected 8192-16383
{C} 127.0.0.1:14265@24265 slave {A} 0 1795340292274 1 connected
{D} 127.0.0.1:13042@23042 slave {B} 0 1795340293280 2 connected
{A} 127.0.0.1:13738@23738,a.example myself,master - 0 0 1 connected 0-8191 [5->-{B}]
""",
    "valkey-9.1": """\
{D} 127.0.0.1:13042@23042 slave {B} 0 1795340294821 2 connected
{C} 127.0.0.1:14265@24265 slave {A} 0 1795340295830 1 connected
{B} 127.0.0.1:18526@28526 master - 0 1795340294404 2 connected 8192-16383
{A} 127.0.0.1:13738@23738,a.example myself,master - 0 0 1 connected 0-8191 [5->-{B}]
""",
}


def filled(text: str) -> str:
    return text.format(A=A, B=B, C=C, D=D)


@pytest.mark.parametrize("engine", list(CAPTURED))
def test_what_each_engine_writes(engine: str) -> None:
    myself, others = parse_nodes(filled(CAPTURED[engine]), ASKED)
    assert myself.node.id == A
    assert myself.node.address == Address("127.0.0.1", 13738)
    assert myself.node.role is Role.PRIMARY
    assert myself.node.config_epoch == 1
    assert myself.node.hostname == ("" if engine == "redis-6.2" else "a.example")
    assert myself.slot_ranges == ((0, 8191),)
    assert myself.migrating == ((5, B),)
    assert myself.importing == ()
    lines = {line.node.id: line for line in others}
    assert set(lines) == {B, C, D}
    assert lines[B].slot_ranges == ((8192, 16383),)
    assert [(lines[id_].node.role, lines[id_].node.primary_id) for id_ in (C, D)] == [
        (Role.REPLICA, A),
        (Role.REPLICA, B),
    ]
    assert all(line.node.is_linked and not line.node.is_failing for line in others)


def one(line: str) -> str:
    return filled(line + "\n{B} 10.0.0.2:7000@17000 myself,master - 0 0 2 connected")


def test_the_importing_side() -> None:
    """As Valkey 9.1 and Redis 6.2 wrote it of themselves."""
    myself, _ = parse_nodes(
        filled("{B} 127.0.0.1:1@2 myself,master - 0 0 2 connected 8192-16383 [5-<-{A}]"), ASKED
    )
    assert myself.importing == ((5, A),)
    assert myself.migrating == ()


def test_a_dead_replica_as_valkey_9_1_wrote_it() -> None:
    _, others = parse_nodes(
        one("{D} 127.0.0.1:19850@29850 slave,fail {B} 1795340297333 1795340294821 2 disconnected"), ASKED
    )
    assert others[0].node.is_failing
    assert not others[0].node.is_linked
    assert others[0].node.role is Role.REPLICA


@pytest.mark.parametrize(
    ("endpoint", "address", "hostname"),
    [
        ("10.0.0.1:7000@17000", Address("10.0.0.1", 7000), ""),
        ("10.0.0.1:7000", Address("10.0.0.1", 7000), ""),
        ("10.0.0.1:7000@17000,", Address("10.0.0.1", 7000), ""),
        ("10.0.0.1:7000@17000,node.example", Address("10.0.0.1", 7000), "node.example"),
        ("10.0.0.1:7000@17000,node.example,shard-id=abc", Address("10.0.0.1", 7000), "node.example"),
        ("10.0.0.1:7000@17000,,tls-port=0,shard-id=abc", Address("10.0.0.1", 7000), ""),
        ("10.0.0.1:7000@17000,shard-id=abc", Address("10.0.0.1", 7000), ""),
        ("::1:7000@17000", Address("::1", 7000), ""),
        ("fe80::1:2:7000@17000,six.example", Address("fe80::1:2", 7000), "six.example"),
    ],
)
def test_addresses(endpoint: str, address: Address, hostname: str) -> None:
    _, others = parse_nodes(one("{A} " + endpoint + " master - 0 0 1 connected"), ASKED)
    assert others[0].node.address == address
    assert others[0].node.hostname == hostname


def test_a_node_that_does_not_know_its_own_address_has_the_one_it_was_asked_at() -> None:
    myself, _ = parse_nodes(filled("{A} :7000@17000 myself,master - 0 0 0 connected"), ASKED)
    assert myself.node.address == Address("asked", 7000)


@pytest.mark.parametrize("flags", ["noaddr,master", "handshake", "master,noaddr,fail"])
def test_who_cannot_be_reached_yet_is_left_out(flags: str) -> None:
    _, others = parse_nodes(one("{A} 10.0.0.1:7000@17000 " + flags + " - 0 0 1 connected 0-5"), ASKED)
    assert others == ()


@pytest.mark.parametrize(
    ("flags", "failing"), [("master,fail", True), ("master,fail?", True), ("master,nofailover", False)]
)
def test_failing_flags(flags: str, failing: bool) -> None:
    _, others = parse_nodes(one("{A} 10.0.0.1:7000@17000 " + flags + " - 0 0 1 connected"), ASKED)
    assert others[0].node.is_failing is failing


def test_single_slots_and_several_open_ones() -> None:
    myself, _ = parse_nodes(
        filled("{A} h:1@2 myself,master - 0 0 1 connected 0 2-3 7 [0->-{B}] [2->-{C}] [9-<-{D}]"), ASKED
    )
    assert myself.slot_ranges == ((0, 0), (2, 3), (7, 7))
    assert myself.migrating == ((0, B), (2, C))
    assert myself.importing == ((9, D),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{A} 10.0.0.1:7000@17000 master - 0 0 1 connected 0-5",
        "{A} 10.0.0.1:7000@17000 myself,master - 0 0 1",
        "{A} 10.0.0.1 myself,master - 0 0 1 connected",
        "{A} 10.0.0.1:99999@1 myself,master - 0 0 1 connected",
        "{A} 10.0.0.1:7000@17000 myself,master - 0 0 x connected",
        "{A} 10.0.0.1:7000@17000 myself,master - 0 0 1 connected 5-16384",
        "{A} 10.0.0.1:7000@17000 myself,master - 0 0 1 connected 7-5",
        "{A} 10.0.0.1:7000@17000 myself,master - 0 0 1 connected x",
        "{A} 10.0.0.1:7000@17000 myself,master - 0 0 1 connected [5]",
        "{A} 10.0.0.1:7000@17000 myself,master - 0 0 1 connected [16384->-{B}]",
    ],
)
def test_what_is_not_as_documented_is_an_error(text: str) -> None:
    with pytest.raises(ReportError):
        parse_nodes(filled(text), ASKED)


def test_info_lines() -> None:
    text = "# Server\r\nredis_version:7.0.15\r\nexecutable:/a:b\r\n\r\ncluster_state:ok\r\n"
    assert parse_info(text) == {"redis_version": "7.0.15", "executable": "/a:b", "cluster_state": "ok"}


JOB = {
    "name": "job",
    "operation": "EXPORT",
    "slot_ranges": "5 10-12",
    "target_node": B,
    "source_node": A,
    "state": "replicating",
    "message": "",
}


@pytest.mark.parametrize("flat", [True, False])
def test_running_jobs_of_atomic_migration(flat: bool) -> None:
    def told(job: dict[str, str]) -> object:
        words = {key.encode(): value.encode() for key, value in job.items()}
        return [word for pair in words.items() for word in pair] if flat else words

    jobs = [
        told(JOB),
        *[told({**JOB, "state": state}) for state in ("success", "failed", "canceled", "cancelled")],
    ]
    assert parse_atomic_migrations(jobs) == (AtomicMigration("job", ((5, 5), (10, 12)), A, B, "replicating"),)


# As Valkey 9.1 answered after a migration was cancelled, and with one that runs; ids shortened.
LISTED: list[list[bytes | int]] = [
    [
        *(b"name", b"j2", b"operation", b"EXPORT", b"slot_ranges", b"200-200"),
        *(b"target_node", B.encode(), b"source_node", A.encode()),
        *(b"create_time", 1795347729, b"last_update_time", 1795347729, b"last_ack_time", 1795347730),
        *(b"state", b"reading-establish-response", b"message", b"", b"cow_size", 0),
        *(b"remaining_repl_size", 17),
    ],
    [
        *(b"name", b"j1", b"operation", b"IMPORT", b"slot_ranges", b"0-9 20-25"),
        *(b"target_node", A.encode(), b"source_node", B.encode()),
        *(b"create_time", 1795347728, b"last_update_time", 1795347728, b"last_ack_time", 1795347728),
        *(b"state", b"failed", b"message", b"Connection lost to source.", b"cow_size", 0),
        *(b"remaining_repl_size", 0),
    ],
]


def test_jobs_as_valkey_9_1_lists_them() -> None:
    assert parse_atomic_migrations(LISTED) == (
        AtomicMigration(
            "j2", ((200, 200),), A, B, "reading-establish-response", "", 1795347729, 1795347730, 17
        ),
    )
    assert parse_finished_migrations(LISTED) == (
        AtomicMigration(
            "j1",
            ((0, 9), (20, 25)),
            B,
            A,
            "failed",
            "Connection lost to source.",
            1795347728,
            1795347728,
            0,
        ),
    )


@pytest.mark.parametrize("state", ["occurring-on-primary", "success"])
def test_a_replica_lists_its_primarys_jobs_without_their_ends(state: str) -> None:
    """As Valkey 9.1 does. The primary tells them in full; the replica's answer is no error."""
    of_replica = {key: value for key, value in JOB.items() if key not in ("source_node", "target_node")}
    assert parse_atomic_migrations([{**of_replica, "state": state}]) == ()
    assert parse_finished_migrations([{**of_replica, "state": state}]) == ()


@pytest.mark.parametrize("lacking", ["name", "slot_ranges", "target_node", "source_node", "state"])
def test_a_job_that_lacks_something_is_an_error(lacking: str) -> None:
    with pytest.raises(ReportError):
        parse_atomic_migrations([{key: value for key, value in JOB.items() if key != lacking}])


@pytest.mark.parametrize("slots", ["16384", "5-16384", "7-5", "x"])
def test_a_job_whose_slots_are_none_is_an_error(slots: str) -> None:
    with pytest.raises(ReportError):
        parse_atomic_migrations([{**JOB, "slot_ranges": slots}])


@pytest.mark.parametrize("jobs", [None, 3, [3], [[b"name"]], [None], [{b"state": b"done"}]])
def test_jobs_of_another_shape_are_a_report_error(jobs: Any) -> None:
    """Promise 8: discovery takes it for a node that does not answer, and goes on."""
    with pytest.raises(ReportError):
        parse_atomic_migrations(jobs)


# As servers wrote them; Redis 6.2 to Valkey 9.1 differ in lines that are not read.
OF_PRIMARY = """# Replication\r
role:master\r
connected_slaves:1\r
slave0:ip=127.0.0.1,port=13961,state=online,offset=111,lag=0,type=replica\r
master_failover_state:no-failover\r
master_replid:66334efc374ec8f4cbc16295ef56a2e9cb3f5595\r
master_replid2:df35bbb622ea25f1f169f4d9a32246d319b7015b\r
master_repl_offset:111\r
second_repl_offset:98\r
"""
OF_REPLICA = """# Replication\r
role:slave\r
master_host:127.0.0.1\r
master_port:13944\r
master_link_status:up\r
master_last_io_seconds_ago:3\r
master_sync_in_progress:0\r
slave_read_repl_offset:15\r
slave_repl_offset:14\r
master_replid:72ffe082faac671c390d04ea9d302a886c30642c\r
master_replid2:0000000000000000000000000000000000000000\r
master_repl_offset:14\r
second_repl_offset:-1\r
"""


def test_replication_of_a_primary_that_was_a_replica() -> None:
    assert parse_replication(OF_PRIMARY) == Replication(
        Role.PRIMARY,
        111,
        "66334efc374ec8f4cbc16295ef56a2e9cb3f5595",
        "df35bbb622ea25f1f169f4d9a32246d319b7015b",
        98,
    )


def test_replication_of_a_replica() -> None:
    """Its offset is what it has applied, and not what it has read."""
    assert parse_replication(OF_REPLICA) == Replication(
        Role.REPLICA,
        14,
        "72ffe082faac671c390d04ea9d302a886c30642c",
        primary=Address("127.0.0.1", 13944),
    )


def test_replication_of_a_replica_that_is_cut_off_or_synchronises() -> None:
    down = parse_replication(OF_REPLICA.replace("link_status:up", "link_status:down"))
    assert (down.link_up, down.is_syncing) == (False, False)
    assert parse_replication(OF_REPLICA.replace("in_progress:0", "in_progress:1")).is_syncing


@pytest.mark.parametrize("text", ["", "role:sentinel\r\n", OF_PRIMARY.replace(":111", ":x")])
def test_replication_that_is_not_as_documented_is_an_error(text: str) -> None:
    with pytest.raises(ReportError):
        parse_replication(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# Keyspace\r\n", 0),
        ("# Keyspace\r\ndb0:keys=1,expires=0,avg_ttl=0,keys_with_volatile_items=0\r\n", 1),
        ("db0:keys=3,expires=0,avg_ttl=0\r\ndb7:keys=4,expires=4,avg_ttl=9,subexpiry=0\r\n", 7),
    ],
)
def test_key_counts(text: str, count: int) -> None:
    assert parse_key_count(text) == count


def test_used_bytes() -> None:
    assert parse_used_bytes("# Memory\r\nused_memory:2857408\r\nused_memory_human:2.73M\r\n") == 2857408


@pytest.mark.parametrize("text", ["", "used_memory:2.73M"])
def test_memory_that_is_not_told_is_an_error(text: str) -> None:
    with pytest.raises(ReportError):
        parse_used_bytes(text)
    with pytest.raises(ReportError):
        parse_key_count("db0:expires=3")


def test_the_same_words_at_other_times_are_the_same_line() -> None:
    """Only the two times change from answer to answer, so nothing else needs parsing again."""
    cache = LineCache()

    def read(text: str) -> tuple[NodeLine, ...]:
        parser = NodesParser(filled(text), ASKED, cache)
        while parser.step():
            pass
        return parser.result()[1]

    first = read(CAPTURED["redis-7.0"])
    again = read(re.sub(r" 0 (\d{13}) ", lambda found: f" 7 {int(found[1]) + 1000} ", CAPTURED["redis-7.0"]))
    assert all(line is other for line, other in zip(first, again, strict=True))
    failing = read(CAPTURED["redis-7.0"].replace("master - 0", "master,fail - 0"))
    assert [line.node.is_failing for line in failing] == [False, True, False]
    assert (failing[0], failing[2]) == (first[0], first[2])


def test_a_nodes_own_line_is_never_taken_from_another_answer() -> None:
    """What a node without address says of itself depends on where it was asked."""
    cache = LineCache()
    text = filled("{A} :7000@17000 myself,master - 0 0 0 connected")
    for host in ("one", "two"):
        parser = NodesParser(text, Address(host, 1), cache)
        assert not parser.step()
        assert parser.result()[0].node.address == Address(host, 7000)


def test_the_remembered_lines_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the cluster changes; and a line that is met often outlives those that are not."""
    monkeypatch.setattr(LineCache, "LINES_MAX", 10)
    cache = LineCache()
    often = ("often",)
    cache.put(often, cast("NodeLine", "line"))
    for number in range(1000):
        cache.put((str(number),), cast("NodeLine", number))
        assert len(cache) <= 20
        assert cache.get(often) == "line"
    assert cache.get(("3",)) is None


@given(st.integers(1, 7))
def test_steps_of_any_size_read_the_same(lines_per_step: int) -> None:
    for text in map(filled, CAPTURED.values()):
        parser = NodesParser(text, ASKED, LineCache())
        parser.LINES_PER_STEP = lines_per_step  # type: ignore[misc]
        steps = 1
        while parser.step():
            steps += 1
        assert steps == -(-4 // lines_per_step)
        assert parser.result() == parse_nodes(text, ASKED)
