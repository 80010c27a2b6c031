"""One client's subscriptions, byte for byte, against nodes whose every push the test chooses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from proxy.exchange.exchange import Exchange
from proxy.frontend import subscriptions
from proxy.frontend.client import ClientConnection
from proxy.frontend.server import Server
from proxy.hub import Hub
from proxy.protocol.encode import bulk, command, error, integer
from proxy.protocol.replies import decode, end_of_reply
from proxy.replicas.service import ReplicaOptions, Replicas
from proxy.settings import ClientSettings, Settings
from proxy.topology.service import Topology
from proxy.upstream.connect import Dialer
from proxy.upstream.nodes import Lane, Nodes
from proxy.upstream.private import PrivateConnections
from routing.slot import SLOT_COUNT, slot_of
from routing.topology import Address, Node, Role, Shard, TopologyView
from tests.proxy.world import idle_snapshots

WAIT_SECONDS = 5.0
HARD_MAX = 4096


def push(*members: bytes | int) -> bytes:
    parts = [integer(member) if isinstance(member, int) else bulk(member) for member in members]
    return b">%d\r\n%b" % (len(parts), b"".join(parts))


def array(*members: bytes | int) -> bytes:
    return b"*" + push(*members)[1:]


class FakeNode:
    """A server that confirms subscriptions and otherwise pushes what it is told to."""

    def __init__(self) -> None:
        self.address = Address("127.0.0.1", 0)
        self.asked: list[list[bytes]] = []  # subscription commands, in the order received
        self.refusals: dict[bytes, bytes] = {}  # command name -> its error
        self.after: dict[bytes, bytes] = {}  # channel -> what follows its confirmation at once
        self.is_silent = False
        self.subscribed: list[
            trio.SocketStream
        ] = []  # connections that were asked to subscribe, while they last
        self.is_down = False  # it closes every new connection

    async def serve(  # noqa: ASYNC128  # serve_listeners says started
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.address = Address(*listener.socket.getsockname()[:2])
        await trio.serve_listeners(self._talk, [listener], task_status=task_status)  # type: ignore[arg-type]

    async def _talk(self, stream: trio.SocketStream) -> None:
        received = b""
        if self.is_down:
            return
        try:
            async for data in stream:
                received += data
                replies = []
                while received and (end := end_of_reply(received)) >= 0:
                    replies.append(self._answer(decode(received[:end]), stream))
                    received = received[end:]
                await stream.send_all(b"".join(replies))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the proxy, or the test, closed it
        finally:
            if stream in self.subscribed:
                self.subscribed.remove(stream)

    def _answer(self, words: list[bytes], stream: trio.SocketStream) -> bytes:
        name = words[0].lower()
        if not name.endswith(b"subscribe"):
            return {b"hello": b"%0\r\n", b"ping": b"" if self.is_silent else b"+PONG\r\n"}.get(
                name, b"+OK\r\n"
            )
        self.asked.append(words)
        if name in self.refusals:
            return self.refusals[name]
        if self.is_silent:
            return b""
        if stream not in self.subscribed:
            self.subscribed.append(stream)
        return b"".join(push(name, word, 1) + self.after.get(word, b"") for word in words[1:])

    async def push(self, *pushes: bytes) -> None:
        for stream in self.subscribed:
            await stream.send_all(b"".join(pushes))

    async def hang_up(self) -> None:
        for stream in list(self.subscribed):
            await stream.aclose()


@dataclass
class FakeTransport:
    """Keeps what is written; ``takes`` False means that the client reads nothing."""

    written: bytearray = field(default_factory=bytearray)
    takes: bool = True
    unsent_bytes: int = 0
    is_closed: bool = False

    def write(self, data: bytes) -> None:
        self.written += data
        if not self.takes:
            self.unsent_bytes += len(data)

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


class World:
    """Two nodes, the data plane before them, and one client."""

    def __init__(
        self, nursery: trio.Nursery, nodes: list[FakeNode], resp: int, deadline_seconds: float
    ) -> None:
        self.nodes = nodes
        hub = Hub()
        dialer = Dialer(hub, "", "", 1.0, 1024 * 1024)
        self.topology = Topology()
        self.private = PrivateConnections(dialer, 4)
        self.shared = Nodes(dialer, nursery, deadline_seconds)
        exchange = Exchange(
            hub,
            self.shared,
            self.topology,
            self.private,
            Replicas(Nodes(dialer, nursery, deadline_seconds, (Lane.READ,)), self.topology, ReplicaOptions()),
            idle_snapshots(self.topology, self.shared, self.private),
            nursery,
            request_deadline_seconds=deadline_seconds,
            script_cache_bytes_max=0,
        )
        self.hub = hub
        self.show(lambda slot: 0)
        self.transport = FakeTransport()
        settings = Settings(
            clients=ClientSettings(unsent_bytes_max=HARD_MAX // 2, unsent_bytes_hard_max=HARD_MAX)
        )
        server = Server(settings, self.topology)
        nursery.start_soon(server.pacing.run)
        self.client = ClientConnection(server, exchange, self.transport, "peer:1", "local:1")
        server.add(self.client)
        if resp == 3:
            self.say("HELLO", "3")
            self.transport.written.clear()

    def show(self, owner: Callable[[int], int]) -> None:
        """A view in which ``owner`` tells which node has a slot."""
        primaries = [
            Node(f"{index:040d}", node.address, Role.PRIMARY) for index, node in enumerate(self.nodes)
        ]
        view = TopologyView(
            revision=0,
            epoch=1,
            shards=tuple(Shard(primary) for primary in primaries),
            shard_of_slot=tuple(owner(slot) for slot in range(SLOT_COUNT)),
        )
        self.topology.adopt(view, trio.current_time())

    def say(self, *words: str) -> None:
        self.client.receive(command(*words))
        self.hub.flush()

    async def expect(self, *frames: bytes) -> None:
        """The client gets exactly these bytes next."""
        wanted = b"".join(frames)
        with trio.move_on_after(WAIT_SECONDS):
            while len(self.transport.written) < len(wanted):
                await trio.sleep(0.002)
        assert bytes(self.transport.written) == wanted
        self.transport.written.clear()

    async def expect_nothing(self) -> None:
        await wait_all_tasks_blocked(0.03)
        assert bytes(self.transport.written) == b""

    async def eventually(self, condition: Callable[[], Any]) -> None:
        with trio.fail_after(WAIT_SECONDS):
            while not condition():
                await trio.sleep(0.002)


@asynccontextmanager
async def a_world(*, resp: int = 2, deadline_seconds: float = 2.0) -> AsyncIterator[World]:
    """At its end no upstream connection may outlive the client, and no handler may have raised."""
    async with trio.open_nursery() as nursery:
        nodes = [FakeNode(), FakeNode()]
        for node in nodes:
            await nursery.start(node.serve)
        world = World(nursery, nodes, resp, deadline_seconds)
        await nursery.start(world.hub.run)
        try:
            yield world
            world.client.close("the test is over")
            await wait_all_tasks_blocked(0.01)
            assert world.private.in_use == 0
            assert world.hub.faults_total == 0
        finally:
            nursery.cancel_scope.cancel()
            world.client.close("the test failed")
            for connection in list(world.shared.connections()):
                connection.close("the test is over")
    world.hub.close()


def home_of(world: World) -> FakeNode:
    """The node that carries the client's channels."""
    return next(node for node in world.nodes if node.subscribed)


