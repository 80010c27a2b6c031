"""MULTI ... EXEC: one block to one node, whole or not at all, and sent again only when it did not run (promise 5)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from proxy.protocol.replies import ServerError
from proxy.settings import CommandSettings, CrossSlotTransactions, Settings
from tests.proxy.exchange.test_open_requests import OK, ask, command, moved
from tests.proxy.world import World, keys_of, world_of

QUEUED = b"+QUEUED\r\n"


def block(*commands: bytes) -> bytes:
    return command("MULTI") + b"".join(commands) + command("EXEC")


async def test_a_block_goes_out_in_one_piece(world: World) -> None:
    key = keys_of(world, 0)[0]
    client, other = world.client(), world.client()
    client.send(command("MULTI") + command("SET", key, "1"))
    other.send(command("SET", key, "2"))
    client.send(command("INCR", key) + command("EXEC"))
    other.send(command("SET", key, "3"))
    assert world.nodes[0].take() == [
        [b"SET", key, b"2"],
        [b"MULTI"],
        [b"SET", key, b"1"],
        [b"INCR", key],
        [b"EXEC"],
        [b"SET", key, b"3"],
    ]
    world.nodes[0].reply(OK, OK, QUEUED, QUEUED, b"*2\r\n+OK\r\n:2\r\n", OK)
    world.turn()
    assert client.values() == [b"OK", b"QUEUED", b"QUEUED", [b"OK", 2]]
    assert other.values() == [b"OK", b"OK"]


async def test_an_error_within_is_the_clients(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(block(command("INCR", key)))
    world.nodes[0].reply(OK, QUEUED, b"*1\r\n-ERR value is not an integer or out of range\r\n")
    world.turn()
    assert "not an integer" in str(client.values()[-1][0])


@pytest.mark.parametrize("asked", [True, False])
async def test_a_block_turned_away_when_queued_goes_again_whole(world: World, asked: bool) -> None:
    """MOVED and ASK come at the queued command; EXEC is then EXECABORT, which the client never sees."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(block(command("SET", key, "1"), command("GET", key)))
    world.nodes[0].take()
    away = ask(world, key, 1) if asked else moved(world, key, 1)
    world.nodes[0].reply(OK, away, away, b"-EXECABORT Transaction discarded because of previous errors.\r\n")
    await world.settle()
    names = [words[0] for words in world.nodes[1].take()]
    # Within MULTI an ASKING lasts until EXEC.
    assert names == [b"ASKING"] * asked + [b"MULTI", b"SET", b"GET", b"EXEC"]


