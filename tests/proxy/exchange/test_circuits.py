"""A replica that stalls or fails: who waits gets the owner's reply, and it gets reads again slowly (promises 2 and 8).

The fake nodes answer when the test says so, and the test is the beat at which stalls are looked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from proxy.replicas.service import Replica, ReplicaOptions
from routing import explain as words
from routing.circuit import CircuitState
from routing.offsets import NO_POINT, Point, Sample
from routing.promotion import Stage
from routing.proof import Refusal
from tests.proxy.exchange.test_explain import EVENTUAL, Scene
from tests.proxy.exchange.test_open_requests import OK, command
from tests.proxy.exchange.test_replica_reads import INFO, X, primary, reader, replica, value
from tests.proxy.world import Client, World, keys_of, world_of

STALL_SECONDS = ReplicaOptions().stall_seconds
SAMPLE = Sample(False, Point(X, 100), NO_POINT)


class Shard:
    """The first shard, whose first replica is preferred, because it has answered faster."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.primary = world.nodes[0]
        self.first, self.second = world.replica_nodes[:2]
        self.key, self.other = keys_of(world, 0, 2)
        for one in world.replicas.replicas():
            one.set_stage(Stage.READABLE)
        self.replica, self.other_replica = world.replicas.shards()[0].replicas
        self.replica.latency_seconds, self.other_replica.latency_seconds = 0.001, 0.002

    async def reader(self, *level: str) -> Client:
        """A client of this level."""
        client = self.world.client()
        client.send(command("STEADY.READ", *level))
        await self.world.settle()
        assert client.values() == [b"OK"]
        return client

    async def look(self, seconds: float) -> None:
        """Time passes, with looks for stalls at a steady beat."""
        until = trio.current_time() + seconds
        while trio.current_time() < until:
            await trio.sleep(STALL_SECONDS / 4)
            self.world.replicas.look_for_stalls(trio.current_time())
            self.world.turn()

    def refusals(self, refusal: Refusal) -> int:
        return self.world.exchange.reads.refusals[refusal]


@pytest.fixture
async def shard() -> AsyncIterator[Shard]:
    async with world_of(2, replicas=2) as world:
        yield Shard(world)


def probe(world: World, replica: Replica) -> None:
    """It answers a question at once."""
    now = trio.current_time()
    world.replicas.note(replica, SAMPLE, now, now)


@pytest.mark.parametrize(
    "level", [("EVENTUAL",), ("CAUGHT_UP",), ("BOUNDED_STALENESS", "60000"), ("SESSION",)]
)
async def test_who_waits_for_a_replica_that_stalls_gets_the_owners_reply(
    shard: Shard, level: tuple[str, ...], autojump_clock: MockClock
) -> None:
    world = shard.world
    shard.replica.shard.note(Sample(True, Point(X, 100), NO_POINT), trio.current_time())
    for one in shard.replica.shard.replicas:
        one.note(SAMPLE, trio.current_time(), trio.current_time())
    shard.replica.latency_seconds, shard.other_replica.latency_seconds = 0.001, 0.002
    client = await shard.reader(*level)
    client.send(command("GET", shard.key) + command("GET", shard.other))
    if shard.primary.take():
        shard.primary.reply(primary(100))
        world.turn()
    asked = shard.first.take()
    assert asked[-2:] == [[b"GET", shard.key], [b"GET", shard.other]]

    await shard.look(STALL_SECONDS * 0.8)
    assert (client.values(), shard.replica.circuit.state) == ([], CircuitState.CLOSED)
    await shard.look(STALL_SECONDS)
    assert shard.replica.circuit.state is CircuitState.OPEN
    assert shard.primary.take() == [[b"GET", shard.key], [b"GET", shard.other]]
    shard.primary.reply(value(b"1"), value(b"2"))
    world.turn()
    assert client.values() == [b"1", b"2"]
    assert shard.refusals(Refusal.STALLED) == 2

    # What the replica owes is dropped when it goes on, whatever it proves, and nobody gets another's reply.
    shard.first.reply(*[replica(50) if words == INFO else value(b"late") for words in asked])
    world.turn()
    connection = shard.replica.connections[0]
    assert connection is not None
    assert (connection.is_closed, len(connection.owed)) == (False, 0)
    client.send(command("SET", shard.key, "w"))
    assert shard.primary.take() == [[b"SET", shard.key, b"w"]]
    shard.primary.reply(OK)
    world.turn()
    assert client.values() == [b"OK"]
    answered = world.exchange.reads.answered()
    assert not any(answered.values())


