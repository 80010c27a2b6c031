"""An explanation names who answers a read, and why nobody else does, by the proof that reads need (promises 1, 2, 9).

The fake nodes answer every question for their offset as the test has set them up, and none may ever see the read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock

from proxy.exchange.explain import explain
from proxy.exchange.sessions import LOST, Session
from proxy.protocol.encode import command as encoded
from proxy.protocol.replies import decode
from proxy.replicas.service import Replica, ReplicaOptions, ShardReplicas
from proxy.settings import HotSettings
from routing import explain as words
from routing.explain import CandidateFacts, ExplainError, Explanation, Preference, as_json
from routing.levels import STRONG, Level, LevelChoice, PrefixRule, ReadLevel
from routing.mode import NO_SNAPSHOT
from routing.offsets import NO_POINT, Point, Sample
from routing.promotion import Stage
from routing.slot import slot_of
from tests.proxy.exchange.test_replica_reads import INFO, X, Y, primary, replica
from tests.proxy.snapshot_desk import ABORTED, CLOSED, PlainDesk, facts_of
from tests.proxy.world import DEADLINE_SECONDS, Client, FakeNode, World, keys_of, world_of

CAUGHT_UP = ReadLevel(Level.CAUGHT_UP)
BOUNDED = ReadLevel(Level.BOUNDED_STALENESS, 0.5)
SESSION = ReadLevel(Level.SESSION)
EVENTUAL = ReadLevel(Level.EVENTUAL)

Result = TypeVar("Result")


class Scene:
    """The first shard: its primary and two readable replicas, who answer with ``told``; None: not at all."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.primary: FakeNode = world.nodes[0]
        self.first, self.second = world.replica_nodes[:2]
        self.key, self.other = keys_of(world, 0, 2)
        self.slot = slot_of(self.key)
        self.told: dict[FakeNode, bytes | None] = {
            self.primary: primary(100),
            self.first: replica(100),
            self.second: replica(100),
        }
        for one in world.replicas.replicas():
            one.set_stage(Stage.READABLE)

    @property
    def shard(self) -> ShardReplicas:
        return self.world.replicas.shards()[0]

    @property
    def replicas(self) -> Sequence[Replica]:
        return self.shard.replicas

    def sampled(self, seconds_ago: float, offset: int = 100) -> None:
        """The primary had told its offset."""
        self.shard.note(Sample(True, Point(X, offset), NO_POINT), trio.current_time() - seconds_ago)

    async def lose(self, node: FakeNode) -> None:
        """The node is gone for good."""
        node.accepts = False
        node.lose()
        await self.world.settle()

    def answer(self) -> bool:
        """Let the nodes answer what has come; whether anything had."""
        found = False
        for node, told in self.told.items():
            if told is not None:
                requests = node.take()
                assert requests == [INFO] * len(requests)  # and never the read
                node.reply(*[told] * len(requests))
                found = found or bool(requests)
        return found

    async def while_nodes_answer(self, work: Callable[[], Awaitable[Result]]) -> Result:
        results: list[Result] = []

        async def run() -> None:
            results.append(await work())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            while not results:
                await self.world.settle()
                if not self.answer() and not results:
                    await trio.sleep(0.05)
        return results[0]

    async def explain(
        self,
        level: ReadLevel,
        *read: bytes,
        session: Session | None = None,
        choice: LevelChoice | None = None,
        is_question: bool = False,
        resp: int = 2,
    ) -> Explanation:
        choice = choice or LevelChoice(level, (), None, STRONG)
        read = read or (b"GET", self.key)

        async def work() -> Explanation:
            deadline = trio.current_time() + DEADLINE_SECONDS
            return await explain(
                self.world.exchange, read, choice, session, deadline, resp=resp, is_question=is_question
            )

        return await self.while_nodes_answer(work)

    def row(self, explanation: Explanation, node: FakeNode) -> CandidateFacts:
        return next(candidate for candidate in explanation.candidates if candidate.address == node.address)

    def why(self, explanation: Explanation) -> list[str]:
        """Of the primary and the two replicas."""
        nodes = (self.primary, self.first, self.second)
        return [self.row(explanation, node).why for node in nodes]

    def assert_by(self, explanation: Explanation, node: FakeNode | None, given: Level | None) -> None:
        """Exactly ``node`` is chosen; with None the client gets an error."""
        assert explanation.served_by == (None if node is None else node.address)
        assert explanation.given is given
        chosen = [candidate.address for candidate in explanation.candidates if candidate.is_chosen]
        assert chosen == ([] if node is None else [node.address])
        assert bool(explanation.refusal) is (node is None)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with world_of(2, replicas=2) as world:
        yield Scene(world)