# -- frames


@pytest.mark.parametrize(("resp", "frame", "null"), [(2, array, b"$-1\r\n"), (3, push, b"_\r\n")])
async def test_each_confirmation_counts_as_a_standalone_server_does(
    resp: int, frame: Callable[..., bytes], null: bytes
) -> None:
    """Channels and patterns share a count and sharded channels have their own, whatever the nodes count."""
    async with a_world(resp=resp) as world:
        world.say("SUBSCRIBE", "a", "b", "a")
        await world.expect(*(frame(b"subscribe", name, n) for name, n in [(b"a", 1), (b"b", 2), (b"a", 2)]))
        world.say("PSUBSCRIBE", "a*")
        await world.expect(frame(b"psubscribe", b"a*", 3))
        world.say("SSUBSCRIBE", "s", "t")
        await world.expect(frame(b"ssubscribe", b"s", 1), frame(b"ssubscribe", b"t", 2))
        world.say("UNSUBSCRIBE", "a", "unknown")
        await world.expect(frame(b"unsubscribe", b"a", 2), frame(b"unsubscribe", b"unknown", 2))
        world.say("UNSUBSCRIBE")
        await world.expect(frame(b"unsubscribe", b"b", 1))
        world.say("UNSUBSCRIBE")
        await world.expect((b"*" if resp == 2 else b">") + b"3\r\n$11\r\nunsubscribe\r\n" + null + b":1\r\n")
        world.say("SUNSUBSCRIBE", "s")
        await world.expect(frame(b"sunsubscribe", b"s", 1))
        assert world.client.is_subscribed
        world.say("SUNSUBSCRIBE", "t")
        await world.expect(frame(b"sunsubscribe", b"t", 0))
        world.say("PUNSUBSCRIBE")
        await world.expect(frame(b"punsubscribe", b"a*", 0))
        assert not world.client.is_subscribed
        await world.eventually(lambda: world.private.in_use == 0)


