"""The retry budget: never more repetitions than the bucket, a share of the requests and the reserve; and no fewer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from routing.retry_budget import RetryBudget, RetryRules

RULES = RetryRules(share=0.2, reserve_per_second=1.0, burst=10)
steps = st.lists(
    st.tuples(st.floats(0, 12), st.integers(0, 200), st.integers(0, 60)), min_size=1, max_size=40
)


def taken(budget: RetryBudget, now: float, total: int, wanted: int) -> int:
    return sum(budget.take(now, total) for _ in range(wanted))


def test_an_idle_proxy_has_its_reserve_and_no_more() -> None:
    budget = RetryBudget(RULES, 0.0)
    assert taken(budget, 0.0, 0, 50) == 10
    assert taken(budget, 5.0, 0, 50) == 5
    assert taken(budget, 60.0, 0, 50) == 10
    assert (budget.taken_total, budget.refused_total) == (25, 125)


def test_a_share_of_what_is_asked_may_be_repeated() -> None:
    budget = RetryBudget(RULES, 0.0)
    assert taken(budget, 0.0, 0, 50) == 10
    assert taken(budget, 0.0, 40, 50) == 8
    assert taken(budget, 0.0, 1000, 500) == 10


def test_who_waits_gets_something_however_much_was_spent_before() -> None:
    budget = RetryBudget(RULES, 0.0)
    assert taken(budget, 0.0, 0, 10_000) == 10
    assert [taken(budget, float(second), 0, 100) for second in range(1, 6)] == [1] * 5


def test_a_node_that_is_forgotten_takes_nothing_from_the_budget() -> None:
    budget = RetryBudget(RULES, 0.0)
    assert taken(budget, 0.0, 1000, 50) == 10
    assert taken(budget, 0.0, 0, 50) == 0
    assert taken(budget, 0.0, 20, 50) == 4


@given(st.floats(0, 1e6), steps)
def test_no_time_has_more_than_its_part(start: float, given_steps: list[tuple[float, int, int]]) -> None:
    budget = RetryBudget(RULES, start)
    now, total = start, 0
    done: list[tuple[float, int, int]] = []  # (when, requests until then, repetitions then)
    for pause, new, wanted in given_steps:
        now += pause
        total += new
        done.append((now, total, taken(budget, now, total, wanted)))
    for first, (begin, before, _) in enumerate(done):
        repeated = 0
        for at, requests, count in done[first:]:
            repeated += count
            allowed = 10 + 0.2 * (requests - before) + (at - begin)
            assert repeated <= allowed + 1e-3
