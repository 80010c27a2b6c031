"""A node under a step of load, 1x, 4x, 1x of its capacity, through a real proxy, with and without the limiter.

    python -m tests.bench.overload [--engine E] [--slow throttle|sleep|busy] [--seconds-per-phase 12]
                                   [--repeat N] [--with | --without] [--reshard] [--plot FILE.png] [--json FILE]

Three primaries, one of them slowed (tests/bench/slow_node.py). Its capacity is measured first, at the node itself, with
16 connections that ask again as soon as they are answered. Then an open-loop load (tests/bench/open_loop.py) asks
through the proxy for keys of that node, a tenth ``critical``, three tenths ``background``, and steadily for keys of the
other nodes. Phases: idle (critical alone, at the rate that it has at 4x), 1x, 4x, 1x again. A request that is not
answered within ``--deadline`` seconds after it was due is lost to its client and no goodput.

A machine that is busy with other things shows in all figures, most in p99s: then ``--repeat`` judges medians, and the
other nodes' p99 says how much of it was the machine. Shown and drawn is the run in the middle.

``--without`` switches the limiter off; by default both are measured, one after the other, on one cluster. ``--reshard``
moves a hot slot away from the slow node and back, again and again, while the load is at 4x.

Prints the figures and which marks hold. Exits with 1 if the run with the limiter misses one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from math import ceil
from pathlib import Path
from statistics import fmean, median
from typing import Any

import trio
from rich.console import Console
from rich.table import Table

from proxy.embedded.cluster import Cluster, Node, running_cluster
from proxy.embedded.engine import Engine
from proxy.embedded.moves import move_slot_stepwise
from proxy.protocol.encode import command
from routing.slot import slot_of
from routing.topology import Address
from tests.bench import slow_node
from tests.bench.open_loop import OpenLoop, Outcome, Phase, Sample, Stream, Values, closed_loop
from tests.bench.proxies import positive
from tests.live.campaign.__main__ import engines
from tests.live.campaign.proxies import REPOSITORY, free_address, serving_process

Facts = dict[str, Any]

PRIORITIES = ("critical", "normal", "background")
SHARES = (0.1, 0.6, 0.3)  # of the load on the slow node
CONNECTIONS = (100, 200, 100)
NORMAL = 1  # its place among the streams
OTHERS = len(PRIORITIES)  # the stream to the other nodes
OTHERS_CONNECTIONS = 20
IDLE, FIRST, STEP, AFTER = "idle", "1x", "4x", "1x again"
WARM = "warm-up"
WARM_SECONDS = 1.0
STEP_FACTOR = 4.0
NORMAL_AGAIN_SECONDS = 2.0
KEYS_EACH = 200  # in the hot slot, in others of the slow node, and of the other nodes
WRITE_SHARE = 0.05
CAPACITY_SECONDS = 4.0
CAPACITY_CONNECTIONS = 16
BUCKET_SECONDS = 0.1
P99_SECONDS = 0.5  # each bucket's p99 is over so long, ending with it
LOOK_SECONDS = 0.1  # between two looks at the limit
MOVE_BATCH_KEYS = 10
HALF_MOVED_SECONDS = 0.5
WATCHED = ("limit", "in_flight", "waiting", "is_probing", "no_load_ms", "round_trip_ms")
TABLE_WIDTH = 130
LIMITER_OFF = "overload.adaptive=false"


@dataclass(frozen=True, slots=True)
class Keys:
    """By where they are."""

    hot: list[bytes]  # all in one slot of the slow node
    slow: list[bytes]  # in other slots of it
    others: list[bytes]

    @property
    def hot_slot(self) -> int:
        return slot_of(self.hot[0])


@dataclass(slots=True)
class Bench:
    """What all runs share."""

    options: argparse.Namespace
    cluster: Cluster
    slow: Node
    keys: Keys
    values: Values
    loops: int  # that one request costs the slow node
    capacity: float = 0.0


def main() -> int:
    options = parser().parse_args()
    found = engines(options.engine)
    if not found:
        return 1  # it was said what is missing
    facts = trio.run(run, found[0], options)
    show(facts, Console(width=TABLE_WIDTH))
    if options.json:
        options.json.write_text(json.dumps(facts, separators=(",", ":")) + "\n")
    if options.plot:
        from tests.bench.overload_plot import plot

        plot(facts, options.plot)
    return int(any(mark["is_met"] is False for mark in facts["marks"].get("with", ())))


async def run(engine: Engine, options: argparse.Namespace) -> Facts:
    """All that was asked for, as facts for JSON."""
    wanted = ["with"] if options.limited else ["without"] if options.unlimited else ["with", "without"]
    extra = slow_node.server_options(options.slow, engine)
    async with running_cluster(engine, primaries=3, replicas=0, extra=extra) as cluster:
        bench = await _prepared(cluster, options)
        async with slow_node.slowed(cluster, bench.slow, options.slow):
            bench.capacity = await trio.to_thread.run_sync(_measure_capacity, bench)
            print(f"capacity of the slow node: {bench.capacity:.0f} requests/s", flush=True)
            runs: dict[str, list[Facts]] = {name: [] for name in wanted}
            for number in range(options.repeat):
                for name, done in runs.items():
                    done.append(await _run_one(bench, name == "with"))
                print(f"{number + 1} of {options.repeat} done", flush=True)
    return {
        "engine": str(engine),
        "slow": options.slow,
        "capacity": bench.capacity,
        "seconds_per_phase": options.seconds_per_phase,
        "deadline_seconds": options.deadline,
        "reshard": options.reshard,
        "runs": {name: _typical(done) for name, done in runs.items()},
        "marks": {name: over_all(done) for name, done in runs.items()},
    }


def _typical(runs: Sequence[Facts]) -> Facts:
    """The one in the middle by critical's p99 at 4x: the one to be shown and drawn."""
    ordered = sorted(runs, key=lambda run: float(run["phases"][STEP]["critical"]["p99_ms"] or 0))
    return ordered[len(ordered) // 2]


async def _prepared(cluster: Cluster, options: argparse.Namespace) -> Bench:
    slow = cluster.primaries[0]
    owned = (await cluster.map_at(slow)).owned_by(slow.id)
    hot_slot = max(owned)
    values = Values()
    by_place = Keys([], [], [])
    tag = next(tag for number in count() if slot_of(tag := b"hot%d" % number) == hot_slot)
    by_place.hot.extend(b"{%b}:%d" % (tag, number) for number in range(KEYS_EACH))
    for number in count():
        key = b"key:%d" % number
        slot = slot_of(key)
        place = by_place.slow if slot in owned else by_place.others
        if len(place) < KEYS_EACH and slot != hot_slot:
            place.append(key)
        if len(by_place.slow) == len(by_place.others) == KEYS_EACH:
            break
    for node in cluster.primaries:
        slots = (await cluster.map_at(node)).owned_by(node.id)
        async with cluster.connection(node) as connection:
            await connection.call_all(
                [
                    ("SET", key, values.prefilled(key))
                    for key in (*by_place.hot, *by_place.slow, *by_place.others)
                    if slot_of(key) in slots
                ]
            )
    service_ms = options.service_ms or slow_node.SERVICE_MS[options.slow]
    loops = await slow_node.calibrate(cluster, slow, service_ms)
    return Bench(options, cluster, slow, by_place, values, loops)


def _measure_capacity(bench: Bench) -> float:
    name = slow_node.read_name(bench.cluster.engine)
    keys = (*bench.keys.hot, *bench.keys.slow)
    frames = [command(name, slow_node.SCRIPT, 1, key, bench.loops) for key in keys]
    address = bench.slow.address
    closed_loop(address, frames, CAPACITY_CONNECTIONS, CAPACITY_SECONDS / 4)
    reads = closed_loop(address, frames, CAPACITY_CONNECTIONS, CAPACITY_SECONDS)
    return reads / (1 - WRITE_SHARE)  # a SET costs next to nothing beside it


def _streams(bench: Bench) -> list[Stream]:
    name = slow_node.read_name(bench.cluster.engine)
    keys = (*bench.keys.hot, *bench.keys.slow)
    streams = [
        Stream(
            priority, priority, connections, keys, (name, slow_node.SCRIPT, 1), (bench.loops,), WRITE_SHARE
        )
        for priority, connections in zip(PRIORITIES, CONNECTIONS, strict=True)
    ]
    return [*streams, Stream("others", "", OTHERS_CONNECTIONS, bench.keys.others, write_share=WRITE_SHARE)]


def _phases(bench: Bench) -> list[Phase]:
    usual = [bench.capacity * bench.options.load * share for share in SHARES]
    others = bench.options.others_rate
    seconds = bench.options.seconds_per_phase
    stepped = [rate * STEP_FACTOR for rate in usual]
    alone = (stepped[0], 0.0, 0.0, others)
    return [
        Phase(WARM, WARM_SECONDS, alone),
        Phase(IDLE, seconds, alone),
        Phase(FIRST, seconds, (*usual, others)),
        Phase(STEP, seconds, (*stepped, others)),
        Phase(AFTER, seconds, (*usual, others)),
    ]


# One run.


async def _run_one(bench: Bench, is_limited: bool) -> Facts:
    address, admin = free_address(), free_address()
    words = [sys.executable, "-m", "proxy", "serve", f"--listen={address}", f"--admin={admin}"]
    words += [f"--seed={seed}" for seed in bench.cluster.addresses]
    settings = list(bench.options.set)
    if not is_limited and await _knows(LIMITER_OFF):
        settings.append(LIMITER_OFF)
    elif not is_limited:
        print(f"this proxy does not know {LIMITER_OFF}: it runs as it is", file=sys.stderr)
    phases = _phases(bench)
    load = OpenLoop(address, _streams(bench), bench.values, bench.options.deadline)
    moves = Moves()
    with tempfile.TemporaryDirectory(prefix="steadyread-record-") as directory:
        words += [f"--set={setting}" for setting in (f"store.file={directory}/topology.sqlite", *settings)]
        async with serving_process(words, address) as process:
            watch = Watch(admin, bench.slow.address)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, watch.run)
                if bench.options.reshard:
                    nursery.start_soon(_move_to_and_fro, bench, load, phases, moves)
                before = _cpu_seconds(process.pid)
                own = time.process_time()
                await trio.to_thread.run_sync(load.run, phases)
                cpu, own = _cpu_seconds(process.pid) - before, time.process_time() - own
                watch.is_over.set()
    seconds = sum(phase.seconds for phase in phases)
    facts = {
        **figures(phases, load),
        "watched": [(round(at - load.began, 3), *rest) for at, *rest in watch.seen],
        "moves": [(round(begin, 3), round(end, 3)) for begin, end in moves.finished],
        "move_failed": moves.failed,
        "proxy_cpu_share": cpu / seconds,
        "load_cpu_share": own / seconds,
        "errors": dict(load.errors.most_common(10)),
        "priorities_refused": load.priorities_refused,
    }
    facts["marks"] = marks(facts, bench.options.reshard)
    return facts


