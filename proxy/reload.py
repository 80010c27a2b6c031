"""Reloads the settings while the proxy runs: asks their source again, puts the live ones into effect, records the act.

    source -> settings as given now -> changes -> adopt the live ones, all at once -> audit record and event

Invariants
- A source with any problem changes nothing: a reload is refused whole.
- Reloads take place one after the other, so the record has them in the order in which they took effect.
- A reload needs no store. One that could not be recorded is in effect nevertheless, and the log and its answer say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from proxy.log import get_logger
from proxy.settings import Settings
from proxy.settings.load import Problem, SettingsError
from proxy.settings.reload import Changed, applied, changes
from proxy.store.interface import StoreError, TopologyStore
from proxy.topology.audit import Act, Operator, commit_audited
from routing.timeline import Event, EventKind, Plain

RECORD_SECONDS = 3.0  # for the store; the answer of a POST must come before the admin port's deadline
SIGNAL = Operator("signal", "SIGHUP")

Source = Callable[[], Settings]  # what is given now; raises SettingsError. It reads files: called in a thread

log = get_logger(__name__)


class ReloadRefusedError(Exception):
    """Nothing was changed. The text says why; ``problems`` is all that is wrong with what the source gave."""

    def __init__(self, text: str, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(text)
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload did."""

    in_effect: tuple[Changed, ...]  # what changed
    needs_restart: tuple[Changed, ...]  # what differs in the source and is not live
    record_problem: str  # why it is not on record, or not known to be; empty: it is


class Reloadable(Protocol):
    """What has settings that can change: the proxy."""

    settings: Settings  # in effect

    def adopt(self, settings: Settings) -> None:
        """Go by ``settings`` from now on; only live ones differ. Synchronous, so between two turns."""


class Reloader:
    """Reloads the settings of one proxy. ``run`` must run for a signal to be followed."""

    def __init__(
        self,
        proxy: Reloadable,
        source: Source | None,
        store: TopologyStore,
        proxy_id: str,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``now`` gives Unix seconds."""
        self._proxy = proxy
        self._source = source
        self._store = store
        self._proxy_id = proxy_id
        self._now = now
        self._one_at_a_time = trio.Lock()
        self._wanted = trio.Event()

    def reload_soon(self) -> None:
        """For a signal: ``run`` reloads. Several at once become one reload, which begins after the last."""
        self._wanted.set()

    async def run(self) -> None:
        """Follow signals until cancelled. Raises nothing else: what goes wrong is in the log."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            try:
                await self.reload(SIGNAL)
            except ReloadRefusedError:
                pass  # it is in the log, and nobody waits for an answer
            except Exception:
                log.exception("reload_failed")  # a signal must not end the proxy

    async def reload(self, operator: Operator) -> Reloaded:
        """Reload once. Raises ReloadRefusedError. If cancelled, it may have been done, and recorded or not."""
        async with self._one_at_a_time:
            before = self._proxy.settings
            try:
                given = await self._ask_source()
            except ReloadRefusedError as error:
                log.error(
                    "reload_refused",
                    who=operator.who,
                    origin=operator.origin,
                    reason=error,
                    problems=list(error.problems),
                )
                raise
            differing = changes(before, given)
            self._proxy.adopt(applied(before, given))
            in_effect = tuple(changed for changed in differing if changed.is_live)
            needs_restart = tuple(changed for changed in differing if not changed.is_live)
            log.info(
                "settings_reloaded",
                who=operator.who,
                origin=operator.origin,
                changed=[f"{each.setting}: {each.before!r} -> {each.after!r}" for each in in_effect],
                needs_restart=[each.setting for each in needs_restart],
            )
            record_problem = await self._record(operator, in_effect, needs_restart)
            if record_problem:
                log.warning("reload_not_recorded", reason=record_problem)
            return Reloaded(in_effect, needs_restart, record_problem)

    async def _ask_source(self) -> Settings:
        if self._source is None:
            raise ReloadRefusedError(
                "this proxy was started with settings from within a program, which cannot be read again: "
                "restart it with the new ones"
            )
        try:
            return await trio.to_thread.run_sync(self._source, abandon_on_cancel=True)
        except SettingsError as error:
            count = len(error.problems)
            raise ReloadRefusedError(
                f"the settings have {count} problem{'s' if count > 1 else ''}, and nothing was changed",
                error.problems,
            ) from error

    async def _record(
        self, operator: Operator, in_effect: tuple[Changed, ...], needs_restart: tuple[Changed, ...]
    ) -> str:
        """Put the act and its event on record. Why that failed; empty if it did not."""
        before: dict[str, Plain] = {changed.setting: changed.before for changed in in_effect}
        after: dict[str, Plain] = {changed.setting: changed.after for changed in in_effect}
        restarts: list[Plain] = [changed.setting for changed in needs_restart]
        at = self._now()
        event = Event(
            EventKind.SETTINGS_RELOADED,
            at,
            _message(operator, in_effect, needs_restart),
            evidence={
                "before": before,
                "after": after,
                "needs_restart": restarts,
                "who": operator.who,
                "origin": operator.origin,
            },
        )
        try:
            with trio.fail_after(RECORD_SECONDS):
                await commit_audited(
                    self._store,
                    Act("settings", operator, at, before, after),
                    (),
                    events=[event],
                    seen_by=self._proxy_id,
                )
        except StoreError as error:
            return str(error)
        except trio.TooSlowError:
            return (
                f"the store {self._store.name} did not answer within {RECORD_SECONDS:g} s, "
                "so whether it was recorded is not known"
            )
        return ""


def _message(operator: Operator, in_effect: tuple[Changed, ...], needs_restart: tuple[Changed, ...]) -> str:
    """One sentence for people."""
    names = ", ".join(changed.setting for changed in in_effect) or "nothing"
    message = f"{operator.who} reloaded the settings of one proxy: {names} changed"
    if needs_restart:
        message += f"; a restart is needed for {', '.join(changed.setting for changed in needs_restart)}"
    return message
