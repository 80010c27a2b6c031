"""Before and after: the CPU per request of two checkouts of Steadyread, measured in turn.

    python -m tests.bench.compare BEFORE_DIRECTORY AFTER_DIRECTORY [--rounds 5] [--requests 100000]

Both proxies stand in front of the same cluster during the whole run. Each round measures each cell on both,
the one that goes first changing from round to round; ratios are taken within a round. Below 1 means that
AFTER is cheaper. Two runs of one checkout against itself show how large a ratio is noise on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
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
from tests.bench.proxies import WARM_UP_REQUESTS, positive
from tests.bench.testbed import STEADYREAD_COMMAND, BenchmarkError, Testbed

Pairs = dict[Cell, tuple[list[Sample], list[Sample]]]  # cell -> before's and after's sample of each round


def main() -> int:
    options = _parser().parse_args()
    console = Console()
    try:
        pairs = run(options, console)
        _show(pairs, console)
    except BenchmarkError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    if options.json:
        facts = [
            asdict(cell)
            | {
                "ratio_median": median_ratio(after, before),
                "before": [asdict(measured) for measured in before],
                "after": [asdict(measured) for measured in after],
            }
            for cell, (before, after) in pairs.items()
        ]
        options.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def run(options: argparse.Namespace, console: Console) -> Pairs:
    pairs: Pairs = {cell: ([], []) for cell in CELLS}
    with Testbed(options.pin) as bed:
        nodes = bed.cluster()
        targets = [
            bed.steadyread(nodes, options.command, options.before, "before"),
            bed.steadyread(nodes, options.command, options.after, "after"),
        ]
        for target in targets:
            for cell in CELLS:
                sample(target, cell, WARM_UP_REQUESTS)
        for round_number in range(options.rounds):
            for cell in CELLS:
                for which in (0, 1) if round_number % 2 == 0 else (1, 0):
                    measured = sample(targets[which], cell, requests_for(cell, options.requests))
                    pairs[cell][which].append(measured)
            console.print(f"round {round_number + 1} of {options.rounds} done", highlight=False)
    return pairs


def _show(pairs: Pairs, console: Console) -> None:
    table = Table(title="proxy's CPU microseconds per request, medians over the rounds")
    table.add_column("load", no_wrap=True)
    for heading in ("before", "after", "ratio", "of each round", "req/s", "req/s"):
        table.add_column(heading, justify="right")
    for cell, (before, after) in pairs.items():
        rounds = " ".join(f"{median_ratio([a], [b]):.2f}" for a, b in zip(after, before, strict=True))
        table.add_row(
            str(cell),
            f"{median_cpu(before):.2f}",
            f"{median_cpu(after):.2f}",
            f"{median_ratio(after, before):.3f}",
            rounds,
            f"{median_rate(before):,.0f}",
            f"{median_rate(after):,.0f}",
        )
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=_checkout)
    parser.add_argument("after", type=_checkout)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--requests", type=positive, default=100_000, help="at depth 1; four times at depth 16"
    )
    parser.add_argument("--pin", type=int, metavar="CORE", help="the core that is the proxies' alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and ratios there")
    parser.add_argument(
        "--command",
        default=STEADYREAD_COMMAND,
        help="how to start a proxy, run in its checkout, with {python}, {seed}, {listen}, {admin}, "
        "{listen_port}, {seed_ports}",
    )
    return parser


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


if __name__ == "__main__":
    sys.exit(main())
