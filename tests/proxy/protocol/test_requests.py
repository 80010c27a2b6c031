"""Promise 7, and the ground of promise 6: client bytes are framed as Redis frames them, however they are cut.

``reference_frame`` is a second parser, written from the engines' rules alone and much simpler than the proxy's: it
sees whole input at once. Where the proxy's parsers relay a frame, it must frame the same bytes alike; else one
client's bytes could become another's command on a shared upstream connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.protocol import requests
from proxy.protocol.encode import frame
from proxy.protocol.requests import (
    ARGUMENTS_MAX,
    LINE_BYTES_MAX,
    ProtocolError,
    RequestLimits,
    RequestParser,
    Simple,
    parse_length,
    remember_simple,
    scan_simple,
    split_inline,
)
from routing.command import COMMANDS, lookup
from routing.slot import slot_of

LIMITS = RequestLimits(request_bytes_max=1024 * 1024, bulk_bytes_max=512 * 1024)
GOOD_LENGTH = re.compile(rb"0|[1-9][0-9]*")

# -- the reference


def reference_frame(data: bytes) -> tuple[list[bytes], int] | None:
    """(arguments, length of the frame) of the multibulk request at the front, None when it is not one, or not whole."""
    found = re.match(rb"\*([1-9][0-9]*)\r\n", data)
    if found is None:
        return None
    at = found.end()
    arguments = []
    for _ in range(int(found[1])):
        header = re.compile(rb"\$(0|[1-9][0-9]*)\r\n").match(data, at)
        if header is None:
            return None
        at = header.end() + int(header[1]) + 2
        if data[at - 2 : at] != b"\r\n":  # Valkey 9 closes the connection for this
            return None
        arguments.append(data[header.end() : at - 2])
    return arguments, at


def parse_all(data: bytes, cuts: Iterator[int] | None = None) -> tuple[list[list[bytes]], str | None, bytes]:
    """(requests, error text, bytes left) of ``data``, fed to one parser in chunks of the sizes that ``cuts`` gives.

    Looks again only when ``needed`` bytes are there, as the client connection does.
    """
    parser = RequestParser(LIMITS)
    parsed: list[list[bytes]] = []
    buffer = b""
    fed = 0
    while fed < len(data):
        size = len(data) if cuts is None else max(1, next(cuts))
        buffer += data[fed : fed + size]
        fed += size
        while buffer and len(buffer) >= parser.needed:
            try:
                result = parser.parse(buffer, 0)
            except ProtocolError as error:
                return parsed, str(error), b""
            if result is None:
                assert parser.needed > len(buffer), "a second look at the same bytes would be in vain"
                break
            arguments, end = result
            parser.needed = 0
            parsed.append(arguments)
            buffer = buffer[end:]
    return parsed, None, buffer


def ones() -> Iterator[int]:
    while True:
        yield 1


def cycle(sizes: list[int]) -> Iterator[int]:
    while True:
        yield from sizes


# -- what clients send

ARGUMENT = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [b"", b"\r\n", b"$3\r\n", b"*1\r\n$4\r\nPING\r\n", b"\r\n$3\r\nGET", b"x" * 5000, b"{a}b"]
    ),
)
ARGUMENTS = st.lists(ARGUMENT, min_size=1, max_size=6)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=20)


@given(st.lists(ARGUMENTS, min_size=1, max_size=5), SIZES)
def test_generated_commands_round_trip_however_they_are_cut(
    commands: list[list[bytes]], sizes: list[int]
) -> None:
    data = b"".join(map(frame, commands))
    for cuts in (None, ones() if len(data) < 2000 else cycle([997]), cycle(sizes)):
        assert parse_all(data, cuts) == (commands, None, b"")


@given(ARGUMENTS, st.binary(max_size=30))
def test_trailing_bytes_are_left_alone(arguments: list[bytes], after: bytes) -> None:
    raw = frame(arguments)
    assert RequestParser(LIMITS).parse(raw + after, 0) == (arguments, len(raw))
    assert RequestParser(LIMITS).parse(b"junk" + raw + after, 4) == (arguments, 4 + len(raw))


@given(ARGUMENTS)
def test_every_true_prefix_is_incomplete(arguments: list[bytes]) -> None:
    raw = frame(arguments)
    for size in range(1, min(len(raw), 200)):
        parser = RequestParser(LIMITS)
        assert parser.parse(raw[:size], 0) is None
        assert size < parser.needed <= len(raw)


MUTATION = st.tuples(
    st.sampled_from(["flip", "insert", "delete", "truncate"]), st.integers(0, 400), st.integers(0, 255)
)


def mutated(data: bytes, mutations: list[tuple[str, int, int]]) -> bytes:
    for kind, place, byte in mutations:
        at = place % (len(data) + 1)
        match kind:
            case "flip":
                data = data[:at] + bytes([byte]) + data[at + 1 :]
            case "insert":
                data = data[:at] + bytes([byte]) + data[at:]
            case "delete":
                data = data[:at] + data[at + 1 :]
            case "truncate":
                data = data[:at]
    return data


ERROR_TEXT = re.compile(
    r"Protocol error: (too big (mbulk count string|bulk count string|inline request)"
    r"|invalid (multibulk|bulk) length|invalid CRLF in request"
    r"|unbalanced quotes in request|expected '\$', got '(.|\\x[0-9a-f]{2})'"
    r"|request over 1048576 bytes \(setting clients\.request_bytes_max\))"
)


@given(st.lists(ARGUMENTS, min_size=1, max_size=3), st.lists(MUTATION, min_size=1, max_size=4), SIZES)
@settings(max_examples=300)
def test_mutated_frames_parse_as_the_reference_does_or_raise_redis_own_text(
    commands: list[list[bytes]], mutations: list[tuple[str, int, int]], sizes: list[int]
) -> None:
    """Cuts change nothing, neither what is parsed nor where it fails, and multibulk framing is the reference's."""
    data = mutated(b"".join(map(frame, commands)), mutations)
    whole = parse_all(data)
    # A CR at the very end of a chunk leaves its line open: only whole input can be compared in what is left over.
    cut = parse_all(data, cycle(sizes))
    assert cut[0] == whole[0]
    assert cut[1] == whole[1]
    if whole[1] is not None:
        assert ERROR_TEXT.fullmatch(whole[1]), whole[1]
    at = 0
    parser = RequestParser(LIMITS)
    for expected in whole[0]:
        result = parser.parse(data, at)
        assert result is not None
        arguments, end = result
        assert arguments == expected
        if data[at] == 42 and arguments:
            assert reference_frame(data[at:]) == (arguments, end - at)
        at = end


