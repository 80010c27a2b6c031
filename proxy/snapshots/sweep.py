"""Sweeps the markers and pre-images of snapshots that are kept no more, at a pace that traffic does not notice.

A pass is one SCAN over every primary. What it finds is deleted page by page, of each page the markers first: a late
reader who finds no pre-image then finds no marker either, and knows. For a pre-image whose marker is elsewhere in the
scan the marker's name is known all the same, so a page needs no other.

Keys that move while a pass goes on may be missed. So passes repeat until one found nothing to delete while the map
stood still; the last word on that has a look at the cluster that began after the pass. Errors of nodes end a pass,
and the next begins anew: a sweep has no state but the keys themselves.

Only names that this program makes are deleted, of ids that ``sweepable`` gives up and the chain does not have; and
nothing at all while proxies that share no store use the cluster: their snapshots are unknown here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import trio

from proxy.log import get_logger
from proxy.metrics import PREFIX, Family, MetricType, Sample
from proxy.protocol.encode import command, frame
from proxy.protocol.replies import ReplyError, decode
from proxy.snapshots.abandoned import ASK_FAILURES, Ask
from proxy.topology.service import Topology
from routing import snapshot_names
from routing.slot import slot_of
from routing.snapshot import Chain
from routing.topology import Address, TopologyView

SCAN_COUNT = 1000
KEYS_PER_UNLINK = 100
UNLINKS_AT_ONCE = 16
REPEAT_SECONDS = 1.0  # between passes while keys are left or nodes fail; it doubles up to the interval
LOOK_SECONDS_MAX = 5.0  # for which a pass waits to hear that the map stood still
LOOK_CHECK_SECONDS = 0.02

# The reply to one request on one slot, redirections followed; an error reply when that did not succeed.
Execute = Callable[[bytes, int], Awaitable[bytes]]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SweepPace:
    """``settle_seconds``: after a change of the chain, writes that went by the former one are answered by then."""

    pause_seconds: float
    interval_seconds: float
    settle_seconds: float


class _PassError(Exception):
    """A pass ended early; the text says why."""


@dataclass(slots=True)
class _Pass:
    """What one pass saw."""

    began: float  # trio time
    found: int = 0  # keys to delete
    swept: int = 0
    kept: int = 0  # keys of snapshots that are kept, or not known to be given up
    foreign: bytes = b""  # the first key with such a name that nobody here made
    has_absent: bool = False
    is_still: bool = False  # the map was the same from beginning to end, and nothing was moving


class Sweeper:
    """See the module's text. ``sweepable`` answers for ids that were allocated and whose record is open no more."""

    def __init__(
        self,
        ask: Ask,
        execute: Execute,
        topology: Topology,
        pace: SweepPace,
        *,
        chain: Callable[[], Chain],
        sweepable: Callable[[int], bool],
        strangers: Callable[[], Awaitable[list[str]]],
    ) -> None:
        """``strangers``: why other proxies may use the cluster unknown to the store, asked anew; [] if none do."""
        self.pace = pace
        self.keys_swept_total = 0
        self.passes_total = 0
        self.passes_failed_total = 0
        self.running_since: float | None = None  # trio time; None while no pass runs
        self._ask = ask
        self._execute = execute
        self._topology = topology
        self._chain = chain
        self._sweepable = sweepable
        self._strangers = strangers
        self._may_have_keys = True
        self._problems: list[str] = []
        self._was_stuck = (
            False  # the last pass found keys and could delete none: another sweeper's work, if once
        )
        self._ids = set(chain().ids)
        self._changed_at = -inf  # trio time
        self._wake = trio.Event()

    @property
    def may_have_keys(self) -> bool:
        """Whether the cluster may hold keys of snapshots: False only after a pass that proved that it has none."""
        return self._may_have_keys or bool(self._chain().ids)

    def chain_changed(self) -> None:
        """To be called at every change of the chain, after it. What left the chain is swept soon."""
        before, self._ids = self._ids, set(self._chain().ids)
        self._changed_at = trio.current_time()
        self._may_have_keys = True
        if before - self._ids:
            self._wake.set()

    def problems(self) -> list[str]:
        """What keeps keys from being swept, or is wrong with them, one sentence each."""
        return list(self._problems)

    def samples(self) -> Iterator[Sample]:
        yield Sample(KEYS_SWEPT, self.keys_swept_total)
        yield Sample(PASSES, self.passes_total)
        yield Sample(PASSES_FAILED, self.passes_failed_total)
        yield Sample(
            RUNNING_SECONDS, 0.0 if self.running_since is None else trio.current_time() - self.running_since
        )
        yield Sample(MAY_HAVE_KEYS, int(self.may_have_keys))

    async def run(self) -> None:
        """Sweep when something left the chain, and at each interval. Runs until cancelled."""
        self._changed_at = trio.current_time()  # what a predecessor sent may be on its way
        pause = REPEAT_SECONDS
        while True:
            self._wake = trio.Event()
            done = await self.sweep_once()
            if done is None or done.found or not done.is_still:
                if done is not None and done.swept:
                    pause = REPEAT_SECONDS
                wait = min(pause, self.pace.interval_seconds)
                pause = min(pause * 2, self.pace.interval_seconds)
            else:
                pause = REPEAT_SECONDS
                wait = self.pace.interval_seconds
                settled_at = self._changed_at + self.pace.settle_seconds
                if self.may_have_keys and not self._chain().ids and done.began < settled_at:
                    wait = min(wait, max(0.0, settled_at - trio.current_time()))
            with trio.move_on_after(wait):
                await self._wake.wait()

    async def sweep_once(self) -> _Pass | None:
        """One pass; None if it ended early, and ``problems`` says why. If cancelled, some keys may be deleted."""
        self.running_since = trio.current_time()
        current = _Pass(self.running_since)
        try:
            await self._pass(current)
        except _PassError as error:
            self.passes_failed_total += 1
            if self._problems != [str(error)]:
                log.warning("sweep_failed", error=str(error))
            self._problems = [str(error)]
            return None
        finally:
            self.running_since = None
            self.keys_swept_total += current.swept
        self.passes_total += 1
        is_stuck = bool(current.is_still and current.found and not current.swept)
        self._problems = _problems_of(current, is_stuck and self._was_stuck)
        self._was_stuck = is_stuck
        if self._proves_no_keys(current):
            self._may_have_keys = False
        if current.swept:
            log.info("swept", keys=current.swept, kept=current.kept)
        return current

    def _proves_no_keys(self, done: _Pass) -> bool:
        return (
            done.is_still
            and not (done.found or done.kept or done.foreign or done.has_absent)
            and done.began >= self._changed_at + self.pace.settle_seconds
        )

    async def _pass(self, current: _Pass) -> None:
        if strangers := await self._strangers():
            raise _PassError(f"nothing is swept: {strangers[0]}")
        view = self._topology.view
        if not view.shards:
            raise _PassError("nothing is swept: the cluster is not known yet")
        for shard in view.shards:
            cursor = b"0"
            while True:
                cursor, names = await self._page(shard.primary.address, cursor)
                await self._sweep_page(names, current)
                if cursor == b"0":
                    break
                await trio.sleep(self.pace.pause_seconds)
        current.is_still = not view.migrations and await self._stood_still(view)

    async def _stood_still(self, before: TopologyView) -> bool:
        """Whether a look at the cluster that begins now finds the same map, and nothing moving."""
        topology, now = self._topology, trio.current_time()
        topology.refresh_soon()
        with trio.move_on_after(LOOK_SECONDS_MAX):
            while topology.looked_at <= now:
                await trio.sleep(LOOK_CHECK_SECONDS)
        view = topology.view
        return (
            topology.looked_at > now
            and not view.migrations
            and view.shard_of_slot == before.shard_of_slot
            and [shard.primary.address for shard in view.shards]
            == [shard.primary.address for shard in before.shards]
        )

    # -- finding

    async def _page(self, address: Address, cursor: bytes) -> tuple[bytes, list[bytes]]:
        """The next cursor, and internal names at one node. Raises _PassError."""
        question = command("SCAN", cursor, "MATCH", snapshot_names.INTERNAL_PATTERN, "COUNT", SCAN_COUNT)
        try:
            answer = decode(await self._ask(address, question))
        except (*ASK_FAILURES, ReplyError) as error:
            raise _PassError(f"{address} cannot be swept: {str(error) or 'no answer in time'}") from error
        match answer:
            case [bytes() as following, list() as names]:
                return following, names
        raise _PassError(f"{address} cannot be swept: {answer!s:.200}")

    # -- deleting

    async def _sweep_page(self, names: Sequence[bytes], current: _Pass) -> None:
        markers: dict[int, dict[bytes, None]] = {}  # slot -> names
        preimages: dict[int, dict[bytes, None]] = {}  # slot -> names
        kept_ids = self._chain().ids
        for name in names:
            found = snapshot_names.parse(name)
            if found is None:
                continue
            slot = slot_of(name)
            if not found.kind:
                current.has_absent = True
                continue
            marker = snapshot_names.marker(slot, found.snapshot_id, found.key)
            preimage = snapshot_names.preimage(slot, found.snapshot_id, found.key)
            if name not in (marker, preimage) or slot_of(found.key) != slot:
                current.foreign = current.foreign or name
            elif found.snapshot_id in kept_ids or not self._sweepable(found.snapshot_id):
                current.kept += 1
            else:
                current.found += 1
                markers.setdefault(slot, {})[marker] = None
                if name == preimage:
                    preimages.setdefault(slot, {})[preimage] = None
        if markers:
            await self._unlink(markers, current)
            await self._unlink(preimages, current)

    async def _unlink(self, names: dict[int, dict[bytes, None]], current: _Pass) -> None:
        """Delete these keys. Returns once all are gone; raises _PassError when one may not be."""
        limiter = trio.CapacityLimiter(UNLINKS_AT_ONCE)
        failures: list[str] = []

        async def unlink(slot: int, keys: list[bytes]) -> None:
            async with limiter:
                if not failures:
                    try:
                        count = await self._unlinked(slot, keys)
                    except _PassError as error:
                        failures.append(str(error))
                    else:
                        current.swept += count

        async with trio.open_nursery() as nursery:
            for slot, found in names.items():
                keys = list(found)
                for first in range(0, len(keys), KEYS_PER_UNLINK):
                    nursery.start_soon(unlink, slot, keys[first : first + KEYS_PER_UNLINK])
        if failures:
            raise _PassError(failures[0])

    async def _unlinked(self, slot: int, keys: list[bytes]) -> int:
        """How many of the keys of one slot were there. While the slot is split, each is asked for by itself."""
        is_split = any(slot in migration.slots for migration in self._topology.view.migrations)
        if len(keys) > 1 and not is_split:
            count = decode(await self._execute(frame([b"UNLINK", *keys]), slot))
            if isinstance(count, int):
                return count
            # The slot came to be split meanwhile, or its node is in trouble, which a single key tells as well.
        total = 0
        for key in keys:
            count = decode(await self._execute(frame([b"UNLINK", key]), slot))
            if not isinstance(count, int):
                raise _PassError(f"keys of slot {slot} cannot be swept: {count}")
            total += count
        return total


