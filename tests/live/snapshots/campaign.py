"""One campaign: a cluster, proxies in front of it, writers and snapshots, and slots that move under them.

An *act* begins with fresh keys and ends when all its snapshots are closed, their internal keys are gone from every
node, and DBSIZE is right. Without faults there is one act for each movement. With faults each act has one fault.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import Enum

import trio

from proxy.embedded.cluster import NODE_TIMEOUT_MS, Cluster, running_cluster
from proxy.embedded.engine import Engine
from tests.live.campaign.campaign import MOVED_SLOTS
from tests.live.levels.campaign import Movement, move_until, movements_of
from tests.live.snapshots import faults
from tests.live.snapshots.checks import Check, Fault, Tally
from tests.live.snapshots.doors import Copies, Lost, Plain, Refused, Snapshots, copies_server
from tests.live.snapshots.lives import LifeOptions, Lives
from tests.live.snapshots.load import Load, LoadOptions, names_in
from tests.live.snapshots.nodes import client_keys, flush, seconds_until_swept
from tests.live.snapshots.proxies import Proxies, running_proxies

RESIDENT_SLOTS = (100, 7000, 12000)  # one of each primary that never moves
SHORT_NODE_TIMEOUT_MS = 4_000  # where a failover is waited for; and longer than a node is frozen
LEFT_SECONDS_MAX = 20.0  # for a dead proxy's lease to end, and a sweep
CLOSE_SECONDS = 15.0
SETTINGS = (
    "snapshots.sweep_interval_seconds=1",  # what a dead proxy left is looked for each second
    "snapshots.hold_seconds=2",  # a machine that is busy with all of this may let a proxy wait for long
)


class Target(Enum):
    STEADYREAD = "steadyread"
    PLAIN = "plain reads"  # of live data, through Steadyread
    COPIES = "frozen copies"  # on a server of their own


@dataclass(frozen=True, slots=True)
class Options:
    movements: tuple[Movement, ...] = tuple(Movement)
    faults: tuple[faults.Kind, ...] = ()
    target: Target = Target.STEADYREAD
    seconds: float = 60.0  # for each movement; the last move back, or the last act, may exceed it
    proxies: int = 1
    slots_moved: int = 3
    load: LoadOptions = field(default_factory=lambda: LoadOptions(()))
    lives: LifeOptions = field(default_factory=LifeOptions)
    settings: tuple[str, ...] = ()  # NAME=VALUE of the proxies
    seed: int = 0

    @property
    def moved_slots(self) -> tuple[int, ...]:
        return MOVED_SLOTS[: self.slots_moved]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen on one engine with one movement."""

    engine: str
    movement: Movement
    options: Options
    tally: Tally
    hand_overs: int  # how many times a slot changed hands
    acts: int
    seconds: float

    @property
    def is_clean(self) -> bool:
        return not self.tally.faults.total() and not self.missing

    @property
    def missing(self) -> list[str]:
        """What was done or checked too little for the outcome to show anything."""
        tally, options = self.tally, self.options
        least = dict(CHECKED_PER_SECOND)
        if options.faults:
            least = dict.fromkeys(least, 0.0) | {Check.REPEATS: 5.0, Check.BOUNDS: 5.0}
        found = [
            f"only {tally.checked[check]} {check.value}, must be {rate * options.seconds:.0f}"
            for check, rate in least.items()
            if tally.checked[check] < rate * options.seconds
        ]
        if tally.opened < options.lives.snapshots:
            found.append(f"only {tally.opened} snapshots were opened")
        if self.movement is not Movement.NONE and not self.hand_overs:
            found.append("no slot moved")
        found += [f"no {kind.value}" for kind in options.faults if not tally.faults_done[kind.value]]
        if not options.faults:
            if tally.ended:
                found.append(f"{tally.ended} snapshots were aborted though nothing had failed")
            if tally.opens_refused.total() + tally.opens_lost > tally.opened * OPENS_REFUSED_SHARE_MAX:
                found.append(f"{tally.opens_refused.total()} openings were refused, {tally.opens_lost} lost")
            if tally.writes_refused.total() + tally.writes_lost > tally.writes * REFUSED_SHARE_MAX:
                found.append(f"{tally.writes_refused.total()} writes were refused, {tally.writes_lost} lost")
            if tally.reads_refused.total() + tally.reads_lost > tally.reads * REFUSED_SHARE_MAX:
                found.append(f"{tally.reads_refused.total()} reads were refused, {tally.reads_lost} lost")
        elif not tally.survived:
            found.append("no snapshot survived a fault")
        return found


# What a run without faults must have checked, for each second that it was to take; less shows little.
CHECKED_PER_SECOND = {
    Check.REPEATS: 40.0,
    Check.CHAINS: 2.0,
    Check.TOTALS: 1.0,
    Check.DUMPED: 20.0,
    Check.BOUNDS: 40.0,
    Check.LISTINGS: 0.2,
}
REFUSED_SHARE_MAX = 0.002
OPENS_REFUSED_SHARE_MAX = 0.25  # an attempt that meets the end of a move is given up


async def run_campaign(engine: Engine, options: Options) -> AsyncGenerator[Outcome, None]:
    """One outcome for each movement. Raises what starting, moving and killing raise. Leaves nothing running."""
    timeout_ms = SHORT_NODE_TIMEOUT_MS if faults.Kind.FAILOVER in options.faults else NODE_TIMEOUT_MS
    async with running_cluster(engine, node_timeout_ms=timeout_ms) as cluster:
        for movement in movements_of(engine, options.movements):
            settings = (*SETTINGS, *options.settings)
            async with running_proxies(cluster, options.proxies, settings) as proxies:
                yield await _Run(cluster, proxies, movement, options).outcome()  # noqa: ASYNC119


