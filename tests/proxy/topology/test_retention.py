"""The record keeps what it is told to keep, whole, and forgets the rest with all that belongs to it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from proxy.store.interface import CompactedError, Put, StoreRefusedError, prefix_range
from proxy.store.memory import MemoryStore
from proxy.store.records import (
    EVENT_HEAD,
    EVENTS,
    MIGRATIONS,
    VIEW,
    VIEW_NODES,
    VIEWS,
    VIEWS_BY_EPOCH,
    VIEWS_BY_TIME,
    migration_key,
    number_of,
    numbered,
    pack,
)
from proxy.topology import retention
from proxy.topology.history import History
from proxy.topology.retention import Retention, Trimmed, run, trim
from tests.proxy.topology.record import (
    BEGAN_AT,
    a_cluster,
    a_version,
    an_event,
    write_events,
    write_version,
)


async def numbers_of(store: MemoryStore, prefix: str) -> list[int]:
    return sorted(number_of(entry.key) for entry in await store.read(prefix, f"{prefix}~", limit=100_000))


async def a_record(store: MemoryStore, versions: int = 200, events: int = 1000) -> None:
    """New nodes with each tenth version."""
    small = {True: a_cluster(2), False: a_cluster(4)}
    for number in range(1, versions + 1):
        nodes_number = (number - 1) // 10 * 10 + 1
        shards = small[nodes_number // 10 % 2 == 0]
        await write_version(
            store,
            a_version(
                number, epoch=number // 2, at=BEGAN_AT + number, shards=shards, nodes_number=nodes_number
            ),
        )
    await write_events(store, [an_event(number) for number in range(1, events + 1)])


async def test_the_newest_stay_with_all_that_they_need() -> None:
    """Index keys go with their versions; a nodes part stays as long as one version goes with it."""
    store = MemoryStore()
    await a_record(store)
    assert await trim(store, events_kept_max=10, views_kept_max=25) == Trimmed(990, 175, 17)
    assert await numbers_of(store, EVENTS) == list(range(991, 1001))
    for prefix in (VIEWS, VIEWS_BY_TIME, VIEWS_BY_EPOCH):
        assert await numbers_of(store, prefix) == list(range(176, 201))
    assert await numbers_of(store, VIEW_NODES) == [171, 181, 191]
    history = History(store)
    assert [record.number for record in await history.versions(100)] == list(range(200, 175, -1))
    assert await history.view_at(at=BEGAN_AT + 175) is None
    page = await history.events(0, limit=100)
    assert (page.missing_before, len(page.events), page.is_at_end) == (991, 10, True)


async def test_what_fits_stays_and_a_second_round_finds_nothing() -> None:
    store = MemoryStore()
    await trim(store, events_kept_max=1, views_kept_max=1)  # an empty store
    await a_record(store, versions=3, events=3)
    assert await trim(store, events_kept_max=3, views_kept_max=3) == Trimmed(0, 0, 0)
    assert await trim(store, events_kept_max=1, views_kept_max=1) == Trimmed(2, 2, 0)
    revision = await store.revision()
    assert await trim(store, events_kept_max=1, views_kept_max=1) == Trimmed(0, 0, 0)
    assert await store.revision() == revision
    assert len((await History(store).newest(5)).events) == 1


async def test_commits_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other writer waits while thousands of keys go."""
    store = MemoryStore()
    await a_record(store)
    commit, sizes = store.commit, []

    async def counted(operations: list[object]) -> int:
        sizes.append(len(operations))
        return await commit(operations)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "commit", counted)
    await trim(store, events_kept_max=1, views_kept_max=1)
    assert sum(sizes) == 999 + 3 * 199 + 19
    assert max(sizes) <= 250


async def test_the_log_is_cut_and_a_watch_that_keeps_up_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "LOG_REVISIONS_KEPT", 5)
    store = MemoryStore()
    await a_record(store, versions=20, events=20)
    late, near = store.watch(EVENTS, 0), store.watch(EVENTS, await store.revision() - 1)
    await trim(store, events_kept_max=1, views_kept_max=1)
    with pytest.raises(CompactedError):
        await late.next_batch()
    assert (await near.next_batch()).changes


async def test_rounds_go_on_also_after_one_that_failed(autojump_clock: trio.testing.MockClock) -> None:
    store = MemoryStore()
    await a_record(store, versions=3, events=3)
    revision, failures = store.revision, []

    async def unavailable() -> int:
        if not failures:
            failures.append(True)
            raise retention.StoreError("locked")
        return await revision()

    store.revision = unavailable  # type: ignore[method-assign]
    kept = [Retention(2, 2), Retention(1, 1)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, store, lambda: kept.pop(0))
        await trio.sleep(61)
        assert failures
        assert await numbers_of(store, EVENTS) == [2, 3]
        await trio.sleep(60)
        assert await numbers_of(store, EVENTS) == [3]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("key", [EVENT_HEAD, VIEW, numbered(VIEWS, 1)])
async def test_a_damaged_value_fails_the_round_and_not_the_proxy(key: str) -> None:
    """``run`` goes on after a StoreError alone; anything else would end every task beside it."""
    store = MemoryStore()
    await a_record(store, versions=3, events=3)
    await store.commit([Put(key, pack("no number and no map"))])
    with pytest.raises(StoreRefusedError):
        await trim(store, events_kept_max=1, views_kept_max=1)


def test_the_newest_can_not_be_given_up() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Retention(0, 1)


async def test_old_migrations_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reshard leaves a record: the oldest of very many are not kept for ever."""
    monkeypatch.setattr(retention, "MIGRATIONS_KEPT_MAX", 2)
    store = MemoryStore()
    await store.commit([Put(migration_key(f"m-{number}"), b"") for number in range(8, 13)])
    await trim(store, events_kept_max=10, views_kept_max=10)
    kept = await store.read(*prefix_range(MIGRATIONS), limit=10)
    assert [entry.key for entry in kept] == [migration_key("m-11"), migration_key("m-12")]
