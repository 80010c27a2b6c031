"""A circuit takes a node out soon, probes it, and brings it back slowly: examples, and any history of a node."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from routing.circuit import Circuit, CircuitRules, CircuitState, Silence

RULES = CircuitRules()
IN_TIME = 0.1
QUESTION_SECONDS = 0.1  # between two questions


def opened(now: float = 0.0, jitter: float = 0.0) -> Circuit:
    circuit = Circuit(RULES)
    assert circuit.fail("it stalls", now, jitter)
    return circuit


def answer(circuit: Circuit, now: float) -> None:
    """A question that took a millisecond."""
    circuit.on_answer(now - 0.001, now, IN_TIME, 0.0)


def answered_until(circuit: Circuit, now: float, state: CircuitState, within: float) -> float:
    """Answers in time at a steady beat until it is in ``state``; when that was."""
    until = now + within
    while now < until:
        if circuit.state is state:
            return now
        now += QUESTION_SECONDS
        answer(circuit, now)
    raise AssertionError(f"{circuit.state} after {within} s of answers in time")


def test_a_failure_ends_all_reads_and_is_told_once() -> None:
    circuit = Circuit(RULES)
    assert circuit.admits(1000)
    assert circuit.fail("it stalls", 1.0, 0.0)
    assert (circuit.state, circuit.is_open, circuit.share) == (CircuitState.OPEN, True, 0.0)
    assert (circuit.why, circuit.openings_total) == ("it stalls", 1)
    assert not circuit.admits(1)
    assert not circuit.fail("its connection ended", 1.1, 0.0)
    assert (circuit.why, circuit.openings_total) == ("it stalls", 1)


def test_only_an_answer_after_the_pause_and_in_time_brings_it_back() -> None:
    circuit = opened()
    answer(circuit, RULES.pause_seconds - 0.01)
    assert circuit.state is CircuitState.OPEN
    circuit.on_answer(RULES.pause_seconds - 0.01, RULES.pause_seconds + 0.01, IN_TIME, 0.0)
    assert circuit.state is CircuitState.PROBING  # what was asked during the pause is no probe
    assert not circuit.admits(1)
    answer(circuit, RULES.pause_seconds + 0.02)
    assert circuit.state is CircuitState.RETURNING


def test_a_late_answer_to_a_probe_is_a_longer_pause_and_no_opening() -> None:
    circuit = opened()
    asked_at = RULES.pause_seconds
    assert circuit.advance(asked_at)
    assert circuit.on_answer(asked_at, asked_at + IN_TIME * 2, IN_TIME, 0.0)
    assert (circuit.state, circuit.openings_total) == (CircuitState.OPEN, 1)
    again = asked_at + IN_TIME * 2 + RULES.pause_seconds * 2
    answer(circuit, again - 0.01)
    assert circuit.state is CircuitState.OPEN
    answer(circuit, again + 0.01)
    assert circuit.state is CircuitState.RETURNING


def test_it_comes_back_by_doubling_each_good_second() -> None:
    circuit = opened()
    now = answered_until(circuit, 0.0, CircuitState.RETURNING, 1.0)
    shares = []
    while circuit.state is CircuitState.RETURNING:
        share, began = circuit.share, now
        shares.append((share, sum(circuit.admits(1) for _ in range(1000))))
        while circuit.share == share:
            now += QUESTION_SECONDS
            answer(circuit, now)
        assert RULES.step_seconds <= now - began <= RULES.step_seconds + 2 * QUESTION_SECONDS
    assert shares == [(0.05, 50), (0.1, 100), (0.2, 200), (0.4, 400), (0.8, 800)]
    assert circuit.state is CircuitState.CLOSED
    assert circuit.admits(1000)


def test_a_second_without_an_answer_is_not_a_good_one() -> None:
    circuit = opened()
    now = answered_until(circuit, 0.0, CircuitState.RETURNING, 1.0)
    assert not circuit.advance(now + 100.0)
    assert circuit.share == RULES.share_first


def test_a_failure_while_it_comes_back_is_a_longer_pause() -> None:
    """Up to the longest, of which the jitter takes a half at most."""
    circuit, now, pauses = Circuit(RULES), 0.0, []
    for _ in range(8):
        assert circuit.fail("it stalls", now, 0.0)
        began = now
        while circuit.state is not CircuitState.RETURNING:
            now += 0.01
            answer(circuit, now)
        pauses.append(round(now - began, 1))
    assert pauses == [0.3, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    jittered = opened(jitter=1.0)
    answer(jittered, RULES.pause_seconds / 2 + 0.01)
    assert jittered.state is CircuitState.RETURNING


def test_openings_are_forgotten_while_all_is_well() -> None:
    circuit, now = Circuit(RULES), 0.0
    for _ in range(3):
        circuit.fail("it stalls", now, 0.0)
        now = answered_until(circuit, now, CircuitState.CLOSED, 30.0)
    now += RULES.forget_seconds * 3
    circuit.fail("it stalls", now, 0.0)
    answer(circuit, now + RULES.pause_seconds + 0.01)
    assert circuit.state is CircuitState.RETURNING


@pytest.mark.parametrize(
    ("errors", "sent", "opens"),
    [(4, 4, False), (5, 5, True), (5, 10, True), (5, 11, False), (50, 200, False), (50, 60, True)],
)
def test_errors_open_it_when_they_are_many_and_a_good_part(errors: int, sent: int, opens: bool) -> None:
    circuit, told = Circuit(RULES), False
    before = sent - errors  # answered well
    for number in range(errors):
        told |= circuit.fail_reads(
            1, 1000 + (before if number else 0) + number + 1, "LOADING", 0.01 * number, 0.0
        )
    assert (told, circuit.is_open) == (opens, opens)


def test_errors_of_different_windows_do_not_add_up() -> None:
    circuit = Circuit(RULES)
    for number in range(20):
        assert not circuit.fail_reads(1, number + 1, "LOADING", number * RULES.window_seconds / 2, 0.0)


def test_one_error_ends_a_return() -> None:
    circuit = opened()
    now = answered_until(circuit, 0.0, CircuitState.RETURNING, 1.0)
    assert circuit.fail_reads(1, 1000, "LOADING", now, 0.0)
    assert circuit.is_open


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(0, 6))
def test_a_node_that_fails_each_read_and_answers_each_question_is_tried_ever_less(
    jitter: float, good: int
) -> None:
    """No flapping: within a minute it is tried a few times only, however many of its reads go well first."""
    circuit, now, reads = Circuit(RULES), 0.0, 0
    while now < 60.0:
        now += 0.01
        answer(circuit, now)
        if circuit.admits(1):
            reads += 1
            if reads > good:
                reads = 0
                circuit.fail("it stalls", now, jitter)
    assert circuit.openings_total <= 20


class AnyHistory(RuleBasedStateMachine):
    """A node that fails and answers as it likes, and reads of any sizes."""

    @initialize(jitter=st.floats(0, 1))
    def begin(self, jitter: float) -> None:
        self.circuit = Circuit(RULES)
        self.now = 100.0
        self.jitter = jitter
        self.step: tuple[float, CircuitState] = (1.0, CircuitState.CLOSED)
        self.offered = self.taken = 0
        self.began_at = self.now
        self.pause_ends = -inf

    def _follow(self, before: tuple[float, CircuitState]) -> None:
        """The share moved: the counts begin anew."""
        if (self.circuit.share, self.circuit.state) != before:
            assert self.circuit.share in (0.0, before[0], RULES.share_first, before[0] * 2, 1.0)
            if self.circuit.share == 1.0 and before[0] != 1.0:
                assert before[0] >= 0.5, "it was brought back too soon"
            if self.circuit.share > before[0] > 0:
                assert self.now - self.began_at >= RULES.step_seconds - 1e-9, "a step was too short"
            if self.circuit.share != before[0]:
                self.began_at = self.now
                self.offered = self.taken = 0

    @rule(seconds=st.floats(0.001, 3.0))
    def wait(self, seconds: float) -> None:
        before = self.circuit.share, self.circuit.state
        self.now += seconds
        self.circuit.advance(self.now)
        self._follow(before)

    @rule(took=st.sampled_from([0.001, 0.05, 0.2, 2.0]), seconds=st.floats(0.0, 0.5))
    def answer(self, took: float, seconds: float) -> None:
        before = self.circuit.share, self.circuit.state
        self.now += seconds
        self.circuit.on_answer(self.now - took, self.now, IN_TIME, self.jitter)
        self._follow(before)
        if before[0] == 0.0 and self.circuit.share > 0.0:
            assert took <= IN_TIME
            assert self.now - took >= self.pause_ends, "a probe before the pause was over"

    @rule()
    def fail(self) -> None:
        before = self.circuit.share, self.circuit.state
        was = self.circuit.openings_total
        told = self.circuit.fail("it stalls", self.now, self.jitter)
        self._follow(before)
        assert told == (before[0] > 0.0) == (self.circuit.openings_total == was + 1)
        assert self.circuit.share == 0.0
        if told:
            self.pause_ends = self.now + RULES.pause_seconds * (1 - self.jitter / 2)

    @rule(count=st.integers(1, 60))
    def read(self, count: int) -> None:
        would = self.circuit.would_admit(count)
        admitted = self.circuit.admits(count)
        assert would == admitted
        self.offered += count
        self.taken += count if admitted else 0
        assert self.taken <= self.offered * self.circuit.share + 1e-9, "more than its share"

    @precondition(lambda self: self.circuit.state is not CircuitState.CLOSED)
    @rule()
    def answers_bring_it_back(self) -> None:
        """Whatever it went through, answers in time end it."""
        longest = RULES.pause_seconds_max + 6 * (RULES.step_seconds + QUESTION_SECONDS) + 1.0
        self.now = answered_until(self.circuit, self.now, CircuitState.CLOSED, longest)
        self.offered = self.taken = 0

    @invariant()
    def its_share_says_its_state(self) -> None:
        circuit = self.circuit
        assert circuit.is_open == (circuit.state in (CircuitState.OPEN, CircuitState.PROBING))
        assert (circuit.share == 1.0) == (circuit.state is CircuitState.CLOSED)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_silence_counts_from_the_first_look_that_found_replies_owed() -> None:
    silence = Silence()
    assert silence.seconds(False, (0, 0), 1.0, 1.0) == 0.0
    assert silence.seconds(True, (0, 0), 9.0, 9.0) == 0.0  # asked since the look before
    assert silence.seconds(True, (0, 0), 9.5, 9.5) == 0.5
    assert silence.seconds(True, (0, 70), 10.0, 10.0) == 0.0  # a part of a reply
    assert silence.seconds(True, (0, 70), 10.5, 10.5) == 0.5
    assert silence.seconds(False, (1, 0), 11.0, 11.0) == 0.0
    assert silence.seconds(True, (1, 0), 12.0, 12.0) == 0.0
    assert silence.seconds(False, (1, 0), 12.5, 12.5) == 0.0
    assert silence.seconds(True, (1, 0), 13.0, 13.0) == 0.0


def test_silence_that_nobody_could_have_heard_ended_does_not_count() -> None:
    """The looks of a process that stood still: it read nothing meanwhile."""
    silence = Silence()
    assert silence.seconds(True, (0, 0), 1.0, 3.0) == 0.0  # due at 1.0, and two seconds late
    assert silence.seconds(True, (0, 0), 3.1, 3.1) == pytest.approx(0.1)
    assert silence.seconds(True, (0, 0), 3.2, 9.0) == pytest.approx(0.2)
