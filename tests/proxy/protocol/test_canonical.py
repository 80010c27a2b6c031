"""Promise 3: a canonical reply does not tell which copy it came from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.canonical import canonical
from proxy.protocol.encode import array, bulk, mapping
from proxy.protocol.replies import ReplyError, decode
from routing import glob
from routing.snapshot_reads import AS_IS, Form, Shape

MEMBERS = st.lists(
    st.one_of(st.binary(max_size=8), st.sampled_from([b"-0", b"\r\n", b"$1\r\na\r\n", b"x" * 5000])),
    unique=True,
)
HASHES = st.dictionaries(st.binary(max_size=6), st.binary(max_size=6))
SCAN_FORMS = {Form.SCAN_MEMBERS, Form.SCAN_PAIRS, Form.SCAN_FIELDS, Form.SCAN_SCORES, Form.SCAN_RANKED}


def flat(*texts: bytes) -> bytes:
    return array([bulk(text) for text in texts])


def shuffled(items: Sequence[bytes], seed: int) -> list[bytes]:
    return random.Random(seed).sample(list(items), len(items))


@given(MEMBERS, st.integers(), st.sampled_from([b"*", b"~"]))
def test_members_are_sorted(members: list[bytes], seed: int, kind: bytes) -> None:
    reply = kind + flat(*shuffled(members, seed))[1:]
    assert canonical(Shape(Form.MEMBERS), reply) == kind + flat(*sorted(members))[1:]


@given(HASHES, st.integers(), st.booleans())
def test_a_hash_is_sorted_by_field(values: dict[bytes, bytes], seed: int, resp3: bool) -> None:
    def reply_of(fields: list[bytes]) -> bytes:
        return mapping([(bulk(field), bulk(values[field])) for field in fields], resp3)

    fields = sorted(values)
    reply = reply_of(shuffled(fields, seed))
    assert canonical(Shape(Form.PAIRS), reply) == reply_of(fields)
    assert canonical(Shape(Form.FIELDS), reply) == flat(*fields)
    assert canonical(Shape(Form.VALUES), reply) == flat(*[values[field] for field in fields])
    assert canonical(Shape(Form.SCAN_FIELDS), reply) == array([bulk(b"0"), flat(*fields)])
    pairs = [word for field in fields for word in (field, values[field])]
    assert canonical(Shape(Form.SCAN_PAIRS), reply) == array([bulk(b"0"), flat(*pairs)])


def test_a_scan_leaves_out_what_its_pattern_does_not_describe() -> None:
    def of(form: Form) -> Shape:
        return Shape(form, glob.parse(b"a*"))

    hash_reply = flat(b"b", b"a", b"a2", b"2", b"a1", b"1")
    assert decode(canonical(of(Form.SCAN_PAIRS), hash_reply)) == [b"0", [b"a1", b"1", b"a2", b"2"]]
    assert decode(canonical(of(Form.SCAN_FIELDS), hash_reply)) == [b"0", [b"a1", b"a2"]]
    assert decode(canonical(of(Form.SCAN_MEMBERS), flat(b"b", b"a2", b"a1"))) == [b"0", [b"a1", b"a2"]]
    assert decode(canonical(of(Form.SCAN_SCORES), flat(b"b", b"0", b"a", b"1"))) == [b"0", [b"a", b"1"]]
    assert decode(canonical(of(Form.SCAN_RANKED), flat(b"b", b"0", b"a", b"1"))) == [b"0", [b"a"]]


RANGE3 = b"*2\r\n*2\r\n$6\r\n,-0\r\n1\r\n,-0\r\n*2\r\n$1\r\na\r\n,0.5\r\n"


def test_a_scan_of_scores_is_flat_in_both_versions() -> None:
    expected = array([bulk(b"0"), flat(b",-0\r\n1", b"0", b"a", b"0.5")])
    assert canonical(Shape(Form.SCAN_SCORES), RANGE3) == expected
    assert canonical(Shape(Form.SCAN_SCORES), flat(b",-0\r\n1", b"-0", b"a", b"0.5")) == expected


@pytest.mark.parametrize(
    ("form", "reply", "expected"),
    [
        (Form.SCORES, b"$2\r\n-0\r\n", b"$1\r\n0\r\n"),
        (Form.SCORES, b",-0\r\n", b",0\r\n"),
        (Form.SCORES, b",-10\r\n", b",-10\r\n"),
        (Form.SCORES, b"*3\r\n$2\r\n-0\r\n$-1\r\n$3\r\n1-0\r\n", b"*3\r\n$1\r\n0\r\n$-1\r\n$3\r\n1-0\r\n"),
        (Form.SCORES, b"*2\r\n:4\r\n,-0\r\n", b"*2\r\n:4\r\n,0\r\n"),
        (Form.WITH_SCORES, flat(b"-0", b"-0", b"b", b"2"), flat(b"-0", b"0", b"b", b"2")),
        (Form.WITH_SCORES, RANGE3, b"*2\r\n*2\r\n$6\r\n,-0\r\n1\r\n,0\r\n*2\r\n$1\r\na\r\n,0.5\r\n"),
        (Form.WITH_SCORES, b"*0\r\n", b"*0\r\n"),
    ],
)
def test_zero_has_no_sign_as_a_score(form: Form, reply: bytes, expected: bytes) -> None:
    """A member is left alone, whatever it looks like."""
    assert canonical(Shape(form), reply) == expected


def test_texts_that_are_equal_up_to_a_nul_byte_have_an_order() -> None:
    sorted_by_the_engine = flat(b"b", b"a\0z", b"a", b"a\0b", b"Z")  # DESC: runs stay where they are
    everything = [b"b", b"a", b"a\0b", b"a\0z", b"Z"]
    for limit, expected in (
        (None, everything),
        ((1, 2), everything[1:3]),
        ((2, -1), everything[2:]),
        ((0, 0), []),
        ((9, 9), []),
    ):
        assert canonical(Shape(Form.TEXTS, limit=limit), sorted_by_the_engine) == flat(*expected)


ENTRIES = b"*1\r\n*2\r\n$3\r\n1-1\r\n*2\r\n$1\r\nf\r\n$4\r\ncopy\r\n"


@pytest.mark.parametrize("resp3", [False, True])
def test_streams_get_their_names_back_and_entries_stay(resp3: bool) -> None:
    def reply_of(*names: bytes) -> bytes:
        if resp3:
            return mapping([(bulk(name), ENTRIES) for name in names], resp3)
        return array([array([bulk(name), ENTRIES]) for name in names])

    replaced = {b"key": b"copy", b"other": b"gone"}
    assert canonical(Shape(Form.STREAMS), reply_of(b"copy", b"c"), replaced) == reply_of(b"key", b"c")
    assert canonical(Shape(Form.STREAMS), reply_of(b"copy")) == reply_of(b"copy")


def test_a_script_gets_names_back_at_any_depth() -> None:
    reply = b"*3\r\n$4\r\ncopy\r\n%1\r\n+copy\r\n$4\r\ncopy\r\n$6\r\na copy\r\n"
    expected = b"*3\r\n$3\r\nkey\r\n%1\r\n+copy\r\n$3\r\nkey\r\n$6\r\na copy\r\n"
    assert canonical(Shape(Form.SCRIPT), reply, {b"key": b"copy"}) == expected


def test_an_error_gets_names_back() -> None:
    """Engines cut a name at a NUL byte and have spaces for line breaks; the longer of two names counts."""
    replaced = {b"k": b"p:k", b"k\r\n2": b"p:k\r\n2", b"\0z": b"q:\0z"}
    reply = b"-NOGROUP No such key 'p:k  2' or 'p:k' or 'q:'\r\n"
    assert canonical(AS_IS, reply, replaced) == b"-NOGROUP No such key 'k  2' or 'k' or ''\r\n"
    assert canonical(AS_IS, reply) == reply


@pytest.mark.parametrize("form", list(Form))
def test_nil_and_errors_stay(form: Form) -> None:
    for reply in (b"$-1\r\n", b"*-1\r\n", b"_\r\n", b"-WRONGTYPE of the wrong kind\r\n"):
        assert canonical(Shape(form), reply, {b"key": b"copy"}) == reply


@pytest.mark.parametrize("form", sorted({Form.MEMBERS, Form.PAIRS, Form.FIELDS} | SCAN_FORMS, key=str))
@pytest.mark.parametrize("reply", [b"+QUEUED\r\n", b"*2\r\n$1\r\na\r\n", b"*2\r\n$1\r\na\r\n$5\r\nab\r\n"])
def test_what_is_no_such_reply_is_a_fault(form: Form, reply: bytes) -> None:
    with pytest.raises(ReplyError):
        canonical(Shape(form), reply)
