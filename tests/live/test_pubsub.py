"""Subscriptions through the proxy on real clusters: the frames of one server, the order, lost nodes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import redis
import trio

from proxy.embedded.cluster import Cluster, Node
from proxy.embedded.engine import Engine
from proxy.embedded.moves import move_slot_stepwise, move_slots_atomically
from proxy.protocol.encode import command
from proxy.protocol.replies import decode, end_of_reply
from routing.slot import slot_of
from routing.topology import Address
from tests.live.campaign.proxies import Steadyread, free_address, serving_process
from tests.live.conftest import ClusterStarter, engine_named

pytestmark = pytest.mark.live

ENGINES = ("redis-6.2", "redis-7.0", "valkey-9.1")
QUIET_SECONDS = 0.05  # a server that has sent nothing for so long has said all
WAIT_SECONDS = 20.0
POLL_SECONDS = 0.01
CHANGES = 100  # rounds of subscribing and unsubscribing under messages


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return engine_named(request.param)


def knows_sharded(engine: Engine) -> bool:
    return engine.release >= (7,)


class Client:
    """One connection, frame by frame."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.received = b""

    @classmethod
    async def open(cls, address: Address, resp: int = 2) -> Client:
        client = cls(await trio.open_tcp_stream(*address))
        if resp == 3:
            await client.send("HELLO", "3")
            await client.frame()
        return client

    async def send(self, *words: str | int) -> None:
        await self._stream.send_all(command(*words))

    async def frame(self) -> bytes:
        """The next frame. Raises trio.TooSlowError."""
        with trio.fail_after(WAIT_SECONDS):
            while (end := end_of_reply(self.received)) < 0:
                await self._receive()
        frame, self.received = self.received[:end], self.received[end:]
        return frame

    async def value(self) -> Any:
        return decode(await self.frame())

    async def call(self, *words: str | int) -> Any:
        await self.send(*words)
        return await self.value()

    async def until_quiet(self, bytes_min: int = 0) -> bytes:
        """What came until nothing more does, but at least ``bytes_min`` if they come at all."""
        with trio.move_on_after(WAIT_SECONDS):
            while len(self.received) < bytes_min:
                await self._receive()
        while True:
            with trio.move_on_after(QUIET_SECONDS) as waiting:
                await self._receive()
            if waiting.cancelled_caught:
                received, self.received = self.received, b""
                return received

    async def _receive(self) -> None:
        data = await self._stream.receive_some(65536)
        assert data, "the connection was closed"
        self.received += data

    async def aclose(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def proxied(start_cluster: ClusterStarter, **kind: int) -> AsyncIterator[tuple[Cluster, Address]]:
    async with start_cluster(**kind) as cluster:
        await wait_linked(cluster)
        async with Steadyread().serving(cluster) as address:
            yield cluster, address


async def wait_linked(cluster: Cluster) -> None:
    """Nodes serve before all links between them are up, and a PUBLISH misses those without a link."""
    listeners = [await Client.open(node.address) for node in cluster.nodes]
    for listener in listeners:
        await listener.call("SUBSCRIBE", "links")
    for node in cluster.nodes:
        unheard = list(listeners)
        while unheard:
            await cluster.call(node, "PUBLISH", "links", node.id)
            await trio.sleep(POLL_SECONDS)
            for listener in list(unheard):
                if node.id.encode() in await listener.until_quiet():
                    unheard.remove(listener)
    for listener in listeners:
        await listener.aclose()


@asynccontextmanager
async def standalone(engine: Engine) -> AsyncIterator[Address]:
    address = free_address()
    with tempfile.TemporaryDirectory(prefix="steadyread-") as directory:
        words = ["--port", str(address.port), "--bind", address.host, "--save", "", "--dir", directory]
        async with serving_process([*engine.server, *words], address):
            yield address


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(WAIT_SECONDS):
        while not await condition():
            await trio.sleep(POLL_SECONDS)


async def carriers_of(cluster: Cluster, question: str, channel: str) -> list[Node]:
    """The running nodes that have subscribers of ``channel``, by PUBSUB NUMSUB or SHARDNUMSUB."""
    running = [node for node in cluster.nodes if node.process is not None]
    return [node for node in running if (await cluster.call(node, "PUBSUB", question, channel))[1]]


# -- frames

# "s" is sent by the subscriber, "p" by a publisher, whose replies count one node's subscribers: not compared.
FRAMES = """
s UNSUBSCRIBE
s PUNSUBSCRIBE
s PING
s SUBSCRIBE a b a
s SUBSCRIBE b
p PUBLISH a 1
s PSUBSCRIBE a* [b]
p PUBLISH a 2
p PUBLISH b 3
s PING
s PING hello
s UNSUBSCRIBE nothing b
p PUBLISH b 4
s PUNSUBSCRIBE nothing*
s SUBSCRIBE c d e
s UNSUBSCRIBE
s UNSUBSCRIBE
s PUNSUBSCRIBE
s PUNSUBSCRIBE
s GET key
s SUBSCRIBE
s SUBSCRIBE a
p PUBLISH a 5
s RESET
p PUBLISH a 6
s GET key
"""
SHARDED_FRAMES = """
s SUNSUBSCRIBE
s SSUBSCRIBE x y {x}z x
p SPUBLISH x 1
s SUBSCRIBE x
s GET key
p SPUBLISH y 2
p PUBLISH x 3
s SUNSUBSCRIBE x nothing
p SPUBLISH x 4
s UNSUBSCRIBE
s SUNSUBSCRIBE
s SUNSUBSCRIBE
s GET key
"""
RESP3_FRAMES = """
s CLIENT REPLY OFF
s SUBSCRIBE a
p PUBLISH a 1
s UNSUBSCRIBE a
s CLIENT REPLY ON
s CLIENT REPLY SKIP
s SUBSCRIBE a
s PING
s HELLO 2 BAD
s HELLO 9
s SET key value
s GET key
s EXISTS key no
s DEL key
s UNSUBSCRIBE
"""


@pytest.mark.parametrize("resp", [2, 3])
async def test_frames_are_those_of_one_server(
    engine: Engine, share_cluster: ClusterStarter, resp: int
) -> None:
    """The same commands, sent to a standalone server and to the proxy, give the same bytes at each step."""
    script = FRAMES.strip().splitlines()
    if knows_sharded(engine):
        script += SHARDED_FRAMES.strip().splitlines()
        if resp == 3:
            script += RESP3_FRAMES.strip().splitlines()
    elif resp == 2:
        script = [step for step in script if step != "s GET key"]  # 6.2 names fewer commands in its refusal
    async with standalone(engine) as one, proxied(share_cluster) as (_, many):
        subscribers = [await Client.open(address, resp) for address in (one, many)]
        publishers = [await Client.open(address) for address in (one, many)]
        current = resp
        for step in script:
            who, *words = step.split()
            if who == "p":
                is_answered, _ = [await publisher.call(*words) > 0 for publisher in publishers]
            else:
                is_answered = words[:2] != ["CLIENT", "REPLY"] or words[2] == "ON"
                for subscriber in subscribers:
                    await subscriber.send(*words)
            expected, answered = await both_until_quiet(*subscribers, int(is_answered))
            if words[0].endswith("UNSUBSCRIBE") and len(words) == 1:
                assert in_any_order(answered) == in_any_order(expected), step
            else:
                assert answered == expected, step
            if words == ["RESET"] and current == 3:
                for subscriber in subscribers:  # which made it RESP2
                    await subscriber.call("HELLO", "3")
        for client in (*subscribers, *publishers):
            await client.aclose()


async def both_until_quiet(one: Client, other: Client, bytes_min: int) -> list[bytes]:
    """What each got until both are quiet; the other may take its time until it has as much as the one."""
    received = [b"", b""]

    async def receive(index: int, client: Client) -> None:
        received[index] = await client.until_quiet(bytes_min)

    async with trio.open_nursery() as nursery:
        for index, client in enumerate((one, other)):
            nursery.start_soon(receive, index, client)
    if (missing := len(received[0]) - len(received[1])) > 0:
        received[1] += await other.until_quiet(missing)
    return received


def in_any_order(received: bytes) -> tuple[list[Any], list[Any]]:
    """Frames of an UNSUBSCRIBE from everything: each engine takes the channels in an order of its own."""
    kinds, names = [], []
    while received:
        end = end_of_reply(received)
        word, name, count = decode(received[:end])
        kinds.append((received[:4], word, count))
        names.append(name)
        received = received[end:]
    return kinds, sorted(names, key=repr)


# -- messages


async def test_a_message_of_any_node_arrives(share_cluster: ClusterStarter) -> None:
    """The cluster bus takes a PUBLISH at any node, replicas too, to the one that carries the subscription."""
    async with proxied(share_cluster, replicas=1) as (cluster, address):
        client = await Client.open(address)
        await client.call("SUBSCRIBE", "news")
        await client.call("PSUBSCRIBE", "n?ws")
        for node in cluster.nodes:
            await cluster.call(node, "PUBLISH", "news", str(node))
            assert await client.value() == [b"message", b"news", str(node).encode()]
            assert await client.value() == [b"pmessage", b"n?ws", b"news", str(node).encode()]
        assert (await carriers_of(cluster, "NUMSUB", "news")) != []
        await client.aclose()

        async def all_gone() -> bool:
            return await carriers_of(cluster, "NUMSUB", "news") == []

        await until(all_gone)


async def test_order_holds_while_subscriptions_change(share_cluster: ClusterStarter) -> None:
    """No message before its channel's confirmation or after its end; in between none missed, none twice.

    Numbered messages flow all the time; what is published after a confirmation was received must come.
    """
    async with proxied(share_cluster) as (_, address):
        client, publisher = await Client.open(address, 3), await Client.open(address)
        published = 0  # the number of the message that is being published
        log: list[tuple[list[Any], int]] = []  # (frame, published when it came)
        confirmed = trio.Event()

        async def publish() -> None:
            nonlocal published
            while True:
                published += 1
                await publisher.send("PUBLISH", "n", published)
                await publisher.send("PUBLISH", "always", published)
                await publisher.frame()
                await publisher.frame()

        async def receive() -> None:
            while True:
                frame = await client.value()
                log.append((frame, published))
                if frame[0] not in (b"message", b"pmessage"):
                    confirmed.set()

        async def change(*words: str) -> None:
            nonlocal confirmed
            confirmed = trio.Event()
            await client.send(*words)
            await confirmed.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await change("PSUBSCRIBE", "alway?")
            nursery.start_soon(publish)
            for turn in range(CHANGES):
                await change("SUBSCRIBE", "n")
                await trio.sleep(0.002 * (turn % 5))
                await change("SUBSCRIBE", "other")  # while messages of n come
                await change("UNSUBSCRIBE", "other")
                await change("UNSUBSCRIBE", "n")
            nursery.cancel_scope.cancel()
        check_order(log)
        await client.aclose()
        await publisher.aclose()


def check_order(log: Sequence[tuple[list[Any], int]]) -> None:
    """Raises AssertionError with what was wrong in the frames that a client got."""
    always = [int(frame[3]) for frame, _ in log if frame[0] == b"pmessage"]
    gaps = [pair for pair in pairwise([0, *always]) if pair[1] != pair[0] + 1]
    assert gaps == [], "a channel that stayed missed or repeated messages"
    received = 0
    latest_first: int | None = None  # while subscribed to n: the first message must not have a higher number
    previous: int | None = None
    for frame, published in log:
        match frame:
            case [b"subscribe", b"n", _]:
                latest_first, previous = published + 1, None
            case [b"unsubscribe", b"n", _]:
                latest_first = None
            case [b"message", b"n", number]:
                assert latest_first is not None, f"message {number} came while n was not subscribed to"
                if previous is None:
                    assert int(number) <= latest_first, "messages after the confirmation are missing"
                else:
                    assert int(number) == previous + 1
                previous = int(number)
                received += 1
    assert received > CHANGES
    assert len(always) > CHANGES


# -- clients in use


@pytest.mark.parametrize("resp", [2, 3])
async def test_redis_py(engine: Engine, share_cluster: ClusterStarter, resp: int) -> None:
    """redis-py's own pubsub object, blocking and in a thread as services use it."""
    async with proxied(share_cluster) as (_, address):
        await trio.to_thread.run_sync(use_redis_py, address, resp, knows_sharded(engine))


def use_redis_py(address: Address, resp: int, with_sharded: bool) -> None:
    with contextlib.closing(redis.Redis(*address, protocol=resp, decode_responses=True)) as service:
        pubsub = service.pubsub(ignore_subscribe_messages=True)

        def next_message() -> tuple[str, str, str]:
            while (message := pubsub.get_message(timeout=WAIT_SECONDS)) is None:
                pass
            return message["type"], message["channel"], message["data"]

        pubsub.subscribe("news", "sport")
        pubsub.psubscribe("s*")
        pubsub.get_message(timeout=1.0)
        pubsub.get_message(timeout=1.0)
        pubsub.get_message(timeout=1.0)
        service.publish("news", "hello")
        assert next_message() == ("message", "news", "hello")
        service.publish("sport", "goal")
        assert {next_message(), next_message()} == {
            ("message", "sport", "goal"),
            ("pmessage", "sport", "goal"),
        }
        if with_sharded:
            pubsub.ssubscribe("orders")
            pubsub.get_message(timeout=1.0)
            assert service.spublish("orders", "one") == 1
            assert next_message() == ("smessage", "orders", "one")
        pubsub.ping()
        pubsub.unsubscribe()
        pubsub.close()
        assert service.ping()


# -- nodes that come and go


async def test_a_killed_node_takes_no_subscription_with_it(
    engine: Engine, start_cluster: ClusterStarter
) -> None:
    """SIGKILL of what carries channels and a sharded one: all come back elsewhere, unseen by the client."""
    async with proxied(start_cluster, primaries=3, replicas=1, node_timeout_ms=1500) as (cluster, address):
        client, publisher = await Client.open(address), await Client.open(address)
        await client.call("SUBSCRIBE", "news")
        await client.call("PSUBSCRIBE", "n*")
        (carrier,) = await carriers_of(cluster, "NUMSUB", "news")
        owned = (await cluster.map_at(carrier)).owned_by(carrier.id)
        shard_channel = next(name for name in map(str, range(1000)) if slot_of(name.encode()) in owned)
        if knows_sharded(engine):
            await client.call("SSUBSCRIBE", shard_channel)
        await cluster.kill(carrier)

        async def is_carried() -> bool:
            """The channel, and the pattern, which is subscribed to a moment later."""
            found = await carriers_of(cluster, "NUMSUB", "news")
            return len(found) == 1 and await cluster.call(found[0], "PUBSUB", "NUMPAT") == 1

        async def is_shard_carried() -> bool:
            return len(await carriers_of(cluster, "SHARDNUMSUB", shard_channel)) == 1

        began = trio.current_time()
        await until(is_carried)
        print(f"\n{engine}: channels carried again after {trio.current_time() - began:.3f} s")
        survivor = next(node for node in cluster.primaries if node.process is not None)
        await cluster.call(survivor, "PUBLISH", "news", "again")
        assert await client.value() == [b"message", b"news", b"again"]
        assert await client.value() == [b"pmessage", b"n*", b"news", b"again"]
        if knows_sharded(engine):
            await until(is_shard_carried)
            print(f"{engine}: sharded channel carried again after {trio.current_time() - began:.3f} s")
            assert await publisher.call("SPUBLISH", shard_channel, "again") == 1
            assert await client.value() == [b"smessage", shard_channel.encode(), b"again"]
        assert await client.until_quiet() == b""
        await client.aclose()
        await publisher.aclose()


@pytest.mark.parametrize("resp", [2, 3])
async def test_a_sharded_channel_follows_its_slot(
    engine: Engine, share_cluster: ClusterStarter, resp: int
) -> None:
    """Its slot moves there and back under numbered messages: they come in order, never twice, and go on."""
    if not knows_sharded(engine):
        pytest.skip(f"{engine} has no sharded channels")
    slot = slot_of(b"orders")
    async with proxied(share_cluster) as (cluster, address):
        client, publisher = await Client.open(address, resp), await Client.open(address)
        await client.call("SSUBSCRIBE", "orders")
        await client.call("SSUBSCRIBE", "elsewhere")
        published = 0

        async def publish() -> None:
            nonlocal published
            while True:
                published += 1
                await publisher.call("SPUBLISH", "orders", published)
                await trio.sleep(0.001)

        async def move(target: Node) -> None:
            if engine.moves_slots_atomically:
                await move_slots_atomically(cluster, [slot], target)
            else:
                await move_slot_stepwise(cluster, slot, target)

        owner = cluster.node_at((await cluster.map_at(cluster.nodes[0])).owner_of(slot).address)
        (other, *_) = (node for node in cluster.nodes if node is not owner)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            for target in (other, owner):
                await move(target)

                async def is_carried(target: Node = target) -> bool:
                    return await carriers_of(cluster, "SHARDNUMSUB", "orders") == [target]

                await until(is_carried)
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        last = await trailing_call(publisher, address, "SPUBLISH", "orders", "last")
        assert last == 1
        numbers = []
        while (found := await client.value())[2] != b"last":
            assert found[:2] == [b"smessage", b"orders"]
            numbers.append(int(found[2]))
        assert numbers == sorted(set(numbers))
        print(f"\n{engine}: {published - len(numbers)} of {published} messages missed in two moves")
        assert len(numbers) > published / 2
        assert await client.until_quiet() == b""
        await client.aclose()


async def trailing_call(publisher: Client, address: Address, *words: str) -> Any:
    """A call on a new connection: the old one's may have been cancelled half-way."""
    await publisher.aclose()
    fresh = await Client.open(address)
    reply = await fresh.call(*words)
    await fresh.aclose()
    return reply
