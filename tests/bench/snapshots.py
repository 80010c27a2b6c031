"""What snapshots cost: opening one under writes, and the proxy's CPU per request while one is open.

    python -m tests.bench.snapshots [--only opening,requests] [--rounds 5] [--openings 40] [--json FILE]

Opening: one proxy in front of six nodes, 3 primaries with a replica each and then 6 primaries. Paced writers write all
the time, one write under way on each connection; snapshots are opened and closed. Shown are how long OPEN took, and the
writers' latencies in the 50 ms before and after each opening beside all others. Those of writes that are not the first
to their key since the opening are shown by themselves too, because a first write costs a round trip more.

Requests: one proxy in front of three primaries. Each round measures writes and reads without a snapshot, opens one,
and measures reads at it (of keys not written since, and of written ones), first writes and later writes; ratios are
taken within the round, and medians over the rounds are shown. `tests.bench.compare` has what the proxy costs with no
snapshot open, beside an older checkout.
"""

from __future__ import annotations

import argparse
import json
import random
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import trio
from rich.console import Console
from rich.table import Table

from proxy.embedded.cluster import running_cluster
from proxy.embedded.connection import Connection, connected
from proxy.embedded.engine import find_engine
from proxy.protocol.encode import command
from routing.topology import Address
from tests.bench.measure import CONNECTIONS, cpu_seconds
from tests.bench.proxies import positive
from tests.bench.testbed import KEY_COUNT, VALUE_BYTES, BenchmarkError, Target, Testbed, ask, key_at
from tests.live.campaign.proxies import Steadyread

LAYOUTS = ((3, 1), (6, 0))  # primaries, replicas of each
PARTS = ("opening", "requests")
VALUE = b"x" * VALUE_BYTES
AROUND_SECONDS = 0.05  # before and after an opening's answer
OPEN_SECONDS = 0.25  # a snapshot stays open, and then none is, for so long
OPENING_KEYS = 2_000
WRITERS = 16
WARM_UP = 2_000  # requests of each kind
ALONE = 2_000  # requests of the one connection whose latencies are measured
SWEPT_SECONDS_MAX = 60.0
DEPTHS = (1, 16)
RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Latencies:
    """Milliseconds."""

    count: int
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latencies:
        ordered = sorted(seconds)
        if not ordered:
            raise BenchmarkError("no write fell there: measure more openings")
        ranks = [ordered[min(len(ordered) - 1, int(rank * len(ordered)))] * 1000 for rank in (0.5, 0.99)]
        return cls(len(ordered), round(ranks[0], 2), round(ranks[1], 2), round(ordered[-1] * 1000, 2))


