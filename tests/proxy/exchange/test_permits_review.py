"""Faults that a review of permits found, each as the smallest test that shows it."""

from __future__ import annotations

import itertools

import pytest
import trio
from trio.testing import MockClock

from proxy.settings import ClientSettings, OverloadSettings, PriorityRuleSettings, Settings
from proxy.upstream.load import NodeLoad
from routing.priority import Priority
from routing.slot import slot_of
from tests.proxy.exchange.test_open_requests import command
from tests.proxy.exchange.test_permits import (
    ONE,
    load_of,
    owed,
    prioritised,
)
from tests.proxy.exchange.test_snapshot_writes import ID, serve
from tests.proxy.world import in_turn, keys_of, world_of


async def test_a_split_command_comes_through_between_two_busy_nodes(autojump_clock: MockClock) -> None:
    """Or is refused: it must not wait at one node, then at the other, and so on for ever."""
    async with world_of(2, settings=ONE) as world:
        keys = [keys_of(world, index)[0] for index in range(2)]
        busy = [[world.client() for _ in range(3)] for _ in range(2)]
        for clients, key in zip(busy, keys, strict=True):
            for client in clients:
                client.send(command("GET", key))
        split = world.client()
        split.send(command("MGET", *keys))
        began = trio.current_time()
        for turn in itertools.count():
            await trio.sleep(0.002)
            node = world.nodes[turn % 2]
            for words in node.take():
                node.reply(b"+v\r\n" if words[0] == b"GET" else b"*1\r\n+v\r\n")
            world.turn()
            for clients, key in zip(busy, keys, strict=True):
                for client in clients:
                    if client.replies():
                        client.send(command("GET", key))
            if split.replies() or trio.current_time() - began > 30:
                break
        assert trio.current_time() - began < 6  # the request's deadline is 5 s


async def test_who_waits_for_a_slots_former_owner_goes_to_the_new_one(autojump_clock: MockClock) -> None:
    """A failover: the old primary hangs, another node has its slots."""
    async with world_of(2, settings=ONE) as world:
        [a, b] = keys_of(world, 0)[:2]
        first, second = world.client(), world.client()
        first.send(command("GET", a))
        second.send(command("GET", b))
        assert load_of(world, 0).waiting == 1
        world.owners = [1] * len(world.owners)
        world.see()
        for _ in range(300):
            await trio.sleep(0.005)
            world.turn()
            for _words in world.nodes[1].take():
                world.nodes[1].reply(b"+new\r\n")
            world.turn()
        assert second.replies() == [b"+new\r\n"]


@pytest.mark.parametrize("name", ["MGET", "DEL"])
async def test_a_large_split_command_after_a_lost_connection(name: str, autojump_clock: MockClock) -> None:
    """It is done key by key then. The node is idle and answers at once: nobody is refused, nothing is half done."""
    async with world_of(1) as world:
        client = world.client()
        world.nodes[0].lose()
        world.turn()
        client.send(command(name, *[b"{t}%d" % n for n in range(2000)]))
        for _ in range(500):
            await trio.sleep(0.001)
            for words in world.nodes[0].take():
                world.nodes[0].reply(b"*1\r\n+v\r\n" if words[0] == b"MGET" else b":1\r\n")
            world.turn()
        [reply] = client.replies()
        assert reply[:1] in b"*:", reply


async def test_a_rule_for_keys_holds_for_requests_that_are_sent_again(autojump_clock: MockClock) -> None:
    rules = (PriorityRuleSettings("urgent:", "critical"),)
    settings = Settings(overload=OverloadSettings(limit_min=1, limit_max=1, rules=rules))
    async with world_of(2, settings=settings) as world:
        key = next(b"urgent:%d" % n for n in range(100) if world.owners[slot_of(b"urgent:%d" % n)] == 0)
        busy, client = prioritised(world, "critical"), world.client()
        client.send(command("GET", key))
        busy.send(command("GET", keys_of(world, 1)[0]))
        world.nodes[0].reply(b"-MOVED %d node:7001\r\n" % slot_of(key))
        world.turn()
        await trio.testing.wait_all_tasks_blocked()
        load = load_of(world, 1)
        [waiter] = [waiter for queue in load._queues for waiter in queue]
        assert waiter.priority is Priority.CRITICAL


async def test_what_comes_after_a_refusal_waits_as_anything_new_does(autojump_clock: MockClock) -> None:
    """Also if the client's last bytes are always a part of a request, as with large values or long pipelines."""
    async with world_of(1, settings=ONE) as world:
        important, client = prioritised(world, "critical"), world.client()
        important.send(command("GET", "a"))
        get = command("GET", "b")
        client.send(get + get[:5])
        while not client.replies():
            await trio.sleep(0.001)
            world.nodes[0].reply(b"+1\r\n")
            important.send(command("GET", "a"))
            world.turn()
        for _ in range(5):
            await trio.sleep(10)
            client.replies()  # of the one before, whose wait is over
            client.send(get[5:] + get[:5])  # new: what it waited until now was for its own client
            assert client.replies() == []


