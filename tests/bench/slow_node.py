"""One slow node of a real cluster. A node's capacity is its time for each request, so each request costs it time.

Requests are a script that counts to a number and then does a GET: CPU time, the same for each, without variance of
its own. ``throttle`` then lets the server have only a part of a CPU, by SIGSTOP and SIGCONT, as a cgroup's quota does
with longer periods. What counts is the CPU time that it used, so a busy machine changes little. It is the default,
because it leaves the cores to the proxy, the load and the other nodes, which nothing but the proxy may slow. ``sleep``
has the server stall in bursts of DEBUG SLEEP. ``busy`` does neither: the node takes as much of a core as it gets.

    python -m tests.bench.slow_node PID SHARE BURST_SECONDS      throttles until it is ended or its parent is gone
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType

import trio

from proxy.embedded.cluster import Cluster, Node
from proxy.embedded.engine import Engine
from routing.slot import slot_of

KINDS = ("throttle", "sleep", "busy")
SCRIPT = b"local n = 0 for i = 1, tonumber(ARGV[1]) do n = n + i % 7 end return redis.call('GET', KEYS[1])"
SHARE = 0.5  # of a core
BURST_SECONDS = 0.0005
LOOK_SECONDS = 0.0002
SERVICE_MS = {"throttle": 2.4, "sleep": 0.8, "busy": 1.0}  # of CPU, for each request
STALL_SECONDS, STALL_EVERY_SECONDS = 0.05, 1.0
CALIBRATION_CALLS, CALIBRATION_LOOPS = 100, 20_000
REPOSITORY = Path(__file__).resolve().parents[2]


def server_options(kind: str, engine: Engine) -> tuple[str, ...]:
    """What the servers must be started with."""
    if kind == "sleep" and engine.release >= (7,):
        return ("--enable-debug-command", "yes")
    return ()


def read_name(engine: Engine) -> bytes:
    """The command that reads by script; of Redis 6.2 it counts as a write."""
    return b"EVAL_RO" if engine.release >= (7,) else b"EVAL"


async def calibrate(cluster: Cluster, node: Node, milliseconds: float) -> int:
    """How far the script must count to take so much of the node's CPU time."""
    name = read_name(cluster.engine)
    slots = (await cluster.map_at(node)).owned_by(node.id)
    key = next(key for number in count() if slot_of(key := b"calibration:%d" % number) in slots)
    assert node.process is not None
    clock = cpu_clock(node.process.pid)
    async with cluster.connection(node) as connection:
        began = time.clock_gettime(clock)
        for _ in range(CALIBRATION_CALLS):
            await connection.call(name, SCRIPT, 1, key, CALIBRATION_LOOPS)
        took = (time.clock_gettime(clock) - began) / CALIBRATION_CALLS
    return max(1, round(CALIBRATION_LOOPS * milliseconds / 1000 / took))


@asynccontextmanager
async def slowed(cluster: Cluster, node: Node, kind: str) -> AsyncIterator[None]:
    """The node is slow until the end of the block."""
    assert node.process is not None
    if kind == "throttle":
        words = [sys.executable, "-m", "tests.bench.slow_node", str(node.process.pid)]
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, [*words, str(SHARE), str(BURST_SECONDS)], cwd=REPOSITORY)
            nursery.start_soon(run)
            yield
            nursery.cancel_scope.cancel()  # SIGTERM, and awaited
    elif kind == "sleep":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stall, cluster, node)
            yield
            nursery.cancel_scope.cancel()
    else:
        yield


async def _stall(cluster: Cluster, node: Node) -> None:
    async with cluster.connection(node) as connection:
        while True:
            await trio.sleep(STALL_EVERY_SECONDS - STALL_SECONDS)
            await connection.call("DEBUG", "SLEEP", str(STALL_SECONDS))


def throttle(pid: int, share: float, burst_seconds: float) -> None:
    """Until SIGTERM, or until the process or the parent is gone. The process then runs.

    A token bucket of CPU time: filled at ``share``, at most ``burst_seconds`` full, emptied by what the process used.
    """
    parent = os.getppid()
    is_over = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal is_over
        is_over = True

    signal.signal(signal.SIGTERM, end)
    clock = cpu_clock(pid)
    try:
        now, used, budget = time.monotonic(), time.clock_gettime(clock), burst_seconds
        while not is_over and os.getppid() == parent:
            is_stopped = budget <= 0
            os.kill(pid, signal.SIGSTOP if is_stopped else signal.SIGCONT)
            time.sleep(
                (burst_seconds - budget) / share if is_stopped else max(budget / (1 - share), LOOK_SECONDS)
            )
            before, used_before = now, used
            now, used = time.monotonic(), time.clock_gettime(clock)
            budget = min(burst_seconds, budget + (now - before) * share - (used - used_before))
    except OSError:
        return  # it is gone
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def cpu_clock(pid: int) -> int:
    """Linux's id of another process's CPU clock, as clock_getcpuclockid(3) makes it."""
    return (~pid << 3) | 2


if __name__ == "__main__":
    throttle(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
