"""A token bucket keeps its rate: in no stretch of time goes more than its burst and what comes meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.token_bucket import TokenBucket, bucket_of

# Of each step: seconds until it, tokens wanted, and how many of a hundred that were taken are given back at once.
steps = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 30), st.integers(0, 100)), min_size=1, max_size=40)


@given(st.floats(0.1, 1000), st.integers(1, 20), st.floats(0, 1e9), steps)
def test_no_window_sees_more_than_the_burst_and_its_rate(
    rate: float, burst: int, start: float, given_steps: list[tuple[float, int, int]]
) -> None:
    bucket = TokenBucket(rate, burst, start)
    now = start
    taken: list[tuple[float, int]] = []
    for pause, wanted, given_back in given_steps:
        now += pause
        count = min(wanted, bucket.available(now))
        bucket.take(count)
        unused = count * given_back // 100
        bucket.put(unused)
        taken.append((now, count - unused))
    for first, (since, _) in enumerate(taken):
        total = 0
        for until, count in taken[first:]:
            total += count
            assert total <= burst + rate * (until - since) + 0.01 + rate * 1e-6


@given(st.floats(0.1, 1000), st.integers(1, 20), st.integers(1, 20))
def test_who_waits_until_the_next_token_gets_it(rate: float, burst: int, count: int) -> None:
    bucket = TokenBucket(rate, burst, 5.0)
    count = min(count, bucket.available(5.0))
    bucket.take(count)
    if not bucket.available(5.0):
        assert bucket.next_at() == pytest.approx(5.0 + 1 / rate)
    assert bucket.available(bucket.next_at()) >= 1


def test_a_clock_that_stands_gives_nothing() -> None:
    bucket = TokenBucket(10.0, 2, 1.0)
    bucket.take(2)
    assert [bucket.available(now) for now in (1.0, 0.5, 1.05, 1.1, 1.2, 9.0)] == [0, 0, 0, 1, 2, 2]


def test_settings_that_say_nothing() -> None:
    assert bucket_of(0.0, 5, 0.0) is None
    for rate, burst, expected in [(0.5, 0, 1), (7.9, 0, 7), (7.9, 3, 3)]:
        bucket = bucket_of(rate, burst, 0.0)
        assert bucket is not None
        assert bucket.available(0.0) == expected
