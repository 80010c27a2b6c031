"""``steadyread explain`` asks a real admin port and prints the explanation, or why there is none."""

from __future__ import annotations

import json

import pytest

from proxy.admin.explain import routes
from proxy.admin.http import Route
from proxy.cli.main import main
from routing.explain import Explanation, as_json, as_lines
from routing.levels import Level, ReadLevel
from tests.proxy.admin_port import admin_port
from tests.routing.test_explain import EXPLANATION


def table(asked: list[object]) -> list[Route]:
    async def explain(command: list[bytes], level: ReadLevel | None) -> Explanation:
        asked.append((command, level))
        return EXPLANATION

    return routes(explain)


def test_it_prints_the_explanation_as_lines_or_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[object] = []
    with admin_port(table(asked)) as address:
        assert main(["explain", "--admin", address, "GET", "feed:1"]) == 0
        assert capsys.readouterr().out.splitlines() == as_lines(EXPLANATION)
        assert main(["explain", "--level", "caught_up", "--json", "--admin", address, "HGETALL", "é"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(as_json(EXPLANATION)))
    assert asked == [
        ([b"GET", b"feed:1"], None),
        ([b"HGETALL", b"\xc3\xa9"], ReadLevel(Level.CAUGHT_UP)),
    ]


def test_what_follows_the_command_is_its_own_and_the_bound_is_in_milliseconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[object] = []
    flags = ["--level", "bounded_staleness", "--max-staleness-ms", "250"]
    with admin_port(table(asked)) as address:
        assert main(["explain", *flags, "--admin", address, "GETRANGE", "--json", "-1", "--to"]) == 0
    assert asked == [
        ([b"GETRANGE", b"--json", b"-1", b"--to"], ReadLevel(Level.BOUNDED_STALENESS, 0.25)),
    ]
    assert capsys.readouterr().out.startswith("command ")


def test_a_snapshot_is_the_current_one_or_has_an_id(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[object] = []
    with admin_port(table(asked)) as address:
        assert main(["explain", "--level", "snapshot", "--admin", address, "GET", "k"]) == 0
        assert (
            main(["explain", "--level", "snapshot", "--snapshot", "7", "--admin", address, "GET", "k"]) == 0
        )
    assert asked == [
        ([b"GET", b"k"], ReadLevel(Level.SNAPSHOT)),
        ([b"GET", b"k"], ReadLevel(Level.SNAPSHOT, snapshot_id=7)),
    ]
    assert capsys.readouterr().out.startswith("command ")


def test_a_command_that_is_no_read_fails_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with admin_port(table([])) as address:
        assert main(["explain", "--admin", address, "SET", "k", "v"]) == 1
    assert "answered 422: SET is not a read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["--level", "fast", "GET", "k"], "invalid choice: 'fast'"),
        (["--snapshot", "7", "GET", "k"], "--snapshot goes with --level snapshot"),
        (["--level", "snapshot", "--snapshot", "x", "GET", "k"], "invalid int value: 'x'"),
        (["--max-staleness-ms", "0", "GET", "k"], "'0' is not a number of milliseconds above 0"),
        (["--max-staleness-ms", "nan", "GET", "k"], "'nan' is not a number of milliseconds above 0"),
        (["--max-staleness-ms", "5", "GET", "k"], "--max-staleness-ms go together"),
        (["--level", "bounded_staleness", "GET", "k"], "--max-staleness-ms go together"),
        (["GET", "\udcff"], "are to be texts in UTF-8"),
    ],
)
def test_misuse_is_exit_code_2(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *argv]) == 2
    assert expected in capsys.readouterr().err
