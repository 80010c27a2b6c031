"""What a consistency level costs: the proxy's CPU per GET at each level beside ``strong``.

    python -m tests.bench.levels [--rounds 5] [--requests 60000] [--writes 0] [--json FILE]

One proxy with a listener for each level, in front of a cluster of three primaries with a replica each. Each round
measures each level, one after the other, in an order that rotates; the ratio to ``strong`` is taken within the
round, and medians over the rounds are shown, with the share of reads that replicas answered and the questions for
offsets that were asked for each 1,000 reads. ``--writes`` per second go on meanwhile, straight at the primaries.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from routing.slot import slot_of
from tests.bench.measure import Cell, Sample, median_cpu, median_rate, median_ratio, requests_for, sample
from tests.bench.proxies import WARM_UP_REQUESTS, positive
from tests.bench.testbed import BenchmarkError, Target, Testbed, ask, free_port, key_at, wait_until

LEVELS = ("strong", "caught_up", "bounded_staleness", "session", "eventual")
CELLS = (Cell("get", 1), Cell("get", 16))
REFERENCE = "strong"


@dataclass(frozen=True, slots=True)
class Measured:
    """One level in one round."""

    cpu: Sample
    replica_share: float  # of the reads
    questions: float  # to primaries and replicas, for each 1,000 reads


Results = dict[Cell, dict[str, list[Measured]]]


def main() -> int:
    options = _parser().parse_args()
    console = Console()
    try:
        results = run(options, console)
    except BenchmarkError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    _show(results, console)
    if options.json:
        facts = {
            str(cell): {level: [asdict(one) for one in measured] for level, measured in levels.items()}
            for cell, levels in results.items()
        }
        options.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def run(options: argparse.Namespace, console: Console) -> Results:
    results: Results = {cell: {level: [] for level in LEVELS} for cell in CELLS}
    with Testbed() as bed:
        nodes = bed.cluster(with_replicas=True)
        admin_port, targets = _proxy(bed, nodes[0])
        for target in targets:
            wait_until(
                lambda target=target: _is_readable(admin_port) and bool(ask(target.port, "PING")),
                "replicas to become readable",
            )
            for cell in CELLS:
                sample(target, cell, WARM_UP_REQUESTS)
        with writing(nodes, options.writes):
            for number in range(options.rounds):
                for cell in CELLS:
                    turn = number % len(targets)
                    for target in [*targets[turn:], *targets[:turn]]:
                        results[cell][target.name].append(
                            _measure(target, cell, options.requests, admin_port)
                        )
                console.print(f"round {number + 1} of {options.rounds} done", highlight=False)
    return results


def _proxy(bed: Testbed, seed: int) -> tuple[int, list[Target]]:
    """One proxy, as a target for each level."""
    admin_port, ports = free_port(), [free_port() for _ in LEVELS]
    config = bed.directory / "levels.toml"
    listeners = "".join(
        f'[[listeners]]\naddress = "127.0.0.1:{port}"\nlevel = "{level}"\n'
        for level, port in zip(LEVELS, ports, strict=True)
    )
    config.write_text(
        f'[cluster]\nseeds = ["127.0.0.1:{seed}"]\n[admin]\naddress = "127.0.0.1:{admin_port}"\n{listeners}'
    )
    process = bed.start(
        "steadyread",
        [sys.executable, "-m", "proxy", "serve", "--config", config],
        cwd=Path(__file__).parents[2],
        is_proxy=True,
    )
    wait_until(lambda: ask(ports[-1], "PING") == b"+PONG\r\n", "the proxy to answer", process)
    return admin_port, [Target(level, port, process) for level, port in zip(LEVELS, ports, strict=True)]


def _measure(target: Target, cell: Cell, requests: int, admin_port: int) -> Measured:
    count = requests_for(cell, requests)
    before = _figures(admin_port)
    cpu = sample(target, cell, count)
    grown = {name: value - before.get(name, 0.0) for name, value in _figures(admin_port).items()}
    at_replicas = sum(
        value for name, value in grown.items() if "reads_total{" in name and 'role="replica"' in name
    )
    questions = sum(value for name, value in grown.items() if "_questions_total" in name)
    return Measured(cpu, at_replicas / count, questions * 1000 / count)


def _figures(admin_port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(steadyread_\S+) (\S+)$", text, re.MULTILINE)}


def _is_readable(admin_port: int) -> bool:
    return _figures(admin_port).get('steadyread_replicas{stage="readable"}') == 3.0


@contextmanager
def writing(ports: list[int], rate: float) -> Iterator[None]:
    """``rate`` SETs a second over all primaries, straight at them."""
    if not rate:
        yield
        return
    stop = threading.Event()
    bounds = [16384 * number // len(ports) for number in range(len(ports) + 1)]
    keys: list[list[bytes]] = [[] for _ in ports]
    for index in range(3000):
        key, slot = key_at(index), slot_of(key_at(index))
        keys[next(n for n in range(len(ports)) if slot < bounds[n + 1])].append(key)
    writers = [
        threading.Thread(target=_write, args=(port, mine, rate / len(ports), stop))
        for port, mine in zip(ports, keys, strict=True)
    ]
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def _write(port: int, keys: list[bytes], rate: float, stop: threading.Event) -> None:
    from tests.bench.testbed import VALUE_BYTES

    process = subprocess.Popen(
        ["redis-cli", "-p", str(port)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    began, sent = time.monotonic(), 0
    while not stop.is_set():
        due = int((time.monotonic() - began) * rate)
        while sent < due:
            process.stdin.write(f"SET {keys[sent % len(keys)].decode()} {'x' * VALUE_BYTES}\n")
            sent += 1
        process.stdin.flush()
        stop.wait(0.002)
    process.stdin.close()
    process.wait(10)


def _show(results: Results, console: Console) -> None:
    table = Table(title="proxy's CPU microseconds per request, medians over the rounds")
    for heading in ("load", "level"):
        table.add_column(heading, no_wrap=True)
    for heading in ("CPU", "ratio to strong", "of each round", "req/s", "by replicas", "questions/1000"):
        table.add_column(heading, justify="right")
    for cell, levels in results.items():
        reference = [one.cpu for one in levels[REFERENCE]]
        for level, measured in levels.items():
            samples = [one.cpu for one in measured]
            rounds = " ".join(
                f"{median_ratio([a], [b]):.2f}" for a, b in zip(samples, reference, strict=True)
            )
            table.add_row(
                str(cell),
                level,
                f"{median_cpu(samples):.2f}",
                f"{median_ratio(samples, reference):.2f}",
                rounds,
                f"{median_rate(samples):,.0f}",
                f"{median(one.replica_share for one in measured):.1%}",
                f"{median(one.questions for one in measured):.1f}",
            )
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.levels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--requests", type=positive, default=60_000, help="at depth 1; four times at depth 16"
    )
    parser.add_argument("--writes", type=float, default=0.0, help="a second, at the same time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
