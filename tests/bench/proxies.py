"""The proxy's own CPU per request and its throughput, beside twemproxy, Envoy and no proxy at all.

    python -m tests.bench.proxies [--rounds 3] [--requests 100000] [--only steadyread,twemproxy] [--json FILE]

GET and SET of 100-byte values, 50 connections, pipeline depth 1 and 16, keys from 100,000 that all exist.
Steadyread and Envoy stand in front of one cluster of three primaries, twemproxy in front of three standalone
servers, and ``direct`` is the first of those servers. All are up during the whole run. Each round measures
each cell on every target, one after the other, in an order that rotates; the ratio to twemproxy is taken
within the round, and medians over the rounds are shown. So what else the machine does disturbs all alike.

By default nothing is pinned: proxy, servers and load generator share all cores as the kernel likes. With
``--pin CORE`` every proxy runs on that core alone and all else is kept off it: steadier figures, but on a
machine of two cores the servers and the load generator then share one, and a proxy that waits for them finds
less to do at each wake-up, which costs every proxy more CPU per request. Compare only figures of one setting.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.measure import (
    CELLS,
    Cell,
    Sample,
    median_cpu,
    median_rate,
    median_ratio,
    requests_for,
    sample,
)
from tests.bench.testbed import PRIMARIES, STEADYREAD_COMMAND, BenchmarkError, Target, Testbed

NAMES = ("steadyread", "twemproxy", "envoy", "direct")
REFERENCE = "twemproxy"
WARM_UP_REQUESTS = 5_000

Results = dict[Cell, dict[str, list[Sample]]]  # cell -> target's name -> one sample per round


def main() -> int:
    options = _parser().parse_args()
    console = Console()
    try:
        results = run(options, console)
        _show(results, console)
        if options.json:
            options.json.write_text(json.dumps(_facts(results, options), indent=2) + "\n")
    except BenchmarkError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace, console: Console) -> Results:
    results: Results = {cell: {name: [] for name in options.only} for cell in CELLS}
    with Testbed(options.pin) as bed:
        targets = _targets(bed, options)
        for target in targets:
            for cell in CELLS:
                sample(target, cell, WARM_UP_REQUESTS)
        for round_number in range(options.rounds):
            for cell in CELLS:
                first = round_number % len(targets)
                for target in targets[first:] + targets[:first]:
                    measured = sample(target, cell, requests_for(cell, options.requests))
                    results[cell][target.name].append(measured)
            console.print(f"round {round_number + 1} of {options.rounds} done", highlight=False)
    return results


def _targets(bed: Testbed, options: argparse.Namespace) -> list[Target]:
    wanted = options.only
    nodes = bed.cluster() if {"steadyread", "envoy"} & set(wanted) else []
    servers = bed.standalone_servers(PRIMARIES) if {"twemproxy", "direct"} & set(wanted) else []
    start: dict[str, Callable[[], Target]] = {
        "steadyread": lambda: bed.steadyread(nodes, options.steadyread_command),
        "twemproxy": lambda: bed.twemproxy(servers),
        "envoy": lambda: bed.envoy(nodes),
        "direct": lambda: Target("direct", servers[0], None),
    }
    return [start[name]() for name in wanted]


def _show(results: Results, console: Console) -> None:
    table = Table(title="medians over the rounds")
    for heading in ("load", "target"):
        table.add_column(heading)
    for heading in ("proxy's CPU us/request", "ratio to twemproxy", "requests/s"):
        table.add_column(heading, justify="right")
    for cell, samples in results.items():
        for name, rounds in samples.items():
            cpu, ratio = _cpu_and_ratio(samples, name)
            table.add_row(
                str(cell),
                name,
                "-" if cpu is None else f"{cpu:.2f}",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{median_rate(rounds):,.0f}",
            )
        table.add_section()
    console.print(table)


def _cpu_and_ratio(samples: dict[str, list[Sample]], name: str) -> tuple[float | None, float | None]:
    """Medians for one target; None where there is no proxy, or nothing to compare it with."""
    if name == "direct":
        return None, None
    cpu = median_cpu(samples[name])
    return cpu, median_ratio(samples[name], samples[REFERENCE]) if REFERENCE in samples else None


def _facts(results: Results, options: argparse.Namespace) -> dict[str, object]:
    cells = []
    for cell, samples in results.items():
        for name, rounds in samples.items():
            cpu, ratio = _cpu_and_ratio(samples, name)
            medians = {
                "cpu_microseconds_median": cpu,
                "ratio_to_twemproxy_median": ratio,
                "requests_per_second_median": median_rate(rounds),
            }
            cells.append(
                {
                    "target": name,
                    **asdict(cell),
                    **medians,
                    "rounds": [asdict(measured) for measured in rounds],
                }
            )
    return {
        "rounds": options.rounds,
        "requests_at_depth_1": options.requests,
        "pinned_core": options.pin,
        "steadyread_command": options.steadyread_command,
        "cells": cells,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.proxies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument(
        "--requests", type=positive, default=100_000, help="at depth 1; four times at depth 16"
    )
    parser.add_argument("--only", type=_names, default=list(NAMES), metavar=",".join(NAMES))
    parser.add_argument("--pin", type=int, metavar="CORE", help="the core that is the proxies' alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and medians there")
    parser.add_argument(
        "--steadyread-command",
        default=STEADYREAD_COMMAND,
        metavar="COMMAND",
        help="how to start the proxy, with {python}, {seed}, {listen}, {admin}, {listen_port}, {seed_ports}",
    )
    return parser


def positive(text: str) -> int:
    """An argument that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(NAMES)}")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
