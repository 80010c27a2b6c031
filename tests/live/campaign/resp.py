"""A minimal RESP2 and RESP3 client: bytes out, plain Python values in.

Owns one connection. Knows no command and never retries. RESP3 maps come as flat lists and sets as lists,
so that a checker sees the same shape in both protocols.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

RECEIVE_BYTES = 65536


class ErrorReply(bytes):
    """An error reply's text, without the leading ``-``."""


class BadReply(Exception):
    """The peer sent what is not RESP, or a push nobody asked for."""


class Incomplete(Exception):
    """The buffer ends before the reply does."""


Reply = int | bytes | ErrorReply | list["Reply"] | None


def frame(parts: Iterable[bytes | int]) -> bytes:
    """A request: an array of bulk strings."""
    encoded = [part if isinstance(part, bytes) else b"%d" % part for part in parts]
    return b"*%d\r\n%b" % (len(encoded), b"".join([b"$%d\r\n%b\r\n" % (len(p), p) for p in encoded]))


def parse(buffer: bytes | bytearray, start: int) -> tuple[Reply, int]:
    """The reply at ``start`` and where it ends. Raises Incomplete, or BadReply for what is not RESP."""
    end = buffer.find(b"\r\n", start)
    if end < 0:
        raise Incomplete
    kind = buffer[start : start + 1]
    line = bytes(buffer[start + 1 : end])
    end += 2
    if kind in b"$=" and kind:
        length = int(line)
        if length < 0:
            return None, end
        stop = end + length
        if len(buffer) < stop + 2:
            raise Incomplete
        return bytes(buffer[end:stop]), stop + 2
    if kind == b":":
        return int(line), end
    if kind == b"+" or kind == b",":
        return line, end
    if kind == b"-":
        return ErrorReply(line), end
    if kind == b"*" or kind == b"~" or kind == b"%":
        count = int(line)
        if count < 0:
            return None, end
        items: list[Reply] = []
        for _ in range(count * 2 if kind == b"%" else count):
            item, end = parse(buffer, end)
            items.append(item)
        return items, end
    if kind == b"_":
        return None, end
    if kind == b"#":
        return int(line == b"t"), end
    raise BadReply(f"not a reply: {bytes(buffer[start : start + 80])!r}")


class Connection:
    """One connection to the target. After any exception it must be closed: what it owes is unknown."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = bytearray()

    @classmethod
    async def open(cls, host: str, port: int, *, resp3: bool = False) -> Connection:
        """Connects, and with ``resp3`` says HELLO 3. Raises OSError, or BadReply if HELLO is refused."""
        connection = cls(await trio.open_tcp_stream(host, port))
        if resp3:
            try:
                [greeting] = await connection.exchange(frame([b"HELLO", 3]), 1)
                if isinstance(greeting, ErrorReply):
                    raise BadReply(f"HELLO 3: {greeting.decode()}")
            except BaseException:
                await connection.aclose_forcefully()  # noqa: ASYNC102  # it does not wait
                raise
        return connection

    async def exchange(self, payload: bytes, reply_count: int) -> list[Reply]:
        """Sends and waits for so many replies. Raises trio.BrokenResourceError when the peer is gone."""
        await self._stream.send_all(payload)
        return [await self.next_reply() for _ in range(reply_count)]

    async def next_reply(self) -> Reply:
        """The next reply in order. Raises trio.BrokenResourceError at the end of the stream."""
        while True:
            if self._received:
                try:
                    reply, end = parse(self._received, 0)
                except Incomplete:
                    pass
                except ValueError as problem:
                    raise BadReply(str(problem)) from problem
                else:
                    del self._received[:end]
                    return reply
            data = await self._stream.receive_some(RECEIVE_BYTES)
            if not data:
                raise trio.BrokenResourceError("the peer closed the connection")
            self._received += data

    async def send(self, payload: bytes) -> None:
        await self._stream.send_all(payload)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def aclose_forcefully(self) -> None:
        """Closes without waiting, also when cancelled."""
        await trio.aclose_forcefully(self._stream)