async def test_a_replica_that_sends_a_part_of_a_large_reply_does_not_stall(
    shard: Shard, autojump_clock: MockClock
) -> None:
    client = reader(shard.world, "EVENTUAL")
    client.send(command("GET", shard.key))
    assert shard.first.take() == [[b"GET", shard.key]]
    [link] = [link for link in shard.first.links if link is shard.first._unanswered[0]]
    link.reply(b"$60\r\n")
    for _ in range(6):
        shard.world.turn()
        await shard.look(STALL_SECONDS / 2)
        link.reply(b"0123456789")
    link.reply(b"\r\n")
    shard.world.turn()
    assert client.values() == [b"0123456789" * 6]
    assert shard.replica.circuit.openings_total == 0


async def test_an_idle_replica_does_not_stall(shard: Shard, autojump_clock: MockClock) -> None:
    await shard.look(STALL_SECONDS * 5)
    client = reader(shard.world, "EVENTUAL")
    client.send(command("GET", shard.key))
    await shard.look(STALL_SECONDS / 2)
    assert shard.replica.circuit.openings_total == 0


async def test_a_proxy_that_stood_still_does_not_blame_its_replicas(
    shard: Shard, autojump_clock: MockClock
) -> None:
    """A look that comes late may find replies unread, and what it finds owed may have been asked just now."""
    replicas = shard.world.replicas
    reader(shard.world, "EVENTUAL").send(command("GET", shard.key))
    due = trio.current_time()
    await trio.sleep(STALL_SECONDS * 5)
    replicas.look_for_stalls(due)
    await trio.sleep(STALL_SECONDS / 4)
    replicas.look_for_stalls(trio.current_time())
    due = trio.current_time()
    await trio.sleep(STALL_SECONDS * 5)
    replicas.look_for_stalls(due)
    assert shard.replica.circuit.openings_total == 0
    replicas.look_for_stalls(trio.current_time())
    assert shard.replica.circuit.openings_total == 1


async def test_a_far_replica_is_given_four_round_trips(shard: Shard, autojump_clock: MockClock) -> None:
    connection = shard.replica.connections[0]
    assert connection is not None
    connection.load.limiter.no_load_seconds = STALL_SECONDS
    reader(shard.world, "EVENTUAL").send(command("GET", shard.key))
    await shard.look(STALL_SECONDS * 3.5)
    assert shard.replica.circuit.openings_total == 0
    await shard.look(STALL_SECONDS)
    assert shard.replica.circuit.openings_total == 1


async def test_other_replicas_get_its_reads_and_it_gets_them_back_slowly(
    shard: Shard, autojump_clock: MockClock
) -> None:
    world, circuit = shard.world, shard.replica.circuit
    world.replicas.fail(shard.replica, "it stalls")
    client = reader(world, "EVENTUAL")

    def reads(count: int) -> tuple[int, int]:
        """How many each replica gets of these."""
        found = [0, 0]
        for _ in range(count):
            client.send(command("GET", shard.key))
            for index, node in enumerate((shard.first, shard.second)):
                taken = len(node.take())
                found[index] += taken
                node.reply(*[value(b"v")] * taken)
            world.turn()
            assert client.values() == [b"v"]
        return found[0], found[1]

    assert reads(20) == (0, 20)
    await trio.sleep(0.5)
    probe(world, shard.replica)
    assert circuit.state is CircuitState.RETURNING
    shares = []
    while circuit.state is CircuitState.RETURNING:
        shares.append(reads(100)[0])
        await trio.sleep(1.0)
        probe(world, shard.replica)
        probe(world, shard.replica)
    assert shares == [5, 10, 20, 40, 80]
    assert reads(20) == (20, 0)


async def test_without_another_replica_the_owner_has_the_rest(autojump_clock: MockClock) -> None:
    async with world_of(2, replicas=1) as world:
        [one] = world.replicas.shards()[0].replicas
        one.set_stage(Stage.READABLE)
        world.replicas.fail(one, "it stalls")
        client = reader(world, "EVENTUAL")
        client.send(command("GET", keys_of(world, 0)[0]))
        assert len(world.nodes[0].take()) == 1
        assert world.exchange.reads.refusals[Refusal.CIRCUIT] == 1


async def test_with_the_owner_gone_it_is_asked_all_the_same(autojump_clock: MockClock) -> None:
    """Promise 8: reads that nobody else can answer are not refused for a doubt."""
    async with world_of(2, replicas=1) as world:
        [one] = world.replicas.shards()[0].replicas
        one.set_stage(Stage.READABLE)
        world.replicas.fail(one, "it stalls")
        world.nodes[0].accepts = False
        world.nodes[0].lose()
        await world.settle()
        client = reader(world, "EVENTUAL")
        client.send(command("GET", keys_of(world, 0)[0]))
        assert len(world.replica_nodes[0].take()) == 1
        world.exchange.reads.recall(one)
        world.replica_nodes[0].reply(value(b"v"))
        world.turn()
        assert client.values() == [b"v"]


