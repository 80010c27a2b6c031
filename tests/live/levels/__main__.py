"""python -m tests.live.levels: cut replication links, move slots, and print how fresh each level's replies were.

For each engine and level: first a phase with healthy links, for the share of reads that replicas answer; then, with
each movement, a phase in which every replica's link is cut for 2 s of every 3.5 s (and stays down until the replica
tries again, up to a second later). Ends with 0 when no level's promise was broken and nothing failed, 1 otherwise,
2 for wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import trio

from proxy.embedded.engine import Engine
from routing.levels import Level
from tests.live.campaign import proxies
from tests.live.campaign.__main__ import engines
from tests.live.levels.campaign import LEVELS, Movement, Options, Outcome, as_json, run_campaign
from tests.live.levels.links import Flapping
from tests.live.levels.load import LoadOptions
from tests.live.levels.report import faults, remarks, table
from tests.live.levels.targets import Other, ReplicaReaders, Steadyread, Target


def main() -> int:
    usual, load, flapping = Options(), LoadOptions(), Flapping()
    parser = argparse.ArgumentParser(
        prog="python -m tests.live.levels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--engine", default="redis-7.0,valkey-9.1", help="names with commas, all, or a program"
    )
    parser.add_argument("--level", default=",".join(level.value for level in LEVELS), help="with commas")
    parser.add_argument(
        "--movement", default=",".join(m.value for m in Movement), help="those that the engine knows are run"
    )
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="with cut links, for each row")
    parser.add_argument("--healthy-seconds", type=float, default=usual.healthy_seconds, help="for each level")
    parser.add_argument(
        "--together", action="store_true", help="all levels at the same time, the reads divided among them"
    )
    parser.add_argument("--proxies", type=int, choices=(1, 2), default=2)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the proxies"
    )
    parser.add_argument("--write-rate", type=float, default=load.write_rate, help="writes per second")
    parser.add_argument("--read-rate", type=float, default=load.read_rate, help="reads per second of a level")
    parser.add_argument("--cut-seconds", type=float, default=flapping.cut_seconds, help="0: cut no links")
    parser.add_argument("--period-seconds", type=float, default=flapping.period_seconds)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--plain", action="store_true", help="no proxy: plain clients that read at replicas")
    targets.add_argument("--envoy", metavar="READ_POLICY", help="Envoy: MASTER, PREFER_REPLICA, ...")
    targets.add_argument("--proxy-command", metavar="WORDS", help=proxies.Command.__doc__)
    parser.add_argument("--envoy-program", default="envoy")
    given = parser.parse_args()
    try:
        levels = tuple(Level(name) for name in given.level.split(","))
        movements = tuple(Movement(name) for name in given.movement.split(","))
    except ValueError as problem:
        parser.error(str(problem))
    target: Target = Steadyread(given.proxies, tuple(given.set))
    if given.plain:
        target = ReplicaReaders()
    elif given.envoy:
        target = Other(proxies.Envoy(given.envoy, given.envoy_program))
    elif given.proxy_command:
        target = Other(proxies.Command(given.proxy_command))
    if Level.SNAPSHOT in levels:
        parser.error("level snapshot is not one of this campaign's")
    if Level.SESSION in levels and not isinstance(target, Steadyread):
        parser.error(f"level session needs tokens, which {target.name} does not give")
    if not given.cut_seconds < given.period_seconds:
        parser.error("the period must be longer than the cut in it")
    options = Options(
        levels=levels,
        movements=movements,
        seconds=given.seconds,
        healthy_seconds=given.healthy_seconds,
        together=given.together,
        flapping=Flapping(given.cut_seconds, given.period_seconds) if given.cut_seconds else None,
        load=LoadOptions(write_rate=given.write_rate, read_rate=given.read_rate, seed=given.seed),
    )
    print(f"seed {given.seed}", flush=True)

    outcomes: list[Outcome] = []
    for engine in engines(given.engine):
        outcomes += trio.run(run, engine, target, options)
    print(table(outcomes))
    if given.json:
        given.json.write_text(
            json.dumps({"seed": given.seed, "outcomes": [as_json(o) for o in outcomes]}, indent=1)
        )
    return 0 if outcomes and not any(any(faults(outcome).values()) for outcome in outcomes) else 1


async def run(engine: Engine, target: Target, options: Options) -> list[Outcome]:
    def tell(outcome: Outcome) -> None:
        print(remarks(outcome), flush=True)

    return await run_campaign(engine, target, options, on_outcome=tell)


if __name__ == "__main__":
    sys.exit(main())
