"""Requests that find no permit, driven with bytes alone: who waits, goes first, is refused; and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from proxy.settings import OverloadSettings, PriorityRuleSettings, Settings
from proxy.upstream.load import NodeLoad
from proxy.upstream.nodes import Lane
from routing.priority import Priority
from routing.slot import slot_of
from tests.proxy.exchange.test_open_requests import OK, command
from tests.proxy.world import Client, World, keys_of, world_of

ONE = Settings(overload=OverloadSettings(limit_min=1, limit_max=1, wait_critical_ms=1000, wait_normal_ms=20))
THREE = Settings(overload=OverloadSettings(limit_min=3, limit_max=3))


def load_of(world: World, index: int = 0) -> NodeLoad:
    return world.upstream(index).load


def owed(world: World, index: int = 0) -> int:
    """By the queues themselves."""
    address = world.nodes[index].address
    shared = [world.upstreams.connection(address, resp, lane) for resp in (2, 3) for lane in Lane]
    return sum(len(connection.owed) for connection in shared if connection is not None)


def prioritised(world: World, priority: str) -> Client:
    client = world.client()
    client.send(command("STEADY.PRIORITY", priority))
    assert client.values() == [b"OK"]
    return client


async def test_a_request_without_a_permit_is_sent_when_there_is_one() -> None:
    async with world_of(1, settings=ONE) as world:
        first, second = world.client(), world.client()
        first.send(command("GET", "a"))
        second.send(command("GET", "b"))
        assert world.nodes[0].take() == [[b"GET", b"a"]]
        assert load_of(world).waiting == 1
        world.nodes[0].reply(b"+1\r\n")
        world.turn()
        assert first.values() == [b"1"]
        assert world.nodes[0].take() == [[b"GET", b"b"]]
        world.nodes[0].reply(b"+2\r\n")
        world.turn()
        assert second.values() == [b"2"]
        assert load_of(world).in_flight == load_of(world).waiting == 0


async def test_a_waiting_request_holds_back_what_its_client_sent_after_it() -> None:
    """Promise 6, and one place in the queue for each client, whatever it pipelines."""
    async with world_of(2, settings=ONE) as world:
        [mine], [elsewhere] = keys_of(world, 0)[:1], keys_of(world, 1)[:1]
        first, second = world.client(), world.client()
        first.send(command("GET", mine))
        second.send(command("SET", mine, "1") + command("GET", elsewhere) + command("PING"))
        assert load_of(world).waiting == 1
        assert world.nodes[1].take() == []
        assert second.replies() == []
        assert world.nodes[0].take() == [[b"GET", mine]]
        world.nodes[0].reply(b"+1\r\n")
        world.turn()
        assert world.nodes[0].take() == [[b"SET", mine, b"1"]]
        assert world.nodes[1].take() == [[b"GET", elsewhere]]
        world.nodes[1].reply(b"+2\r\n")
        world.nodes[0].reply(OK)
        world.turn()
        assert second.values() == [b"OK", b"2", b"PONG"]


async def test_the_more_important_goes_first() -> None:
    async with world_of(1, settings=ONE) as world:
        busy = world.client()
        clients = [prioritised(world, name) for name in ("background", "normal", "critical")]
        busy.send(command("GET", "busy"))
        for number, client in enumerate(clients):
            client.send(command("GET", f"k{number}"))
        order = []
        for _ in range(4):
            [[_, key]] = world.nodes[0].take()
            order.append(key)
            world.nodes[0].reply(b"+v\r\n")
            world.turn()
        assert order == [b"busy", b"k2", b"k1", b"k0"]


async def test_the_last_permits_are_for_critical_alone() -> None:
    async with world_of(1, settings=THREE) as world:
        clients = [world.client() for _ in range(3)]
        for client in clients:
            client.send(command("GET", "k"))
        assert load_of(world).in_flight == 2  # 0.7 of 3
        prioritised(world, "critical").send(command("GET", "k"))
        assert load_of(world).in_flight == 3


async def test_who_waits_too_long_is_refused_and_told_when_to_come_back(autojump_clock: MockClock) -> None:
    """Promise 9. The node answers others meanwhile: while it answers nothing, nobody is refused."""
    async with world_of(1, settings=ONE) as world:
        important = prioritised(world, "critical")
        client = world.client()
        important.send(command("GET", "a"))
        client.send(command("GET", "b") + command("GET", "c") + command("PING"))
        began = trio.current_time()
        while not (replies := client.replies()):
            await trio.sleep(0.001)
            world.nodes[0].reply(b"+1\r\n")
            important.send(
                command("GET", "a")
            )  # in the same turn in which the permit comes free, or before it
            world.turn()
        assert 0.5 < trio.current_time() - began < 0.65  # 25 windows, and its wait
        assert len(replies) == 3  # what stood behind it has waited as long
        for reply in replies[:2]:
            assert reply.startswith(b"-OVERLOADED node node:7000 is overloaded and this one waited")
            assert b"(normal); retry after " in reply
        assert replies[2] == b"+PONG\r\n"
        assert load_of(world).shed_total == 2
        client.send(command("GET", "d"))  # a new one may wait again
        assert load_of(world).waiting == 1


async def test_a_node_that_answers_nothing_sheds_nobody_for_a_while(autojump_clock: MockClock) -> None:
    async with world_of(1, settings=ONE) as world:
        first, second = world.client(), world.client()
        first.send(command("GET", "a"))
        world.nodes[0].take()
        world.nodes[0].reply(b"+1\r\n")
        world.turn()
        first.send(command("GET", "a"))
        second.send(command("GET", "b"))
        await trio.sleep(0.5)
        assert second.replies() == []
        await trio.sleep(0.6)
        assert [reply[:11] for reply in second.replies()] == [b"-OVERLOADED"]


async def test_a_client_that_leaves_leaves_the_queue() -> None:
    async with world_of(1, settings=ONE) as world:
        first, second, third = (world.client() for _ in range(3))
        first.send(command("GET", "a"))
        second.send(command("GET", "b"))
        third.send(command("GET", "c"))
        second.connection.close("gone")
        assert load_of(world).waiting == 1
        world.nodes[0].reply(b"+1\r\n")
        world.turn()
        assert world.nodes[0].take() == [[b"GET", b"c"]]


async def test_a_permit_that_is_of_no_use_goes_to_the_next() -> None:
    """The slot of a waiting request moved to another node: it goes there, and the next gets the permit."""
    async with world_of(2, settings=ONE) as world:
        [moving, staying] = keys_of(world, 0)[:2]
        first, second, third = (world.client() for _ in range(3))
        first.send(command("GET", staying))
        second.send(command("GET", moving))
        third.send(command("GET", staying))
        world.owners[slot_of(moving)] = 1
        world.see()
        world.nodes[0].reply(b"+1\r\n")
        world.turn()
        assert world.nodes[1].take() == [[b"GET", moving]]
        assert world.nodes[0].take() == [[b"GET", staying]]


async def test_who_waits_for_a_node_that_is_lost_waits_for_its_return(autojump_clock: MockClock) -> None:
    async with world_of(1, settings=ONE) as world:
        first, second = world.client(), world.client()
        first.send(command("GET", "a"))
        second.send(command("GET", "b"))
        world.nodes[0].lose()
        world.turn()
        await world.connect()
        asked = []
        for _ in range(100):
            await trio.sleep(0.01)
            world.turn()
            asked += [key for _, key in world.nodes[0].take()]
            if (
                world.nodes[0].links
                and len(asked) > len(first.transport.written + second.transport.written) // 4
            ):
                world.nodes[0].reply(b"+1\r\n")
                world.turn()
        assert sorted(asked) == [b"a", b"b"]
        assert first.values() == second.values() == [b"1"]
        assert load_of(world).in_flight == owed(world) == 0


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        (command("MGET", "x", "y"), 2),
        (command("MULTI") + command("SET", "x", "1") + command("EXEC"), 3),
        (command("EVAL", "return 1", "1", "x"), 1),
        (command("SET", "x", "1", "EX", "10"), 1),
    ],
)
async def test_all_kinds_of_commands_wait(sent: bytes, asked: int) -> None:
    async with world_of(1, settings=ONE) as world:
        first, second = world.client(), world.client()
        first.send(command("GET", "a"))
        second.send(sent)
        assert world.nodes[0].take() == [[b"GET", b"a"]]
        assert load_of(world).waiting == 1
        world.nodes[0].reply(b"+1\r\n")
        world.turn()
        assert len(world.nodes[0].take()) == asked
        assert load_of(world).in_flight == owed(world) == asked


async def test_a_split_command_waits_for_a_permit_at_each_node() -> None:
    async with world_of(2, settings=ONE) as world:
        keys = [*keys_of(world, 0)[:2], *keys_of(world, 1)[:2]]
        busy = [world.client(), world.client()]
        busy[0].send(command("GET", keys[0]))
        busy[1].send(command("GET", keys[2]))
        client = world.client()
        client.send(command("MGET", *keys))
        for node in world.nodes:
            assert len(node.take()) == 1
        for node in world.nodes:
            node.reply(b"+1\r\n")
            world.turn()
        found = [len(node.take()) for node in world.nodes]
        assert found == [2, 2]
        for index, node in enumerate(world.nodes):
            node.reply(b"*1\r\n+v\r\n", b"*1\r\n+v\r\n")
            world.turn()
            assert load_of(world, index).in_flight == 0
        assert client.values() == [[b"v"] * 4]


async def test_rules_for_keys_and_the_connections_own_choice() -> None:
    rules = (
        PriorityRuleSettings("job:", "background"),
        PriorityRuleSettings("job:urgent:", "critical"),
    )
    async with world_of(1, settings=Settings(overload=OverloadSettings(rules=rules))) as world:
        client = world.client()
        client.send(command("STEADY.PRIORITY"))
        assert client.values() == [b"normal"]
        of = client.connection.priority_of
        assert (of(b"job:1"), of(b"job:urgent:1"), of(b"x")) == (
            Priority.BACKGROUND,
            Priority.CRITICAL,
            Priority.NORMAL,
        )
        client.send(command("STEADY.PRIORITY", "Critical") + command("STEADY.PRIORITY"))
        assert client.values() == [b"OK", b"critical"]
        assert of(b"job:1") == Priority.CRITICAL
        client.send(command("STEADY.PRIORITY", "AUTO") + command("STEADY.PRIORITY", "high"))
        assert client.replies()[1].startswith(b"-ERR 'high' is not a priority: write one of critical, normal")
        assert of(b"job:1") == Priority.BACKGROUND


async def test_tasks_wait_as_well(autojump_clock: MockClock) -> None:
    """Reads that follow a redirection go their way in a task."""
    async with world_of(1, settings=ONE) as world:
        first = world.client()
        first.send(command("GET", "a"))
        assert world.nodes[0].take() == [[b"GET", b"a"]]
        async with trio.open_nursery() as nursery:
            replies: list[bytes] = []

            async def ask(priority: int | None) -> None:
                raw = command("GET", "b")
                replies.append(
                    await world.exchange.execute(raw, 0, resp=2, repeatable=True, priority=priority)
                )

            nursery.start_soon(ask, int(Priority.NORMAL))
            await world.settle()
            assert world.nodes[0].take() == []
            nursery.start_soon(ask, None)  # the proxy's own
            await world.settle()
            assert world.nodes[0].take() == [[b"GET", b"b"]]
            world.nodes[0].reply(b"+1\r\n", b"+2\r\n")
            await world.settle()
            assert world.nodes[0].take() == [[b"GET", b"b"]]
            world.nodes[0].reply(b"+3\r\n")
            await world.settle()
        assert sorted(replies) == [b"+2\r\n", b"+3\r\n"]
        assert load_of(world).in_flight == 0


async def test_a_cancelled_task_leaves_no_permit_behind(autojump_clock: MockClock) -> None:
    async with world_of(1, settings=ONE) as world:
        first = world.client()
        first.send(command("GET", "a"))
        load = load_of(world)
        with trio.move_on_after(0.01):
            await load.permitted(Priority.NORMAL, trio.current_time() + 1)
        assert load.waiting == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.permitted, Priority.NORMAL, trio.current_time() + 1)
            await trio.testing.wait_all_tasks_blocked()
            world.nodes[0].reply(b"+1\r\n")
            world.turn()
            assert load.in_flight == 1  # the permit, which it does not know of yet
            nursery.cancel_scope.cancel()
        assert load.in_flight == 0


async def test_a_free_node_gets_a_limit_with_what_it_owes_by_then(autojump_clock: MockClock) -> None:
    """Until then nobody counts. Some of what is owed is answered in the very step in which the limit begins."""
    async with world_of(1) as world:
        client, load = world.client(), load_of(world)

        async def ask(rounds: int, late: int) -> None:
            """Ask for three each 2 ms; answer what was asked ``late`` rounds before."""
            for _ in range(rounds):
                client.send(command("GET", "k") * 3)
                await trio.sleep(0.002)
                world.nodes[0].take()
                if owed(world) > late * 3:
                    world.nodes[0].reply(*[b"+v\r\n"] * 3)
                world.turn()
                assert load.is_free or load.in_flight == owed(world)

        assert not load.is_free
        for _ in range(1500):
            client.send(command("GET", "k"))
            world.nodes[0].take()
            world.nodes[0].reply(b"+v\r\n")
            world.turn()
            await trio.sleep(0.002)
        assert load.is_free
        await ask(100, 20)
        assert not load.is_free
        assert load.facts(trio.current_time())["limit"] < 60
        assert client.replies()
        assert load.shed_total == 0


def steps() -> st.SearchStrategy[list[tuple[str, int]]]:
    return st.lists(
        st.tuples(
            st.sampled_from(["get", "mget", "multi", "reply", "leave", "critical", "lose", "move"]),
            st.integers(0, 3),
        ),
        max_size=40,
    )


@given(steps())
def test_whatever_happens_no_permit_is_lost_and_order_is_kept(steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        async with world_of(2, settings=THREE) as world:
            keys = [keys_of(world, 0)[0], keys_of(world, 1)[0]]
            clients = [world.client() for _ in range(4)]
            sent: list[int] = [0] * 4
            for what, who in steps:
                client = clients[who]
                if client.transport.is_closed:
                    continue
                match what:
                    case "get":
                        client.send(command("GET", keys[who % 2]) * 2)
                        sent[who] += 2
                    case "mget":
                        client.send(command("MGET", *keys))
                        sent[who] += 1
                    case "multi":
                        client.send(command("MULTI") + command("GET", keys[0]) + command("EXEC"))
                        sent[who] += 3
                    case "critical":
                        client.send(command("STEADY.PRIORITY", "CRITICAL"))
                        sent[who] += 1
                    case "reply":
                        answer_all(world, 1 + who)
                    case "leave":
                        client.connection.close("gone")
                    case "move":
                        world.owners[slot_of(keys[0])] = who % 2
                        world.see()
                    case "lose":
                        world.nodes[who % 2].lose()
                        world.turn()
                for index in range(2):
                    load = world.upstreams.loads.known(world.nodes[index].address)
                    assert load is None or load.is_free or load.in_flight == owed(world, index)
            for _ in range(200):
                await trio.sleep(0.01)
                world.turn()
                answer_all(world, 100)
            for index in range(2):
                load = load_of(world, index)
                assert load.in_flight == owed(world, index) == load.waiting == 0
            for client, count in zip(clients, sent, strict=True):
                if not client.transport.is_closed:
                    assert len(client.replies()) == count

    trio.run(run, clock=MockClock(autojump_threshold=0))


def answer_all(world: World, rounds: int) -> None:
    """Each node answers what it was asked, as it would; what is not for it with MOVED."""
    for _ in range(rounds):
        is_asked = False
        for index, node in enumerate(world.nodes):
            for reply in answers(world, index, node.take()):
                is_asked = True
                node.reply(reply)
        world.turn()
        if not is_asked:
            return


def answers(world: World, index: int, requests: list[list[bytes]]) -> Iterator[bytes]:
    for request in requests:
        match request[0]:
            case b"MULTI":
                yield OK
            case b"EXEC":
                yield b"*1\r\n+v\r\n"
            case b"MGET":
                yield b"*%d\r\n" % (len(request) - 1) + b"+v\r\n" * (len(request) - 1)
            case _:
                slot = slot_of(request[1])
                if world.owners[slot] == index:
                    yield b"+v\r\n"
                else:
                    yield b"-MOVED %d node:%d\r\n" % (slot, 7000 + world.owners[slot])
