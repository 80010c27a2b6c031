"""What a client's requests go through while a snapshot is open, or is about to be cut."""

from __future__ import annotations

from math import inf

import pytest
import trio
from trio.testing import MockClock

from proxy.protocol.encode import array, bulk, error
from proxy.protocol.replies import ServerError
from proxy.snapshots.preserve import INTERNAL_KEY, SCRIPT_SHA
from routing.offsets import Point
from routing.slot import slot_of
from routing.snapshot import Chain, SnapshotRecord, SnapshotState
from routing.snapshot_floors import ShardFloor
from routing.snapshot_names import marker, preimage
from tests.proxy.exchange.test_open_requests import OK, command
from tests.proxy.world import World, keys_of

ID = 7
HISTORY = b"f" * 40


def set_chain(world: World, *ids: int) -> None:
    """As at a cut, or at an end: nothing is known to be preserved."""
    preserver = world.exchange.preserver
    preserver.chain = Chain(ids)
    preserver.newest = preserver.chain.newest
    world.exchange.snapshots._clear_known()


def serve(world: World, *ids: int) -> None:
    """The first of these serves, and every connection may be read at it."""
    snapshots = world.exchange.snapshots
    set_chain(world, *ids)
    snapshots._serving[ids[0]] = SnapshotRecord(ids[0], SnapshotState.SERVING, 0.0, is_cut=True)
    snapshots.members.valid_until = inf
    snapshots.histories.floors[ids[0]] = {HISTORY: ShardFloor(Point(HISTORY, 5), frozenset())}
    for connection in world.upstreams.connections():
        connection.history = HISTORY


async def answer_preserves(world: World, index: int, reply: bytes = b"*1\r\n:0\r\n") -> int:
    """Answer what has come to a node, which must all be preserves. How many there were."""
    requests = world.nodes[index].take()
    for words in requests:
        assert words[:2] == [b"EVALSHA", SCRIPT_SHA], words
        world.nodes[index].reply(reply)
    await world.settle()
    return len(requests)


async def test_a_client_that_leaves_while_a_part_of_its_write_is_turned_away_hinders_no_cut(
    world: World,
) -> None:
    a, b = keys_of(world, 0)[0], keys_of(world, 1)[0]
    client = world.client()
    client.send(command("MSET", a, "1", b, "2"))
    world.nodes[0].take()
    world.nodes[1].take()
    client.connection.close("gone")
    world.nodes[0].reply(OK)
    world.nodes[1].reply(error("CLUSTERDOWN Hash slot not served"))
    await world.settle()
    assert not world.exchange.snapshots._multis


async def test_a_client_that_leaves_while_its_write_waits_to_be_finished_hinders_no_cut(world: World) -> None:
    a, b = keys_of(world, 0)[0], keys_of(world, 1)[0]
    client = world.client()
    client.send(command("MSET", a, "1", b, "2") + command("SET", a, "3"))
    for node in world.nodes:
        node.take()
    world.nodes[1].reply(error("CLUSTERDOWN Hash slot not served"))
    world.nodes[0].reply(OK)
    world.turn()
    assert world.exchange.snapshots._multis  # while its client waits, nothing is cut in between
    client.connection.close("gone")
    await world.settle()
    assert not world.exchange.snapshots._multis


async def test_a_deadline_of_an_earlier_snapshot_does_not_count_for_a_later_one(
    world: World, autojump_clock: MockClock
) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    set_chain(world, ID)
    client.send(command("SET", key, "1"))
    await world.settle()
    set_chain(world)  # it ended meanwhile
    assert await answer_preserves(world, 0) == 1
    assert world.nodes[0].take() == [[b"SET", key, b"1"]]
    world.nodes[0].reply(OK)
    world.turn()
    assert client.values() == [b"OK"]

    await trio.sleep(100)
    set_chain(world, ID + 1)
    client.send(command("SET", key, "2"))
    await world.settle()
    assert await answer_preserves(world, 0) == 1
    assert world.nodes[0].take() == [[b"SET", key, b"2"]]


async def test_a_refusal_of_an_earlier_write_is_not_the_reply_of_a_later_one(world: World) -> None:
    first, second = keys_of(world, 0)[:2]
    client = world.client()
    set_chain(world, ID)
    client.send(command("SET", first, "1"))
    await world.settle()
    refusal = error("NOREPLICAS Not enough good replicas to write.")
    world.nodes[0].take()
    world.upstream(0).known.add(first)  # another client's preserve went through meanwhile
    world.nodes[0].reply(refusal)
    await world.settle()
    assert world.nodes[0].take() == [[b"SET", first, b"1"]]
    world.nodes[0].reply(OK)
    world.turn()
    assert client.values() == [b"OK"]

    client.send(command("SET", second, "2"))
    await world.settle()
    assert client.values() == []
    assert await answer_preserves(world, 0) == 1
    assert world.nodes[0].take() == [[b"SET", second, b"2"]]


async def test_a_write_is_not_refused_for_the_sake_of_one_that_is_pipelined_behind_it(world: World) -> None:
    key = keys_of(world, 0)[0]
    slot = slot_of(key)
    internal = marker(slot, ID, key)
    client = world.client()
    set_chain(world, ID)
    client.send(command("SET", key, "1") + command("SET", internal, "a") + command("SET", key, "2"))
    await world.settle()
    assert await answer_preserves(world, 0) == 1
    assert world.nodes[0].take() == [[b"SET", key, b"1"]]
    world.nodes[0].reply(OK)
    await world.settle()
    assert world.nodes[0].take() == [[b"SET", key, b"2"]]
    world.nodes[0].reply(OK)
    await world.settle()
    first, refused, last = client.values()
    assert (first, last) == (b"OK", b"OK")
    assert isinstance(refused, ServerError)
    assert error(str(refused)) == INTERNAL_KEY
    assert client.connection.commands == 3


