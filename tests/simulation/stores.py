"""The topology store as one proxy reaches it: with delays, sometimes not, and not at all once the proxy is dead."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import trio

from proxy.store.interface import (
    Batch,
    Entry,
    Expect,
    Operation,
    StoreUnavailableError,
    Watch,
)
from proxy.store.memory import MemoryStore
from tests.simulation.world import World

SECONDS_MAX = 0.0006  # of the way to the store, and of the way back


class StoreLink:
    """A TopologyStore. ``is_shared``: another process may have the store, too."""

    name = "simulated"

    def __init__(self, world: World, store: MemoryStore, *, is_shared: bool) -> None:
        self.is_shared = is_shared
        self.is_down = False  # for good when the proxy is dead, else for a time
        self._world = world
        self._store = store

    async def _travel(self) -> None:
        await trio.sleep(self._world.rng.uniform(0.0, SECONDS_MAX))
        if self.is_down:
            raise StoreUnavailableError("the store cannot be reached")

    def problems(self) -> list[str]:
        return []

    async def run(self) -> None:
        await trio.sleep_forever()

    async def revision(self) -> int:
        await self._travel()
        return await self._store.revision()

    async def get(self, key: str) -> Entry | None:
        await self._travel()
        return await self._store.get(key)

    async def read(self, first: str, last: str, *, limit: int, descending: bool = False) -> list[Entry]:
        await self._travel()
        return await self._store.read(first, last, limit=limit, descending=descending)

    async def commit(
        self, operations: Sequence[Operation], expect: Sequence[Expect] = (), *, durable: bool = False
    ) -> int:
        await self._travel()
        revision = await self._store.commit(operations, expect, durable=durable)
        await self._travel()
        return revision

    async def grant(self, ttl_seconds: float) -> int:
        await self._travel()
        return await self._store.grant(ttl_seconds)

    async def renew(self, lease: int) -> None:
        await self._travel()
        await self._store.renew(lease)

    async def revoke(self, lease: int) -> None:
        await self._travel()
        await self._store.revoke(lease)

    def watch(self, prefix: str, after: int) -> Watch:
        return _LinkWatch(self, self._store.watch(prefix, after))

    def attentive(self) -> AbstractContextManager[None]:
        return self._store.attentive()

    async def compact(self, revision: int) -> None:
        await self._travel()
        await self._store.compact(revision)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class _LinkWatch:
    def __init__(self, link: StoreLink, watch: Watch) -> None:
        self._link = link
        self._watch = watch
        self._kept: Batch | None = None  # came while the way was cut

    async def next_batch(self) -> Batch:
        if self._kept is None:
            self._kept = await self._watch.next_batch()
        await self._link._travel()
        batch, self._kept = self._kept, None
        return batch
