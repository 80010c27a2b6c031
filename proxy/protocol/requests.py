"""Client bytes to requests: the parsing half of the data plane's seam.

Two functions, both sans-I/O. ``scan_simple`` takes the run of plain single-key commands at the front of a
buffer (GET, SET, HGET, ... : what nearly all traffic is) and does per request only what routing needs: the
command, the raw frame and the slot. It stops at the first frame that is anything else, and ``RequestParser``
parses that one in full. A native twin replaces ``scan_simple`` and nothing more.

Frames that are relayed are strictly canonical: a length is ``0`` or digits without leading zero, each line
and each value ends in CRLF. Anything laxer is answered with a protocol error, so that a node never frames a
relayed request differently from us; on a connection that clients share this would hand one client's bytes to
another, or end the connection for all.
"""

from __future__ import annotations

import re
from binascii import crc_hqx
from dataclasses import dataclass

from routing.command import Command
from routing.slot import SLOT_COUNT, slot_of

LINE_BYTES_MAX = 64 * 1024  # Redis's PROTO_INLINE_MAX_SIZE; held by test_requests.py::test_endless_lines
ARGUMENTS_MAX = 1024 * 1024  # Redis's limit on a multibulk count
UNAUTHENTICATED_ARGUMENTS_MAX = 10  # as Redis, before AUTH
UNAUTHENTICATED_BULK_BYTES_MAX = 16 * 1024
PREFIX_BYTES_MAX = 64  # longer than any count, length and command name together
# Spellings of command prefixes that are remembered: the names are bounded, their case is not.
PREFIXES_MAX = 8192

SLOT_MASK = (
    SLOT_COUNT - 1
)  # as in slot_of, which the scan calls only for keys with a brace: a call costs time

LENGTHS: dict[bytes, int] = {b"%d" % n: n for n in range(4096)}  # canonical digits -> length

# b"*2\r\n$3\r\nGET" -> (command, argument count): prefixes that were parsed in full once and found simple.
_prefixes: dict[bytes, tuple[Command, int]] = {}


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds on one request. ``request_bytes_max`` counts the whole frame."""

    request_bytes_max: int = 64 * 1024 * 1024
    arguments_max: int = ARGUMENTS_MAX
    bulk_bytes_max: int = 64 * 1024 * 1024


class ProtocolError(Exception):
    """The client's bytes are not RESP. The text is Redis's own; the connection cannot go on."""


Simple = tuple[Command, bytes, int, bytes]  # a plain single-key request: command, raw frame, hash slot, key


def scan_simple(buffer: bytes, at: int, count_max: int, found: list[Simple], value_bytes_max: int) -> int:
    """Append (command, raw frame, slot, key) to ``found`` for each plain single-key request from ``at`` on.

    Stops before the first frame that is incomplete, not simple or not canonical, or after ``count_max``
    requests, and returns the offset it stopped at. Never raises: what it cannot take, RequestParser judges.
    """
    find, begins = buffer.find, buffer.startswith
    prefix_of = _prefixes.get
    length_of = LENGTHS.get
    # Of the last frame, up to its key. It is mostly the next one's as well, and then it means the same.
    header = b""
    while count_max:
        if header and begins(header, at):
            key_start = at + len(header)
        else:
            # The third line of the frame begins at the first "\r\n$" past "*N\r\n$": the fifth byte is inside the
            # name's length for N < 10, and longer counts still meet the same "\r\n$" or miss the dictionary.
            key_line = find(b"\r\n$", at + 5, at + PREFIX_BYTES_MAX)
            if key_line < 0:
                break
            known = prefix_of(buffer[at:key_line])
            if known is None:
                break
            line_end = find(b"\r\n", key_line + 3)
            length = length_of(buffer[key_line + 3 : line_end])
            if length is None or line_end < 0:
                break
            key_start = line_end + 2
            header = buffer[at:key_start]
            (command, argument_count), key_length = known, length
        end = key_start + key_length
        key = buffer[key_start:end]
        end += 2
        if buffer[end - 2 : end] != b"\r\n":
            break
        remaining = argument_count - 2
        while remaining:
            line_end = find(b"\r\n", end)
            if line_end < 0 or buffer[end] != 36:
                return at
            length = length_of(buffer[end + 1 : line_end])
            if length is None:
                length = parse_length(buffer[end + 1 : line_end])
                if length < 0 or length > value_bytes_max:
                    return at
            end = line_end + length + 4
            if buffer[end - 2 : end] != b"\r\n":  # not here yet, or something else
                return at
            remaining -= 1
        hash_slot = slot_of(key) if b"{" in key else crc_hqx(key, 0) & SLOT_MASK
        found.append((command, buffer[at:end], hash_slot, key))
        at = end
        count_max -= 1
    return at


def remember_simple(buffer: bytes, at: int, command: Command, argument_count: int) -> None:
    """Let scan_simple take frames that begin as the one at ``at``: a canonical, complete, plain single-key request."""
    key_line = buffer.find(b"\r\n$", at + 5)
    prefix = buffer[at:key_line]
    if argument_count > 999 or not prefix.startswith(b"*%d\r\n$" % argument_count):
        return
    if prefix.count(b"\r\n") != 2:
        return
    if len(_prefixes) >= PREFIXES_MAX:
        _prefixes.clear()
    _prefixes[prefix] = (command, argument_count)


def key_of_simple(raw: bytes) -> bytes:
    """The key of a frame that ``scan_simple`` took."""
    line = raw.find(b"\r\n$", 5) + 3
    end = raw.find(b"\r\n", line)
    return raw[end + 2 : end + 2 + int(raw[line:end])]


def with_key(raw: bytes, key: bytes) -> bytes:
    """The same frame with another key; ``raw`` is one that ``scan_simple`` took."""
    line = raw.find(b"\r\n$", 5) + 3
    end = raw.find(b"\r\n", line)
    after = end + 2 + int(raw[line:end])
    return b"%b%d\r\n%b%b" % (raw[:line], len(key), key, raw[after:])


def parse_length(digits: bytes) -> int:
    """A canonical non-negative decimal, or -1 when it is anything else."""
    if not digits.isdigit() or len(digits) > 10 or (digits[0] == 48 and len(digits) > 1):
        return -1
    return int(digits)


_NEGATIVE = re.compile(rb"-[1-9][0-9]{0,17}")


@dataclass(slots=True)
class _Partial:
    """A multibulk request whose end has not come yet. Offsets are relative to the frame's first byte."""

    count: int
    cursor: int
    arguments: list[bytes]


