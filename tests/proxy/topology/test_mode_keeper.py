"""The routing mode follows the store, survives without it, and is never set over someone else's choice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from proxy.store.interface import Batch, CompactedError, Delete, Put, StoreUnavailableError, TopologyStore
from proxy.store.memory import MemoryStore
from proxy.store.records import EVENTS, MODE, ModeRecord, pack, pack_mode, unpack_event
from proxy.topology.audit import Operator, read_page
from proxy.topology.mode import (
    UNSET,
    ModeConflictError,
    ModeKeeper,
    ModeNotNowError,
    ModeRefusedError,
    ModeState,
)
from routing.audit import AuditRecord, verify
from routing.levels import Level
from routing.timeline import Event
from tests.proxy.failing_store import FailingStore

ALL = frozenset(Level)
ANNA = Operator("anna", "10.0.0.7:4711")
AT = 1_800_000_000.0


def keeper_of(
    store: TopologyStore,
    on_change: Callable[[Level], None] = lambda mode: None,
    routed: frozenset[Level] = ALL,
) -> ModeKeeper:
    return ModeKeeper(store, "p1", on_change, routed=routed, current_snapshot=lambda: 7, now=lambda: AT)


class CompactedStore(MemoryStore):
    """Its watches find twice that the log no longer reaches back so far."""

    compactions_left = 2

    def changes_after(self, prefix: str, after: int) -> Batch:
        if self.compactions_left:
            self.compactions_left -= 1
            raise CompactedError(after, after + 1)
        return super().changes_after(prefix, after)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)


async def events_of(store: TopologyStore) -> list[Event]:
    entries = await store.read(EVENTS, EVENTS + "z", limit=1000)
    return [unpack_event(number, entry.value) for number, entry in enumerate(entries, 1)]


async def test_setting_is_in_effect_at_once_and_is_an_event_and_a_record() -> None:
    store, heard = MemoryStore(), list[Level]()
    keeper = keeper_of(store, heard.append)
    assert (keeper.current, keeper.given) == (UNSET, Level.STRONG)
    first = await keeper.set(Level.SESSION, 0, ANNA)
    assert first == keeper.current == ModeState(Level.SESSION, 1, AT, "anna")
    assert heard == [Level.SESSION]
    second = await keeper.set(Level.STRONG, first.revision, ANNA)
    assert heard == [Level.SESSION, Level.STRONG]
    page = await read_page(store, 1, 10)
    assert verify(page.records, page.head) == ()
    assert [(record.before, record.after) for record in page.records if isinstance(record, AuditRecord)] == [
        ({"mode": "strong", "revision": 0}, {"mode": "session"}),
        ({"mode": "session", "revision": 1}, {"mode": "strong"}),
    ]
    assert [(event.kind.value, event.message, event.seen_by) for event in await events_of(store)] == [
        ("mode_changed", "anna set the routing mode to session; it was strong", "p1"),
        ("mode_changed", "anna set the routing mode to strong; it was session", "p1"),
    ]
    assert (await store.get(MODE)).revision == second.revision  # type: ignore[union-attr]


async def test_every_proxy_of_the_store_follows(autojump_clock: trio.testing.MockClock) -> None:
    store, heard = MemoryStore(), list[Level]()
    here, there = keeper_of(store), keeper_of(store, heard.append)
    await here.set(Level.SESSION, 0, ANNA)
    async with trio.open_nursery() as nursery:
        await nursery.start(there.run)
        assert there.current == here.current  # what was set before it began
        await store.commit([Put("mode-of-something-else", b"")])
        await here.set(Level.EVENTUAL, here.current.revision, ANNA)
        await until(lambda: there.current == here.current)
        await store.commit([Delete(MODE)])
        await until(lambda: there.current == UNSET)
        nursery.cancel_scope.cancel()
    assert heard == [Level.SESSION, Level.EVENTUAL, Level.STRONG]


async def test_exactly_one_of_those_who_set_at_once_wins_each_revision() -> None:
    """Through two proxies of one store, and each loser is told what the winner chose."""
    store = MemoryStore()
    keepers = [keeper_of(store), keeper_of(store)]
    revision, winners = 0, 0
    for _ in range(5):
        won: list[ModeState] = []
        lost: list[ModeState] = []

        async def try_one(
            index: int, revision: int = revision, won: list[ModeState] = won, lost: list[ModeState] = lost
        ) -> None:
            mode = list(Level)[index % len(Level)]
            try:
                won.append(await keepers[index % 2].set(mode, revision, Operator(f"operator-{index}", "")))
            except ModeConflictError as error:
                lost.append(error.current)

        async with trio.open_nursery() as nursery:
            for index in range(8):
                nursery.start_soon(try_one, index)
        assert (len(won), lost) == (1, won * 7)
        revision, winners = won[0].revision, winners + 1
    page = await read_page(store, 1, 100)
    assert len(page.records) == len(await events_of(store)) == winners == 5
    assert verify(page.records, page.head) == ()


async def test_a_revision_that_is_past_sets_nothing_and_says_what_is() -> None:
    store = MemoryStore()
    keeper = keeper_of(store)
    state = await keeper.set(Level.SESSION, 0, ANNA)
    for wrong in (0, state.revision + 1):
        with pytest.raises(ModeConflictError, match=f"at revision 1, and not at {wrong}") as raised:
            await keeper.set(Level.STRONG, wrong, ANNA)
        assert raised.value.current == state
    assert len((await read_page(store, 1, 10)).records) == 1


async def test_a_mode_that_does_not_route_is_refused_and_leaves_nothing() -> None:
    """Promise 9."""
    store = MemoryStore()
    keeper = keeper_of(store, routed=frozenset({Level.STRONG}))
    with pytest.raises(ModeRefusedError, match="session comes with its level"):
        await keeper.set(Level.SESSION, 0, ANNA)
    assert await store.revision() == 0
    keeper = keeper_of(store)
    for revision, mode in enumerate(Level):
        assert (await keeper.set(mode, revision, ANNA)).revision == revision + 1


async def test_mode_snapshot_wants_one_that_serves_and_is_a_problem_without() -> None:
    """Promise 9. A past revision is told first: who set the mode meanwhile had a reason."""
    store, current = MemoryStore(), list[int]()
    keeper = ModeKeeper(store, "p1", current_snapshot=lambda: current[0] if current else None)
    with pytest.raises(ModeNotNowError, match="no snapshot serves"):
        await keeper.set(Level.SNAPSHOT, 0, ANNA)
    assert await store.revision() == 0
    with pytest.raises(ModeConflictError):
        await keeper.set(Level.SNAPSHOT, 3, ANNA)
    current.append(7)
    await keeper.set(Level.SNAPSHOT, 0, ANNA)
    assert (keeper.given, keeper.problems()) == (Level.SNAPSHOT, [])
    current.clear()
    assert [problem.partition(",")[0] for problem in keeper.problems()] == [
        "the routing mode is snapshot and no snapshot serves"
    ]


async def test_without_the_store_the_last_mode_serves_on(autojump_clock: trio.testing.MockClock) -> None:
    """Promise 8. What was missed is caught up with; and nothing can be set meanwhile."""
    store, heard = FailingStore(), list[Level]()
    keeper = keeper_of(store, heard.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        await keeper.set(Level.SESSION, 0, ANNA)
        store.go_down()
        await until(lambda: bool(keeper.problems()))
        assert keeper.problems() == ["the routing mode may have changed unseen: the disk is full"]
        with pytest.raises(StoreUnavailableError):
            await keeper.set(Level.STRONG, keeper.current.revision, ANNA)
        assert keeper.given is Level.SESSION
        store.is_down = False
        await keeper_of(store).set(Level.EVENTUAL, keeper.current.revision, ANNA)
        await until(lambda: keeper.given is Level.EVENTUAL)
        assert keeper.problems() == []
        nursery.cancel_scope.cancel()
    assert heard == [Level.SESSION, Level.EVENTUAL]


async def test_it_starts_without_a_store(autojump_clock: trio.testing.MockClock) -> None:
    """Promise 8: a proxy that starts while the store is out of reach serves, with the strongest mode."""
    store = FailingStore()
    store.is_down = True
    keeper = keeper_of(store)
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        assert keeper.given is Level.STRONG
        assert len(keeper.problems()) == 1
        store.is_down = False
        await until(lambda: not keeper.problems())
        nursery.cancel_scope.cancel()


async def test_a_damaged_or_unknown_mode_changes_nothing_and_is_a_problem(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store = MemoryStore()
    keeper = keeper_of(store)
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        await keeper.set(Level.SESSION, 0, ANNA)
        for value in (b"\xc1", pack(["telepathic", AT, "anna"]), pack(7)):
            await store.commit([Put(MODE, value)])
            await until(lambda: bool(keeper.problems()))
            assert "the routing mode stays session: the store's mode is damaged" in keeper.problems()[0]
            await store.commit([Put(MODE, pack_mode(ModeRecord(Level.SESSION, AT, "bob")))])
            await until(lambda: not keeper.problems())
        nursery.cancel_scope.cancel()


async def test_a_mode_that_only_a_newer_proxy_routes_gives_strong_and_is_a_problem() -> None:
    """Promises 2 and 9: never weaker than chosen, and never silently something else."""
    store, heard = MemoryStore(), list[Level]()
    await keeper_of(store).set(Level.CAUGHT_UP, 0, ANNA)
    keeper = keeper_of(store, heard.append, frozenset({Level.STRONG}))
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        nursery.cancel_scope.cancel()
    assert (keeper.current.mode, keeper.given, heard) == (Level.CAUGHT_UP, Level.STRONG, [])
    assert keeper.problems() == [
        "the routing mode is caught_up, and reads get strong: "
        "caught_up comes with its level; this version routes strong only"
    ]


async def test_a_watch_whose_past_was_compacted_begins_anew() -> None:
    """At once, and it is no problem: what was forgotten had been replaced."""
    store = CompactedStore()
    keeper = keeper_of(store)
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        with trio.fail_after(5):
            while store.compactions_left:
                await trio.lowlevel.checkpoint()
                assert keeper.problems() == []
        await keeper_of(store).set(Level.SESSION, 0, ANNA)
        await until(lambda: keeper.given is Level.SESSION)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_ahead", [False, True])
async def test_a_store_that_was_set_back_is_believed(
    is_ahead: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Restored from a backup, or another one: its mode is the mode, whatever its revisions are."""
    store = FailingStore()
    keeper = keeper_of(store)
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        for mode in (Level.SESSION, Level.EVENTUAL):
            await keeper.set(mode, keeper.current.revision, ANNA)
        store.go_down()
        await until(lambda: bool(keeper.problems()))
        older = FailingStore()
        await keeper_of(older).set(Level.SNAPSHOT, 0, ANNA)
        for _ in range(9 * is_ahead):
            await older.commit([Put("x", b"")])
        store.become(older)
        await until(lambda: keeper.given is Level.SNAPSHOT)
        nursery.cancel_scope.cancel()