async def test_writes_to_two_nodes_of_which_one_refuses_get_each_its_own_reply(world: World) -> None:
    a, b = keys_of(world, 0)[0], keys_of(world, 1)[0]
    client = world.client()
    set_chain(world, ID)
    client.send(command("SET", a, "1") + command("SET", b, "2"))
    await world.settle()
    assert await answer_preserves(world, 1, error("MISCONF no disk")) == 1
    assert await answer_preserves(world, 0) == 1
    assert world.nodes[0].take() == [[b"SET", a, b"1"]]
    world.nodes[0].reply(OK)
    await world.settle()
    assert await answer_preserves(world, 1, error("MISCONF no disk")) == 1
    first, second = client.values()
    assert first == b"OK"
    assert str(second) == "MISCONF no disk"


async def test_a_read_at_a_snapshot_is_answered_although_a_later_write_of_its_key_has_run(
    world: World, autojump_clock: MockClock
) -> None:
    """It shows the write neither way, so there is no order to keep."""
    key = keys_of(world, 0)[0]
    slot = slot_of(key)
    serve(world, ID, ID + 1)
    world.upstream(0).known.add(key)
    client = world.client()
    client.connection.snapshot_id = ID
    client.send(command("GET", key) + command("SET", key, "2"))
    values = {
        key: bulk(b"2"),
        marker(slot, ID, key): bulk(b"p"),  # of two ids: the slow way
        preimage(slot, ID, key): bulk(b"1"),
    }
    nil = b"$-1\r\n"
    for _ in range(12):
        for name, *words in world.nodes[0].take():
            found = [values.get(word, nil) for word in words]
            info = bulk(b"role:master\r\nmaster_replid:" + HISTORY + b"\r\n")
            replies = {b"INFO": info, b"SET": OK, b"GET": found[0], b"MGET": array(found)}
            world.nodes[0].reply(replies[name])
        await world.settle()
    assert client.values() == [b"1", b"OK"]


@pytest.mark.parametrize("count", [1, 2, 18, 19, 20, 64])
@pytest.mark.parametrize("value", [b"", b"v", b"$-1"])
async def test_a_get_at_a_snapshot_is_exact_whatever_the_number_of_markers_that_are_asked(
    world: World, count: int, value: bytes
) -> None:
    """The chain also has those that ended and are newer than an open one."""
    key = keys_of(world, 0)[0]
    serve(world, *range(ID, ID + count))
    client = world.client()
    client.connection.snapshot_id = ID
    client.send(command("GET", key) + command("GET", key))
    for _ in range(3):
        for words in world.nodes[0].take():
            if words[0] == b"INFO":
                world.nodes[0].reply(bulk(b"role:master\r\nmaster_replid:" + HISTORY + b"\r\n"))
            elif words == [b"PTTL", key]:  # of the second one, which is kept
                world.nodes[0].reply(b":-1\r\n")
            else:
                assert words == [b"MGET", key, *[marker(slot_of(key), ID + n, key) for n in range(count)]]
                world.nodes[0].reply(array([bulk(value), *[b"$-1\r\n"] * count]))
        await world.settle()
    assert client.values() == [value, value]


async def test_a_get_whose_snapshot_ends_before_its_second_look_is_refused_and_hurts_nobody(
    world: World, autojump_clock: MockClock
) -> None:
    key = keys_of(world, 0)[0]
    serve(world, ID)
    reader, other = world.client(), world.client()
    reader.connection.snapshot_id = ID
    reader.send(command("GET", key) + command("GET", key))
    other.send(command("GET", key))
    set_chain(world)
    del world.exchange.snapshots._serving[ID]
    for _ in range(3):
        for words in world.nodes[0].take():
            if words[0] == b"INFO":
                world.nodes[0].reply(bulk(b"role:master\r\nmaster_replid:" + HISTORY + b"\r\n"))
            elif words[0] == b"MGET":
                world.nodes[0].reply(array([b"$-1\r\n"] * 2))
            else:
                world.nodes[0].reply(bulk(b"v"))
        await world.settle()
    assert other.values() == [b"v"]
    assert [type(value) for value in reader.values()] == [ServerError] * 2
    assert world.hub.faults_total == 0


async def test_a_read_at_a_snapshot_is_answered_when_a_fault_ends_its_connection(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keys_of(world, 0)[0]
    serve(world, ID)
    reader = world.client()
    reader.connection.snapshot_id = ID
    reader.send(command("GET", key) + command("GET", key))

    def fail(slot: object) -> bytes:
        raise RuntimeError("a bug")

    monkeypatch.setattr(world.exchange.snapshot_reads, "question", fail)
    for words in world.nodes[0].take():
        is_guard = words[0] == b"INFO"
        info = bulk(b"role:master\r\nmaster_replid:" + HISTORY + b"\r\n")
        world.nodes[0].reply(info if is_guard else array([b"$-1\r\n"] * 2))
    await world.settle()
    await trio.sleep(10.0)
    await world.settle()
    assert len(reader.values()) == 2
