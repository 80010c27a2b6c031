"""The retry budget: in no window more repetitions than a share of the requests and the reserve; and no fewer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from routing.retry_budget import PARTS, RetryBudget, RetryRules

RULES = RetryRules(share=0.2, reserve_per_second=1.0, window_seconds=10.0)
steps = st.lists(
    st.tuples(st.floats(0, 12), st.integers(0, 200), st.integers(0, 60)), min_size=1, max_size=40
)


def taken(budget: RetryBudget, now: float, total: int, wanted: int) -> int:
    return sum(budget.take(now, total) for _ in range(wanted))


def test_an_idle_proxy_has_its_reserve_and_no_more() -> None:
    budget = RetryBudget(RULES, 0.0)
    assert taken(budget, 0.0, 0, 50) == 10
    assert taken(budget, 5.0, 0, 50) == 0
    assert taken(budget, 10.0, 0, 50) == 10
    assert (budget.taken_total, budget.refused_total) == (20, 130)


def test_a_share_of_what_is_asked_may_be_repeated() -> None:
    budget = RetryBudget(RULES, 0.0)
    assert taken(budget, 0.5, 1000, 500) == 10 + 200
    assert taken(budget, 9.9, 1100, 500) == 20
    assert taken(budget, 30.0, 1100, 500) == 10


def test_what_came_long_ago_counts_no_more() -> None:
    """A thousand requests in the hour before are few in ten seconds."""
    budget = RetryBudget(RULES, 0.0)
    assert taken(budget, 3600.0, 3600, 500) == 10 + 2


def test_a_node_that_is_forgotten_takes_nothing_from_the_budget() -> None:
    budget = RetryBudget(RULES, 0.0)
    assert budget.take(0.1, 1000)
    assert taken(budget, 0.2, 0, 500) == 10 + 200 - 1
    assert taken(budget, 0.3, 100, 500) == 20


@given(st.floats(0, 1e6), steps)
def test_no_window_has_more_than_its_part(start: float, given_steps: list[tuple[float, int, int]]) -> None:
    """Against the plain lists of what came and went, with a part more of the window for its grain."""
    budget = RetryBudget(RULES, start)
    now, total = start, 0
    requests: list[tuple[float, int]] = [(start, 0)]
    repeated: list[tuple[float, int]] = []
    unseen = 0
    for pause, new, wanted in given_steps:
        now += pause
        total += new
        unseen += new
        if not wanted:
            continue
        requests.append((now, unseen))  # as they are counted: when somebody asks
        unseen = 0
        repeated.append((now, taken(budget, now, total, wanted)))
        if not repeated[-1][1]:
            continue
        grain = RULES.window_seconds / PARTS
        in_window = sum(count for at, count in repeated if at > now - RULES.window_seconds + grain)
        # Those that came since the last call count at this one.
        asked = sum(count for at, count in requests if at >= now - RULES.window_seconds - grain)
        assert in_window <= 0.2 * asked + RULES.reserve_per_second * RULES.window_seconds + 1e-6
