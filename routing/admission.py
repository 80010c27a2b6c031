"""Admission to one node: who gets a permit, who waits for one, who is shed, and in what order.

A permit is one request that the node owes. Permits follow trunk reservation (P. Key, "Optimal control and trunk
reservation in loss networks", 1990): a request gets one while fewer are in flight than its priority's ceiling. The
ceiling of ``critical`` is the limit itself, so it always finds the share that the others leave. One comparison
decides, and nothing is counted per priority.

Who gets none waits, the more important first, and among equals who must give up first. A wait is short: ``normal``
waits 20 ms, the queueing time by which WeChat's DAGOR tells an overload (H. Zhou et al., "Overload Control for Scaling
WeChat Microservices", SoCC 2018), ``background`` less. ``critical`` waits as long as a node usually stalls.

**A calm node is not overloaded**: its limit has just begun, and is likely to end at once. **A stall is no overload**
either. A node that has answered nothing for a grace stalls: it forks, migrates a large key, runs a slow command; or the
proxy itself was too busy to read. Neither time counts as waiting, except towards a request's end: its own deadline, and
for everybody the time that ``critical`` may wait.

Invariants, held by tests/routing/test_admission.py:
- a permit is given only below the limit;
- every request gets a permit, or is shed, or leaves, once;
- nothing is shed while it could have a permit, nor past its end given one;
- nothing that has not come to its end is shed while something less important waits.

Pure: it reads no clock; random numbers are arguments.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Generic, TypeVar

from routing.limit import STALL_ROUND_TRIPS
from routing.priority import Priority

R = TypeVar("R")  # a request, as the caller knows it

RETRY_FIRST_SECONDS = 0.1  # the middle of what a critical request is told while few are shed
RETRY_MAX_SECONDS = 5.0
RETRY_FACTOR = (1.0, 2.0, 4.0)  # by priority: background comes back last


class ShedReason(Enum):
    """Why a request was shed. The values are labels of metrics."""

    QUEUE_FULL = "queue_full"  # as many as may wait did
    WAITED = "waited"  # its wait, or its own deadline, ended
    YIELDED = "yielded"  # a more important one had no place, or waited too long


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """How a node's limit is shared, and how long and how many requests wait. Tuples are by priority."""

    shares: tuple[float, float, float] = (1.0, 0.7, 0.6)  # 0.7: 30 % are for critical alone; all over a half
    wait_seconds: tuple[float, float, float] = (5.0, 0.1, 0.005)
    waiting_max: int = 1024  # of all priorities together
    stall_seconds: float = 0.005  # a node stalls that has answered nothing for this, and four round trips


@dataclass(frozen=True, slots=True)
class Shed(Generic[R]):
    """A request that gets an error."""

    request: R
    priority: Priority
    reason: ShedReason
    waited_seconds: float


@dataclass(slots=True)
class Waiter(Generic[R]):
    """A request in the queue."""

    request: R
    priority: Priority
    since: float
    gives_up_at: float  # later by each stall
    ends_at: float  # no stall changes this


