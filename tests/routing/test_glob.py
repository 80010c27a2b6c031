"""Globs; tests/live/test_gather.py holds them to the engines."""

from __future__ import annotations

import pytest

from routing import glob


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        (b"*", [b"", b"a\n\xff"], []),
        (b"a*b*c", [b"abc", b"a--b--bc"], [b"ab", b"abcd", b"acb"]),
        (b"h?llo", [b"hello", b"h\nllo"], [b"hllo", b"heello"]),
        (b"[a-c]", [b"a", b"c"], [b"d", b"-", b""]),
        (b"[c-a]", [b"b"], [b"d"]),
        (b"[^a]", [b"b", b"\n"], [b"a", b""]),
        (b"[]", [], [b"", b"]", b"a"]),
        (b"[^]", [b"x"], [b"", b"xy"]),
        (b"[ab", [b"a", b"b"], [b"[ab"]),
        (b"[\\]a]", [b"]", b"a"], [b"\\"]),
        (b"\\*", [b"*"], [b"a", b"\\*"]),
        (b"a\\", [b"a\\"], [b"a"]),
        (b"a.+(", [b"a.+("], [b"abb("]),
        (b"*ab*ab", [b"abab", b"xabyab"], [b"ab", b"aab"]),
    ],
)
def test_what_a_pattern_fits(pattern: bytes, fitting: list[bytes], others: list[bytes]) -> None:
    """The meaning of each sign."""
    parsed = glob.parse(pattern)
    assert [text for text in fitting if not glob.matches(parsed, text)] == []
    assert [text for text in others if glob.matches(parsed, text)] == []


def test_case_is_ignored_on_demand() -> None:
    """For names, which are given in lower case."""
    assert glob.matches(glob.parse(b"MaX*", ignore_case=True), b"maxmemory")
    assert not glob.matches(glob.parse(b"MaX*"), b"maxmemory")


def test_a_pattern_too_long_to_compile_at_once_is_refused() -> None:
    """Everybody waits for the compiler."""
    glob.parse(b"?" * glob.PATTERN_BYTES_MAX)
    with pytest.raises(glob.PatternError, match="1025 bytes; at most 1024"):
        glob.parse(b"?" * (glob.PATTERN_BYTES_MAX + 1))


def test_many_stars_take_no_exponential_time() -> None:
    """Without atomic groups this would take longer than the universe has."""
    assert not glob.matches(glob.parse(b"a*" * 60 + b"b"), b"a" * 3000)
