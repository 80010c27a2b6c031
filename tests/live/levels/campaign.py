"""One campaign: a cluster, proxies in front of it, the load, links that are cut, and slots that move.

Each level is measured twice: on healthy links with nothing moving, for the share that replicas answer, and then with
links cut, once for each movement. Keys live as long as the cluster; their versions only grow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import trio

from proxy.embedded.cluster import Cluster, ClusterError, running_cluster
from proxy.embedded.engine import Engine
from proxy.embedded.moves import move_slot_stepwise, move_slots_atomically
from routing.levels import Level
from routing.topology import Address
from tests.live.campaign.campaign import BATCH_KEYS, HALF_MOVED_SECONDS, MOVED_SLOTS
from tests.live.levels.checks import Key, keys_in, value_of
from tests.live.levels.links import Flapping, LinkFacts, watched_links
from tests.live.levels.load import Group, Load, LoadOptions, Tally, now
from tests.live.levels.targets import Doors, ReadCounts, Target

RESIDENT_SLOTS = (100, 101, 7000, 7001, 12000, 12001)  # two of each primary that never move
WARM_UP_SECONDS = (
    15.0  # until replicas are found fit to be read; a target that does not count is not waited for
)
WARM_UP_STEP_SECONDS = 0.5
WARM_SHARE = 0.5  # of the reads of one step
WAIT_REPLICAS_MS = 10_000


class Movement(Enum):
    NONE = "none"
    STEPWISE = "stepwise"  # SETSLOT and MIGRATE, with a rest in the middle of each slot
    ATOMIC = "atomic"  # Valkey 9: CLUSTER MIGRATESLOTS


LEVELS = (Level.STRONG, Level.CAUGHT_UP, Level.BOUNDED_STALENESS, Level.SESSION, Level.EVENTUAL)


@dataclass(frozen=True, slots=True)
class Options:
    levels: tuple[Level, ...] = LEVELS
    movements: tuple[Movement, ...] = tuple(Movement)
    seconds: float = 60.0  # with cut links, for each level and movement; the last move back may exceed it
    healthy_seconds: float = 15.0  # for each level
    together: bool = False  # all levels at the same time, the rate of reads divided among them
    slots_moved: int = len(MOVED_SLOTS)  # at a time
    keys_per_slot: int = 60
    flapping: Flapping | None = field(default_factory=Flapping)
    load: LoadOptions = field(default_factory=LoadOptions)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the readers of one level saw with one movement."""

    engine: str
    target: str
    level: Level
    movement: Movement
    hand_overs: int  # how many times a slot changed hands
    healthy: Tally  # the same for all movements of one level
    cut: Tally
    healthy_share: float | None  # of the reads, those that replicas answered; None where nobody counts
    cut_share: float | None
    links: LinkFacts
    uncertain: int  # keys that were given up, because a write to them had no clear outcome


def movements_of(engine: Engine, wanted: Sequence[Movement]) -> tuple[Movement, ...]:
    """Those of the wanted ones that the engine knows."""
    return tuple(m for m in wanted if m is not Movement.ATOMIC or engine.moves_slots_atomically)


