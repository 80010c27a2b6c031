"""How often a proxy may send requests again by itself, so that its repetitions never become the load.

A node in trouble turns requests away, each is sent again, and what was too much becomes more. So of late there may be
no more repetitions than a share of all requests, and a few per second beside: where all goes well that is plenty, and
where all fails the load grows by that share at most. After Finagle's RetryBudget (deposits for requests, a reserve per
second, both forgotten after 10 s) and Google's "Site Reliability Engineering", chapter 21 (a budget per client).
"""

from __future__ import annotations

from dataclasses import dataclass

ROUNDING = 1e-6  # of a repetition: what floating point may lack of a whole one
PARTS = 10  # of the window; the oldest is forgotten at once


@dataclass(frozen=True, slots=True)
class RetryRules:
    """What may be repeated."""

    share: float = 0.2  # of the requests of the window
    reserve_per_second: float = (
        200.0  # over the window, what one lost connection can cost where there was no traffic
    )
    window_seconds: float = 10.0


class RetryBudget:
    """Of one proxy. Times are seconds on any clock that does not go back; the reserve is whole at first."""

    __slots__ = (
        "_at",
        "_counted_at",
        "_repeated",
        "_requests",
        "_rules",
        "_total",
        "refused_total",
        "taken_total",
    )

    def __init__(self, rules: RetryRules, now: float) -> None:
        self._rules = rules
        self._at = self._part(now)
        self._requests = [
            0.0
        ] * PARTS  # part of the window, by its number modulo PARTS -> those counted in it
        self._repeated = [0] * PARTS
        self._total = 0  # requests that were counted
        self._counted_at = now
        self.taken_total = 0
        self.refused_total = 0

    def take(self, now: float, requests_total: int) -> bool:
        """Whether one may be sent again now. ``requests_total``: all that were made so far.

        Those since the last call count as if they had come evenly.
        """
        self._forget(now)
        self._count(now, requests_total)
        if sum(self._repeated) + 1 > self.allowed() + ROUNDING:
            self.refused_total += 1
            return False
        self._repeated[self._at % PARTS] += 1
        self.taken_total += 1
        return True

    def allowed(self) -> float:
        """The repetitions of one window, as of the last call of ``take``."""
        rules = self._rules
        return rules.share * sum(self._requests) + rules.reserve_per_second * rules.window_seconds

    def _part(self, now: float) -> int:
        return int(now / self._rules.window_seconds * PARTS)

    def _forget(self, now: float) -> None:
        part = self._part(now)
        for old in range(max(self._at, part - PARTS) + 1, part + 1):
            self._requests[old % PARTS] = 0.0
            self._repeated[old % PARTS] = 0
        self._at = max(self._at, part)

    def _count(self, now: float, requests_total: int) -> None:
        new = max(0, requests_total - self._total)  # a node that was forgotten takes its count with it
        elapsed = now - self._counted_at
        window = self._rules.window_seconds
        self._total, self._counted_at = requests_total, max(now, self._counted_at)
        parts = min(PARTS, max(1, int(elapsed / window * PARTS)))
        of_window = new * min(1.0, window / elapsed) if elapsed > 0 else new
        for back in range(parts):
            self._requests[(self._at - back) % PARTS] += of_window / parts