async def test_a_block_that_had_to_wait_follows_ask(autojump_clock: MockClock, world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(block(command("SET", key, "1")))
    for refusal in [b"-TRYAGAIN\r\n", b"-TRYAGAIN\r\n", ask(world, key, 1)]:
        assert len(world.nodes[0].take()) == 3
        world.nodes[0].reply(OK, refusal, b"-EXECABORT Transaction discarded because of previous errors.\r\n")
        await world.settle()
        if refusal.startswith(b"-TRYAGAIN"):
            await trio.sleep(0.2)
            await world.settle()
    assert [words[0] for words in world.nodes[1].take()] == [b"ASKING", b"MULTI", b"SET", b"EXEC"]
    world.nodes[1].reply(OK, OK, QUEUED, b"*1\r\n+OK\r\n")
    await world.settle()
    assert client.values()[-1] == [b"OK"]


async def test_a_block_that_was_sent_is_never_repeated(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(block(command("SET", key, "1")))
    world.nodes[0].take()
    world.nodes[0].lose()
    await world.settle()
    await world.connect()
    assert isinstance(client.values()[-1], ServerError)
    assert world.nodes[0].take() == []
    assert world.exchange.unknown_outcomes_total == 1


async def test_a_block_of_reads_is_repeated(autojump_clock: MockClock, world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(block(command("GET", key)))
    world.nodes[0].take()
    world.nodes[0].lose()
    await world.settle()
    await world.connect()
    await trio.sleep(0.2)
    await world.settle()
    assert [words[0] for words in world.nodes[0].take()] == [b"MULTI", b"GET", b"EXEC"]
    world.nodes[0].reply(OK, QUEUED, b"*1\r\n$1\r\nv\r\n")
    await world.settle()
    assert client.values()[-1] == [b"v"]


async def test_several_slots_are_refused_with_the_setting_that_allows_them(world: World) -> None:
    a, b = keys_of(world, 0)[0], keys_of(world, 1)[0]
    client = world.client()
    client.send(block(command("SET", a, "1"), command("SET", b, "2")) + command("PING"))
    values = client.values()
    assert str(values[3]).startswith("CROSSSLOT Keys in request don't hash to the same slot")
    assert 'cross_slot_transactions = "per_slot"' in str(values[3])
    assert values[4] == b"PONG"
    assert [node.take() for node in world.nodes] == [[], [], []]


async def test_several_slots_one_transaction_each_in_order() -> None:
    settings = Settings(commands=CommandSettings(cross_slot_transactions=CrossSlotTransactions.PER_SLOT))
    async with world_of(3, settings=settings) as world:
        a, b = keys_of(world, 0)[0], keys_of(world, 1)[0]
        client = world.client()
        client.send(block(command("SET", b, "1"), command("GET", a), command("GET", b)))
        await world.settle()
        assert world.nodes[0].take() == []
        assert world.nodes[1].take() == [[b"MULTI"], [b"SET", b, b"1"], [b"GET", b], [b"EXEC"]]
        world.nodes[1].reply(OK, QUEUED, QUEUED, b"*2\r\n+OK\r\n$1\r\n1\r\n")
        await world.settle()
        assert world.nodes[0].take() == [[b"MULTI"], [b"GET", a], [b"EXEC"]]
        world.nodes[0].reply(OK, QUEUED, b"*1\r\n$1\r\na\r\n")
        await world.settle()
        assert client.values()[-1] == [b"OK", b"a", b"1"]


async def test_a_refused_command_discards_the_block(world: World) -> None:
    client = world.client()
    client.send(command("MULTI") + command("NOSUCH") + command("EXEC") + command("EXEC") + command("DISCARD"))
    values = client.values()
    assert [str(value).split()[0] for value in values[1:]] == ["ERR", "EXECABORT", "ERR", "ERR"]


async def test_watch_pins_a_connection_and_a_broken_one_aborts(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("WATCH", key))
    await world.settle()
    assert world.nodes[0].take() == [[b"WATCH", key]]
    world.nodes[0].reply(OK)
    await world.settle()
    client.send(block(command("SET", key, "1")))
    await world.settle()
    assert [words[0] for words in world.nodes[0].take()] == [b"MULTI", b"SET", b"EXEC"]
    world.nodes[0].reply(OK, QUEUED, b"*-1\r\n")
    await world.settle()
    assert client.values() == [b"OK", b"OK", b"QUEUED", None]
    client.send(command("WATCH", key))
    await world.settle()
    world.nodes[0].reply(OK)
    await world.settle()
    world.nodes[0].lose()
    await world.settle()
    client.send(block(command("SET", key, "1")))
    await world.settle()
    assert client.values()[-1] is None


async def test_a_block_whose_first_bytes_fail_is_sent_whole_on_the_next_connection(
    autojump_clock: MockClock,
) -> None:
    """The node is gone and nobody noticed: a task's first step finds out, and the other steps are lost with it."""
    settings = Settings(commands=CommandSettings(cross_slot_transactions=CrossSlotTransactions.PER_SLOT))
    async with world_of(2, settings=settings) as world:
        a, b = keys_of(world, 0)[0], keys_of(world, 1)[0]
        client = world.client()
        client.send(block(command("SET", a, "1"), command("SET", b, "1")))
        world.nodes[0].lose()
        await trio.testing.wait_all_tasks_blocked()  # no turn: the task runs first
        await world.connect()
        await trio.sleep(0.2)
        await world.settle()
        assert [words[0] for words in world.nodes[0].take()] == [b"MULTI", b"SET", b"EXEC"]


async def test_a_refused_watch_keeps_the_earlier_one(world: World) -> None:
    """Else the next client would get a connection that watches this one's keys."""
    key = keys_of(world, 0)[0]
    client = world.client()
    for reply in (OK, b"-NOPERM No permissions to access a key\r\n"):
        client.send(command("WATCH", key))
        await world.settle()
        world.nodes[0].take()
        world.nodes[0].reply(reply)
        await world.settle()
    assert world.private.in_use == 1
    client.connection.on_gone("left")
    assert world.private.in_use == 0
    other = world.client()
    other.send(command("WATCH", key))
    await world.settle()
    assert other.connection.watch is None
    world.nodes[0].take()
    world.nodes[0].reply(OK)
    await world.settle()
    other.send(block(command("GET", key)))
    await world.settle()
    assert [words[0] for words in world.nodes[0].take()] == [b"MULTI", b"GET", b"EXEC"]
    assert client.connection.watch is None


async def test_a_watched_block_whose_multi_is_refused(world: World) -> None:
    """Its commands ran one by one, its client is told so, and its connection, which watches still, is closed."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("WATCH", key))
    await world.settle()
    world.nodes[0].reply(OK)
    await world.settle()
    client.send(block(command("SET", key, "1")))
    await world.settle()
    world.nodes[0].reply(
        b"-NOPERM this user has no permissions to run 'multi'\r\n", OK, b"-ERR EXEC without MULTI\r\n"
    )
    await world.settle()
    assert "may have run one by one" in str(client.values()[-1])
    assert world.private.in_use == 0
    assert not any(idle for idle in world.private._idle.values())
