"""``steadyread cluster``: between commands the cluster lives on, and the directory finds it again."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.cli import cluster as command
from proxy.embedded.cluster import ClusterError, choose_ports
from proxy.embedded.engine import find_engine

pytestmark = pytest.mark.live


class Shell:
    """Runs ``cluster`` commands on one directory."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.base_port = _base_port(6)
        self._capsys = capsys
        self._parser = argparse.ArgumentParser()
        command.add_parser(self._parser.add_subparsers())

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """The exit code, stdout and stderr of ``cluster words...``."""
        fixed = ("--base-port", str(self.base_port), "--dir", str(self.directory))
        code = command.run(self._parser.parse_args(["cluster", words[0], *fixed, *words[1:]]))
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def facts(self, *words: str) -> dict[str, Any]:
        _, out, _ = self(*words, "--json")
        facts: dict[str, Any] = json.loads(out)
        return facts


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    shell = Shell(tmp_path / "cluster", capsys)
    yield shell
    assert shell("stop")[0] == 0


def test_a_cluster_is_started_found_again_and_stopped(shell: Shell) -> None:
    """start serves and says how to go on; a second start changes nothing; stop leaves nothing, twice."""
    assert shell("status")[0] == 1
    code, out, err = shell("start")
    assert (code, err) == (0, "")
    assert f"steadyread serve --seed 127.0.0.1:{shell.base_port}" in out

    before = shell.facts("status")
    assert before["state"] == "serving"
    assert [node["role"] for node in before["nodes"]] == ["primary"] * 3 + ["replica"] * 3
    assert sum(node["slots"] for node in before["nodes"]) == 16384
    assert shell("start")[0] == 0
    assert shell.facts("status") == before

    code, _, err = shell("start", "--primaries", "4")
    assert code == 1
    assert "3 primaries and 3 replicas" in err

    pids = [node["pid"] for node in before["nodes"]]
    assert shell.facts("stop")["stopped"] == 6
    assert [pid for pid in pids if Path(f"/proc/{pid}/cwd").exists()] == []
    assert list(shell.directory.iterdir()) == []
    assert shell("stop")[0] == 0
    assert shell.facts("status")["state"] == "stopped"


def test_a_cluster_that_lost_a_node_is_degraded_and_can_be_replaced(shell: Shell) -> None:
    """status says which node is gone, start refuses, and after stop it starts anew."""
    assert shell("start", "--replicas", "0")[0] == 0
    gone = shell.facts("status")["nodes"][1]
    os.kill(gone["pid"], signal.SIGKILL)
    while Path(f"/proc/{gone['pid']}/cwd").exists():
        pass
    code, out, _ = shell("status")
    assert code == 1
    assert f"{gone['address']}  does not run" in out
    assert shell.facts("status")["state"] == "degraded"
    code, _, err = shell("start", "--replicas", "0")
    assert code == 1
    assert gone["address"] in err
    assert shell.facts("stop")["stopped"] == 2
    assert shell("start", "--replicas", "0")[0] == 0


def test_a_process_that_is_not_the_node_is_left_alone(shell: Shell) -> None:
    """A process id in a node's directory that belongs to somebody else by now is never killed."""
    assert shell("start", "--replicas", "0")[0] == 0
    node = shell.facts("status")["nodes"][0]
    os.kill(node["pid"], signal.SIGKILL)
    (shell.directory / f"node-{shell.base_port}" / "node.pid").write_text(f"{os.getpid()}\n")
    assert shell.facts("stop")["stopped"] == 2


@pytest.mark.parametrize("offset", [0, 10_000])
def test_a_busy_port_is_named_and_nothing_starts(shell: Shell, offset: int) -> None:
    """The node's own port, and the one that its cluster bus needs."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", shell.base_port + 2 + offset))
        busy.listen()
        code, _, err = shell("start")
    assert code == 1
    assert str(shell.base_port + 2 + offset) in err
    assert not shell.directory.exists()


def test_a_start_that_fails_half_way_leaves_nothing(shell: Shell, tmp_path: Path) -> None:
    """The third node does not start: the reason is told and the first two are stopped again."""
    started = tmp_path / "started"
    engine = tmp_path / "some-server"
    engine.write_text(
        "#!/bin/sh\n"
        f"case $PWD in */node-{shell.base_port + 2}) echo 'planted fault'; exit 1;; esac\n"
        f"case $PWD in */node-*) echo $PWD >>{started};; esac\n"
        f'exec {" ".join(find_engine().server)} "$@"\n'
    )
    engine.chmod(0o755)
    code, _, err = shell("start", "--engine", str(engine))
    assert code == 1
    assert "planted fault" in err
    directories = started.read_text().split()
    assert len(directories) == 2
    assert set(directories).isdisjoint(_working_directories())
    assert list(shell.directory.iterdir()) == []


def test_an_engine_that_does_not_exist_is_named(shell: Shell) -> None:
    code, _, err = shell("start", "--engine", "no-such-server")
    assert code == 1
    assert "no-such-server" in err


def test_a_broken_record_is_an_error(shell: Shell) -> None:
    shell.directory.mkdir()
    record = shell.directory / "cluster.json"
    record.write_text("{}")
    code, _, err = shell("start")
    record.unlink()
    assert code == 1
    assert "cluster.json" in err


def _base_port(count: int) -> int:
    """The first of ``count`` free ports in a row."""
    while True:
        (first,) = choose_ports(1)
        try:
            choose_ports(count, base_port=first)
        except ClusterError:
            continue
        return first


def _working_directories() -> Iterator[str]:
    """Where the processes of this machine work, removed directories included."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            yield os.readlink(link).removesuffix(" (deleted)")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is somebody else's