class Admission(Generic[R]):
    """One node's permits and queue.

    A request asks ``admits``, or its caller compares ``in_flight`` with ``ceilings`` itself and counts as it queues.
    What is never refused is counted in ``in_flight`` as well, which may so be more than the limit.
    """

    __slots__ = (
        "_calm_from",
        "_ends_first",
        "_grace_seconds",
        "_permits",
        "_queues",
        "_rules",
        "_stalls_from",
        "_tightening",
        "ceilings",
        "in_flight",
        "waiting",
    )

    def __init__(self, rules: AdmissionRules, permits: int) -> None:
        self._rules = rules
        self._queues: tuple[list[Waiter[R]], ...] = ([], [], [])  # by priority, who gives up first in front
        self._permits = permits
        self._tightening = 1.0
        self._grace_seconds = rules.stall_seconds
        self._stalls_from = (
            -inf
        )  # it stalls from then on if it does not answer; its first answer is still to come
        self._calm_from: float | None = None  # since when it is calm; None: it is not
        self._ends_first = inf  # nobody who waits has an earlier end
        self.in_flight = 0
        self.waiting = 0
        self.ceilings = [
            0,
            0,
            0,
        ]  # by priority; 0 where an equal or more important one waits: nobody overtakes
        self._set_ceilings()

    def admits(self, priority: Priority) -> bool:
        """Whether a request gets a permit at once. It has it then."""
        if self.in_flight < self.ceilings[priority]:
            self.in_flight += 1
            return True
        return False

    def answered(self, count: int, now: float) -> None:
        """The node answered ``count`` requests. ``serve``, to be called next, gives their permits to others."""
        self.in_flight -= count
        if self.waiting and now > self._stalls_from and self._calm_from is None:
            self._excuse(self._stalls_from, now)
        self._stalls_from = now + self._grace_seconds

    def give_back(self, count: int) -> None:
        """The node will not answer ``count`` requests any more."""
        self.in_flight -= count

    def limit(self, permits: int, tightening: float = 1.0, no_load_seconds: float = 0.0) -> None:
        """From now on ``permits``, of which background's part is tightened once more. Permits given stay given.

        ``no_load_seconds`` is the node's round trip while next to nothing queues, infinite if that is not known.
        """
        self._permits, self._tightening = permits, tightening
        self._grace_seconds = self._rules.stall_seconds
        if no_load_seconds < inf:
            self._grace_seconds = max(self._grace_seconds, no_load_seconds * STALL_ROUND_TRIPS)
        self._set_ceilings()

    def set_calm(self, is_calm: bool, now: float) -> None:
        """Whether the node is free, or its limit has just begun: that may be noise, and nobody is shed for it."""
        if is_calm:
            if self._calm_from is None:
                self._calm_from = now
        elif self._calm_from is not None:
            self._excuse(self._calm_from, now)
            self._calm_from = None

    def wait(
        self, request: R, priority: Priority, now: float, deadline: float
    ) -> tuple[Waiter[R] | None, list[Shed[R]]]:
        """Queue a request that got no permit. ``deadline`` is its own; it waits no longer than its priority may.

        Stalls do not count, but not even they make it wait longer than ``critical`` may.

        The result is its place in the queue, None if there is none, and who is shed: itself, or a less important one
        that makes room. While the node is calm there is always room.
        """
        shed: list[Shed[R]] = []
        if self.waiting >= self._rules.waiting_max and self._calm_from is None:
            last = next((queue for queue in reversed(self._queues[priority + 1 :]) if queue), None)
            if last is None:
                return None, [Shed(request, priority, ShedReason.QUEUE_FULL, 0.0)]
            shed.append(self._shed(last.pop(), ShedReason.YIELDED, now))
        waits = self._rules.wait_seconds
        ends_at = min(deadline, now + waits[Priority.CRITICAL])
        waiter = Waiter(request, priority, now, min(ends_at, now + waits[priority]), ends_at)
        insort(self._queues[priority], waiter, key=_gives_up_at)
        self.waiting += 1
        self._ends_first = min(self._ends_first, ends_at)
        self._set_ceilings()
        return waiter, shed

    def leave(self, waiter: Waiter[R]) -> None:
        """A waiter's client left. Does nothing if it waits no more."""
        queue = self._queues[waiter.priority]
        for place, other in enumerate(queue):
            if other is waiter:
                del queue[place]
                self.waiting -= 1
                self._set_ceilings()
                return

    def serve(self, now: float) -> tuple[list[Waiter[R]], list[Shed[R]]]:
        """Who of the waiting gets a permit, in the order in which to send, and who is shed.

        To be called in each turn in which somebody waits, before new requests, and at ``next_give_up``.
        """
        if not self.waiting:
            return [], []
        shed = self._end(now) if now >= self._ends_first else []
        served: list[Waiter[R]] = []
        for priority, queue in enumerate(self._queues):
            room = min(len(queue), self._ceiling(priority) - self.in_flight)
            if room > 0:
                served += queue[:room]
                del queue[:room]
                self.in_flight += room
                self.waiting -= room
            if queue:
                shed += self._give_up(now)
                break
        self._set_ceilings()
        return served, shed

    def waiters(self) -> list[Waiter[R]]:
        """All, the more important first."""
        return [waiter for queue in self._queues for waiter in queue]

    def next_give_up(self) -> float | None:
        """When somebody will give up if the node answers nothing until then; None if nobody waits.

        An answer is a turn of its own, after which this is to be asked anew.
        """
        if not self.waiting:
            return None
        first = min(queue[0].gives_up_at for queue in self._queues if queue)
        return first if self._calm_from is None and first <= self._stalls_from else self._ends_first

    def oldest_wait_seconds(self, now: float) -> float:
        """How long the node's next request has waited: its queueing time, for people and for others to pace by."""
        return max((now - waiter.since for queue in self._queues for waiter in queue[:1]), default=0.0)

    def _excuse(self, begin: float, now: float) -> None:
        """The time since ``begin`` does not count: those who waited meanwhile give up later by as much."""
        for queue in self._queues:
            for waiter in queue:
                excused_seconds = now - max(begin, waiter.since)
                waiter.gives_up_at = min(waiter.gives_up_at + excused_seconds, waiter.ends_at)
            queue.sort(key=_gives_up_at)

    def _end(self, now: float) -> list[Shed[R]]:
        """Shed who has come to its end, whatever the node does. Says nothing about others: they wait on."""
        shed: list[Shed[R]] = []
        for queue in reversed(self._queues):
            shed += [self._shed(waiter, ShedReason.WAITED, now) for waiter in queue if waiter.ends_at <= now]
            queue[:] = [waiter for waiter in queue if waiter.ends_at > now]
        self._ends_first = min((waiter.ends_at for queue in self._queues for waiter in queue), default=inf)
        return shed

    def _give_up(self, now: float) -> list[Shed[R]]:
        """Shed whose wait is over, and with the first of them all who are less important."""
        if self._calm_from is not None:
            return []
        until = min(now, self._stalls_from)
        shed: list[Shed[R]] = []
        for queue in self._queues:
            over = len(queue) if shed else bisect_right(queue, until, key=_gives_up_at)
            reason = ShedReason.YIELDED if shed else ShedReason.WAITED
            shed += [self._shed(waiter, reason, now) for waiter in queue[:over]]
            del queue[:over]
        shed.sort(key=lambda each: -each.priority)
        return shed

    def _shed(self, waiter: Waiter[R], reason: ShedReason, now: float) -> Shed[R]:
        self.waiting -= 1
        return Shed(waiter.request, waiter.priority, reason, now - waiter.since)

    def _set_ceilings(self) -> None:
        blocked = False
        for priority, queue in enumerate(self._queues):
            blocked = blocked or bool(queue)
            self.ceilings[priority] = 0 if blocked else self._ceiling(priority)

    def _ceiling(self, priority: int) -> int:
        share = self._rules.shares[priority]
        if priority == Priority.BACKGROUND:
            share *= self._tightening
        return max(1, int(self._permits * share))


