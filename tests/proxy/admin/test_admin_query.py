"""What a query parameter may say."""

from __future__ import annotations

import pytest

from proxy.admin.http import ProblemError, Request
from proxy.admin.query import moment_of

NOW = 1_772_366_400.0


def moment(text: str) -> float | None:
    return moment_of(Request("GET", "/v1/topology", {"at": [text]}, {}), "at", now=NOW)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-03-01T12:00:00Z", NOW),
        ("2026-03-01T13:00:00 01:00", NOW),  # a "+" that was not percent-encoded
        ("1772366400.5", NOW + 0.5),
        ("-1h30m", NOW - 5400),
        ("0", 0.0),
        ("-99999d", NOW - 99_999 * 86_400),
        ("253402300799", 253_402_300_799.0),
    ],
)
def test_a_moment_is_a_date_seconds_or_relative(text: str, at: float) -> None:
    assert moment(text) == at


@pytest.mark.parametrize(
    "text",
    [
        "now",
        "2026-03-01T12:00:00",
        "1e400",
        "253402300800",
        "99999999999999999999",
        "-999999999d",
        "0001-01-01T00:00:00+23:00",
        "nan",
        "",
    ],
)
def test_what_is_no_moment_that_can_be_shown_is_refused(text: str) -> None:
    """Also a number that no date can name: the answer would have to name it."""
    with pytest.raises(ProblemError) as raised:
        moment(text)
    assert raised.value.status == 400