# -- given by a replica


async def test_caught_up_is_given_by_a_replica_that_has_reached_the_floor(
    autojump_clock: MockClock, scene: Scene
) -> None:
    found = await scene.explain(CAUGHT_UP)
    scene.assert_by(found, scene.first, Level.CAUGHT_UP)
    assert scene.why(found) == [
        words.OWNER_NOT_NEEDED,
        words.CHOSEN,
        words.passed_over(Preference.FIRST),
    ]
    assert (found.floor, found.slot, found.slot_state) == (Point(X, 100), scene.slot, words.SETTLED)
    assert (found.owner, found.role, found.because) == (
        scene.primary.address,
        "replica",
        words.BY_CONNECTION,
    )
    assert scene.row(found, scene.first).stamp == Point(X, 100)
    assert found.staleness_seconds is not None
    assert 0 <= found.staleness_seconds < 0.1


async def test_bounded_staleness_asks_no_primary_and_says_how_old(
    autojump_clock: MockClock, scene: Scene
) -> None:
    scene.sampled(seconds_ago=0.3)
    scene.told[scene.primary] = None
    found = await scene.explain(BOUNDED)
    scene.assert_by(found, scene.first, Level.BOUNDED_STALENESS)
    assert (found.floor, scene.primary.take()) == (None, [])
    assert found.staleness_seconds == pytest.approx(0.3, abs=0.1)


async def test_eventual_is_given_by_any_readable_replica_however_far_behind(
    autojump_clock: MockClock, scene: Scene
) -> None:
    scene.told[scene.first] = replica(1, Y)
    found = await scene.explain(EVENTUAL)
    scene.assert_by(found, scene.first, Level.EVENTUAL)
    assert found.staleness_seconds is None


async def test_why_another_is_preferred(autojump_clock: MockClock, scene: Scene) -> None:
    """As reads choose: the zone, then the replies owed, then the recent latency."""
    scene.replicas[0].latency_seconds, scene.replicas[1].latency_seconds = 0.5, 0.0
    found = await scene.explain(EVENTUAL)
    scene.assert_by(found, scene.second, Level.EVENTUAL)
    assert scene.why(found)[1] == words.passed_over(Preference.LATENCY)
    scene.replicas[1].in_zone = False
    found = await scene.explain(EVENTUAL)
    scene.assert_by(found, scene.first, Level.EVENTUAL)
    assert scene.why(found)[2] == words.passed_over(Preference.ZONE)


async def test_a_replica_that_owes_more_is_passed_over(autojump_clock: MockClock, scene: Scene) -> None:
    """On the connections for the client's RESP version, over which its reads go."""
    scene.world.replicas.use(3)
    while scene.replicas[0].connections[1] is None or scene.replicas[1].connections[1] is None:
        await scene.world.settle()
        await trio.sleep(0.01)
    scene.replicas[0].connections[1].start(encoded("PING"))
    assert scene.first.links[1].take() == [[b"PING"]]  # and is not answered
    found = await scene.explain(EVENTUAL, resp=3)
    scene.assert_by(found, scene.second, Level.EVENTUAL)
    assert scene.why(found)[1] == words.passed_over(Preference.OUTSTANDING)
    assert scene.row(found, scene.first).outstanding == 1
    scene.assert_by(await scene.explain(EVENTUAL), scene.first, Level.EVENTUAL)


# -- by why a replica is not chosen


def quarantine(scene: Scene) -> None:
    scene.replicas[0].set_stage(Stage.QUARANTINED)
    scene.replicas[0].mismatched = (b"cart:7",)


def still_joining(scene: Scene) -> None:
    scene.replicas[0].set_stage(Stage.CAUGHT_UP, "its keys are compared in 2 s")


def tell(answer: bytes | None) -> Callable[[Scene], None]:
    def change(scene: Scene) -> None:
        scene.told[scene.first] = answer

    return change


