"""Hooks get the events that are theirs: in order, at least once, whatever fails in between."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import proxy.hooks.records as records_module
import proxy.hooks.runner as runner_module
from proxy.hooks.records import (
    DeadLetter,
    ask_for_retry,
    position_key,
    read_letters,
    read_position,
    remove_letter,
    unpack_position,
)
from proxy.hooks.runner import PASSED_MAX, PAUSE_SECONDS, HookRunner
from proxy.metrics import Metrics
from proxy.settings import HookSettings
from proxy.store.interface import Expect, Operation, Put, StoreUnavailableError, TopologyStore
from proxy.store.memory import MemoryStore
from proxy.store.records import HOOKS
from proxy.topology.append import append_events
from proxy.topology.audit import Operator
from proxy.topology.history import History
from routing.timeline import Event, EventKind

SOMEBODY = Operator("somebody", "here")
PAGER = HookSettings(name="pager", command=("page",), attempts_max=4)
MAIL = HookSettings(name="mail", url="http://mail.example/", attempts_max=2)


class Target:
    """What hooks deliver to: ``fails`` says which attempts fail, by (hook, event, attempts so far)."""

    def __init__(self, fails: Callable[[str, int, int], bool] = lambda hook, number, attempts: False) -> None:
        self.fails = fails
        self.attempts: list[tuple[float, str, int]] = []  # (seconds since the beginning, hook, event)
        self.delivered: dict[str, list[int]] = {}  # hook -> numbers of events
        self.keys: set[str] = set()
        self._began = trio.current_time()

    async def deliver(self, hook: HookSettings, event: Event, key: str) -> str | None:
        await trio.lowlevel.checkpoint()
        before = sum(1 for _, name, number in self.attempts if (name, number) == (hook.name, event.number))
        self.attempts.append((trio.current_time() - self._began, hook.name, event.number))
        self.keys.add(key)
        if self.fails(hook.name, event.number, before):
            return "nobody answers"
        self.delivered.setdefault(hook.name, []).append(event.number)
        return None


class FragileStore(MemoryStore):
    """A store that can be out of reach, and dies at a chosen commit: before it is made, or after."""

    def __init__(self) -> None:
        super().__init__()
        self.is_out = False
        self.on_commit: Callable[[bool], None] = lambda is_made: None
        self.commit_count = 0

    async def commit(
        self, operations: Sequence[Operation], expect: Sequence[Expect] = (), *, durable: bool = False
    ) -> int:
        self._check()
        self.on_commit(False)
        await trio.lowlevel.checkpoint()
        revision = await super().commit(operations, expect, durable=durable)
        self.commit_count += 1
        self.on_commit(True)
        await trio.lowlevel.checkpoint()
        return revision

    async def _enter(self) -> None:
        self._check()
        await super()._enter()

    def _check(self) -> None:
        if self.is_out:
            raise StoreUnavailableError("the disk is full")


async def happen(store: TopologyStore, *kinds: EventKind, slot: int = 5) -> None:
    """Something happens: events at the end of the timeline."""
    events = [Event(kind, 10.0, kind.value, slot_ranges=((slot, slot),)) for kind in kinds]
    operations, expect = await append_events(store, events, "proxy-a")
    await store.commit(operations, expect)


def runner_of(store: TopologyStore, target: Target, *hooks: HookSettings) -> HookRunner:
    return HookRunner(
        store,
        History(store),
        hooks,
        "proxy-a",
        deliver=target.deliver,
        now=trio.current_time,
        jitter=lambda: 0.0,
    )


@asynccontextmanager
async def running(runner: HookRunner) -> AsyncIterator[None]:
    """It has read its positions on entry, and is cancelled on exit."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run)
        await wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


async def position_of(store: TopologyStore, name: str = "pager") -> int:
    position = await read_position(store, name)
    assert position is not None
    return position.number


async def timeline(store: TopologyStore) -> tuple[Event, ...]:
    return (await History(store).events(0, limit=1000)).events


async def test_a_new_hook_begins_at_the_end_of_the_timeline(autojump_clock: MockClock) -> None:
    """It is not told of history, and of everything after that."""
    store, target = MemoryStore(), Target()
    await happen(store, EventKind.FAILOVER, EventKind.FAILOVER)
    async with running(runner_of(store, target, PAGER)):
        assert await position_of(store) == 2
        await happen(store, EventKind.FAILOVER)
        await trio.sleep(1)
    assert target.delivered == {"pager": [3]}


