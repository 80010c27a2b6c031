"""python -m tests.live.campaign: move slots under load and print what the clients saw.

Ends with 0 when no read was wrong and nothing failed, 1 otherwise, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import trio

from proxy.embedded.engine import Engine, find_engine
from routing.topology import Address
from tests.live.campaign.campaign import CampaignOptions, MoveKind, Outcome, run_campaign
from tests.live.campaign.proxies import Command, Envoy, Listening, Steadyread, Target
from tests.live.campaign.report import as_json, faults, remarks, table
from tests.live.conftest import engine_named

ENGINES = ("redis-6.2", "redis-7.0", "redis-8.0", "valkey-8.1", "valkey-9.1")


def main() -> int:
    usual = CampaignOptions()
    parser = argparse.ArgumentParser(prog="python -m tests.live.campaign", description=__doc__)
    parser.add_argument(
        "--engine", default="all", help=f"all, names separated by commas of {ENGINES}, or a server program"
    )
    parser.add_argument("--moves", default="stepwise,cli,atomic", help="those the engine knows are run")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="for each kind of move")
    parser.add_argument("--rate", type=float, default=usual.rate, help="requests per second")
    parser.add_argument("--clients", type=int, default=usual.clients)
    parser.add_argument("--no-scans", action="store_true", help="leave the full iterations with SCAN out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-port", type=int, help="the cluster's first port, for a --target to find it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--serve", action="store_true", help="load this repository's proxy (the default)")
    targets.add_argument("--target", metavar="HOST:PORT", help="load what listens there, once it does")
    targets.add_argument("--envoy", metavar="READ_POLICY", help="load Envoy: MASTER, PREFER_REPLICA, ...")
    targets.add_argument("--proxy-command", metavar="WORDS", help=Command.__doc__)
    parser.add_argument("--envoy-program", default="envoy")
    given = parser.parse_args()
    try:
        moves = tuple(MoveKind(name) for name in given.moves.split(","))
        target: Target = Steadyread()
        if given.target:
            target = Listening(Address.parse(given.target))
        elif given.envoy:
            target = Envoy(given.envoy, given.envoy_program)
        elif given.proxy_command:
            target = Command(given.proxy_command)
    except ValueError as problem:
        parser.error(str(problem))
    options = CampaignOptions(
        moves,
        given.seconds,
        clients=given.clients,
        rate=given.rate,
        scans=not given.no_scans,
        seed=given.seed,
        base_port=given.base_port,
    )

    outcomes: list[Outcome] = []
    for engine in engines(given.engine):
        outcomes.append(trio.run(run_campaign, engine, target, options))
        print(remarks(outcomes[-1]), flush=True)
    print(table(outcomes))
    if given.json:
        given.json.write_text(json.dumps([as_json(outcome) for outcome in outcomes], indent=1))
    is_clean = outcomes and not any(
        any(faults(outcome, kind).values()) for outcome in outcomes for kind in outcome.moved
    )
    return 0 if is_clean else 1


def engines(names: str) -> list[Engine]:
    """The engines that were asked for and are here; those that are not are named."""
    if names != "all" and not set(names.split(",")) <= set(ENGINES):
        return [find_engine(names)]
    found = []
    for name in ENGINES if names == "all" else names.split(","):
        try:
            found.append(engine_named(name))
        except pytest.skip.Exception as absent:
            print(absent, file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
