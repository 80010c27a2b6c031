"""One measurement: run redis-benchmark against a target and read what the proxy's process was charged for it.

CPU is what the kernel charged to the process, user and system, all its threads, dead ones too. The kernel
counts in ticks of 10 ms, so a measurement should cost the proxy a second or more to be good to 1 %.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.testbed import KEY_COUNT, VALUE_BYTES, BenchmarkError, Target, program

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
CONNECTIONS = 50
RUN_SECONDS_MAX = 300.0


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
    """User and system time of a process and all its threads since it started."""
    # The second field is the program's name in parentheses and may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def requests_for(cell: Cell, requests_at_depth_1: int) -> int:
    """A request costs less at depth, so more of them make a measurement as long."""
    return requests_at_depth_1 * (1 if cell.depth == 1 else 4)


def sample(target: Target, cell: Cell, requests: int) -> Sample:
    """Put the load on the target once. Raises BenchmarkError if the load generator or a reply says error."""
    before = cpu_seconds(target.process.pid) if target.process else None
    load = subprocess.run(
        [
            *(program("redis-benchmark"), "-h", "127.0.0.1", "-p", str(target.port), "--csv"),
            *("-t", cell.command, "-c", str(CONNECTIONS), "-P", str(cell.depth), "-n", str(requests)),
            *("-d", str(VALUE_BYTES), "-r", str(KEY_COUNT)),
        ],
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )
    after = cpu_seconds(target.process.pid) if target.process else None
    said = f"{load.stdout}\n{load.stderr}"
    rows = [row for row in csv.reader(load.stdout.splitlines()) if row and row[0] == cell.command.upper()]
    if load.returncode != 0 or "Error from server" in said or len(rows) != 1:
        raise BenchmarkError(f"redis-benchmark failed against {target.name} ({cell}): {said}")
    cpu = None if before is None or after is None else (after - before) / requests * 1e6
    return Sample(float(rows[0][1]), cpu)


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
