"""Steadyreads that share a topology store, and can be killed and started again where they were."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import trio

from proxy.embedded.cluster import Cluster
from tests.live.campaign.proxies import ProxyFailed, free_address, serving_process


class Proxies:
    """``addresses``: where each listens, for good."""

    def __init__(self, cluster: Cluster, count: int, store: Path, settings: Sequence[str]) -> None:
        self.addresses = [free_address() for _ in range(count)]
        common = [f"--set=store.file={store}", *[f"--set={setting}" for setting in settings]]
        common += [f"--seed={seed}" for seed in cluster.addresses[:3]]
        program = [sys.executable, "-m", "proxy", "serve"]
        self._commands = [
            [*program, f"--listen={address}", f"--admin={free_address()}", *common]
            for address in self.addresses
        ]
        self._running: list[tuple[trio.Process, AsyncExitStack] | None] = [None] * count

    async def start(self, number: int) -> None:
        """Returns once it serves. Raises ProxyFailed."""
        stack = AsyncExitStack()
        process = await stack.enter_async_context(
            serving_process(self._commands[number], self.addresses[number])
        )
        self._running[number] = process, stack

    async def kill(self, number: int) -> None:
        """SIGKILL, and wait until it is gone."""
        running = self._running[number]
        assert running is not None
        process, stack = running
        process.kill()
        await process.wait()
        self._running[number] = None
        with suppress(ProxyFailed):  # that it ended is known
            await stack.aclose()

    async def end(self) -> None:
        """Raises ProxyFailed if one has ended by itself."""
        async with AsyncExitStack() as whole:
            for running in self._running:
                if running is not None:
                    whole.push_async_exit(running[1])


@asynccontextmanager
async def running_proxies(
    cluster: Cluster, count: int, settings: Sequence[str] = ()
) -> AsyncIterator[Proxies]:
    """Raises ProxyFailed when one of them does not serve, or ended by itself."""
    with tempfile.TemporaryDirectory(prefix="steadyread-record-") as directory:
        proxies = Proxies(cluster, count, Path(directory) / "topology.sqlite", settings)
        try:
            for number in range(count):
                await proxies.start(number)
            yield proxies
        finally:
            await proxies.end()  # noqa: ASYNC102  # each has its own shield and deadline
