"""Commands over several slots: parts go to their nodes, and the merged reply is one server's (promises 5, 6 and 9)."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from proxy.protocol.replies import ServerError
from tests.proxy.exchange.test_open_requests import OK, ask, command, moved
from tests.proxy.world import World, keys_of


def three(world: World) -> list[bytes]:
    return [keys_of(world, index)[0] for index in range(3)]


async def test_values_come_back_in_the_order_asked(world: World) -> None:
    a, b, c = three(world)
    client = world.client()
    client.send(command("MGET", c, a, b, a))
    assert [node.take() for node in world.nodes] == [[[b"MGET", a, a]], [[b"MGET", b]], [[b"MGET", c]]]
    world.nodes[1].reply(b"*1\r\n$-1\r\n")
    world.nodes[2].reply(b"*1\r\n$1\r\nC\r\n")
    world.turn()
    assert client.values() == []
    world.nodes[0].reply(b"*2\r\n$1\r\nA\r\n$1\r\nA\r\n")
    world.turn()
    assert client.values() == [[b"C", b"A", None, b"A"]]


async def test_counts_are_summed_and_mset_is_ok(world: World) -> None:
    a, b, c = three(world)
    client = world.client()
    for words, replies, value in [
        (("DEL", a, b, c), (b":1\r\n", b":0\r\n", b":1\r\n"), 2),
        (("EXISTS", a, a, b, c), (b":2\r\n", b":1\r\n", b":1\r\n"), 4),
        (("MSET", a, "1", b, "2", c, "3"), (OK, OK, OK), b"OK"),
    ]:
        client.send(command(*words))
        for node, reply in zip(world.nodes, replies, strict=True):
            assert len(node.take()) == 1
            node.reply(reply)
        world.turn()
        assert client.values() == [value]


async def test_a_part_that_moved_is_done_key_by_key(world: World) -> None:
    a, b, _ = three(world)
    client = world.client()
    client.send(command("MGET", a, b"{" + a + b"}2", b))
    for node in world.nodes:
        node.take()
    world.nodes[0].reply(b"-TRYAGAIN\r\n")
    world.nodes[1].reply(b"*1\r\n$1\r\nB\r\n")
    await world.settle()
    assert sorted(world.nodes[0].take()) == sorted([[b"MGET", a], [b"MGET", b"{" + a + b"}2"]])
    world.nodes[0].reply(b"*1\r\n$1\r\nx\r\n", ask(world, a, 1))
    await world.settle()
    assert [words[0] for words in world.nodes[1].take()] == [b"ASKING", b"MGET"]
    world.nodes[1].reply(OK, b"*1\r\n$1\r\nx\r\n")
    await world.settle()
    assert client.values() == [[b"x", b"x", b"B"]]


async def test_a_split_write_that_fails_in_part_says_so(world: World) -> None:
    """Promise 9, and 5: the part whose reply was lost is not sent again."""
    a, b, c = three(world)
    client = world.client()
    client.send(command("MSET", a, "1", b, "2", c, "3"))
    for node in world.nodes:
        node.take()
    world.nodes[0].reply(OK)
    world.nodes[1].reply(OK)
    world.turn()
    world.nodes[2].lose()
    await world.settle()
    (value,) = client.values()
    assert isinstance(value, ServerError)
    assert str(value).startswith("OUTCOMEUNKNOWN")
    assert str(value).endswith("2 of 3 parts ran")
    await world.connect()
    assert world.nodes[2].take() == []


async def test_a_split_read_with_a_lost_part_is_repeated(autojump_clock: MockClock, world: World) -> None:
    a, b, _ = three(world)
    client = world.client()
    client.send(command("EXISTS", a, b))
    world.nodes[0].take()
    world.nodes[0].lose()
    world.nodes[1].reply(b":1\r\n")
    await world.settle()
    await world.connect()
    await trio.sleep(0.2)
    await world.settle()
    assert world.nodes[0].take() == [[b"EXISTS", a]]
    world.nodes[0].reply(b":1\r\n")
    await world.settle()
    assert client.values() == [2]


async def test_behind_a_write_in_a_moving_slot_nothing_is_lost(world: World) -> None:
    """The split command cannot go yet; it is answered in its place, after what was before it."""
    a, b, _ = three(world)
    client = world.client()
    client.send(command("SET", b, "1"))
    from routing.slot import slot_of

    world.migrations[slot_of(a)] = (0, 1)
    world.see()
    client.send(command("MGET", a, b) + command("PING"))
    assert world.nodes[0].take() == []
    world.nodes[1].reply(OK)
    await world.settle()
    assert client.values() == [b"OK"]
    assert world.nodes[0].take() == [[b"MGET", a]]
    world.nodes[0].reply(b"*1\r\n$-1\r\n")
    assert world.nodes[1].take() == [[b"MGET", b]]
    world.nodes[1].reply(b"*1\r\n$1\r\n1\r\n")
    await world.settle()
    assert client.values() == [[None, b"1"], b"PONG"]


async def test_an_overtaken_part_is_refused_and_what_ran_is_told(world: World) -> None:
    a, b, _ = three(world)
    client = world.client()
    client.send(command("MSET", a, "1", b, "2") + command("SET", a, "3"))
    world.nodes[0].take()
    world.nodes[0].reply(moved(world, a, 1), OK)
    world.nodes[1].reply(OK)
    await world.settle()
    values = client.values()
    assert str(values[0]).startswith("NOTREADY MSET did not run")
    assert str(values[0]).endswith("1 of 2 parts ran")
    assert values[1] == b"OK"
    assert world.nodes[1].take() == []


async def test_mset_of_one_key_twice_keeps_the_last_value_key_by_key(world: World) -> None:
    a, b, _ = three(world)
    client = world.client()
    client.send(command("MSET", a, "old", b, "1", a, "new"))
    assert world.nodes[0].take() == [[b"MSET", a, b"old", a, b"new"]]
    world.nodes[0].reply(b"-TRYAGAIN\r\n")
    world.nodes[1].reply(OK)
    await world.settle()
    assert world.nodes[0].take() == [[b"MSET", a, b"new"]]
    world.nodes[0].reply(OK)
    await world.settle()
    assert client.values() == [b"OK"]


async def test_a_part_that_ran_overtakes_though_the_whole_is_not_answered(world: World) -> None:
    """SET a is turned away, the part of MSET on a runs, its other part is turned away too: SET a must not run now."""
    a, b, _ = three(world)
    client = world.client()
    client.send(command("SET", a, "1") + command("MSET", a, "2", b, "2"))
    world.nodes[0].take()
    world.nodes[0].reply(b"-LOADING Redis is loading the dataset in memory\r\n", OK)
    world.nodes[1].reply(b"-TRYAGAIN\r\n")
    await world.settle()
    assert world.nodes[0].take() == []
    assert world.nodes[1].take() == [[b"MSET", b, b"2"]]
    world.nodes[1].reply(OK)
    await world.settle()
    values = client.values()
    assert str(values[0]).startswith("NOTREADY SET did not run")
    assert values[1] == b"OK"
