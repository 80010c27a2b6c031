"""Whatever is read of a snapshot is one moment of the whole cluster: the campaign's short form.

The long form is ``python -m tests.live.snapshots``.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

import pytest

from tests.live.campaign.campaign import MOVED_SLOTS
from tests.live.conftest import engine_named
from tests.live.levels.campaign import Movement
from tests.live.snapshots.campaign import Options, Outcome, Target, run_campaign
from tests.live.snapshots.checks import Fault
from tests.live.snapshots.faults import Kind
from tests.live.snapshots.lives import LifeOptions
from tests.live.snapshots.load import LoadOptions
from tests.live.snapshots.report import remarks, table

pytestmark = pytest.mark.live

SHORT = Options(
    seconds=2.0,
    slots_moved=1,
    load=LoadOptions((MOVED_SLOTS[0], 7000, 12000), keys_per_slot=4, write_rate=200.0),
    lives=LifeOptions(life_seconds=(1.0, 2.0)),
)
# What reads of live data break; they are never older than what was acknowledged.
BROKEN_BY_LIVE_READS = {
    Fault.CHANGED,
    Fault.UNCAUSED,
    Fault.TORN,
    Fault.UNLIKE_DUMP,
    Fault.NEWER,
    Fault.LISTING,
}


async def run(engine: str, options: Options) -> Outcome:
    async with aclosing(run_campaign(engine_named(engine), options)) as running:
        [outcome] = [outcome async for outcome in running]
    print(f"\n{remarks(outcome)}\n{table([outcome])}")
    return outcome


@pytest.mark.parametrize(
    ("engine", "movement"),
    [
        ("redis-6.2", Movement.NONE),
        ("redis-7.0", Movement.STEPWISE),
        ("redis-8.0", Movement.NONE),
        ("valkey-8.1", Movement.NONE),
        ("valkey-9.1", Movement.ATOMIC),
    ],
)
async def test_a_snapshot_is_one_moment_of_the_whole_cluster(engine: str, movement: Movement) -> None:
    """Promises 1 to 4, with writers on all types, three snapshots open at once, and moves where they are named; two
    proxies where nothing moves. Nothing is left when all are closed."""
    proxies = 2 if movement is Movement.NONE else 1
    outcome = await run(engine, replace(SHORT, movements=(movement,), proxies=proxies))
    assert outcome.is_clean, remarks(outcome)


async def test_a_snapshot_outlives_its_proxy() -> None:
    """The proxy is killed twice in the middle of its work: what it had opened is exact afterwards, or refused."""
    outcome = await run(
        "redis-7.0", replace(SHORT, movements=(Movement.NONE,), faults=(Kind.KILL_PROXY,), seconds=1.0)
    )
    assert outcome.is_clean, remarks(outcome)


async def test_reads_of_live_data_are_blamed() -> None:
    """The checks can fail, each of them: readers that see live data in place of a snapshot break every one."""
    outcome = await run("redis-7.0", replace(SHORT, movements=(Movement.NONE,), target=Target.PLAIN))
    assert not outcome.is_clean
    assert set(outcome.tally.faults) >= BROKEN_BY_LIVE_READS
    assert Fault.WRITE not in outcome.tally.faults
    assert Fault.LEFTOVER not in outcome.tally.faults
