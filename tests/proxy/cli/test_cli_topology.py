"""``steadyread topology`` shows what a real admin port answers, and says what is wrong when none does."""

import json
import socket
from pathlib import Path
from threading import Thread

import pytest
from prometheus_client import CollectorRegistry

from proxy.admin.endpoints import AdminState, routes
from proxy.admin.http import Route
from proxy.cli.main import main
from routing.slot import SLOT_COUNT
from routing.topology import (
    EMPTY_VIEW,
    UNOWNED,
    Address,
    Migration,
    MigrationKind,
    Node,
    Role,
    Shard,
    TopologyView,
)
from tests.proxy.admin_port import admin_port

A = Node("a" * 40, Address("10.0.0.1", 7000), Role.PRIMARY)
B = Node("b" * 40, Address("10.0.0.2", 7000), Role.PRIMARY)
R = Node("c" * 40, Address("10.0.0.3", 7000), Role.REPLICA, primary_id=A.id, is_failing=True)
VIEW = TopologyView(
    5,
    9,
    (Shard(A, (R,)), Shard(B)),
    (0,) * 8000 + (1,) * 8000 + (UNOWNED,) * (SLOT_COUNT - 16000),
    (Migration((1, 2, 7), A.id, B.id, MigrationKind.STEPWISE),),
)


def routes_of(view: TopologyView) -> list[Route]:
    return routes(AdminState(lambda: view, lambda: 1_800_000_000.0, list, list, CollectorRegistry()))


def test_the_table_shows_shards_replicas_migrations_and_gaps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with admin_port(routes_of(VIEW)) as address:
        assert main(["topology", "--admin", address]) == 0
    shown = capsys.readouterr().out
    for text in (
        "epoch 9, revision 5, seen at 2027-01-15T08:00:00.000Z",
        "8000: 0-7999",
        "10.0.0.3:7000 (failing)",
        "migration (stepwise): 3 slots (1-2, 7) from 10.0.0.1:7000 to 10.0.0.2:7000",
        "384 slots have no owner: 16000-16383",
    ):
        assert text in shown


def test_a_node_for_which_requests_wait_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    load = {"limit": 5, "in_flight": 4, "waiting": 60, "oldest_wait_ms": 12.3, "shed_per_answered": 3.1}
    quiet = {**load, "waiting": 0, "shed_per_answered": 0.0}
    state = AdminState(
        lambda: VIEW,
        lambda: 1_800_000_000.0,
        list,
        list,
        CollectorRegistry(),
        load_of=lambda node: load if node is A else quiet,
    )
    with admin_port(routes(state)) as address:
        assert main(["topology", "--admin", address]) == 0
        shown = capsys.readouterr().out
        assert (
            "10.0.0.1:7000 is overloaded: 4 in flight of at most 5, 60 waiting, the next for 12 ms; 3.1"
            in shown
        )
        assert "10.0.0.2:7000 is overloaded" not in shown
        assert main(["topology", "--admin", address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"][0]["primary"]["load"] == load


def test_json_is_what_the_admin_port_answered(capsys: pytest.CaptureFixture[str]) -> None:
    with admin_port(routes_of(VIEW)) as address:
        assert main(["topology", "--admin", address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["migrations"][0]["slot_count"] == 3


def test_a_token_is_asked_for_and_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    with admin_port(routes_of(VIEW), token="s3cret") as address:
        assert main(["topology", "--admin", address]) == 1
        assert "wants a token: --token-file FILE or --token TOKEN" in capsys.readouterr().err
        assert main(["topology", "--admin", address, "--token", "wrong"]) == 1
        assert "refused the token" in capsys.readouterr().err
        assert main(["topology", "--admin", address, "--token-file", str(file)]) == 0


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"127.0.0.1:{free.getsockname()[1]}"
    assert main(["topology", "--admin", closed]) == 1
    assert capsys.readouterr().err == (
        f"steadyread: no proxy answers at {closed}: Connection refused. "
        "Is one running? --admin HOST:PORT names another admin port\n"
    )
    with admin_port(routes_of(EMPTY_VIEW)) as address:
        assert main(["topology", "--admin", address]) == 1
        assert "answered 503: the cluster has not been seen yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"-ERR unknown command\r\n", "is no admin port: it does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "is no admin port of Steadyread"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "broke the connection"),
        (b"", "broke the connection"),
    ],
)
def test_something_else_at_that_port_is_noticed(
    answer: bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer_one() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)

        thread = Thread(target=answer_one)
        thread.start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert main(["topology", "--admin", address]) == 1
        thread.join()
    assert f"what listens at {address} {expected}" in capsys.readouterr().err