NOT_CHOSEN = [
    pytest.param(CAUGHT_UP, quarantine, words.quarantined([b"cart:7"]), id="quarantined"),
    pytest.param(
        CAUGHT_UP,
        still_joining,
        f"{words.not_readable('caught_up')} (its keys are compared in 2 s)",
        id="not_readable",
    ),
    pytest.param(CAUGHT_UP, tell(replica(40)), words.behind(60), id="behind"),
    pytest.param(CAUGHT_UP, tell(replica(900, Y)), words.OTHER_HISTORY, id="other_history"),
    pytest.param(CAUGHT_UP, tell(replica(900, syncing=1)), words.not_readable("syncing"), id="syncing"),
    pytest.param(CAUGHT_UP, tell(None), words.timed_out(DEADLINE_SECONDS), id="timed_out"),
    pytest.param(
        CAUGHT_UP,
        tell(b"-LOADING in memory\r\n"),
        words.no_stamp("no INFO replication: b'-LOADING in memory\\r\\n'"),
        id="no_stamp",
    ),
    pytest.param(BOUNDED, tell(replica(60)), words.too_old(2.0, 0.5), id="too_old"),
    pytest.param(BOUNDED, tell(replica(10)), words.NOTHING_PROVED, id="nothing_proved"),
    pytest.param(BOUNDED, tell(replica(900, Y)), words.OTHER_HISTORY, id="other_history_bounded"),
    pytest.param(BOUNDED, tell(replica(900, syncing=1)), words.not_readable("syncing"), id="syncing_bounded"),
    pytest.param(EVENTUAL, quarantine, words.quarantined([b"cart:7"]), id="quarantined_eventual"),
    pytest.param(EVENTUAL, tell(None), words.timed_out(DEADLINE_SECONDS), id="timed_out_eventual"),
]


@pytest.mark.parametrize(("level", "change", "reason"), NOT_CHOSEN)
async def test_why_a_replica_is_not_chosen_and_the_other_is(
    autojump_clock: MockClock, scene: Scene, level: ReadLevel, change: Callable[[Scene], None], reason: str
) -> None:
    scene.sampled(seconds_ago=2.0, offset=50)
    scene.sampled(seconds_ago=0.1)
    change(scene)
    found = await scene.explain(level)
    scene.assert_by(found, scene.second, level.level)
    assert scene.why(found)[1:] == [reason, words.CHOSEN]
    if reason == words.not_readable("syncing"):
        assert scene.row(found, scene.first).staleness_seconds is None


async def test_a_replica_without_a_connection(autojump_clock: MockClock, scene: Scene) -> None:
    await scene.lose(scene.first)
    found = await scene.explain(CAUGHT_UP)
    scene.assert_by(found, scene.second, Level.CAUGHT_UP)
    assert scene.why(found)[1].startswith(f"{words.NOT_CONNECTED}: ")


async def test_a_replica_that_was_behind_and_has_not_told_more_since(
    autojump_clock: MockClock, scene: Scene
) -> None:
    """A session's floor is older than what the primary is known to have: the stamp has to reach the latter."""
    session = Session(scene.world.replicas)
    assert session.on_floor(scene.shard, Sample(True, Point(X, 90), NO_POINT)) is None
    scene.sampled(seconds_ago=0.1)
    scene.replicas[0].missed = Point(scene.replicas[0].stamp.replid, 10**9)
    scene.told[scene.first] = replica(95)
    found = await scene.explain(SESSION, session=session)
    scene.assert_by(found, scene.second, Level.SESSION)
    assert scene.why(found)[1] == words.KNOWN_BEHIND


async def test_no_replica_proves_it_so_the_owner_answers(autojump_clock: MockClock, scene: Scene) -> None:
    scene.told[scene.first] = scene.told[scene.second] = replica(99)
    found = await scene.explain(CAUGHT_UP)
    scene.assert_by(found, scene.primary, Level.STRONG)
    assert scene.why(found) == [words.OWNER_PROVES, words.behind(1), words.behind(1)]
    assert (found.level, found.staleness_seconds) == (CAUGHT_UP, 0.0)


async def test_no_replica_can_be_asked_so_the_owner_answers(autojump_clock: MockClock, scene: Scene) -> None:
    await scene.lose(scene.first)
    await scene.lose(scene.second)
    found = await scene.explain(EVENTUAL)
    scene.assert_by(found, scene.primary, Level.STRONG)
    assert scene.why(found)[0] == words.OWNER_ASKED


