"""Session tokens: what is packed is read as it was by who has the secret, and everything else is refused."""

from __future__ import annotations

import hmac
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.offsets import NO_POINT, Point
from routing.token import (
    EPOCH_MAX,
    FLOORS_MAX,
    OFFSET_MAX,
    TEXT_BYTES_MAX,
    WITNESSES_MAX,
    Token,
    TokenError,
    is_of,
    pack_token,
    unpack_token,
)

SECRET = b"a secret"
A, B, C = (f"{number:040x}" for number in (10, 11, 12))
X = b"0123456789abcdef0123456789abcdef01234567"
MAP = b"\x00\xff map !"
TOKEN = Token(7, MAP, {A: Point(X, 100), B: Point(X, 5)}, frozenset({C}))
TEXT = pack_token(TOKEN, SECRET)

NO_TOKEN = "no session token"
WRONG_SIGNATURE = "signature does not fit"
LATER = "version 2, and this proxy knows versions up to 1"

IDS = st.binary(min_size=20, max_size=20).map(bytes.hex)
POINTS = st.builds(Point, IDS.map(str.encode), st.integers(0, OFFSET_MAX))
TOKENS = st.builds(
    Token,
    st.integers(0, EPOCH_MAX),
    st.binary(min_size=8, max_size=8),
    st.dictionaries(IDS, POINTS, max_size=4),
    st.frozensets(IDS, min_size=1, max_size=3),
)
SECRETS = st.binary(min_size=1, max_size=40)


def text_of(packed: bytes) -> bytes:
    return urlsafe_b64encode(packed).rstrip(b"=")


def packed_of(text: bytes) -> bytes:
    return urlsafe_b64decode(text + b"=" * (-len(text) % 4))


def signed(content: bytes) -> bytes:
    """As the format's description says, by other means than the module's."""
    key = hmac.new(SECRET, b"steadyread session token 1", "sha256").digest()
    return text_of(content + hmac.new(key, content, "sha256").digest()[:16])


def many_floors(count: int) -> Mapping[str, Point]:
    return {f"{number:040x}": Point(X, number) for number in range(count)}


# -- what is packed is read as it was


@given(TOKENS, SECRETS)
def test_a_token_is_read_as_it_was_made(token: Token, secret: bytes) -> None:
    assert unpack_token(pack_token(token, secret), secret) == token


@pytest.mark.parametrize(
    "token",
    [
        Token(0, MAP, {A: Point(X, 0)}),
        Token(EPOCH_MAX, MAP, {A: Point(X, OFFSET_MAX)}),
        Token(1, MAP, {}, frozenset({A})),
        Token(1, MAP, {A: Point(X, 1)}, frozenset({A})),
        Token(1, MAP, many_floors(FLOORS_MAX), frozenset(f"{n:040x}" for n in range(WITNESSES_MAX))),
    ],
    ids=["smallest", "largest", "no floors", "a witness that has a floor", "as much as fits"],
)
def test_tokens_at_the_edges(token: Token) -> None:
    assert unpack_token(pack_token(token, SECRET), SECRET) == token


def test_a_text_goes_through_resp_and_a_url_as_it_is_and_is_small() -> None:
    assert TEXT.decode().replace("-", "").replace("_", "").isalnum()
    assert TEXT.startswith(b"stk")
    assert len(pack_token(Token(7, MAP, {A: Point(X, 100)}), SECRET)) == 114


def test_equal_tokens_have_equal_texts() -> None:
    other = Token(7, MAP, dict(reversed(TOKEN.floors.items())), frozenset({C}))
    assert list(other.floors) != list(TOKEN.floors)
    assert pack_token(other, SECRET) == TEXT


def test_the_format_is_the_one_that_is_described() -> None:
    """A token made by one release is read by the next: what changes this needs another version."""
    content = b"\xb2\xd9\x01" + (7).to_bytes(8, "big") + MAP + (2).to_bytes(2, "big")
    for node_id, point in ((A, TOKEN.floors[A]), (B, TOKEN.floors[B])):
        content += bytes.fromhex(node_id) + bytes.fromhex(X.decode()) + point.offset.to_bytes(8, "big")
    assert signed(content + bytes.fromhex(C)) == TEXT