async def _knows(setting: str) -> bool:
    checked = await trio.run_process(
        [sys.executable, "-m", "proxy", "config", "check", "--set", setting],
        cwd=REPOSITORY,
        check=False,
        capture_stdout=True,
        capture_stderr=True,
    )
    return checked.returncode == 0


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100  # USER_HZ


class Watch:
    """Looks at the slow node's limit in the topology, again and again, in a thread of its own."""

    def __init__(self, admin: Address, node: Address) -> None:
        self.is_over = threading.Event()
        self.seen: list[tuple[Any, ...]] = []  # (at, and the values of WATCHED)
        self._admin = admin
        self._node = str(node)

    def run(self) -> None:
        connection = http.client.HTTPConnection(*self._admin, timeout=5)
        while not self.is_over.wait(LOOK_SECONDS):
            try:
                connection.request("GET", "/v1/topology")
                facts = json.loads(connection.getresponse().read())
            except (OSError, http.client.HTTPException, ValueError):
                connection.close()
                continue
            for shard in facts.get("shards", ()):
                if shard["primary"]["address"] == self._node and (load := shard["primary"].get("load")):
                    self.seen.append((time.monotonic(), *(load.get(name) for name in WATCHED)))
        connection.close()


@dataclass(slots=True)
class Moves:
    finished: list[tuple[float, float]] = field(default_factory=list)  # (began, ended), as the load's times
    failed: str = ""