async def test_who_does_not_wait_makes_nobody_leave() -> None:
    """What stands behind a refused request may not wait, so it takes no place from who waits."""
    settings = Settings(overload=OverloadSettings(limit_min=1, limit_max=1, waiting_max=1))
    async with world_of(1, settings=settings) as world:
        busy, background = world.client(), prioritised(world, "background")
        busy.send(command("GET", "a"))
        background.send(command("GET", "b"))
        hurried = world.client()
        hurried.connection.permits._waited_seconds = 0.02  # as behind a request that was shed
        hurried.send(command("GET", "c"))
        assert hurried.replies()[0].startswith(b"-OVERLOADED")
        assert background.replies() == []


async def test_the_error_of_what_stands_behind_a_refused_request_is_true(autojump_clock: MockClock) -> None:
    async with world_of(1, settings=ONE) as world:
        important, client = prioritised(world, "critical"), world.client()
        important.send(command("GET", "a"))
        client.send(command("GET", "b") * 2)
        while not (replies := client.replies()):
            await trio.sleep(0.001)
            world.nodes[0].reply(b"+1\r\n")
            important.send(command("GET", "a"))
            world.turn()
        assert b"waited 0 ms" not in replies[1]


async def test_a_permit_given_while_free_is_counted_when_a_limit_comes() -> None:
    """Who waited holds one that is not used yet."""
    async with world_of(1, settings=ONE) as world:
        load = load_of(world)
        busy = world.client()
        busy.send(command("GET", "a"))
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                reply = await world.exchange.execute(
                    command("GET", "b"), 0, resp=2, repeatable=True, priority=int(Priority.NORMAL)
                )
                assert reply == b"+2\r\n"

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            load.limiter.is_free = True
            load._adopt_limit()
            world.nodes[0].reply(b"+1\r\n")
            world.turn()  # the task is told, and has not run yet
            load.limiter.is_free = False
            load._adopt_limit()
            await trio.testing.wait_all_tasks_blocked()
            assert load.in_flight == owed(world) == 1
            world.nodes[0].reply(b"+2\r\n")
            world.turn()


async def test_a_wait_is_never_less_than_nothing(autojump_clock: MockClock) -> None:
    """Both in one turn: the wait begins by the clock, and ends by the time at which the turn began."""
    async with world_of(1, settings=ONE) as world:
        load = load_of(world)
        busy, client = world.client(), world.client()
        busy.send(command("GET", "a"))
        world.hub.now = trio.current_time() - 0.001  # the turn began a millisecond ago
        with in_turn(world.hub):
            client.connection.receive(command("GET", "b"))
            load.on_replies(1, world.hub.now)
            load.serve_waiting(world.hub.now)
        found = load._loads.waits[Priority.NORMAL]
        assert found.sum >= 0


