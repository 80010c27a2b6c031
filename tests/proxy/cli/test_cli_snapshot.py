"""``steadyread snapshot`` opens, lists, shows and closes snapshots at a real admin port."""

from __future__ import annotations

import json

import pytest

from proxy.admin.http import Route
from proxy.admin.snapshots import routes
from proxy.cli.main import main
from proxy.cli.mode import operator_name
from routing.levels import Level
from tests.proxy.admin_port import admin_port
from tests.proxy.cli.test_cli_replicas import shown_cells
from tests.proxy.snapshot_desk import ABORTED, CLOSED, PlainDesk, facts_of


def table(desk: PlainDesk, mode: Level = Level.STRONG) -> list[Route]:
    return routes(desk, lambda: mode, open_deadline_seconds=5.0)


def test_opening_says_how_to_read_it_or_the_id_alone(capsys: pytest.CaptureFixture[str]) -> None:
    desk = PlainDesk()
    with admin_port(table(desk)) as address:
        assert main(["snapshot", "open", "--name", "é", "--ttl", "600", "--admin", address]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "snapshot 7 serves; it closes at 2027-01-15T08:10:00.000Z",
            "read it with STEADY.READ SNAPSHOT 7",
        ]
        assert main(["snapshot", "open", "--quiet", "--admin", address]) == 0
        assert capsys.readouterr().out == "8\n"
        assert main(["snapshot", "open", "--json", "--admin", address]) == 0
        assert json.loads(capsys.readouterr().out)["id"] == 9
    assert [asked[:3] for asked in desk.asked] == [
        ("open", "é", 600.0),
        ("open", "", None),
        ("open", "", None),
    ]
    assert {asked[3].who for asked in desk.asked} == {operator_name()}  # type: ignore[attr-defined]  # an Operator


def test_the_list_is_a_table_with_a_line_for_each_that_needs_a_look(
    capsys: pytest.CaptureFixture[str],
) -> None:
    desk = PlainDesk()
    with admin_port(table(desk)) as address:
        assert main(["snapshot", "list", "--admin", address]) == 0
        assert capsys.readouterr().out == "no snapshot is open\n"
        desk.known += [
            facts_of(5, ABORTED, reason="budget: it is 25 h old\x1b[2J"),
            facts_of(6, CLOSED, expires_at=1_800_000_600.0),
            facts_of(7, name="report", warnings=("10.0.0.9:4000 writes past the proxies",)),
        ]
        assert main(["snapshot", "list", "--admin", address]) == 0
        shown = capsys.readouterr().out
        assert main(["snapshot", "list", "--json", "--admin", address]) == 0
        assert json.loads(capsys.readouterr().out)["current"] == 7
    header, aborted, closed, serving = shown_cells(shown)
    assert dict(zip(header, serving, strict=True)) == {
        "id": "7",
        "name": "report",
        "state": "serving, current",
        "age": "60 s",
        "expires": "-",
        "keys": "3",
        "bytes": "700",
        "warnings": "1",
    }
    assert (aborted[2], closed[2], closed[4]) == ("aborted", "closed", "-")
    assert shown.splitlines()[-2:] == [
        "5 was aborted: budget: it is 25 h old\\x1b[2J",
        "7: 10.0.0.9:4000 writes past the proxies",
    ]


def test_one_is_shown_with_what_it_cost_and_what_it_warns_of(capsys: pytest.CaptureFixture[str]) -> None:
    serving = facts_of(7, name="report", expires_at=1_800_000_600.0, warnings=("one", "two"))
    desk = PlainDesk([facts_of(5, ABORTED, reason="history: it is lost"), serving])
    with admin_port(table(desk)) as address:
        assert main(["snapshot", "show", "7", "--admin", address]) == 0
        assert capsys.readouterr().out.splitlines() == [
            'snapshot   7 "report"',
            "state      serving",
            "opened     at 2027-01-15T08:00:00.000Z, 60 s ago, at epoch 12",
            "end        it closes at 2027-01-15T08:10:00.000Z",
            "barrier    12.5 ms from the cut until it served",
            "preserved  3 keys, 700 bytes, by writes of this proxy",
            "too large  1 key, which cannot be read at it any more",
            "writes     waited 4 times for it: 0.5 ms on average, 1 ms at most",
            "warning    one",
            "warning    two",
        ]
        assert main(["snapshot", "show", "5", "--admin", address]) == 0
        assert "state      aborted: history: it is lost\n" in capsys.readouterr().out
        assert main(["snapshot", "show", "7", "--json", "--admin", address]) == 0
        assert json.loads(capsys.readouterr().out)["warnings"] == ["one", "two"]
        assert main(["snapshot", "show", "8", "--admin", address]) == 1
        assert "answered 404: there is no snapshot 8" in capsys.readouterr().err


def test_closing_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    desk = PlainDesk([facts_of(7)])
    with admin_port(table(desk, Level.SNAPSHOT)) as address:
        assert main(["snapshot", "close", "7", "--admin", address]) == 1
        assert "choose another mode first: steadyread mode strong" in capsys.readouterr().err
    with admin_port(table(desk)) as address:
        assert main(["snapshot", "close", "7", "--admin", address]) == 0
        assert capsys.readouterr().out.startswith("snapshot 7 is closed; what it kept is removed")
        assert main(["snapshot", "close", "7", "--admin", address]) == 1
        assert "answered 409: snapshot 7 is closed already" in capsys.readouterr().err
    assert [asked[2].who for asked in desk.asked] == [operator_name()] * 2  # type: ignore[attr-defined]  # an Operator


def test_an_opening_that_fails_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    desk = PlainDesk(problem="ERR node 10.0.0.1:6379 evicts keys; set its maxmemory-policy to noeviction")
    with admin_port(table(desk)) as address:
        assert main(["snapshot", "open", "--quiet", "--admin", address]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "answered 409: node 10.0.0.1:6379 evicts keys; set its maxmemory-policy" in captured.err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "the following arguments are required: ACTION"),
        (["take"], "invalid choice: 'take'"),
        (["show"], "the following arguments are required: ID"),
        (["close", "-x"], "the following arguments are required: ID"),
        (["show", "x"], "'x' is no snapshot's id"),
        (["open", "--ttl", "soon"], "'soon' is not a number of seconds"),
        (["open", "--ttl", "-1"], "'-1' is not a number of seconds"),
        (["open", "--ttl", "nan"], "'nan' is not a number of seconds"),
    ],
)
def test_misuse_is_exit_code_2(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", *argv]) == 2
    assert expected in capsys.readouterr().err
