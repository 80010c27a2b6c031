"""Whoever is attentive notices others' commits at once; nobody else pays for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from proxy.store import sqlite
from proxy.store.interface import Put, TopologyStore
from proxy.store.memory import MemoryStore
from proxy.store.sqlite import SqliteStore, open_store


class Looks:
    """Counts how often a store looked for what others did."""

    def __init__(self, store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        look = store._file.look

        def counted(work: Callable[..., object]) -> object:
            self.count += 1
            return look(work)

        monkeypatch.setattr(store._file, "look", counted)

    async def wait_more(self) -> None:
        seen = self.count
        while self.count < seen + 3:
            await trio.sleep(0.001)


@pytest.fixture
async def pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[SqliteStore, SqliteStore]]:
    """Two objects over one file. The first runs, and does not look for others' commits in the time of a test."""
    monkeypatch.setattr(sqlite, "POLL_SECONDS", 600.0)
    here, there = [await open_store(tmp_path / "store.db") for _ in range(2)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        await trio.testing.wait_all_tasks_blocked()  # it sleeps now
        yield here, there
        nursery.cancel_scope.cancel()
    await here.aclose()
    await there.aclose()


async def test_a_commit_of_another_is_noticed(pair: tuple[SqliteStore, SqliteStore]) -> None:
    """Also by who was asleep when it became attentive."""
    here, there = pair
    watch = here.watch("a", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.next_batch)
        await trio.testing.wait_all_tasks_blocked()
        await there.commit([Put("a", b"1")])
        with here.attentive(), trio.fail_after(20):
            while nursery.child_tasks:
                await trio.sleep(0.001)


async def test_it_lasts_as_long_as_anyone_is(
    pair: tuple[SqliteStore, SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may be; when the last is not any more, nor when one fails, the store looks as seldom as before."""
    here, _ = pair
    looks = Looks(here, monkeypatch)
    with here.attentive():
        with pytest.raises(KeyError), here.attentive():
            raise KeyError
        with trio.fail_after(20):
            await looks.wait_more()
    with trio.move_on_after(0.1) as waiting:
        await looks.wait_more()
    assert waiting.cancelled_caught
    with here.attentive(), trio.fail_after(20):
        await looks.wait_more()


async def test_the_twin_in_memory_has_nobody_to_attend_to() -> None:
    store: TopologyStore = MemoryStore()
    with store.attentive():
        assert await store.commit([Put("a", b"1")]) == 1


async def test_only_the_durable_twin_is_shared(pair: tuple[SqliteStore, SqliteStore]) -> None:
    assert pair[0].is_shared
    assert not MemoryStore().is_shared
