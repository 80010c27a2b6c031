"""The hub: one turn reads what is ready, then flushes; a fault ends one endpoint and no other (promise 8)."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
import trio

from proxy.hub import READ, TICK_SECONDS, WRITE, Endpoint, Hub


class Echo(Endpoint):
    """Gives back what it reads, at the end of the turn."""

    def __init__(self, hub: Hub, order: list[str], name: str) -> None:
        self.hub = hub
        self.sock, self.far = socket.socketpair()
        self.sock.setblocking(False)
        self.far.setblocking(False)
        self.dirty = False
        self.order = order
        self.name = name
        self.out = b""
        self.fault: Exception | None = None
        self.fails_in: str | None = None
        hub.add(self)

    def on_readable(self) -> None:
        self.order.append(f"read {self.name}")
        self.out += self.sock.recv(100)
        if self.fails_in == "read":
            raise ValueError("planted")
        self.hub.touched(self)

    def on_writable(self) -> None:
        self.order.append(f"writable {self.name}")
        self.hub.watch(self, READ)

    def flush(self) -> None:
        self.order.append(f"flush {self.name}")
        if self.fails_in == "flush":
            raise ValueError("planted")
        self.sock.send(self.out)
        self.out = b""

    def on_fault(self, error: Exception) -> None:
        self.fault = error
        self.hub.remove(self)
        self.sock.close()


@pytest.fixture
def order() -> list[str]:
    return []


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(time.monotonic)
    yield hub
    for endpoint in list(hub._endpoints.values()):
        hub.remove(endpoint)
        endpoint.sock.close()
    hub.close()


def test_a_turn_reads_all_then_flushes_each_once(hub: Hub, order: list[str]) -> None:
    echoes = [Echo(hub, order, name) for name in "ab"]
    for echo in echoes:
        echo.far.send(b"x")
    assert hub.turn()
    assert sorted(order[:2]) == ["read a", "read b"]
    assert sorted(order[2:]) == ["flush a", "flush b"]
    assert [echo.far.recv(10) for echo in echoes] == [b"x", b"x"]
    assert not hub.turn()
    for echo in echoes:
        echo.far.close()


@pytest.mark.parametrize("where", ["read", "flush"])
def test_a_fault_ends_its_endpoint_alone(hub: Hub, order: list[str], where: str) -> None:
    bad, good = Echo(hub, order, "bad"), Echo(hub, order, "good")
    bad.fails_in = where
    bad.far.send(b"x")
    good.far.send(b"y")
    hub.turn()
    assert isinstance(bad.fault, ValueError)
    assert good.far.recv(10) == b"y"
    assert hub.faults_total == 1
    assert bad.far.recv(10) == b""
    good.far.send(b"z")
    hub.turn()
    assert good.far.recv(10) == b"z"
    assert hub.faults_total == 1
    bad.far.close()
    good.far.close()


def test_what_is_touched_outside_a_turn_is_flushed_at_once(hub: Hub, order: list[str]) -> None:
    echo = Echo(hub, order, "a")
    echo.out = b"now"
    hub.touched(echo)
    assert echo.far.recv(10) == b"now"
    assert not echo.dirty
    echo.far.close()


def test_what_a_flush_makes_dirty_is_flushed_too(hub: Hub, order: list[str]) -> None:
    first, second = Echo(hub, order, "first"), Echo(hub, order, "second")

    def flush() -> None:
        second.out = b"from first"
        hub.touched(second)

    first.flush = flush  # type: ignore[method-assign]
    hub.touched(first)
    assert second.far.recv(20) == b"from first"
    first.far.close()
    second.far.close()


def test_a_removed_endpoint_is_called_no_more_even_within_the_turn(hub: Hub, order: list[str]) -> None:
    echoes = [Echo(hub, order, name) for name in "ab"]

    def remove_other(self: Echo, other: Echo) -> None:
        order.append(f"read {self.name}")
        self.sock.recv(100)
        hub.remove(other)

    for echo, other in zip(echoes, reversed(echoes), strict=True):
        echo.on_readable = lambda echo=echo, other=other: remove_other(echo, other)  # type: ignore[method-assign, misc]
        echo.far.send(b"x")
    hub.turn()
    assert len(order) == 1
    for echo in echoes:
        echo.sock.close()
        echo.far.close()


def test_writable_is_called_only_while_watched(hub: Hub, order: list[str]) -> None:
    echo = Echo(hub, order, "a")
    assert not hub.turn()
    hub.watch(echo, READ | WRITE)
    assert hub.turn()
    assert order == ["writable a"]
    assert not hub.turn()
    echo.far.close()


async def test_run_serves_until_cancelled(hub: Hub, order: list[str]) -> None:
    echo = Echo(hub, order, "a")
    far = trio.socket.from_stdlib_socket(echo.far)
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.run)
        for word in (b"one", b"two"):
            await far.send(word)
            with trio.fail_after(5):
                assert await far.recv(10) == word
        nursery.cancel_scope.cancel()
    echo.far.close()


def test_an_endpoint_that_ends_itself_when_writable_is_not_read(hub: Hub, order: list[str]) -> None:
    class Ending(Echo):
        def on_writable(self) -> None:
            super().on_writable()
            self.hub.remove(self)
            self.sock.close()

    echo = Ending(hub, order, "a")
    hub.watch(echo, READ | WRITE)
    echo.far.send(b"x")
    assert hub.turn()
    assert order == ["writable a"]
    assert echo.fault is None
    echo.far.close()


@pytest.fixture
def linked(hub: Hub) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as near,
    ):
        far = server.accept()[0]
        with far:
            yield near, far


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.006, 0.02, 0.05])
def test_how_long_bytes_lay_there_while_the_process_stood_still(
    hub: Hub, linked: tuple[socket.socket, socket.socket], seconds: float
) -> None:
    """Never said to be longer than it was, and by two ticks shorter at most."""
    near, far = linked
    for _ in range(5):
        sent = hub.clock()
        far.send(b"x")
        reached = hub.clock()
        time.sleep(seconds)
        hub.now = hub.clock()
        near.recv(10)
        found = hub.late_with(near)
        taken = hub.clock() - hub.now
        assert hub.now - reached - 2 * TICK_SECONDS - taken <= found <= hub.now - sent


def test_a_long_turn_is_not_the_time_before_it(hub: Hub, linked: tuple[socket.socket, socket.socket]) -> None:
    near, far = linked
    sent = hub.clock()
    far.send(b"x")
    hub.now = hub.clock()
    time.sleep(0.03)
    assert 0.0 <= hub.late_with(near) <= hub.now - sent


def test_what_is_no_tcp_is_late_with_its_turn(hub: Hub, order: list[str]) -> None:
    echo = Echo(hub, order, "a")
    hub.late_seconds = 0.25
    assert hub.late_with(echo.sock) == 0.25
    echo.far.close()
