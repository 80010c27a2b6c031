"""The load sees each fault for what it is: shown on a server that commits them.

A `FaultyProxy` passes everything on to a real, single server and spoils chosen replies. Each test plants one
fault and finds it counted under its name, and nothing else; without one, nothing is counted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.embedded.engine import EngineNotFound, find_engine
from routing.topology import Address
from tests.live.campaign.keys import FaultKind
from tests.live.campaign.proxies import free_address, serving_process
from tests.live.campaign.resp import Incomplete, parse
from tests.live.campaign.workload import Load, LoadOptions

pytestmark = pytest.mark.live

SECONDS = 1.0
RATE = 800.0
QUEUED = b"+QUEUED\r\n"

Command = list[bytes]
Spoil = Callable[[Command, bytes], bytes | None]  # request, true reply -> what the client gets; None: never


class FaultyProxy:
    """Relays one client connection to one server connection, frame by frame."""

    def __init__(self, server: Address) -> None:
        self._server = server
        self.spoil: Spoil | None = None
        self.planted = 0

    async def serve(self, client: trio.SocketStream) -> None:
        """One request, one reply, so that each reply's request is known."""
        received = bytearray()
        async with client, await trio.open_tcp_stream(*self._server) as server:
            async for data in client:
                received += data
                for command, frame in frames_in(received):
                    await server.send_all(frame)
                    reply = await _one_reply(server)
                    # Inside MULTI each request has its true reply, so that a fault is one request's.
                    given = self.spoil(command, reply) if self.spoil and reply != QUEUED else reply
                    self.planted += given != reply
                    if given is None:
                        await trio.sleep_forever()
                    else:
                        await client.send_all(given)


def frames_in(received: bytearray) -> Iterator[tuple[Command, bytes]]:
    """The complete requests, which are taken out of ``received``."""
    while received:
        try:
            command, end = parse(received, 0)
        except Incomplete:
            return
        frame = bytes(received[:end])
        del received[:end]
        yield command, frame  # type: ignore[misc]


async def _one_reply(server: trio.SocketStream) -> bytes:
    received = bytearray()
    while True:
        received += await server.receive_some(65536)
        try:
            _, end = parse(received, 0)
        except Incomplete:
            continue
        assert end == len(received)
        return bytes(received)


@asynccontextmanager
async def faulty_proxy(tmp_path: Path) -> AsyncIterator[tuple[FaultyProxy, Address]]:
    try:
        engine = find_engine()
    except EngineNotFound as absent:
        pytest.skip(str(absent))
    address = free_address()
    options = ["--port", str(address.port), "--bind", address.host, "--save", "", "--dir", str(tmp_path)]
    async with serving_process([*engine.server, *options], address), trio.open_nursery() as nursery:
        proxy = FaultyProxy(address)
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(_serve_until_closed, proxy, listener)
        yield proxy, Address(*listener.socket.getsockname())
        nursery.cancel_scope.cancel()


async def _serve_until_closed(proxy: FaultyProxy, listener: trio.SocketListener) -> None:
    async def handle(client: trio.SocketStream) -> None:
        try:
            await proxy.serve(client)
        except trio.BrokenResourceError:  # the load gave the connection up, as it must after a hang
            return

    await trio.serve_listeners(handle, [listener])


async def seen(tmp_path: Path, spoil: Spoil | None) -> tuple[dict[str, int], FaultyProxy, dict[str, Any]]:
    """The faults that the load counted while ``spoil`` was in place, the proxy, and the whole result."""
    async with faulty_proxy(tmp_path) as (proxy, address):
        options = LoadOptions(
            host=address.host,
            port=address.port,
            slots=(0, 1, 9000),
            keys_per_slot=60,
            clients=8,
            pipelined=2,
            rate=RATE,
            deadline_seconds=0.5,
        )
        load = Load(options)
        await load.prepare()
        load.enter("spoilt")
        proxy.spoil = spoil
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await trio.sleep(SECONDS)
            load.finish()
        result = load.result()
        faults = {kind: count for kind, count in result["phases"]["spoilt"]["faults"].items() if count}
        return faults, proxy, result


async def test_an_honest_server_shows_no_fault(tmp_path: Path) -> None:
    """What is right is not counted, in RESP2 and RESP3, pipelined or not, and everything is tried."""
    faults, _, result = await seen(tmp_path, None)
    assert faults == {}, result["examples"]
    assert result["unsupported"] == {}
    assert result["resp3"]
    assert result["phases"]["spoilt"]["reads"] > 100
    assert result["phases"]["spoilt"]["writes"] > 50


def every(nth: int, spoil: Spoil) -> Spoil:
    """Spoils one of ``nth`` replies, and only those that ``spoil`` changes count."""
    count = 0

    def sometimes(command: Command, reply: bytes) -> bytes | None:
        nonlocal count
        given = spoil(command, reply)
        count += given != reply
        return given if given != reply and count % nth == 0 else reply

    return sometimes


def nil(command: Command, reply: bytes) -> bytes:
    return b"$-1\r\n" if command[0] == b"GET" and not command[1].startswith(b"churned") else reply


def nil_in_mget(command: Command, reply: bytes) -> bytes:
    if command[0] != b"MGET" or command[1].startswith(b"churned"):
        return reply
    first = reply.index(b"\r\n") + 2
    _, end = parse(reply, first)
    return reply[:first] + b"$-1\r\n" + reply[end:]


