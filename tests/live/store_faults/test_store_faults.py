"""No fault of the topology store stops traffic, harms its file or loses events unsaid: the campaign's short form.

The long form is ``python -m tests.live.store_faults``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.conftest import engine_named
from tests.live.store_faults.campaign import Timing, run_fault, with_load
from tests.live.store_faults.faults import FAULTS
from tests.live.store_faults.kills import run_kills
from tests.live.store_faults.kills import with_load as kills_with_load
from tests.live.store_faults.report import fault_table, kills_table, show
from tests.live.store_faults.stage import set_up

SHORT = Timing(before=0.5, during=2.5)
SHOWN = ("locked by another process (IMMEDIATE)", "disk full", "deleted, with -wal and -shm")
KILLS = 3
READS_MIN = 200  # while a fault lasts; fewer would show little


@pytest.mark.live
async def test_no_fault_of_the_store_is_felt(tmp_path: Path) -> None:
    """Promise 8: while the store is locked, full or gone, and when its proxy is killed, each reply is right and
    none is late, the view follows each move, health says what is wrong, and the record has it all, or says not."""
    seed = 8
    async with set_up(engine_named("redis-7.0"), tmp_path, seed=seed) as (stage, load):
        rows = [await run_fault(stage, load, fault, SHORT) for fault in FAULTS if fault.name in SHOWN]
        kills = await run_kills(stage, load, KILLS, seed)
        seen = await load.finish()
    rows = [with_load(row, seen) for row in rows]
    kills = kills_with_load(kills, seen)
    for table in (fault_table(rows), kills_table(kills)):
        show(table)
    assert len(rows) == len(SHOWN)
    assert {row.fault: row.broken for row in rows if row.broken} == {}
    assert all(row.reads > READS_MIN for row in rows if not row.skipped)
    assert kills.broken == ()
