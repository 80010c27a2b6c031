"""Every reply is as fresh as its level claims while links are cut and slots move: the campaign's short form.

The long form is ``python -m tests.live.levels``. Latencies are printed and not asserted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.levels import Level
from tests.live.conftest import engine_named
from tests.live.levels.campaign import Movement, Options, run_campaign
from tests.live.levels.checks import Fault
from tests.live.levels.report import faults, remarks, table
from tests.live.levels.targets import ReplicaReaders, Steadyread

SHORT = Options(
    levels=(Level.CAUGHT_UP, Level.BOUNDED_STALENESS, Level.SESSION),
    seconds=5.0,
    healthy_seconds=1.5,
    together=True,
    slots_moved=2,
)
READS_MIN = 500  # fewer of one level would show little
DOWN_SHARE_MIN = 0.3  # of the time, for which links must have been down
HEALTHY_SHARES = {Level.CAUGHT_UP: 0.8, Level.BOUNDED_STALENESS: 0.95}  # of the reads, by replicas


@pytest.mark.live
@pytest.mark.parametrize(
    ("engine", "movement"), [("redis-7.0", Movement.STEPWISE), ("valkey-9.1", Movement.ATOMIC)]
)
async def test_every_reply_is_as_fresh_as_its_level_claims(engine: str, movement: Movement) -> None:
    """Promises 1 and 2, with two proxies; and replicas do carry the reads while links are healthy.

    Plain clients that read at replicas at the same time see stale values, so there were some to be seen.
    """
    *outcomes, witness = await run_campaign(
        engine_named(engine), Steadyread(), replace(SHORT, movements=(movement,)), witness=ReplicaReaders()
    )
    print(f"\n{table([*outcomes, witness])}")
    assert witness.cut.faults[Fault.STALE] > 0
    assert witness.links.down_share > DOWN_SHARE_MIN
    assert [outcome.level for outcome in outcomes] == list(SHORT.levels)
    for outcome in outcomes:
        assert faults(outcome) == dict.fromkeys(Fault, 0), remarks(outcome)
        assert outcome.cut.reads > READS_MIN
        assert outcome.healthy_share is not None
        assert outcome.healthy_share >= HEALTHY_SHARES.get(outcome.level, 0.0)
        assert outcome.cut_share
    sessions = outcomes[-1].cut
    assert 0 < sessions.door_changes < sessions.reconnects
