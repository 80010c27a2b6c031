"""Puts what this proxy found out about replicas on the timeline.

The data plane tells of a change and goes on; a task of its own writes it, several at once if they came together. A
store that fails loses nothing of the traffic: what cannot be written is tried again while there is room, and what is
dropped then is counted and logged, as every change is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from proxy.log import get_logger
from proxy.store.interface import ConflictError, StoreError, TopologyStore
from proxy.topology.append import append_events
from routing.events import Event

WAITING_MAX = 10_000  # events: more than a large cluster's replicas change stages as they all come back
BATCH_MAX = 200
RETRY_SECONDS = 0.5

log = get_logger(__name__)


class StageLog:
    """Events that wait to be written. ``add`` never waits."""

    def __init__(self, store: TopologyStore, seen_by: str, is_kept: Callable[[], bool]) -> None:
        """``is_kept``: someone keeps this cluster's record. Before, nothing is written: who begins to, begins."""
        self._store = store
        self._is_kept = is_kept
        self._seen_by = seen_by
        self._waiting: deque[Event] = deque()
        self._came = trio.Event()
        self.dropped_total = 0

    def add(self, event: Event) -> None:
        if len(self._waiting) >= WAITING_MAX:
            self._waiting.popleft()
            self.dropped_total += 1
        self._waiting.append(event)
        self._came.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._came.wait()
            self._came = trio.Event()
            while self._waiting:
                if not self._is_kept():
                    await trio.sleep(RETRY_SECONDS)
                    continue
                batch = [self._waiting[index] for index in range(min(BATCH_MAX, len(self._waiting)))]
                dropped = self.dropped_total
                try:
                    await self._write(batch)
                except StoreError as error:
                    log.warning("stages_not_recorded", reason=error, waiting=len(self._waiting))
                    await trio.sleep(RETRY_SECONDS)
                    continue
                for _ in range(len(batch) - (self.dropped_total - dropped)):
                    self._waiting.popleft()

    async def _write(self, events: list[Event]) -> None:
        """Raises StoreUnavailableError, StoreRefusedError."""
        while True:
            operations, expect = await append_events(self._store, events, self._seen_by)
            try:
                await self._store.commit(operations, expect)
            except ConflictError:
                continue  # someone else appended meanwhile
            return
