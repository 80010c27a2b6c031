"""The events of replicas' stages: written in order when the record is kept, whatever the store does (promise 8)."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from proxy.store.interface import prefix_range
from proxy.store.memory import MemoryStore
from proxy.store.records import EVENTS, unpack_event
from proxy.topology.stage_log import StageLog
from routing.events import Event, EventKind
from tests.proxy.failing_store import FailingStore


async def messages(store: MemoryStore) -> list[str]:
    return [
        unpack_event(0, entry.value).message for entry in await store.read(*prefix_range(EVENTS), limit=100)
    ]


async def test_they_wait_for_who_keeps_the_record_and_for_the_store(autojump_clock: MockClock) -> None:
    store = FailingStore()
    kept = False
    log = StageLog(store, "proxy-1", lambda: kept)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        for number in range(3):
            log.add(Event(EventKind.REPLICA_READABLE, float(number), f"event {number}"))
        await trio.sleep(5)
        assert await messages(store) == []
        store.is_down = True
        kept = True
        await trio.sleep(5)
        store.is_down = False
        assert await messages(store) == []
        await trio.sleep(5)
        assert await messages(store) == ["event 0", "event 1", "event 2"]
        nursery.cancel_scope.cancel()
