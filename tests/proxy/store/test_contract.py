"""What ``proxy.store.interface`` promises, for each twin."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby

import pytest
import trio

from proxy.store.interface import (
    ABSENT,
    Batch,
    Change,
    CompactedError,
    ConflictError,
    Delete,
    Entry,
    Expect,
    LeaseExpiredError,
    Operation,
    Put,
    StoreUnavailableError,
    TopologyStore,
    Watch,
    prefix_range,
)
from tests.proxy.store.conftest import Clock


async def collect(watch: Watch, upto: int) -> list[Change]:
    """What a watch gives until it has passed a revision."""
    found: list[Change] = []
    while True:
        batch = await watch.next_batch()
        found += batch.changes
        if batch.revision >= upto:
            return found


async def test_an_empty_store(store: TopologyStore) -> None:
    """A new store is at revision 0, has no entry, and no problem."""
    assert await store.revision() == 0
    assert await store.get("a") is None
    assert await store.read("a", "z", limit=10) == []
    assert store.problems() == []


async def test_what_is_put_is_there(store: TopologyStore) -> None:
    """An entry has the value and the revision of the commit that wrote it last; deleting removes it."""
    assert await store.commit([Put("a", b"1"), Put("b", b"")]) == 1
    assert await store.commit([Put("a", b"2")], durable=True) == 2
    assert await store.get("a") == Entry("a", b"2", 2)
    assert await store.get("b") == Entry("b", b"", 1)
    assert await store.commit([Delete("a"), Delete("never")]) == 3
    assert await store.get("a") is None
    assert await store.revision() == 3


async def test_read_is_in_the_order_of_the_keys(store: TopologyStore) -> None:
    """Of first <= key < last, in both directions, and not more than was asked for."""
    await store.commit([Put(f"n/{number:03}", b"%d" % number) for number in range(20)])
    await store.commit([Put("m", b""), Put("n", b""), Put("n0", b"")])
    first, last = prefix_range("n/")
    assert [entry.key for entry in await store.read(first, last, limit=3)] == ["n/000", "n/001", "n/002"]
    assert [entry.key for entry in await store.read(first, last, limit=2, descending=True)] == [
        "n/019",
        "n/018",
    ]
    assert [entry.key for entry in await store.read("n/005", "n/007", limit=9)] == ["n/005", "n/006"]
    assert [entry.key for entry in await store.read("n/005", "n/007", limit=1, descending=True)] == ["n/006"]
    assert len(await store.read(first, last, limit=99)) == 20
    assert await store.read("x", "n", limit=9) == []


async def test_a_condition_that_does_not_hold_prevents_all(store: TopologyStore) -> None:
    """Compare-and-set: on a conflict nothing is written, and the error says what was found."""
    await store.commit([Put("a", b"1")])
    with pytest.raises(ConflictError) as caught:
        await store.commit([Put("a", b"x"), Put("b", b"x")], [Expect("a", 1), Expect("c", 7)])
    assert (caught.value.key, caught.value.expected, caught.value.found) == ("c", 7, ABSENT)
    with pytest.raises(ConflictError):
        await store.commit([Put("a", b"x")], [Expect("a", ABSENT)])
    assert await store.revision() == 1
    assert await store.get("a") == Entry("a", b"1", 1)
    assert await store.get("b") is None
    assert await store.commit([Put("a", b"2")], [Expect("a", 1), Expect("b", ABSENT)]) == 2


async def test_one_of_many_wins(store: TopologyStore) -> None:
    """Of commits that expect the same revision, one succeeds."""
    won: list[int] = []

    async def compete(number: int) -> None:
        try:
            await store.commit([Put("a", b"%d" % number)], [Expect("a", ABSENT)])
        except ConflictError:
            return
        won.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(compete, number)
    entry = await store.get("a")
    assert entry is not None
    assert [b"%d" % number for number in won] == [entry.value]


async def test_a_key_stands_in_a_commit_once(store: TopologyStore) -> None:
    """A commit that names a key twice is a caller's mistake, and nothing is written."""
    with pytest.raises(ValueError, match="more than once"):
        await store.commit([Put("a", b"1"), Delete("a")])
    assert await store.revision() == 0