class RequestParser:
    """Parses one request at a time, resuming where the bytes ended, so that a huge request costs linear time."""

    __slots__ = ("_limits", "_partial", "needed")

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._partial: _Partial | None = None
        self.needed = 0  # bytes that the frame takes at least, counted from its first, when parse gave None

    @property
    def resuming(self) -> bool:
        """True while the frame at the front of the buffer is parsed in part: only ``parse`` may touch it."""
        return self._partial is not None

    def parse(
        self, buffer: bytes | bytearray, at: int, *, authenticated: bool = True
    ) -> tuple[list[bytes], int] | None:
        """The arguments of the request at ``at`` and the offset behind it, or None when it is incomplete.

        An empty request (a blank line, ``*0``) gives no arguments. After None, the next call must pass a
        buffer whose frame begins with the same bytes; ``needed`` says how many make a call worth while.
        Raises ProtocolError, with Redis's text, when no continuation could make it a request.
        """
        if self._partial is None:
            if buffer[at] != 42:
                return self._parse_inline(buffer, at)
            end = self._line_end(buffer, at + 1, at, "too big mbulk count string")
            if end < 0:
                return None
            digits = bytes(buffer[at + 1 : end])
            if _NEGATIVE.fullmatch(digits):  # as Redis: an empty request
                return [], end + 2
            count = parse_length(digits)
            if count < 0 or count > self._limits.arguments_max:
                raise ProtocolError("Protocol error: invalid multibulk length")
            if count > UNAUTHENTICATED_ARGUMENTS_MAX and not authenticated:
                raise ProtocolError("Protocol error: unauthenticated multibulk length")
            if count == 0:
                return [], end + 2
            self._partial = _Partial(count, end + 2 - at, [])
        return self._parse_arguments(buffer, at, self._partial, authenticated)

    def _parse_arguments(
        self, buffer: bytes | bytearray, at: int, partial: _Partial, authenticated: bool
    ) -> tuple[list[bytes], int] | None:
        cursor = at + partial.cursor
        arguments = partial.arguments
        size = len(buffer)
        limits = self._limits
        while len(arguments) < partial.count:
            if cursor >= size:
                self.needed = cursor + 1 - at  # which may already be wrong
                break
            if buffer[cursor] != 36:
                byte = 32 if buffer[cursor] in b"\r\n" else buffer[cursor]  # as Redis shows line ends
                got = chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
                raise ProtocolError(f"Protocol error: expected '$', got '{got}'")
            end = self._line_end(buffer, cursor + 1, at, "too big bulk count string")
            if end < 0:
                break
            length = parse_length(bytes(buffer[cursor + 1 : end]))
            if length < 0 or length > limits.bulk_bytes_max:
                raise ProtocolError("Protocol error: invalid bulk length")
            if length > UNAUTHENTICATED_BULK_BYTES_MAX and not authenticated:
                raise ProtocolError("Protocol error: unauthenticated bulk length")
            after = end + length + 4
            if after - at > limits.request_bytes_max:
                raise ProtocolError(
                    f"Protocol error: request over {limits.request_bytes_max} bytes"
                    " (setting clients.request_bytes_max)"
                )
            if after > size:
                self.needed = after - at
                break
            if buffer[after - 2 : after] != b"\r\n":
                raise ProtocolError(
                    "Protocol error: invalid CRLF in request"
                )  # Valkey 9's text; others look away
            arguments.append(bytes(buffer[end + 2 : after - 2]))
            cursor = after
        else:
            self._partial = None
            return arguments, cursor
        partial.cursor = cursor - at
        return None

    def _line_end(self, buffer: bytes | bytearray, start: int, at: int, error: str) -> int:
        """The offset of the CRLF that ends the line, or -1 when it has not come; a lone CR cannot be canonical."""
        end = buffer.find(b"\r", start)
        if end < 0:
            if len(buffer) - start > LINE_BYTES_MAX:
                raise ProtocolError(f"Protocol error: {error}")
        elif end + 1 < len(buffer):
            if buffer[end + 1] != 10:
                kind = "multibulk" if buffer[start - 1] == 42 else "bulk"
                raise ProtocolError(f"Protocol error: invalid {kind} length")
            return end
        self.needed = len(buffer) - at + 1
        return -1

    def _parse_inline(self, buffer: bytes | bytearray, at: int) -> tuple[list[bytes], int] | None:
        end = buffer.find(b"\n", at)
        if end < 0 or end - at > LINE_BYTES_MAX:
            if len(buffer) - at > LINE_BYTES_MAX:
                raise ProtocolError("Protocol error: too big inline request")
            self.needed = len(buffer) - at + 1
            return None
        arguments = split_inline(bytes(buffer[at:end]).removesuffix(b"\r"))
        if arguments is None:
            raise ProtocolError("Protocol error: unbalanced quotes in request")
        return arguments, end + 1