async def test_a_failed_attempt_is_repeated_with_growing_waits_before_the_next_event(
    autojump_clock: MockClock,
) -> None:
    """Order is kept: what comes later waits."""
    store = MemoryStore()
    target = Target(lambda hook, number, attempts: number == 1 and attempts < 3)
    async with running(runner_of(store, target, PAGER)):
        await happen(store, EventKind.FAILOVER, EventKind.FAILOVER)
        await trio.sleep(20)
    assert [(at, number) for at, _, number in target.attempts] == [(0, 1), (1, 1), (3, 1), (7, 1), (7, 2)]
    assert len(target.keys) == 2  # one for each event, the same at each attempt


async def test_events_that_are_not_for_a_hook_are_passed_over(autojump_clock: MockClock) -> None:
    """By kind, by slot, and the notice that this very hook failed."""
    store, target = MemoryStore(), Target()
    hook = replace(PAGER, events=("migration_*", "hook_failed"), slot=7)
    async with running(runner_of(store, target, hook, MAIL)):
        await happen(store, EventKind.FAILOVER, EventKind.MIGRATION_BEGUN, slot=7)
        await happen(store, EventKind.MIGRATION_BEGUN, slot=8)
        await trio.sleep(1)
    assert target.delivered == {"pager": [2], "mail": [1, 2, 3]}


async def test_passing_over_events_costs_few_commits(autojump_clock: MockClock) -> None:
    """A hook for rare events does not write for each of the others, and the next runner need not look at all again."""
    store, target = FragileStore(), Target()
    async with running(runner_of(store, target, replace(PAGER, events=("failover",)))):
        before = store.commit_count
        for _ in range(25):
            await happen(store, *[EventKind.NODE_ADDED] * 100)
            await trio.sleep(0.1)
        assert store.commit_count - before - 25 == 2
    assert await position_of(store) >= 2500 - PASSED_MAX
    assert target.attempts == []


async def test_hooks_do_not_hold_each_other_up(autojump_clock: MockClock) -> None:
    """While one is failing, another gets its events."""
    store = MemoryStore()
    target = Target(lambda hook, number, attempts: hook == "pager")
    async with running(runner_of(store, target, PAGER, MAIL)):
        await happen(store, EventKind.FAILOVER, EventKind.FAILOVER)
        await trio.sleep(0.5)
    assert target.delivered == {"mail": [1, 2]}


# -- dead letters


async def test_what_cannot_be_delivered_becomes_a_dead_letter(
    autojump_clock: MockClock,
) -> None:
    """The letter says what failed; an event tells of it, to other hooks too but not to this one."""
    store = MemoryStore()
    target = Target(lambda hook, number, attempts: hook == "pager" and number == 1)
    async with running(runner_of(store, target, PAGER, MAIL)):
        began = trio.current_time()
        await happen(store, EventKind.FAILOVER, EventKind.FAILOVER)
        await trio.sleep(20)
    letters = await read_letters(store, "pager")
    assert letters == [DeadLetter(1, 4, "nobody answers", began + 7)]
    assert target.delivered == {"pager": [2], "mail": [1, 2, 3]}
    notice = (await timeline(store))[2]
    assert (notice.kind, notice.seen_by) == (EventKind.HOOK_FAILED, "proxy-a")
    assert notice.evidence == {"hook": "pager", "event": 1, "attempts": 4, "error": "nobody answers"}


async def test_broken_hooks_do_not_tell_of_each_other_for_ever(autojump_clock: MockClock) -> None:
    """Each tells once of each event; what tells of a failure and fails is a dead letter alone."""
    store = MemoryStore()
    target = Target(lambda hook, number, attempts: True)
    async with running(runner_of(store, target, PAGER, MAIL)):
        await happen(store, EventKind.FAILOVER)
        await trio.sleep(1000)
    assert [event.kind for event in await timeline(store)] == [EventKind.FAILOVER] + [
        EventKind.HOOK_FAILED
    ] * 2
    for name in ("pager", "mail"):
        assert len(await read_letters(store, name)) == 2


