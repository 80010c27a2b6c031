"""Space-Saving keeps the bounds that its paper proves, whatever comes, and forgets by windows."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.space_saving import RecentCounts, SpaceSaving

# Few different items, so that counters are lost and won back; and as many as there are additions.
streams = st.lists(st.integers(0, 12), max_size=200) | st.lists(st.integers(), max_size=60)


@given(streams, st.integers(1, 8))
def test_counts_are_within_their_bounds(stream: list[int], capacity: int) -> None:
    counters: SpaceSaving[int] = SpaceSaving(capacity)
    truth = Counter[int]()
    for item in stream:
        counters.add(item)
        truth[item] += 1
        assert len(counters) == min(capacity, len(truth))
        assert counters._errors.keys() <= set(counters)  # nothing is kept of who lost its counter
    assert counters.total == len(stream)
    held = [counters.counted(item) for item in counters]
    assert sum(each.count for each in held) == len(stream)
    assert counters.count_max_of_others * capacity <= len(stream)
    assert counters.count_max_of_others == (min(each.count for each in held) if len(held) == capacity else 0)
    for item in [*truth, max(truth, default=0) + 1]:  # the last never came
        counted = counters.counted(item)
        assert counted.at_least <= truth[item] <= counted.count
        assert counted.error <= counters.count_max_of_others
        if truth[item] > counters.count_max_of_others:
            assert item in set(counters)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.5])), max_size=120),
    st.integers(1, 8),
)
def test_counts_of_two_windows_are_within_their_bounds(
    stream: list[tuple[int, float]], capacity: int
) -> None:
    """Against a list of all additions, of which those since the time that is said are counted."""
    recent: RecentCounts[int] = RecentCounts(capacity, 1.0, 0.0)
    now, came = 0.0, list[tuple[float, int]]()
    for item, pause in stream:
        now += pause
        recent.add(item, now)
        came.append((now, item))
        seconds = recent.seconds(now)
        assert 0.0 <= seconds < 2.0
        truth = Counter(item for at, item in came if at >= now - seconds - 1e-9)
        assert recent.total(now) == truth.total()
        for each in truth:
            counted = recent.counted(each, now)
            assert counted.at_least <= truth[each] <= counted.count
        top = recent.top(3, now)
        assert [each.at_least for each in top] == sorted((each.at_least for each in top), reverse=True)
        assert all(each == recent.counted(each.item, now) for each in top)


def test_what_was_hot_an_hour_ago_is_not() -> None:
    """Two windows later it is forgotten, whether others came meanwhile or nobody."""
    for others_come in (True, False):
        recent: RecentCounts[bytes] = RecentCounts(4, 30.0, 1000.0)
        for _ in range(100):
            recent.add(b"hot", 1010.0)
        assert recent.top(1, 1059.0)[0].count == 100  # of the window before
        if others_come:
            recent.add(b"other", 1059.0)
        assert [each.item for each in recent.top(2, 1061.0)] == [b"other"] * others_come
        assert recent.total(1061.0) == others_come
        assert recent.counted(b"hot", 4610.0).count == recent.total(4610.0) == 0
        assert recent.seconds(4610.0) == 30.0 + 10.0  # looked at, and nothing came


def test_what_has_come_for_certain_is_on_top() -> None:
    """Before what has come oftener by a counter that was won from others."""
    recent: RecentCounts[str] = RecentCounts(2, 1.0, 0.0)
    for item in "aaaaabcdex":  # x has the count 5, of which 4 are others'
        recent.add(item, 0.5)
    recent.add("x", 1.5)
    assert [(each.item, each.count, each.at_least) for each in recent.top(2, 1.5)] == [
        ("a", 5, 5),
        ("x", 6, 2),
    ]


def test_the_top_of_a_skewed_stream_is_found_with_few_counters() -> None:
    """10,000 items, 64 counters: each that makes up more than 1 in 64 has its counter, and the first are in order."""
    random = Random(7)
    weights = [1 / rank**1.2 for rank in range(1, 10_001)]
    stream = random.choices(range(10_000), weights, k=50_000)
    counters: RecentCounts[int] = RecentCounts(64, 60.0, 0.0)
    for item in stream:
        counters.add(item, 1.0)
    assert [each.item for each in counters.top(5, 1.0)] == [0, 1, 2, 3, 4]
    truth = Counter(stream)
    for item, number in truth.items():
        if number > len(stream) / 64:
            assert counters.counted(item, 1.0).at_least > 0


def test_no_counter_is_misuse() -> None:
    with pytest.raises(ValueError, match="at least one counter"):
        SpaceSaving(0)