@pytest.mark.parametrize(("resp", "frame"), [(2, array), (3, push)])
async def test_messages_of_each_kind_reach_the_client(resp: int, frame: Callable[..., bytes]) -> None:
    async with a_world(resp=resp) as world:
        world.show(lambda slot: 1)  # where the channels are carried too
        for words in (("SUBSCRIBE", "a"), ("PSUBSCRIBE", "a*"), ("SSUBSCRIBE", "a")):
            world.say(*words)
            await world.expect(
                frame(words[0].lower().encode(), words[1].encode(), 2 if words[1] == "a*" else 1)
            )
        await home_of(world).push(
            push(b"message", b"a", b">3\r\n"),
            push(b"pmessage", b"a*", b"a", b""),
            push(b"smessage", b"a", b"\0"),
        )
        await world.expect(
            frame(b"message", b"a", b">3\r\n"),
            frame(b"pmessage", b"a*", b"a", b""),
            frame(b"smessage", b"a", b"\0"),
        )


# -- order


async def test_no_message_comes_before_its_confirmation() -> None:
    """Messages that a node sends on the heels of its own confirmation stand behind the client's."""
    async with a_world() as world:
        for node in world.nodes:
            node.after = {b"a": push(b"message", b"a", b"1") + push(b"message", b"a", b"2")}
        world.say("SUBSCRIBE", "a", "b")
        await world.expect(
            array(b"subscribe", b"a", 1),
            array(b"subscribe", b"b", 2),
            array(b"message", b"a", b"1"),
            array(b"message", b"a", b"2"),
        )


async def test_messages_behind_a_held_one_wait_too() -> None:
    """What came before the first held message is written at once, what came after it keeps its place."""
    async with a_world() as world:
        world.say("SUBSCRIBE", "a")
        await world.expect(array(b"subscribe", b"a", 1))
        home = home_of(world)
        home.after = {
            b"b": push(b"message", b"a", b"1") + push(b"message", b"b", b"2") + push(b"message", b"a", b"3")
        }
        world.say("SUBSCRIBE", "b")
        await world.expect(
            array(b"message", b"a", b"1"),
            array(b"subscribe", b"b", 2),
            array(b"message", b"b", b"2"),
            array(b"message", b"a", b"3"),
        )


async def test_a_message_stands_between_whole_replies() -> None:
    """A RESP3 client may go on asking; confirmations keep their place among its replies."""
    async with a_world(resp=3) as world:
        for words in (["PING"], ["SUBSCRIBE", "a"], ["ECHO", "x"], ["UNSUBSCRIBE", "a"], ["PING"]):
            world.say(*words)
        await world.expect(
            b"+PONG\r\n", push(b"subscribe", b"a", 1), bulk(b"x"), push(b"unsubscribe", b"a", 0), b"+PONG\r\n"
        )


