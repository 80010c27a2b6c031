"""What the proxy sends again by itself: within its budget, and nothing refused before its time."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from proxy.exchange.exchange import NO_RETRY
from routing.retry_budget import RetryBudget, RetryRules
from tests.proxy.exchange.test_open_requests import command, moved
from tests.proxy.world import DEADLINE_SECONDS, World, keys_of, world_of

LOADING = b"-LOADING Redis is loading the dataset in memory\r\n"


def limit(world: World, repetitions: int) -> RetryBudget:
    """So many, and no more."""
    rules = RetryRules(share=0.0, reserve_per_second=0.0, burst=repetitions)
    world.exchange.retries = RetryBudget(rules, trio.current_time())
    return world.exchange.retries


async def turn_away(world: World, seconds: float) -> int:
    """The first node is loading for so long; how many requests it has seen."""
    seen = 0
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        requests = world.nodes[0].take()
        seen += len(requests)
        world.nodes[0].reply(*[LOADING] * len(requests))
        await world.settle()
        await trio.sleep(0.005)
    return seen


async def test_without_a_place_in_the_budget_a_request_waits_until_its_deadline(
    autojump_clock: MockClock,
) -> None:
    async with world_of() as world:
        budget = limit(world, 3)
        client = world.client()
        client.send(command("SET", keys_of(world, 0)[0], "v"))
        assert await turn_away(world, DEADLINE_SECONDS - 0.2) == 1 + 3
        assert client.replies() == []
        assert await turn_away(world, 0.4) == 0
        (reply,) = client.replies()
        assert reply.startswith(b"-NOTREADY ")
        assert reply.count(NO_RETRY.encode()) == 1
        assert budget.taken_total == 3
        assert 20 < budget.refused_total < 100


async def test_a_request_that_waits_for_a_place_gets_it(autojump_clock: MockClock) -> None:
    async with world_of() as world:
        limit(world, 1)
        client = world.client()
        client.send(command("GET", keys_of(world, 0)[0]))
        assert await turn_away(world, 1.0) == 2
        limit(world, 1)
        await trio.sleep(0.15)
        await world.settle()
        world.nodes[0].reply(b"+v\r\n")
        await world.settle()
        assert client.values() == [b"v"]


async def test_many_clients_that_are_turned_away_do_not_become_the_load(autojump_clock: MockClock) -> None:
    """A thousand that are turned away, again and again, send it no more in all than the budget allows."""
    async with world_of() as world:
        key = keys_of(world, 0)[0]
        clients = [world.client() for _ in range(300)]
        limit(world, 100)
        for client in clients:
            client.send(command("GET", key))
        assert await turn_away(world, 2.0) == 300 + 100


async def test_reads_of_a_lost_connection_take_one_place_each(autojump_clock: MockClock) -> None:
    """One that no byte of was sent takes none: nobody has seen it."""
    async with world_of() as world:
        budget = limit(world, 10)
        client = world.client()
        client.send(command("GET", keys_of(world, 0)[0]) + command("GET", keys_of(world, 0)[1]))
        assert len(world.nodes[0].take()) == 2
        world.nodes[0].lose()
        await world.connect()
        for _ in range(2):
            await trio.sleep(0.2)
            world.nodes[0].reply(b"+v\r\n")
            await world.settle()
        assert client.values() == [b"v", b"v"]
        assert budget.taken_total == 2


async def test_following_a_moved_slot_takes_no_place() -> None:
    async with world_of() as world:
        budget = limit(world, 0)
        key = keys_of(world, 0)[0]
        client = world.client()
        client.send(command("GET", key))
        world.nodes[0].reply(moved(world, key, 1))
        await world.settle()
        world.nodes[1].reply(b"+v\r\n")
        await world.settle()
        assert client.values() == [b"v"]
        assert (budget.taken_total, budget.refused_total) == (0, 0)
