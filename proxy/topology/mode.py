"""The routing mode as this proxy has it: follows the store, and sets it for the whole fleet.

The store says what the mode is. ``run`` follows it; between two turns of the data plane ``on_change`` hears of it.
A mode once known stays until the store says otherwise: without the store the last one serves on. ``set`` compares
and sets, so that two operators never overwrite each other's choice unseen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from proxy.log import get_logger
from proxy.store.interface import (
    ABSENT,
    CompactedError,
    ConflictError,
    Expect,
    Put,
    StoreError,
    StoreRefusedError,
    TopologyStore,
)
from proxy.store.records import MODE, ModeRecord, pack_mode, unpack_mode
from proxy.topology.audit import Act, Operator, commit_audited
from routing.levels import Level
from routing.mode import DEFAULT_MODE, ROUTED_MODES, given_mode, problem_now, refusal_now, refusal_of
from routing.timeline import Event, EventKind

RETRY_SECONDS = 0.5  # between two attempts to read a store that fails

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModeState:
    """The mode that was chosen. ``revision`` is what a change of it must name."""

    mode: Level = DEFAULT_MODE
    revision: int = ABSENT  # of the store's entry; ABSENT: nobody has chosen yet
    at: float | None = None  # Unix seconds
    who: str = ""


UNSET = ModeState()


class ModeRefusedError(Exception):
    """This version does not route that mode. The text says so."""


class ModeNotNowError(ModeRefusedError):
    """The mode cannot be chosen at this moment. The text says why, and what to do first."""


class ModeConflictError(Exception):
    """The mode is not at the revision that the change named; nothing was changed."""

    def __init__(self, asked: int, current: ModeState) -> None:
        super().__init__(f"the mode is at revision {current.revision}, and not at {asked}")
        self.current = current


class ModeKeeper:
    """The mode of one proxy. ``on_change`` is called with the mode that reads of level ``auto`` get from then on.

    ``current_snapshot``: the newest snapshot that serves; None: none does.
    """

    def __init__(
        self,
        store: TopologyStore,
        seen_by: str,
        on_change: Callable[[Level], None] = lambda mode: None,
        *,
        routed: frozenset[Level] = ROUTED_MODES,
        current_snapshot: Callable[[], int | None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._seen_by = seen_by
        self._on_change = on_change
        self._current_snapshot = current_snapshot
        self._now = now
        self._seen_revision = 0  # of the newest change of the entry that is known, its deletion too
        self._out_of_reach = ""  # why the store cannot be followed
        self._damage = ""  # why what it says cannot be used
        self.routed = routed
        self.current = UNSET

    @property
    def given(self) -> Level:
        """What reads of level ``auto`` get here: the chosen mode, or the default if this version does not route it."""
        return given_mode(self.current.mode, self.routed)

    def problems(self) -> list[str]:
        """What an operator should know, one sentence each."""
        found = []
        if self._out_of_reach:
            found.append(f"the routing mode may have changed unseen: {self._out_of_reach}")
        if self._damage:
            found.append(f"the routing mode stays {self.current.mode.value}: {self._damage}")
        refusal = refusal_of(self.current.mode, self.routed)
        if refusal is not None:
            found.append(
                f"the routing mode is {self.current.mode.value}, and reads get {self.given.value}: {refusal}"
            )
        problem = problem_now(self.given, self._current_snapshot())
        if problem is not None:
            found.append(problem)
        return found

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the store until cancelled; started once it was asked. Raises nothing: see ``problems``."""
        try:
            await self._read()
        except StoreError as error:
            self._lose(error)
        task_status.started()
        while True:
            try:
                await self._follow(await self._read())
            except CompactedError:
                continue  # what is missing was replaced, and only the newest matters: read it again
            except StoreError as error:
                self._lose(error)
                await trio.sleep(RETRY_SECONDS)

    async def set(self, mode: Level, revision: int, operator: Operator) -> ModeState:
        """Choose ``mode`` for all proxies of the store, if the current one still has ``revision``; the new state.

        It is in effect here when this returns. Raises ModeRefusedError, ModeNotNowError, ModeConflictError,
        StoreUnavailableError, StoreRefusedError. If cancelled, it may have been done.
        """
        refusal = refusal_of(mode, self.routed)
        if refusal is not None:
            raise ModeRefusedError(refusal)
        before = await self._stored()
        if before.revision != revision:
            raise ModeConflictError(revision, before)
        refusal = refusal_now(mode, self._current_snapshot())
        if refusal is not None:
            raise ModeNotNowError(refusal)
        record = ModeRecord(mode, self._now(), operator.who)
        event = Event(
            EventKind.MODE_CHANGED,
            record.at,
            f"{operator.who} set the routing mode to {mode.value}; it was {before.mode.value}",
            evidence={
                "before": before.mode.value,
                "after": mode.value,
                "who": operator.who,
                "origin": operator.origin,
            },
        )
        try:
            new_revision = await commit_audited(
                self._store,
                Act(
                    "mode",
                    operator,
                    record.at,
                    before={"mode": before.mode.value, "revision": before.revision},
                    after={"mode": mode.value},
                ),
                [Put(MODE, pack_mode(record))],
                [Expect(MODE, revision)],
                events=[event],
                seen_by=self._seen_by,
            )
        except ConflictError as conflict:
            raise ModeConflictError(revision, await self._stored()) from conflict
        state = ModeState(mode, new_revision, record.at, operator.who)
        self._adopt(state, new_revision)
        return state

    async def _read(self) -> int:
        """Take over what the store says now; the revision to watch from."""
        after = await self._store.revision()
        known = self._seen_revision
        entry = await self._store.get(MODE)
        if self._seen_revision == known:  # else it was set here meanwhile, and the watch tells what follows
            self._seen_revision = 0  # what the store says counts, also if it is another one than before
            if entry is None:
                self._adopt(UNSET, after)
            else:
                self._adopt_value(entry.value, entry.revision)
        if self._out_of_reach:
            log.info("mode_followed_again")
            self._out_of_reach = ""
        return after

    async def _follow(self, after: int) -> None:
        watch = self._store.watch(MODE, after)
        while True:
            batch = await watch.next_batch()
            for change in batch.changes:
                if change.key != MODE:
                    continue
                if change.value is None:
                    self._adopt(UNSET, change.revision)
                else:
                    self._adopt_value(change.value, change.revision)

    def _lose(self, error: StoreError) -> None:
        if not self._out_of_reach:
            log.warning("mode_not_followed", reason=error)
        self._out_of_reach = str(error)

    async def _stored(self) -> ModeState:
        entry = await self._store.get(MODE)
        return UNSET if entry is None else _state_of(entry.value, entry.revision)

    def _adopt_value(self, value: bytes, revision: int) -> None:
        try:
            self._adopt(_state_of(value, revision), revision)
        except StoreRefusedError as error:
            log.error("mode_damaged", reason=error)
            self._damage = str(error)

    def _adopt(self, state: ModeState, revision: int) -> None:
        """Synchronous, so between two turns. An older state than the known one changes nothing."""
        if revision < self._seen_revision:
            return
        self._seen_revision = revision
        self._damage = ""
        if state == self.current:
            return
        given = self.given
        self.current = state
        log.info("mode_changed", mode=state.mode, revision=state.revision, who=state.who)
        if self.given is not given:
            self._on_change(self.given)


def _state_of(value: bytes, revision: int) -> ModeState:
    record = unpack_mode(value)
    return ModeState(record.mode, revision, record.at, record.who)
