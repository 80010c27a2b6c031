"""python -m tests.live.store_faults: break the topology store under traffic and print what became of it.

Ends with 0 when every promise was kept, 1 otherwise, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.embedded.engine import Engine, find_engine
from tests.live.conftest import engine_named
from tests.live.store_faults.campaign import Row, Timing, run_fault, with_load
from tests.live.store_faults.faults import FAULTS, Fault
from tests.live.store_faults.kills import Kills, run_kills
from tests.live.store_faults.kills import with_load as kills_with_load
from tests.live.store_faults.report import fault_table, kills_table, show
from tests.live.store_faults.stage import set_up


def main() -> int:
    usual = Timing()
    parser = argparse.ArgumentParser(prog="python -m tests.live.store_faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="how often the proxy is killed")
    parser.add_argument(
        "--engine", default="redis-7.0", help="a name that the live tests know, or a server program"
    )
    parser.add_argument("--seconds", type=float, default=usual.during, help="how long each fault lasts")
    parser.add_argument("--fault", default="", help="only those whose names contain this")
    parser.add_argument("--seed", type=int, help="of the load and the kills; random, and printed, without it")
    given = parser.parse_args()
    faults = [fault for fault in FAULTS if given.fault in fault.name]
    seed = random.randrange(2**32) if given.seed is None else given.seed
    try:
        engine = engine_named(given.engine)
    except KeyError:
        engine = find_engine(given.engine)
    except pytest.skip.Exception as absent:
        print(absent, file=sys.stderr)
        return 2
    print(f"{engine}, seed {seed}", flush=True)
    rows, kills, load = trio.run(
        campaign, engine, faults, replace(usual, during=given.seconds), given.kills, seed
    )
    show(fault_table(rows))
    is_kept = not any(row.broken for row in rows)
    if kills is not None:
        show(kills_table(kills))
        is_kept = is_kept and not kills.broken
    for kind, told in load["examples"].items():
        print(*(f"{kind}: {example}" for example in told), sep="\n")
    return 0 if is_kept else 1


async def campaign(
    engine: Engine, faults: list[Fault], timing: Timing, kill_count: int, seed: int
) -> tuple[list[Row], Kills | None, dict[str, Any]]:
    """All rows, with what the load saw."""
    with tempfile.TemporaryDirectory(prefix="steadyread-store-faults-") as directory:
        async with set_up(engine, Path(directory), seed=seed) as (stage, load):
            rows = []
            for fault in faults:
                rows.append(await run_fault(stage, load, fault, timing))
                print(f"{fault.name}: {rows[-1].skipped or rows[-1].broken or 'done'}", flush=True)
            kills = await run_kills(stage, load, kill_count, seed) if kill_count else None
            result = await load.finish()
    rows = [with_load(row, result) for row in rows]
    return rows, kills and kills_with_load(kills, result), result


if __name__ == "__main__":
    sys.exit(main())
