"""How many requests one node may owe this proxy: a limit that follows the node's round-trip times.

The limit is a gradient limit: after each window of samples

    gradient = max(no_load, slack) / round_trip               within 1/2 and 1
    estimate = (1 - smoothing) * estimate + smoothing * (gradient * estimate + sqrt(estimate))

It stands still where estimate * (1 - no_load / round_trip), which is TCP Vegas's estimate of the requests that
queue at the node, equals sqrt(estimate): enough to keep the node busy while requests and replies travel, and a little.

**A node that holds nobody up has no limit**: it is free. So it is while its round trips are about those at no load, or
within the **slack**, which is too short to refuse anyone for. The first window that shows a queue sets the limit to
what Little's law says of that window: the requests in flight times the gradient, and the queue of the square root.
From then on the formula above moves it, until a few windows in a row show no queue; and only if it lasts is it a reason
to refuse anyone (``is_calm``). So neither noise, nor a burst, nor
a proxy that is slower than its nodes makes anybody wait, and an overload is met within a round trip.

Sources: L. Brakmo and L. Peterson, "TCP Vegas: end to end congestion avoidance on a global Internet", IEEE JSAC
13(8), 1995 (the queue estimate); E. Landau, W. Thurston and T. Bozarth, "Performance Under Load", Netflix 2018, and its
library concurrency-limits, GradientLimit and Gradient2Limit (gradient, smoothing, no growth below half the limit, a
queue of the square root); Envoy's gradient controller (the same with a probe).

Gradient2 compares with a long average of the round trips, so an overload that lasts becomes its measure of normal and
the limit drifts up. Here the comparison is with the shortest window of late, averaged over its samples, because one
sample's minimum is too low where service times vary. It is renewed every ``probe_seconds`` from windows with at most
half the limit in flight, where next to nothing queues. If there was none, a **probe** halves the permits until one
is measured, as BBR's ProbeRTT does (draft-cardwell-iccrg-bbr-congestion-control). The probe may go below the floor: a
node whose limit is at its floor would otherwise be measured with its queue full, and the queue would be taken for the
node's own time (so it is in Envoy, where one setting is both).

Requests go over one pipelined connection and are answered in order, so one request a turn is timed: see ``Timed``.
Pure: times are arguments, in seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf, sqrt

GRADIENT_MIN = 0.5  # one window takes at most this part of the limit, before smoothing: a stall sheds nobody
QUEUE_FROM = 0.9  # a gradient below this shows a queue
STALL_ROUND_TRIPS = 4  # at no load; a far node with few permits answers in bursts, a round trip apart
FREE_WINDOWS = 5  # so many in a row without one, and the node is free
LIMITED_WINDOWS = 25  # it must have been limited for so many before that is a reason to refuse anyone
TIMED_MAX = 32  # more at once would say nothing more
PROBE_SOON = 0.1  # of probe_seconds: how long a probe may last, and when one comes that something calls for


@dataclass(frozen=True, slots=True)
class LimitRules:
    """The limit's bounds and how fast it moves."""

    floor: int = 4  # a node that does one thing at a time is busy with this many, if the way to it is short
    ceiling: int = 1024
    first: int = 256  # until a few windows have shown that nothing queues
    slack_seconds: float = 0.001  # 0.001 means that no round trip under 1 ms is a reason to refuse anyone
    stall_seconds: float = 0.005  # a node stalls that has answered nothing for this, and four round trips
    window_seconds: float = 0.02
    window_samples: int = 10  # a window takes longer if these do, or one round trip does
    smoothing: float = 0.1
    probe_seconds: float = 10.0  # 10 means that a no-load time is at most about 10 seconds old