async def _move_to_and_fro(bench: Bench, load: OpenLoop, phases: Sequence[Phase], moves: Moves) -> None:
    """While the load is at 4x, and until the slot is back."""
    while not load.began:
        await trio.sleep(LOOK_SECONDS)
    begin = load.began + sum(phase.seconds for phase in phases[:3])
    await trio.sleep(max(0.0, begin - time.monotonic()) + LOOK_SECONDS)
    end = begin + phases[3].seconds
    home, away = bench.cluster.primaries[:2]
    places = [away, home]
    is_home = True
    try:
        while not is_home or time.monotonic() < end:
            began = time.monotonic()
            await move_slot_stepwise(
                bench.cluster,
                bench.keys.hot_slot,
                places[not is_home],
                batch_keys=MOVE_BATCH_KEYS,
                half_moved_seconds=HALF_MOVED_SECONDS,
            )
            is_home = not is_home
            moves.finished.append((began - load.began, time.monotonic() - load.began))
    except Exception as failed:  # it is a result of this benchmark, whatever it is
        moves.failed = f"{type(failed).__name__}: {failed}"


# Figures.


def figures(phases: Sequence[Phase], load: OpenLoop) -> Facts:
    """What the samples say, by phase and by bucket."""
    names = [*PRIORITIES, "others"]
    told: Facts = {"phases": {}, "streams": names}
    begin = 0.0
    for place, phase in enumerate(phases):
        end = begin + phase.seconds
        told["phases"][phase.name] = {
            "begin": begin,
            "end": end,
            **{
                name: _figures_of([s for s in load.samples if s.stream == number], place, begin, end)
                for number, name in enumerate(names)
            },
        }
        begin = end
    seconds = phases[-1].seconds
    settled = begin - max(seconds - NORMAL_AGAIN_SECONDS, seconds / 2)  # half, for a test's short phase
    late = [sample for sample in load.samples if sample.due >= settled]
    told["phases"][AFTER]["settled"] = {
        name: _figures_of([s for s in late if s.stream == number], len(phases) - 1, settled, begin)
        for number, name in enumerate(names)
    }
    told["wrong"] = sum(s.outcome is Outcome.WRONG for s in load.samples)
    told["requests"] = len(load.samples)
    shed = [s for s in load.samples if s.outcome is Outcome.SHED]
    told["shed"] = len(shed)
    told["shed_without_retry_time"] = sum(s.retry_ms < 0 for s in shed)
    told["buckets"] = _buckets(load.samples, begin)
    return told