async def test_confirmations_are_not_silenced() -> None:
    """CLIENT REPLY OFF and SKIP drop replies; confirmations and messages are none."""
    async with a_world(resp=3) as world:
        world.say("CLIENT", "REPLY", "OFF")
        world.say("SUBSCRIBE", "a")
        world.say("PING")
        await world.expect(push(b"subscribe", b"a", 1))
        world.say("CLIENT", "REPLY", "ON")
        await world.expect(b"+OK\r\n")
        world.say("CLIENT", "REPLY", "SKIP")
        world.say("SUBSCRIBE", "a")
        world.say("PING")
        await world.expect(push(b"subscribe", b"a", 1), b"+PONG\r\n")
        await home_of(world).push(push(b"message", b"a", b"1"))
        await world.expect(push(b"message", b"a", b"1"))


# -- refusals and bounds


async def test_a_refusal_of_the_node_is_the_clients_to_see() -> None:
    """It is subscribed to none of the command's channels, and messages that waited meanwhile come."""
    refusal = error("NOPERM no permissions to access a channel")
    async with a_world() as world:
        world.say("SUBSCRIBE", "a")
        await world.expect(array(b"subscribe", b"a", 1))
        for node in world.nodes:
            node.refusals[b"subscribe"] = refusal
        world.say("SUBSCRIBE", "b", "c")
        await world.expect(refusal)
        assert world.client.subscriptions is not None
        assert world.client.subscriptions.channels == {b"a"}
        await home_of(world).push(push(b"message", b"b", b"no"), push(b"message", b"a", b"yes"))
        await world.expect(array(b"message", b"a", b"yes"))


async def test_a_refusal_of_one_slot_undoes_the_others() -> None:
    """One command is done as a whole or not at all."""
    refusal = error("NOPERM no permissions to access a channel")
    async with a_world() as world:
        world.show(lambda slot: 1 if slot == slot_of(b"t") else 0)
        world.say("SSUBSCRIBE", "kept")
        await world.expect(array(b"ssubscribe", b"kept", 1))
        world.nodes[1].refusals[b"ssubscribe"] = refusal
        world.say("SSUBSCRIBE", "s", "t")
        await world.expect(refusal)
        await world.nodes[0].push(push(b"smessage", b"s", b"no"), push(b"smessage", b"kept", b"yes"))
        await world.expect(array(b"smessage", b"kept", b"yes"))
        await world.eventually(lambda: world.private.in_use == 1)


