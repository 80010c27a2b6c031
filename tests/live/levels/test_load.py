"""The load finds planted faults: shown on a store in memory that commits them, in virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from proxy.embedded.connection import Argument, ConnectionLost, ServerError
from routing.levels import Level
from tests.live.levels.campaign import LEVELS
from tests.live.levels.checks import Fault, keys_in, value_of
from tests.live.levels.load import Group, Load, LoadOptions, Tally, now
from tests.live.levels.targets import ReadCounts

SECONDS = 3.0
OPTIONS = LoadOptions(
    writers=2, write_rate=100.0, readers=4, pipelined=1, read_rate=200.0, sessions=3, seed=1
)
HALF_WAY_SECONDS = 0.0002


@dataclass
class Store:
    """Two doors to one dictionary that remembers when each value was written. ``spoil`` may replace a reply to GET."""

    doors = 2
    has_levels = True
    spoil: Callable[[Visit, bytes, Any], Any] = lambda visit, key, reply: reply
    history: dict[bytes, list[tuple[float, bytes]]] = field(default_factory=dict)
    gets: int = 0

    async def open(self, door: int, level: Sequence[Argument] = ()) -> Visit:
        return Visit(self, door, tuple(level))

    async def reads(self, level: Level) -> ReadCounts | None:
        return None

    def as_of(self, key: bytes, age_seconds: float) -> bytes:
        """The key's value some time ago, or its first one."""
        then = trio.current_time() - age_seconds
        values = self.history[key]
        return next((value for at, value in reversed(values) if at <= then), values[0][1])


@dataclass(eq=False)
class Visit:
    store: Store
    door: int
    level: tuple[Argument, ...]

    async def call_all(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        await trio.sleep(HALF_WAY_SECONDS)
        replies = [self._answer(*command) for command in commands]
        await trio.sleep(HALF_WAY_SECONDS)
        for reply in replies:
            if isinstance(reply, ConnectionLost):
                raise reply
        return replies

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def _answer(self, name: Argument, *parts: Any) -> Any:
        store = self.store
        if name == "SET":
            store.history.setdefault(parts[0], []).append((trio.current_time(), parts[1]))
            return b"OK"
        if name == "GET":
            store.gets += 1
            return store.spoil(self, parts[0], store.as_of(parts[0], 0))
        assert name == "STEADY.TOKEN"
        return b"token"


async def seen(level: Level, spoil: Callable[[Visit, bytes, Any], Any] | None = None) -> Tally:
    """What readers of this level see of a store, spoiled or not."""
    store = Store() if spoil is None else Store(spoil)
    keys = keys_in((0, 7000), 10)
    for key in keys:
        store.history[key.name] = [(trio.current_time(), value_of(key, 0, now()))]
    group = Group(level.value, level, store)
    load = Load(keys, store, [group], OPTIONS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        await trio.sleep(SECONDS)
        load.finish()
    [tally] = load.enter_phase()
    assert tally.reads > 100
    assert tally.writes > 100
    return tally


def old(age_seconds: float, one_in: int = 10) -> Callable[[Visit, bytes, Any], Any]:
    """One in so many reads is answered by somebody who lags so far."""
    return lambda visit, key, reply: (
        reply if visit.store.gets % one_in else visit.store.as_of(key, age_seconds)
    )


def instead(given: Any) -> Callable[[Visit, bytes, Any], Any]:
    return lambda visit, key, reply: reply if visit.store.gets % 10 else given


def forgetful(visit: Visit, key: bytes, reply: Any) -> Any:
    """A proxy that takes a token and does not heed it."""
    return visit.store.as_of(key, 0.5) if len(visit.level) > 1 else reply


def forgetful_elsewhere(visit: Visit, key: bytes, reply: Any) -> Any:
    """So does only one proxy of two."""
    return forgetful(visit, key, reply) if visit.door else reply


async def test_a_store_that_keeps_all_promises(autojump_clock: trio.testing.MockClock) -> None:
    """No fault where there is none, at any level; and sessions do come back, at the same proxy and at the other."""
    for level in LEVELS:
        tally = await seen(level)
        assert tally.faults == Counter(), (level, tally.examples)
        assert tally.age_when_sent_max == 0
        if level is Level.SESSION:
            assert 0 < tally.door_changes < tally.reconnects


@pytest.mark.parametrize(
    ("level", "spoil", "fault"),
    [
        (Level.STRONG, old(0.5), Fault.STALE),
        (Level.CAUGHT_UP, old(0.5), Fault.STALE),
        (Level.BOUNDED_STALENESS, old(1.5), Fault.OVER_BOUND),
        (Level.SESSION, forgetful, Fault.OWN_MISSED),
        (Level.SESSION, forgetful_elsewhere, Fault.OWN_MISSED),
        (Level.EVENTUAL, instead(None), Fault.NIL),
        (Level.SESSION, instead(None), Fault.NIL),
        (Level.CAUGHT_UP, instead(b"another's"), Fault.WRONG),
        (Level.CAUGHT_UP, instead(ServerError("ERR planted")), Fault.ERROR),
        (Level.SESSION, instead(ConnectionLost("planted")), Fault.ERROR),
    ],
)
async def test_a_planted_fault_is_named(
    level: Level,
    spoil: Callable[[Visit, bytes, Any], Any],
    fault: Fault,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each by its own name; a session that misses its own writes also goes back behind what it has read."""
    tally = await seen(level, spoil)
    assert tally.faults[fault] > 3
    assert set(tally.faults) <= {fault, *([Fault.WENT_BACK] if fault is Fault.OWN_MISSED else [])}, (
        tally.examples
    )


async def test_a_session_that_goes_back(autojump_clock: trio.testing.MockClock) -> None:
    """Older than what it read, and newer than what it wrote: its own writes are all seen, others' are not."""
    tally = await seen(Level.SESSION, old(0.5, one_in=3))
    assert tally.faults[Fault.WENT_BACK] > 3


@pytest.mark.parametrize(("level", "age_seconds"), [(Level.BOUNDED_STALENESS, 0.9), (Level.EVENTUAL, 3.0)])
async def test_what_a_level_allows_is_no_fault(
    level: Level, age_seconds: float, autojump_clock: trio.testing.MockClock
) -> None:
    """Old replies within the bound, and any at `eventual`; how old they were is told."""
    tally = await seen(level, old(age_seconds))
    assert tally.faults == Counter(), tally.examples
    assert 0.5e9 < tally.age_when_sent_max <= tally.age_when_answered_max < age_seconds * 1e9 + 1e6