@dataclass(frozen=True, slots=True)
class Opening:
    """One layout."""

    layout: str
    opened: Latencies  # from OPEN sent to its answer
    barrier_ms_max: float | None  # as the proxy tells
    around: Latencies  # of writes in the 100 ms around openings
    around_later: Latencies  # those of them that were not the first to their key
    otherwise: Latencies
    errors: int


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of request in one round."""

    cpu_microseconds: float  # of the proxy, per request
    requests_per_second: float


def main() -> int:
    options = _parser().parse_args()
    console = Console()
    facts: dict[str, object] = {}
    try:
        if "opening" in options.only:
            openings = [
                trio.run(measure_opening, primaries, replicas, options.openings, options.write_rate)
                for primaries, replicas in LAYOUTS
            ]
            show_openings(openings, console)
            facts["opening"] = [asdict(opening) for opening in openings]
        if "requests" in options.only:
            rounds, alone = measure_requests(options.rounds, options.requests, console)
            show_requests(rounds, alone, console)
            facts["requests"] = [{name: asdict(work) for name, work in each.items()} for each in rounds]
            facts["alone"] = {name: asdict(latencies) for name, latencies in alone.items()}
    except BenchmarkError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


# --- opening ---


@dataclass(frozen=True, slots=True)
class Written:
    sent_at: float
    answered_at: float
    is_first: bool  # to its key since the newest opening was asked for


class Writers:
    """Paced SETs, one under way on each connection."""

    def __init__(self, address: Address, rate: float) -> None:
        self.written: list[Written] = []
        self.errors = 0
        self.openings = 0  # asked for so far
        self._address = address
        self._rate = rate
        self._last: dict[int, int] = {}  # key -> `openings` when it was written last

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(WRITERS):
                nursery.start_soon(self._write, number)

    async def _write(self, number: int) -> None:
        rng = random.Random(number)
        pause = WRITERS / self._rate
        async with connected(self._address) as connection:
            due = trio.current_time() + rng.random() * pause
            while True:
                await trio.sleep_until(due)
                index = rng.randrange(OPENING_KEYS // WRITERS) * WRITERS + number
                is_first = self._last.get(index, -1) < self.openings
                self._last[index] = self.openings
                sent_at = trio.current_time()
                [reply] = await connection.call_all([("SET", key_at(index), VALUE)])
                self.errors += reply != b"OK"
                self.written.append(Written(sent_at, trio.current_time(), is_first))
                due = max(trio.current_time(), due + rng.uniform(0.5, 1.5) * pause)


async def measure_opening(primaries: int, replicas: int, openings: int, rate: float) -> Opening:
    """Raises BenchmarkError."""
    engine = find_engine()
    opened: list[tuple[float, float]] = []  # OPEN sent, and answered
    barriers: list[float] = []
    async with (
        running_cluster(engine, primaries=primaries, replicas=replicas) as cluster,
        Steadyread().serving(cluster) as address,
        connected(address) as operator,
    ):
        for index in range(OPENING_KEYS):
            await operator.call("SET", key_at(index), VALUE)
        writers = Writers(address, rate)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writers.run)
            await trio.sleep(2 * OPEN_SECONDS)
            for _ in range(openings):
                writers.openings += 1
                sent_at = trio.current_time()
                snapshot_id = await operator.call("STEADY.SNAPSHOT", "OPEN")
                opened.append((sent_at, trio.current_time()))
                await trio.sleep(OPEN_SECONDS)
                barriers += await _barrier_of(operator, snapshot_id)
                await operator.call("STEADY.SNAPSHOT", "CLOSE", snapshot_id)
                await trio.sleep(OPEN_SECONDS)
            nursery.cancel_scope.cancel()
    around, around_later, otherwise = [], [], []
    for write in writers.written:
        seconds = write.answered_at - write.sent_at
        if any(
            write.answered_at >= sent_at - AROUND_SECONDS and write.sent_at <= answered_at + AROUND_SECONDS
            for sent_at, answered_at in opened
        ):
            around.append(seconds)
            if not write.is_first:
                around_later.append(seconds)
        else:
            otherwise.append(seconds)
    return Opening(
        layout=f"{primaries}+{primaries * replicas}",
        opened=Latencies.of([answered_at - sent_at for sent_at, answered_at in opened]),
        barrier_ms_max=round(1000 * max(barriers), 2) if barriers else None,
        around=Latencies.of(around),
        around_later=Latencies.of(around_later),
        otherwise=Latencies.of(otherwise),
        errors=writers.errors,
    )


async def _barrier_of(operator: Connection, snapshot_id: int) -> list[float]:
    """Seconds, if the proxy tells."""
    flat = await operator.call("STEADY.SNAPSHOT", "INFO", snapshot_id)
    facts = dict(zip(flat[::2], flat[1::2], strict=True))
    nested = facts.get(b"costs")
    if isinstance(nested, list):
        facts |= dict(zip(nested[::2], nested[1::2], strict=True))
    told = facts.get(b"barrier_seconds")
    return [float(told)] if told else []


def show_openings(openings: Sequence[Opening], console: Console) -> None:
    table = Table(title="opening under writes, milliseconds")
    table.add_column("nodes", no_wrap=True)
    table.add_column("what", no_wrap=True)
    for heading in ("p50", "p99", "max", "of"):
        table.add_column(heading, justify="right")
    for opening in openings:
        shown = {
            "OPEN": opening.opened,
            "writes around": opening.around,
            "of them not first": opening.around_later,
            "other writes": opening.otherwise,
        }
        for what, found in shown.items():
            figures = (f"{figure:.2f}" for figure in (found.p50, found.p99, found.max))
            table.add_row(opening.layout, what, *figures, str(found.count))
        if opening.barrier_ms_max is not None:
            table.add_row(opening.layout, "barrier", "", "", f"{opening.barrier_ms_max:.2f}", "")
        table.add_row(opening.layout, "errors", "", "", "", str(opening.errors))
    console.print(table)


# --- requests ---

SET_OK = b"+OK\r\n"
GOT = b"$%d\r\n%b\r\n" % (VALUE_BYTES, VALUE)
Round = dict[str, Work]
Indexes = Sequence[int]


class Loader:
    """Requests over so many connections, as fast as they are answered. All replies are ``reply``, or it fails."""

    def __init__(self, port: int, connections: int, hello: bytes = b"") -> None:
        """``hello`` is sent on each connection first, and must be answered +OK."""
        self._sockets = []
        for _ in range(connections):
            each = socket.create_connection(("127.0.0.1", port), timeout=10.0)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.append(each)
            if hello:
                each.sendall(hello)
                if (answer := each.recv(RECEIVE_BYTES)) != SET_OK:
                    raise BenchmarkError(f"{hello!r} was answered {answer!r}")

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def run(self, frames: Sequence[bytes], reply: bytes, depth: int) -> list[float]:
        """Each frame once; the seconds from each batch's sending to its last reply. Raises BenchmarkError."""
        selector = selectors.DefaultSelector()
        owed: dict[
            socket.socket, tuple[int, float]
        ] = {}  # bytes that are still to come, and when it was sent
        seconds: list[float] = []
        at = 0

        def send_next(each: socket.socket) -> None:
            nonlocal at
            batch = frames[at : at + depth]
            at += len(batch)
            if batch:
                owed[each] = len(batch) * len(reply), time.perf_counter()
                each.sendall(b"".join(batch))

        try:
            for each in self._sockets:
                selector.register(each, selectors.EVENT_READ)
                send_next(each)
            while owed:
                ready = selector.select(timeout=10.0)
                if not ready:
                    raise BenchmarkError("no reply for 10 s")
                for key, _ in ready:
                    assert isinstance(key.fileobj, socket.socket)
                    each = key.fileobj
                    data = each.recv(RECEIVE_BYTES)
                    left, sent_at = owed.pop(each)
                    left -= len(data)
                    if left < 0 or not data or data[:1] == b"-":
                        raise BenchmarkError(f"answered {data[:200]!r}")
                    if left:
                        owed[each] = left, sent_at
                    else:
                        seconds.append(time.perf_counter() - sent_at)
                        send_next(each)
        finally:
            selector.close()
        return seconds


