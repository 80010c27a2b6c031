"""Each twin against a plain dictionary: whatever is done in whatever order, they hold the same."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from proxy.store import sqlite
from proxy.store.interface import (
    ABSENT,
    Change,
    CompactedError,
    ConflictError,
    Delete,
    Entry,
    Expect,
    LeaseExpiredError,
    Operation,
    Put,
    TopologyStore,
)
from proxy.store.memory import MemoryStore
from proxy.store.sqlite import open_store
from tests.proxy.store.conftest import Clock
from tests.proxy.store.test_contract import collect

T = TypeVar("T")

KEYS = st.sampled_from(["a", "a/1", "a/2", "a/20", "b", "b/1", "c"])
BOUNDS = st.sampled_from(["a", "a/", "a/2", "a0", "b", "b/", "c", "z"])
PREFIXES = st.sampled_from(["", "a", "a/", "b/", "c", "x"])
VALUES = st.binary(max_size=8)
TTL_SECONDS = 10.0


class Model:
    """What a store is, with nothing in its way."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.log: list[Change] = []
        self.revision = 0
        self.compacted = 0
        self.leases: dict[int, float] = {}  # lease -> when it ends

    def apply(self, operations: list[Operation]) -> None:
        self.revision += 1
        for operation in operations:
            if isinstance(operation, Put):
                self.entries[operation.key] = Entry(
                    operation.key, operation.value, self.revision, operation.lease
                )
                self.log.append(Change(self.revision, operation.key, operation.value))
            elif self.entries.pop(operation.key, None) is not None:
                self.log.append(Change(self.revision, operation.key, None))

    def end(self, lease: int) -> None:
        if self.leases.pop(lease, None) is not None:
            keys = sorted(key for key, entry in self.entries.items() if entry.lease == lease)
            if keys:
                self.apply([Delete(key) for key in keys])

    def end_due(self, now: float) -> None:
        for lease in [lease for lease, ends_at in self.leases.items() if ends_at <= now]:
            self.end(lease)


class Loop:
    """One event loop for all rules of an example, in a thread: rules are plain functions."""

    def __init__(self) -> None:
        started = threading.Event()

        async def main() -> None:
            self.token = trio.lowlevel.current_trio_token()
            self.ended = trio.Event()
            started.set()
            await self.ended.wait()

        self.thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
        self.thread.start()
        started.wait()

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        return trio.from_thread.run(work, trio_token=self.token)

    def end(self) -> None:
        trio.from_thread.run_sync(self.ended.set, trio_token=self.token)
        self.thread.join()


