"""A cut: what was sent before it is waited for, what blocks is kept, and writes after it wait at gates until then.

Over the real connections, with fake nodes that answer when the test says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from proxy.exchange.exchange import Exchange
from proxy.protocol.encode import command
from proxy.snapshots.barrier import Barrier, CutFailedError
from proxy.snapshots.links import Links
from proxy.upstream.reply_slot import Waiter
from routing.slot import slot_of
from routing.snapshot import Chain
from tests.proxy.world import Link, World, keys_of, world_of

ID = 7
OK, PONG = b"+OK\r\n", b"+PONG\r\n"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with world_of(2) as world:
        yield world


def cut(world: World) -> Barrier:
    preserver = world.exchange.preserver
    preserver.chain = Chain((ID,))
    preserver.newest = ID
    return Barrier(preserver, Links(world.upstreams, world.private))


class Drain:
    """A drain that runs, and what became of it."""

    def __init__(self, barrier: Barrier, nursery: trio.Nursery) -> None:
        self.barrier = barrier
        self.failure: str | None = None
        self.is_done = False
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        try:
            await self.barrier.drain(trio.current_time() + 1.0)
        except CutFailedError as failed:
            self.failure = str(failed)
        self.is_done = True


async def preserve(exchange: Exchange, key: bytes, resp: int = 2) -> bytes | None:
    return await exchange.preserver.preserve({slot_of(key): [key]}, resp, trio.current_time() + 1.0)


def link_of_preserve(world: World) -> Link:
    """Whence one preserve came to the first node, which is all that came."""
    ((link, words),) = [(link, words) for link in world.nodes[0].links for words in link.take()]
    assert words[0] == b"EVALSHA"
    return link


async def test_a_cut_waits_for_the_answers_to_what_was_sent_before(
    world: World, nursery: trio.Nursery
) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("SET", key, "1"))
    drain = Drain(cut(world), nursery)
    await wait_all_tasks_blocked()
    assert not drain.is_done
    world.nodes[0].reply(OK, PONG)
    await world.settle()
    assert drain.is_done
    assert drain.failure is None
    assert not world.exchange.preserver.gates


async def test_a_cut_fails_with_a_connection_that_owed_answers(world: World, nursery: trio.Nursery) -> None:
    client = world.client()
    client.send(command("SET", keys_of(world, 0)[0], "1"))
    drain = Drain(cut(world), nursery)
    await wait_all_tasks_blocked()
    world.nodes[0].lose()
    await world.settle()
    assert drain.is_done
    assert drain.failure is not None
    assert not world.exchange.preserver.gates


async def test_a_cut_fails_when_a_node_answers_too_late(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client = world.client()
    client.send(command("SET", keys_of(world, 0)[0], "1"))
    drain = Drain(cut(world), nursery)
    await trio.sleep(1.1)
    assert drain.failure is not None
    assert "in time" in drain.failure


async def test_reads_are_not_waited_for(world: World, nursery: trio.Nursery) -> None:
    client = world.client()
    client.send(command("GET", keys_of(world, 0)[0]))
    drain = Drain(cut(world), nursery)
    await wait_all_tasks_blocked()
    assert drain.is_done


async def test_a_key_is_not_preserved_before_an_earlier_write_of_its_slot_on_another_connection(
    world: World, nursery: trio.Nursery
) -> None:
    """The snapshot would show that write's other keys, and of this one the value from before."""
    key = keys_of(world, 0)[0]
    world.exchange.routes.use(3)
    for _ in range(20):
        await world.settle()
    client = world.client()
    client.send(command("SET", key, "1"))
    assert world.nodes[0].take() == [[b"SET", key, b"1"]]
    drain = Drain(cut(world), nursery)
    for resp in (2, 3):
        nursery.start_soon(preserve, world.exchange, key, resp)
    await wait_all_tasks_blocked()
    # On the same connection it goes behind the write; on the other it waits.
    came = [words[0] for words in world.nodes[0].take()]
    assert sorted(came) == [b"EVALSHA", b"PING"]
    world.nodes[0].reply(OK, *[PONG if name == b"PING" else b"*1\r\n:-1\r\n" for name in came])
    await world.settle()
    assert drain.failure is None
    assert [words[0] for words in world.nodes[0].take()] == [b"EVALSHA"]


