"""A store in memory that can be out of reach for a while."""

from __future__ import annotations

from proxy.store.interface import Batch, StoreUnavailableError
from proxy.store.memory import MemoryStore


class FailingStore(MemoryStore):
    """Everything raises StoreUnavailableError while ``is_down``."""

    is_down = False

    def go_down(self) -> None:
        self.is_down = True
        self._tell()  # so that watches that wait notice

    def become(self, other: FailingStore) -> None:
        """The same store for who has it, with what another holds, as after a restore."""
        vars(self).update(vars(other))
        self.is_down = other.is_down

    async def _enter(self) -> None:
        await super()._enter()
        self._check()

    def changes_after(self, prefix: str, after: int) -> Batch:
        self._check()
        return super().changes_after(prefix, after)

    def _check(self) -> None:
        if self.is_down:
            raise StoreUnavailableError("the disk is full")