def _figures_of(samples: Sequence[Sample], place: int, begin: float, end: float) -> Facts:
    """Of one stream in one phase. Goodput counts answers by when they came, all else requests by when they were due."""
    due = [s for s in samples if s.phase == place]
    waits = sorted(s.ended - s.due for s in due if s.outcome in (Outcome.ANSWERED, Outcome.TIMED_OUT))
    retries = [s.retry_ms for s in due if s.outcome is Outcome.SHED]
    answered = sum(s.outcome is Outcome.ANSWERED for s in due)
    return {
        "offered_per_second": len(due) / (end - begin),
        "goodput_per_second": sum(s.outcome is Outcome.ANSWERED and begin <= s.ended < end for s in samples)
        / (end - begin),
        "answered_share": answered / len(due) if due else None,
        **{
            outcome.name.lower(): sum(s.outcome is outcome for s in due)
            for outcome in Outcome
            if outcome is not Outcome.ANSWERED
        },
        "p50_ms": _percentile_ms(waits, 0.5),
        "p95_ms": _percentile_ms(waits, 0.95),
        "p99_ms": _percentile_ms(waits, 0.99),
        "retry_ms_mean": fmean(retries) if retries else None,
    }


def _percentile_ms(ordered: Sequence[float], part: float) -> float | None:
    return ordered[int(len(ordered) * part)] * 1000 if ordered else None


