"""Malformed bytes get from the proxy what a real server gives: its error text, and the connection's end or not.

Promise 7, and promise 6 for the clients beside: they go on unharmed. What differs on purpose is listed, with the
reason, so that the list cannot grow by itself.
"""

from __future__ import annotations

import pprint
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from proxy.app import Proxy
from proxy.protocol.encode import frame
from proxy.settings import AdminSettings, ClientSettings, ClusterSettings, ListenerSettings, Settings
from routing.topology import Address
from tests.live.conftest import SharedClusters, engine_named

pytestmark = pytest.mark.live

QUIET_SECONDS = 0.4  # a server that has said nothing for so long has nothing more to say
LOOPBACK = Address("127.0.0.1", 0)
PING = b"*1\r\n$4\r\nPING\r\n"

CASES: list[bytes] = [
    # counts
    *[
        b"*" + count + b"\r\n" + PING
        for count in (b"0", b"-1", b"-11", b"-0", b"+1", b"01", b" 1", b"1 ", b"", b"x")
    ],
    *[b"*" + count + b"\r\n" for count in (b"1.0", b"1_0", b"0x1", b"2147483648", b"99999999999999999999")],
    b"*-99999999999\r\n" + PING,
    b"*" + b"1" * 70_000,
    # lengths
    *[
        b"*1\r\n$" + length + b"\r\nPING\r\n"
        for length in (b"-1", b"-0", b"+4", b"04", b" 4", b"4 ", b"", b"x", b"4_0")
    ],
    *[
        b"*1\r\n$" + length + b"\r\n"
        for length in (b"536870913", b"2147483648", b"99999999999999999999", b"4.0")
    ],
    b"*1\r\n$" + b"1" * 70_000,
    # types
    *[b"*1\r\n" + line + b"\r\nPING\r\n" for line in (b"+4", b":4", b"4", b"@4", b"*4", b"%1", b"")],
    b"*2\r\n$4\r\nPING\r\n:1\r\n",
    b"*2\r\n$4\r\nECHO\r\n*1\r\n$1\r\nx\r\n",
    # half frames, then silence
    b"*",
    b"*1",
    b"*1\r",
    b"*1\r\n$",
    b"*1\r\n$4\r\nPIN",
    b"*1\r\n$4\r\nPING",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n",
    b"*" + b"1" * 1000,
    # deep nesting is no request
    b"*1\r\n" * 1000,
    # blank lines and inline commands
    b"\r\n\r\n\n" + PING,
    b"PING\r\nPING\n",
    b"  ping  \r\n",
    b'ECHO "a b"\r\n',
    b'ECHO "\\x41\\n\\"\\\\\\q\\x4"\r\n',
    b"ECHO 'a\\'b\\n'\r\n",
    b'ECHO ""\r\n',
    b'ECHO a"b"\r\n',
    b"ECHO a\vb\r\n",
    b"ECHO \f a\r\n",
    b'ECHO "a"b\r\n' + PING,
    b'ECHO "a\r\n' + PING,
    b"ECHO 'a\r\n" + PING,
    b'ECHO "a\\\r\n',
    b"NOSUCH a b\r\n" + PING,
    b"GET\r\n" + PING,
    b"x" * 70_000,
    b"PING " + b"x" * 70_000,
    # unknown commands and wrong numbers of arguments leave the connection open
    frame([b"NOSUCH", b"a" * 300, b"b"]) + PING,
    frame([b"GET"]) + PING,
    frame([b""]) + PING,
    # earlier requests are answered before the error
    PING * 3 + b"*1\r\n$x\r\n" + PING,
    frame([b"SET", b"k", b"v"]) + frame([b"GET", b"k"]) + b"*1\r\n:\r\n",
    # a browser, or a forged request, sends HTTP
    b"GET / HTTP/1.1\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\n\r\n" + PING,
    b"Host: x\r\n" + PING,
]

KNOWN: dict[bytes, str] = {
    b"*1\r\n$4\r\nPINGxx": "a value must end in CRLF, as Valkey 9 asks; Redis does not look",
    b"*1\r\n$4\rxPING\r\n": "a line must end in CRLF here; Redis does not look at the byte after CR",
    b"*1048577\r\n": "1048576 arguments at most, as Redis up to 6.2; later ones take up to 2147483647",
    b"*1\r\n\x01\r\n": "an unprintable type is shown as \\x01; Redis sends the byte itself",
    frame([b"\x00\xff"]) + PING: "what is no text is shown as U+FFFD; Redis sends the bytes, up to a NUL",
    b"PI\0NG\r\n": "a NUL is a space in an inline command; Redis waits for ever",
}


@asynccontextmanager
async def real_server(directory: Path) -> AsyncIterator[str]:
    """A standalone redis-server 7.0 on a Unix socket; its path."""
    program = shutil.which("/usr/bin/redis-server")
    if program is None:
        pytest.skip("needs Debian's redis-server, /usr/bin/redis-server")
    path = str(directory / "s")
    process = subprocess.Popen(  # noqa: ASYNC220  # fork and exec take a millisecond
        [program, "--port", "0", "--unixsocket", path, "--save", "", "--dir", str(directory)],
        stdout=subprocess.DEVNULL,
    )
    try:
        with trio.fail_after(10):
            while not Path(path).exists():
                await trio.sleep(0.02)
        yield path
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def running_proxy(
    shared_clusters: SharedClusters, clients: ClientSettings | None = None
) -> AsyncIterator[tuple[Address, Proxy]]:
    """A proxy in this process, before a cluster of three Redis 7.0 primaries."""
    async with shared_clusters.share(engine_named("redis-7.0")) as cluster:
        proxy = Proxy(
            Settings(
                cluster=ClusterSettings(seeds=cluster.addresses),
                listeners=(ListenerSettings(address=LOOPBACK),),
                admin=AdminSettings(address=LOOPBACK),
                clients=clients or ClientSettings(),
            )
        )
        async with trio.open_nursery() as nursery:
            started = await nursery.start(
                lambda task_status: proxy.run(with_signals=False, task_status=task_status)
            )
            yield started.listeners[0], proxy
            nursery.cancel_scope.cancel()