async def test_a_preserve_for_an_earlier_snapshot_is_waited_for_as_a_write_is(
    world: World, nursery: trio.Nursery
) -> None:
    """Else it could run behind a write from after the cut, and keep that for the earlier snapshot."""
    key = keys_of(world, 0)[0]
    world.exchange.routes.use(3)
    for _ in range(20):
        await world.settle()
    preserver = world.exchange.preserver
    preserver.chain = Chain((ID - 1,))
    preserver.newest = ID - 1
    nursery.start_soon(preserve, world.exchange, key, 2)
    await world.settle()
    link_of_preserve(world)
    barrier = cut(world)
    preserver.chain = Chain((ID - 1, ID))
    drain = Drain(barrier, nursery)
    nursery.start_soon(preserve, world.exchange, key, 3)
    await world.settle()
    ((link, words),) = [(link, words) for link in world.nodes[0].links for words in link.take()]
    assert words == [b"PING"]
    link.reply(b"*1\r\n:0\r\n", PONG)
    await world.settle()
    assert drain.is_done
    links = [link for link in world.nodes[0].links for words in link.take() if words[0] == b"EVALSHA"]
    assert len(links) == 2  # both anew, for the later one


async def test_a_script_that_a_node_does_not_know_is_not_sent_for_an_earlier_snapshot(
    world: World, nursery: trio.Nursery
) -> None:
    key = keys_of(world, 0)[0]
    preserver = world.exchange.preserver
    preserver.chain = Chain((ID - 1,))
    preserver.newest = ID - 1
    nursery.start_soon(preserve, world.exchange, key, 2)
    await world.settle()
    link = link_of_preserve(world)
    cut(world)
    link.reply(b"-NOSCRIPT No matching script. Please use EVAL.\r\n")
    await world.settle()
    words = link.take()
    assert [name for request in words for name in request if b":m:%d:" % (ID - 1) in name] == []


async def test_a_transaction_with_watched_keys_that_is_answered_first_does_not_fail_the_cut(
    world: World, nursery: trio.Nursery
) -> None:
    """Its connection is given back when it is answered, and the answer to the cut's question is still to come."""
    node = world.nodes[0]
    private = await world.private.acquire(node.address, 2)
    link = node.links[-1]
    transaction = private.start(command("SET", "k", "1"), hash_slot=1)
    assert link.take() == [[b"SET", b"k", b"1"]]
    added = world.exchange.snapshots._abandoned.added_total
    drain = Drain(cut(world), nursery)
    await wait_all_tasks_blocked()
    assert link.take() == [[b"PING"]]
    link.reply(OK)
    await world.settle()
    assert await transaction.wait_reply() == OK
    world.private.release(private)
    await wait_all_tasks_blocked()
    again = await world.private.acquire(node.address, 2)
    reply = Waiter(command("GET", "k"))
    again.queue(reply)
    link.reply(PONG, b"$1\r\n1\r\n")
    await world.settle()
    assert drain.is_done
    assert drain.failure is None
    assert await reply.wait_reply() == b"$1\r\n1\r\n"
    assert world.exchange.snapshots._abandoned.added_total == added


async def test_what_a_blocked_command_may_write_is_kept_before_later_writes_of_its_slot(
    world: World, nursery: trio.Nursery
) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("BLPOP", key, "0"))
    await world.settle()
    assert [words[0] for words in world.nodes[0].take()] == [b"BLPOP"]
    drain = Drain(cut(world), nursery)
    nursery.start_soon(preserve, world.exchange, key)
    await wait_all_tasks_blocked()
    link = link_of_preserve(world)  # the barrier's; the other one waits
    assert not drain.is_done
    link.reply(b"*1\r\n:0\r\n")
    await world.settle()
    assert drain.is_done
    assert drain.failure is None
    assert world.nodes[0].take() == []  # it is known by now


async def test_what_blocks_is_kept_only_when_all_proxies_have_drained_and_is_held_all_the_same(
    world: World, nursery: trio.Nursery
) -> None:
    """Another proxy's write from before its cut may wake it; and until all have cut no write may go."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("BLPOP", key, "0"))
    await world.settle()
    world.nodes[0].take()
    all_drained = trio.Event()
    preserver = world.exchange.preserver
    barrier = cut(world)
    preserver.is_held = True
    nursery.start_soon(barrier.drain, trio.current_time() + 1.0, all_drained.wait)
    await world.settle()
    assert world.nodes[0].take() == []
    all_drained.set()
    await world.settle()
    link_of_preserve(world).reply(b"*1\r\n:0\r\n")
    await world.settle()
    writer = world.client()
    writer.send(command("LPUSH", key, "1"))
    await world.settle()
    assert world.nodes[0].take() == []
    preserver.is_held = False
    preserver.released.set()
    await world.settle()
    link_of_preserve(world)


async def test_a_cut_fails_while_a_command_blocks_on_several_keys_of_a_moving_slot(
    world: World, nursery: trio.Nursery
) -> None:
    """Its keys cannot be kept at one moment, and it may run between two."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("BLMOVE", key, b"{" + key + b"}to", "LEFT", "RIGHT", "0"))
    await world.settle()
    world.nodes[0].take()
    world.migrations[slot_of(key)] = (0, 1)
    world.see()
    drain = Drain(cut(world), nursery)
    await world.settle()
    assert drain.is_done
    assert drain.failure is not None
    assert "which is moving" in drain.failure
    assert not world.exchange.preserver.gates