class Limit:
    """The limit of one node. ``permits`` is what counts; the rest is for people and metrics."""

    __slots__ = (
        "_calm_windows",
        "_is_known",
        "_is_slow_since",
        "_limited_windows",
        "_observed_at",
        "_probe_until",
        "_probed_top",
        "_quiet_seconds",
        "_renewed_at",
        "_rtt_sum",
        "_rules",
        "_samples",
        "_stalled_from",
        "_stalled_until",
        "_top",
        "_window_from",
        "estimate",
        "is_calm",
        "is_free",
        "is_probing",
        "no_load_seconds",
        "permits",
        "tightening",
    )

    def __init__(self, rules: LimitRules, now: float) -> None:
        self._rules = rules
        self.estimate = float(rules.first)
        self.is_calm = True  # free, or not free for a moment only: nobody need be shed yet
        self.is_free = False  # nothing queues at the node, and the estimate is the ceiling
        self.tightening = 1.0  # less than 1 while a migration touches the node
        self.permits = rules.first  # how many requests the node may owe now
        self.no_load_seconds = (
            inf  # a round trip while next to nothing queues; infinite before the first window
        )
        self.is_probing = False
        self._is_known = False  # the no-load time: what was seen so far may be a full queue
        self._quiet_seconds = (
            inf  # the shortest window since the renewal with at most half the limit in flight
        )
        self._renewed_at = now - rules.probe_seconds * (
            1 - PROBE_SOON
        )  # what is seen at first may be a full queue
        self._is_slow_since = inf  # since when all round trips are more than the gradient can express
        self._calm_windows = 0  # in a row, without a queue
        self._limited_windows = 0  # in a row, while not free
        self._observed_at = now
        self._stalled_from = self._stalled_until = now  # the last stall
        self._probe_until = now
        self._probed_top = 0  # what was in flight as the probe began
        # The window:
        self._window_from = now
        self._samples = 0
        self._rtt_sum = 0.0
        self._top = 0  # most requests in flight

    def observe(self, rtt_seconds: float, in_flight: int, now: float, own_seconds: float = 0.0) -> bool:
        """One request's round trip; ``in_flight`` as it was sent, with it. True if ``permits`` may have changed.

        ``in_flight`` is all that the node owed, also what is never refused: it may be more than the limit.

        ``own_seconds`` of it the proxy was busy before it could look for the reply. They count only as far as the
        round trip would be shorter than at no load without them: a busy proxy must not make a node look slow. So it is
        with the last stall, during which the node answered nothing: no limit makes that shorter.
        """
        sent_at = now - rtt_seconds
        rules = self._rules
        no_load_seconds = self.no_load_seconds
        if rtt_seconds > no_load_seconds:
            answers_by = max(self._observed_at, sent_at) + max(
                rules.stall_seconds, no_load_seconds * STALL_ROUND_TRIPS
            )
            if now > answers_by:
                self._stalled_from, self._stalled_until = answers_by, now
            if sent_at < self._stalled_until:
                own_seconds = max(own_seconds, self._stalled_until - max(self._stalled_from, sent_at))
            rtt_seconds = max(rtt_seconds - own_seconds, no_load_seconds)
        self._observed_at = now
        self._samples += 1
        self._rtt_sum += rtt_seconds
        if in_flight > self._top:
            self._top = in_flight
        elapsed = now - self._window_from
        if self._samples < rules.window_samples or elapsed < rules.window_seconds or elapsed < rtt_seconds:
            return False
        self._end_window(self._rtt_sum / self._samples, now)
        self._window_from, self._samples, self._rtt_sum, self._top = now, 0, 0.0, 0
        self._permit()
        return True

    def tighten(self, factor: float) -> None:
        """Allow ``factor`` of what the round trips would, above 0 and up to 1, and the floor; until told otherwise.

        Less than 1 while a migration touches the node. The estimate then falls as ever, but does not grow: short
        round trips would be the tightening's own doing.
        """
        if not 0 < factor <= 1:
            raise ValueError(f"a limit is tightened by a factor above 0 and up to 1, not {factor}")
        self.tightening = factor
        self._permit()

    def _end_window(self, rtt_seconds: float, now: float) -> None:
        rules, before = self._rules, self.no_load_seconds
        self.no_load_seconds = min(before, rtt_seconds)
        good_seconds = max(self.no_load_seconds, rules.slack_seconds)
        gradient = good_seconds / rtt_seconds if rtt_seconds > good_seconds else 1.0
        is_quiet = gradient >= QUEUE_FROM if self.is_free else self._top * 2 <= max(self.estimate, 2.0)
        if is_quiet:
            self._quiet_seconds = min(self._quiet_seconds, rtt_seconds)
        if rtt_seconds <= rules.slack_seconds:  # no shorter no-load time would change anything
            self._renewed_at = now
            self._is_known = True
        if self.is_probing:
            if is_quiet or now >= self._probe_until:
                self.is_probing = False
                self._renew(before, now)
            return
        self._move(gradient, now)
        self._limited_windows = 0 if self.is_free else self._limited_windows + 1
        self.is_calm = self._limited_windows < LIMITED_WINDOWS
        is_slow = now - self._is_slow_since >= rules.probe_seconds * PROBE_SOON
        if is_slow or now - self._renewed_at >= rules.probe_seconds:
            self._renew(before, now)

    def _move(self, gradient: float, now: float) -> None:
        estimate, rules = self.estimate, self._rules
        if gradient >= GRADIENT_MIN:
            self._is_slow_since = inf
        else:
            self._is_slow_since = min(self._is_slow_since, now)
        has_queue = gradient < 1.0 if self._top * 2 >= estimate else gradient < QUEUE_FROM
        self._calm_windows = 0 if has_queue or not self._is_known else self._calm_windows + 1
        if self.is_free:
            if gradient >= QUEUE_FROM:
                return
            self.is_free = False
            moved = self._top * gradient + sqrt(self._top)
        elif self._calm_windows >= FREE_WINDOWS and self.tightening == 1.0:
            self.is_free = True
            moved = rules.ceiling
        else:
            gradient = max(gradient, GRADIENT_MIN)
            moved = estimate + rules.smoothing * (estimate * (gradient - 1) + sqrt(estimate))
            if moved > estimate and (self._top * 2 < estimate or self.tightening < 1):
                return  # nobody needs more, or nobody may have it
        self.estimate = min(max(moved, rules.floor), rules.ceiling)

    def _renew(self, before: float, now: float) -> None:
        """Forget what was measured before the last quiet window; probe if there was none.

        ``before``: the no-load time that was known before that window.
        """
        if self._quiet_seconds < inf:
            # Half of a long queue is a queue: what was found may be far from the truth still.
            is_known = self._quiet_seconds >= before * QUEUE_FROM
            self.no_load_seconds = self._quiet_seconds
            self._is_known = is_known
            self._renewed_at = now if is_known else now - self._rules.probe_seconds * (1 - PROBE_SOON)
        elif now >= self._probe_until + self._rules.probe_seconds * PROBE_SOON:
            self.is_probing = True
            self._probed_top = self._top
            self._probe_until = now + self._rules.probe_seconds * PROBE_SOON
        self._quiet_seconds = self._is_slow_since = inf

    def _permit(self) -> None:
        if self.is_probing:
            used = min(self.estimate, self._probed_top)
            self.permits = max(1, int(used * self.tightening / 2))
        else:
            self.permits = max(self._rules.floor, int(self.estimate * self.tightening))


class Timed:
    """Times requests on one connection: of a turn's the middle one, and at most ``TIMED_MAX`` at a time.

    The middle one's round trip is the mean of the turn's; the last one's would be that of a queue twice as long.
    Replies come in order, so counting them is enough: nothing is kept with a request, and nothing is done for each.
    """

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: deque[tuple[int, int, float]] = deque()  # (request's number from 1, in flight, sent at)

    def sent(self, first: int, last: int, in_flight: int, now: float) -> None:
        """A turn's requests are sent: their numbers, from 1 on this connection. Not every turn need tell."""
        if len(self._marks) < TIMED_MAX:
            self._marks.append(((first + last) // 2, in_flight, now))

    def answered(self, answered_total: int, now: float) -> tuple[float, int] | None:
        """A turn's replies were read: the round trip and what was in flight of the last timed request among them."""
        found = None
        marks = self._marks
        while marks and marks[0][0] <= answered_total:
            found = marks.popleft()
        return None if found is None else (now - found[2], found[1])