async def test_a_lease_takes_its_entries_along(store: TopologyStore, clock: Clock) -> None:
    """When a lease ends, what hangs on it is deleted in one revision, and a watch sees that."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        lease = await store.grant(5.0)
        await store.commit([Put("a", b"1", lease), Put("b", b"1", lease), Put("c", b"1")])
        assert await store.get("a") == Entry("a", b"1", 1, lease)
        clock.seconds += 4.0
        await store.renew(lease)
        await store.commit([Put("b", b"2")])  # hangs on nothing any more
        clock.seconds += 4.9
        await trio.sleep(0.15)
        assert await store.get("a") is not None
        watch = store.watch("", 2)
        clock.seconds += 0.2
        with trio.fail_after(10):
            assert await watch.next_batch() == Batch((Change(3, "a", None),), 3)
        assert await store.get("a") is None
        assert await store.get("b") == Entry("b", b"2", 2)
        assert await store.get("c") is not None
        for refused in (store.renew(lease), store.commit([Put("d", b"", lease)])):
            with pytest.raises(LeaseExpiredError):
                await refused
        assert await store.get("d") is None
        await store.revoke(lease)
        assert await store.revision() == 3
        nursery.cancel_scope.cancel()


async def test_an_ended_lease_does_not_wait_for_the_sweep(store: TopologyStore, clock: Clock) -> None:
    """A commit that expects a key's absence succeeds as soon as the lease that kept it is over."""
    lease = await store.grant(1.0)
    await store.commit([Put("lock", b"1", lease)], [Expect("lock", ABSENT)])
    with pytest.raises(ConflictError):
        await store.commit([Put("lock", b"2")], [Expect("lock", ABSENT)])
    clock.seconds += 1.0
    assert await store.commit([Put("lock", b"2")], [Expect("lock", ABSENT)]) == 3
    assert await collect(store.watch("lock", 1), 3) == [Change(2, "lock", None), Change(3, "lock", b"2")]


async def test_leases_are_numbered_apart_and_end_by_revoke(store: TopologyStore) -> None:
    """Revoking a lease deletes what hangs on it, and on no other."""
    first, second = await store.grant(9.0), await store.grant(9.0)
    assert first != second
    await store.commit([Put("a", b"", first), Put("b", b"", second)])
    await store.revoke(first)
    assert [entry.key for entry in await store.read("a", "z", limit=9)] == ["b"]
    await store.revoke(first)
    assert await store.revision() == 2


async def test_a_watch_gives_each_change_of_its_prefix_once(store: TopologyStore) -> None:
    """In order, from the revision after the one that was named, deletions too, and nothing of other prefixes."""
    await store.commit([Put("a/1", b"1"), Put("b/1", b"1")])
    await store.commit([Put("a/2", b"2")])
    await store.commit([Delete("a/1"), Delete("a/none")])
    assert await collect(store.watch("a/", 1), 3) == [Change(2, "a/2", b"2"), Change(3, "a/1", None)]
    assert (await store.watch("b/", 0).next_batch()).changes == (Change(1, "b/1", b"1"),)
    assert len(await collect(store.watch("", 0), 3)) == 4


async def test_a_watch_waits_for_what_comes(store: TopologyStore) -> None:
    """Nothing to tell: it waits. A later commit under its prefix wakes it, one elsewhere does not end the wait."""
    watch = store.watch("a/", await store.revision())
    with trio.move_on_after(0.1) as waiting:
        await watch.next_batch()
    assert waiting.cancelled_caught

    async def write() -> None:
        await store.commit([Put("b/1", b"")])
        await trio.sleep(0.02)
        await store.commit([Put("a/1", b"")])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        with trio.fail_after(10):
            assert (await watch.next_batch()).changes == (Change(2, "a/1", b""),)


async def test_a_batch_has_whole_revisions(store: TopologyStore) -> None:
    """However large they are; and a long log comes in several batches."""
    sizes = [600, 600, 3000, 1, 1, 999]
    for size in sizes:
        await store.commit([Put(f"k/{number}", b"") for number in range(size)])
    watch = store.watch("", 0)
    found: list[int] = []
    batches = 0
    while len(found) < len(sizes):
        batch = await watch.next_batch()
        batches += 1
        found += [len(list(changes)) for _, changes in groupby(batch.changes, lambda change: change.revision)]
    assert found == sizes
    assert batches > 1