def _problems_of(done: _Pass, is_stuck: bool) -> list[str]:
    problems = []
    if is_stuck:
        problems.append(
            f"{done.found} keys of former snapshots are left at nodes that do not serve their slots; "
            "see `redis-cli --cluster check`"
        )
    if done.foreign:
        problems.append(
            f"keys are named like those of snapshots, and are none, e.g. {done.foreign[:100]!r}: "
            "clients do not see them; delete them at the node"
        )
    if done.has_absent:
        problems.append(
            "a key steady{N}:absent exists, which snapshot reads take for missing: delete it at the node"
        )
    return problems


def _counter(name: str, help_: str) -> Family:
    return Family(f"{PREFIX}snapshot_{name}_total", help_, MetricType.COUNTER)


KEYS_SWEPT = _counter("keys_swept", "Markers and pre-images of former snapshots that this proxy deleted.")
PASSES = _counter("sweep_passes", "Whole passes over the cluster for what former snapshots left.")
PASSES_FAILED = _counter("sweep_passes_failed", "Passes that ended early; the log says why.")
RUNNING_SECONDS = Family(
    f"{PREFIX}snapshot_sweep_running_seconds",
    "For how long the pass that runs now has run; 0 while none does.",
    MetricType.GAUGE,
)
MAY_HAVE_KEYS = Family(
    f"{PREFIX}snapshot_keys_possible",
    "0 once it is proven that the cluster holds no keys of snapshots, else 1.",
    MetricType.GAUGE,
)
