from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from routing.admission import (
    RETRY_MAX_SECONDS,
    Admission,
    AdmissionRules,
    Shed,
    ShedReason,
    Waiter,
    overloaded,
    retry_seconds,
)
from routing.priority import Priority, parse_priority

CRITICAL, NORMAL, BACKGROUND = Priority
FAR = 1e9

WAITS = (1.0, 0.02, 0.005)  # seconds, by priority


def filled(permits: int, **rules: object) -> Admission[str]:
    """With all permits given to critical requests."""
    admission: Admission[str] = Admission(AdmissionRules(**{"wait_seconds": WAITS, **rules}), permits)  # type: ignore[arg-type]
    while admission.admits(CRITICAL):
        pass
    return admission


def names(waiters: list[Waiter[str]]) -> list[str]:
    return [waiter.request for waiter in waiters]


def test_each_priority_stops_at_its_share_and_critical_finds_the_rest() -> None:
    admission: Admission[str] = Admission(AdmissionRules(wait_seconds=WAITS), 10)
    given = [
        sum(admission.admits(priority) for _ in range(20)) for priority in (BACKGROUND, NORMAL, CRITICAL)
    ]
    assert given == [6, 1, 3]


@pytest.mark.parametrize("priority", Priority)
def test_even_the_smallest_limit_lets_one_request_of_any_priority_through(priority: Priority) -> None:
    admission: Admission[str] = Admission(AdmissionRules(wait_seconds=WAITS), 1)
    assert admission.admits(priority)
    assert not any(map(admission.admits, Priority))


def test_the_more_important_are_served_first_and_then_who_gives_up_first() -> None:
    admission = filled(10)
    for name, priority, deadline in [
        ("b", BACKGROUND, FAR),
        ("n", NORMAL, FAR),
        ("n, soon", NORMAL, 0.01),
        ("c", CRITICAL, FAR),
    ]:
        waiter, shed = admission.wait(name, priority, 0.0, deadline)
        assert waiter is not None
        assert not shed
    admission.answered(10, 0.001)
    served, shed = admission.serve(0.001)
    assert (names(served), shed) == (["c", "n, soon", "n", "b"], [])


def test_who_waits_is_served_up_to_its_ceiling() -> None:
    admission = filled(10)
    for name in ("n1", "n2", "n3"):
        admission.wait(name, NORMAL, 0.0, FAR)
    assert admission.serve(0.0) == ([], [])
    admission.give_back(3)
    assert admission.serve(0.0) == ([], [])
    admission.give_back(2)
    assert names(admission.serve(0.0)[0]) == ["n1", "n2"]
    assert admission.in_flight == 7


def test_nobody_overtakes_who_waits_except_the_more_important() -> None:
    admission = filled(10)
    admission.wait("n", NORMAL, 0.0, FAR)
    admission.give_back(10)
    assert not admission.admits(NORMAL)
    assert not admission.admits(BACKGROUND)
    assert admission.admits(CRITICAL)


def test_who_waited_too_long_is_shed_and_the_less_important_with_it_first() -> None:
    admission = filled(10)
    admission.answered(0, 0.018)
    admission.wait("n", NORMAL, 0.0, FAR)
    admission.wait("b", BACKGROUND, 0.018, FAR)
    assert admission.next_give_up() == pytest.approx(0.02)
    assert admission.oldest_wait_seconds(0.019) == pytest.approx(0.019)
    served, shed = admission.serve(0.021)
    assert not served
    assert [(each.request, each.reason) for each in shed] == [
        ("b", ShedReason.YIELDED),
        ("n", ShedReason.WAITED),
    ]
    assert admission.next_give_up() is None


def test_while_a_node_stalls_nobody_has_waited_too_long() -> None:
    """It answers nothing from 0.01 to 0.31, of which 5 ms could be nothing."""
    admission = filled(10)
    admission.answered(0, 0.01)
    admission.wait("n", NORMAL, 0.0, FAR)
    admission.wait("b", BACKGROUND, 0.012, FAR)
    admission.wait("late", BACKGROUND, 0.3, FAR)
    assert admission.serve(0.3) == ([], [])
    assert admission.next_give_up() == 1.0
    admission.answered(0, 0.31)
    assert admission.serve(0.31) == ([], [])
    assert admission.next_give_up() == pytest.approx(0.312)
    admission.answered(0, 0.314)
    served, shed = admission.serve(0.314)
    assert (served, [each.request for each in shed]) == ([], ["b"])
    assert admission.next_give_up() == pytest.approx(0.315)
    assert [each.request for each in admission.serve(0.315)[1]] == ["late", "n"]