def test_a_token_of_a_thousand_shards_costs_little() -> None:
    """Two to three milliseconds on a slow machine; here with room for a busy one."""
    token = Token(7, MAP, many_floors(1000))
    begun = time.perf_counter()
    assert unpack_token(pack_token(token, SECRET), SECRET) == token
    assert time.perf_counter() - begun < 0.2


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (Token(1, MAP, {}), "at least one node"),
        (Token(-1, MAP, {}, frozenset({A})), "epoch -1"),
        (Token(EPOCH_MAX + 1, MAP, {}, frozenset({A})), "epoch"),
        (Token(1, b"short", {}, frozenset({A})), "fingerprint"),
        (Token(1, MAP, {}, frozenset({A[1:]})), "no node id"),
        (Token(1, MAP, {}, frozenset({" " + A[1:]})), "no node id"),
        (Token(1, MAP, {A[:-1] + "\n": Point(X, 1)}), "no node id"),
        (Token(1, MAP, {A.upper(): Point(X, 1)}), "no node id"),
        (Token(1, MAP, {A: NO_POINT}), "no place"),
        (Token(1, MAP, {A: Point(X, -1)}), "no place"),
        (Token(1, MAP, {A: Point(X, OFFSET_MAX + 1)}), "no place"),
        (Token(1, MAP, {A: Point(X + b"\n", 1)}), "no place"),
        (Token(1, MAP, {A: Point(X.upper(), 1)}), "no place"),
        (Token(1, MAP, many_floors(FLOORS_MAX + 1)), "at most 4096 floors"),
        (Token(1, MAP, {}, frozenset(many_floors(WITNESSES_MAX + 1))), "16 witnesses"),
    ],
)
def test_what_no_reader_would_accept_is_not_made(token: Token, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pack_token(token, SECRET)


# -- everything else is refused


@settings(max_examples=8)
@given(TOKENS)
def test_each_flipped_bit_of_the_text_is_refused(token: Token) -> None:
    text = pack_token(token, SECRET)
    for place in range(len(text)):
        for bit in range(8):
            flipped = text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :]
            with pytest.raises(TokenError):
                unpack_token(flipped, SECRET)


@settings(max_examples=8)
@given(TOKENS)
def test_each_flipped_bit_of_what_the_text_stands_for_is_refused(token: Token) -> None:
    packed = packed_of(pack_token(token, SECRET))
    for place in range(len(packed)):
        for bit in range(8):
            flipped = packed[:place] + bytes([packed[place] ^ 1 << bit]) + packed[place + 1 :]
            with pytest.raises(TokenError):
                unpack_token(text_of(flipped), SECRET)


@settings(max_examples=25)
@given(TOKENS, st.binary(min_size=1, max_size=3))
def test_each_truncation_and_what_is_too_long_are_refused(token: Token, more: bytes) -> None:
    text = pack_token(token, SECRET)
    for end in range(len(text)):
        for cut in (text[:end], text[end + 1 :]):
            with pytest.raises(TokenError):
                unpack_token(cut, SECRET)
    for longer in (text + more, more + text, text + b"A", text + b"=", text_of(packed_of(text) + more)):
        with pytest.raises(TokenError):
            unpack_token(longer, SECRET)


@given(TOKENS, SECRETS, SECRETS)
def test_another_secret_is_refused(token: Token, one: bytes, other: bytes) -> None:
    """But for zeros at its end, which HMAC itself adds."""
    if one.rstrip(b"\0") == other.rstrip(b"\0"):
        return
    with pytest.raises(TokenError, match=WRONG_SIGNATURE):
        unpack_token(pack_token(token, one), other)


def test_an_empty_secret_signs_and_reads_nothing() -> None:
    for act in (lambda: pack_token(TOKEN, b""), lambda: unpack_token(TEXT, b"")):
        with pytest.raises(ValueError, match="empty secret"):
            act()


