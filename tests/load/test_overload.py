"""The step of load, run as a user runs it: refusals are no failures, are waited out, and wrong values are found."""

from __future__ import annotations

import importlib.util
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHASE_SECONDS = 2.0
SHORT_SECONDS = 0.5  # Locust looks at the shape each second, so the load is one of 1x and over
SECONDS_MAX = 60.0
RETRY_MS = 300

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed"),
]


class Server(socketserver.ThreadingTCPServer):
    """Looks like one Redis with the proxy's priorities. Refuses all reads of ``refused`` priorities."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Client)
        self.refused: frozenset[bytes] = frozenset()
        self.refusal = b"-OVERLOADED node 127.0.0.1:1 is overloaded; retry after %d ms\r\n" % RETRY_MS
        self.values: dict[bytes, bytes] = {}
        self.planted: bytes | None = None  # what every GET answers instead
        self.reads: dict[bytes, Counter[int]] = defaultdict(Counter)  # priority -> connection -> GETs
        self.numbers = count()
        self.waits_ms: list[float] = []  # from a refusal to the same client's next read


class Client(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        self.number = next(self.server.numbers)
        self.priority = b""
        self.refused_at = 0.0
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                length = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(length + 2)[:-2])
            self.wfile.write(self.reply(words))

    def reply(self, words: list[bytes]) -> bytes:
        server = self.server
        match words[0].upper(), *words[1:]:
            case b"HELLO", *_:
                return b"%3\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$5\r\n7.0.0\r\n$5\r\nproto\r\n:3\r\n"
            case b"STEADY.PRIORITY", priority:
                self.priority = priority
            case b"SET", key, value:
                server.values[key] = value
            case b"UNLINK", key:
                del server.values[key]
                return b":1\r\n"
            case b"GET", key:
                return self.read(key)
        return b"+OK\r\n"

    def read(self, key: bytes) -> bytes:
        server = self.server
        server.reads[self.priority][self.number] += 1
        if self.refused_at:
            server.waits_ms.append((time.monotonic() - self.refused_at) * 1000)
            self.refused_at = 0.0
        time.sleep(0.005)  # or the load is a core's worth
        if self.priority in server.refused:
            self.refused_at = time.monotonic()
            return server.refusal
        value = server.planted or server.values[key]
        return b"$%d\r\n%b\r\n" % (len(value), value)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def run_load(server: Server, log: Path, phase_seconds: float = PHASE_SECONDS) -> tuple[int, str]:
    """Its exit code and all that it said."""
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "load" / "overload.py"), "--headless"]
    size = ["--users-1x", "10", "--phase-seconds", str(phase_seconds), "--keys", "20"]
    host = f"redis://127.0.0.1:{server.server_address[1]}"
    with log.open("wb") as output:
        done = subprocess.run(
            [*command, *size, "--host", host], stdout=output, stderr=output, timeout=SECONDS_MAX, check=False
        )
    return done.returncode, log.read_text()


def outcomes(said: str) -> dict[str, tuple[int, int]]:
    """By phase and priority: answered and refused."""
    found = re.findall(r"^(\w+ at .+): (\d+) answered, p99 \d+ ms, (\d+) refused$", said, re.MULTILINE)
    return {name: (int(answered), int(refused)) for name, answered, refused in found}


def test_refusals_are_counted_by_themselves_and_waited_out(server: Server, tmp_path: Path) -> None:
    server.refused = frozenset({b"BACKGROUND"})
    exit_code, said = run_load(server, tmp_path / "locust.log")
    assert exit_code == 0, said
    seen = outcomes(said)
    for phase in ("1x", "4x", "1x again"):
        assert seen[f"critical at {phase}"][0] > 10, said
        assert seen[f"critical at {phase}"][1] == seen[f"normal at {phase}"][1] == 0, said
    assert sum(answered for name, (answered, _) in seen.items() if "background" in name) == 0, said
    assert seen["background at 4x"][1] > 10, said
    # Four times as many users for a phase, as 1 : 6 : 3.
    assert len(server.reads[b"CRITICAL"]) == 4
    assert len(server.reads[b"NORMAL"]) == 24
    assert len(server.reads[b"BACKGROUND"]) == 12
    # Nobody comes back too early, and those who were told the same come apart.
    assert min(server.waits_ms) >= RETRY_MS
    assert max(server.waits_ms) - min(server.waits_ms) > RETRY_MS * 0.1
    assert not server.values


def test_a_refusal_that_says_not_when_to_come_back_is_a_failure(server: Server, tmp_path: Path) -> None:
    server.refused = frozenset({b"BACKGROUND"})
    server.refusal = b"-OVERLOADED node 127.0.0.1:1 is overloaded\r\n"
    exit_code, said = run_load(server, tmp_path / "locust.log", SHORT_SECONDS)
    assert exit_code == 1, said
    assert re.search(r"^failures: [1-9]\d* of \d+; refused: 0$", said, re.MULTILINE), said


def test_a_planted_value_of_another_key_is_found(server: Server, tmp_path: Path) -> None:
    server.planted = b"overload:of another:1|1|"
    exit_code, said = run_load(server, tmp_path / "locust.log", SHORT_SECONDS)
    assert exit_code == 1, said
    assert "ForeignValue" in said