async def test_a_shard_without_replicas(autojump_clock: MockClock) -> None:
    async with world_of(1, replicas=2) as world:
        scene = Scene(world)
        world.replicas_each = 0
        world.see()
        found = await scene.explain(EVENTUAL)
        scene.assert_by(found, scene.primary, Level.STRONG)
        assert [candidate.why for candidate in found.candidates] == [words.NO_REPLICA]


# -- what only its owner answers


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        ("GET {k}", words.LEVEL_STRONG),
        ("HSCAN {k} 0", words.HAS_CURSOR),
        ("EVAL_RO s 1 {k}", words.RUNS_SCRIPT),
        ("PFCOUNT {k}", words.MAY_WRITE),
        ("EXISTS {k} {k}", words.SEVERAL_KEYS),
        ("OBJECT ENCODING {k}", words.NOT_AT_REPLICAS),
    ],
)
async def test_what_replicas_are_never_asked_for(
    autojump_clock: MockClock, scene: Scene, read: str, reason: str
) -> None:
    level = STRONG if reason is words.LEVEL_STRONG else CAUGHT_UP
    found = await scene.explain(level, *read.format(k=scene.key.decode()).encode().split())
    scene.assert_by(found, scene.primary, Level.STRONG)
    assert scene.why(found) == [reason] * 3
    assert (scene.first.take(), found.level, found.floor) == ([], level, None)


async def test_a_slot_in_flux(autojump_clock: MockClock, scene: Scene) -> None:
    scene.world.migrations = {scene.slot: (0, 1)}
    scene.world.see()
    found = await scene.explain(CAUGHT_UP)
    scene.assert_by(found, scene.primary, Level.STRONG)
    assert found.slot_state == words.IN_FLUX
    assert scene.why(found) == [words.SLOT_IN_FLUX] * 3
    assert scene.row(found, scene.world.nodes[1]).why == words.MIGRATION_TARGET


async def test_a_slot_that_moved_lately(autojump_clock: MockClock, scene: Scene) -> None:
    scene.world.owners[scene.slot] = 1
    scene.world.see()
    scene.told[scene.world.nodes[1]] = primary(7)
    await trio.sleep(2.0)
    found = await scene.explain(EVENTUAL)
    scene.assert_by(found, scene.world.nodes[1], Level.STRONG)
    assert found.slot_state == words.MOVED
    assert {candidate.why for candidate in found.candidates} == {words.slot_moved(2.0, 5.0)}
    await trio.sleep(3.0)
    scene.world.replicas.settle(trio.current_time())
    for node in scene.world.replica_nodes[2:]:
        scene.told[node] = replica(7)
    assert (await scene.explain(EVENTUAL)).given is Level.EVENTUAL


async def test_a_slot_without_an_owner(autojump_clock: MockClock, scene: Scene) -> None:
    scene.world.owners[scene.slot] = -1
    scene.world.see()
    found = await scene.explain(EVENTUAL)
    assert (found.owner, found.candidates, found.slot_state) == (None, (), words.UNOWNED)
    assert found.refusal.startswith(f"NOTREADY slot {scene.slot} was not served within 5 s (no node serves")


# -- of a hot key


async def test_a_hot_key_is_explained_with_its_share(autojump_clock: MockClock, scene: Scene) -> None:
    hot = scene.world.exchange.hot
    hot.adopt(HotSettings(sample_every=1))
    client = scene.world.client()
    client.send(encoded(b"GET", scene.key) * 30 + encoded(b"GET", scene.other) * 4)
    scene.primary.reply(*[b"$1\r\nv\r\n"] * len(scene.primary.take()))
    assert (await scene.explain(STRONG)).hot_share == 30 / 34
    assert (await scene.explain(STRONG, b"GET", scene.other)).hot_share is None  # seen too seldom


# -- of a snapshot


@pytest.fixture
async def desk(scene: Scene) -> PlainDesk:
    """5 and 8 serve, 7 is closed between them, and 9 was aborted."""
    known = [facts_of(5), facts_of(7, CLOSED), facts_of(8, age_seconds=3.0), facts_of(9, ABORTED)]
    scene.world.exchange.snapshots = desk = PlainDesk(known)
    return desk


