"""``steadyread mode`` shows and sets the routing mode of a real admin port, and says what it was and is."""

from __future__ import annotations

import json

import pytest
import trio

from proxy.admin.audit import routes as audit_routes
from proxy.admin.http import Route
from proxy.admin.mode import routes as mode_routes
from proxy.cli.main import main
from proxy.cli.mode import operator_name
from proxy.store.memory import MemoryStore
from proxy.topology.audit import read_page
from proxy.topology.mode import ModeKeeper
from routing.audit import AuditRecord
from tests.proxy.admin_port import admin_port


def table(store: MemoryStore) -> list[Route]:
    return [*mode_routes(ModeKeeper(store, "p1", now=lambda: 1_800_000_000.0)), *audit_routes(store)]


def test_it_shows_the_mode_and_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with admin_port(table(MemoryStore())) as address:
        assert main(["mode", "--admin", address]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(
            "routing mode: strong, which nobody has set yet\n  * strong             reads go to"
        )
        assert "    caught_up          " in shown
        assert "    snapshot           reads show the cluster as it was" in shown
        assert main(["mode", "--admin", address, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["revision"] == 0


def test_it_sets_the_mode_and_says_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    store = MemoryStore()
    with admin_port(table(store)) as address:
        assert main(["mode", "strong", "--admin", address]) == 0
        assert capsys.readouterr().out == (
            "the routing mode is strong, revision 1; it was strong, which nobody has set yet\n"
        )
        assert main(["mode", "eventual", "--admin", address, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["revision"] == 2
        assert main(["mode", "--admin", address]) == 0
        assert f"set by {operator_name()} at 2027-01-15T08:00:00.000Z" in capsys.readouterr().out
    [first, _] = trio.run(read_page, store, 1, 10).records
    assert isinstance(first, AuditRecord)
    assert first.who == operator_name()
    assert first.origin.startswith("127.0.0.1:")


def test_a_past_revision_and_a_mode_that_cannot_be_chosen_now_fail(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with admin_port(table(MemoryStore())) as address:
        assert main(["mode", "strong", "--admin", address]) == 0
        capsys.readouterr()
        assert main(["mode", "strong", "--revision", "0", "--admin", address]) == 1
        assert "steadyread: not set: the mode is now strong, revision 1, set by " in capsys.readouterr().err
        assert main(["mode", "strong", "--revision", "1", "--admin", address]) == 0
        assert main(["mode", "snapshot", "--admin", address]) == 1
        assert capsys.readouterr().err.startswith("steadyread: not set: no snapshot serves, so every read")


@pytest.mark.parametrize("argv", [["fast"], ["--revision", "3"], ["strong", "--revision", "x"]])
def test_misuse_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mode", *argv]) == 2
    assert capsys.readouterr().err


def test_the_operator_is_a_name_that_the_admin_port_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "änna\n" + "x" * 200)
    name = operator_name()
    assert name.startswith("\\xe4nna?xxx")
    assert len(name) == 128

    def nobody() -> str:
        raise KeyError("no such user")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert operator_name().startswith("unknown@")