def measure_requests(
    rounds: int, requests: int, console: Console
) -> tuple[list[Round], dict[str, Latencies]]:
    """Raises BenchmarkError."""
    results: list[Round] = []
    with Testbed() as bed:
        nodes = bed.cluster()
        target = bed.steadyread(nodes)
        _round(target, nodes, min(requests, WARM_UP))
        for number in range(rounds):
            results.append(_round(target, nodes, requests))
            console.print(f"round {number + 1} of {rounds} done", highlight=False)
        alone = _alone(target, nodes)
    return results, alone


def _round(target: Target, nodes: Sequence[int], requests: int) -> Round:
    half = KEY_COUNT // 2
    # The first half of the keys is for depth 1, the other for depth 16. Each is written at most once here.
    halves = {1: range(half), 16: range(half, KEY_COUNT)}
    counts = {1: min(requests, half), 16: min(4 * requests, half)}
    work: Round = {}

    def measure(
        name: str, frame: Callable[[int], bytes], reply: bytes, hello: bytes = b"", times: int = 1
    ) -> None:
        for depth in DEPTHS:
            indexes = halves[depth][: counts[depth]]
            # Depth 16 costs a fraction, so what may be repeated is.
            frames = [frame(index) for index in indexes] * (times if depth > 1 else 1)
            loader = Loader(target.port, CONNECTIONS, hello)
            try:
                work[f"{name} depth {depth}"] = _charged(target, loader, frames, reply, depth)
            finally:
                loader.close()

    measure("GET strong, none open", _get, GOT, times=3)
    measure("SET, none open", _set, SET_OK, times=3)
    snapshot_id = _open(target.port)
    bound = command("STEADY.READ", "SNAPSHOT", snapshot_id)
    measure("GET strong", _get, GOT, times=3)
    measure("GET snapshot, not written", _get, GOT, bound, times=3)
    measure("SET, first", _set, SET_OK)
    measure("SET, later", _set, SET_OK, times=3)
    measure("GET snapshot, written", _get, GOT, bound, times=3)
    _close(target.port, snapshot_id, nodes)
    return work


