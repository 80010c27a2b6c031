"""A client connection driven with bytes alone: promises 6 and 7."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from proxy.frontend.client import HELD_BYTES_MAX
from proxy.protocol.requests import RequestParser
from proxy.settings import ClientSettings
from tests.proxy.exchange.test_open_requests import OK, command
from tests.proxy.world import World, keys_of, world_of


async def test_requests_cut_anywhere(world: World) -> None:
    key = keys_of(world, 0)[0]
    data = command("SET", key, "v" * 50) + command("PING") + b"ECHO 'a b'\r\n" + command("GET", key) + b"\r\n"
    for size in range(1, len(data) + 1, 3):
        client = world.client()
        for at in range(0, len(data), size):
            client.send(data[at : at + size])
        assert world.nodes[0].take() == [[b"SET", key, b"v" * 50], [b"GET", key]]
        world.nodes[0].reply(OK, b"$1\r\nv\r\n")
        world.turn()
        assert client.values() == [b"OK", b"PONG", b"a b", b"v"]


async def test_a_protocol_error_comes_after_what_is_owed_then_the_end(world: World) -> None:
    """As Redis: earlier requests are answered, then the error, then the connection closes."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("GET", key) + b"*1\r\n$x\r\n" + command("GET", key))
    assert client.replies() == []
    assert world.nodes[0].take() == [[b"GET", key]]
    world.nodes[0].reply(b"+v\r\n")
    world.turn()
    assert client.replies() == [b"+v\r\n", b"-ERR Protocol error: invalid bulk length\r\n"]
    assert client.transport.is_closed
    client.connection.receive(b"more")
    assert world.server.client_count == 0


async def test_a_half_closed_client_gets_its_replies_then_the_end(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("PING") + command("GET", key) + b"*1\r\n$4\r\nPI")
    client.end()
    assert client.values() == [b"PONG"]
    assert not client.transport.is_closed
    world.nodes[0].reply(b"+v\r\n")
    world.turn()
    assert client.values() == [b"v"]
    assert client.transport.is_closed


async def test_an_ended_client_that_reads_late_gets_all() -> None:
    """Half-closed, and its replies past a limit: what it sent before is dispatched when it reads, then the end."""
    async with world_of(1, clients=ClientSettings(unsent_bytes_max=1000)) as world:
        client = world.client()
        client.transport.room = 0
        client.send(command("ECHO", "x" * 2000))
        assert client.transport.is_paused
        client.send(command("ECHO", "y"))  # was in the socket already
        client.end()
        assert not client.transport.is_closed
        assert client.values() == [b"x" * 2000]
        client.transport.room = None
        client.drain()
        assert client.values() == [b"y"]
        assert client.transport.is_closed


async def test_pipelining_past_the_limit_pauses_and_resumes_at_half() -> None:
    """Promise 7: open requests of one client are bounded, its other bytes wait, nothing is lost."""
    async with world_of(1, clients=ClientSettings(open_requests_max=10)) as world:
        client = world.client()
        client.send(b"".join(command("GET", str(n)) for n in range(25)))
        assert len(world.nodes[0].take()) == 10
        assert client.transport.is_paused
        for n in range(4):
            world.nodes[0].reply(b":%d\r\n" % n)
        world.turn()
        assert world.nodes[0].take() == []
        assert client.transport.is_paused
        world.nodes[0].reply(b":4\r\n")
        world.turn()
        taken = 10 + len(world.nodes[0].take())
        assert taken == 15
        for n in range(5, 25):
            world.nodes[0].reply(b":%d\r\n" % n)
            world.turn()
        assert client.values() == list(range(25))
        assert not client.transport.is_paused


async def test_a_client_that_never_reads_is_sent_no_more_work_and_then_ends() -> None:
    """Promise 7: past unsent_bytes_max nothing more is dispatched for it; past the hard limit it is disconnected."""
    limits = ClientSettings(unsent_bytes_max=1000, unsent_bytes_hard_max=5000)
    async with world_of(1, clients=limits) as world:
        other = world.client()
        client = world.client()
        client.transport.room = 0
        for _ in range(30):
            client.send(command("GET", "k"))
            for _ in world.nodes[0].take():
                world.nodes[0].reply(b"$300\r\n" + b"x" * 300 + b"\r\n")
            world.turn()
        assert client.transport.is_paused
        assert 1000 < client.transport.unsent_bytes < 1400
        assert not client.transport.is_closed
        greedy = world.client()
        greedy.transport.room = 0
        greedy.send(command("GET", "k") * 20)
        for _ in world.nodes[0].take():
            world.nodes[0].reply(b"$300\r\n" + b"x" * 300 + b"\r\n")
            world.turn()
        assert greedy.transport.is_closed
        assert greedy.transport.unsent_bytes < 5400
        other.send(command("PING"))
        assert other.values() == [b"PONG"]