def _buckets(samples: Sequence[Sample], seconds: float) -> Facts:
    """Per second, by stream and bucket; and the p99 of those that ended within P99_SECONDS."""
    number = ceil(seconds / BUCKET_SECONDS)
    streams = range(OTHERS + 1)
    told: Facts = {"seconds": BUCKET_SECONDS}
    for name in ("offered", "answered", "shed", "timed_out", "failed"):
        told[name] = [[0.0] * number for _ in streams]
    waits: list[list[list[float]]] = [[[] for _ in range(number)] for _ in streams]
    per_second = 1 / BUCKET_SECONDS
    for sample in samples:
        told["offered"][sample.stream][min(int(sample.due / BUCKET_SECONDS), number - 1)] += per_second
        bucket = int(sample.ended / BUCKET_SECONDS)
        if bucket >= number:
            continue
        if (name := sample.outcome.name.lower()) in told:
            told[name][sample.stream][bucket] += per_second
        if sample.outcome in (Outcome.ANSWERED, Outcome.TIMED_OUT):
            waits[sample.stream][bucket].append(sample.ended - sample.due)
    span = round(P99_SECONDS / BUCKET_SECONDS)
    told["p99_ms"] = [
        [
            _percentile_ms(sorted(chain.from_iterable(row[max(0, at - span + 1) : at + 1])), 0.99)
            for at in range(number)
        ]
        for row in waits
    ]
    return {name: _rounded(value) for name, value in told.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 2) if isinstance(value, float) else value


# Marks.


def marks(facts: Facts, is_reshard: bool) -> list[Facts]:
    """What must hold, and whether it does; None: it cannot be told."""
    told: list[Facts] = []

    def mark(
        name: str, value: float | None, least: float | None, most: float | None, digits: int = 2
    ) -> None:
        """Between ``least`` and ``most``, where given; with neither it is for information."""
        told.append(_judged({"mark": name, "value": value, "least": least, "most": most, "digits": digits}))

    def at_least(name: str, value: float, least: float, digits: int = 2) -> None:
        mark(f"{name} >= {least:g}", value, least, None, digits)

    def at_most(name: str, value: float | None, most: float) -> None:
        mark(f"{name} <= {most:g}", value, None, most)

    mark("wrong values = 0", facts["wrong"], 0, 0)
    without_time = facts["shed_without_retry_time"] if facts["shed"] else None
    mark("refusals without a retry time = 0", without_time, 0, 0)
    phases = facts["phases"]
    step = phases[STEP]
    critical, idle = step["critical"], phases[IDLE]["critical"]
    if is_reshard:
        mark("critical answered at 4x", critical["answered_share"], None, None, 4)
        in_time = sum(end <= step["end"] for _, end in facts["moves"])
        at_least("moves finished at 4x", 0 if facts["move_failed"] else in_time, 1)
        mark("moves finished, the slot is not back", len(facts["moves"]) % 2, 0, 0)
        return told
    at_least("critical answered at 4x", critical["answered_share"], 0.99, 4)
    at_least("goodput at 4x / at 1x", _goodput(step) / _goodput(phases[FIRST]), 0.9)
    at_most("critical p99 at 4x / idle", critical["p99_ms"] / idle["p99_ms"], 2)
    others, others_idle = step["others"], phases[IDLE]["others"]
    shares = [each["goodput_per_second"] / each["offered_per_second"] for each in (others, others_idle)]
    mark("other nodes: answered at 4x / idle within 0.05", shares[0] / shares[1], 0.95, 1.05, 3)
    for name in ("p50", "p99"):  # what the machine does to all
        mark(
            f"  {name} at 4x / idle (for information)",
            others[f"{name}_ms"] / others_idle[f"{name}_ms"],
            None,
            None,
        )
    settled = phases[AFTER]["settled"]
    at_least("from 2 s after the step: goodput / at 1x", _goodput(settled) / _goodput(phases[FIRST]), 0.9)
    ratio = settled["critical"]["p95_ms"] / phases[FIRST]["critical"]["p95_ms"]
    at_most("from 2 s after the step: critical p95 / at 1x", ratio, 1.5)
    middle = (step["begin"] + step["end"]) / 2
    limits = [
        limit
        for at, limit, _, _, is_probing, *_ in facts["watched"]
        if limit is not None and middle <= at < step["end"] and not is_probing
    ]
    swing = max(abs(limit - fmean(limits)) for limit in limits) / fmean(limits) if limits else None
    at_most("limit's swing at 4x, probes aside,", swing, 0.25)
    return told