def test_a_wrong_byte_is_refused_when_it_comes_however_its_frame_was_cut() -> None:
    data = b"*1\r\n\x00"
    assert (
        parse_all(data) == parse_all(data, ones()) == ([], "Protocol error: expected '$', got '\\x00'", b"")
    )


# -- the fast scan


@pytest.fixture(autouse=True)
def _forget_prefixes() -> Iterator[None]:
    requests._prefixes.clear()
    yield
    requests._prefixes.clear()


def learn(arguments: list[bytes]) -> None:
    """As the client connection does with a request that it parsed in full."""
    command = lookup(arguments)
    if command is not None and command.is_single_key_first:
        remember_simple(frame(arguments), 0, command, len(arguments))


def test_no_simple_command_may_block() -> None:
    """A command that may block never goes over a shared connection, so the scan must not take it."""
    simple = [command for command in COMMANDS if command.is_single_key_first]
    assert len(simple) > 100
    assert not [command.name for command in simple if command.is_blocking]


LEARNED = st.lists(
    st.builds(
        lambda name, rest, lower: [name.lower() if lower else name, *rest],
        st.sampled_from([b"GET", b"SET", b"HGET", b"INCR", b"ZADD", b"APPEND"]),
        st.lists(ARGUMENT, min_size=1, max_size=12),
        st.booleans(),
    ),
    max_size=6,
)
BAD_LENGTHS = [
    b"+3",
    b"03",
    b" 3",
    b"3 ",
    b"3_0",
    b"-0",
    b"-1",
    b"",
    b"0x3",
    b"3\r",
    b"99999999999999999999",
    b"3.0",
]


