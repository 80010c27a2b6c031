"""The handshake: what a node is told and asked before its connection is used, and what a failed one leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from proxy.hub import Hub
from proxy.protocol.requests import RequestLimits, RequestParser
from proxy.upstream.abandoned import ALL
from proxy.upstream.connect import ConnectError, Dialer
from proxy.upstream.connection import NodeConnection
from proxy.upstream.private import PrivateConnections
from proxy.upstream.reply_slot import ConnectionLostError
from routing.topology import Address

Answer = Callable[[Sequence[bytes]], bytes]


@asynccontextmanager
async def node(answer: Answer) -> AsyncIterator[tuple[Address, list[list[bytes]]]]:
    """A server that answers each request with what ``answer`` says; its address, and the requests it got."""
    asked: list[list[bytes]] = []

    async def serve(stream: trio.SocketStream) -> None:
        parser, received = RequestParser(RequestLimits()), b""
        try:
            async for data in stream:
                received += data
                while (parsed := parser.parse(received, 0)) is not None:
                    received = received[parsed[1] :]
                    asked.append(list(parsed[0]))
                    await stream.send_all(answer(parsed[0]))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side closed it

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, serve, listeners)
        yield Address("127.0.0.1", listeners[0].socket.getsockname()[1]), asked
        nursery.cancel_scope.cancel()


def redis(words: Sequence[bytes]) -> bytes:
    return {b"ID": b":42\r\n", b"3": b"%1\r\n+proto\r\n:3\r\n"}.get(words[-1], b"+OK\r\n")


def dialer(hub: Hub, timeout_seconds: float = 5.0) -> Dialer:
    return Dialer(hub, "anna", "secret", timeout_seconds, 1 << 20, proxy_id="web1-7-ab12")


async def test_the_node_is_told_whose_connection_it_is_and_tells_its_id() -> None:
    hub = Hub()
    async with node(redis) as (address, asked):
        dial = dialer(hub)
        connection = await dial.open(address, resp=3)
        assert asked == [
            [b"AUTH", b"anna", b"secret"],
            [b"HELLO", b"3"],
            [b"CLIENT", b"SETNAME", b"steadyread:web1-7-ab12"],
            [b"CLIENT", b"ID"],
        ]
        assert connection.client_id == 42
        assert not connection.only_reads
        assert dial.abandoned.is_open(address, 42)
        connection.close("end of test")
        assert not dial.abandoned.is_open(address, 42)


@pytest.mark.parametrize("reply", [b"-NOPERM no\r\n", b"-LOADING wait\r\n", b"+OK\r\n"])
async def test_a_node_that_does_not_tell_the_id_is_used_all_the_same(reply: bytes) -> None:
    """Only snapshots need it: what ends on such a connection is sought by its name."""
    hub = Hub()
    async with node(lambda words: reply if words[-1] == b"ID" else b"+OK\r\n") as (address, _):
        dial = dialer(hub)
        connection = await dial.open(address)
        assert connection.client_id == ALL
        connection.start(b"*1\r\n$4\r\nPING\r\n")
        connection.close("no reply")
        assert [entry.client_id for entry in dial.abandoned.pending()] == [ALL]


async def test_connections_to_replicas_only_read() -> None:
    hub = Hub()
    async with node(redis) as (address, asked):
        connection = await Dialer(hub, "", "", 5.0, 1 << 20, is_readonly=True).open(address)
        assert connection.only_reads
        assert asked[0] == [b"CLIENT", b"SETNAME", b"steadyread"]
        connection.close("end of test")


async def test_a_failed_handshake_leaves_nothing_behind() -> None:
    """Nothing that writes was sent on it."""
    hub = Hub()
    async with node(lambda words: b"-ERR no\r\n" if b"SETNAME" in words else redis(words)) as (address, _):
        dial = dialer(hub)
        with pytest.raises(ConnectError, match="refused CLIENT SETNAME: ERR no"):
            await dial.open(address)
        assert dial.abandoned.pending() == []
        assert not dial.abandoned._open


async def test_a_silent_handshake_leaves_nothing_behind() -> None:
    hub = Hub()
    async with node(lambda words: b"") as (address, _):
        dial = dialer(hub, timeout_seconds=0.1)
        with pytest.raises(ConnectError):
            await dial.open(address)
        assert dial.abandoned.pending() == []
        assert not dial.abandoned._open


async def test_a_private_connection_that_is_given_up_is_abandoned() -> None:
    """Its client may block in BLPOP, or hold a transaction: both write."""
    hub = Hub()
    async with node(redis) as (address, _):
        dial = dialer(hub)
        private = PrivateConnections(dial, 10)
        connection: NodeConnection = await private.acquire(address, 2)
        waiter = connection.start(b"*3\r\n$5\r\nBLPOP\r\n$1\r\nk\r\n$1\r\n0\r\n")
        private.discard(connection)
        with pytest.raises(ConnectionLostError):
            await waiter.wait_reply()
        assert [(entry.address, entry.client_id) for entry in dial.abandoned.pending()] == [(address, 42)]
