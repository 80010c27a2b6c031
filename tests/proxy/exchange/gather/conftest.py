"""Three nodes that answer by themselves, on the virtual clock, and few slots to list."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from trio.testing import MockClock

from proxy.exchange.gather import keys
from routing import scan_cursor
from tests.proxy.exchange.gather.model import SLOTS_LISTED, ModelCluster
from tests.proxy.world import world_of


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SLOT_COUNT", SLOTS_LISTED)
    monkeypatch.setattr(scan_cursor, "SLOT_COUNT", SLOTS_LISTED)


@pytest.fixture
async def model(autojump_clock: MockClock, few_slots: None) -> AsyncIterator[ModelCluster]:
    async with world_of(3) as world:
        yield ModelCluster(world)