async def test_a_snapshot_is_read_at_the_owner_by_the_markers_of_its_chain(
    autojump_clock: MockClock, scene: Scene, desk: PlainDesk
) -> None:
    """However good the replicas are, and whatever the command is that replicas are never asked for."""
    for read in ((b"GET", scene.key), (b"HSCAN", scene.key, b"0"), (b"MGET", scene.key, scene.other)):
        found = await scene.explain(ReadLevel(Level.SNAPSHOT, snapshot_id=5), *read)
        scene.assert_by(found, scene.primary, Level.SNAPSHOT)
        assert scene.why(found) == [words.LEVEL_SNAPSHOT] * 3
        assert (found.snapshot_id, found.markers, found.staleness_seconds) == (5, (5, 7, 8, 9), 60.0)
        assert (found.floor, scene.first.take(), found.because) == (None, [], words.BY_CONNECTION)


async def test_what_a_proxy_that_writes_alone_has_not_written_needs_no_marker(
    autojump_clock: MockClock, scene: Scene, desk: PlainDesk
) -> None:
    desk.own_writes.begin(5)
    found = await scene.explain(ReadLevel(Level.SNAPSHOT, snapshot_id=5))
    scene.assert_by(found, scene.primary, Level.SNAPSHOT)
    assert scene.why(found) == [words.SNAPSHOT_UNWRITTEN] * 3
    assert found.markers == ()
    desk.own_writes.note([scene.key])
    found = await scene.explain(ReadLevel(Level.SNAPSHOT, snapshot_id=5))
    assert scene.why(found) == [words.LEVEL_SNAPSHOT] * 3
    assert found.markers == (5, 7, 8, 9)


async def test_the_current_snapshot_is_the_newest_that_serves(
    autojump_clock: MockClock, scene: Scene, desk: PlainDesk
) -> None:
    snapshot = ReadLevel(Level.SNAPSHOT)
    choice = LevelChoice(None, (PrefixRule(scene.key, EVENTUAL),), None, snapshot)
    found = await scene.explain(snapshot, choice=choice)
    scene.assert_by(found, scene.primary, Level.SNAPSHOT)
    assert (found.snapshot_id, found.markers, found.staleness_seconds) == (8, (8, 9), 3.0)
    assert (found.asked, str(found.level)) == (None, "snapshot current")
    assert found.because == f"{words.BY_MODE}; {words.RULES_DO_NOT_COUNT}"


async def test_a_snapshot_of_a_slot_in_flux(autojump_clock: MockClock, scene: Scene, desk: PlainDesk) -> None:
    scene.world.migrations = {scene.slot: (0, 1)}
    scene.world.see()
    found = await scene.explain(ReadLevel(Level.SNAPSHOT))
    scene.assert_by(found, scene.primary, Level.SNAPSHOT)
    assert scene.why(found) == [words.SNAPSHOT_IN_FLUX] * 3
    assert scene.row(found, scene.world.nodes[1]).why == words.MIGRATION_TARGET


async def test_a_snapshot_that_does_not_serve_is_refused_and_nobody_is_asked(
    autojump_clock: MockClock, scene: Scene, desk: PlainDesk
) -> None:
    """Promise 9: with the error that the read would get."""
    found = await scene.explain(ReadLevel(Level.SNAPSHOT, snapshot_id=9))
    scene.assert_by(found, None, None)
    assert found.refusal == "SNAPSHOTTOOOLD snapshot 9 has ended; open another one"
    assert scene.why(found) == [words.SNAPSHOT_REFUSED] * 3
    assert (found.snapshot_id, found.markers, found.staleness_seconds) == (9, (), None)
    desk.known.clear()
    found = await scene.explain(ReadLevel(Level.SNAPSHOT))
    assert (found.refusal, found.snapshot_id) == (NO_SNAPSHOT, None)
    assert scene.primary.take() == []


async def test_what_no_snapshot_answers_is_refused_as_the_read_is(
    autojump_clock: MockClock, scene: Scene, desk: PlainDesk
) -> None:
    client = scene.world.client()
    client.send(encoded("STEADY.READ", "SNAPSHOT", "8") + encoded("OBJECT", "ENCODING", scene.key))
    await scene.world.settle()
    told = client.replies()[1]
    found = await scene.explain(ReadLevel(Level.SNAPSHOT, snapshot_id=8), b"OBJECT", b"ENCODING", scene.key)
    scene.assert_by(found, None, None)
    assert told == f"-{found.refusal}\r\n".encode()
    assert scene.why(found) == [words.NOT_OF_SNAPSHOT] * 3
    assert scene.primary.take() == []