_ESCAPES = {ord("n"): b"\n", ord("r"): b"\r", ord("t"): b"\t", ord("b"): b"\b", ord("a"): b"\a"}
_HEX = frozenset(b"0123456789abcdefABCDEF")
_SPACE = frozenset(b" \t\n\v\f\r\0")
_WORD_END = frozenset(b" \t\n\r\0")  # as Redis: the other spaces stand between words, but end none


def split_inline(line: bytes) -> list[bytes] | None:
    """The words of an inline command, quoted as in redis-cli, or None when the quotes do not balance."""
    words: list[bytes] = []
    at, size = 0, len(line)
    while True:
        while at < size and line[at] in _SPACE:
            at += 1
        if at == size:
            return words
        word = bytearray()
        quote = 0
        while at < size:
            byte = line[at]
            if quote == 34 and byte == 92 and at + 1 < size:  # a backslash within double quotes
                if line[at + 1] == 120 and at + 3 < size and {line[at + 2], line[at + 3]} <= _HEX:
                    word.append(int(line[at + 2 : at + 4], 16))
                    at += 4
                    continue
                word += _ESCAPES.get(line[at + 1], line[at + 1 : at + 2])
                at += 2
                continue
            if quote == 39 and line[at : at + 2] == b"\\'":
                word.append(39)
                at += 2
                continue
            if quote:
                at += 1
                if byte != quote:
                    word.append(byte)
                    continue
                if at < size and line[at] not in _SPACE:  # a closing quote must end the word
                    return None
                quote = 0
                break
            if byte in _WORD_END:
                break
            if byte in (34, 39):
                quote = byte
            else:
                word.append(byte)
            at += 1
        if quote:
            return None
        words.append(bytes(word))