async def test_the_dead_letters_of_a_hook_are_bounded(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past DEAD_LETTERS_MAX the oldest goes."""
    for module in (records_module, runner_module):
        monkeypatch.setattr(module, "DEAD_LETTERS_MAX", 3)
    store = MemoryStore()
    hook = replace(PAGER, attempts_max=1)
    async with running(runner_of(store, Target(lambda *_: True), hook)):
        await happen(store, *[EventKind.FAILOVER] * 5)
        await trio.sleep(10)
    monkeypatch.undo()
    assert [letter.number for letter in await read_letters(store, "pager")] == [3, 4, 5]


async def test_an_operator_may_ask_for_another_attempt(autojump_clock: MockClock) -> None:
    """Delivered, the letter is gone; else it says what the last attempt met. Also asked while no runner ran."""
    store = MemoryStore()
    target = Target(lambda hook, number, attempts: number in (1, 2))
    runner = runner_of(store, target, replace(PAGER, attempts_max=1))
    async with running(runner):
        await happen(store, EventKind.FAILOVER, EventKind.FAILOVER, EventKind.FAILOVER)
        await trio.sleep(5)
        keys = set(target.keys)
        target.fails = lambda hook, number, attempts: number == 2
        assert await ask_for_retry(store, "pager", 1, trio.current_time(), SOMEBODY)
        assert await ask_for_retry(store, "pager", 2, trio.current_time(), SOMEBODY)
        assert not await ask_for_retry(store, "pager", 3, trio.current_time(), SOMEBODY)
        await trio.sleep(1)
        assert target.keys == keys
        [letter] = await read_letters(store, "pager")
        assert (letter.number, letter.attempts, letter.retry_asked_at) == (2, 2, None)
    target.fails = lambda hook, number, attempts: False
    assert await ask_for_retry(store, "pager", 2, trio.current_time(), SOMEBODY)
    async with running(runner):
        await trio.sleep(1)
    assert await read_letters(store, "pager") == []
    assert target.delivered["pager"].count(2) == 1


async def test_problems_and_samples_tell_how_hooks_fare(autojump_clock: MockClock) -> None:
    """What fails is named while it does, and dead letters until someone has dealt with them; counts go on."""
    store = MemoryStore()
    target = Target(lambda hook, number, attempts: number == 1)
    runner = runner_of(store, target, replace(PAGER, attempts_max=2))
    metrics = Metrics()
    metrics.register_source(runner.samples)

    def count(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"steadyread_hook_{name}", {"hook": "pager"})

    async with running(runner):
        assert runner.problems() == []
        await happen(store, EventKind.FAILOVER)
        await trio.sleep(0.5)
        assert runner.problems() == ["hook pager fails since 0 s: nobody answers"]
        assert count("failing") == 1
        await trio.sleep(0.6)
        assert runner.problems() == [
            "hook pager fails since 1 s: nobody answers",
            "hook pager has a dead letter: retry or remove what /v1/hooks/pager/dead-letters lists",
        ]
        await happen(store, EventKind.FAILOVER)
        await trio.sleep(0.1)
        assert len(runner.problems()) == 1
        assert count("dead_letters_kept") == 1
        assert await remove_letter(store, "pager", 1, trio.current_time(), SOMEBODY)
        await trio.sleep(0.1)
        assert runner.problems() == []
        assert count("failing") == count("dead_letters_kept") == 0
    assert runner.problems() == []
    assert [count(f"{name}_total") for name in ("delivered", "failed_attempts", "dead_letters")] == [1, 2, 1]
    assert count("failing") is None


# -- what may go wrong around it


@pytest.mark.parametrize("dies_after", [False, True], ids=["before-commit", "after-commit"])
async def test_a_runner_that_dies_at_any_commit_skips_nothing(
    autojump_clock: MockClock, dies_after: bool
) -> None:
    """At least once: an event is repeated only if the runner died between its delivery and the commit."""
    for dying_commit in range(12):
        store = FragileStore()
        target = Target(lambda hook, number, attempts: (number == 2 and attempts < 2) or number == 4)
        hook = replace(PAGER, attempts_max=3, events=("failover",))
        async with running(runner_of(store, target, hook)):
            pass
        await happen(store, *[EventKind.FAILOVER] * 3, EventKind.NODE_ADDED, *[EventKind.FAILOVER] * 2)
        target.fails = lambda hook, number, attempts: (number == 2 and attempts < 2) or number == 5
        left = [dying_commit]
        with trio.CancelScope() as life:

            def die(is_made: bool, left: list[int] = left, life: trio.CancelScope = life) -> None:
                if is_made is dies_after:
                    left[0] -= 1
                    if left[0] < 0:
                        life.cancel()

            store.on_commit = die
            with trio.move_on_after(60):
                await runner_of(store, target, hook).run()
        store.on_commit = lambda is_made: None
        async with running(runner_of(store, target, hook)):
            await trio.sleep(60)
        delivered = target.delivered["pager"]
        assert list(dict.fromkeys(delivered)) == [1, 2, 3, 6]
        assert len(delivered) <= 4 + (not dies_after)
        assert sorted(delivered) == delivered
        assert [letter.number for letter in await read_letters(store, "pager")] == [5]
        notices = [event for event in await timeline(store) if event.kind is EventKind.HOOK_FAILED]
        assert len(notices) == 1
        assert len(target.keys) == 5


async def test_attempts_are_counted_on_after_a_restart(autojump_clock: MockClock) -> None:
    """A proxy that restarts again and again does not try for ever."""
    store = MemoryStore()
    target = Target(lambda *_: True)
    async with running(runner_of(store, target, PAGER)):
        pass
    await happen(store, EventKind.FAILOVER)
    for _ in range(4):
        async with running(runner_of(store, target, PAGER)):
            pass
    assert len(target.attempts) == 4
    assert [letter.attempts for letter in await read_letters(store, "pager")] == [4]


async def test_of_two_runners_none_moves_a_position_back(autojump_clock: MockClock) -> None:
    """One that does not know yet that it should run no more may repeat an event, and harms nothing else."""
    store = MemoryStore()
    first, second = Target(), Target(lambda hook, number, attempts: number % 3 == 0 and attempts < 1)
    async with running(runner_of(store, first, PAGER)), running(runner_of(store, second, PAGER)):
        for _ in range(20):
            await happen(store, EventKind.FAILOVER)
            await trio.sleep(0.7)
        await trio.sleep(20)
    watch = store.watch(HOOKS, 0)
    changes = (await watch.next_batch()).changes
    numbers = [unpack_position("pager", change.value).number for change in changes if change.value]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 20
    assert {*first.delivered["pager"], *second.delivered["pager"]} == set(range(1, 21))
    assert all(change.key == position_key("pager") for change in changes)


async def test_a_store_that_fails_is_waited_for(autojump_clock: MockClock) -> None:
    """What was delivered meanwhile is not delivered again, and health says what is wrong until it is well."""
    store, target = FragileStore(), Target()
    runner = runner_of(store, target, PAGER)
    async with running(runner):
        await happen(store, EventKind.FAILOVER, EventKind.FAILOVER)

        def fail(is_made: bool) -> None:
            store.is_out = True
            raise StoreUnavailableError("the disk is full")

        store.on_commit = fail
        await trio.sleep(5)
        assert target.delivered == {"pager": [1]}
        assert runner.problems() == ["hook pager cannot go on with its events: the disk is full"]
        store.on_commit = lambda is_made: None
        store.is_out = False
        await trio.sleep(5)
        assert runner.problems() == []
    assert target.delivered == {"pager": [1, 2]}
    assert await position_of(store) == 2


async def test_a_store_that_is_not_there_at_first_is_waited_for(autojump_clock: MockClock) -> None:
    """A runner may start before its store answers."""
    store, target = FragileStore(), Target()
    store.is_out = True
    runner = runner_of(store, target, PAGER)
    async with running(runner):
        assert len(runner.problems()) == 2
        store.is_out = False
        await trio.sleep(2 * PAUSE_SECONDS)
        assert runner.problems() == []
        await happen(store, EventKind.FAILOVER)
        await trio.sleep(1)
    assert target.delivered == {"pager": [1]}


async def test_a_fault_in_a_hook_ends_nothing_else(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug is logged and named, the hook tries again, and other hooks go on."""
    store = MemoryStore()
    faults = [ValueError("a bug")]

    def fails(hook: str, number: int, attempts: int) -> bool:
        if hook == "pager" and faults:
            raise faults.pop()
        return False

    target = Target(fails)
    runner = runner_of(store, target, PAGER, MAIL)
    async with running(runner):
        await happen(store, EventKind.FAILOVER)
        await trio.sleep(PAUSE_SECONDS / 2)
        assert runner.problems() == ["hook pager cannot go on with its events: ValueError('a bug')"]
        await trio.sleep(PAUSE_SECONDS)
        assert runner.problems() == []
    assert target.delivered == {"mail": [1], "pager": [1]}
    assert "hook_task_failed" in caplog.text


async def test_a_damaged_position_is_named_and_left_as_it_is(autojump_clock: MockClock) -> None:
    """It is not taken for a new hook's, which would skip events."""
    store, target = MemoryStore(), Target()
    await store.commit([Put(position_key("pager"), b"\xc1")])
    runner = runner_of(store, target, PAGER)
    async with running(runner):
        [problem] = runner.problems()
    assert "position of hook pager is damaged" in problem
    entry = await store.get(position_key("pager"))
    assert entry is not None
    assert entry.value == b"\xc1"


async def test_a_timeline_that_is_behind_the_position_is_followed_from_its_end(
    autojump_clock: MockClock,
) -> None:
    """The store came back from an older copy: its next events are delivered, and not only those far ahead."""
    old, target = MemoryStore(), Target()
    async with running(runner_of(old, target, PAGER)):
        await happen(old, *[EventKind.FAILOVER] * 5)
        await trio.sleep(1)
    entry = await old.get(position_key("pager"))
    assert entry is not None
    store = MemoryStore()
    await store.commit([Put(entry.key, entry.value)])
    await happen(store, EventKind.FAILOVER)
    async with running(runner_of(store, target, PAGER)):
        await happen(store, EventKind.NODE_ADDED)
        await trio.sleep(1)
    assert target.delivered["pager"] == [1, 2, 3, 4, 5, 2]