def _charged(target: Target, loader: Loader, frames: Sequence[bytes], reply: bytes, depth: int) -> Work:
    assert target.process is not None
    before, began = cpu_seconds(target.process.pid), time.perf_counter()
    loader.run(frames, reply, depth)
    passed = time.perf_counter() - began
    cpu = cpu_seconds(target.process.pid) - before
    return Work(cpu / len(frames) * 1e6, len(frames) / passed)


def _alone(target: Target, nodes: Sequence[int]) -> dict[str, Latencies]:
    """Latencies of one connection with one request under way: what a round trip more is."""
    frames = [_set(index) for index in range(ALONE)]
    loader = Loader(target.port, 1)
    try:
        found = {"none open": Latencies.of(loader.run(frames, SET_OK, 1))}
        snapshot_id = _open(target.port)
        found["first"] = Latencies.of(loader.run(frames, SET_OK, 1))
        found["later"] = Latencies.of(loader.run(frames, SET_OK, 1))
    finally:
        loader.close()
    _close(target.port, snapshot_id, nodes)
    return found


def _get(index: int) -> bytes:
    return command("GET", key_at(index))


def _set(index: int) -> bytes:
    return command("SET", key_at(index), VALUE)


def _open(port: int) -> int:
    answer = ask(port, "STEADY.SNAPSHOT", "OPEN")
    if not answer.startswith(b":"):
        raise BenchmarkError(f"OPEN was answered {answer!r}")
    return int(answer[1:])


def _close(port: int, snapshot_id: int, nodes: Sequence[int]) -> None:
    """And wait until nothing is left of it."""
    answer = ask(port, "STEADY.SNAPSHOT", "CLOSE", snapshot_id)
    if answer != SET_OK:
        raise BenchmarkError(f"CLOSE was answered {answer!r}")
    deadline = time.monotonic() + SWEPT_SECONDS_MAX
    while sum(int(ask(node, "DBSIZE")[1:]) for node in nodes) > KEY_COUNT:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"snapshot {snapshot_id} was not swept in {SWEPT_SECONDS_MAX:g} s")
        time.sleep(0.1)


# What is measured -> what its ratio is to.
COMPARED = {
    "GET strong, none open": None,
    "GET strong": "GET strong, none open",
    "GET snapshot, not written": "GET strong",
    "GET snapshot, written": "GET strong",
    "SET, none open": None,
    "SET, first": "SET, none open",
    "SET, later": "SET, none open",
}


def show_requests(rounds: Sequence[Round], alone: dict[str, Latencies], console: Console) -> None:
    table = Table(
        title="proxy's CPU microseconds per request, and the ratio to GET strong or to SET with none open"
    )
    table.add_column("request", no_wrap=True)
    for heading in ("CPU", "ratio", "of each round", "req/s"):
        table.add_column(heading, justify="right")
    for depth in DEPTHS:
        for name, other in COMPARED.items():
            ours = [each[f"{name} depth {depth}"] for each in rounds]
            ratios: list[float] = []
            if other is not None:
                theirs = [each[f"{other} depth {depth}"].cpu_microseconds for each in rounds]
                ratios = [a.cpu_microseconds / b for a, b in zip(ours, theirs, strict=True)]
            table.add_row(
                f"{name}, depth {depth}",
                f"{median(work.cpu_microseconds for work in ours):.2f}",
                f"{median(ratios):.2f}" if ratios else "",
                " ".join(f"{ratio:.2f}" for ratio in ratios),
                f"{median(work.requests_per_second for work in ours):,.0f}",
            )
    console.print(table)
    for name, latencies in alone.items():
        figures = f"{latencies.p50:.2f} / {latencies.p99:.2f} / {latencies.max:.2f}"
        console.print(f"SET on one connection, {name}: p50 / p99 / max ms {figures}", highlight=False)


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(PARTS)}, with commas")
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.snapshots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=_parts, default=PARTS, help="with commas")
    parser.add_argument("--openings", type=positive, default=40, help="of each layout")
    parser.add_argument(
        "--write-rate", type=float, default=1500.0, help="a second, while snapshots are opened"
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--requests", type=positive, default=50_000, help="of each kind at depth 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
