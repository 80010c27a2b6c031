"""Promise 6: the proxy finds the end of every reply that a node sends, however it is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.replies import FrameScanner, ReplyError, ServerError, decode, elements, end_of_reply

TEXT = st.text("abc _-", max_size=8).map(str.encode)
BYTES = st.one_of(st.binary(max_size=30), st.sampled_from([b"\r\n", b"$3\r\nabc\r\n", b"x" * 5000]))


def _bulk(kind: bytes, body: bytes) -> bytes:
    return kind + b"%d\r\n" % len(body) + body + b"\r\n"


LEAVES = st.one_of(
    TEXT.map(lambda text: b"+" + text + b"\r\n"),
    TEXT.map(lambda text: b"-ERR " + text + b"\r\n"),
    st.integers(-(2**63), 2**63 - 1).map(lambda n: b":%d\r\n" % n),
    BYTES.map(lambda body: _bulk(b"$", body)),
    BYTES.map(lambda body: _bulk(b"!", b"ERR " + body)),
    BYTES.map(lambda body: _bulk(b"=", b"txt:" + body)),
    st.sampled_from(
        [
            b"$-1\r\n",
            b"*-1\r\n",
            b"_\r\n",
            b"#t\r\n",
            b"#f\r\n",
            b",1.5\r\n",
            b",inf\r\n",
            b"(12345678901234567890\r\n",
        ]
    ),
)


def _aggregates(members: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    lists = st.lists(members, max_size=4)
    pairs = st.lists(st.tuples(members, members), max_size=3)

    def counted(kind: bytes, count: int, parts: list[bytes]) -> bytes:
        return kind + b"%d\r\n" % count + b"".join(parts)

    return st.one_of(
        st.tuples(st.sampled_from([b"*", b"~", b">"]), lists).map(lambda p: counted(p[0], len(p[1]), p[1])),
        pairs.map(lambda p: counted(b"%", len(p), [part for pair in p for part in pair])),
        st.tuples(pairs, members).map(
            lambda p: counted(b"|", len(p[0]), [part for pair in p[0] for part in pair]) + p[1]
        ),
    )


FRAMES = st.recursive(LEAVES, _aggregates, max_leaves=12)


@given(FRAMES, st.binary(max_size=20))
def test_the_end_of_any_frame(reply: bytes, after: bytes) -> None:
    assert end_of_reply(reply + after) == len(reply)
    assert end_of_reply(b"junk" + reply + after, 4) == 4 + len(reply)


@given(FRAMES, st.lists(st.integers(1, 30), min_size=1, max_size=10))
def test_the_end_of_a_frame_in_pieces(reply: bytes, sizes: list[int]) -> None:
    """A scanner goes on where it ended, asks for no byte too many, and is as new behind the frame."""
    scanner = FrameScanner()
    for _ in range(2):
        size = 0
        looks = 0
        while True:
            size = min(len(reply), size + sizes[looks % len(sizes)])
            looks += 1
            end = scanner.end_of(reply[:size], 0)
            if end >= 0:
                break
            assert size < scanner.needed <= len(reply)
            size = max(size, min(scanner.needed, len(reply)) - 1)
        assert end == len(reply) == size


@given(FRAMES)
def test_every_true_prefix_is_incomplete(reply: bytes) -> None:
    for size in range(min(len(reply), 300)):
        assert end_of_reply(reply[:size]) == -1


@given(FRAMES)
def test_decode_takes_all_that_the_scanner_takes(reply: bytes) -> None:
    decode(reply)
    with pytest.raises(ReplyError):
        decode(reply + b"+\r\n")


@given(st.lists(FRAMES, max_size=6))
def test_elements_are_the_raw_members(members: list[bytes]) -> None:
    assert elements(b"*%d\r\n" % len(members) + b"".join(members)) == members


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        (b"+OK\r\n", b"OK"),
        (b":-5\r\n", -5),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"_\r\n", None),
        (b"$0\r\n\r\n", b""),
        (b"#t\r\n", True),
        (b",1.5\r\n", 1.5),
        (b"(123\r\n", 123),
        (b"=7\r\ntxt:abc\r\n", b"abc"),
        (b"*2\r\n:1\r\n*1\r\n+a\r\n", [1, [b"a"]]),
        (b"~1\r\n:1\r\n", [1]),
        (b"%1\r\n+a\r\n:1\r\n", {b"a": 1}),
        (b"%1\r\n*1\r\n+a\r\n:1\r\n", {(b"a",): 1}),
        (b"|1\r\n+a\r\n:1\r\n:2\r\n", 2),
    ],
)
def test_decoded_values(reply: bytes, value: Any) -> None:
    assert decode(reply) == value


def test_errors_are_values() -> None:
    for reply in (b"-ERR no\r\n", b"!6\r\nERR no\r\n"):
        value = decode(reply)
        assert isinstance(value, ServerError)
        assert str(value) == "ERR no"


@pytest.mark.parametrize("bad", [b"?1\r\n", b"$x\r\n", b"*x\r\n", b"GET / HTTP/1.1\r\n", b"*1\r\n?\r\n"])
def test_what_is_no_reply_is_an_error(bad: bytes) -> None:
    with pytest.raises(ReplyError):
        end_of_reply(bad)


@pytest.mark.parametrize("bad", [b"", b"$3\r\nab", b":x\r\n", b"*2\r\n:1\r\n", b"+OK"])
def test_decode_of_less_than_a_reply(bad: bytes) -> None:
    with pytest.raises(ReplyError):
        decode(bad)
    with pytest.raises(ReplyError):
        elements(bad)


def test_deep_nesting_costs_no_stack() -> None:
    """Promise 7: a reply may nest deeper than Python's own stack goes."""
    assert end_of_reply(b"*1\r\n" * 100_000 + b":1\r\n") == 400_004