def nothing(command: Command, reply: bytes) -> bytes:
    """Empty, zero and absent, as each command says it of a key that is not there."""
    if command[0] in (b"HGETALL", b"LRANGE", b"SMEMBERS", b"ZRANGE", b"XRANGE", b"XREVRANGE", b"GEOSEARCH"):
        return b"*0\r\n"
    if command[0] in (b"EXISTS", b"STRLEN", b"HLEN", b"LLEN", b"SCARD", b"ZCARD", b"XLEN", b"PFCOUNT"):
        return reply if any(name.startswith(b"churned") for name in command[1:]) else b":0\r\n"
    if command[0] in (b"TTL", b"TYPE") and not command[1].startswith(b"churned"):
        return b":-2\r\n" if command[0] == b"TTL" else b"+none\r\n"
    return reply


class Stale:
    """Answers a GET, HGET or XREVRANGE with what the same request got the first time."""

    def __init__(self) -> None:
        self._first: dict[tuple[bytes, ...], bytes] = {}

    def __call__(self, command: Command, reply: bytes) -> bytes:
        if command[0] not in (b"GET", b"HGET", b"XREVRANGE") or reply[:1] in (b"_", b"-"):
            return reply
        if b"churned" in command[1] or reply == b"$-1\r\n":
            return reply
        return self._first.setdefault(tuple(command), reply)


class Swapped:
    """Answers a GET with the reply to the GET before it."""

    def __init__(self) -> None:
        self._before: tuple[Command, bytes] | None = None

    def __call__(self, command: Command, reply: bytes) -> bytes:
        if command[0] != b"GET" or b"churned" in command[1]:
            return reply
        before, self._before = self._before, (command, reply)
        return before[1] if before and before[0] != command else reply


def refusing(words: bytes) -> Spoil:
    return lambda command, reply: b"-%b\r\n" % words if command[0] in (b"GET", b"HSET") else reply


def silent(command: Command, reply: bytes) -> bytes | None:
    return None if command[0] == b"LRANGE" else reply


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        pytest.param(every(5, nil), FaultKind.NIL, id="nil"),
        pytest.param(every(3, nil_in_mget), FaultKind.NIL, id="nil-in-mget"),
        pytest.param(every(3, nothing), FaultKind.NIL, id="empty-zero-none"),
        pytest.param(every(5, refusing(b"MOVED 0 127.0.0.1:7000")), FaultKind.LEAKED, id="moved"),
        pytest.param(every(5, refusing(b"TRYAGAIN Multiple keys request")), FaultKind.LEAKED, id="tryagain"),
        pytest.param(every(5, refusing(b"ERR upstream failure")), FaultKind.ERROR, id="error"),
    ],
)
async def test_each_planted_fault_is_counted_once_under_its_name(
    tmp_path: Path, spoil: Spoil, kind: FaultKind
) -> None:
    """As many as were planted are seen, and no other kind."""
    faults, proxy, result = await seen(tmp_path, spoil)
    assert proxy.planted > 0
    assert faults == {kind.value: proxy.planted}, result["examples"]


async def test_swapped_replies_are_counted_each(tmp_path: Path) -> None:
    """As wrong; or as stale where the two that were swapped are values of one key."""
    faults, proxy, result = await seen(tmp_path, every(5, Swapped()))
    assert sum(faults.values()) == proxy.planted, result["examples"]
    assert faults["wrong"] > faults.get("stale", 0)
    assert set(faults) <= {"wrong", "stale"}


async def test_a_stale_value_is_counted_as_stale(tmp_path: Path) -> None:
    """Not each old reply is wrong: its write may not have been acknowledged when the read began."""
    faults, proxy, result = await seen(tmp_path, Stale())
    assert set(faults) == {"stale"}, result["examples"]
    assert 0 < faults["stale"] <= proxy.planted


async def test_a_reply_that_never_comes_is_a_hang(tmp_path: Path) -> None:
    """A silent server does not stop the load, and what was asked behind the silence hangs too."""
    faults, proxy, result = await seen(tmp_path, silent)
    assert set(faults) == {"hang"}, result["examples"]
    assert faults["hang"] >= proxy.planted > 0


async def test_a_write_that_runs_twice_is_wrong(tmp_path: Path) -> None:
    """A counter that is one too high shows that a write was repeated."""

    def twice(command: Command, reply: bytes) -> bytes:
        return b":%d\r\n" % (int(reply[1:]) + 1) if command[0] == b"INCR" else reply

    faults, proxy, result = await seen(tmp_path, every(4, twice))
    assert faults == {"wrong": proxy.planted}, result["examples"]
    assert proxy.planted > 0


async def test_a_scan_that_leaves_a_key_out_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each key of a full iteration that did not appear counts."""
    monkeypatch.setattr("tests.live.campaign.workload.SCAN_PAUSE_SECONDS", 0.5)

    def shorter(command: Command, reply: bytes) -> bytes:
        if command[0] != b"SCAN":
            return reply
        return reply.replace(b"string:{", b"strong:{", 1)

    faults, _, result = await seen(tmp_path, shorter)
    assert set(faults) == {"missed"}, result["examples"]


async def test_a_closed_connection_is_an_error(tmp_path: Path) -> None:
    """Requests that were cut off count, and the clients go on with new connections."""

    def end(command: Command, reply: bytes) -> bytes:
        if command[0] == b"LLEN":
            raise trio.BrokenResourceError("planted")
        return reply

    faults, _, result = await seen(tmp_path, end)
    assert set(faults) == {"error"}, result["examples"]