async def test_a_snapshot_of_a_shard_whose_primary_is_down(
    autojump_clock: MockClock, scene: Scene, desk: PlainDesk
) -> None:
    await scene.lose(scene.primary)
    found = await scene.explain(ReadLevel(Level.SNAPSHOT))
    scene.assert_by(found, None, None)
    assert found.refusal.startswith(f"NOTREADY slot {scene.slot} was not served within 5 s")
    scene.world.owners[scene.slot] = -1
    scene.world.see()
    found = await scene.explain(ReadLevel(Level.SNAPSHOT))
    assert found.refusal.endswith("(no node serves the slot); it did not run and may be sent again")


async def test_a_snapshot_that_ends_while_its_owner_is_asked(
    autojump_clock: MockClock, scene: Scene, desk: PlainDesk
) -> None:
    """A reply is used only if the snapshot still serves when it is complete."""
    scene.told[scene.primary] = None

    async def end() -> None:
        await trio.sleep(1.0)
        desk.known[2] = facts_of(8, ABORTED)
        scene.told[scene.primary] = primary(100)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        found = await scene.explain(ReadLevel(Level.SNAPSHOT, snapshot_id=8))
    scene.assert_by(found, None, None)
    assert found.refusal.startswith("SNAPSHOTTOOOLD snapshot 8")


# -- with the primary down


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("level", [STRONG, CAUGHT_UP, SESSION], ids=str)
async def test_what_only_the_primary_can_prove_is_refused_while_it_is_down(
    autojump_clock: MockClock, scene: Scene, level: ReadLevel, is_frozen: bool
) -> None:
    scene.sampled(seconds_ago=0.1)
    scene.told[scene.primary] = None
    if not is_frozen:
        await scene.lose(scene.primary)
    found = await scene.explain(level)
    scene.assert_by(found, None, None)
    reason = "node:7000 did not reply within 5 s" if is_frozen else "node:7000: node:7000: refused"
    assert found.refusal.startswith(f"NOTREADY slot {scene.slot} was not served within 5 s ({reason})")
    of_primary, *of_replicas = scene.why(found)
    assert of_primary.startswith(words.timed_out(5.0) if is_frozen else words.NOT_CONNECTED)
    assert of_replicas == [words.LEVEL_STRONG if level is STRONG else words.NO_FLOOR] * 2


@pytest.mark.parametrize("level", [BOUNDED, SESSION, EVENTUAL], ids=str)
async def test_what_a_replica_can_prove_is_given_while_the_primary_is_down(
    autojump_clock: MockClock, scene: Scene, level: ReadLevel
) -> None:
    scene.sampled(seconds_ago=0.1)
    session = Session(scene.world.replicas)
    session.on_floor(scene.shard, Sample(True, Point(X, 90), NO_POINT))
    await scene.lose(scene.primary)
    found = await scene.explain(level, session=session)
    scene.assert_by(found, scene.first, level.level)
    await trio.sleep(1.0)
    if level is BOUNDED:  # until the last that is known of the primary is older than the bound
        found = await scene.explain(level)
        scene.assert_by(found, None, None)
        assert scene.why(found)[1].startswith("its data may be 1.")


# -- sessions


async def test_a_session_goes_on_with_the_replica_that_it_read_at(
    autojump_clock: MockClock, scene: Scene
) -> None:
    session = Session(scene.world.replicas)
    session.on_floor(scene.shard, Sample(True, Point(X, 90), NO_POINT))
    connection = scene.replicas[1].connections[0]
    assert connection is not None
    session.on_served(scene.shard, connection)
    found = await scene.explain(SESSION, session=session)
    scene.assert_by(found, scene.second, Level.SESSION)
    assert scene.why(found)[1] == words.SESSION_GOES_ON
    assert found.floor == Point(X, 90)
    scene.told[scene.second] = replica(80)
    found = await scene.explain(SESSION, session=session)
    scene.assert_by(found, scene.primary, Level.STRONG)
    assert scene.why(found)[1:] == [words.SESSION_GOES_ON, words.behind(10)]


async def test_explaining_changes_nothing_in_the_session(autojump_clock: MockClock, scene: Scene) -> None:
    session = Session(scene.world.replicas)
    session.wrote([scene.slot])
    found = await scene.explain(SESSION, session=session)
    scene.assert_by(found, scene.first, Level.SESSION)
    assert found.floor == Point(X, 100)
    assert session.floor_of(scene.shard) is None
    assert session.line_of(scene.shard) is None
    session.on_floor(scene.shard, Sample(True, Point(X, 90), NO_POINT))
    await scene.explain(SESSION, session=session)
    assert session.floor_of(scene.shard) == Point(X, 90)


