"""One measurement: run redis-benchmark against a target and read what the proxy's process was charged for it.

CPU is what the kernel charged to the process, user and system, all its threads and child processes, dead ones
too. The kernel counts in ticks of 10 ms, so a measurement should cost the proxy a second or more to be good
to 1 %.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.testbed import KEY_COUNT, VALUE_BYTES, BenchmarkError, Target, program

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
CONNECTIONS = 50
RUN_SECONDS_MAX = 120.0
CHECK_SECONDS = 0.5  # between two looks whether the target still lives


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load."""

    command: str  # "get" or "set"
    depth: int  # requests in flight on each connection

    def __str__(self) -> str:
        return f"{self.command.upper()} depth {self.depth}"


CELLS = tuple(Cell(command, depth) for depth in (1, 16) for command in ("get", "set"))


@dataclass(frozen=True, slots=True)
class Sample:
    requests_per_second: float
    cpu_microseconds: float | None  # of the proxy's process, per request; None: there is no proxy


def cpu_seconds(pid: int) -> float:
    """User and system time, since it started, of a process, all its threads and all its descendants."""
    # The second field is the program's name in parentheses and may hold spaces. Fields 14 to 17 of proc(5)
    # are the time of the process itself, user and system, then of the children that it has waited for.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) / TICKS_PER_SECOND
    children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return own + sum(cpu_seconds(int(child)) for of_thread in children for child in of_thread)


def requests_for(cell: Cell, requests_at_depth_1: int) -> int:
    """A request costs less at depth, so more of them make a measurement as long."""
    return requests_at_depth_1 * (1 if cell.depth == 1 else 4)


def sample(target: Target, cell: Cell, requests: int) -> Sample:
    """Put the load on the target once. Raises BenchmarkError if the load generator or a reply says error."""
    before = cpu_seconds(target.process.pid) if target.process else None
    arguments = [
        *(program("redis-benchmark"), "-h", "127.0.0.1", "-p", str(target.port), "--csv"),
        *("-t", cell.command, "-c", str(CONNECTIONS), "-P", str(cell.depth), "-n", str(requests)),
        *("-d", str(VALUE_BYTES), "-r", str(KEY_COUNT)),
    ]
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as load:
        try:
            stdout, stderr = _outcome(load, target)
        finally:
            load.kill()  # does nothing to a process that has ended
    after = cpu_seconds(target.process.pid) if target.process else None
    said = f"{stdout}\n{stderr}"
    rows = [row for row in csv.reader(stdout.splitlines()) if row and row[0] == cell.command.upper()]
    if load.returncode != 0 or "Error from server" in said or len(rows) != 1:
        raise BenchmarkError(f"redis-benchmark failed against {target.name} ({cell}): {said}")
    cpu = None if before is None or after is None else (after - before) / requests * 1e6
    return Sample(float(rows[0][1]), cpu)


def _outcome(load: subprocess.Popen[str], target: Target) -> tuple[str, str]:
    """What the load generator wrote. Raises BenchmarkError if the target ends or the time is over.

    Needed because redis-benchmark reconnects for ever to a target that has gone.
    """
    deadline = time.monotonic() + RUN_SECONDS_MAX
    while time.monotonic() < deadline:
        try:
            return load.communicate(timeout=CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            if target.process is not None and target.process.poll() is not None:
                code = target.process.returncode
                raise BenchmarkError(f"{target.name} ended with {code} while it was measured") from None
    raise BenchmarkError(f"redis-benchmark against {target.name} took longer than {RUN_SECONDS_MAX:g} s")


def median_ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float:
    """The median over rounds of our CPU per request divided by theirs in the same round."""
    ratios = []
    for a, b in zip(ours, theirs, strict=True):
        if not a.cpu_microseconds or not b.cpu_microseconds:
            raise BenchmarkError("no CPU time was counted: measure more requests")
        ratios.append(a.cpu_microseconds / b.cpu_microseconds)
    return statistics.median(ratios)


def median_cpu(samples: Sequence[Sample]) -> float:
    return statistics.median(s.cpu_microseconds for s in samples if s.cpu_microseconds is not None)


def median_rate(samples: Sequence[Sample]) -> float:
    return statistics.median(s.requests_per_second for s in samples)
