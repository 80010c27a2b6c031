"""A store of each twin, with a clock that the test sets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.store.interface import TopologyStore
from proxy.store.memory import MemoryStore
from proxy.store.sqlite import SqliteStore, open_store


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> AsyncIterator[TopologyStore]:
    opened: TopologyStore = (
        MemoryStore(clock)
        if request.param == "memory"
        else await open_store(tmp_path / "store.db", now=clock)
    )
    yield opened
    await opened.aclose()


@pytest.fixture
async def sqlite_store(clock: Clock, tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await open_store(tmp_path / "store.db", now=clock)
    yield opened
    await opened.aclose()