@pytest.mark.parametrize("has_floor", [False, True])
async def test_a_session_whose_writes_are_lost_is_refused(
    autojump_clock: MockClock, scene: Scene, has_floor: bool
) -> None:
    """Its primary begins a new history without what it wrote; the session itself is not ended by the question."""
    session = Session(scene.world.replicas)
    session.on_floor(scene.shard, Sample(True, Point(X, 90), NO_POINT))
    if not has_floor:
        session.read_at_owner(scene.slot)
    scene.told.update({scene.primary: primary(95, Y, (X, 80))})
    scene.told[scene.first] = scene.told[scene.second] = replica(95, Y)
    found = await scene.explain(SESSION, session=session)
    scene.assert_by(found, None, None)
    assert found.refusal == LOST[1:-2].decode()
    assert scene.why(found) == [words.SESSION_LOST] * 3
    assert not session.is_lost
    session.is_lost = True
    assert (await scene.explain(EVENTUAL, session=session)).refusal == found.refusal
    assert scene.primary.take() == []


async def test_a_session_whose_primary_does_not_tell_whether_it_has_the_writes(
    autojump_clock: MockClock, scene: Scene
) -> None:
    session = Session(scene.world.replicas)
    session.on_floor(scene.shard, Sample(True, Point(X, 90), NO_POINT))
    scene.told[scene.primary] = None
    scene.told[scene.first] = scene.told[scene.second] = replica(95, Y)
    found = await scene.explain(SESSION, session=session)
    assert found.refusal.startswith(
        "NOTREADY the primary did not tell whether it has what this session wrote"
    )
    scene.told[scene.primary] = primary(95, Y, (X, 92))  # promoted with all of it
    scene.assert_by(await scene.explain(SESSION, session=session), scene.primary, Level.STRONG)


# -- the level and whose choice it is


@pytest.mark.parametrize(
    ("choice", "is_question", "level", "because"),
    [
        (LevelChoice(EVENTUAL, (), None, STRONG), False, EVENTUAL, words.BY_CONNECTION),
        (LevelChoice(EVENTUAL, (), None, STRONG), True, EVENTUAL, words.BY_QUESTION),
        (
            LevelChoice(None, (PrefixRule(b"key", BOUNDED),), EVENTUAL, STRONG),
            True,
            BOUNDED,
            words.by_rule(b"key"),
        ),
        (
            LevelChoice(None, (PrefixRule(b"x", BOUNDED),), EVENTUAL, STRONG),
            True,
            EVENTUAL,
            words.BY_LISTENER,
        ),
        (LevelChoice(None, (), None, EVENTUAL), True, EVENTUAL, words.BY_MODE),
    ],
)
async def test_whose_choice_the_level_is(
    autojump_clock: MockClock,
    scene: Scene,
    choice: LevelChoice,
    is_question: bool,
    level: ReadLevel,
    because: str,
) -> None:
    found = await scene.explain(level, choice=choice, is_question=is_question)
    assert (found.asked, found.level, found.because) == (choice.connection, level, because)


async def test_mget_whose_keys_have_different_levels_is_strong(
    autojump_clock: MockClock, scene: Scene
) -> None:
    keys = [b"a{%b}" % scene.key, b"b{%b}" % scene.key]
    choice = LevelChoice(None, (PrefixRule(b"a", EVENTUAL),), None, CAUGHT_UP)
    found = await scene.explain(STRONG, b"MGET", *keys, choice=choice)
    assert (found.level, found.because, found.given) == (STRONG, words.KEYS_DIFFER, Level.STRONG)
    found = await scene.explain(STRONG, b"MGET", keys[0], keys[0], choice=choice)
    scene.assert_by(found, scene.first, Level.EVENTUAL)


async def test_what_is_no_read_is_not_explained(autojump_clock: MockClock, scene: Scene) -> None:
    with pytest.raises(ExplainError, match="SET is not a read"):
        await explain(
            scene.world.exchange, (b"SET", b"k", b"v"), LevelChoice(None, (), None, STRONG), None, 0.0
        )