def _judged(mark: Facts) -> Facts:
    """With its value as it is shown, and whether it holds."""
    value, least, most = mark["value"], mark["least"], mark["most"]
    if value is None or least is most is None:
        return {**mark, "is_met": None}
    value = round(value, mark["digits"])
    is_met = (least is None or value >= least) and (most is None or value <= most)
    return {**mark, "value": value, "is_met": is_met}


def over_all(runs: Sequence[Facts]) -> list[Facts]:
    """The marks of runs of one kind: what must never be counts wherever it was, else the medians are judged."""
    found = []
    for same in zip(*(run["marks"] for run in runs), strict=True):
        values = [mark["value"] for mark in same if mark["value"] is not None]
        never = same[0]["least"] == same[0]["most"] == 0
        value = None if not values else max(values) if never else median(values)
        found.append({**_judged({**same[0], "value": value}), "values": values})
    return found


def _goodput(phase: Facts) -> float:
    return float(sum(phase[name]["goodput_per_second"] for name in PRIORITIES))


def show(facts: Facts, console: Console) -> None:
    for name, told in facts["runs"].items():
        console.rule(
            f"{name} limiter: {facts['engine']}, {facts['slow']}, {facts['capacity']:.0f} requests/s"
        )
        if told["priorities_refused"]:
            console.print(
                f"no priorities: STEADY.PRIORITY answered {told['priorities_refused']}", highlight=False
            )
        table = Table()
        for heading in ("phase", "stream"):
            table.add_column(heading, no_wrap=True)
        headings = (
            "offered/s",
            "goodput/s",
            "answered",
            "shed",
            "timed out",
            "failed",
            "p50 ms",
            "p99 ms",
            "retry ms",
        )
        for heading in headings:
            table.add_column(heading, justify="right")
        for phase, figures_ in told["phases"].items():
            if phase == WARM:
                continue
            for stream in told["streams"]:
                row = figures_[stream]
                if not row["offered_per_second"]:
                    continue
                table.add_row(
                    phase,
                    stream,
                    *(f"{row[column]:.0f}" for column in ("offered_per_second", "goodput_per_second")),
                    f"{row['answered_share']:.2%}",
                    *(str(row[column]) for column in ("shed", "timed_out", "failed")),
                    *(_shown(row[column]) for column in ("p50_ms", "p99_ms", "retry_ms_mean")),
                )
        console.print(table)
        console.print(
            f"{told['requests']:,} requests, {told['wrong']} wrong values; CPU of a core: proxy"
            f" {told['proxy_cpu_share']:.0%}, load {told['load_cpu_share']:.0%}; moves: {told['moves']}"
            f" {told['move_failed']}",
            highlight=False,
        )
        for text, times in told["errors"].items():
            console.print(f"  {times} x {text}", highlight=False, markup=False)
        for mark in facts["marks"][name]:
            verdict = {True: "met", False: "NOT MET", None: "-"}[mark["is_met"]]
            each = " ".join(f"{value:g}" for value in mark["values"]) if len(mark["values"]) > 1 else ""
            value = _shown(mark["value"], 3)
            console.print(f"  {mark['mark']:52} {value:>7} {verdict:8} {each}", highlight=False)


def _shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.bench.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--engine", default="redis-7.0", help="redis-6.2 ... valkey-9.1, or a server program")
    made.add_argument("--slow", choices=slow_node.KINDS, default="throttle")
    made.add_argument("--service-ms", type=float, default=0.0, help="of CPU, for each request")
    made.add_argument("--seconds-per-phase", type=positive, default=12)
    made.add_argument(
        "--repeat", type=positive, default=1, help="runs of each kind; their medians are judged"
    )
    made.add_argument("--load", type=float, default=1.0, help="what 1x is, as a part of the capacity")
    made.add_argument("--others-rate", type=float, default=300.0, help="requests/s to the other nodes")
    made.add_argument("--deadline", type=float, default=1.0, help="seconds until a client gives up")
    made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of the proxy")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--with", action="store_true", dest="limited", help="measure only with the limiter")
    which.add_argument("--without", action="store_true", dest="unlimited", help="measure only without it")
    made.add_argument("--reshard", action="store_true", help="move a hot slot to and fro at 4x")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the run there; needs matplotlib")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all facts there")
    return made


if __name__ == "__main__":
    sys.exit(main())
