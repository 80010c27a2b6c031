"""Node bytes to reply frames: where a reply ends, and what an array holds.

Replies are relayed as they came, so the common work is only to find a frame's end. ``FrameScanner`` does so for
nested replies and resumes where the bytes ended. ``decode`` makes Python values, for the proxy's own questions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from proxy.protocol.requests import LENGTHS

# The length after "$": canonical digits, or -1 for a nil.
BULK_LENGTHS: dict[bytes, int] = {**LENGTHS, b"-1": -1}

ONE_LINE = frozenset(b"+-:_#,(")  # the frame is the line
BULK = frozenset(b"$=!")  # a length, then that many bytes and CRLF
AGGREGATE = frozenset(b"*%~>|")  # a count of frames
PUSH = 62
ERROR = 45


class ReplyError(Exception):
    """What a node sent is not RESP: the connection's framing is lost and it must be closed."""


class FrameScanner:
    """Finds the end of one reply of any depth. A single counter suffices: an aggregate adds its members to it.

    ``needed`` is the number of bytes, counted from the frame's first, that make the next call worth while.
    """

    __slots__ = ("_cursor", "_remaining", "needed")

    def __init__(self) -> None:
        self._cursor = 0  # relative to the frame's first byte
        self._remaining = 1  # frames that are still to be passed
        self.needed = 0

    @property
    def has_begun(self) -> bool:
        """Whether the next call must be for the same frame as the last one."""
        return self._cursor > 0

    def end_of(self, buffer: bytes | bytearray, at: int) -> int:
        """The offset behind the frame that begins at ``at``, or -1 when it is not complete.

        After -1 the next call must be for the same frame, with more bytes. Raises ReplyError on bytes that
        begin no RESP type.
        """
        cursor = at + self._cursor
        remaining = self._remaining
        find = buffer.find
        size = len(buffer)
        lengths = BULK_LENGTHS.get
        while remaining:
            line_end = find(b"\r\n", cursor)
            if line_end < 0:
                self.needed = size - at + 1
                break
            kind = buffer[cursor]
            if kind == 36:
                length = lengths(bytes(buffer[cursor + 1 : line_end]))
                if length is None:
                    length = number_of(buffer[cursor + 1 : line_end])
                after = line_end + 2 if length < 0 else line_end + length + 4
            elif kind in ONE_LINE:
                after = line_end + 2
            elif kind in AGGREGATE:
                count = number_of(buffer[cursor + 1 : line_end])
                if kind == 37:
                    count *= 2
                elif kind == 124:
                    count = count * 2 + 1  # attributes stand before the value that they describe
                if count > 0:
                    remaining += count
                after = line_end + 2
            elif kind in BULK:
                length = number_of(buffer[cursor + 1 : line_end])
                after = line_end + length + 4
            else:
                raise ReplyError(f"no RESP type begins with byte 0x{kind:02x}")
            if after > size:
                self.needed = after - at
                break
            cursor = after
            remaining -= 1
        else:
            self._cursor, self._remaining = 0, 1
            return cursor
        self._cursor, self._remaining = cursor - at, remaining
        return -1


def end_of_pair(buffer: bytes, at: int, size: int) -> int:
    """The offset behind two bulk strings that begin at ``at``, nils included; 0 if they are not whole, or others.

    ``size``: of the buffer. What it does not take, ``FrameScanner`` does.
    """
    find = buffer.find
    lengths = BULK_LENGTHS.get
    for _ in (1, 2):
        line_end = find(b"\r\n", at)
        if line_end < 0 or buffer[at] != 36:
            return 0
        length = lengths(buffer[at + 1 : line_end])
        if length is None:
            return 0
        at = line_end + 2 if length < 0 else line_end + length + 4
    return at if at <= size else 0


def end_of_reply(buffer: bytes, at: int = 0) -> int:
    """The offset behind the complete frame at ``at``, or -1 when it is incomplete."""
    return FrameScanner().end_of(buffer, at)


def elements(reply: bytes) -> list[bytes]:
    """The raw frames of an array's members. Raises ReplyError when ``reply`` is not one whole array."""
    line_end = reply.find(b"\r\n")
    if reply[:1] not in (b"*", b"~", b">") or line_end < 0:
        raise ReplyError(f"expected an array, got {reply[:40]!r}")
    at = line_end + 2
    found = []
    scanner = FrameScanner()
    for _ in range(number_of(reply[1:line_end])):
        end = scanner.end_of(reply, at)
        if end < 0:
            raise ReplyError("an array ended early")
        found.append(reply[at:end])
        at = end
    return found


def number_of(digits: bytes | bytearray) -> int:
    """A length or count. Raises ReplyError."""
    try:
        return int(digits)
    except ValueError:
        raise ReplyError(f"{digits[:20]!r} is no length") from None


class ServerError(Exception):
    """An error reply as a value; its text is the server's, without the leading ``-``."""


def decode(reply: bytes) -> Any:
    """One whole reply as Python values: bytes, int, float, bool, None, list, dict, ServerError.

    Sets and pushes become lists; attributes are dropped. An error inside is returned, not raised.
    """
    value, end = _decode(reply, 0)
    if end != len(reply):
        raise ReplyError("bytes follow the reply")
    return value


def _decode(buffer: bytes, at: int) -> tuple[Any, int]:
    line_end = buffer.find(b"\r\n", at)
    if line_end < 0:
        raise ReplyError("a reply ended early")
    kind, line = buffer[at], buffer[at + 1 : line_end]
    after = line_end + 2
    if kind in BULK:
        length = number_of(line)
        if length < 0:
            return None, after
        body = buffer[after : after + length]
        if len(body) < length:
            raise ReplyError("a reply ended early")
        value: Any = (
            body[4:] if kind == 61 else ServerError(body.decode(errors="replace")) if kind == 33 else body
        )
        return value, after + length + 2
    if kind in AGGREGATE:
        count = number_of(line)
        if count < 0:
            return None, after
        if kind in (37, 124):
            pairs = {}
            for _ in range(count):
                key, after = _decode(buffer, after)
                pairs[_hashable(key)], after = _decode(buffer, after)
            return _decode(buffer, after) if kind == 124 else (pairs, after)
        items = []
        for _ in range(count):
            item, after = _decode(buffer, after)
            items.append(item)
        return items, after
    return _decode_line(kind, line), after


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(member)) for key, member in value.items())
    return value


_LINES: dict[int, Callable[[bytes], Any]] = {
    43: bytes,
    58: int,
    40: int,
    44: float,
    35: lambda line: line == b"t",
    95: lambda line: None,
    45: lambda line: ServerError(line.decode(errors="replace")),
}


def _decode_line(kind: int, line: bytes) -> Any:
    try:
        return _LINES[kind](line)
    except (KeyError, ValueError):
        raise ReplyError(f"unreadable reply {bytes([kind]) + line[:40]!r}") from None
