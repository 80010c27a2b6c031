"""A client's socket in the hub: how its ends are noticed, while it is read and while it is not (promise 7)."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from proxy.frontend.listener import Listener
from proxy.frontend.transport import TcpTransport
from proxy.hub import Hub
from routing.topology import Address
from tests.proxy.world import World


class Receiver:
    """Writes down what the transport tells."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def receive(self, data: bytes) -> None:
        self.told.append(data.decode())

    def on_end(self) -> None:
        self.told.append("end")

    def on_end_ahead(self) -> None:
        self.told.append("end ahead")

    def on_gone(self, reason: str) -> None:
        self.told.append("gone")

    def on_sent(self) -> None:
        self.told.append("sent")

    def on_fault(self, error: Exception) -> None:
        raise error


class Pair:
    """A transport in a hub and the client's end of it, over TCP, because only TCP resets."""

    def __init__(self) -> None:
        self.hub = Hub(time.monotonic)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.far = socket.create_connection(server.getsockname())
            near, _ = server.accept()
        near.setblocking(False)
        self.transport = TcpTransport(self.hub, near)
        self.receiver = Receiver()
        self.transport.open(self.receiver)

    def turns(self, count: int = 3) -> list[str]:
        """What was told in some turns, each begun when something was ready or a moment had passed."""
        for _ in range(count):
            self.hub._poll.poll(0.05)
            self.hub.turn()
        return self.receiver.told

    def reset(self) -> None:
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.far.close()

    @property
    def is_quiet(self) -> bool:
        return not self.hub._poll.poll(0)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.transport.close()
    pair.far.close()
    pair.hub.close()


def test_a_client_that_half_closes_and_then_resets_is_gone(pair: Pair) -> None:
    """Its socket reads as ended and not as broken, and would be ready in every turn."""
    pair.far.sendall(b"x")
    pair.far.shutdown(socket.SHUT_WR)
    assert pair.turns() == ["x", "end"]
    assert pair.is_quiet
    pair.reset()
    assert pair.turns() == ["x", "end", "gone"]
    assert pair.is_quiet


def test_a_paused_client_that_half_closes_is_told_once_and_read_later(pair: Pair) -> None:
    pair.transport.pause()
    pair.far.sendall(b"x")
    pair.far.shutdown(socket.SHUT_WR)
    assert pair.turns() == ["end ahead"]
    assert pair.is_quiet
    pair.transport.resume()
    assert pair.turns() == ["end ahead", "x", "end"]
    pair.transport.pause()
    pair.transport.resume()
    assert pair.is_quiet


def test_a_paused_client_that_resets_is_gone(pair: Pair) -> None:
    pair.transport.pause()
    pair.far.sendall(b"x")
    pair.reset()
    assert pair.turns()[-1] == "gone"
    assert pair.is_quiet


def test_bytes_that_were_ready_before_the_pause_wait(pair: Pair) -> None:
    """The pause comes within the turn that polled them."""
    pair.far.sendall(b"x")
    pair.transport.pause()
    pair.transport.on_readable()
    assert pair.turns() == []
    pair.transport.resume()
    assert pair.turns() == ["x"]


class Exhausted:
    """A listening socket while the process has no file descriptors left."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def accept(self) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    def fileno(self) -> int:
        return self._sock.fileno()


async def test_a_listener_that_cannot_accept_stops_until_it_is_resumed(world: World) -> None:
    listener = Listener(world.hub, world.server, world.exchange, Address("127.0.0.1", 0))
    listener.open()
    real = listener.sock
    listener.sock = Exhausted(real)  # type: ignore[assignment]
    try:
        with socket.create_connection(tuple(listener.address)):
            await trio.sleep(0.01)
            assert world.hub.turn()
            assert not world.hub.turn()
            listener.sock = real
            listener.resume()
            assert world.hub.turn()
            assert world.server.client_count == 1
            for client in world.server.clients():
                client.close("end of test")
    finally:
        listener.sock = real
        listener.close()