def test_after_a_stall_too_who_gives_up_first_is_served_first() -> None:
    admission = filled(10)
    admission.answered(0, 0.0)
    admission.wait("patient", NORMAL, 0.0, FAR)
    admission.wait("at its end soon", NORMAL, 0.001, 0.29)
    admission.answered(4, 0.28)
    assert names(admission.serve(0.28)[0]) == ["at its end soon"]


def test_an_answer_every_millisecond_is_no_stall() -> None:
    admission = filled(10)
    admission.answered(0, 0.0)
    admission.wait("n", NORMAL, 0.0, FAR)
    shed_at = None
    for step in range(1, 40):
        admission.answered(0, step / 1000)
        if admission.serve(step / 1000)[1]:
            shed_at = step
            break
    assert shed_at == 20


@pytest.mark.parametrize(("deadline", "ends_at"), [(FAR, 1.0), (0.2, 0.2)])
@pytest.mark.parametrize("priority", Priority)
def test_no_stall_makes_a_request_wait_past_its_end(
    priority: Priority, deadline: float, ends_at: float
) -> None:
    admission = filled(10)
    admission.wait("r", priority, 0.0, deadline)
    admission.wait("b", BACKGROUND, 0.1, FAR)
    assert admission.next_give_up() == ends_at
    assert admission.serve(ends_at - 0.001) == ([], [])
    served, [shed] = admission.serve(ends_at)
    assert (served, shed.request, shed.reason) == ([], "r", ShedReason.WAITED)
    assert admission.next_give_up() == pytest.approx(1.1)


def test_a_permit_that_is_there_is_given_to_who_waited_too_long() -> None:
    """A proxy that was busy for 16 ms looks for the first time since."""
    admission = filled(10)
    admission.answered(0, 0.0)
    admission.wait("b", BACKGROUND, 0.0, FAR)
    admission.answered(10, 0.016)
    assert (names(admission.serve(0.016)[0]), admission.waiting) == (["b"], 0)


@pytest.mark.parametrize(("no_load_seconds", "waits_until"), [(0.01, 0.06), (0.001, 0.095), (inf, 0.095)])
def test_a_far_node_stalls_later(no_load_seconds: float, waits_until: float) -> None:
    """It answers at 0.04 and 0.08. Four round trips to it are no stall."""
    admission = filled(10)
    admission.limit(10, 1.0, no_load_seconds)
    admission.answered(0, 0.04)
    admission.wait("n", NORMAL, 0.04, FAR)
    admission.answered(0, 0.08)
    assert admission.oldest_wait_seconds(0.08) == pytest.approx(0.04)
    assert (admission.next_give_up() or 0.0) == pytest.approx(waits_until if waits_until < 0.08 else 1.04)


def test_what_is_never_refused_may_exceed_the_limit() -> None:
    admission = filled(10)
    admission.wait("c", CRITICAL, 0.0, FAR)
    admission.in_flight += 30
    assert admission.serve(0.0) == ([], [])
    admission.answered(30, 0.0)
    assert admission.serve(0.0) == ([], [])
    admission.answered(1, 0.0)
    assert names(admission.serve(0.0)[0]) == ["c"]


def test_in_a_full_queue_the_newest_of_the_least_important_makes_room() -> None:
    admission = filled(10, waiting_max=3)
    for name, priority in [("b1", BACKGROUND), ("b2", BACKGROUND), ("n1", NORMAL)]:
        admission.wait(name, priority, 0.0, FAR)
    assert admission.wait("b3", BACKGROUND, 0.0, FAR)[1][0].request == "b3"
    assert admission.wait("c1", CRITICAL, 0.0, FAR)[1][0].request == "b2"
    assert admission.wait("c2", CRITICAL, 0.0, FAR)[1][0].request == "b1"
    assert admission.wait("c3", CRITICAL, 0.0, FAR)[1][0].request == "n1"
    waiter, [shed] = admission.wait("c4", CRITICAL, 0.0, FAR)
    assert waiter is None
    assert (shed.request, shed.reason) == ("c4", ShedReason.QUEUE_FULL)


