from __future__ import annotations

from collections import deque
from math import inf, isfinite, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.limit import TIMED_MAX, Limit, LimitRules, Timed

RULES = LimitRules()
WAY = 0.010  # there and back
SERVICE = 0.001  # so a node is busy, and nothing queues, with eleven requests in flight


def drive(
    limit: Limit,
    begin: float,
    seconds: float,
    *,
    asked: float = inf,
    way: float = WAY,
    service: float = SERVICE,
) -> float:
    """A node with as many in flight as are permitted, at most ``asked``, that answers one after the other."""
    now = begin
    while now < begin + seconds:
        in_flight = max(1, int(min(limit.permits, asked)))
        now += 0.001
        limit.observe(max(way + service, in_flight * service), in_flight, now)
    return now


def test_it_settles_where_the_queue_at_the_node_is_the_square_root_of_the_limit() -> None:
    limit = Limit(RULES, 0.0)
    drive(limit, 0.0, 30.0)
    assert limit.no_load_seconds == pytest.approx(WAY + SERVICE, rel=0.1)
    assert limit.estimate == pytest.approx(11 + sqrt(limit.estimate), rel=0.1)


def test_it_grows_from_its_floor_while_round_trips_stay_short() -> None:
    limit = Limit(LimitRules(first=4), 0.0)
    drive(limit, 0.0, 2.0, way=0.02)
    assert limit.permits > 21


def test_a_node_at_which_nothing_queues_is_free() -> None:
    limit = Limit(RULES, 0.0)
    now = drive(limit, 0.0, 5.0, asked=5)
    assert limit.is_free
    assert limit.permits == RULES.ceiling
    for _ in range(42):
        now += 0.01
        limit.observe(0.4, 400, now)
    assert not limit.is_free
    # Little's law, and a root.
    assert limit.estimate == pytest.approx(400 * (WAY + SERVICE) / 0.4 + 20, rel=0.2)


def test_round_trips_under_the_slack_are_never_slow_and_noise_in_them_does_not_count() -> None:
    """Spells of three times the round trip; without slack they push the limit down."""
    lowest = {}
    for slack_seconds in (0.001, 0.0):
        limit = Limit(LimitRules(slack_seconds=slack_seconds), 0.0)
        lowest[slack_seconds] = limit.permits
        for step in range(20_000):
            spell = 3 if step // 1000 % 2 else 1
            limit.observe(50e-6 * spell, limit.permits, 0.0005 * step)
            lowest[slack_seconds] = min(lowest[slack_seconds], limit.permits)
    assert lowest[0.001] == RULES.first
    assert lowest[0.0] < RULES.first / 3


def test_a_fast_node_may_be_sent_three_hundred_at_once() -> None:
    """Every 5 ms, at 5 us each. Without a start that grows faster this takes seconds."""
    limit, timed = Limit(RULES, 0.0), Timed()
    total = 0
    for turn in range(200):
        begin = turn * 0.005
        count = min(300, limit.permits)
        timed.sent(total + 1, total + count, count, begin)
        for each in range(1, count + 1):
            now = begin + 60e-6 + each * 5e-6
            if (sample := timed.answered(total + each, now)) is not None:
                limit.observe(*sample, now)
        total += count
    assert limit.permits >= 300


@pytest.mark.parametrize("permits", [20, 200, 800])
def test_the_limit_of_a_fast_node_that_becomes_slow_falls_before_it_is_measured_anew(permits: int) -> None:
    """Else half of a queue of hundreds would be taken for the node's own time."""
    limit, timed = Limit(LimitRules(ceiling=permits), 0.0), Timed()
    now = 0.0
    while now < 2.0:
        now += 0.001
        limit.observe(65e-6, 4 if 0.8 < now < 0.999 else permits, now)
    assert limit.permits == permits
    owed: deque[float] = deque()  # replies
    sent_total = answered_total = 0
    busy_until = now
    while now < 6.5:
        sent_before = sent_total
        while len(owed) < limit.permits:
            busy_until = max(busy_until, now) + 0.0005
            owed.append(busy_until)
            sent_total += 1
        if sent_total > sent_before:
            timed.sent(sent_before + 1, sent_total, len(owed), now)
        now = owed.popleft()
        answered_total += 1
        if (sample := timed.answered(answered_total, now)) is not None:
            limit.observe(*sample, now)
    assert limit.permits <= 8
    assert limit.no_load_seconds <= 0.002


def test_a_node_that_stalls_keeps_its_limit() -> None:
    """80 ms of each 100, while which nothing is answered; then its round trips are as short as ever."""
    limit = Limit(RULES, 0.0)
    now, stalls = 0.0, 0
    for turn in range(10_000):
        now += 0.0002
        sent_at = now - 65e-6
        if turn > 200 and turn % 100 == 0:
            now += 0.08
            stalls += 1
        elif turn > 200 and turn % 100 == 1:
            sent_at -= 0.08  # it was sent before the stall as well, and read a turn later
        limit.observe(now - sent_at, 40, now)
    assert stalls > 90
    assert limit.permits >= 40


def test_a_minute_of_overload_does_not_become_the_measure_of_normal() -> None:
    """Where Gradient2's long average does: there the limit drifts up."""
    limit = Limit(RULES, 0.0)
    now = drive(limit, 0.0, 30.0)
    settled = limit.estimate
    drive(limit, now, 60.0)
    assert limit.estimate == pytest.approx(settled, rel=0.1)