async def test_replies_that_wait_for_an_earlier_one_count_too() -> None:
    """Promise 7: a slow node cannot make the proxy keep more than the hard limit of later replies."""
    async with world_of(2, clients=ClientSettings(unsent_bytes_hard_max=5000)) as world:
        client = world.client()
        slow, quick = keys_of(world, 0)[0], keys_of(world, 1)[0]
        client.send(command("GET", slow) + command("GET", quick) * 40)
        for _ in world.nodes[1].take():
            world.nodes[1].reply(b"$300\r\n" + b"x" * 300 + b"\r\n")
            world.turn()
        assert client.transport.is_closed


async def test_a_held_clients_bytes_are_bounded(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("SET", key, "1"))
    world.nodes[0].take()
    world.nodes[0].reply(b"-TRYAGAIN\r\n")
    world.turn()
    sent = 0
    while not client.transport.is_paused:
        client.send(command("SET", key, "x" * 1000))
        sent += 1
    assert client.connection._unread_bytes <= HELD_BYTES_MAX + 2000
    client.send(command("PING"))
    while not client.transport.written.endswith(b"+PONG\r\n"):
        await world.settle()
        for _ in world.nodes[0].take():
            world.nodes[0].reply(OK)
        if not world.nodes[0].has_unread():
            await world.exchange.pause(0, 10**9)
    assert client.values() == [b"OK"] * (sent + 1) + [b"PONG"]
    assert not client.transport.is_paused


