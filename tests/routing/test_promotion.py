"""The stages of a replica: as a state machine against a plain account of what was proved, and each rule by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from routing.comparison import Outcome, Verdict
from routing.events import EventKind
from routing.names import key_text
from routing.offsets import NO_POINT, Point, Sample, covers
from routing.promotion import (
    Compared,
    Promotion,
    PromotionRules,
    Stage,
    Tick,
    advance,
    is_comparison_due,
    keys_to_compare,
    parse_backlog,
    reset,
    stage_event,
)
from routing.topology import Address, Node, Role

RULES = PromotionRules(verify_interval_seconds=30.0, verify_keys=16, quarantine_seconds=60.0)
HISTORY, OTHER = b"a" * 40, b"b" * 40
ORDER = [Stage.JOINING, Stage.SYNCING, Stage.CAUGHT_UP, Stage.VERIFIED, Stage.READABLE]
OUTCOMES = {
    Verdict.EQUAL: Outcome(equal=3),
    Verdict.UNDECIDED: Outcome(undecided=3),
    Verdict.MISMATCH: Outcome(equal=2, mismatched=(b"k",)),
}


def primary_at(offset: int, replid: bytes = HISTORY) -> Sample:
    return Sample(True, Point(replid, offset), NO_POINT)


def replica_at(offset: int, replid: bytes = HISTORY, **told: bool) -> Sample:
    return Sample(False, Point(replid, offset), NO_POINT, **told)


class Replicating(RuleBasedStateMachine):
    """A primary that writes, a replica that follows, and a monitor that looks now and then.

    The account: ``proved`` is whether a comparison was begun and found equal since the monitor last saw something that
    ends all proofs; ``reached`` whether the replica was seen at an offset that its primary told after that.
    """

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.known = Promotion()
        self.primary = Point(HISTORY, 100)
        self.replica = Point(HISTORY, 100)
        self.is_syncing = self.is_fresh = False  # fresh: its data set came since the last tick
        self.comparing: tuple[int, bool] | None = None  # (proof, whether no proof ended since it was begun)
        self.ended: Compared | None = None
        self.ended_counts = False
        self.joined_at: float | None = None
        self.floors: list[Point] = []
        self.reached = self.proved = False
        self.quarantined_until = 0.0

    @rule(size=st.integers(1, 50))
    def write(self, size: int) -> None:
        self.primary = self.primary._replace(offset=self.primary.offset + size)

    @rule()
    def apply(self) -> None:
        if not self.is_syncing and self.replica.replid == self.primary.replid:
            self.replica = self.primary

    @rule()
    def begin_synchronisation(self) -> None:
        self.is_syncing = True

    @rule()
    def synchronise(self) -> None:
        self.is_fresh = self.is_fresh or self.primary.offset > self.replica.offset
        self.is_syncing, self.replica = False, self.primary

    @rule(both=st.booleans())
    def change_history(self, both: bool) -> None:
        replid = OTHER if self.primary.replid == HISTORY else HISTORY
        if both and self.replica.replid == self.primary.replid:
            self.replica = self.replica._replace(replid=replid)
        self.primary = self.primary._replace(replid=replid)

    @rule(ticks=st.integers(1, 5), writes=st.booleans())
    def thrive(self, ticks: int, writes: bool) -> None:
        """All goes well for some ticks, but no comparison is begun or ends."""
        for _ in range(ticks):
            self.wait(0.1)
            if writes:
                self.write(10)
            self.apply()
            self.tick(True, True)

    @rule(seconds=st.sampled_from([0.1, 1.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def lose_connection(self) -> None:
        self.known = reset(self.known, Stage.JOINING, "the connection to it ended")
        self._nothing_is_proved()

    @precondition(lambda self: is_comparison_due(self.known, RULES, self.now))
    @rule()
    def compare(self) -> None:
        if self.comparing is None:
            self.comparing = (self.known.proof, True)

    @precondition(lambda self: self.comparing is not None)
    @rule(verdict=st.sampled_from([*Verdict, Verdict.EQUAL]))
    def end_comparison(self, verdict: Verdict) -> None:
        assert self.comparing is not None
        proof, self.ended_counts = self.comparing
        self.ended = Compared(proof, OUTCOMES[verdict])
        self.comparing = None

    @rule(answers=st.sampled_from([True, True, True, False]), primary_answers=st.booleans())
    def tick(self, answers: bool, primary_answers: bool) -> None:
        primary = Sample(True, self.primary, NO_POINT) if primary_answers else None
        replica = Sample(False, self.replica, NO_POINT, is_syncing=self.is_syncing) if answers else None
        backlog_from = self.replica.offset + 1 if self.is_fresh else 1
        ended, self.ended = self.ended, None
        before = self.known
        tick = Tick(replica, primary, self.now, backlog_from, compared=ended)
        self.known = advance(before, tick, RULES, self.now)
        if before.stage is Stage.QUARANTINED:
            if self.now < self.quarantined_until:
                assert self.known == before
                return
            self._nothing_is_proved()
            before = Promotion(Stage.SYNCING)
        was_fresh, self.is_fresh = self.is_fresh and answers, self.is_fresh and not answers
        history = self.primary.replid if primary_answers else before.point.replid
        is_apart = self.is_syncing or self.replica.replid != history
        if replica is None or is_apart or (was_fresh and before.point != NO_POINT):
            self._nothing_is_proved()
            assert self.known.stage is (Stage.JOINING if replica is None else Stage.SYNCING)
            return
        if ended is not None and self.ended_counts:
            self.proved = self.proved or ended.outcome.verdict is Verdict.EQUAL
            if ended.outcome.verdict is Verdict.MISMATCH and before.stage is not Stage.SYNCING:
                assert self.known.stage is Stage.QUARANTINED
                self.quarantined_until = self.now + RULES.quarantine_seconds
                self._nothing_is_proved()
                return
        if primary_answers and self.joined_at is not None and self.now >= self.joined_at:
            self.floors.append(self.primary)
        if self.joined_at is None and self.known.stage is Stage.SYNCING:
            self.joined_at = self.now
        self.reached = self.reached or any(covers(self.replica, floor) for floor in self.floors)
        gained = ORDER.index(self.known.stage) - ORDER.index(before.stage)
        assert gained <= 2 if before.stage is Stage.JOINING else gained <= 1

    def _nothing_is_proved(self) -> None:
        self.reached = self.proved = False
        self.joined_at = None
        self.floors.clear()
        self.ended_counts = False
        if self.comparing is not None:
            self.comparing = (self.comparing[0], False)

    @invariant()
    def what_it_may_do_is_proved(self) -> None:
        if self.known.stage in (Stage.CAUGHT_UP, Stage.VERIFIED, Stage.READABLE):
            assert self.reached
        if self.known.stage in (Stage.VERIFIED, Stage.READABLE):
            assert self.proved
        assert (self.known.why_not == "") == (self.known.stage is Stage.READABLE)


Replicating.TestCase.settings = settings(max_examples=60, stateful_step_count=60)
test_a_replica_is_readable_only_by_what_was_proved_since_the_last_reset = Replicating.TestCase


def ticked(known: Promotion, tick: Tick, now: float = 1.0) -> Promotion:
    return advance(known, tick, RULES, now)


def a_readable() -> Promotion:
    """At offset 100 of HISTORY, verified at 0.3 s."""
    known = Promotion()
    for number in range(2):
        known = ticked(known, Tick(replica_at(100), primary_at(100), number / 10), number / 10)
    assert known.stage is Stage.CAUGHT_UP
    known = ticked(
        known,
        Tick(replica_at(100), primary_at(100), 0.3, compared=Compared(known.proof, Outcome(equal=1))),
        0.3,
    )
    assert known.stage is Stage.VERIFIED
    known = ticked(known, Tick(replica_at(100), primary_at(100)), 0.4)
    assert known.stage is Stage.READABLE
    return known


@pytest.mark.parametrize(
    ("tick", "stage"),
    [
        (Tick(replica_at(100, link_up=False), primary_at(900)), Stage.READABLE),
        (Tick(replica_at(120)), Stage.READABLE),  # its primary is silent
        (Tick(replica_at(120, OTHER), primary_at(120, OTHER)), Stage.READABLE),  # both went over
        (Tick(replica_at(120, OTHER)), Stage.SYNCING),
        (Tick(replica_at(120, OTHER), primary_at(120)), Stage.SYNCING),
        (Tick(replica_at(120), primary_at(120, OTHER)), Stage.SYNCING),  # it has not gone over yet
        (Tick(replica_at(99), primary_at(120)), Stage.SYNCING),
        (Tick(replica_at(120), primary_at(120), backlog_from=101), Stage.READABLE),
        (Tick(replica_at(120), primary_at(120), backlog_from=102), Stage.SYNCING),
        (Tick(replica_at(120, OTHER), primary_at(120, OTHER), backlog_from=110), Stage.SYNCING),
        (Tick(replica_at(120, is_syncing=True), primary_at(120)), Stage.SYNCING),
        (Tick(primary_at(120), primary_at(120)), Stage.SYNCING),
        (Tick(None, primary_at(120), problem="it is silent"), Stage.JOINING),
    ],
)
def test_what_takes_a_readable_replica_back(tick: Tick, stage: Stage) -> None:
    known = ticked(a_readable(), tick)
    assert known.stage is stage
    assert (known.proof > a_readable().proof) == (stage is not Stage.READABLE)
    assert known.joined_at is None or stage is Stage.READABLE


def test_a_comparison_that_was_begun_before_a_reset_counts_no_more() -> None:
    known = a_readable()
    begun_in = known.proof
    known = ticked(known, Tick(replica_at(100, is_syncing=True), primary_at(100)), 1.0)
    for now in (1.1, 1.2):
        known = ticked(known, Tick(replica_at(100), primary_at(100), now), now)
    assert known.stage is Stage.CAUGHT_UP
    for outcome in OUTCOMES.values():
        seen = Tick(replica_at(100), primary_at(100), 1.3, compared=Compared(begun_in, outcome))
        assert ticked(known, seen, 1.3) == known
    quarantined = ticked(
        known, replace(seen, compared=Compared(known.proof, OUTCOMES[Verdict.MISMATCH])), 1.4
    )
    lost = reset(quarantined, Stage.JOINING, "the connection to it ended")
    assert known.proof < quarantined.proof < lost.proof


def test_an_offset_from_before_it_joined_is_no_floor() -> None:
    known = ticked(Promotion(), Tick(replica_at(100), primary_at(90), 0.9), now=1.0)
    known = ticked(known, Tick(replica_at(100), primary_at(95), 0.95), now=1.1)
    assert known.stage is Stage.SYNCING
    known = ticked(known, Tick(replica_at(110), primary_at(120), 1.0), now=1.2)
    assert known.stage is Stage.SYNCING
    known = ticked(known, Tick(replica_at(119, link_up=False), primary_at(500), 1.3), now=1.3)
    assert (known.stage, "link" in known.why_not) == (Stage.SYNCING, True)
    assert ticked(known, Tick(replica_at(120), None), now=1.4).stage is Stage.CAUGHT_UP


def test_a_quarantined_replica_must_be_compared_in_the_keys_that_differed() -> None:
    known = a_readable()
    assert not is_comparison_due(known, RULES, 30.2)
    assert is_comparison_due(known, RULES, 30.3)
    differed = Compared(known.proof, Outcome(equal=5, mismatched=(b"one", b"two")))
    seen = Tick(replica_at(100), primary_at(100), 31.0)
    known = ticked(known, replace(seen, compared=differed), 31.0)
    assert (known.stage, known.suspects) == (Stage.QUARANTINED, (b"one", b"two"))
    assert known.why_not == 'keys "one", "two" differed from its primary\'s'
    assert ticked(known, Tick(None), 90.9) == known
    assert reset(known, Stage.JOINING, "lost").stage is Stage.QUARANTINED
    for now in (91.0, 91.1):
        known = ticked(known, replace(seen, primary_asked_at=now), now)
    assert (known.stage, known.suspects) == (Stage.CAUGHT_UP, (b"one", b"two"))
    undecided = Compared(known.proof, Outcome(equal=5, open_suspects=1))
    known = ticked(known, replace(seen, compared=undecided), 91.2)
    assert (known.stage, known.suspects) == (Stage.CAUGHT_UP, (b"one", b"two"))
    assert is_comparison_due(known, RULES, 91.2)
    known = ticked(known, replace(seen, compared=Compared(known.proof, Outcome(equal=7))), 91.3)
    assert (known.stage, known.suspects) == (Stage.VERIFIED, ())


def test_a_comparison_that_decides_nothing_is_followed_by_a_larger_one() -> None:
    known = replace(a_readable(), stage=Stage.CAUGHT_UP)
    sizes = []
    for _ in range(6):
        sizes.append(keys_to_compare(known, RULES))
        ended = Compared(known.proof, Outcome(undecided=9))
        known = ticked(known, Tick(replica_at(100), primary_at(100), compared=ended))
    assert sizes == [16, 32, 64, 128, 256, 256]
    assert keys_to_compare(known, replace(RULES, verify_keys=1000)) == 1000
    assert (
        known.why_not
        == "its keys could not be compared: all of 9 keys changed meanwhile, or could not be asked"
    )


def test_an_undecided_comparison_takes_no_readable_replica_back() -> None:
    known = a_readable()
    ended = Compared(known.proof, Outcome(problem="it took too long"))
    known = ticked(known, Tick(replica_at(100), primary_at(100), compared=ended), now=50.0)
    assert known.stage is Stage.READABLE
    assert [is_comparison_due(known, RULES, now) for now in (50.9, 51.0)] == [False, True]
    assert not is_comparison_due(known, replace(RULES, verify_interval_seconds=0), 51.0)


BACKLOG = (
    b"repl_backlog_active:1\r\nrepl_backlog_size:1048576\r\n"
    b"repl_backlog_first_byte_offset:%d\r\nrepl_backlog_histlen:%d\r\n"
)


def test_a_backlog_tells_where_it_was_begun_until_it_is_full() -> None:
    head = b"$99\r\n# Replication\r\nrole:slave\r\n"
    assert parse_backlog(head + BACKLOG % (501, 100)) == 501
    assert parse_backlog(head + BACKLOG % (501, 1048576)) is None
    assert parse_backlog(head + (BACKLOG % (0, 0)).replace(b"active:1", b"active:0")) is None
    assert parse_backlog(head) is None


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (Stage.VERIFIED, Stage.READABLE, EventKind.REPLICA_READABLE),
        (Stage.READABLE, Stage.QUARANTINED, EventKind.REPLICA_QUARANTINED),
        (Stage.CAUGHT_UP, Stage.QUARANTINED, EventKind.REPLICA_QUARANTINED),
        (Stage.READABLE, Stage.JOINING, EventKind.REPLICA_UNREADABLE),
        (Stage.JOINING, Stage.SYNCING, EventKind.REPLICA_STAGE_CHANGED),
    ],
)
def test_each_change_is_an_event(old: Stage, new: Stage, kind: EventKind) -> None:
    replica = Node("a" * 40, Address("10.0.0.2", 6379), Role.REPLICA, "b" * 40)
    primary = Node("b" * 40, Address("10.0.0.1", 6379), Role.PRIMARY)
    keys = (b"k\n\xff", b"x" * 300) if new is Stage.QUARANTINED else ()
    event = stage_event(replica, primary, old, new, "a reason", keys, 5.0, 7)
    assert (event.kind, event.at, event.epoch) == (kind, 5.0, 7)
    assert (event.nodes, event.shards) == (("a" * 40, "b" * 40), ("b" * 40,))
    assert event.message.startswith("10.0.0.2:6379 ")
    assert (event.evidence["old_stage"], event.evidence["new_stage"]) == (old.value, new.value)
    assert event.evidence["keys"] == [key_text(key) for key in keys]
    assert key_text(b"k\n\xff") == "k\\n\\xff"
    assert key_text(b"x" * 300) == "x" * 128 + "... (300 bytes)"