class _Run:
    """One movement on one engine."""

    def __init__(self, cluster: Cluster, proxies: Proxies, movement: Movement, options: Options) -> None:
        self._cluster = cluster
        self._proxies = proxies
        self._movement = movement
        self._options = options
        self._tally = Tally()
        self._hand_overs = 0
        self._acts = 0

    async def outcome(self) -> Outcome:
        options = self._options
        began = trio.current_time()
        if options.faults:
            while self._acts < len(options.faults) or trio.current_time() < began + options.seconds:
                await self._faulty_act(options.faults[self._acts % len(options.faults)])
                self._acts += 1
        else:
            await self._quiet_act()
            self._acts = 1
        return Outcome(
            engine=str(self._cluster.engine),
            movement=self._movement,
            options=options,
            tally=self._tally,
            hand_overs=self._hand_overs,
            acts=self._acts,
            seconds=trio.current_time() - began,
        )

    async def _quiet_act(self) -> None:
        """Snapshots come and go while slots move."""
        options = self._options
        async with self._act() as act, trio.open_nursery() as keepers:
            for number in range(options.lives.snapshots):
                keepers.start_soon(act.lives.keep, number)
            keepers.start_soon(act.lives.glimpse)
            end = trio.current_time() + options.seconds
            if self._movement is Movement.NONE:
                await trio.sleep_until((trio.current_time() + end) / 2)
                await self._count_keys(act)
            self._hand_overs += await move_until(self._cluster, self._movement, options.moved_slots, end)
            act.lives.end()

    async def _faulty_act(self, kind: faults.Kind) -> None:
        options = self._options
        async with self._act() as act:
            fault = faults.Faulty(
                self._cluster,
                self._proxies,
                act.load,
                act.lives,
                self._tally,
                random.Random(f"{options.seed}/{kind.value}/{self._acts}"),
                options.load.slots or self._slots,
            )
            if self._movement is not Movement.NONE:
                self._hand_overs += await fault.move(self._movement, options.moved_slots)
            await fault.happen(kind, options.lives.snapshots)
            self._tally.faults_done[kind.value] += 1

    @property
    def _slots(self) -> tuple[int, ...]:
        return self._options.moved_slots + RESIDENT_SLOTS

    @asynccontextmanager
    async def _act(self) -> AsyncIterator[Act]:
        options = self._options
        seed = options.seed * 1000 + self._acts
        async with AsyncExitStack() as stack:
            doors: Plain = Plain(self._proxies.addresses)
            load_options = replace(
                options.load,
                slots=options.load.slots or self._slots,
                seed=seed,
                has_eval_ro=self._cluster.engine.release >= (7,),
            )
            load = Load(doors, self._tally, load_options)
            if options.target is Target.STEADYREAD:
                doors = Snapshots(self._proxies.addresses)
            elif options.target is Target.COPIES:
                server = await stack.enter_async_context(copies_server(self._cluster.engine))
                doors = Copies(
                    self._proxies.addresses, server, load.hold.held, lambda: names_in(load.subjects)
                )
            lives = Lives(doors, load, self._tally, replace(options.lives, seed=seed))
            act = Act(doors, load, lives)
            await load.prefill()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load.run)
                yield act
                async with load.hold.held():
                    await self._clean_up(act)
                nursery.cancel_scope.cancel()
        await flush(self._cluster)

    async def _clean_up(self, act: Act) -> None:
        """Nobody writes. Close what is still open, and see that nothing is left of it."""
        if isinstance(act.doors, Snapshots):
            await self._close_all(act.doors)
        seconds, left = await seconds_until_swept(self._cluster, LEFT_SECONDS_MAX)
        self._tally.swept_seconds.append(seconds)
        if left:
            shown = [name.decode(errors="replace") for name in left[:4]]
            self._tally.fault(Fault.LEFTOVER, f"{len(left)} keys after {seconds:.0f} s: {shown}")
        await self._compare_counts(act)

    async def _close_all(self, doors: Snapshots) -> None:
        with trio.move_on_after(CLOSE_SECONDS):
            for door in range(doors.count):
                while True:
                    try:
                        left = await doors.open_ids(door)
                        for snapshot_id in left:
                            await doors.close(door, snapshot_id)
                        if not left:
                            break
                    except (Lost, Refused):
                        await trio.sleep(0.1)
            return
        self._tally.fault(Fault.LEFTOVER, f"snapshots could not be closed in {CLOSE_SECONDS:.0f} s")

    async def _count_keys(self, act: Act) -> None:
        """While snapshots are open and nobody writes."""
        async with act.load.hold.held():
            await self._compare_counts(act)

    async def _compare_counts(self, act: Act) -> None:
        wanted = await client_keys(self._cluster)
        for door in range(act.doors.count):
            try:
                client = await act.doors.writer(door)
            except Lost:
                continue
            try:
                counted = await client.call(b"DBSIZE")
                if counted != wanted:
                    self._tally.fault(Fault.LEFTOVER, f"DBSIZE is {counted!r}, there are {wanted} keys")
            except Refused as refusal:
                self._tally.fault(Fault.ERROR, f"DBSIZE: {refusal}")
            finally:
                client.close_nowait()


@dataclass(frozen=True, slots=True)
class Act:
    doors: Plain
    load: Load
    lives: Lives
