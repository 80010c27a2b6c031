"""python -m tests.live.snapshots: read snapshots while everything is written and slots move, and print what was seen.

For each engine and movement, three snapshots at a time are opened, read over and over, and closed, while writers on
all types go on. Every answer is compared with the answers before it, with a dump where there is one, and with what
the writers know. With ``--faults`` primaries and proxies are killed and frozen meanwhile. ``--plain`` reads live data
instead, which must be blamed; ``--copies`` reads frozen copies, which must not.
Ends with 0 when no answer was wrong and enough was checked, 1 otherwise, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import trio

from proxy.embedded.engine import Engine
from tests.live.campaign.__main__ import engines
from tests.live.levels.campaign import Movement
from tests.live.snapshots.campaign import Options, Outcome, Target, run_campaign
from tests.live.snapshots.faults import Kind
from tests.live.snapshots.report import as_json, remarks, table


def main() -> int:
    usual = Options()
    parser = argparse.ArgumentParser(
        prog="python -m tests.live.snapshots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", default="all", help="all, names with commas, or a server program")
    parser.add_argument(
        "--moves", default="none,stepwise,atomic", help="with commas; those that the engine knows are run"
    )
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="for each movement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="", help="with commas: failover, kill-proxy, freeze")
    parser.add_argument("--proxies", type=int, choices=(1, 2), default=1)
    parser.add_argument("--write-rate", type=float, default=usual.load.write_rate, help="of keys, per second")
    parser.add_argument(
        "--read-rate", type=float, default=usual.lives.read_rate, help="per second and reader"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the proxies"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--plain", action="store_true", help="read live data in place of snapshots")
    targets.add_argument("--copies", action="store_true", help="read frozen copies in place of snapshots")
    given = parser.parse_args()
    try:
        movements = tuple(Movement(name) for name in given.moves.split(","))
        kinds = tuple(Kind(name) for name in given.faults.split(",") if name)
    except ValueError as problem:
        parser.error(str(problem))
    target = Target.PLAIN if given.plain else Target.COPIES if given.copies else Target.STEADYREAD
    options = Options(
        movements=movements,
        faults=kinds,
        target=target,
        seconds=given.seconds,
        proxies=given.proxies,
        load=replace(usual.load, write_rate=given.write_rate),
        lives=replace(usual.lives, read_rate=given.read_rate),
        settings=tuple(given.set),
        seed=given.seed,
    )
    print(f"seed {given.seed}", flush=True)

    outcomes: list[Outcome] = []
    for engine in engines(given.engine):
        outcomes += trio.run(run, engine, options)
    print(table(outcomes))
    if given.json:
        given.json.write_text(json.dumps([as_json(outcome) for outcome in outcomes], indent=1))
    return 0 if outcomes and all(outcome.is_clean for outcome in outcomes) else 1


async def run(engine: Engine, options: Options) -> list[Outcome]:
    outcomes = []
    async with aclosing(run_campaign(engine, options)) as running:
        async for outcome in running:
            print(remarks(outcome), flush=True)
            outcomes.append(outcome)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