def test_a_tightened_limit_is_tightened_twice_for_background() -> None:
    admission: Admission[str] = Admission(AdmissionRules(wait_seconds=WAITS), 20)
    admission.limit(10, 0.5)
    assert admission.ceilings == [10, 7, 3]


def test_who_leaves_is_not_served() -> None:
    admission = filled(10)
    waiter, _ = admission.wait("c1", CRITICAL, 0.0, FAR)
    admission.wait("c2", CRITICAL, 0.0, FAR)
    assert waiter is not None
    admission.leave(waiter)
    admission.leave(waiter)
    admission.give_back(10)
    assert names(admission.serve(0.0)[0]) == ["c2"]
    assert admission.waiting == 0


RULES = AdmissionRules(wait_seconds=WAITS, waiting_max=6)
SHORT = 1e-9  # of seconds, for what floating point rounds


class Requests(RuleBasedStateMachine):
    """Admission against a plain account of what became of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.permits, self.tightening = 2, 1.0
        self.admission: Admission[int] = Admission(RULES, self.permits)
        self.now = 0.0
        self.fate: dict[int, str] = {}
        self.waiters: dict[int, Waiter[int]] = {}
        self.ends: dict[int, float] = {}
        self.waited: dict[int, float] = {}  # without the time in which the node stalled
        self.in_flight = 0
        self.stalls_from = -inf

    @rule(priority=st.sampled_from(Priority), patience=st.sampled_from([0.001, 0.004, 5.0]))
    def arrive(self, priority: Priority, patience: float) -> None:
        self.ask(priority, patience)

    @rule(priority=st.sampled_from(Priority))
    def flood(self, priority: Priority) -> None:
        """One more than there is room for, without leaving it to chance."""
        for _ in range(self.permits + 1):
            self.ask(priority, 5.0)

    def ask(self, priority: Priority, patience: float) -> None:
        number = len(self.fate)
        self.fate[number] = "new"
        if self.admission.admits(priority):
            assert self.in_flight < self.permits
            assert not any(waiter.priority <= priority for waiter in self.waiters.values())
            self.give(number)
            return
        waiter, shed = self.admission.wait(number, priority, self.now, self.now + patience)
        if waiter is not None:
            self.fate[number] = "waits"
            self.waiters[number] = waiter
            self.waited[number] = 0.0
            self.ends[number] = self.now + min(patience, RULES.wait_seconds[CRITICAL])
        self.lose(shed, {number: priority})

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.004, 0.01, 0.3, 1.5]), count=st.integers(0, 3))
    def turn(self, seconds: float, count: int) -> None:
        """With as many answers."""
        self.wait(seconds)
        if count := min(count, self.in_flight):
            self.in_flight -= count
            self.admission.answered(count, self.now)
            self.stalls_from = self.now + RULES.stall_seconds
        self.serve()

    def serve(self) -> None:
        served, shed = self.admission.serve(self.now)
        for waiter in served:
            assert self.ends[waiter.request] > self.now
            assert self.in_flight < self.permits
            assert self.waiters.pop(waiter.request) is waiter
            self.give(waiter.request)
        self.lose(shed, {})
        for waiter in served:
            assert not any(other.priority < waiter.priority for other in self.waiters.values())
        for number, waiter in self.waiters.items():
            assert self.ends[number] > self.now
            assert self.waited[number] < RULES.wait_seconds[waiter.priority] + SHORT

    def wait(self, seconds: float) -> None:
        """Nothing happens meanwhile, except that those give up whose time it is."""
        until = self.now + seconds
        while self.waiters:
            wake = self.admission.next_give_up()
            assert wake is not None
            if wake > until:
                break
            self.pass_time(max(wake, self.now))
            self.serve()
            assert (self.admission.next_give_up() or inf) > self.now
        self.pass_time(until)

    def pass_time(self, until: float) -> None:
        for number in self.waiters:
            self.waited[number] += max(0.0, min(until, self.stalls_from) - self.now)
        self.now = until

    @rule(count=st.integers(1, 9))
    def ask_oneself(self, count: int) -> None:
        """What is never refused."""
        self.in_flight += count
        self.admission.in_flight += count

    @rule(count=st.integers(1, 3))
    def lose_connection(self, count: int) -> None:
        count = min(count, self.in_flight)
        self.in_flight -= count
        self.admission.give_back(count)

    @rule(permits=st.integers(1, 5), tightening=st.sampled_from([1.0, 0.5, 0.01]))
    def limit(self, permits: int, tightening: float) -> None:
        self.permits, self.tightening = permits, tightening
        self.admission.limit(permits, tightening)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.waiters:
            number = data.draw(st.sampled_from(sorted(self.waiters)))
            self.fate[number] = "left"
            self.admission.leave(self.waiters.pop(number))

    def give(self, number: int) -> None:
        assert self.fate[number] in {"new", "waits"}
        self.fate[number] = "sent"
        self.in_flight += 1

    def lose(self, shed: list[Shed[int]], arrived: dict[int, Priority]) -> None:
        """Each was waiting, or has just come; it has come to its end, or there is a reason and nothing less waits."""
        for each in shed:
            number = each.request
            assert self.fate[number] == ("waits" if number in self.waiters else "new")
            assert each.priority == arrived.get(number, each.priority)
            self.fate[number] = "shed"
            waiter = self.waiters.pop(number, None)
            if waiter is not None and self.ends[number] <= self.now:
                assert each.reason is ShedReason.WAITED
                continue
            assert not any(other.priority > each.priority for other in self.waiters.values())
            if each.reason is ShedReason.WAITED:
                assert self.waited[number] >= RULES.wait_seconds[each.priority] - SHORT
                assert self.in_flight >= max(
                    1, int(self.permits * RULES.shares[each.priority] * self.tightening)
                )

    @invariant()
    def accounts_agree(self) -> None:
        assert "new" not in self.fate.values()
        assert self.admission.in_flight == self.in_flight
        assert self.admission.waiting == len(self.waiters) <= 6
        assert {number for number, fate in self.fate.items() if fate == "waits"} == set(self.waiters)


Requests.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestRequests = Requests.TestCase


@given(st.sampled_from(Priority), st.floats(0, 1000), st.floats(0, 1, exclude_max=True))
def test_the_retry_time_is_bounded_and_never_now(priority: Priority, excess: float, random: float) -> None:
    assert 0.05 <= retry_seconds(priority, excess, random) <= RETRY_MAX_SECONDS * 1.5


def test_retries_are_spread_evenly_later_with_more_excess_and_background_last() -> None:
    drawn = [retry_seconds(NORMAL, 3.0, step / 100) for step in range(100)]
    assert max(drawn) - min(drawn) == pytest.approx(0.8 * 0.99)
    assert (
        retry_seconds(NORMAL, 0.0, 0.5)
        < retry_seconds(NORMAL, 3.0, 0.5)
        < retry_seconds(BACKGROUND, 3.0, 0.5)
    )


@pytest.mark.parametrize("reason", ShedReason)
def test_the_error_says_what_why_and_when_to_come_back(reason: ShedReason) -> None:
    text = overloaded("10.0.0.1:6379", Shed("GET", BACKGROUND, reason, 0.0204), 0.1234)
    assert text.startswith("OVERLOADED node 10.0.0.1:6379 ")
    assert text.endswith("(background); retry after 123 ms")
    assert ("20 ms" in text) == (reason is ShedReason.WAITED)


def test_priorities_are_read_in_any_letters_and_an_unknown_one_names_those_there_are() -> None:
    assert [parse_priority(text) for text in ("CRITICAL", "normal", "Background")] == list(Priority)
    assert sorted(Priority) == [CRITICAL, NORMAL, BACKGROUND]
    assert [parse_priority(str(priority)) for priority in Priority] == list(Priority)
    with pytest.raises(
        ValueError, match="'urgent' is not a priority: write one of critical, normal, background"
    ):
        parse_priority("urgent")
