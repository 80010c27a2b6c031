"""What the load of the levels can be pointed at: one or two Steadyreads, another proxy, or readers at replicas."""

from __future__ import annotations

import random
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import trio
from prometheus_client.parser import text_string_to_metric_families

from proxy.embedded.cluster import Cluster
from proxy.embedded.connection import Argument, Connection, ServerError, connect
from proxy.embedded.follower import FollowingClient
from routing.levels import Level
from routing.topology import Address
from tests.live.campaign import proxies

READS_METRIC = "steadyread_reads"  # the counter's name without _total, as its parser calls it
SCRAPE_SECONDS = 5.0


class Client(Protocol):
    """One client's way to the data. One task at a time uses it."""

    async def call_all(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """The replies in order, an error reply as a ServerError among them. Raises ConnectionLost."""

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ReadCounts:
    """Reads of one level that a target has answered, by the role of who answered them."""

    primary: int = 0
    replica: int = 0

    def __sub__(self, earlier: ReadCounts) -> ReadCounts:
        return ReadCounts(self.primary - earlier.primary, self.replica - earlier.replica)

    @property
    def replica_share(self) -> float | None:
        """None of no reads."""
        total = self.primary + self.replica
        return self.replica / total if total else None


class Doors(Protocol):
    """A target that runs. ``doors`` of them lead to the same cluster."""

    doors: int
    has_levels: bool

    async def open(self, door: int, level: Sequence[Argument] = ()) -> Client:
        """``level`` is what follows STEADY.READ; targets without levels ignore it.

        Raises ServerError when the level is refused, and ConnectionLost.
        """

    async def reads(self, level: Level) -> ReadCounts | None:
        """None where nobody counts."""


class Target(Protocol):
    @property
    def name(self) -> str: ...

    def serving(self, cluster: Cluster) -> Any:
        """An async context manager that gives `Doors` to ``cluster``."""


@dataclass(frozen=True, slots=True)
class Steadyread:
    """This repository's proxy, in so many processes that share a topology store and nothing else."""

    count: int = 2
    settings: tuple[str, ...] = ()  # NAME=VALUE each

    @property
    def name(self) -> str:
        return f"{self.count} steadyread" if self.count > 1 else "steadyread"

    @asynccontextmanager
    async def serving(self, cluster: Cluster) -> AsyncIterator[SteadyreadDoors]:
        """Raises ProxyFailed when one of them does not serve, or ended by itself."""
        async with AsyncExitStack() as running:
            directory = running.enter_context(tempfile.TemporaryDirectory(prefix="steadyread-record-"))
            common = [f"--set=store.file={directory}/topology.sqlite"]
            common += [f"--set={setting}" for setting in self.settings]
            common += [f"--seed={seed}" for seed in cluster.addresses[:3]]
            served: list[tuple[Address, Address]] = []
            for _ in range(self.count):
                address, admin = proxies.free_address(), proxies.free_address()
                command = [sys.executable, "-m", "proxy", "serve", f"--listen={address}", f"--admin={admin}"]
                await running.enter_async_context(proxies.serving_process([*command, *common], address))
                served.append((address, admin))
            yield SteadyreadDoors(served)


class SteadyreadDoors:
    has_levels = True

    def __init__(self, served: Sequence[tuple[Address, Address]]) -> None:
        """``served``: where each proxy listens for clients, and where its admin port is."""
        self._served = served
        self.doors = len(served)

    async def open(self, door: int, level: Sequence[Argument] = ()) -> Client:
        connection = await connect(self._served[door][0])
        if level:
            try:
                await connection.call("STEADY.READ", *level)
            except BaseException:
                await connection.aclose()  # noqa: ASYNC102  # it does not wait
                raise
        return connection

    async def reads(self, level: Level) -> ReadCounts | None:
        found = [await trio.to_thread.run_sync(_scrape, admin) for _, admin in self._served]
        counts = [counted for text in found if (counted := reads_in(text, level)) is not None]
        if not counts:
            return None
        return ReadCounts(sum(c.primary for c in counts), sum(c.replica for c in counts))


def _scrape(admin: Address) -> str:
    """Blocks. Raises OSError."""
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=SCRAPE_SECONDS) as answer:
        return str(answer.read().decode())


def reads_in(metrics: str, level: Level) -> ReadCounts | None:
    """Reads that asked for ``level``, out of a page of metrics; None when the page does not know the counter."""
    counts = {"primary": 0, "replica": 0}
    known = False
    for family in text_string_to_metric_families(metrics):
        if family.name != READS_METRIC:
            continue
        known = True
        for sample in family.samples:
            if sample.name == f"{READS_METRIC}_total" and sample.labels["asked"] == level.value:
                counts[sample.labels["role"]] += int(sample.value)
    return ReadCounts(**counts) if known else None


@dataclass(frozen=True, slots=True)
class Other:
    """A target of the campaign of moves: another proxy, which knows no levels."""

    proxy: proxies.Target

    @property
    def name(self) -> str:
        return self.proxy.name

    @asynccontextmanager
    async def serving(self, cluster: Cluster) -> AsyncIterator[OtherDoors]:
        async with self.proxy.serving(cluster) as address:
            yield OtherDoors(address)


class OtherDoors:
    doors = 1
    has_levels = False

    def __init__(self, address: Address) -> None:
        self._address = address

    async def open(self, door: int, level: Sequence[Argument] = ()) -> Connection:
        return await connect(self._address)

    async def reads(self, level: Level) -> ReadCounts | None:
        return None


@dataclass(frozen=True, slots=True)
class ReplicaReaders:
    """No proxy: clients that follow redirections, say READONLY, and believe what a replica answers."""

    name: str = "plain clients reading at replicas"

    @asynccontextmanager
    async def serving(self, cluster: Cluster) -> AsyncIterator[ReplicaReaderDoors]:
        yield ReplicaReaderDoors(cluster)


class ReplicaReaderDoors:
    doors = 1
    has_levels = False

    def __init__(self, cluster: Cluster) -> None:
        self._seed = cluster.addresses[0]
        self._opened = 0

    async def open(self, door: int, level: Sequence[Argument] = ()) -> Client:
        self._opened += 1
        return _ReplicaReader(FollowingClient(self._seed, random.Random(self._opened)))

    async def reads(self, level: Level) -> ReadCounts | None:
        return None


class _ReplicaReader:
    def __init__(self, client: FollowingClient) -> None:
        self._client = client

    async def call_all(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        return [await self._call(command) for command in commands]

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _call(self, command: Sequence[Argument]) -> Any:
        name, key = command[0], command[1]
        assert isinstance(key, bytes)
        ask = self._client.read if name == "GET" else self._client.write
        try:
            return await ask(key, *command)
        except ServerError as refusal:
            return refusal