async def test_no_counter_of_reads_counts_an_explanation(autojump_clock: MockClock, scene: Scene) -> None:
    for level in (CAUGHT_UP, BOUNDED, EVENTUAL):
        await scene.explain(level)
    reads = scene.world.exchange.reads
    assert (reads.floors_total, reads.stamps_total, sum(reads.refusals.values())) == (0, 0, 0)
    assert not any(counts.sent or counts.at_owner for counts in reads.counts.values())


async def test_a_map_that_changes_meanwhile_is_looked_at_anew(
    autojump_clock: MockClock, scene: Scene
) -> None:
    """The primary is deposed while it is waited for: the one that follows it answers."""
    scene.told[scene.primary] = None
    scene.told[scene.world.nodes[1]] = primary(7)

    async def fail_over() -> None:
        await trio.sleep(1.0)
        scene.world.owners[scene.slot] = 1
        scene.world.see()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail_over)
        found = await scene.explain(STRONG)
    scene.assert_by(found, scene.world.nodes[1], Level.STRONG)


async def test_zones_are_shown(autojump_clock: MockClock, scene: Scene) -> None:
    zones = {scene.primary.address: "a", scene.first.address: "b"}
    scene.world.replicas.adopt(ReplicaOptions(zone="a", zones=zones))
    found = await scene.explain(EVENTUAL)
    assert [candidate.zone for candidate in found.candidates] == ["a", "b", ""]


# -- STEADY.EXPLAIN


async def ask(scene: Scene, client: Client, *line: bytes) -> object:
    client.send(encoded(b"STEADY.EXPLAIN", *line))

    async def replied() -> object:
        while not (values := client.values()):
            await trio.sleep(0.01)
        return values[0]

    return await scene.while_nodes_answer(replied)


async def connected(scene: Scene, resp: int) -> Client:
    client = scene.world.client()
    if resp == 3:
        client.send(encoded("HELLO", "3"))
        while any(None in one.connections for one in scene.world.replicas.replicas()):
            await scene.world.settle()
            await trio.sleep(0.01)
    client.send(encoded("STEADY.READ", "CAUGHT_UP"))
    assert client.values()[-1] == b"OK"
    return client


async def test_in_resp3_a_client_gets_a_map(autojump_clock: MockClock, scene: Scene) -> None:
    client = await connected(scene, 3)
    reply = await ask(scene, client, b"get", scene.key)
    assert isinstance(reply, dict)
    facts = as_json(await scene.explain(CAUGHT_UP))
    assert [name.decode() for name in reply] == list(facts)
    assert (reply[b"given"], reply[b"served_by"], reply[b"refusal"]) == (
        b"caught_up",
        str(scene.first.address).encode(),
        None,
    )
    assert reply[b"floor"] == {b"replid": X, b"offset": 100}
    assert [candidate[b"chosen"] for candidate in reply[b"candidates"]] == [0, 1, 0]


async def test_in_resp2_a_client_gets_names_and_values_in_turn(
    autojump_clock: MockClock, scene: Scene
) -> None:
    client = await connected(scene, 2)
    reply = await ask(scene, client, b"get", scene.key)
    assert isinstance(reply, list)
    facts = dict(zip(reply[::2], reply[1::2], strict=True))
    assert [name.decode() for name in facts] == list(as_json(await scene.explain(CAUGHT_UP)))
    assert (facts[b"slot"], facts[b"refusal"]) == (scene.slot, None)
    assert facts[b"floor"] == [b"replid", X, b"offset", 100]
    assert [candidate[18:20] for candidate in facts[b"candidates"]] == [
        [b"chosen", 0],
        [b"chosen", 1],
        [b"chosen", 0],
    ]
    scene.world.owners[scene.slot] = -1
    scene.world.see()
    reply = await ask(scene, client, b"get", scene.key)
    assert isinstance(reply, list)
    assert dict(zip(reply[::2], reply[1::2], strict=True))[b"candidates"] == []


async def test_what_cannot_be_explained_is_an_error_and_the_client_goes_on(
    autojump_clock: MockClock, scene: Scene
) -> None:
    client = await connected(scene, 2)
    client.send(encoded("STEADY.EXPLAIN", "SET", "k", "v") + encoded("STEADY.READ"))
    await scene.world.settle()
    replies = client.replies()
    assert replies == [
        b"-ERR SET is not a read, and levels are of reads: no replica gets it\r\n",
        b"$9\r\ncaught_up\r\n",
    ]
    assert decode(replies[1]) == b"caught_up"
