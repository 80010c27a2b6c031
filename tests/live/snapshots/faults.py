"""What happens to a cluster or a proxy while snapshots are open: each is exact afterwards, or its reads are refused."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from enum import Enum

import trio

from proxy.embedded.cluster import Cluster, Node
from proxy.embedded.connection import ConnectionLost, ServerError
from proxy.embedded.moves import move_slot_stepwise, move_slots_atomically
from tests.live.campaign.campaign import BATCH_KEYS
from tests.live.levels.campaign import Movement
from tests.live.snapshots.checks import Tally, View
from tests.live.snapshots.lives import Lives
from tests.live.snapshots.load import Load
from tests.live.snapshots.nodes import primary_of, running
from tests.live.snapshots.proxies import Proxies

FROZEN_SECONDS = 2.0
PROMOTED_SECONDS = 40.0
BETWEEN_SECONDS = (0.2, 0.8)  # from one snapshot to the next, and to the fault
AFTER_SECONDS = 1.5  # reads and writes go on for so long after the fault
KILLS = 2  # of proxies in one act
OPENING_SECONDS = 0.02  # an opening, a closing, a sweep and the first writes take as long
CLOSING_SECONDS = 0.02
PRESERVING_SECONDS = 0.4
SWEEPING_SECONDS = 0.3


class Kind(Enum):
    FAILOVER = "failover"  # a primary is killed, and its replica takes over
    KILL_PROXY = "kill-proxy"  # SIGKILL while it opens, preserves, closes or sweeps
    FREEZE = "freeze"  # SIGSTOP of a primary, for less than the cluster notices


class Moment(Enum):
    """In a snapshot's life, when its proxy is killed."""

    OPENING = "opening"
    PRESERVING = "preserving"
    CLOSING = "closing"
    SWEEPING = "sweeping"


class Faulty:
    """One act's fault."""

    def __init__(
        self,
        cluster: Cluster,
        proxies: Proxies,
        load: Load,
        lives: Lives,
        tally: Tally,
        rng: random.Random,
        slots: Sequence[int],
    ) -> None:
        self._cluster = cluster
        self._proxies = proxies
        self._load = load
        self._lives = lives
        self._tally = tally
        self._rng = rng
        self._slots = slots

    async def happen(self, kind: Kind, snapshots: int) -> None:
        """With ``snapshots`` open, each read in whole before and after. They are closed at the end."""
        opened = [await self._open_one(number) for number in range(snapshots)]
        views = [view for view in opened if view is not None]
        match kind:
            case Kind.FAILOVER:
                await self._fail_over()
            case Kind.FREEZE:
                await self._freeze()
            case Kind.KILL_PROXY:
                for moment in self._rng.sample(list(Moment), KILLS):
                    await self._kill_proxy(moment)
        for view in list(self._lives.views):
            whole = [await self._lives.read_all(view, door) for door in range(len(self._proxies.addresses))]
            self._tally.survived += all(whole) and view in views
            await self._lives.close(view, self._rng)

    async def _open_one(self, number: int) -> View | None:
        """The first one with a dump."""
        lives, rng = self._lives, self._rng
        view = await (lives.open_dumped(rng) if number == 0 else lives.open(rng))
        if view is not None:
            await lives.read_all(view, rng.randrange(len(self._proxies.addresses)))
        await trio.sleep(rng.uniform(*BETWEEN_SECONDS))
        return view

    # --- the cluster ---

    async def _fail_over(self) -> None:
        victim = await primary_of(self._cluster, self._rng.choice(self._slots))
        async with self._read_meanwhile():
            self._load.may_have_lost = True
            await self._cluster.kill(victim)
            await self._wait_promoted(victim)
            # Of this one only is known that it must not change.
            await self._lives.open(self._rng)
            await trio.sleep(AFTER_SECONDS)
        await self._cluster.restart(victim)
        await self._cluster.wait_serving()

    async def _wait_promoted(self, victim: Node) -> None:
        with trio.fail_after(PROMOTED_SECONDS):
            while True:
                try:
                    maps = [await self._cluster.map_at(node) for node in running(self._cluster)]
                except (ConnectionLost, ServerError):  # one begins, or loads its data still
                    maps = []
                if maps and not any(map_.owned_by(victim.id) for map_ in maps):
                    return
                await trio.sleep(0.02)

    async def _freeze(self) -> None:
        victim = await primary_of(self._cluster, self._rng.choice(self._slots))
        async with self._read_meanwhile():
            self._cluster.stop_process(victim)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._lives.open, self._rng)
                    await trio.sleep(FROZEN_SECONDS)
                    self._cluster.cont(victim)
            finally:
                if victim.is_frozen:
                    self._cluster.cont(victim)
            await trio.sleep(AFTER_SECONDS)
        await self._cluster.wait_serving()

    @asynccontextmanager
    async def _read_meanwhile(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            for view in self._lives.views:
                nursery.start_soon(self._lives.read_on, view)
            await trio.sleep(self._rng.uniform(*BETWEEN_SECONDS))
            yield
            nursery.cancel_scope.cancel()

    # --- the proxy ---

    async def _kill_proxy(self, moment: Moment) -> None:
        lives, rng = self._lives, self._rng
        door = rng.randrange(len(self._proxies.addresses))
        victim = rng.choice(lives.views) if lives.views else None
        async with trio.open_nursery() as nursery:
            if moment is Moment.OPENING or victim is None:
                nursery.start_soon(lambda: lives.open(rng, door=door))
                await trio.sleep(rng.uniform(0, OPENING_SECONDS))
            elif moment is Moment.PRESERVING:
                await lives.open(rng, door=door)
                await trio.sleep(rng.uniform(0, PRESERVING_SECONDS))
            elif moment is Moment.CLOSING:
                nursery.start_soon(lambda: lives.close(victim, rng, door=door))
                await trio.sleep(rng.uniform(0, CLOSING_SECONDS))
            else:
                await lives.close(victim, rng, door=door)
                await trio.sleep(rng.uniform(0, SWEEPING_SECONDS))
            await self._proxies.kill(door)
        self._tally.faults_done[f"killed {moment.value}"] += 1
        await self._proxies.start(door)
        await lives.adopt(door)
        for view in list(lives.views):
            for each in range(len(self._proxies.addresses)):
                await lives.read_all(view, each)

    # --- moves ---

    async def move(self, movement: Movement, slots: Sequence[int]) -> int:
        """With a snapshot open, so that what it kept moves along: to the primary of another shard. Returns how many
        slots have changed hands.
        """
        view = await self._lives.open(self._rng)
        if view is not None:
            await self._lives.read_all(view, 0)
        owner = await primary_of(self._cluster, slots[0])
        others = [await primary_of(self._cluster, slot) for slot in self._slots if slot not in slots]
        target = self._rng.choice([node for node in others if node is not owner])
        if movement is Movement.ATOMIC:
            await move_slots_atomically(self._cluster, slots, target)
        else:
            for slot in slots:
                await move_slot_stepwise(self._cluster, slot, target, batch_keys=BATCH_KEYS)
        return len(slots)