def test_two_windows_with_stalls_cost_the_limit_a_twentieth() -> None:
    limit = Limit(RULES, 0.0)
    now = drive(limit, 0.0, 5.0)
    settled = limit.estimate
    for stall in range(RULES.window_samples + 1):  # the first ends the window before
        limit.observe(0.5, 10, now + 0.5 * (stall + 1))
    assert settled * 0.95 <= limit.estimate < settled


def test_a_probe_goes_below_the_floor_and_finds_the_nodes_own_time() -> None:
    """All that the limit has ever seen is a full queue of its floor's length."""
    rules = LimitRules(floor=16, first=16)
    limit = Limit(rules, 0.0)
    lowest, now = 16, 0.0
    while now < 30.0:
        now = drive(limit, now, 0.01, way=0.0)
        lowest = min(lowest, limit.permits)
    assert lowest == 8
    assert limit.no_load_seconds <= 8 * SERVICE * 1.01


def test_ordinary_quiet_traffic_spares_the_probe() -> None:
    limit = Limit(RULES, 0.0)
    now = 0.0
    while now < 60.0:
        now = drive(limit, now, 0.01, asked=5)
        assert not limit.is_probing


def test_a_node_that_becomes_slower_for_good_gets_a_new_measure() -> None:
    """A longer way needs more in flight; until the probe the limit takes it for a queue."""
    limit = Limit(RULES, 0.0)
    now = drive(limit, 0.0, 5.0)
    now = drive(limit, now, 10.0, way=WAY * 10)
    assert limit.no_load_seconds == pytest.approx(WAY * 10 + SERVICE)
    drive(limit, now, 10.0, way=WAY * 10)
    assert limit.permits > 80


def test_time_that_the_proxy_itself_was_busy_does_not_make_a_node_look_slow() -> None:
    busy, fair = Limit(RULES, 0.0), Limit(RULES, 0.0)
    for limit in (busy, fair):
        now = drive(limit, 0.0, 5.0, asked=5)
        for _ in range(40):
            now += 0.02
            own_seconds = 0.035 if limit is fair else 0.0
            limit.observe(WAY + SERVICE + 0.03, limit.permits, now, own_seconds)
    assert fair.no_load_seconds == pytest.approx(WAY + SERVICE)
    assert busy.permits < fair.permits == RULES.ceiling


def test_while_it_is_tightened_it_is_less_and_does_not_grow() -> None:
    limit = Limit(RULES, 0.0)
    now = drive(limit, 0.0, 5.0)
    settled, permits = limit.estimate, limit.permits
    limit.tighten(0.5)
    assert limit.permits == int(settled / 2) < permits
    now = drive(limit, now, 5.0)
    assert limit.estimate <= settled
    limit.tighten(1.0)
    assert limit.permits == int(limit.estimate)


@pytest.mark.parametrize("factor", [0, -1, 1.01])
def test_a_factor_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        Limit(RULES, 0.0).tighten(factor)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 100),
            st.integers(1, 5000),
            st.floats(0, 5),
            st.sampled_from([1.0, 0.5, 0.1]),
            st.floats(0, 1),
        ),
        max_size=300,
    ),
    st.integers(1, 20),
)
def test_whatever_is_observed_the_limit_keeps_its_bounds(
    samples: list[tuple[float, int, float, float, float]], floor: int
) -> None:
    rules = LimitRules(floor=floor, ceiling=100, first=20, window_samples=2)
    limit = Limit(rules, 0.0)
    now = 0.0
    for rtt_seconds, in_flight, gap, factor, own_seconds in samples:
        now += gap
        limit.tighten(factor)
        limit.observe(rtt_seconds, in_flight, now, own_seconds)
        assert isfinite(limit.estimate)
        assert rules.floor <= limit.estimate <= rules.ceiling
        assert 1 <= limit.permits <= rules.ceiling


def test_the_last_timed_request_among_the_replies_gives_the_round_trip() -> None:
    timed = Timed()
    timed.sent(1, 10, 10, 1.0)
    timed.sent(11, 16, 12, 2.0)
    timed.sent(17, 20, 14, 3.0)
    assert timed.answered(4, 4.0) is None
    assert timed.answered(17, 5.0) == (3.0, 12)
    assert timed.answered(20, 6.0) == (3.0, 14)
    assert timed.answered(20, 7.0) is None


def test_of_a_turns_requests_the_middle_one_is_timed() -> None:
    timed = Timed()
    timed.sent(1, 9, 9, 1.0)
    assert timed.answered(4, 2.0) is None
    assert timed.answered(5, 2.0) == (1.0, 9)
    timed.sent(10, 10, 5, 3.0)
    assert timed.answered(9, 4.0) is None
    assert timed.answered(10, 4.0) == (1.0, 5)


def test_a_connection_that_never_answers_costs_a_bounded_number_of_marks() -> None:
    timed = Timed()
    for turn in range(TIMED_MAX * 2):
        timed.sent(turn + 1, turn + 1, turn + 1, float(turn))
    assert timed.answered(TIMED_MAX * 2, 100.0) == (100.0 - (TIMED_MAX - 1), TIMED_MAX)