async def converse(stream: trio.SocketStream, data: bytes) -> tuple[bytes, bool]:
    """(what came back, whether the other side closed) after sending ``data``."""
    received = b""
    is_closed = False
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError:
        is_closed = True
    while not is_closed:
        with trio.move_on_after(QUIET_SECONDS) as scope:
            try:
                part = await stream.receive_some(65536)
            except trio.BrokenResourceError:
                part = b""
            received += part
            is_closed = not part
        if scope.cancelled_caught:
            break
    return received, is_closed


async def connect(place: str | Address) -> trio.SocketStream:
    if isinstance(place, str):
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.connect(place)
        return trio.SocketStream(sock)
    return await trio.open_tcp_stream(*place)


async def answers(place: str | Address, cases: list[bytes]) -> list[tuple[bytes, bool]]:
    """What each case gets on a connection of its own, all at once."""
    found: list[tuple[bytes, bool]] = [(b"", False)] * len(cases)

    async def one(index: int) -> None:
        async with await connect(place) as stream:
            found[index] = await converse(stream, cases[index])

    async with trio.open_nursery() as nursery:
        for index in range(len(cases)):
            nursery.start_soon(one, index)
    return found


async def bystander(address: Address, done: trio.Event, counts: list[int]) -> None:
    """An ordinary client that must not notice anything."""
    stream = await connect(address)
    async with stream:
        number = 0
        while not done.is_set():
            number += 1
            value = b"v%d" % number
            await stream.send_all(frame([b"SET", b"bystander", value]) + frame([b"GET", b"bystander"]))
            expected = b"+OK\r\n$%d\r\n%b\r\n" % (len(value), value)
            received = b""
            with trio.fail_after(10):
                while len(received) < len(expected):
                    part = await stream.receive_some(65536)
                    assert part, "the bystander was cut off"
                    received += part
            assert received == expected
            await trio.sleep(0.001)
        counts.append(number)


async def test_malformed_bytes_get_what_a_real_server_gives(
    tmp_path: Path, shared_clusters: SharedClusters
) -> None:
    async with (
        real_server(tmp_path) as server,
        running_proxy(shared_clusters) as (address, proxy),
        trio.open_nursery() as nursery,
    ):
        done = trio.Event()
        counts: list[int] = []
        nursery.start_soon(bystander, address, done, counts)
        cases = CASES + list(KNOWN)
        real = await answers(server, cases)
        ours = await answers(address, cases)
        done.set()
    different = {
        case[:80]: {"redis": one, "proxy": other}
        for case, one, other in zip(cases, real, ours, strict=True)
        if one != other
    }
    unknown = {case: it for case, it in different.items() if case not in KNOWN}
    assert not unknown, pprint.pformat(unknown, width=140)
    assert set(different) == set(KNOWN), "a known difference is none any more: take it off the list"
    assert counts
    assert counts[0] > 10
    assert proxy.hub.faults_total == 0


async def test_clients_that_never_read_never_finish_or_half_close(shared_clusters: SharedClusters) -> None:
    """Promise 7: each keeps what the settings allow, and the bystander is served all the while."""
    limits = replace(ClientSettings(), unsent_bytes_max=200_000, unsent_bytes_hard_max=8_000_000)
    async with running_proxy(shared_clusters, limits) as (address, proxy), trio.open_nursery() as nursery:
        done = trio.Event()
        counts: list[int] = []
        nursery.start_soon(bystander, address, done, counts)

        # Half-closed, as printf ... | nc: the replies come, then the end.
        async with await connect(address) as stream:
            await stream.send_all(
                PING + frame([b"SET", b"half", b"1"]) + b"PING\r\n" + frame([b"GET", b"half"])
            )
            await stream.send_eof()
            received = b""
            with trio.fail_after(5):
                while part := await stream.receive_some(65536):
                    received += part
            assert received == b"+PONG\r\n+OK\r\n+PONG\r\n$1\r\n1\r\n"

        # Never reads: it is sent no more work; what is kept for it stays within the limits.
        async with await connect(address) as setter:
            assert await converse(setter, frame([b"SET", b"big", b"x" * 100_000])) == (b"+OK\r\n", False)
        stalled = await connect(address)
        kept = 0
        with trio.move_on_after(2):
            while True:
                await stalled.send_all(frame([b"GET", b"big"]) * 10)
                kept = max(kept, *[client.transport.unsent_bytes for client in proxy.server.clients()])
                await trio.sleep(0.001)
        assert 200_000 < kept < 8_300_000

        # Never finish: half requests of all kinds, many of them.
        idle = [await connect(address) for _ in range(50)]
        for number, stream in enumerate(idle):
            half = [b"*", b"*2\r\n$3\r\nGET\r\n$5\r\nab", b"*2\r\n$3\r\nGET\r\n$60000000\r\n", b"GET "][
                number % 4
            ]
            await stream.send_all(half)
        await trio.sleep(0.2)
        assert sum(client._unread_bytes for client in proxy.server.clients()) < 50 * 100 + 2 * 65536

        done.set()
        for stream in [*idle, stalled]:
            await stream.aclose()
        with trio.fail_after(5):
            while proxy.server.client_count > 1:
                await trio.sleep(0.02)
    assert counts
    assert counts[0] > 10
    assert proxy.hub.faults_total == 0
