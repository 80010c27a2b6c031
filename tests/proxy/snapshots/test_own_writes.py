"""What a proxy that writes alone knows of its snapshots: too much of what was written, never too little."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.encode import frame
from proxy.snapshots.own_writes import Kept, OwnWrites

KEYS = [b"a", b"b", b"c"]


def test_a_snapshot_that_was_not_cut_alone_is_not_known_of() -> None:
    own = OwnWrites(10)
    own.note([b"a"])
    assert not own.shows(1, [b"b"])


def test_a_key_counts_as_written_for_every_snapshot_before() -> None:
    own = OwnWrites(10)
    own.begin(1)
    own.note([b"a"])
    own.begin(2)
    own.note([b"b"])
    assert not own.shows(1, [b"a"])
    assert own.shows(2, [b"a"])
    assert not own.shows(1, [b"b"])
    assert not own.shows(2, [b"a", b"b"])
    assert own.shows(1, [b"c"])


def test_one_with_too_many_keys_is_not_known_of_any_more() -> None:
    own = OwnWrites(2)
    own.begin(1)
    own.note([b"a", b"b"])
    own.begin(2)
    own.note([b"c"])
    assert not own.shows(1, [b"d"])
    assert own.shows(2, [b"d"])


def test_another_writer_ends_what_is_known_for_good() -> None:
    own = OwnWrites(10)
    own.begin(1)
    own.end()
    own.note([b"a"])
    own.begin(2)
    assert not own.shows(1, [b"b"])
    assert own.shows(2, [b"a"])


def test_where_a_pre_image_was_kept_is_known_for_its_own_snapshot_alone() -> None:
    """For an older one another pre-image may count, or another marker."""
    own = OwnWrites(10)
    own.begin(1)
    own.begin(2)
    own.note([b"a", b"b"])
    own.kept(2, [(b"a", b"name")], b"history")
    own.kept(2, [(b"b", b"name")], b"")
    own.kept(3, [(b"a", b"name")], b"history")
    kept = Kept(b"history", frame([b"GET", b"name"]))
    assert own.since == {1: {b"a": None, b"b": None}, 2: {b"a": kept, b"b": None}}
    own.note([b"a"])
    assert own.since[2][b"a"] == kept


ACTS = st.one_of(
    st.tuples(st.just("cut"), st.none()),
    st.tuples(st.just("write"), st.sets(st.sampled_from(KEYS), min_size=1)),
    st.tuples(st.just("other"), st.sampled_from(KEYS)),  # another proxy comes and writes
    st.tuples(st.just("close"), st.integers(1, 5)),
)


@given(st.lists(ACTS), st.integers(1, 4))
def test_what_it_shows_was_not_written_since_the_cut(acts: list[tuple[str, object]], keys_max: int) -> None:
    own = OwnWrites(keys_max)
    written: dict[int, set[object]] = {}  # snapshot -> keys, in truth
    for act, what in acts:
        match act, what:
            case "cut", _:
                number = max(written, default=0) + 1
                written[number] = set()
                own.begin(number)
            case "write", set():
                own.note(what)
                for keys in written.values():
                    keys |= what
            case "other", bytes():
                own.end()
                for keys in written.values():
                    keys.add(what)
            case "close", int():
                own.keep(written.keys() - {what})
                assert not own.shows(what, [])
        for number, keys in written.items():
            for key in KEYS:
                assert not (own.shows(number, [key]) and key in keys)
