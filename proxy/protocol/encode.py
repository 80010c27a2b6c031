"""Values to RESP bytes.

Replies that differ between RESP2 and RESP3 take ``resp3``; the rest are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OK = b"+OK\r\n"
PONG = b"+PONG\r\n"
QUEUED = b"+QUEUED\r\n"
EMPTY_ARRAY = b"*0\r\n"


def simple(text: str) -> bytes:
    return b"+%s\r\n" % text.encode()


def error(message: str) -> bytes:
    """An error reply. ``message`` begins with its code, e.g. ``ERR ...``; line breaks become spaces."""
    return b"-%s\r\n" % message.replace("\r", " ").replace("\n", " ").encode()


def integer(number: int) -> bytes:
    return b":%d\r\n" % number


def bulk(value: bytes | str) -> bytes:
    if isinstance(value, str):
        value = value.encode()
    return b"$%d\r\n%b\r\n" % (len(value), value)


def null(resp3: bool) -> bytes:
    return b"_\r\n" if resp3 else b"$-1\r\n"


def array(items: Sequence[bytes]) -> bytes:
    """An array of items that are encoded already."""
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def mapping(pairs: Sequence[tuple[bytes, bytes]], resp3: bool) -> bytes:
    """A map of encoded keys and values: a flat array in RESP2."""
    body = b"".join([part for pair in pairs for part in pair])
    return b"%%%d\r\n%b" % (len(pairs), body) if resp3 else b"*%d\r\n%b" % (2 * len(pairs), body)


def command(*parts: bytes | str | int) -> bytes:
    """A request frame: an array of bulk strings."""
    encoded = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return frame(encoded)


def frame(parts: Iterable[bytes]) -> bytes:
    """A request frame of parts that are bytes already."""
    parts = list(parts)
    return b"*%d\r\n%b" % (len(parts), b"".join([b"$%d\r\n%b\r\n" % (len(p), p) for p in parts]))
