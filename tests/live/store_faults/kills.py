"""SIGKILL at random moments of a proxy's life, its start included, while slots move and events are written.

Each life begins with the same file. After each death the file is looked at as it lies there; the next proxy must
serve the right map; and in the end the record must tell of everything, or say when nobody looked.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from tests.live.campaign.campaign import LoadProcess
from tests.live.campaign.keys import FaultKind
from tests.live.store_faults.campaign import untrue_versions
from tests.live.store_faults.record import Record, read_copy, read_record
from tests.live.store_faults.stage import Stage
from tests.live.store_faults.truth import (
    TOLD_SECONDS,
    HandOver,
    gap_of,
    lives_without_notice,
    numbering_faults,
    unrecorded,
)

# From a proxy's start to its death: before it serves, before it looks, and long after.
LIFE_SECONDS = (0.2, 4.5)
RIGHT_SECONDS = 2.0  # from serving to the right map
CAUGHT_UP_SECONDS = 12.0  # for the last proxy, whose predecessor's lease must end first
POLL_SECONDS = 0.1
KILLED = "killed"  # the load's phase
WRONG = (FaultKind.NIL, FaultKind.STALE, FaultKind.WRONG, FaultKind.MISSED)


@dataclass(frozen=True, slots=True)
class Kills:
    """What the deaths did."""

    seed: int
    count: int
    served: int  # of the proxies that were killed, those that had served
    discoverers: int  # of all, those that recorded something
    moved: int
    events: int
    gap_seconds: float  # that nobody looked, as the events say
    slowest_right_seconds: float
    broken: tuple[str, ...]
    reads: int = 0
    writes: int = 0
    wrong: int = 0  # replies; those that a death cut off are none


async def run_kills(stage: Stage, load: LoadProcess, count: int, seed: int) -> Kills:
    """Raises what starting and moving raise."""
    rng = random.Random(seed)
    file = stage.directory / "killed.sqlite"
    broken: list[str] = []
    served, slowest_right = 0, 0.0
    began_at = time.time()
    last_number = 0
    await load.enter(KILLED)
    for number in range(1, count + 1):
        proxy = await stage.start(file)
        dies_at = trio.current_time() + rng.uniform(*LIFE_SECONDS)
        try:
            with trio.move_on_at(dies_at):
                await stage.wait_serving(proxy)
                served += 1
                slowest_right = max(slowest_right, await _seconds_until_right(stage))
                await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                proxy.kill()
                await proxy.wait()
        if file.exists() and file.stat().st_size > 0:
            record = read_copy(file)
            broken += [f"kill {number}: {text}" for text in _faults_of(record)]
            if record.event_count < last_number:
                broken.append(
                    f"kill {number}: {last_number} events were recorded, and {record.event_count} are left"
                )
            last_number = record.event_count
    async with stage.serving(file):
        slowest_right = max(slowest_right, await _seconds_until_right(stage))
        record = await _caught_up(stage, file)
    if slowest_right > RIGHT_SECONDS:
        broken.append(f"a proxy had the right map only after {slowest_right:.1f} s")
    moves = _moves_owed(stage, record)
    broken += [f"{move} is not in the record" for move in unrecorded(moves, record.events)]
    broken += _faults_of(record) + lives_without_notice(record.events)
    if not moves:
        broken.append("the last proxy recorded nothing")
    if untrue := untrue_versions(stage, record, began_at):
        broken.append(f"maps that never were: {untrue}")
    gaps = [gap for event in record.events if (gap := gap_of(event)) is not None]
    return Kills(
        seed=seed,
        count=count,
        served=served,
        discoverers=len({event.seen_by for event in record.events}),
        moved=len(moves),
        events=record.event_count,
        gap_seconds=sum(until - since for since, until in gaps),
        slowest_right_seconds=slowest_right,
        broken=tuple(broken),
    )


def with_load(kills: Kills, result: dict[str, Any]) -> Kills:
    """With what the load saw; ``result`` is `workload.Load.result`."""
    phase = result["phases"][KILLED]
    wrong = sum(phase["faults"][kind.value] for kind in WRONG)
    broken = (*kills.broken, f"{wrong} replies were wrong") if wrong else kills.broken
    return replace(kills, reads=phase["reads"], writes=phase["writes"], wrong=wrong, broken=broken)


async def _seconds_until_right(stage: Stage) -> float:
    """Until the proxy shows what the cluster says, on both sides of one look."""
    began = trio.current_time()
    while True:
        before = await _cluster_owners(stage)
        sight = await stage.look()
        if sight is not None and sight.owners == before == await _cluster_owners(stage):
            return trio.current_time() - began
        await trio.sleep(POLL_SECONDS / 5)


async def _cluster_owners(stage: Stage) -> tuple[str, ...]:
    """By the two nodes between which the slots move; a slot that both or none claim fits nothing."""
    home, away = stage.cluster.primaries[:2]
    maps = [(node.id, (await stage.cluster.map_at(node)).owned_by_teller) for node in (home, away)]
    return tuple(
        next(iter(claims)) if len(claims := [id_ for id_, owned in maps if slot in owned]) == 1 else "?"
        for slot in stage.truth.slots
    )


async def _caught_up(stage: Stage, file: Path) -> Record:
    """The record once the last proxy has written all that it owes, or when CAUGHT_UP_SECONDS are over."""
    ends = trio.current_time() + CAUGHT_UP_SECONDS
    while True:
        record = read_record(file)
        moves = _moves_owed(stage, record)
        if trio.current_time() > ends or (moves and not unrecorded(moves, record.events)):
            return record
        await trio.sleep(POLL_SECONDS)


def _moves_owed(stage: Stage, record: Record) -> list[HandOver]:
    """From the record's beginning until lately."""
    if not record.events:
        return []
    return stage.truth.within(record.events[0].at, time.time() - TOLD_SECONDS)


def _faults_of(record: Record) -> list[str]:
    faults = [] if record.integrity == "ok" else [f"integrity_check: {record.integrity}"]
    return faults + numbering_faults(record.events, record.event_count)
