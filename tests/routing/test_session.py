"""Sessions as a state machine: what is called proven is there, whatever shards do meanwhile (promise 2)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from routing.offsets import NO_POINT, Point, Sample
from routing.session import SessionState

SHARDS = st.integers(0, 1)


class Primary:
    """The writes that a shard's primary has, in its history; an offset counts them."""

    def __init__(self, replid: int) -> None:
        self.replid = b"%040x" % replid
        self.writes: list[int] = []
        self.second = NO_POINT

    def sample(self) -> Sample:
        return Sample(True, Point(self.replid, len(self.writes)), self.second)


class Sessions(RuleBasedStateMachine):
    """One session over two shards. A shard's stand-in changes when its primary is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.histories = 0
        self.numbers = 0
        self.primaries = [self.begin(), self.begin()]
        self.seen = [primary.replid for primary in self.primaries]  # the history as the proxy last saw it
        self.state: SessionState[int] = SessionState()
        self.mine: list[set[int]] = [set(), set()]  # its acknowledged writes
        self.is_lost = False

    def begin(self) -> Primary:
        self.histories += 1
        return Primary(self.histories)

    @rule(shard=SHARDS, is_mine=st.booleans())
    def write(self, shard: int, is_mine: bool) -> None:
        self.numbers += 1
        self.primaries[shard].writes.append(self.numbers)
        if is_mine:
            self.mine[shard].add(self.numbers)
            self.state.wrote(shard, self.seen[shard])

    @rule(shard=SHARDS)
    def read_at_owner(self, shard: int) -> None:
        self.state.read_at_owner(shard)

    @rule(shard=SHARDS)
    def sample(self, shard: int) -> None:
        primary = self.primaries[shard]
        if self.state.sampled(shard, primary.sample()):
            assert self.mine[shard] <= set(primary.writes), "called proven, and is not there"
            self.seen[shard] = primary.replid
        else:
            self.is_lost = True

    @precondition(lambda self: not self.is_lost)
    @rule(shard=SHARDS, lost=st.integers(0, 3))
    def fail_over(self, shard: int, lost: int) -> None:
        """A replica without the last writes takes over, in a history of its own."""
        former = self.primaries[shard]
        kept = max(0, len(former.writes) - lost)
        promoted = self.begin()
        promoted.writes = former.writes[:kept]
        promoted.second = Point(former.replid, kept + 1)
        self.primaries[shard] = promoted

    @rule(shard=SHARDS)
    def restart_empty(self, shard: int) -> None:
        self.primaries[shard] = self.begin()

    @rule()
    def map_changed(self) -> None:
        self.state.map_changed()
        assert not self.state.floors()

    @invariant()
    def a_floor_covers_the_sessions_own_writes(self) -> None:
        """In its own history: whoever has applied the floor has applied them."""
        for shard, primary in enumerate(self.primaries):
            floor = self.state.floor(shard)
            if floor is not None and floor.replid == primary.replid:
                assert self.mine[shard] <= set(primary.writes[: floor.offset])

    def teardown(self) -> None:
        self.state.map_changed()


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)

X, Y = b"a" * 40, b"b" * 40


def test_a_failover_that_lost_nothing_of_it_keeps_a_session() -> None:
    state: SessionState[str] = SessionState()
    state.wrote("p", X)
    assert state.sampled("p", Sample(True, Point(X, 40), NO_POINT))
    assert state.owed_by(lambda shard: shard == "p") == ["p"]
    assert not state.inherited("p", [Sample(True, Point(Y, 90), Point(X, 40))])  # one byte short
    assert state.inherited("p", [Sample(True, Point(Y, 90), Point(X, 41))])
    assert state.touched() == []


def test_a_write_without_a_sample_is_not_proven_after_a_failover() -> None:
    state: SessionState[str] = SessionState()
    state.wrote("p", X)
    assert not state.inherited("p", [Sample(True, Point(Y, 90), Point(X, 41))])


def test_a_tokens_floor_is_owed_before_it_is_usable() -> None:
    state: SessionState[str] = SessionState()
    state.promise("p", Point(X, 40), is_usable=False)
    assert state.floor("p") is None
    assert not state.sampled("p", Sample(True, Point(X, 39), NO_POINT))
    assert state.sampled("p", Sample(True, Point(X, 41), NO_POINT))
    assert state.floor("p") == Point(X, 41)
