"""One campaign: a cluster, the proxy in front of it, the load, and slots that move under it.

Quiet stretches and moves alternate, so that what the machine does besides falls on both alike. One primary
imports at a time, and each move ends when every node shows the same map, because quicker hand-overs make the
engines themselves lose keys.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import trio

from proxy.embedded.cluster import Cluster, running_cluster
from proxy.embedded.engine import Engine
from proxy.embedded.moves import move_slot_stepwise, move_slots_atomically, move_slots_with_cli
from routing.topology import Address
from tests.live.campaign.proxies import Target
from tests.live.campaign.workload import LoadOptions, lines_of

REPOSITORY = Path(__file__).resolve().parents[3]
MOVED_SLOTS = (0, 1, 2, 3, 4, 5)  # the first primary's lowest, which is what the cli's reshard takes
RESIDENT_SLOTS = (7000, 12000)  # one of each other primary, so that MGET and MSET cross nodes at all times
BATCH_KEYS = 10  # as many as the cli moves at once
HALF_MOVED_SECONDS = 0.5  # how long a slot rests split between two nodes
QUIET_SECONDS_MAX = 10.0
STOP_SECONDS = 30.0


class MoveKind(Enum):
    STEPWISE = "stepwise"  # SETSLOT and MIGRATE, with a rest in the middle of each slot
    CLI = "cli"  # the engine's own cli: --cluster reshard
    ATOMIC = "atomic"  # Valkey 9: CLUSTER MIGRATESLOTS


class CampaignError(Exception):
    """The campaign itself could not be carried out."""


@dataclass(frozen=True, slots=True)
class CampaignOptions:
    moves: tuple[MoveKind, ...] = tuple(MoveKind)
    seconds: float = 60.0  # of each kind of move, quiet stretches included; the last move back may exceed it
    slots_moved: int = len(MOVED_SLOTS)  # at a time; fewer make a shorter round
    quiet_seconds: float = 0.5  # at least; else a quiet stretch is as long as the move before it
    keys_per_slot: int = 1000
    clients: int = 50
    rate: float = 1500.0
    scans: bool = True
    seed: int = 0
    base_port: int | None = None  # of the cluster; None takes free ports


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the load saw on one engine."""

    engine: str
    target: str
    moved: dict[MoveKind, int]  # how many times a slot changed hands
    load: dict[str, Any]  # `workload.Load.result`

    def phase(self, kind: MoveKind, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.load["phases"][f"{kind.value} {name}"]
        return found


def moves_of(engine: Engine, wanted: Sequence[MoveKind]) -> tuple[MoveKind, ...]:
    """Those of the wanted kinds that the engine knows."""
    return tuple(
        kind
        for kind in wanted
        if (kind is not MoveKind.ATOMIC or engine.moves_slots_atomically)
        and (kind is not MoveKind.CLI or engine.cli)
    )


async def run_campaign(engine: Engine, target: Target, options: CampaignOptions) -> Outcome:
    """Raises CampaignError, and what starting and moving raise. Leaves nothing running."""
    async with running_cluster(engine, base_port=options.base_port) as cluster:
        return await run_campaign_on(cluster, target, options)


async def run_campaign_on(cluster: Cluster, target: Target, options: CampaignOptions) -> Outcome:
    """`run_campaign` on a cluster that runs; each slot is where it was afterwards, and the keys stay."""
    kinds = moves_of(cluster.engine, options.moves)
    async with (
        target.serving(cluster) as address,
        LoadProcess.started(_load_options(address, options)) as load,
    ):
        moved = {kind: await _alternate(cluster, load, kind, options) for kind in kinds}
        return Outcome(str(cluster.engine), target.name, moved, await load.finish())


def _load_options(address: Address, options: CampaignOptions) -> LoadOptions:
    return LoadOptions(
        host=address.host,
        port=address.port,
        slots=MOVED_SLOTS + RESIDENT_SLOTS,
        keys_per_slot=options.keys_per_slot,
        clients=options.clients,
        rate=options.rate,
        scans=options.scans,
        seed=options.seed,
    )


async def _alternate(cluster: Cluster, load: LoadProcess, kind: MoveKind, options: CampaignOptions) -> int:
    """Quiet, there, quiet, back, until the time is over. Returns how many times a slot changed hands."""
    home, away = cluster.primaries[:2]
    began = trio.current_time()
    slots = MOVED_SLOTS[: options.slots_moved]
    quiet = options.quiet_seconds
    hand_overs = 0
    while not hand_overs or trio.current_time() < began + options.seconds:
        for source, target in ((home, away), (away, home)):
            await load.enter(f"{kind.value} quiet")
            await trio.sleep(quiet)
            await load.enter(f"{kind.value} moving")
            move_began = trio.current_time()
            match kind:
                case MoveKind.STEPWISE:
                    for slot in slots:
                        await move_slot_stepwise(
                            cluster,
                            slot,
                            target,
                            batch_keys=BATCH_KEYS,
                            half_moved_seconds=HALF_MOVED_SECONDS,
                        )
                case MoveKind.CLI:
                    moved = await move_slots_with_cli(cluster, source, target, len(slots))
                    if moved != slots:
                        raise CampaignError(f"the cli moved slots {moved}, not {slots}")
                case MoveKind.ATOMIC:
                    await move_slots_atomically(cluster, slots, target)
            hand_overs += len(slots)
            quiet = min(max(trio.current_time() - move_began, options.quiet_seconds), QUIET_SECONDS_MAX)
    return hand_overs


class LoadProcess:
    """`workload` in a process of its own, so that its work is not the campaign's."""

    def __init__(self, process: trio.Process, answers: AsyncGenerator[bytes, None]) -> None:
        self._process = process
        self._answers = answers
        self.ready: dict[str, Any] = {}  # what it found before the load began

    @classmethod
    @asynccontextmanager
    async def started(cls, options: LoadOptions) -> AsyncIterator[LoadProcess]:
        """Prefilled and loading; killed at the end of the block. Raises CampaignError when it ends before."""
        process = await trio.lowlevel.open_process(
            [
                sys.executable,
                "-m",
                "tests.live.campaign.workload",
                json.dumps(dataclasses.asdict(options)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        try:
            assert process.stdout is not None
            async with aclosing(lines_of(process.stdout)) as answers:
                load = cls(process, answers)
                load.ready = await load._answer()
                yield load
        finally:
            process.kill()
            with trio.CancelScope(shield=True):  # SIGKILL needs milliseconds
                await process.wait()

    async def enter(self, phase: str) -> None:
        """Returns when the requests sent belong to ``phase``."""
        await self._say({"phase": phase})
        await self._answer()

    async def finish(self) -> dict[str, Any]:
        """Ends the load and returns what it saw."""
        await self._say({"finish": True})
        with trio.fail_after(STOP_SECONDS):
            return await self._answer()

    async def _say(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send_all(json.dumps(what).encode() + b"\n")
        except trio.BrokenResourceError as gone:
            raise CampaignError("the load's process is gone; its last words are above") from gone

    async def _answer(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(await anext(self._answers))
        except StopAsyncIteration:
            raise CampaignError(
                "the load's process ended before its time; its last words are above"
            ) from None
        return answer
