"""``steadyread demo``, as a new user runs it: it ends by itself, tells the truth, and leaves nothing."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxy.cli import demo

pytestmark = pytest.mark.live

ROOT = Path(__file__).resolve().parents[2]

# A server in place of the proxy: it answers PING and SET, and nil to every GET.
FORGETFUL_SERVER = """
import socketserver, sys
class Client(socketserver.StreamRequestHandler):
    def handle(self):
        while line := self.rfile.readline():
            parts = []
            for _ in range(int(line[1:])):
                self.rfile.readline()
                parts.append(self.rfile.readline().strip())
            self.wfile.write({b"PING": b"+PONG\\r\\n", b"SET": b"+OK\\r\\n"}.get(parts[0], b"$-1\\r\\n"))
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
Server(("127.0.0.1", int(sys.argv[1])), Client).serve_forever()
"""


def start(*words: str) -> subprocess.Popen[str]:
    """``steadyread demo words...`` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "proxy", "demo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def processes_in(directory: Path) -> list[str]:
    """What runs with ``directory`` as its TMPDIR, which every child of a demo that was given it inherits."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={directory}".encode() in environment.read_bytes():
                found.append((environment.parent / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is somebody else's
    return found


@pytest.fixture
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_ends_by_itself_with_no_wrong_read_and_leaves_nothing(own_tmp: Path) -> None:
    """Promises 1 and 2, and only the facts on stdout."""
    with start("--seconds", "4", "--json") as process:
        out, err = process.communicate(timeout=60)
    facts = json.loads(out)
    assert (process.returncode, err, facts["ok"]) == (0, "", True)
    steady = facts["steadyread"]
    assert steady["reads"] > 100
    assert steady["writes"] > 100
    assert (steady["wrong_nils"], steady["stale_values"], steady["errors"]) == (0, 0, 0)
    assert steady["p50_ms"] <= steady["p99_ms"]
    assert facts["moves"] >= 3
    now, at_snapshot = facts["together"]["now"], facts["together"]["snapshot"]
    assert (at_snapshot["torn"], at_snapshot["changed"], at_snapshot["errors"], now["errors"]) == (0, 0, 0, 0)
    assert at_snapshot["snapshots"] > 0
    assert at_snapshot["reads"] > 0
    assert now["torn"] > 0  # else it shows nothing
    assert facts["plain"]["errors"] == 0
    if facts["engine"].startswith("redis"):
        assert facts["plain"]["wrong_nils"] > 0
    assert processes_in(own_tmp) == []
    assert list(own_tmp.iterdir()) == []


def test_without_a_terminal_it_ends_in_plain_words(own_tmp: Path) -> None:
    """A pipe gets the summary once and no control characters."""
    with start("--seconds", "1") as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Steadyread: no wrong read, no torn snapshot and no error" in out
    assert out.count("wrong nils") == 1
    assert "\x1b" not in out


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_stopped_early_leaves_nothing(own_tmp: Path, ending: signal.Signals) -> None:
    """Ctrl-C and SIGTERM in the middle of the traffic: no server, no proxy, no directory."""
    with start("--seconds", "60") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("reading and writing"):
                break
        assert any("serve" in command for command in processes_in(own_tmp))
        os.kill(process.pid, ending)
        process.communicate(timeout=30)
    assert process.returncode != 0
    end = time.monotonic() + 10
    while (processes_in(own_tmp) or any(own_tmp.iterdir())) and time.monotonic() < end:
        time.sleep(0.05)
    assert processes_in(own_tmp) == []
    assert list(own_tmp.iterdir()) == []


def run_with(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """The demo with another program in the proxy's place; "PORT" in it becomes the port."""
    monkeypatch.setattr(
        demo,
        "_serve_command",
        lambda seed, listen, admin: [str(listen.port) if word == "PORT" else word for word in command],
    )
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    code = demo.run(parser.parse_args(["demo", "--seconds", "1", "--json"]))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_wrong_reads_through_the_proxy_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shown on a planted fault: a proxy that forgets everything ends in exit code 1 and is counted."""
    code, out, _ = run_with([sys.executable, "-c", FORGETFUL_SERVER, "PORT"], monkeypatch, capsys)
    facts = json.loads(out)
    assert (code, facts["ok"]) == (1, False)
    assert facts["steadyread"]["wrong_nils"] == facts["steadyread"]["reads"] > 0


def test_a_proxy_that_does_not_start_is_told_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [sys.executable, "-c", "raise SystemExit('no port for me')"]
    code, out, err = run_with(words, monkeypatch, capsys)
    assert (code, out) == (1, "")
    assert "no port for me" in err
