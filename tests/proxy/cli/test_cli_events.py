"""``steadyread events`` and ``topology --at`` show what a real admin port has on record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import trio
from prometheus_client import CollectorRegistry

from proxy.admin import endpoints, events
from proxy.admin.endpoints import AdminState
from proxy.admin.http import Route
from proxy.cli.events import line_of
from proxy.cli.main import main
from proxy.store.memory import MemoryStore
from proxy.topology.event_facts import facts_of_event
from proxy.topology.history import History
from routing.events import EventKind
from routing.topology import EMPTY_VIEW
from tests.proxy.admin_port import admin_port
from tests.proxy.topology.record import (
    BEGAN_AT,
    a_cluster,
    a_version,
    an_event,
    write_events,
    write_version,
)


def routes_of_a_record(event_count: int) -> list[Route]:
    store = MemoryStore(now=lambda: 0.0)

    async def write() -> None:
        kinds = (EventKind.FAILOVER, EventKind.NODE_ADDED)
        await write_events(
            store, [an_event(n, kinds[n % 2], evidence={"seen": n}) for n in range(1, event_count + 1)]
        )
        await write_version(store, a_version(1, epoch=4, at=BEGAN_AT, shards=a_cluster(4), nodes_number=1))

    trio.run(write)
    history = History(store)
    state = AdminState(lambda: EMPTY_VIEW, lambda: None, list, list, CollectorRegistry(), history)
    return [*endpoints.routes(state), *events.routes(history)]


def test_events_are_lines_for_people_and_for_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with admin_port(routes_of_a_record(30)) as address:
        assert main(["events", "--admin", address, "--limit", "2", "--evidence"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "2027-01-15T08:00:29.000Z      29 node_added           node_added 29",
            "    seen: 29",
            "2027-01-15T08:00:30.000Z      30 failover             failover 30",
            "    seen: 30",
        ]
        assert main(["events", "--admin", address, "--json", "--kind", "failover", "--from", "5"]) == 0
        shown = [json.loads(line)["number"] for line in capsys.readouterr().out.splitlines()]
        assert shown == list(range(6, 31, 2))
        assert main(["events", "--admin", address, "--kind", "nothing"]) == 1
        assert "is no kind of event" in capsys.readouterr().err
        assert main(["events", "--limit", "0"]) == 2


def test_an_event_cannot_steer_the_terminal() -> None:
    """What a hook's command said of its failure stands in the message: it comes from outside."""
    event = facts_of_event(an_event(1, message="exit code 3: \x1b[31mred\nand \x07, ü [bold]"))
    assert line_of(event).plain.endswith(r" exit code 3: \x1b[31mred\nand \x07, ü [bold]")


def test_a_follower_survives_a_restart_of_the_proxy_and_ends_quietly() -> None:
    """It goes on with the next event at the proxy that comes back, says so, and Ctrl-C is no failure to report."""
    with admin_port(routes_of_a_record(3)) as address:
        follower = subprocess.Popen(
            [sys.executable, "-m", "proxy", "events", "--follow", "--json", "--admin", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert follower.stdout is not None
        assert follower.stderr is not None
        seen = [json.loads(follower.stdout.readline())["number"] for _ in range(3)]
    try:
        assert "asking again until there is an answer" in follower.stderr.readline()
        with admin_port(routes_of_a_record(5), port=int(address.rpartition(":")[2])):
            assert "going on with event 4" in follower.stderr.readline()
            seen += [json.loads(follower.stdout.readline())["number"] for _ in range(2)]
            assert seen == [1, 2, 3, 4, 5]
            follower.send_signal(signal.SIGINT)
            out, err = follower.communicate(timeout=10)
            assert (follower.returncode, out, err) == (130, "", "")
    finally:
        follower.kill()
        follower.communicate()


def test_the_map_of_a_moment_past_says_when_and_by_whom_it_was_recorded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with admin_port(routes_of_a_record(1)) as address:
        for at, as_of in (
            ("4", "epoch 4"),
            ("1800000001", "2027-01-15T08:00:01.000Z"),
            ("2027-01-15T10:00:00+02:00", "2027-01-15T08:00:00.000Z"),
        ):
            assert main(["topology", "--admin", address, "--at", at]) == 0
            shown = " ".join(capsys.readouterr().out.split())  # a title is broken to the width of its table
            assert (
                f"as of {as_of}: epoch 4, version 1, recorded at 2027-01-15T08:00:00.000Z by proxy-1" in shown
            )
        assert main(["topology", "--admin", address, "--at", "3"]) == 1
        assert "the oldest is version 1, of epoch 4" in capsys.readouterr().err
        assert main(["topology", "--admin", address, "--at", "-99999d"]) == 1
        assert "the oldest is version 1" in capsys.readouterr().err
        assert main(["topology", "--admin", address, "--at", "2027-01-15T10:00:00"]) == 1
        assert "lacks its offset" in capsys.readouterr().err
