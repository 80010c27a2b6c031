"""Cursors of SCAN: written, read back, and together every key once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.scan_cursor import ScanCursor
from routing.slot import SLOT_COUNT

cursors = st.integers(0, 17).flatmap(
    lambda parts_log2: st.builds(
        ScanCursor,
        st.integers(0, SLOT_COUNT - 1),
        st.just(parts_log2),
        st.integers(0, (1 << parts_log2) - 1),
    )
)


@given(cursors)
def test_a_cursor_reads_back_as_it_was_written(cursor: ScanCursor) -> None:
    """Also by another proxy, and it fits 64 bits."""
    assert ScanCursor.parse(str(cursor).encode()) == cursor
    assert int(str(cursor)) < 1 << 64


@pytest.mark.parametrize(
    "text", [b"", b"x", b"-1", b" 0", b"1 ", b"99999999999999999999", b"524288", b"9" * 30]
)
def test_what_no_cursor_is_written_as_is_none(text: bytes) -> None:
    """524288 would be part 1 of 1."""
    assert ScanCursor.parse(text) is None


@given(st.sets(st.binary(max_size=8), max_size=200), st.integers(1, 50))
def test_the_parts_of_a_slot_hold_each_key_once(keys: set[bytes], part_keys: int) -> None:
    """Whatever the number of parts; then the next slot comes."""
    cursor = ScanCursor(5).in_parts(len(keys), part_keys)
    held: list[bytes] = []
    for _ in range(1 << cursor.parts_log2):
        assert cursor.slot == 5
        held += [key for key in keys if cursor.holds(key)]
        cursor = cursor.following()
    assert cursor == ScanCursor(6)
    assert sorted(held) == sorted(keys)


def test_parts_are_as_many_as_needed() -> None:
    """The least power of two that brings a part down to about the wanted size."""
    assert [ScanCursor(0).in_parts(n, 10).parts_log2 for n in (0, 10, 11, 20, 21, 40, 41)] == [
        0, 0, 1, 1, 2, 2, 3,
    ]  # fmt: skip


def test_the_end_is_written_like_the_begin() -> None:
    """As every server's: 0."""
    assert str(ScanCursor(0)) == str(ScanCursor(SLOT_COUNT - 1).following()) == "0"
