"""No wrong read while slots move: the short form of the campaign, on each engine, by each kind of move.

The long form is ``python -m tests.live.campaign``. Latencies are printed and not asserted, because the
machine that runs the tests does other things too.
"""

from __future__ import annotations

import pytest

from proxy.embedded.engine import Engine
from tests.live.campaign.campaign import CampaignOptions, MoveKind, moves_of, run_campaign_on
from tests.live.campaign.keys import FaultKind
from tests.live.campaign.proxies import Steadyread
from tests.live.campaign.report import faults, remarks, table
from tests.live.conftest import ClusterStarter

SHORT = CampaignOptions(seconds=0, slots_moved=2, quiet_seconds=1.0, rate=1000.0)  # once there and back
READS_MIN = 500  # fewer in one kind of move would show little


@pytest.mark.live
async def test_no_read_is_wrong_while_slots_move(engine: Engine, share_cluster: ClusterStarter) -> None:
    """Promises 1 and 2: fifty clients see no nil for a key that exists, nothing older than what was
    acknowledged, no error, no redirection, and no silence; and every command of the load is known."""
    async with share_cluster(replicas=1) as cluster:
        outcome = await run_campaign_on(cluster, Steadyread(), SHORT)
    print(f"\n{table([outcome])}\n{remarks(outcome)}")
    assert outcome.load["unsupported"] == {}
    assert tuple(outcome.moved) == moves_of(engine, tuple(MoveKind))
    for kind in outcome.moved:
        assert faults(outcome, kind) == dict.fromkeys(FaultKind, 0), remarks(outcome)
        assert outcome.phase(kind, "moving")["reads"] + outcome.phase(kind, "quiet")["reads"] > READS_MIN
    assert outcome.load["scans"] > 0
