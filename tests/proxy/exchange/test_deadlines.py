"""Nothing but a blocking command waits past its deadline plus a second, whatever the node does meanwhile."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from proxy.protocol.replies import ServerError
from tests.proxy.exchange.test_open_requests import OK, command, moved
from tests.proxy.exchange.test_transaction import block
from tests.proxy.world import DEADLINE_SECONDS, Client, World, keys_of


async def seconds_until_answered(
    world: World, client: Client, request: bytes, *, quiet_seconds: float = 0.0
) -> tuple[float, object]:
    """How long the last reply to ``request`` takes while the overdue watch runs, and the reply."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.upstreams.watch)
        await trio.sleep(quiet_seconds)
        began = trio.current_time()
        client.send(request)
        client.replies()  # of MULTI and what it queued
        while not (values := client.values()):
            assert trio.current_time() < began + 4 * DEADLINE_SECONDS
            await world.settle()
            await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    return trio.current_time() - began, values[-1]


@pytest.mark.parametrize("quiet_seconds", [0.0, 1.23, 2 * DEADLINE_SECONDS])
@pytest.mark.parametrize("shape", ["single", "split", "block"])
async def test_a_read_from_a_node_that_stalls(
    autojump_clock: MockClock, world: World, shape: str, quiet_seconds: float
) -> None:
    """A node that stops reading for good, its new connections too: the read's time began when it was sent."""
    key, other = keys_of(world, 0)[:2]
    client = world.client()
    requests = {
        "single": command("GET", key),
        "split": command("MGET", key, other),
        "block": block(command("GET", key)),
    }
    took, value = await seconds_until_answered(world, client, requests[shape], quiet_seconds=quiet_seconds)
    assert isinstance(value, ServerError)
    assert str(value).startswith("NOTREADY")
    assert took <= DEADLINE_SECONDS + 1


async def test_watch_at_a_node_that_stalls(autojump_clock: MockClock, world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    took, value = await seconds_until_answered(world, client, command("WATCH", key))
    assert str(value).startswith("NOTREADY")
    assert took <= DEADLINE_SECONDS + 1
    assert world.private.in_use == 0


async def test_a_watched_block_at_a_node_that_stalls(autojump_clock: MockClock, world: World) -> None:
    """Its EXEC was sent, so nobody knows whether it ran (promise 5)."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("WATCH", key))
    await world.settle()
    world.nodes[0].reply(OK)
    await world.settle()
    client.replies()
    took, value = await seconds_until_answered(world, client, block(command("SET", key, "1")))
    assert str(value).startswith("OUTCOMEUNKNOWN")
    assert took <= DEADLINE_SECONDS + 1
    assert world.private.in_use == 0


async def test_a_block_sent_again_late_to_a_node_that_stalls(autojump_clock: MockClock, world: World) -> None:
    """Time that the block waited for its node counts."""
    key = keys_of(world, 0)[0]
    client = world.client()
    world.nodes[0].accepts = False
    world.nodes[0].lose()
    await world.settle()

    async def come_back() -> None:
        await trio.sleep(DEADLINE_SECONDS - 1.5)
        world.nodes[0].accepts = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        took, value = await seconds_until_answered(world, client, block(command("SET", key, "1")))
    assert str(value).startswith("OUTCOMEUNKNOWN")
    assert took <= DEADLINE_SECONDS + 1


async def test_a_blocking_command_sent_to_and_fro(autojump_clock: MockClock, world: World) -> None:
    """It may wait at a node for ever, but not travel for ever: two nodes that each name the other."""
    key = keys_of(world, 0)[0]
    client = world.client()
    began = trio.current_time()
    client.send(command("BLPOP", key, "0"))
    while not (values := client.values()):
        assert trio.current_time() - began <= 2 * DEADLINE_SECONDS
        await world.settle()
        for index in (0, 1):
            if world.nodes[index].take():
                world.nodes[index].reply(moved(world, key, 1 - index))
        await trio.sleep(0.01)
    assert str(values[-1]).startswith("NOTREADY")


async def test_a_process_that_stood_still_does_not_blame_the_nodes(
    mock_clock: MockClock, world: World
) -> None:
    """Replies may wait unread in its sockets, and are read before the next look at who is overdue."""
    key = keys_of(world, 0)[0]
    client = world.client()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.upstreams.watch)
        await trio.testing.wait_all_tasks_blocked()
        client.send(command("GET", key))
        for _ in range(2):
            mock_clock.jump(0.1)
            await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(2 * DEADLINE_SECONDS)
        await trio.testing.wait_all_tasks_blocked()
        assert world.upstreams.overdue_total == 0
        for _ in range(3):
            mock_clock.jump(0.1)
            await trio.testing.wait_all_tasks_blocked()
        assert world.upstreams.overdue_total == 1
        nursery.cancel_scope.cancel()