async def test_a_large_mset_in_chunks_costs_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 7: 60 MB in 64 KiB chunks. Work is counted in bytes that are joined or looked at anew, not in time."""
    work = 0
    last: object = None
    last_size = 0
    original = RequestParser.parse

    def counting(
        self: RequestParser, buffer: bytes | bytearray, at: int, *, authenticated: bool = True
    ) -> tuple[list[bytes], int] | None:
        nonlocal work, last, last_size
        work += len(buffer) - last_size if buffer is last else len(buffer)
        last, last_size = buffer, len(buffer)
        return original(self, buffer, at, authenticated=authenticated)

    monkeypatch.setattr(RequestParser, "parse", counting)
    async with world_of(1) as world:
        client = world.client()
        value = b"v" * 10_000
        data = command("MSET", *[word for n in range(6000) for word in (b"k%d" % n, value)]) + command("PING")
        for at in range(0, len(data), 65536):
            client.send(data[at : at + 65536])
        assert client.connection.in_flight()
        assert len(client.connection.slots) == 2
        assert work < 2 * len(data)


@pytest.mark.parametrize("size", [100_000, 3_000_000])
async def test_one_large_value_in_chunks(world: World, size: int) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    data = command("SET", key, b"v" * size) + command("GET", key)
    taken = []
    for at in range(0, len(data), 65536):
        client.send(data[at : at + 65536])
        world.turn()
        taken += world.nodes[0].take()
    while world.hub.turn():
        taken += world.nodes[0].take()
    assert taken[0] == [b"SET", key, b"v" * size]
    world.nodes[0].reply(OK)
    await world.settle()
    taken += world.nodes[0].take()
    assert taken[1:] == [[b"GET", key]]
    assert client.values() == [b"OK"]


async def test_client_reply_modes(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("CLIENT", "REPLY", "SKIP") + command("SET", key, "1") + command("GET", key))
    world.nodes[0].reply(OK, b"+seen\r\n")
    world.turn()
    assert client.values() == [b"seen"]
    client.send(command("CLIENT", "REPLY", "OFF") + command("SET", key, "1") + command("PING"))
    client.send(command("NOSUCH") + command("MGET", key, keys_of(world, 1)[0]))
    world.nodes[0].reply(OK, b"*1\r\n$-1\r\n")
    world.nodes[1].reply(b"*1\r\n$-1\r\n")
    world.turn()
    assert client.replies() == []
    client.send(command("CLIENT", "REPLY", "ON") + command("PING"))
    assert client.values() == [b"OK", b"PONG"]
    assert not client.connection._silent


async def test_before_login_little_is_read() -> None:
    async with world_of(1, clients=ClientSettings(password="secret")) as world:
        client = world.client()
        client.send(command("GET", "k") + command("SET", "k", "v"))
        assert [str(value) for value in client.values()] == ["NOAUTH Authentication required."] * 2
        client.send(command("AUTH", "wrong") + command("AUTH", "secret") + command("GET", "k"))
        values = client.values()
        assert str(values[0]).startswith("WRONGPASS")
        assert values[1] == b"OK"
        assert world.nodes[0].take() == [[b"GET", b"k"]]
        stranger = world.client()
        stranger.send(b"*1\r\n$20000\r\n")
        assert stranger.replies() == [b"-ERR Protocol error: unauthenticated bulk length\r\n"]
        assert stranger.transport.is_closed


async def test_quit_answers_then_ends_and_ignores_the_rest(world: World) -> None:
    client = world.client()
    client.send(command("PING") + command("QUIT") + command("PING"))
    assert client.values() == [b"PONG", b"OK"]
    assert client.transport.is_closed


async def test_resp3_clients_get_connections_of_their_own_version(world: World) -> None:
    key = keys_of(world, 0)[0]
    client, plain = world.client(), world.client()
    plain.send(command("PING"))
    await world.settle()
    assert {resp for _, resp, _ in world.upstreams._connections} == {2}
    client.send(command("HELLO", "3"))
    await world.settle()
    assert {resp for _, resp, _ in world.upstreams._connections} == {2, 3}
    assert len(client.replies()) == 1
    client.send(command("HGETALL", key))
    world.nodes[0].reply(b"%1\r\n+a\r\n+b\r\n")
    world.turn()
    assert client.values() == [{b"a": b"b"}]


@given(st.data())
def test_any_interleaving_of_nodes_and_cuts_keeps_every_clients_order(data: st.DataObject) -> None:
    """Promise 6: two clients, three nodes, requests in random pieces, nodes that answer when they like."""

    async def run() -> None:
        async with world_of(3) as world:
            clients = [world.client() for _ in range(2)]
            sent: list[list[bytes]] = [[], []]
            waiting: list[list[bytes]] = [[], [], []]
            keys = [keys_of(world, index)[0] for index in range(3)]
            pending = [b"", b""]
            steps = st.sampled_from(["make", "feed", "feed", "answer", "answer", "answer"])
            for number in range(data.draw(st.integers(1, 40))):
                step = data.draw(steps)
                who = data.draw(st.integers(0, 1))
                node = data.draw(st.integers(0, 2))
                if step == "make":
                    marker = b"%d:%d" % (who, number)
                    name = data.draw(st.sampled_from(["HGET", "ECHO", "HSET"]))
                    words = {"ECHO": ("ECHO", marker), "HGET": ("HGET", keys[node], marker)}
                    pending[who] += command(*words.get(name, ("HSET", keys[node], marker, "v")))
                    sent[who].append(marker)
                elif step == "feed":
                    size = data.draw(st.integers(1, 80))
                    clients[who].send(pending[who][:size])
                    pending[who] = pending[who][size:]
                else:
                    waiting[node] += [words[2] for words in world.nodes[node].take()]
                    count = data.draw(st.integers(0, len(waiting[node])))
                    world.nodes[node].reply(*[b"+" + marker + b"\r\n" for marker in waiting[node][:count]])
                    del waiting[node][:count]
                    world.turn()
            for who, client in enumerate(clients):
                client.send(pending[who])
            for _ in range(50):
                await world.settle()
                for node in range(3):
                    waiting[node] += [words[2] for words in world.nodes[node].take()]
                    world.nodes[node].reply(*[b"+" + marker + b"\r\n" for marker in waiting[node]])
                    waiting[node].clear()
                world.turn()
                if not any(client.connection.slots for client in clients):
                    break
            assert [client.values() for client in clients] == sent

    trio.run(run, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("word", [b"POST / HTTP/1.1\r\n", b"Host: x\r\n"])
async def test_http_ends_the_connection_before_its_body_is_looked_at(world: World, word: bytes) -> None:
    """As Redis: a browser that is led to the port must not send commands."""
    client = world.client()
    client.send(word + b"\r\n" + command("SET", "k", "v"))
    assert client.transport.is_closed
    assert client.replies() == []
    assert [node.take() for node in world.nodes] == [[], [], []]


async def test_a_blocked_client_that_is_paused_and_leaves_is_let_go(world: World) -> None:
    """Past HELD_BYTES_MAX its socket is not read, so that its end of stream is not either."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("BLPOP", key, "0") + command("ECHO", "x" * HELD_BYTES_MAX))
    await world.settle()
    assert client.transport.is_paused
    assert world.private.in_use == 1
    client.connection.on_end_ahead()
    await world.settle()
    assert world.private.in_use == 0
