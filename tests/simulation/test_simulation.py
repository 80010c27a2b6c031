"""Promises 1 to 6 in seeded histories of a simulated cluster; and each planted fault of the protocol is found.

The long form, and how to look at one seed: ``python -m tests.simulation --help``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.simulation.campaign import Summary, play_here, play_in, workers
from tests.simulation.plants import PLANTS

SEEDS = range(1, 2001)
JOBS = min(4, os.cpu_count() or 1)
SHARE_ANSWERED_MIN = 0.5  # of the reads at snapshots: a campaign in which most are refused shows little
OPENED_MIN = 0.5  # snapshots for each history
# A plant is looked for in so many seeds, from its first on, so that those before need not be played.
SEEDS_FOR_A_PLANT = 60
FIRST_SEED: dict[str, int] = {}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with workers(JOBS) as pool:
        yield pool


def test_one_seed_gives_one_history(pool: ProcessPoolExecutor) -> None:
    """A seed that fails can be played again: in another process, after other seeds."""
    (first, second) = pool.submit(play_here, [7, 8]).result()
    (again,) = pool.submit(play_here, [8]).result()
    assert again.trace == second.trace
    assert first.trace != second.trace


def test_histories_keep_the_promises(pool: ProcessPoolExecutor) -> None:
    """While slots move, nodes and proxies die, stand still and come back; with up to three snapshots open."""
    summary = Summary()
    for outcome in play_in(pool, SEEDS):
        summary.add(outcome)
    print(f"\n{summary}")
    broken = "\n".join(f"seed {seed}: {what}" for seed, what in sorted(summary.broken.items()))
    assert not summary.broken, f"look at one with python -m tests.simulation --log --seeds SEED\n{broken}"
    counts = summary.counts
    answered = counts.snapshot_reads / (counts.snapshot_reads + counts.snapshot_reads_refused)
    assert answered > SHARE_ANSWERED_MIN
    assert counts.snapshots_opened > OPENED_MIN * summary.histories


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(pool: ProcessPoolExecutor, plant: str) -> None:
    """By a seed that breaks no promise without it."""
    first = FIRST_SEED.get(plant, 1)
    for outcome in play_in(pool, range(first, first + SEEDS_FOR_A_PLANT), plant):
        if outcome.broken:
            (clean,) = pool.submit(play_here, [outcome.seed]).result()
            assert not clean.broken, f"seed {outcome.seed} is broken without the plant: {clean.broken}"
            print(f"\n{plant}: seed {outcome.seed}: {outcome.broken[:200]}")
            return
    pytest.fail(f"seeds {first} to {first + SEEDS_FOR_A_PLANT - 1} do not find it")
