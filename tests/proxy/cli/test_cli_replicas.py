"""``steadyread replicas`` shows which replicas a real admin port's proxy reads, and why not the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import trio
from prometheus_client import CollectorRegistry

from proxy.admin import replicas
from proxy.admin.endpoints import AdminState
from proxy.admin.endpoints import routes as endpoint_routes
from proxy.admin.http import Route
from proxy.cli import replicas as replicas_command
from proxy.cli.main import main
from proxy.topology.history import History
from routing.explain import quarantined
from routing.replicas import ReplicaFacts, ReplicaRecord
from routing.topology import EMPTY_VIEW, Address, Node, Role, Shard, TopologyView
from tests.proxy.admin.test_admin_replicas import FACTS, QUARANTINED, RECORD, A, B, C, store_of
from tests.proxy.admin_port import admin_port

PRIMARY = Node(C, Address("10.0.0.9", 6379), Role.PRIMARY)
VIEW = TopologyView(1, 9, (Shard(PRIMARY),), (0,) * 16384)
LIVE = {
    A: FACTS,
    B: replace(QUARANTINED, mismatched_keys=(b"cart:1", b"\x1b[2J"), why_not=quarantined([b"cart:1"])),
}


def table(
    live: Mapping[str, ReplicaFacts], *records: ReplicaRecord, view: TopologyView = VIEW
) -> list[Route]:
    store = trio.run(store_of, *records)
    state = AdminState(lambda: view, lambda: 1_800_000_000.0, list, list, CollectorRegistry())
    return [*replicas.routes(History(store), lambda: live), *endpoint_routes(state)]


def shown_cells(text: str) -> list[list[str]]:
    """The rows of the table, the header first."""
    lines = [line.replace("┃", "│") for line in text.splitlines()]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def test_each_replica_is_a_row_and_one_that_is_not_read_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines and no colours, because this is no terminal."""
    with admin_port(table(LIVE, RECORD)) as address:
        assert main(["replicas", "--admin", address]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    header, readable, other = shown_cells(shown)
    assert readable == [
        "10.0.0.1:6379",
        "10.0.0.9:6379",
        "readable",
        "closed",
        "online",
        "12 B",
        "40 ms",
        "eu-1a",
        "2",
        "0.5 ms",
        "5",
    ]
    assert dict(zip(header, other, strict=True)) == {
        "node": "[::1]:6380",
        "primary": "10.0.0.9:6379",
        "stage": "quarantined, not connected",
        "circuit": "closed",
        "state": "not recorded",
        "lag": "-",
        "staleness": "-",
        "zone": "-",
        "outstanding": "2",
        "latency": "-",
        "reads": "5",
    }
    assert shown.splitlines()[-1] == (
        "[::1]:6380 is not read: it is quarantined: 1 key differed from its primary's: "
        '"cart:1"; keys that differ: "\\x1b[2J"'
    )
    assert shown.count("is not read") == 1


def test_before_the_cluster_is_seen_the_record_is_shown_with_ids(capsys: pytest.CaptureFixture[str]) -> None:
    with admin_port(table({}, RECORD, view=EMPTY_VIEW)) as address:
        assert main(["replicas", "--admin", address]) == 0
    [_, row] = shown_cells(capsys.readouterr().out)
    assert row[:5] == ["10.0.0.1:6379", "cccccccc", "not known here", "-", "online"]
    assert len(row) == len(replicas_command.COLUMNS)


@pytest.mark.parametrize(
    ("circuit", "share", "cell", "note"),
    [
        ("open", 0.0, "open", "10.0.0.1:6379 gets none of its reads: it owes replies"),
        ("returning", 0.05, "returning, 5%", "10.0.0.1:6379 gets 5% of its reads: it owes replies"),
    ],
)
def test_one_whose_circuit_is_not_closed_says_why(
    circuit: str, share: float, cell: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = replace(FACTS, circuit=circuit, circuit_share=share, circuit_why="it owes replies")
    with admin_port(table({A: facts}, RECORD)) as address:
        assert main(["replicas", "--admin", address]) == 0
    shown = capsys.readouterr().out
    [_, row] = shown_cells(shown)
    assert row[3] == cell
    assert shown.splitlines()[-1] == note


def test_no_replica_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    with admin_port(table({})) as address:
        assert main(["replicas", "--admin", address]) == 0
        assert capsys.readouterr().out == "no replica is known\n"
    with admin_port(table(LIVE, RECORD)) as address:
        assert main(["replicas", "--admin", address, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["replicas"]
    assert [each["live"]["stage"] for each in facts] == ["readable", "quarantined"]


def test_misuse_is_2_and_no_answer_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replicas", "all"]) == 2
    with admin_port([]) as address:
        assert main(["replicas", "--admin", address]) == 1
    assert "answered 404: there is nothing at /v1/replicas" in capsys.readouterr().err
