"""Glob patterns as the engines match them; tests/live/test_gather.py compares with the engines."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import glob


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("*", "", True),
        ("", "", True),
        ("", "a", False),
        ("a*c", "abcbc", True),
        ("a*c", "abcb", False),
        ("a**", "a", True),
        ("?", "", False),
        ("h[a-c]t", "hbt", True),
        ("h[c-a]t", "hbt", True),
        ("h[^a-c]t", "hbt", False),
        ("h[^a-c]t", "hxt", True),
        ("h[ab", "ha", True),
        (r"a\*", "a*", True),
        (r"a\*", "ab", False),
    ],
)
def test_glob(pattern: str, text: str, fits: bool) -> None:
    assert glob.matches(glob.parse(pattern.encode()), text.encode()) is fits


@given(st.text("ab*?", max_size=8), st.text("ab", max_size=8))
def test_glob_agrees_with_a_regular_expression(pattern: str, text: str) -> None:
    expression = pattern.replace("*", ".*").replace("?", ".")
    expected = re.fullmatch(expression, text) is not None
    assert glob.matches(glob.parse(pattern.encode()), text.encode()) is expected


def test_case_can_be_ignored() -> None:
    assert glob.matches(glob.parse(b"SA*", ignore_case=True), b"save")
    assert not glob.matches(glob.parse(b"SA*"), b"save")
