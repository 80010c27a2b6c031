"""``steadyread serve`` as its own process: what its signals do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

ANSWER_SECONDS = 10.0
LIFE_SECONDS = 20.0  # then it is killed, which ends its log and so a test that waits for more of it


@contextmanager
def serving(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A proxy with this file, before a cluster that is not there: it serves its own answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        seed = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEADYREAD_")}
    flags = ["--config", str(file), "--seed", seed, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy", "serve", *flags, "--set", "cluster.request_deadline_seconds=0.05"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    watchdog = Timer(LIFE_SECONDS, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def logged(process: subprocess.Popen[str], *events: str) -> dict[str, Any]:
    """The next of these events in the log."""
    assert process.stderr is not None
    for text in process.stderr:
        line: dict[str, Any] = json.loads(text)
        if line["event"] in events:
            return line
    raise AssertionError(f"the proxy ended, and logged none of {events}")


def ask(address: str, request: bytes) -> bytes:
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS) as connection:
        connection.sendall(request)
        return connection.recv(4096)


def test_sighup_reads_the_same_sources_again_and_sigterm_ends(tmp_path: Path) -> None:
    """The file changes what is live; flags stay stronger than it; a broken file changes nothing."""
    file = tmp_path / "a.toml"
    file.write_text("[clients]\nconnections_max = 111\n")
    with serving(file) as process:
        [listener] = logged(process, "started")["listeners"]
        max_clients = b"CONFIG GET maxclients\r\n"
        assert ask(listener, max_clients).endswith(b"\r\n111\r\n")

        file.write_text('log_level = "loud"\n[clients]\nconnections_max = 222\n')
        process.send_signal(signal.SIGHUP)
        refused = logged(process, "reload_refused", "settings_reloaded")
        assert refused["problems"] == [
            f'{file}:1: log_level = "loud": give one of "debug", "info", "warning", "error"'
        ]
        assert ask(listener, max_clients).endswith(b"\r\n111\r\n")

        file.write_text(
            'log_level = "debug"\n[clients]\nconnections_max = 222\n[cluster]\nusername = "me"\nseeds = ["h:1"]\n'
        )
        process.send_signal(signal.SIGHUP)
        reloaded = logged(process, "reload_refused", "settings_reloaded")
        assert (reloaded["who"], reloaded["origin"]) == ("signal", "SIGHUP")
        assert reloaded["changed"] == ["log_level: 'info' -> 'debug'", "clients.connections_max: 111 -> 222"]
        assert reloaded["needs_restart"] == ["cluster.username"]
        assert logged(process, "audited", "reload_not_recorded")["act"] == "settings"
        assert ask(listener, max_clients).endswith(b"\r\n222\r\n")
        assert logged(process, "client_closed")["level"] == "debug"

        process.send_signal(signal.SIGTERM)
        logged(process, "stopped")
        assert process.wait(ANSWER_SECONDS) == 0
