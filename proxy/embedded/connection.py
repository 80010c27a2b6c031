"""A small RESP2 connection over Trio: commands out, Python values in.

For setting clusters up, moving slots and checking values. One task at a time uses a connection. A call that
is cancelled or fails closes it, because the reply that is still to come would answer the next call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from proxy.protocol import encode
from routing.topology import Address

_RECEIVE_BYTES = 65536

Argument = bytes | str | int


class ServerError(Exception):
    """An error reply. ``str()`` is its text, which begins with the code: ``MOVED 12 127.0.0.1:7001``."""

    @property
    def code(self) -> str:
        return str(self).partition(" ")[0]


class ConnectionLost(Exception):
    """The node could not be reached, or the connection ended before the reply. The command may have run."""


class Connection:
    """One connection to one node. Open it with `connected`."""

    def __init__(self, address: Address, stream: trio.abc.Stream) -> None:
        self.address = address
        self._stream = stream
        self._buffer = bytearray()
        self._at = 0  # where the next reply begins in the buffer

    async def call(self, *parts: Argument) -> Any:
        """Send one command and return its reply: bytes, int, None, or a list of these.

        Raises ServerError for an error reply and ConnectionLost. If cancelled, the command may have run.
        """
        (reply,) = await self.call_all([parts])
        if isinstance(reply, ServerError):
            raise reply
        return reply

    async def call_all(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Send the commands in one pipeline and return their replies in order.

        An error reply is a ServerError among them. Raises ConnectionLost.
        """
        try:
            await self._stream.send_all(b"".join([encode.command(*parts) for parts in commands]))
            return [await self._receive_reply() for _ in commands]
        except (trio.BrokenResourceError, trio.ClosedResourceError) as fault:
            await trio.aclose_forcefully(self._stream)
            raise ConnectionLost(f"{self.address}: the connection broke: {fault!r}") from fault
        except BaseException:
            await trio.aclose_forcefully(self._stream)
            raise

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def _receive_reply(self) -> Any:
        line = await self._receive_line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return ServerError(rest.decode(errors="replace"))
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else await self._receive_bulk(int(rest))
        if kind == b"*":
            return None if rest == b"-1" else [await self._receive_reply() for _ in range(int(rest))]
        raise ConnectionLost(f"{self.address}: not a RESP2 reply: {line[:40]!r}")

    async def _receive_line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n", self._at)) < 0:
            await self._receive_some()
        line = bytes(self._buffer[self._at : end])
        self._at = end + 2
        return line

    async def _receive_bulk(self, length: int) -> bytes:
        while len(self._buffer) < self._at + length + 2:
            await self._receive_some()
        value = bytes(self._buffer[self._at : self._at + length])
        self._at += length + 2
        return value

    async def _receive_some(self) -> None:
        del self._buffer[: self._at]
        self._at = 0
        data = await self._stream.receive_some(_RECEIVE_BYTES)
        if not data:
            raise ConnectionLost(f"{self.address}: closed by the other side before the reply")
        self._buffer += data


async def connect(address: Address) -> Connection:
    """A connection to ``address``; the caller closes it. Raises ConnectionLost when it cannot be reached."""
    try:
        stream = await trio.open_tcp_stream(address.host, address.port)
    except OSError as fault:
        raise ConnectionLost(f"{address}: cannot connect: {fault}") from fault
    return Connection(address, stream)


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[Connection]:
    """A connection for the length of a block."""
    connection = await connect(address)
    try:
        yield connection
    finally:
        await connection.aclose()
