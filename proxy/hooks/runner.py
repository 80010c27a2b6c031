"""Carries the timeline's events to the operator's hooks: in order, each at least once, with retries.

Each hook is on its own: one that is slow or broken holds up no other, and never traffic. Its position stands in the
store, so that whoever runs the hooks next goes on from there. It is written after each delivery, under the condition
that nobody else has written it: of two runners, the one that is late reads it again and never moves it back. Between
a delivery and that commit a runner may die; then the event is delivered again, and its idempotency key is the same.

What cannot be delivered becomes a dead letter, in one commit with the position and an event that says so. A hook
that runs for the first time begins at the end of the timeline. A store that fails is waited for.

Only one proxy of a store should run hooks: the discoverer. It decides nothing (``routing.hook_delivery``) and does not
deliver itself (``proxy.hooks.delivery``).
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import trio

from proxy.hooks.delivery import deliver
from proxy.hooks.records import (
    DEAD_LETTERS_MAX,
    DeadLetter,
    letter_key,
    letters_prefix,
    pack_letter,
    pack_position,
    position_key,
    unpack_letter,
    unpack_position,
)
from proxy.log import get_logger
from proxy.metrics import Family, MetricType, Sample
from proxy.settings import HookSettings
from proxy.store.interface import (
    ABSENT,
    CompactedError,
    ConflictError,
    Delete,
    Entry,
    Expect,
    Operation,
    Put,
    StoreError,
    StoreUnavailableError,
    TopologyStore,
    prefix_range,
)
from proxy.store.records import EVENT_HEAD, EVENTS, numbered, unpack_event
from proxy.topology.append import append_events
from proxy.topology.history import History
from routing.events import EventFilter
from routing.hook_delivery import (
    GiveUp,
    HookPosition,
    RetryLimits,
    delivered,
    failed,
    failure_event,
    is_own_failure,
    next_attempt,
    passed,
)
from routing.timeline import Event

PAGE_EVENTS = 64  # kept in memory at one time, for each hook
PASSED_MAX = 1000  # events that are not for a hook may be looked at again by the next runner
PAUSE_SECONDS = 1.0  # after the store failed, or another runner moved the position

log = get_logger(__name__)

_T = TypeVar("_T")

Deliver = Callable[
    [HookSettings, Event, str], Awaitable[str | None]
]  # (hook, event, idempotency key) -> why not


class HookRunner:
    """All hooks of one proxy. ``run`` runs while this proxy is the one to run them; it may be run again later."""

    def __init__(
        self,
        store: TopologyStore,
        history: History,
        hooks: Sequence[HookSettings],
        proxy_id: str,
        *,
        deliver: Deliver = deliver,
        now: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._hooks = [_Hook(store, history, settings, proxy_id, deliver, now, jitter) for settings in hooks]
        self._is_running = False

    async def run(self) -> None:
        """Deliver until cancelled. Raises nothing else: what is wrong is in ``problems``."""
        self._is_running = True
        try:
            async with trio.open_nursery() as nursery:
                for hook in self._hooks:
                    nursery.start_soon(hook.run)
        finally:
            self._is_running = False

    def problems(self) -> list[str]:
        """What an operator should know, one sentence each; empty when all is well, or while hooks do not run here."""
        return [problem for hook in self._hooks for problem in hook.problems()] if self._is_running else []

    def samples(self) -> Iterator[Sample]:
        """A source for ``proxy.metrics``."""
        for hook in self._hooks:
            yield from hook.samples(self._is_running)


class _Hook:
    """One hook: a task that follows the timeline, and one that retries dead letters when operators ask for it."""

    def __init__(
        self,
        store: TopologyStore,
        history: History,
        settings: HookSettings,
        proxy_id: str,
        deliver: Deliver,
        now: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self.name = settings.name
        self.delivered_total = 0
        self.failed_attempts_total = 0
        self.dead_letters_total = 0
        self._settings = settings
        self._filter = EventFilter(
            settings.events, settings.shard, None if settings.slot < 0 else settings.slot
        )
        self._limits = RetryLimits(
            settings.attempts_max, settings.retry_first_seconds, settings.retry_max_seconds
        )
        self._store = store
        self._history = history
        self._proxy_id = proxy_id
        self._deliver = deliver
        self._now = now
        self._jitter = jitter
        self._position = HookPosition("", 0)
        self._recorded_number = 0  # of the position as the store has it
        self._revision = ABSENT  # of its entry
        self._letter_count = 0
        self._troubles: dict[str, str] = {}  # task -> why it cannot go on
        self._attempting = trio.Lock()  # one attempt at a time, a dead letter's too

    async def run(self) -> None:
        self._troubles.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_at, "events", self._follow_timeline)
            nursery.start_soon(self._keep_at, "dead letters", self._follow_letters)

    def problems(self) -> Iterator[str]:
        position = self._position
        if position.failing_since is not None:
            seconds = self._now() - position.failing_since
            yield f"hook {self.name} fails since {seconds:.0f} s: {position.error}"
        if self._letter_count:
            number = "a dead letter" if self._letter_count == 1 else f"{self._letter_count} dead letters"
            yield f"hook {self.name} has {number}: retry or remove what /v1/hooks/{self.name}/dead-letters lists"
        for task, trouble in self._troubles.items():
            yield f"hook {self.name} cannot go on with its {task}: {trouble}"

    def samples(self, is_running: bool) -> Iterator[Sample]:
        labels = (self.name,)
        yield Sample(DELIVERED, self.delivered_total, labels)
        yield Sample(FAILED_ATTEMPTS, self.failed_attempts_total, labels)
        yield Sample(DEAD_LETTERS, self.dead_letters_total, labels)
        if is_running:
            yield Sample(FAILING, self._position.failing_since is not None, labels)
            yield Sample(LETTERS_KEPT, self._letter_count, labels)

    async def _keep_at(self, task: str, work: Callable[[], Awaitable[None]]) -> None:
        """Begin ``work`` again whenever something ends it. A hook's fault must not end the proxy's other tasks."""
        while True:
            try:
                await work()
            except ConflictError as conflict:
                log.info("hook_record_changed_by_another", hook=self.name, reason=conflict)
            except StoreError as error:
                self._note_trouble(task, error)
            except Exception as error:
                log.exception("hook_task_failed", hook=self.name, task=task)
                self._troubles[task] = repr(error)
            await trio.sleep(PAUSE_SECONDS)

    def _note_trouble(self, task: str, error: StoreError) -> None:
        if task not in self._troubles:
            log.warning("hook_waits_for_store", hook=self.name, task=task, reason=error)
        self._troubles[task] = str(error)

    # -- the timeline

    async def _follow_timeline(self) -> None:
        await self._read_position()
        self._troubles.pop("events", None)
        while True:
            after = self._position.number
            page = await self._history.events(after, filter=self._filter, limit=PAGE_EVENTS)
            if page.newest < after:
                log.warning("hook_ahead_of_timeline", hook=self.name, position=after, newest=page.newest)
                await self._record(passed(self._position, page.newest))
                continue
            if page.missing_before is not None:
                log.warning(
                    "hook_events_lost", hook=self.name, first_missing=after + 1, next=page.missing_before
                )
            for event in page.events:
                if not is_own_failure(event, self.name):
                    await self._bring(event)
            if page.next_after > self._position.number:
                self._position = passed(self._position, page.next_after)
                if page.next_after - self._recorded_number >= PASSED_MAX:
                    await self._record(self._position)
            if page.is_at_end:
                await self._history.wait(self._position.number)

    async def _read_position(self) -> None:
        """Where the last runner left off; at the end of the timeline if there was none. Raises StoreError."""
        entry = await self._store.get(position_key(self.name))
        if entry is not None:
            self._revision = entry.revision
            self._position = unpack_position(self.name, entry.value)
            self._recorded_number = self._position.number
        else:
            self._revision = ABSENT
            newest = await self._history.newest_number()
            await self._record(HookPosition(key_prefix=secrets.token_hex(8), number=newest))

    async def _bring(self, event: Event) -> None:
        """Deliver ``event``, or make a dead letter of it."""
        while True:
            error = await self._attempt(event)
            now = self._now()
            if error is None:
                if self._position.failing_since is not None:
                    log.info("hook_recovered", hook=self.name, event_number=event.number)
                await self._record(delivered(self._position, event.number, now))
                return
            position = failed(self._position, event.number, error, now)
            match next_attempt(position.attempts, now, self._limits, self._jitter()):
                case GiveUp():
                    await self._bury(event, position, now)
                    return
                case at:
                    await self._record(position)
                    await trio.sleep(at.time - now)

    async def _attempt(self, event: Event) -> str | None:
        async with self._attempting:
            error = await self._deliver(self._settings, event, f"{self._position.key_prefix}-{event.number}")
        if error is None:
            self.delivered_total += 1
            log.debug("hook_delivered", hook=self.name, event_number=event.number)
        else:
            self.failed_attempts_total += 1
            log.warning("hook_attempt_failed", hook=self.name, event_number=event.number, reason=error)
        return error

    async def _bury(self, event: Event, position: HookPosition, now: float) -> None:
        """The dead letter, the event that tells of it, and the position behind it, in one commit."""
        letter = DeadLetter(event.number, position.attempts, position.error, now)
        notice = failure_event(self.name, event, position.attempts, position.error, now)
        operations: list[Operation] = [Put(letter_key(self.name, event.number), pack_letter(letter))]
        kept = await self._patiently(
            lambda: self._store.read(*prefix_range(letters_prefix(self.name)), limit=DEAD_LETTERS_MAX)
        )
        if len(kept) == DEAD_LETTERS_MAX:
            log.warning("hook_dead_letter_dropped", hook=self.name, key=kept[0].key)
            operations.append(Delete(kept[0].key))
        await self._record(passed(position, event.number), operations, [notice] if notice else [])
        self.dead_letters_total += 1
        log.error(
            "hook_gave_up",
            hook=self.name,
            event_number=event.number,
            attempts=position.attempts,
            reason=position.error,
        )

    async def _record(
        self, position: HookPosition, operations: Sequence[Operation] = (), events: Sequence[Event] = ()
    ) -> None:
        """Write the position and what goes with it, also when the store must be waited for.

        Raises ConflictError when another runner has moved the position.
        """
        own = Put(position_key(self.name), pack_position(position))

        async def commit() -> int:
            while True:
                appending, unmoved = await append_events(self._store, events, self._proxy_id)
                try:
                    return await self._store.commit(
                        [own, *operations, *appending], [Expect(own.key, self._revision), *unmoved]
                    )
                except ConflictError as conflict:
                    if conflict.key != EVENT_HEAD:
                        raise

        self._revision = await self._patiently(commit)
        self._position, self._recorded_number = position, position.number

    async def _patiently(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """What ``ask`` returns once the store is there: what was delivered must not be so again for its absence."""
        while True:
            try:
                answer = await ask()
            except StoreUnavailableError as error:
                self._note_trouble("events", error)
                await trio.sleep(PAUSE_SECONDS)
            else:
                self._troubles.pop("events", None)
                return answer

    # -- dead letters

    async def _follow_letters(self) -> None:
        """Retry those for which an operator asks, one attempt each."""
        prefix = letters_prefix(self.name)
        while True:
            revision = await self._store.revision()  # before the look: what comes after it, the watch sees
            entries = await self._store.read(*prefix_range(prefix), limit=DEAD_LETTERS_MAX)
            self._letter_count = len(entries)
            self._troubles.pop("dead letters", None)
            for entry in entries:
                letter = unpack_letter(entry)
                if letter.retry_asked_at is not None:
                    await self._retry(entry, letter)
            try:
                await self._store.watch(prefix, revision).next_batch()
            except CompactedError:
                continue  # look again

    async def _retry(self, entry: Entry, letter: DeadLetter) -> None:
        """Raises StoreError, also when the dead letter changed meanwhile."""
        stored = await self._store.get(numbered(EVENTS, letter.number))
        if stored is None:
            error: str | None = "the event is no longer kept"
        else:
            error = await self._attempt(unpack_event(letter.number, stored.value))
        outcome: Operation = Delete(entry.key)
        if error is not None:
            after = replace(
                letter, attempts=letter.attempts + 1, error=error, at=self._now(), retry_asked_at=None
            )
            outcome = Put(entry.key, pack_letter(after))
        await self._store.commit([outcome], [Expect(entry.key, entry.revision)])


def _family(name: str, help_: str, kind: MetricType) -> Family:
    return Family(f"steadyread_{name}", help_, kind, ("hook",))


DELIVERED = _family("hook_delivered_total", "Events that hooks delivered.", MetricType.COUNTER)
FAILED_ATTEMPTS = _family(
    "hook_failed_attempts_total", "Attempts to deliver an event that failed.", MetricType.COUNTER
)
DEAD_LETTERS = _family("hook_dead_letters_total", "Events that became dead letters.", MetricType.COUNTER)
FAILING = _family(
    "hook_failing", "1 while a hook's last attempt has failed, where hooks run.", MetricType.GAUGE
)
LETTERS_KEPT = _family(
    "hook_dead_letters_kept", "Dead letters that wait for an operator, where hooks run.", MetricType.GAUGE
)