async def run_campaign(
    engine: Engine,
    target: Target,
    options: Options,
    *,
    witness: Target | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """``witness``: another target whose readers expect what `caught_up` promises, beside those of each level.

    Raises what starting, moving and cutting raise. Leaves nothing running.
    """
    slots = MOVED_SLOTS + RESIDENT_SLOTS
    async with (
        prepared(engine, slots, options.keys_per_slot) as (cluster, keys),
        target.serving(cluster) as doors,
    ):
        runs = [options.levels] if options.together else [(level,) for level in options.levels]
        outcomes: list[Outcome] = []
        for levels in runs:
            groups = [Group(level.value, level, doors) for level in levels]
            stage = _Stage(engine, target.name, cluster, keys, doors, options)
            if witness is None:
                outcomes += await stage.measure(groups, on_outcome)
            else:
                async with witness.serving(cluster) as other:
                    groups.append(Group(witness.name, Level.CAUGHT_UP, other))
                    outcomes += await stage.measure(groups, on_outcome)
        return outcomes


@asynccontextmanager
async def prepared(
    engine: Engine, slots: Sequence[int], keys_per_slot: int
) -> AsyncIterator[tuple[Cluster, list[Key]]]:
    """A cluster whose replicas have version 0 of every key."""
    async with running_cluster(engine) as cluster:
        keys = keys_in(slots, keys_per_slot)
        await write_first_versions(cluster, keys)
        yield cluster, keys


async def write_first_versions(cluster: Cluster, keys: Sequence[Key]) -> None:
    """At the owners; returns when their replicas have them and clients are told of them.

    Raises ClusterError, ServerError, ConnectionLost.
    """
    map_ = await cluster.map_at(cluster.nodes[0])
    owned: dict[Address, list[Key]] = {}
    for key in keys:
        owned.setdefault(map_.owner_of(key.slot).address, []).append(key)
    for address, of_owner in owned.items():
        async with cluster.connection(address) as connection:
            for reply in await connection.call_all(
                [("SET", k.name, value_of(k, 0, now())) for k in of_owner]
            ):
                if isinstance(reply, Exception):
                    raise reply
            if await connection.call("WAIT", 1, WAIT_REPLICAS_MS) < 1:
                raise ClusterError(f"the replica of {address} did not get the first versions")
    await cluster.wait_replicas_listed(owned)


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the measurements of one engine share."""

    engine: Engine
    target_name: str
    cluster: Cluster
    keys: Sequence[Key]
    doors: Doors
    options: Options

    async def measure(self, groups: Sequence[Group], on_outcome: Callable[[Outcome], None]) -> list[Outcome]:
        """Healthy first, then with cut links by each movement."""
        options = self.options
        outcomes = []
        healthy, healthy_shares, _, _ = await self._phase(
            groups, None, Movement.NONE, options.healthy_seconds
        )
        for movement in movements_of(self.engine, options.movements):
            seen, seen_shares, links, moved = await self._phase(
                groups, options.flapping, movement, options.seconds
            )
            for number, group in enumerate(groups):
                outcome = Outcome(
                    engine=str(self.engine),
                    target=self.target_name if group.doors is self.doors else group.name,
                    level=group.level,
                    movement=movement,
                    hand_overs=moved,
                    healthy=healthy[number],
                    cut=seen[number],
                    healthy_share=healthy_shares[number],
                    cut_share=seen_shares[number],
                    links=links,
                    uncertain=sum(not key.is_certain for key in self.keys),
                )
                outcomes.append(outcome)
                on_outcome(outcome)
        return outcomes

    async def _phase(
        self, groups: Sequence[Group], flapping: Flapping | None, movement: Movement, seconds: float
    ) -> tuple[list[Tally], list[float | None], LinkFacts, int]:
        whole = self.options.load
        load = Load(self.keys, self.doors, groups, replace(whole, read_rate=whole.read_rate / len(groups)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            if any(group.level is not Level.STRONG for group in groups):
                await self._warm_up(groups)
            async with watched_links(self.cluster, flapping, self.options.load.seed) as links:
                load.enter_phase()
                before = await _counts(groups)
                moved = await move_until(
                    self.cluster,
                    movement,
                    MOVED_SLOTS[: self.options.slots_moved],
                    trio.current_time() + seconds,
                )
                after = await _counts(groups)
                tallies = load.enter_phase()
            load.finish()
        return tallies, [_share(*pair) for pair in zip(before, after, strict=True)], links, moved

    async def _warm_up(self, groups: Sequence[Group]) -> None:
        """Until replicas answer half of the reads, where a target counts them. One that does not get there is measured
        all the same, and its share shows it.
        """
        with trio.move_on_after(WARM_UP_SECONDS):
            while True:
                before = await _counts(groups)
                await trio.sleep(WARM_UP_STEP_SECONDS)
                after = await _counts(groups)
                shares = [
                    _share(*pair)
                    for group, *pair in zip(groups, before, after, strict=True)
                    if group.level is not Level.STRONG
                ]
                if all(share is None or share >= WARM_SHARE for share in shares):
                    return


async def _counts(groups: Sequence[Group]) -> list[ReadCounts | None]:
    return [await group.doors.reads(group.level) for group in groups]


def _share(before: ReadCounts | None, after: ReadCounts | None) -> float | None:
    return None if before is None or after is None else (after - before).replica_share


async def move_until(cluster: Cluster, movement: Movement, slots: Sequence[int], end: float) -> int:
    """There and back until the time ``end``, and once at least. Returns how many times a slot changed hands."""
    if movement is Movement.NONE:
        await trio.sleep_until(end)
        return 0
    home, away = cluster.primaries[:2]
    hand_overs = 0
    while not hand_overs or trio.current_time() < end:
        for target in (away, home):
            if movement is Movement.ATOMIC:
                await move_slots_atomically(cluster, slots, target)
                await trio.sleep(HALF_MOVED_SECONDS)
            else:
                for slot in slots:
                    await move_slot_stepwise(
                        cluster, slot, target, batch_keys=BATCH_KEYS, half_moved_seconds=HALF_MOVED_SECONDS
                    )
            hand_overs += len(slots)
    await trio.sleep_until(end)
    return hand_overs


def as_json(outcome: Outcome) -> dict[str, Any]:
    links = outcome.links
    return {
        "engine": outcome.engine,
        "target": outcome.target,
        "level": outcome.level.value,
        "movement": outcome.movement.value,
        "hand_overs": outcome.hand_overs,
        "healthy": outcome.healthy.summary(),
        "cut": outcome.cut.summary(),
        "replica_share_healthy": outcome.healthy_share,
        "replica_share_cut": outcome.cut_share,
        "links": {
            "cuts": links.cuts,
            "full_syncs": links.full_syncs,
            "partial_syncs": links.partial_syncs,
            "down_share": round(links.down_share, 3),
            "lag_bytes_max": links.lag_bytes_max,
        },
        "uncertain_keys": outcome.uncertain,
    }