async def test_a_lost_connection_with_reads_opens_it(shard: Shard, autojump_clock: MockClock) -> None:
    client = reader(shard.world, "EVENTUAL")
    client.send(command("GET", shard.key))
    assert len(shard.first.take()) == 1
    shard.first.lose()
    await shard.world.settle()
    assert shard.replica.circuit.is_open
    assert len(shard.primary.take()) == 1
    assert shard.refusals(Refusal.LOST) == 1


@pytest.mark.parametrize(
    ("reply", "opens"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", True),
        (b"-MASTERDOWN Link with MASTER is down\r\n", True),
        (b"$-1\r\n", False),
        (b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n", False),
    ],
)
async def test_errors_that_are_the_nodes_open_it(
    shard: Shard, reply: bytes, opens: bool, autojump_clock: MockClock
) -> None:
    client = reader(shard.world, "EVENTUAL")
    for _ in range(6):
        client.send(command("GET", shard.key))
        for node in (shard.first, shard.second):
            if node.take():
                node.reply(reply if node is shard.first else value(b"v"))
        shard.world.turn()
        if shard.primary.take():
            shard.primary.reply(value(b"v"))
        shard.world.turn()
        assert client.values() == [b"v"]
    assert shard.replica.circuit.is_open is opens


async def test_one_that_has_no_permit_is_passed_over(shard: Shard, autojump_clock: MockClock) -> None:
    """The other replica gets the read, and the owner if that has none either."""
    world = shard.world
    client = reader(world, "EVENTUAL")
    for replica_, node in ((shard.replica, shard.second), (shard.other_replica, shard.primary)):
        connection = replica_.connections[0]
        assert connection is not None
        connection.is_free = connection.load.is_free = False
        connection.load.limit(4, 1.0, 0.001)
        connection.load.in_flight = 4
        client.send(command("GET", shard.key))
        assert len(node.take()) == 1
        node.reply(value(b"v"))
        world.turn()
        assert client.values() == [b"v"]
    assert shard.refusals(Refusal.OVERLOADED) == 1


async def test_a_session_leaves_it_and_proves_itself_anew(shard: Shard, autojump_clock: MockClock) -> None:
    client = await shard.reader("SESSION")
    client.send(command("GET", shard.key))
    assert shard.primary.take() == [INFO]
    shard.primary.reply(primary(100))
    shard.world.turn()
    assert shard.first.take() == [INFO, [b"GET", shard.key]]
    shard.first.reply(replica(100), value(b"v"))
    shard.world.turn()
    shard.world.replicas.fail(shard.replica, "it stalls")
    client.send(command("GET", shard.key))
    assert shard.primary.take() == [INFO]
    shard.primary.reply(primary(100))
    shard.world.turn()
    assert shard.second.take() == [INFO, [b"GET", shard.key]]
    assert shard.first.take() == []


async def test_no_circuit_opens_when_it_is_turned_off(shard: Shard, autojump_clock: MockClock) -> None:
    world = shard.world
    world.replicas.fail(shard.replica, "it stalls")
    world.replicas.adopt(ReplicaOptions(stall_seconds=0.0))
    assert shard.replica.circuit.state is CircuitState.CLOSED
    client = reader(world, "EVENTUAL")
    client.send(command("GET", shard.key))
    assert len(shard.first.take()) == 1
    await shard.look(STALL_SECONDS * 5)
    assert shard.primary.take() == []
    shard.first.lose()
    await world.settle()
    assert shard.replica.circuit.openings_total == 0


async def test_an_explanation_says_who_is_out_and_why(autojump_clock: MockClock) -> None:
    async with world_of(2, replicas=2) as world:
        scene = Scene(world)
        first, second = scene.replicas
        world.replicas.fail(first, "it owes replies")

        async def why() -> list[str]:
            explanation = await scene.explain(EVENTUAL)
            return [candidate.why for candidate in explanation.candidates]

        assert await why() == [words.OWNER_NOT_NEEDED, words.out("it owes replies"), words.CHOSEN]
        await trio.sleep(0.5)
        await why()  # its question is a probe
        assert first.circuit.state is CircuitState.RETURNING
        assert (await why())[1:] == [words.returning(0.05), words.CHOSEN]
        world.replicas.fail(second, "it owes replies")
        assert await why() == [words.OWNER_PROVES, words.returning(0.05), words.out("it owes replies")]