def _gives_up_at(waiter: Waiter[R]) -> float:
    return waiter.gives_up_at


def retry_seconds(priority: Priority, shed_per_answered: float, random: float) -> float:
    """When a shed client should come back: anywhere within half and one and a half of a span.

    The span grows with the excess, so that those who return are about as many as are answered. ``random``, from 0 up
    to 1, spreads them (M. Brooker, "Exponential Backoff And Jitter", AWS 2015).
    """
    span = RETRY_FIRST_SECONDS * RETRY_FACTOR[priority] * (1 + shed_per_answered)
    return min(span, RETRY_MAX_SECONDS) * (0.5 + random)


def overloaded(node: str, shed: Shed[R], retry_after_seconds: float) -> str:
    """The error's text: ``OVERLOADED ... retry after N ms``."""
    waited_ms = shed.waited_seconds * 1000
    why = {
        ShedReason.QUEUE_FULL: "too many requests wait for it already",
        ShedReason.WAITED: f"this one waited {waited_ms:.0f} ms for its turn",
        ShedReason.YIELDED: "more important requests come first",
    }[shed.reason]
    retry_ms = max(1, round(retry_after_seconds * 1000))
    return f"OVERLOADED node {node} is overloaded and {why} ({shed.priority}); retry after {retry_ms} ms"
