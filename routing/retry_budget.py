"""How often a proxy may send requests again by itself, so that its repetitions never become the load.

A node in trouble turns requests away, each is sent again, and what was too much becomes more. So repetitions take
tokens from a bucket that fills by a share of all requests, and by a few per second beside: where all goes well that is
plenty, and where all fails the load grows by that share. After Finagle's RetryBudget (deposits for requests, a reserve
per second) and Google's "Site Reliability Engineering", chapter 21 (a budget per client). Theirs count over a window; a
bucket has something for those who wait as soon as a node is back, however much was spent before.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUNDING = 1e-6  # of a repetition: what floating point may lack of a whole one


@dataclass(frozen=True, slots=True)
class RetryRules:
    """What may be repeated."""

    share: float = 0.2  # of the requests
    reserve_per_second: float = 200.0
    burst: float = 2000.0  # what one lost connection can cost where nothing was repeated for a while


class RetryBudget:
    """Of one proxy. Times are seconds on any clock that does not go back; the bucket is full at first."""

    __slots__ = ("_at", "_rules", "_tokens", "_total", "refused_total", "taken_total")

    def __init__(self, rules: RetryRules, now: float) -> None:
        self._rules = rules
        self._tokens = rules.burst
        self._at = now
        self._total = 0  # requests that were counted
        self.taken_total = 0
        self.refused_total = 0

    def take(self, now: float, requests_total: int) -> bool:
        """Whether one may be sent again now. ``requests_total``: all that were made so far."""
        rules = self._rules
        new = max(0, requests_total - self._total)  # a node that was forgotten takes its count with it
        elapsed = max(0.0, now - self._at)
        self._at, self._total = max(self._at, now), requests_total
        tokens = self._tokens + rules.share * new + rules.reserve_per_second * elapsed
        self._tokens = min(tokens, rules.burst)
        if self._tokens < 1 - ROUNDING:
            self.refused_total += 1
            return False
        self._tokens -= 1
        self.taken_total += 1
        return True
