"""python -m tests.linearizability: load a few keys while their slots move, and judge each key's history.

Ends with 0 when every history has an order and no request was refused, 1 otherwise, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence

import trio

from proxy.embedded.engine import Engine
from routing.levels import Level
from tests.linearizability.campaign import Outcome, run_at_replicas, run_through_proxy
from tests.live.campaign.__main__ import ENGINES, engines

LEVELS = (Level.STRONG, Level.CAUGHT_UP)  # those that promise linearizability
PLAIN = "plain"
ROUND_SECONDS = 5.0  # of load, between two judgements: longer histories of one key take longer to judge


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.linearizability", description=__doc__)
    parser.add_argument(
        "--engine", default="all", help=f"all, names separated by commas of {ENGINES}, or a server program"
    )
    names = [level.value for level in LEVELS]
    parser.add_argument(
        "--level",
        default=",".join(names),
        help=f"names separated by commas of {names}, or {PLAIN}: at replicas without proof, which must fail",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of load, for each engine and level")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, help="of the clients' choices; random, and printed, without it")
    given = parser.parse_args()
    wanted = given.level.split(",")
    if not set(wanted) <= {*names, PLAIN}:
        parser.error(f"--level takes {names} or {PLAIN}, not {given.level}")
    seed = random.randrange(2**32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)

    rows: list[Sequence[Outcome]] = []
    for engine in engines(given.engine):
        for level in wanted:
            outcomes = []
            for outcome in rounds(engine, level, given.seconds, given.clients, seed):
                outcomes.append(outcome)
                if not outcome.is_clean:
                    print(outcome, flush=True)
            rows.append(outcomes)
    print(table(rows))
    return 0 if rows and all(outcome.is_clean for outcomes in rows for outcome in outcomes) else 1


def rounds(engine: Engine, level: str, seconds: float, clients: int, seed: int) -> Iterator[Outcome]:
    """Outcomes of a few seconds each, of clusters of their own, until ``seconds`` of load are over."""
    while seconds > 0:
        this = min(ROUND_SECONDS, seconds)

        async def run(this: float = this, seed: int = seed) -> Outcome:
            if level == PLAIN:
                return await run_at_replicas(engine, seconds=this, clients=clients, seed=seed)
            return await run_through_proxy(engine, Level(level), seconds=this, clients=clients, seed=seed)

        yield trio.run(run)
        seconds -= this
        seed += 1


COLUMNS = (
    "engine", "reads", "operations", "answered reads", "by replicas", "slots moved", "refused",
    "histories", "without an order",
)  # fmt: skip


def table(rows: Sequence[Sequence[Outcome]]) -> str:
    """A row for each engine and level."""
    cells = [list(COLUMNS)]
    for outcomes in rows:
        reads = sum(outcome.reads for outcome in outcomes)
        by_replicas = sum(outcome.by_replicas for outcome in outcomes)
        figures = [
            sum(len(outcome.operations) for outcome in outcomes),
            reads,
            f"{by_replicas / reads:.0%}",
            sum(outcome.moved.total() for outcome in outcomes),
            sum(outcome.refused.total() for outcome in outcomes),
            sum(len({operation.key for operation in outcome.operations}) for outcome in outcomes),
            sum(len(outcome.violations) for outcome in outcomes),
        ]
        cells.append([outcomes[0].engine, outcomes[0].reads_are, *map(str, figures)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    )


if __name__ == "__main__":
    sys.exit(main())