async def test_a_turns_round_trip_is_of_that_turns_requests(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The middle one is timed, not one of the turn before."""
    samples: list[float] = []
    monkeypatch.setattr(NodeLoad, "on_round_trip", lambda self, seconds, *_: samples.append(seconds))
    async with world_of(1) as world:
        client = world.client()
        for _ in range(2):
            await trio.sleep(0.01)
            world.hub.now = trio.current_time()
            client.send(command("GET", "k") * 10)
        await trio.sleep(0.01)
        world.nodes[0].reply(*[b"+v\r\n"] * 10)
        world.turn()
        await trio.sleep(0.01)
        world.nodes[0].reply(*[b"+v\r\n"] * 10)
        world.turn()
        assert samples == [pytest.approx(0.02), pytest.approx(0.02)]


async def test_a_client_with_much_to_send_uses_the_permits_that_it_gets(autojump_clock: MockClock) -> None:
    """And what it sends meanwhile stays in its socket (promise 7)."""
    async with world_of(1, settings=ONE) as world:
        load = load_of(world)
        load.tighten(0.99)  # a migration: so it has a limit all the time
        others = [world.client() for _ in range(2)]
        get = command("GET", "b" * 1000)
        for other in others:
            other.send(command("GET", "a"))
        client = world.client()
        asked = most = answered = 0
        for _ in range(400):
            if not client.transport.is_paused:
                client.send(get * 64)  # it has more and more
            await trio.sleep(0.002)
            for words in world.nodes[0].take():
                asked += words[1] != b"a"
                world.nodes[0].reply(b"+v\r\n")
            world.turn()
            answered += len(client.replies())
            for other in others:
                if other.replies():
                    other.send(command("GET", "a"))
            most = max(most, client.connection._unread_bytes)
        assert most < 1024 * 1024
        assert asked == answered > 100


async def test_a_request_on_a_moving_slot_uses_the_permit_that_it_waited_for() -> None:
    async with world_of(2, settings=ONE) as world:
        moving, staying = keys_of(world, 0)[:2]
        world.migrations[slot_of(moving)] = (0, 1)
        world.see()
        first, second, third = (world.client() for _ in range(3))
        first.send(command("GET", staying))
        second.send(command("GET", moving))
        third.send(command("GET", staying))
        assert world.nodes[0].take() == [[b"GET", staying]]
        world.nodes[0].reply(b"+1\r\n")
        await world.settle()
        assert world.nodes[0].take() == [[b"GET", moving]]


async def test_the_shed_rate_that_others_pace_themselves_by_is_of_late(autojump_clock: MockClock) -> None:
    async with world_of(1, settings=ONE) as world:
        load = load_of(world)
        load.tighten(0.99)
        important = prioritised(world, "critical")
        clients = [world.client() for _ in range(20)]
        important.send(command("GET", "a"))
        for _ in range(2000):
            for client in clients:
                if not client.connection.permits.is_waiting:
                    client.send(command("GET", "b"))
            await trio.sleep(0.001)
            world.nodes[0].reply(b"+1\r\n")
            important.send(command("GET", "a"))
            world.turn()
        for client in clients:
            client.connection.close("gone")
        while world.nodes[0].take():
            world.nodes[0].reply(b"+1\r\n")
            world.turn()
        await trio.sleep(3600)
        assert load.facts(trio.current_time())["shed_per_answered"] == 0


async def test_a_node_that_left_is_forgotten(autojump_clock: MockClock) -> None:
    """Else its figures stay; and where a replica became a primary, two kinds of connections' are added up."""
    async with world_of(2) as world:
        gone = world.nodes[1]
        world.owners = [0] * len(world.owners)
        world.nodes = world.nodes[:1]
        world.see()
        await trio.sleep(60)
        assert not [each for each in world.upstreams.connections() if each.address == gone.address]
        assert world.upstreams.loads.known(gone.address) is None
        gone.lose()


async def test_a_herd_of_clients_at_the_start_is_served(autojump_clock: MockClock) -> None:
    """Each sends one GET, up to a thousand in one turn, as the hub takes them. The node answers all within a turn."""
    async with world_of(1) as world:
        clients = [world.client() for _ in range(3000)]
        for first in range(0, len(clients), 1000):
            with in_turn(world.hub):
                for client in clients[first : first + 1000]:
                    client.connection.receive(command("GET", "k"))
            await trio.sleep(0.005)
            world.nodes[0].reply(*[b"+v\r\n"] * len(world.nodes[0].take()))
            world.turn()
        for _ in range(100):
            await trio.sleep(0.001)
            world.nodes[0].reply(*[b"+v\r\n"] * len(world.nodes[0].take()))
            world.turn()
        replies = [client.replies() for client in clients]
        assert sum(reply != [b"+v\r\n"] for reply in replies) == 0


async def test_a_write_that_has_no_permit_costs_the_node_nothing() -> None:
    """While a snapshot is open: it waits first, and what it writes is preserved when it may go."""
    async with world_of(1, settings=ONE) as world:
        serve(world, ID)
        load = load_of(world)
        load.tighten(0.99)
        busy = world.client()
        busy.send(command("GET", "a"))
        assert world.nodes[0].take() == [[b"GET", b"a"]]
        for number in range(5):
            world.client().send(command("SET", f"k{number}", "v"))
        await world.settle()
        assert [words[0] for words in world.nodes[0].take()] == []


async def test_a_half_closed_client_gets_the_refusal_that_comes_at_once() -> None:
    """Its replies waited to be sent, and so did its last request; when that is looked at, the queue is full."""
    settings = Settings(
        overload=OverloadSettings(limit_min=1, limit_max=1, waiting_max=1),
        clients=ClientSettings(unsent_bytes_max=64),
    )
    async with world_of(1, settings=settings) as world:
        load_of(world).set_calm(False, trio.current_time())
        busy, waiting, client = (world.client() for _ in range(3))
        busy.send(command("GET", "a"))
        waiting.send(command("GET", "b"))
        client.transport.room = 0
        client.send(command("PING") * 20)
        client.send(command("EVAL", "return 1", "1", "x"))
        client.end()
        client.transport.room = None
        client.drain()
        assert client.replies()[20:], "closed, and the last request has no reply"
