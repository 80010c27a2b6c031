"""The stage: a cluster whose slots move all the time, a proxy that can be started, killed and started again on the
same ports, a load that checks each reply, and eyes on the admin port that note what the proxy says.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from proxy.embedded.cluster import Cluster, running_cluster
from proxy.embedded.engine import Engine
from proxy.embedded.moves import move_slot_stepwise
from routing.topology import Address
from tests.live.campaign.campaign import LoadProcess
from tests.live.campaign.proxies import ProxyFailed, free_address
from tests.live.campaign.resp import BadReply, Connection, frame
from tests.live.campaign.workload import LoadOptions
from tests.live.store_faults.truth import HandOver, Owners, Truth

REPOSITORY = Path(__file__).resolve().parents[3]
MOVED_SLOTS = (0, 1, 2)
RESIDENT_SLOTS = (7000, 12000)  # one of each other primary
KEYS_PER_SLOT = 60
RATE = 300.0  # requests per second
CLIENTS = 12
LOOK_SECONDS = 0.05  # between two looks at the admin port
OWNED_POLL_SECONDS = 0.02
REST_SECONDS = 0.2  # between two moves
SERVING_SECONDS = 20.0
STOP_SECONDS = 10.0
ADMIN_SECONDS = 2.0  # an answer of the admin port that takes longer is none


@dataclass(frozen=True, slots=True)
class Sight:
    """What the admin port said once."""

    at: float  # Unix seconds when it was asked
    warnings: tuple[str, ...]  # of /healthz
    owners: Owners  # of the moved slots, by /v1/topology; "" for a slot without


@dataclass(slots=True)
class Stage:
    """All of it. ``proxy`` is the process that serves now."""

    cluster: Cluster
    truth: Truth
    listen: Address
    admin: Address
    directory: Path  # for stores and logs
    sights: list[Sight] = field(default_factory=list)
    proxy: trio.Process | None = None
    _starts: int = 0

    # -- the proxy

    @asynccontextmanager
    async def serving(self, file: Path) -> AsyncIterator[trio.Process]:
        """A proxy that records in ``file``, once it serves. Raises ProxyFailed if it does not, or ends by itself."""
        process = await self.start(file)
        try:
            await self.wait_serving(process)
            yield process
            if process.poll() is not None:
                raise ProxyFailed(f"the proxy ended with {process.returncode}: {self._last_words()}")
        finally:
            await self.stop(process)  # noqa: ASYNC102  # it has its own shield and deadline

    async def start(self, file: Path) -> trio.Process:
        """Does not wait until it serves."""
        self._starts += 1
        command = [sys.executable, "-m", "proxy", "serve"]
        command += ["--listen", str(self.listen), "--admin", str(self.admin)]
        for seed in self.cluster.addresses[:3]:
            command += ["--seed", str(seed)]
        command += ["--set", f"store.file={file}"]
        with self._log.open("wb") as log:
            self.proxy = await trio.lowlevel.open_process(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY
            )
        return self.proxy

    async def wait_serving(self, process: trio.Process) -> None:
        """Return once a key can be asked for and the admin port answers."""
        with trio.move_on_after(SERVING_SECONDS):
            while process.poll() is None:
                if await _serves(self.listen) and await self.look() is not None:
                    return
                await trio.sleep(LOOK_SECONDS)
        raise ProxyFailed(f"the proxy does not serve: {self._last_words()}")

    async def stop(self, process: trio.Process) -> None:
        """SIGTERM; SIGKILL for what does not end by it."""
        with trio.CancelScope(shield=True):
            process.terminate()
            with trio.move_on_after(STOP_SECONDS):
                await process.wait()
            process.kill()
            await process.wait()

    @property
    def _log(self) -> Path:
        return self.directory / f"proxy-{self._starts}.log"

    def _last_words(self) -> str:
        return " / ".join(self._log.read_text(errors="replace").strip().splitlines()[-5:])

    # -- the eyes

    async def watch(self) -> None:
        """Note what the admin port says until cancelled."""
        while True:
            sight = await self.look()
            if sight is not None:
                self.sights.append(sight)
            await trio.sleep(LOOK_SECONDS)

    async def look(self) -> Sight | None:
        """None if it does not answer: the proxy starts, or it was killed."""
        at = time.time()
        try:
            health, topology = await trio.to_thread.run_sync(self._ask, abandon_on_cancel=True)
        except (OSError, http.client.HTTPException, KeyError):
            return None
        return Sight(at, tuple(health["warnings"]), owners_in(topology, self.truth.slots))

    def _ask(self) -> tuple[Any, Any]:
        connection = http.client.HTTPConnection(*self.admin, timeout=ADMIN_SECONDS)
        try:
            answers = []
            for path in ("/healthz", "/v1/topology"):
                connection.request("GET", path)
                answers.append(json.loads(connection.getresponse().read()))
            health, topology = answers
            if "shards" not in topology:
                raise KeyError("shards")
            return health, topology
        finally:
            connection.close()

    def followed_seconds(self, move: HandOver) -> float | None:
        """From the new owner's knowing to the proxy's showing it; None if it never did while that was true."""
        place = self.truth.slots.index(move.slot)
        until = min(
            (
                later.begun_at
                for later in self.truth.hand_overs
                if later.slot == move.slot and later.begun_at > move.begun_at
            ),
            default=float("inf"),
        )
        for sight in self.sights:
            if move.begun_at <= sight.at < until and sight.owners[place] == move.owner:
                return max(0.0, sight.at - move.owned_at)
        return None

    # -- the moves

    async def move_on(self) -> None:
        """Move the slots there and back until cancelled, one after the other."""
        home, away = self.cluster.primaries[:2]
        while True:
            for target in (away, home):
                for slot in self.truth.slots:
                    await self._move(slot, target.id)
                    await trio.sleep(REST_SECONDS)

    async def _move(self, slot: int, target_id: str) -> None:
        target = next(node for node in self.cluster.nodes if node.id == target_id)
        begun_at = time.time()
        owned_at = begun_at

        async def await_owned() -> None:
            nonlocal owned_at
            while (await self.cluster.map_at(target)).owner_of(slot).id != target_id:
                await trio.sleep(OWNED_POLL_SECONDS)
            owned_at = time.time()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(await_owned)
            await move_slot_stepwise(self.cluster, slot, target, batch_keys=10)
        self.truth.hand_overs.append(HandOver(slot, target_id, begun_at, owned_at, time.time()))

    async def wait_moved(self, count: int) -> None:
        """Return once so many hand-overs more have begun and ended."""
        begun_at = time.time()
        while len(self.truth.within(begun_at, float("inf"))) < count:
            await trio.sleep(OWNED_POLL_SECONDS)


def owners_in(topology: dict[str, Any], slots: Sequence[int]) -> Owners:
    """From the facts of a view."""
    return tuple(
        next(
            (
                str(shard["primary"]["id"])
                for shard in topology["shards"]
                if any(low <= slot <= high for low, high in shard["slot_ranges"])
            ),
            "",
        )
        for slot in slots
    )


@asynccontextmanager
async def set_up(engine: Engine, directory: Path, *, seed: int) -> AsyncIterator[tuple[Stage, LoadProcess]]:
    """A stage with the load and the moves under way. A first proxy serves until the load is ready, then none does."""
    async with running_cluster(engine) as cluster, AsyncExitStack() as stack:
        home = cluster.primaries[0]
        truth = Truth(MOVED_SLOTS, (home.id,) * len(MOVED_SLOTS))
        stage = Stage(cluster, truth, free_address(), free_address(), directory)
        options = LoadOptions(
            host=stage.listen.host,
            port=stage.listen.port,
            slots=MOVED_SLOTS + RESIDENT_SLOTS,
            keys_per_slot=KEYS_PER_SLOT,
            clients=CLIENTS,
            pipelined=1,
            rate=RATE,
            scans=False,
            seed=seed,
        )
        async with stage.serving(directory / "first.sqlite"):
            load = await stack.enter_async_context(LoadProcess.started(options))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.watch)
            nursery.start_soon(stage.move_on)
            yield stage, load
            nursery.cancel_scope.cancel()


async def _serves(address: Address) -> bool:
    try:
        connection = await Connection.open(*address)
    except OSError:
        return False
    try:
        return await connection.exchange(frame([b"GET", b"nothing"]), 1) == [None]
    except (OSError, trio.BrokenResourceError, BadReply):
        return False
    finally:
        await connection.aclose_forcefully()  # noqa: ASYNC102  # it does not wait
