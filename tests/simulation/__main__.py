"""python -m tests.simulation --seeds 1-2000: play seeded histories, and name the seed of each that breaks a promise.

Ends with 0 when none did, 1 otherwise. With --plant, a fault is planted in the protocol, and 0 means that it was found.
--seed N --log shows one history, message by message.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.simulation.campaign import Summary, play
from tests.simulation.plants import PLANTS

PROGRESS_SECONDS = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", default="1-2000", help="FIRST-LAST, or one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--plant", default="", choices=["", *PLANTS], help="a fault to plant")
    parser.add_argument("--log", action="store_true", help="with one seed: all that was sent, and when")
    given = parser.parse_args()
    first, _, last = given.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    if given.log:
        return show(seeds[0], given.plant)
    summary = Summary()
    said_at = began = time.monotonic()
    outcomes = play(seeds, jobs=given.jobs, plant=given.plant)
    for outcome in outcomes:
        summary.add(outcome)
        if outcome.broken:
            print(f"seed {outcome.seed}: {outcome.broken}", flush=True)
            if given.plant:
                break
        if time.monotonic() - said_at > PROGRESS_SECONDS:
            said_at = time.monotonic()
            print(f"{summary.histories} of {len(seeds)} after {said_at - began:.0f} s", flush=True)
    outcomes.close()
    print(summary)
    print(f"{time.monotonic() - began:.1f} s")
    broken = summary.broken
    return int(not broken if given.plant else bool(broken))


def show(seed: int, plant: str) -> int:
    """One history, in a process that hashes as the workers do."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    from contextlib import nullcontext

    from tests.simulation.history import run

    outcome = run(seed, keeps_log=True, plant=PLANTS[plant] if plant else nullcontext)
    print("\n".join(outcome.log))
    print(outcome.broken or "no promise was broken")
    return int(bool(outcome.broken))


if __name__ == "__main__":
    sys.exit(main())