class StoreMachine(RuleBasedStateMachine):
    """Commits, leases, compactions and time in any order, checked by reads and watches."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.model = Model()
        self.granted: list[int] = []  # every lease there ever was
        self.loop = Loop()
        self.store = self.run(self.open)

    @abstractmethod
    async def open(self) -> TopologyStore:
        """The twin that is tested, empty."""

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        async def bounded() -> T:
            with trio.fail_after(20):
                return await work()

        return self.loop.run(bounded)

    @rule(
        puts=st.dictionaries(KEYS, st.tuples(VALUES, st.integers(0, 3)), max_size=3),
        deletes=st.sets(KEYS, max_size=2),
        expects=st.lists(st.tuples(KEYS, st.integers(-1, 1)), max_size=2),
    )
    def commit(
        self,
        puts: dict[str, tuple[bytes, int]],
        deletes: set[str],
        expects: list[tuple[str, int]],
    ) -> None:
        operations: list[Operation] = [
            Put(key, value, self.granted[-place] if 0 < place <= len(self.granted) else 0)
            for key, (value, place) in puts.items()
        ]
        operations += [Delete(key) for key in sorted(deletes - puts.keys())]
        self.model.end_due(self.clock())
        expect = []
        fails = False
        for key, error in expects:  # mostly right, so that commits get through
            entry = self.model.entries.get(key)
            found = ABSENT if entry is None else entry.revision
            expect.append(Expect(key, max(0, found + error)))
            fails |= expect[-1].revision != found
        lapsed = any(
            isinstance(operation, Put) and operation.lease and operation.lease not in self.model.leases
            for operation in operations
        )

        async def work() -> None:
            if fails:
                with pytest.raises(ConflictError):
                    await self.store.commit(operations, expect)
            elif lapsed:
                with pytest.raises(LeaseExpiredError):
                    await self.store.commit(operations, expect)
            else:
                self.model.apply(operations)
                assert await self.store.commit(operations, expect) == self.model.revision

        self.run(work)

    @rule()
    def grant(self) -> None:
        lease = self.run(lambda: self.store.grant(TTL_SECONDS))
        assert lease not in self.granted
        self.granted.append(lease)
        self.model.leases[lease] = self.clock() + TTL_SECONDS

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.granted))
        self.model.end_due(self.clock())

        async def work() -> None:
            if lease in self.model.leases:
                await self.store.renew(lease)
                self.model.leases[lease] = self.clock() + TTL_SECONDS
            else:
                with pytest.raises(LeaseExpiredError):
                    await self.store.renew(lease)

        self.run(work)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.granted))
        self.model.end(lease)
        self.run(lambda: self.store.revoke(lease))

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.seconds += seconds

    @rule(back=st.integers(-1, 6))
    def compact(self, back: int) -> None:
        revision = max(0, self.model.revision - back)
        self.model.compacted = max(self.model.compacted, min(revision, self.model.revision))
        self.run(lambda: self.store.compact(revision))

    @rule(first=BOUNDS, last=BOUNDS, limit=st.integers(1, 9), descending=st.booleans())
    def read(self, first: str, last: str, limit: int, descending: bool) -> None:
        keys = sorted((key for key in self.model.entries if first <= key < last), reverse=descending)
        found = self.run(lambda: self.store.read(first, last, limit=limit, descending=descending))
        assert found == [self.model.entries[key] for key in keys[:limit]]

    @rule(prefix=PREFIXES, back=st.integers(0, 8))
    def watch(self, prefix: str, back: int) -> None:
        after = max(0, self.model.revision - back)

        async def work() -> None:
            watch = self.store.watch(prefix, after)
            if after < self.model.compacted:
                with pytest.raises(CompactedError) as caught:
                    await watch.next_batch()
                assert caught.value.oldest == self.model.compacted
                return
            expected = [
                change
                for change in self.model.log
                if change.revision > after and change.key.startswith(prefix)
            ]
            if expected:
                assert await collect(watch, expected[-1].revision) == expected
            with trio.move_on_after(0.001) as waiting:
                await watch.next_batch()
            assert waiting.cancelled_caught

        self.run(work)

    @invariant()
    def holds_the_same(self) -> None:
        async def work() -> None:
            assert await self.store.revision() == self.model.revision
            for key in ("a", "a/2", "c"):
                assert await self.store.get(key) == self.model.entries.get(key)

        self.run(work)

    def teardown(self) -> None:
        self.run(self.store.aclose)
        self.loop.end()


class MemoryMachine(StoreMachine):
    async def open(self) -> TopologyStore:
        return MemoryStore(self.clock)


class SqliteMachine(StoreMachine):
    async def open(self) -> TopologyStore:
        # In memory where there is such a place: how a disk fares is no question here.
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        return await open_store(self.folder / "store.db", now=self.clock)

    @rule()
    def close_and_open(self) -> None:
        async def work() -> TopologyStore:
            await self.store.aclose()
            return await open_store(self.folder / "store.db", now=self.clock)

        self.store = self.run(work)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


def test_the_memory_twin() -> None:
    """MemoryStore does what the dictionary does."""
    run_state_machine_as_test(MemoryMachine, settings=settings(max_examples=30, stateful_step_count=30))


def test_the_sqlite_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """SqliteStore does what the dictionary does, also when it is closed and opened in between."""
    monkeypatch.setattr(sqlite, "BATCH_CHANGES", 3)  # so that few changes make several batches
    monkeypatch.setattr(sqlite, "SWEEP_ROWS", 2)
    run_state_machine_as_test(SqliteMachine, settings=settings(max_examples=20, stateful_step_count=30))