@given(st.binary(max_size=200))
def test_rubbish_is_refused_and_raises_nothing_else(rubbish: bytes) -> None:
    for text in (rubbish, text_of(rubbish), TEXT[:4] + text_of(rubbish)):
        with pytest.raises(TokenError):
            unpack_token(text, SECRET)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"stk",
        b"stkB",
        b"token",
        b"stkB" * 5,
        TEXT.replace(b"stkB", b"stkA"),
        TEXT.replace(b"stkB", b"sukB"),
        b" " + TEXT,
        TEXT + b"\n",
        TEXT[:40] + b"+" + TEXT[41:],
        TEXT[:40] + b"\xc3" + TEXT[41:],
    ],
)
def test_what_is_no_token_at_all(text: bytes) -> None:
    with pytest.raises(TokenError, match=NO_TOKEN):
        unpack_token(text, SECRET)


@pytest.mark.parametrize("text", [TEXT.replace(b"stkB", b"stkC"), b"stkC", b"stkC" + b"x" * 1000])
def test_a_later_version_says_so_whatever_its_form(text: bytes) -> None:
    with pytest.raises(TokenError, match=LATER):
        unpack_token(text, SECRET)


def test_what_is_too_large_is_refused_before_it_is_decoded() -> None:
    for text in (b"stkB" + b"A" * 1_000_000, b"\xff" * 1_000_000, b"stkB" + b"A" * (TEXT_BYTES_MAX - 3)):
        begun = time.perf_counter()
        with pytest.raises(TokenError, match=NO_TOKEN):
            unpack_token(text, SECRET)
        assert time.perf_counter() - begun < 0.05
    with pytest.raises(TokenError, match=WRONG_SIGNATURE):
        unpack_token(b"stkB" + b"A" * (TEXT_BYTES_MAX - 4), SECRET)


def test_a_refusal_tells_nothing_of_the_token_or_the_secret() -> None:
    """And no error from below hangs on it with more."""
    for text in (TEXT[:-2] + b"AA", TEXT[:-1], TEXT.replace(b"stkB", b"stkC"), TEXT + b"A", TEXT + b"AAAA"):
        with pytest.raises(TokenError) as raised:
            unpack_token(text, SECRET)
        shown = str(raised.value)
        assert raised.value.__cause__ is None
        assert not any(told in shown for told in (A, B, C, X.decode(), SECRET.decode(), text.decode()))


HEAD = b"\xb2\xd9\x01" + bytes(8) + MAP
FLOOR_A = bytes.fromhex(A) + bytes(20) + bytes(8)
FLOOR_B = bytes.fromhex(B) + bytes(20) + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        HEAD + b"\0\0",
        HEAD + b"\0\1",
        HEAD + b"\0\2" + FLOOR_A,
        HEAD + b"\0\1" + FLOOR_A + b"x",
        HEAD + b"\0\2" + FLOOR_A + FLOOR_A,
        HEAD + b"\0\2" + FLOOR_B + FLOOR_A,
        HEAD + b"\0\1" + FLOOR_A[:40] + b"\x80" + bytes(7),
        HEAD + b"\0\0" + bytes.fromhex(A) * 2,
        HEAD + b"\0\0" + bytes.fromhex(B + A),
    ],
    ids=[
        "no node",
        "no floor of one",
        "one floor of two",
        "half a witness",
        "a floor twice",
        "floors out of order",
        "an offset too large",
        "a witness twice",
        "witnesses out of order",
    ],
)
def test_a_signed_content_that_no_sound_proxy_makes_is_refused(content: bytes) -> None:
    with pytest.raises(TokenError, match=NO_TOKEN):
        unpack_token(signed(content), SECRET)
    assert unpack_token(signed(HEAD + b"\0\2" + FLOOR_A + FLOOR_B), SECRET).floors.keys() == {A, B}


# -- whose token it is


def test_a_token_is_of_the_cluster_that_knows_any_node_it_names() -> None:
    assert is_of(TOKEN, {B, "x"})
    assert is_of(TOKEN, [C])
    assert not is_of(TOKEN, {"x"})
    assert not is_of(TOKEN, set())
    assert is_of(Token(1, MAP, {}, frozenset({A})), {A: "a mapping"})
