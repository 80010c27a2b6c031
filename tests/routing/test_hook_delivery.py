"""When a hook tries again, when it gives up, and what it never tells."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from routing.hook_delivery import (
    At,
    GiveUp,
    HookPosition,
    RetryLimits,
    delivered,
    failed,
    failure_event,
    is_own_failure,
    next_attempt,
    passed,
)
from routing.timeline import Event, EventKind

LIMITS = RetryLimits(attempts_max=8, retry_first_seconds=1.0, retry_max_seconds=60.0)
EVENT = Event(EventKind.FAILOVER, 10.0, "b took over from a", number=7)


def test_the_wait_doubles_up_to_its_maximum_and_then_it_is_given_up() -> None:
    """Without jitter: 1, 2, 4 ... 60, and the eighth failure is the last."""
    steps = [next_attempt(attempts, 100.0, LIMITS, 0.0) for attempts in range(1, 9)]
    assert steps == [*(At(100.0 + wait) for wait in (1, 2, 4, 8, 16, 32, 60)), GiveUp()]


@given(
    st.integers(1, 10**9), st.floats(0, 1, exclude_max=True), st.floats(1e-6, 86_400), st.floats(0, 86_400)
)
def test_jitter_takes_at_most_half_and_nothing_overflows(
    attempts: int, jitter: float, first_seconds: float, more_seconds: float
) -> None:
    """Whatever the limits, a wait is positive and no longer than the longest."""
    limits = RetryLimits(10**9 + 1, first_seconds, first_seconds + more_seconds)
    whole, step = next_attempt(attempts, 0.0, limits, 0.0), next_attempt(attempts, 0.0, limits, jitter)
    assert isinstance(whole, At)
    assert isinstance(step, At)
    assert 0 < whole.time / 2 <= step.time <= whole.time <= limits.retry_max_seconds


def test_one_attempt_means_no_retry() -> None:
    assert next_attempt(1, 0.0, replace(LIMITS, attempts_max=1), 0.0) == GiveUp()


def test_attempts_are_counted_for_each_event() -> None:
    """A position that was read from the store goes on counting; the next event begins at one."""
    start = HookPosition("k", 6)
    first = failed(start, 7, "no", 10.0)
    second = failed(first, 7, "still no", 12.0)
    assert (second.attempts, second.attempted, second.error, second.failing_since) == (2, 7, "still no", 10.0)
    assert second.number == 6
    given_up = passed(second, 7)
    assert (given_up.number, given_up.attempts, given_up.failing_since) == (7, 0, 10.0)
    assert failed(given_up, 8, "no", 20.0).attempts == 1


def test_a_delivery_ends_the_failing() -> None:
    """What failed before it is forgotten; the idempotency keys stay."""
    position = delivered(failed(HookPosition("k", 6), 7, "no", 10.0), 7, 11.0)
    assert position == HookPosition("k", 7, delivered_at=11.0)


def test_a_hook_is_not_told_of_its_own_failure_but_others_are() -> None:
    """Else telling of a failure would fail, and be told of."""
    notice = failure_event("pager", EVENT, 8, "no", 20.0)
    assert notice is not None
    assert is_own_failure(notice, "pager")
    assert not is_own_failure(notice, "mail")
    assert not is_own_failure(EVENT, "pager")
    assert "pager could not deliver event 7 (failover) in 8 attempts: no" in notice.message


def test_a_failure_to_tell_of_a_failure_makes_no_event() -> None:
    """Two broken hooks do not tell of each other for ever."""
    notice = failure_event("pager", EVENT, 8, "no", 20.0)
    assert notice is not None
    assert failure_event("mail", notice, 8, "no", 30.0) is None