async def test_compaction_forgets_what_was_replaced(store: TopologyStore) -> None:
    """Entries stay as they are. A watch from before ends, one from there on still sees everything."""
    for number in range(10):
        await store.commit([Put("a", b"%d" % number), Put(f"b/{number}", b"")])
    await store.commit([Delete("b/3")])
    old = store.watch("", 2)
    await store.compact(8)
    with pytest.raises(CompactedError) as caught:
        await old.next_batch()
    assert caught.value.oldest == 8
    with pytest.raises(CompactedError):
        await store.watch("", 7).next_batch()
    assert [change.key for change in await collect(store.watch("", 8), 11)] == ["a", "b/8", "a", "b/9", "b/3"]
    assert await store.get("a") == Entry("a", b"9", 10)
    assert len(await store.read("b/", "b0", limit=99)) == 9
    await store.compact(99)
    assert await store.revision() == 11
    with trio.move_on_after(0.05) as waiting:
        await store.watch("", 11).next_batch()
    assert waiting.cancelled_caught
    await store.compact(3)
    await store.commit([Put("b/0", b"new"), Delete("b/1")])
    assert await store.get("b/0") == Entry("b/0", b"new", 12)
    assert [change.key for change in await collect(store.watch("", 11), 12)] == ["b/0", "b/1"]


async def test_a_closed_store_says_so(store: TopologyStore) -> None:
    """Everything raises StoreUnavailableError after aclose, also a watch that waits."""
    await store.commit([Put("a", b"")])
    watch = store.watch("", 1)

    async def wait() -> None:
        with pytest.raises(StoreUnavailableError, match="closed"):
            await watch.next_batch()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(0.05)
            await store.aclose()
    for refused in (
        store.revision(),
        store.get("a"),
        store.read("a", "b", limit=1),
        store.commit([Put("a", b"")]),
        store.grant(1.0),
        store.renew(1),
        store.revoke(1),
        store.compact(1),
        watch.next_batch(),
    ):
        with pytest.raises(StoreUnavailableError, match="closed"):
            await refused


async def test_watches_of_concurrent_writers_lose_and_repeat_nothing(store: TopologyStore) -> None:
    """Whoever writes, is cancelled or conflicts meanwhile: each watch, from any revision, gives the log's tail."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    acknowledged: dict[int, Sequence[Operation]] = {}
    seen: list[tuple[int, list[Change]]] = []

    async def write(writer: int) -> None:
        for number in range(25):
            keys = dice.sample(range(8), dice.randint(1, 4))
            operations: list[Operation] = [
                Delete(f"k/{key}") if dice.random() < 0.2 else Put(f"k/{key}", b"%d %d" % (writer, number))
                for key in keys
            ]
            expect = [Expect(f"k/{keys[0]}", dice.randint(0, 5))] if dice.random() < 0.1 else []
            with trio.move_on_after(dice.choice([0.0, 0.0005, 1.0, 1.0, 1.0])):
                try:
                    acknowledged[await store.commit(operations, expect)] = operations
                except ConflictError:
                    continue

    async def watch(task_status: trio.TaskStatus[None]) -> None:
        after = dice.randint(0, await store.revision())
        watch, found = store.watch("k/", after), list[Change]()
        seen.append((after, found))
        task_status.started()
        while True:
            with trio.move_on_after(dice.choice([0.001, 1.0])):
                found += (await watch.next_batch()).changes

    async with trio.open_nursery() as watchers:
        async with trio.open_nursery() as writers:
            for writer in range(4):
                writers.start_soon(write, writer)
            for _ in range(6):
                await watchers.start(watch)
                await trio.sleep(0.005)
        last = await store.commit([Put("k/end", b"")])
        log = await collect(store.watch("k/", 0), last)
        with trio.fail_after(10):
            while not all(found and found[-1].key == "k/end" for _, found in seen):
                await trio.sleep(0.01)
        await trio.sleep(0.02)
        watchers.cancel_scope.cancel()
    for after, found in seen:
        assert found == [change for change in log if change.revision > after]
    for revision, operations in acknowledged.items():
        puts = [Change(revision, put.key, put.value) for put in operations if isinstance(put, Put)]
        assert [change for change in log if change.revision == revision and change.value is not None] == puts
