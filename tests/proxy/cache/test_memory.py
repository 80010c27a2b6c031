"""What is kept of snapshots: for how long, how much, and what goes first."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import pairwise
from math import inf

import pytest
import trio
from trio.testing import MockClock

from proxy.cache.memory import FREED_AT_ONCE, OVERHEAD_BYTES, SEEN_KEYS, Shelf, SnapshotCache
from proxy.settings import CacheSettings

ID = 7
NIL = b"$-1\r\n"


def cache_of(entries: int = 10, reply_bytes: int = 100, value_bytes_max: int = 1000) -> SnapshotCache:
    """With room for so many entries."""
    return SnapshotCache(CacheSettings(entries * (reply_bytes + 5 + OVERHEAD_BYTES), value_bytes_max))


def shelf_of(cache: SnapshotCache, snapshot_id: int = ID, resp: int = 2) -> Shelf:
    shelf = cache.shelf(snapshot_id, resp)
    assert shelf is not None
    return shelf


def fill(shelf: Shelf, first: int, count: int) -> None:
    for number in range(first, first + count):
        shelf.put(b"%05d" % number, b"x" * 100, inf)


async def test_each_snapshot_and_resp_version_has_its_own() -> None:
    cache = cache_of()
    shelf_of(cache).put(b"k", b"v7", inf)
    shelf_of(cache, ID + 1).put(b"k", b"v8", inf)
    shelf_of(cache, ID, 3).put(b"k", b"_\r\n", inf)
    assert shelf_of(cache).get(b"k") == b"v7"
    assert shelf_of(cache, ID + 1).get(b"k") == b"v8"
    assert shelf_of(cache, ID, 3).get(b"k") == b"_\r\n"
    assert shelf_of(cache).get(b"other") is None


async def test_a_nil_is_a_value() -> None:
    shelf = shelf_of(cache_of())
    shelf.put(b"k", NIL, inf)
    assert shelf.get(b"k") == NIL


async def test_a_value_goes_when_its_time_is_over(autojump_clock: MockClock) -> None:
    cache = cache_of()
    shelf = shelf_of(cache)
    shelf.put(b"k", b"v", trio.current_time() + 5)
    await trio.sleep(4.999)
    assert shelf.get(b"k") == b"v"
    await trio.sleep(0.001)
    assert shelf.get(b"k") is None
    assert cache.bytes_held == 0


async def test_what_was_read_last_stays() -> None:
    cache = cache_of(entries=10)
    shelf = shelf_of(cache)
    fill(shelf, 0, 10)
    assert shelf.get(b"00000") is not None
    fill(shelf, 10, 9)
    assert shelf.get(b"00000") is not None
    assert [number for number in range(19) if b"%05d" % number in shelf.values] == [0, *range(10, 19)]
    assert cache.evictions_total == 9


async def test_a_snapshot_gets_room_from_the_one_that_has_most() -> None:
    cache = cache_of(entries=10)
    fill(shelf_of(cache), 0, 8)
    fill(shelf_of(cache, ID + 1), 0, 10)
    assert sorted([len(shelf_of(cache).values), len(shelf_of(cache, ID + 1).values)]) == [4, 6]
    assert cache.bytes_held <= cache.bytes_max


async def test_a_value_that_is_too_large_is_not_kept() -> None:
    cache = cache_of(value_bytes_max=50)
    shelf = shelf_of(cache)
    shelf.put(b"key", b"x" * 48, inf)
    assert shelf.get(b"key") is None
    shelf.put(b"key", b"x" * 47, inf)
    assert shelf.get(b"key") == b"x" * 47


async def test_without_room_there_is_no_shelf() -> None:
    assert SnapshotCache(CacheSettings(bytes_max=0)).shelf(ID, 2) is None


async def test_an_end_empties_the_shelves_of_that_snapshot_alone_and_whoever_holds_one_fills_it_no_more() -> (
    None
):
    cache = cache_of()
    held, other = shelf_of(cache), shelf_of(cache, ID + 1)
    held.put(b"k", b"v", inf)
    other.put(b"k", b"w", inf)
    cache.end(ID)
    held.put(b"late", b"v", inf)
    assert held.get(b"k") is None
    assert held.get(b"late") is None
    assert other.get(b"k") == b"w"
    assert cache.bytes_held == other.values.currsize


async def test_what_an_ended_snapshot_leaves_is_freed_in_steps(nursery: trio.Nursery) -> None:
    cache = cache_of(entries=10 * FREED_AT_ONCE)
    nursery.start_soon(cache.run)
    shelf = shelf_of(cache)
    fill(shelf, 0, 10 * FREED_AT_ONCE - 1)
    values = shelf.values
    cache.end(ID)
    lengths = [len(values)]
    while values:
        await trio.lowlevel.checkpoint()
        lengths.append(len(values))
    # Two steps at the most between two looks.
    assert max(before - after for before, after in pairwise(lengths)) <= 2 * FREED_AT_ONCE
    await trio.testing.wait_all_tasks_blocked()


async def test_a_look_at_all_keys_is_not_remembered_for_long() -> None:
    cache = cache_of()
    assert not cache.is_read_again(b"hot")
    assert cache.is_read_again(b"hot")
    for number in range(20 * SEEN_KEYS):
        assert not cache.is_read_again(b"%d" % number)
    assert not cache.is_read_again(b"hot")


@pytest.mark.parametrize("size", [10, 1000])
async def test_the_bound_is_that_of_the_memory_taken(size: int) -> None:
    count = 20_000
    cache = SnapshotCache(CacheSettings(1 << 30))
    shelf = shelf_of(cache)
    gc.collect()
    tracemalloc.start()
    for number in range(count):
        shelf.put(b"key:%d" % number, b"%d" % number + b"x" * size, float(number))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    print(f"\n{size}: taken {taken / count:.0f}, counted {cache.bytes_held / count:.0f}")
    assert 0.7 < taken / cache.bytes_held < 1.0
