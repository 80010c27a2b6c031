"""How often a proxy may send requests again by itself, so that its repetitions never become the load.

A node in trouble turns requests away, each is sent again, and what was too much becomes more. So repetitions take
tokens from a bucket that fills by a share of all requests, and by a few per second beside: where all goes well that is
plenty, and where all fails the load grows by that share. After Finagle's RetryBudget (deposits for requests, a reserve
per second) and Google's "Site Reliability Engineering", chapter 21 (a budget per client). Theirs count over a window; a
bucket has something for those who wait as soon as a node is back, however much was spent before.
"""

from __future__ import annotations

from dataclasses import dataclass

from routing.token_bucket import TokenBucket


@dataclass(frozen=True, slots=True)
class RetryRules:
    """What may be repeated."""

    share: float = 0.2  # of the requests
    reserve_per_second: float = 200.0
    burst: int = 2000  # what one lost connection can cost where nothing was repeated for a while


class RetryBudget:
    """Of one proxy. Times are seconds on any clock that does not go back; the bucket is full at first."""

    __slots__ = ("_bucket", "_share", "_total", "refused_total", "taken_total")

    def __init__(self, rules: RetryRules, now: float) -> None:
        self._share = rules.share
        self._bucket = TokenBucket(rules.reserve_per_second, rules.burst, now)
        self._total = 0  # requests that were counted
        self.taken_total = 0
        self.refused_total = 0

    def take(self, now: float, requests_total: int) -> bool:
        """Whether one may be sent again now. ``requests_total``: all that were made so far."""
        new = max(0, requests_total - self._total)  # a node that was forgotten takes its count with it
        self._total = requests_total
        self._bucket.put(self._share * new)
        if not self._bucket.available(now):
            self.refused_total += 1
            return False
        self._bucket.take(1)
        self.taken_total += 1
        return True