@st.composite
def near_frames(draw: st.DrawFn) -> bytes:
    """A frame whose lengths may be spelled in ways that other parsers take, int() among them."""
    arguments = draw(
        st.builds(
            lambda name, rest: [name, *rest],
            st.sampled_from([b"GET", b"SET", b"get", b"HGET", b"INCR", b"PING", b"MGET"]),
            st.lists(ARGUMENT, max_size=4),
        )
    )
    spelled = st.one_of(st.none(), st.sampled_from(BAD_LENGTHS), st.integers(-3, 12).map(lambda n: b"%d" % n))

    def length(true: int) -> bytes:
        other = draw(spelled) if draw(st.integers(0, 5)) == 0 else None
        return b"%d" % true if other is None else other

    parts = [b"*" + length(len(arguments)) + b"\r\n"]
    for argument in arguments:
        end = b"\r\n" if draw(st.integers(0, 15)) else draw(st.binary(min_size=2, max_size=2))
        kind = b"$" if draw(st.integers(0, 15)) else draw(st.sampled_from([b":", b"+", b"*", b"-"]))
        parts.append(kind + length(len(argument)) + b"\r\n" + argument + end)
    return b"".join(parts)


@given(LEARNED, st.lists(near_frames(), min_size=1, max_size=4), st.lists(MUTATION, max_size=2))
@settings(max_examples=500)
@example([[b"GET", b"k"]], [b"*2\r\n$3\r\nGET\r\n$+1\r\nk\r\n"], [])
@example([[b"SET", b"k", b"v"]], [b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3_0\r\n" + b"v" * 30 + b"\r\n"], [])
@example([[b"SET", b"k", b"v"]], [b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n:1\r\nv\r\n"], [])
@example([[b"SET"] + [b"v"] * 11], [frame([b"SET"] + [b"w"] * 11)], [])
@example([[b"GET", b"k"]], [frame([b"GET", b"k"]), b"*2\r\n$3\r\nGET\r\n$1\r\nkk\r\n"], [])
@example([[b"GET", b"k"]], [frame([b"GET", b"k"]), frame([b"GET", b"{t}2"]), frame([b"GET", b"{t}3"])], [])
@example([[b"GET", b"k"]], [frame([b"GET", b"k"]), b"*2\r\n$3\r\nGET\r\n$1\r\n"], [])
@example([[b"SET", b"k", b"v"], [b"GET", b"k"]], [frame([b"SET", b"k", b"v"]), frame([b"GET", b"k"])] * 2, [])
def test_scan_and_parser_frame_alike_whatever_came_before(
    learned: list[list[bytes]], frames: list[bytes], mutations: list[tuple[str, int, int]]
) -> None:
    """Promise 6: what the scan relays, the parser and the reference frame identically: no smuggled request."""
    requests._prefixes.clear()
    for arguments in learned:
        learn(arguments)
    data = mutated(b"".join(frames), mutations)
    found: list[Simple] = []
    stopped = scan_simple(data, 0, 1000, found, LIMITS.request_bytes_max)
    at = 0
    for command, raw, hash_slot, key in found:
        assert data.startswith(raw, at)
        expected = RequestParser(LIMITS).parse(data, at)
        assert expected is not None
        arguments, end = expected
        assert (arguments, end - at) == reference_frame(data[at:]) == reference_frame(raw)
        assert raw == data[at:end]
        assert command is lookup(arguments)
        assert key == arguments[1]
        assert hash_slot == slot_of(arguments[1])
        at = end
    assert stopped == at


@given(LEARNED.filter(bool))
def test_the_scan_takes_what_was_learned(learned: list[list[bytes]]) -> None:
    """Else the comparison above would be about nothing."""
    requests._prefixes.clear()
    for arguments in learned:
        learn(arguments)
    for arguments in learned:
        if len(arguments[1]) >= 4096:
            continue
        raw = frame(arguments)
        found: list[Simple] = []
        assert scan_simple(raw + b"*1\r\n$4\r\nPING\r\n", 0, 9, found, LIMITS.request_bytes_max) == len(raw)
        assert [(item[1], item[2]) for item in found] == [(raw, slot_of(arguments[1]))]
        for size in range(len(raw) if len(raw) < 300 else 0):
            assert scan_simple(raw[:size], 0, 9, [], LIMITS.request_bytes_max) == 0


def test_the_scan_stops_at_its_count_and_at_too_large_a_value() -> None:
    learn([b"SET", b"k", b"v"])
    raw = frame([b"SET", b"k", b"v" * 5000])
    found: list[Simple] = []
    assert scan_simple(raw * 3, 0, 2, found, 5000) == 2 * len(raw)
    assert len(found) == 2
    assert scan_simple(raw * 3, 0, 2, found, 4999) == 0


def test_remembered_prefixes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 7: a client that varies the case and the count of its commands fills no memory."""
    monkeypatch.setattr(requests, "PREFIXES_MAX", 10)
    for count in range(1, 40):
        learn([b"ZADD", *[b"x"] * count])
        assert len(requests._prefixes) <= 10


# -- lengths, lines and counts


@pytest.mark.parametrize("length", BAD_LENGTHS)
@pytest.mark.parametrize("authenticated", [True, False])
def test_a_length_is_canonical_or_an_error(length: bytes, authenticated: bool) -> None:
    assert parse_length(length) == -1
    with pytest.raises(ProtocolError, match=r"^Protocol error: invalid bulk length$"):
        RequestParser(LIMITS).parse(b"*2\r\n$" + length + b"\r\nGET\r\n", 0, authenticated=authenticated)
    if length != b"-1":
        with pytest.raises(ProtocolError, match=r"^Protocol error: invalid multibulk length$"):
            RequestParser(LIMITS).parse(b"*" + length + b"\r\n", 0, authenticated=authenticated)


@given(st.binary(max_size=12))
def test_parse_length_takes_canonical_decimals_only(digits: bytes) -> None:
    good = GOOD_LENGTH.fullmatch(digits) is not None and len(digits) <= 10
    assert parse_length(digits) == (int(digits) if good else -1)


@pytest.mark.parametrize("start", [b"*", b"*1\r\n$", b"", b"*2\r\n$3\r\nGET\r\n$"])
def test_endless_lines(start: bytes) -> None:
    """A line without end is refused at 64 KiB, in Redis's words, also when it comes byte by byte."""
    text = {b"*": "too big mbulk count string", b"": "too big inline request"}.get(
        start, "too big bulk count string"
    )
    parser = RequestParser(LIMITS)
    buffer = start + b"1" * (LINE_BYTES_MAX - 10)
    assert parser.parse(buffer, 0) is None
    for _ in range(12):
        buffer += b"1"
        assert len(buffer) < parser.needed + 2
        if len(buffer) - len(start) == LINE_BYTES_MAX + 1:
            with pytest.raises(ProtocolError) as refused:
                parser.parse(buffer, 0)
            assert str(refused.value) == f"Protocol error: {text}"
            return
        assert parser.parse(buffer, 0) is None
    raise AssertionError("an endless line was never refused")


@pytest.mark.parametrize("count", [b"1048577", b"9999999999", b"2147483648", b"99999999999999999999"])
def test_absurd_counts(count: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^Protocol error: invalid multibulk length$"):
        RequestParser(RequestLimits()).parse(b"*" + count + b"\r\n", 0)


def test_a_great_count_alone_takes_no_memory() -> None:
    parser = RequestParser(RequestLimits())
    assert parser.parse(b"*%d\r\n" % ARGUMENTS_MAX, 0) is None
    assert parser._partial is not None
    assert parser._partial.arguments == []


@pytest.mark.parametrize(
    "empty", [b"*0\r\n", b"*-1\r\n", b"*-11\r\n", b"*-99999999999\r\n", b"\r\n", b"\n", b" \t\r\n"]
)
@pytest.mark.parametrize("authenticated", [True, False])
def test_empty_requests_are_passed_over(empty: bytes, authenticated: bool) -> None:
    assert RequestParser(LIMITS).parse(empty + b"x", 0, authenticated=authenticated) == ([], len(empty))


def test_limits_before_login() -> None:
    """As Redis: nobody makes the proxy buffer much before AUTH; the same frames are fine after it."""
    for data, text in [
        (b"*11\r\n", "unauthenticated multibulk length"),
        (b"*1\r\n$16385\r\n", "unauthenticated bulk length"),
    ]:
        with pytest.raises(ProtocolError, match=f"^Protocol error: {text}$"):
            RequestParser(LIMITS).parse(data, 0, authenticated=False)
        assert RequestParser(LIMITS).parse(data, 0) is None
    assert RequestParser(LIMITS).parse(b"*10\r\n$16384\r\n", 0, authenticated=False) is None


def test_a_request_is_bounded_as_a_whole() -> None:
    limits = RequestLimits(request_bytes_max=100, bulk_bytes_max=60)
    with pytest.raises(ProtocolError, match=r"^Protocol error: invalid bulk length$"):
        RequestParser(limits).parse(b"*2\r\n$61\r\n", 0)
    with pytest.raises(ProtocolError, match=r"request over 100 bytes \(setting clients.request_bytes_max\)"):
        RequestParser(limits).parse(frame([b"x" * 60, b"y" * 60]), 0)


def test_a_request_in_pieces_is_scanned_once() -> None:
    """Each call goes on where the last one ended: an argument that was read is not read again."""
    arguments = [b"MSET", *[b"%06d" % n for n in range(2000)]]
    raw = frame(arguments)
    parser = RequestParser(LIMITS)
    steps = 0
    size = 0
    while True:
        size = max(size + 64, parser.needed)
        before = 0 if parser._partial is None else parser._partial.cursor
        result = parser.parse(raw[:size], 0)
        if result is not None:
            break
        assert parser._partial is not None
        assert parser._partial.cursor >= before
        steps += parser._partial.cursor - before
    assert result == (arguments, len(raw))
    assert steps <= len(raw)


# -- inline commands


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"PING", [b"PING"]),
        (b"  SET\tk  v ", [b"SET", b"k", b"v"]),
        (b'SET k "a b"', [b"SET", b"k", b"a b"]),
        (rb'SET k "\x41\n\"\\\q\x4"', [b"SET", b"k", b'A\n"\\qx4']),
        (rb"SET k 'a\'b\n'", [b"SET", b"k", rb"a'b\n"]),
        (b'SET k ""', [b"SET", b"k", b""]),
        (b'a"b"', [b"ab"]),
        (b"a\vb \f c", [b"a\vb", b"c"]),
        (b'"a"b', None),
        (b'"a', None),
        (b"'a", None),
        (b'"a\\', None),
    ],
)
def test_inline_words(line: bytes, words: list[bytes] | None) -> None:
    """The same lines are put to a real server by tests/live/test_bad_input.py."""
    assert split_inline(line) == words


@given(st.binary(max_size=60))
def test_a_line_without_quotes_splits_at_its_spaces(line: bytes) -> None:
    line = re.sub(rb"['\"\v\f]", b"", line)
    assert split_inline(line) == re.findall(rb"[^ \t\r\n\0]+", line)


def test_inline_commands_between_frames() -> None:
    data = b"PING\r\n" + frame([b"GET", b"k"]) + b"ECHO 'x y'\n"
    assert parse_all(data) == ([[b"PING"], [b"GET", b"k"], [b"ECHO", b"x y"]], None, b"")