async def test_subscriptions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 7: past the bound a clear error, and nothing of the command is done."""
    monkeypatch.setattr(subscriptions, "SUBSCRIPTIONS_MAX", 3)
    async with a_world() as world:
        world.say("SUBSCRIBE", "a", "b")
        await world.expect(array(b"subscribe", b"a", 1), array(b"subscribe", b"b", 2))
        world.say("PSUBSCRIBE", "c", "d")
        await world.eventually(lambda: world.transport.written)
        assert bytes(world.transport.written).startswith(
            b"-ERR too many subscriptions: a connection may have 3 "
        )
        world.transport.written.clear()
        world.say("SUBSCRIBE", "a", "c")
        await world.expect(array(b"subscribe", b"a", 2), array(b"subscribe", b"c", 3))
        monkeypatch.setattr(subscriptions, "SUBSCRIPTIONS_MAX", 9)
        monkeypatch.setattr(subscriptions, "NAME_BYTES_MAX", 10)
        world.say("SUBSCRIBE", "d" * 8)
        await world.eventually(lambda: world.transport.written)
        assert b"of 10 bytes together, and has 3 of 3 bytes" in world.transport.written
        world.transport.written.clear()
        world.say("UNSUBSCRIBE", "a")
        await world.expect(array(b"unsubscribe", b"a", 2))
        world.say("SUBSCRIBE", "d" * 8)
        await world.expect(array(b"subscribe", b"d" * 8, 3))


async def test_a_client_that_does_not_read_is_disconnected() -> None:
    """Promise 7, as the engines' output buffer limit for pubsub."""
    async with a_world() as world:
        world.say("SUBSCRIBE", "a")
        await world.expect(array(b"subscribe", b"a", 1))
        world.transport.takes = False
        message = push(b"message", b"a", b"x" * 500)
        for _ in range(HARD_MAX // len(message)):
            await home_of(world).push(message)
        await wait_all_tasks_blocked(0.01)
        assert not world.transport.is_closed
        await home_of(world).push(message)
        await world.eventually(lambda: world.transport.is_closed)


async def test_messages_that_wait_for_a_confirmation_are_bounded() -> None:
    """Promise 7: also what is held counts, and the node connection that is being read ends cleanly."""
    async with a_world() as world:
        for node in world.nodes:
            node.after = {b"a": push(b"message", b"a", b"x" * 500) * 10}
        world.say("SUBSCRIBE", "a")
        await world.eventually(lambda: world.transport.is_closed)


async def test_a_node_that_does_not_confirm_is_an_error_by_the_deadline() -> None:
    async with a_world(deadline_seconds=0.1) as world:
        for node in world.nodes:
            node.is_silent = True
        world.say("SUBSCRIBE", "a")
        await world.eventually(lambda: world.transport.written)
        assert bytes(world.transport.written).startswith(b"-NOTREADY SUBSCRIBE was not served within 0.1 s")
        assert not world.client.is_subscribed


# -- losing and healing


async def test_a_lost_connection_is_replaced_at_another_primary() -> None:
    async with a_world() as world:
        world.say("SUBSCRIBE", "a")
        await world.expect(array(b"subscribe", b"a", 1))
        world.say("PSUBSCRIBE", "p*")
        await world.expect(array(b"psubscribe", b"p*", 2))
        first = home_of(world)
        (second,) = (node for node in world.nodes if node is not first)
        first.is_down = True
        await first.hang_up()
        await world.eventually(lambda: len(second.asked) == 2)
        assert sorted(second.asked) == [[b"psubscribe", b"p*"], [b"subscribe", b"a"]]
        await world.expect_nothing()
        await second.push(push(b"message", b"a", b"again"))
        await world.expect(array(b"message", b"a", b"again"))


async def test_a_line_to_a_node_that_left_the_cluster_is_replaced() -> None:
    async with a_world() as world:
        world.say("SUBSCRIBE", "a")
        await world.expect(array(b"subscribe", b"a", 1))
        first = home_of(world)
        (second,) = (node for node in world.nodes if node is not first)
        view = world.topology.view
        shards = tuple(
            replace(shard, primary=replace(shard.primary, is_failing=shard.primary.address == first.address))
            for shard in view.shards
        )
        world.topology.adopt(replace(view, shards=shards), trio.current_time())
        await world.eventually(lambda: second.subscribed and not first.subscribed)


async def test_a_moved_slot_is_followed_when_subscribing() -> None:
    """MOVED is no answer for the client: its channel is subscribed to where the node says."""
    async with a_world() as world:
        source, target = world.nodes
        source.refusals[b"ssubscribe"] = error(f"MOVED {slot_of(b's')} {target.address}")
        world.say("SSUBSCRIBE", "s")
        await world.expect(array(b"ssubscribe", b"s", 1))
        assert target.asked == [[b"ssubscribe", b"s"]]
        assert world.private.in_use == 1, "the connection to the former owner is of no use"


async def test_channels_of_several_slots_in_one_command() -> None:
    """As on a standalone server: the client gets one frame for each, in its order, whoever was asked."""
    async with a_world() as world:
        world.show(lambda slot: 1 if slot == slot_of(b"t") else 0)
        world.say("SSUBSCRIBE", "s", "t", "{s}2")
        await world.expect(
            *(array(b"ssubscribe", name, n) for n, name in enumerate([b"s", b"t", b"{s}2"], start=1))
        )
        assert world.nodes[0].asked == [[b"ssubscribe", b"s", b"{s}2"]]
        assert world.nodes[1].asked == [[b"ssubscribe", b"t"]]


async def test_a_channel_whose_slot_moved_is_followed_in_silence() -> None:
    """The former owner ends the subscription by itself; the client hears only messages of the new one."""
    async with a_world() as world:
        source, target = world.nodes
        world.say("SSUBSCRIBE", "s")
        await world.expect(array(b"ssubscribe", b"s", 1))
        source.refusals[b"ssubscribe"] = error(f"MOVED {slot_of(b's')} {target.address}")
        await source.push(push(b"sunsubscribe", b"s", 0))
        await world.eventually(lambda: target.subscribed)
        await wait_all_tasks_blocked(0.01)
        await target.push(push(b"smessage", b"s", b"here"))
        await world.expect(array(b"smessage", b"s", b"here"))
        await world.eventually(lambda: not source.subscribed)


async def test_a_former_owner_is_not_listened_to() -> None:
    """The view knows of a move before the former owner does: messages come once, from the new owner."""
    async with a_world() as world:
        source, target = world.nodes
        world.say("SSUBSCRIBE", "s", "t")
        await world.expect(array(b"ssubscribe", b"s", 1), array(b"ssubscribe", b"t", 2))
        world.show(lambda slot: 1 if slot == slot_of(b"s") else 0)
        await world.eventually(lambda: target.subscribed)
        await wait_all_tasks_blocked(0.01)
        await source.push(push(b"smessage", b"s", b"old"), push(b"sunsubscribe", b"s", 1))
        await source.push(push(b"smessage", b"t", b"stays"))
        await world.expect(array(b"smessage", b"t", b"stays"))
        await target.push(push(b"smessage", b"s", b"new"))
        await world.expect(array(b"smessage", b"s", b"new"))


async def test_a_slot_that_moves_as_its_channel_is_confirmed() -> None:
    """The end that a node sends before its PONG counts: the subscription is made at the new owner."""
    async with a_world() as world:
        source, target = world.nodes
        source.after = {b"s": push(b"sunsubscribe", b"s", 0)}
        original = source._answer

        def answer_then_move(words: list[bytes], stream: trio.SocketStream) -> bytes:
            reply = original(words, stream)
            if words[0] == b"ssubscribe":
                source.refusals[b"ssubscribe"] = error(f"MOVED {slot_of(b's')} {target.address}")
            return reply

        source._answer = answer_then_move  # type: ignore[method-assign]
        world.say("SSUBSCRIBE", "s")
        await world.expect(array(b"ssubscribe", b"s", 1))
        await target.push(push(b"smessage", b"s", b"1"))
        await world.expect(array(b"smessage", b"s", b"1"))


# -- ending


async def test_reset_ends_all_subscriptions() -> None:
    async with a_world(resp=3) as world:
        world.say("SUBSCRIBE", "a")
        await world.expect(push(b"subscribe", b"a", 1))
        world.say("RESET")
        await world.expect(b"+RESET\r\n")
        await world.eventually(lambda: world.private.in_use == 0)
        world.say("SUBSCRIBE", "b")
        await world.expect(array(b"subscribe", b"b", 1))


async def test_a_client_that_leaves_while_it_subscribes_leaves_nothing() -> None:
    """Its task ends with it; ``a_world`` checks that no upstream connection outlives it."""
    async with a_world() as world:
        for node in world.nodes:
            node.is_silent = True
        world.say("SUBSCRIBE", "a")
        await world.eventually(lambda: world.nodes[0].asked or world.nodes[1].asked)
        world.client.close("left")
        await wait_all_tasks_blocked(0.01)
        assert world.private.in_use == 0


async def test_a_client_that_leaves_while_it_is_healed_leaves_nothing() -> None:
    async with a_world() as world:
        world.say("SUBSCRIBE", "a")
        await world.expect(array(b"subscribe", b"a", 1))
        for node in world.nodes:
            node.is_down = True
        for node in world.nodes:
            await node.hang_up()
        await world.eventually(lambda: world.private.in_use == 0)
        world.client.close("left")
        subscribers = world.topology._subscribers
        assert not any(getattr(each, "__self__", None) is world.client.subscriptions for each in subscribers)
