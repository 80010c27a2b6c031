"""Whether a node gets reads that another node can prove: all that it would get, none, or a growing share.

    closed ──▶ open             it fails or stalls: no reads, for a pause
    open ──▶ probing            the pause is over: no reads yet, but one question
    probing ──▶ open            that was answered late, or lost: a longer pause
    probing ──▶ returning       it was answered in time: a small share of the reads that the node would get
    returning ──▶ returning     a good second: twice the share
    returning ──▶ open          any failure: a longer pause
    returning ──▶ closed        the share would be all

The states are those of M. Nygard's circuit breaker (Release It!, 2nd edition, 2018; his half-open is probing and
returning here). That a pause grows with each opening, and openings are forgotten one by one while all is well, is
Envoy's outlier detection; the growing share is its slow start. That a slow node is taken out at all, and goes on being
asked, is the "latency-induced probation" of J. Dean and L. Barroso, "The Tail at Scale", CACM 56(2), 2013.

A stall opens at once: the node owes replies and nothing comes, so each read that is sent there waits as well. Error
replies open only when they are many and a good part of all. Times are arguments, in seconds of one monotonic clock;
``jitter`` is a random number from 0 to 1, so that several proxies do not probe a node at the same moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf


class CircuitState(Enum):
    CLOSED = "closed"  # the node gets what it would get without a circuit
    OPEN = "open"  # it gets no reads
    PROBING = "probing"  # nor now, but an answer in time ends that
    RETURNING = "returning"  # it gets a share


@dataclass(frozen=True, slots=True)
class CircuitRules:
    """Durations in seconds."""

    pause_seconds: float = 0.25  # the first; twice as long at each opening
    pause_seconds_max: float = 10.0  # of which the jitter takes up to a half
    forget_seconds: float = 10.0  # closed for so long without a failure: one opening is forgotten
    share_first: float = 0.05
    step_seconds: float = 1.0  # of answers in time, for twice the share
    errors_min: int = 5  # error replies, within the window, before they open it
    error_share: float = 0.5  # of the reads that were sent in the window
    window_seconds: float = 1.0


class Circuit:
    """Of one node."""

    __slots__ = (
        "_began_at",
        "_errors",
        "_is_answered",
        "_offered",
        "_rules",
        "_sent_before",
        "_strikes",
        "_taken",
        "_until",
        "openings_total",
        "share",
        "state",
        "why",
    )

    def __init__(self, rules: CircuitRules | None = None) -> None:
        self.state = CircuitState.CLOSED
        self.share = 1.0  # of the reads that it would get
        self.why = ""  # it opened last; one clause
        self.openings_total = 0
        self._rules = rules or CircuitRules()
        self._strikes = 0  # openings that are not forgotten
        self._until = -inf  # while open: the end of the pause; it stays as the earliest time of a probe
        self._began_at = -inf  # the step while returning, the window while closed, or since when it is closed
        self._is_answered = False  # in this step, in time
        self._offered = self._taken = 0  # reads in this step
        self._errors = 0  # in this window
        self._sent_before = 0

    @property
    def is_open(self) -> bool:
        """It gets no reads."""
        return self.share == 0.0

    def fail(self, why: str, now: float, jitter: float) -> bool:
        """The node failed or stalled. True if it got reads until now, and gets none from now on."""
        if self.state is CircuitState.OPEN:
            return False
        had_reads = not self.is_open
        rules = self._rules
        if self.state is CircuitState.CLOSED and self._strikes:
            self._strikes = max(0, self._strikes - int((now - self._until) / rules.forget_seconds))
        pause = min(rules.pause_seconds * 2.0 ** min(self._strikes, 30), rules.pause_seconds_max)
        self._strikes += 1
        self.state = CircuitState.OPEN
        self.share = 0.0
        self._until = now + pause * (1 - jitter / 2)
        self._errors = 0
        if had_reads:
            self.openings_total += 1
            self.why = why
        return had_reads

    def fail_reads(self, count: int, sent_total: int, why: str, now: float, jitter: float) -> bool:
        """``count`` reads were answered with errors that are the node's; ``sent_total``: ever sent. As ``fail``."""
        if self.state is CircuitState.RETURNING:
            return self.fail(why, now, jitter)
        if self.is_open:
            return False
        rules = self._rules
        if not self._errors or now - self._began_at > rules.window_seconds:
            self._began_at, self._errors, self._sent_before = now, 0, sent_total - count
        self._errors += count
        if self._errors < rules.errors_min:
            return False
        if self._errors < (sent_total - self._sent_before) * rules.error_share:
            return False
        return self.fail(why, now, jitter)

    def on_answer(self, asked_at: float, now: float, in_time_seconds: float, jitter: float) -> bool:
        """A question of ``asked_at`` was answered now. True if the state is another one than before.

        What was asked before the pause was over is no probe.
        """
        before = self.state
        self.advance(now)
        if asked_at >= self._until and self.state is not CircuitState.CLOSED:
            if now - asked_at <= in_time_seconds:
                if self.state is CircuitState.PROBING:
                    self.state = CircuitState.RETURNING
                    self._begin_step(self._rules.share_first, now)
                elif self.state is CircuitState.RETURNING and asked_at >= self._began_at:
                    self._is_answered = True
            elif self.state is CircuitState.PROBING:
                self.fail("", now, jitter)
        return self.state is not before

    def advance(self, now: float) -> bool:
        """Time has passed. True if the state is another one than before."""
        if self.state is CircuitState.OPEN and now >= self._until:
            self.state = CircuitState.PROBING
            return True
        if (
            self.state is CircuitState.RETURNING
            and self._is_answered
            and now - self._began_at >= self._rules.step_seconds
        ):
            if self.share * 2 < 1:
                self._begin_step(self.share * 2, now)
                return False
            self.state = CircuitState.CLOSED
            self.share = 1.0
            self._until = now
            return True
        return False

    def _begin_step(self, share: float, now: float) -> None:
        self.share = share
        self._began_at = now
        self._is_answered = False
        self._offered = self._taken = 0

    def admits(self, count: int) -> bool:
        """Whether ``count`` reads that the node would get go there. It counts them: ask once."""
        if self.state is CircuitState.CLOSED:
            return True
        self._offered += count
        if not self.would_admit(0) or not self._taken + count <= self._offered * self.share:
            return False
        self._taken += count
        return True

    def would_admit(self, count: int = 1) -> bool:
        """What ``admits`` would say. Counts nothing."""
        if self.is_open:
            return False
        return self.share == 1.0 or self._taken + count <= (self._offered + count) * self.share


class Silence:
    """How long a connection that owes replies has sent nothing, as far as looks at it show. Never too long."""

    __slots__ = ("_arrived", "_since")

    def __init__(self) -> None:
        self._arrived: object = None
        self._since: float | None = None  # None: it owed nothing

    def seconds(self, owes: bool, arrived: object, until: float, now: float) -> float:
        """At this look. ``arrived``: differs from what it was at the look before if anything has come since.

        ``until``: what came later than this may not have been read yet, and such silence does not count.
        """
        if not owes:
            self._since = None
            return 0.0
        if self._since is None or arrived != self._arrived:
            self._since, self._arrived = now, arrived
        return max(0.0, until - self._since)
