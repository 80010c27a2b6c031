"""One row for each fault: the proxy serves, the fault comes, traffic and slot moves go on, the fault ends.

Each row has a store and a proxy of its own, behind the same ports; the load and the moves go on throughout.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from routing.topology import TopologyView
from tests.live.campaign.campaign import LoadProcess
from tests.live.campaign.keys import FaultKind
from tests.live.store_faults.faults import Fault, NotHere, Target, own_disk
from tests.live.store_faults.record import Record, beside, read_record
from tests.live.store_faults.stage import Sight, Stage
from tests.live.store_faults.truth import (
    TOLD_SECONDS,
    Owners,
    gap_of,
    numbering_faults,
    tells_loss,
    unrecorded,
)

WARNED_SECONDS = 2.0  # from the fault to the warning
CLEARED_SECONDS = 5.0  # from the fault's end to the last warning
FOLLOWED_SECONDS = 1.5  # from a slot's hand-over to the view that shows it
PAUSE_MS = 500.0  # a request may take so much longer than the longest before the fault
SETTLE_SECONDS = 10.0  # after the fault, for the record to be caught up
POLL_SECONDS = 0.2
MOVED_MIN = 1  # hand-overs while the fault lasts
BETWEEN = "between"  # the load's phase while proxies stop and start
BEFORE = ": before"
NOTICE = "while it was in use"  # an exchange of the file is over at once, and is told for some minutes
ERRORS = (FaultKind.ERROR, FaultKind.LEAKED, FaultKind.HANG)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    before: float = 3.0
    during: float = 4.0


@dataclass(frozen=True, slots=True)
class Row:
    """What one fault did. Times in seconds are None where it never came to that."""

    fault: str
    remark: str = ""
    reads: int = 0
    writes: int = 0
    errors: int = 0
    wrong: int = 0
    pause_before_ms: float | None = None  # the longest that a request took
    pause_ms: float = 0.0  # the same while the fault lasted, and after it
    warned_seconds: float | None = None
    cleared_seconds: float | None = None
    integrity: str = "-"
    events: int = 0
    gaps: int = 0  # events that name a gap or a loss
    moved: int = 0  # hand-overs while the fault lasted
    followed_seconds: float | None = None  # the slowest of them
    broken: tuple[str, ...] = ()  # promises
    skipped: str = ""  # why it could not be made here


async def run_fault(stage: Stage, load: LoadProcess, fault: Fault, timing: Timing) -> Row:
    """The row but for what the load saw, which ``with_load`` adds. Raises what starting and moving raise."""
    await load.enter(BETWEEN)
    folder = stage.directory / "".join(c if c.isalnum() else "-" for c in fault.name)
    with own_disk(folder) if fault.needs_disk else _directory(folder):
        target = Target(folder / "topology.sqlite", None)
        async with AsyncExitStack() as proxy, AsyncExitStack() as lasting:
            try:
                return await _carry_out(stage, load, fault, timing, target, proxy, lasting)
            except NotHere as reason:
                return Row(fault.name, skipped=str(reason))


async def _carry_out(
    stage: Stage,
    load: LoadProcess,
    fault: Fault,
    timing: Timing,
    target: Target,
    proxy: AsyncExitStack,
    lasting: AsyncExitStack,
) -> Row:
    if fault.at_start:
        await lasting.enter_async_context(fault.during(target))
    content = content_of(target.file)
    target.proxy = await proxy.enter_async_context(stage.serving(target.file))
    began_at = time.time()
    if not fault.at_start:
        await stage.wait_moved(1)
        await load.enter(before(fault.name))
        await trio.sleep(timing.before)
    await load.enter(during(fault.name))
    if not fault.at_start:
        await lasting.enter_async_context(fault.during(target))
    fault_at = time.time()
    async with trio.open_nursery() as both:
        both.start_soon(trio.sleep, timing.during)
        both.start_soon(stage.wait_moved, MOVED_MIN)
    over_at = time.time()
    is_as_it_was = content_of(target.file) == content
    if not fault.is_refused:
        await lasting.aclose()
        await _settle(stage, fault, target.file, began_at, fault_at, over_at)
    await load.enter(BETWEEN)
    try:
        record = read_record(target.file)
    except sqlite3.Error as error:
        record = Record(str(error), 0, (), ())
    row = Row(fault.name, remark=target.remark)
    row = _with_sights(row, stage, fault, target.file, fault_at, over_at)
    row = _with_moves(row, stage, fault_at, over_at)
    if fault.is_refused:
        return _broken_if(row, not is_as_it_was, "the file was changed")
    return _with_record(row, stage, fault, record, began_at, fault_at, over_at)


async def _settle(
    stage: Stage, fault: Fault, file: Path, began_at: float, fault_at: float, over_at: float
) -> None:
    """Return when nothing is amiss any more, or after SETTLE_SECONDS."""
    await stage.wait_moved(1)
    while time.time() < over_at + SETTLE_SECONDS:
        with suppress(sqlite3.Error):
            row = _with_sights(Row(""), stage, fault, file, fault_at, over_at)
            if not _with_record(row, stage, fault, read_record(file), began_at, fault_at, over_at).broken:
                return
        await trio.sleep(POLL_SECONDS)


def _with_sights(row: Row, stage: Stage, fault: Fault, file: Path, fault_at: float, over_at: float) -> Row:
    """When health began to warn of the store, and when it ceased to."""
    sights = [(sight.at, store_warnings(sight, file)) for sight in stage.sights if sight.at >= fault_at]
    first = next((at for at, warnings in sights if warnings), None)
    if first is not None:
        row = replace(row, warned_seconds=first - fault_at)
    if fault.warns:
        is_late = row.warned_seconds is None or row.warned_seconds > WARNED_SECONDS
        row = _broken_if(row, is_late, f"health did not warn within {WARNED_SECONDS:g} s")
        told = " ".join(warning for _, warnings in sights for warning in warnings)
        row = _broken_if(row, fault.says not in told, f"health does not say {fault.says!r}: {told[:200]}")
    if fault.is_refused:
        return row
    failing = [at for at, warnings in sights if any(NOTICE not in warning for warning in warnings)]
    last = max(failing, default=over_at)
    if not sights or last == sights[-1][0]:
        return _broken_if(row, True, "health warns on after the fault's end")
    row = replace(row, cleared_seconds=max(0.0, last - over_at))
    return _broken_if(row, last - over_at > CLEARED_SECONDS, f"health warned on for {last - over_at:.1f} s")


def _with_moves(row: Row, stage: Stage, fault_at: float, over_at: float) -> Row:
    moves = stage.truth.within(fault_at, over_at)
    followed = [stage.followed_seconds(move) for move in moves]
    row = replace(row, moved=len(moves))
    row = _broken_if(row, len(moves) < MOVED_MIN, "no slot moved while the fault lasted")
    if None in followed:
        return _broken_if(row, True, "the view did not follow a slot's move")
    slowest = max((seconds for seconds in followed if seconds is not None), default=0.0)
    row = replace(row, followed_seconds=slowest)
    return _broken_if(row, slowest > FOLLOWED_SECONDS, f"the view followed after {slowest:.1f} s")


def _with_record(
    row: Row, stage: Stage, fault: Fault, record: Record, began_at: float, fault_at: float, over_at: float
) -> Row:
    """What the file must hold now."""
    row = replace(
        row,
        integrity=record.integrity,
        events=sum(event.at >= fault_at for event in record.events),
        gaps=sum(event.at >= fault_at and gap_of(event) is not None for event in record.events),
    )
    row = _broken_if(row, record.integrity != "ok", f"integrity_check: {record.integrity}")
    for text in numbering_faults(record.events, record.event_count):
        row = _broken_if(row, True, text)
    has_told = any(tells_loss(event) for event in record.events if event.at >= fault_at)
    row = _broken_if(row, fault.loses_record and not has_told, "no event tells that the record was lost")
    settled = stage.truth.within(began_at, time.time() - TOLD_SECONDS)
    row = _broken_if(
        row, not any(move.ended_at > over_at for move in settled), "nothing moved after the fault"
    )
    for move in unrecorded(settled, record.events):
        row = _broken_if(row, True, f"{move} is not in the record")
    return _broken_if(
        row, bool(untrue := untrue_versions(stage, record, began_at)), f"maps that never were: {untrue}"
    )


def untrue_versions(stage: Stage, record: Record, since: float) -> list[str]:
    """The recorded maps that the cluster never had, and what they say. What moves right now is not judged."""
    truth = stage.truth
    until = truth.hand_overs[-1].ended_at
    return [
        f"version {version.number} of {version.at:.3f}: {truth.told(owners, version.at)}"
        for version in record.versions
        if since <= version.at <= until
        and not truth.are_owners(owners := owners_of(version.view, truth.slots), version.at)
    ]


def owners_of(view: TopologyView, slots: Sequence[int]) -> Owners:
    return tuple("" if (node := view.primary_of(slot)) is None else node.id for slot in slots)


def store_warnings(sight: Sight, file: Path) -> list[str]:
    """Those of its warnings that are about the store."""
    return [warning for warning in sight.warnings if str(file) in warning or "topology store" in warning]


def content_of(file: Path) -> list[bytes]:
    """The bytes of the database and of its -wal. An empty -wal is as good as none: readers make one."""
    return [path.read_bytes() if path.exists() else b"" for path in (file, beside(file, "-wal"))]


def with_load(row: Row, result: dict[str, Any]) -> Row:
    """The row with what the load saw; ``result`` is `workload.Load.result`."""
    if row.skipped:
        return row
    phases: dict[str, Any] = result["phases"]
    quiet = [phase["free_latency_ms"]["max"] for name, phase in phases.items() if name.endswith(BEFORE)]
    own = phases.get(before(row.fault))
    usual = max(quiet, default=0.0) if own is None else own["free_latency_ms"]["max"]
    phase = phases[during(row.fault)]
    errors = sum(phase["faults"][kind.value] for kind in ERRORS)
    row = replace(
        row,
        reads=phase["reads"],
        writes=phase["writes"],
        errors=errors,
        wrong=sum(phase["faults"].values()) - errors,
        pause_before_ms=usual,
        pause_ms=phase["free_latency_ms"]["max"],
    )
    row = _broken_if(row, row.errors > 0, f"{row.errors} requests failed")
    row = _broken_if(row, row.wrong > 0, f"{row.wrong} replies were wrong")
    return _broken_if(row, row.pause_ms > usual + PAUSE_MS, f"a request took {row.pause_ms:.0f} ms")


def before(fault_name: str) -> str:
    return f"{fault_name}{BEFORE}"


def during(fault_name: str) -> str:
    return f"{fault_name}: during"


def _broken_if(row: Row, is_broken: bool, promise: str) -> Row:
    return replace(row, broken=(*row.broken, promise)) if is_broken else row


@contextmanager
def _directory(path: Path) -> Iterator[None]:
    path.mkdir()
    yield
