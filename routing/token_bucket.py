"""A token bucket: how much may be done now so that a rate is kept on the whole, and a burst at any moment.

In any time t no more is taken than ``burst + rate * t``. Who may not go on asks when the next token comes; nothing is
counted in between, so a bucket that nobody asks costs nothing. As in ITU-T I.371's leaky bucket, and Linux's tc-tbf.
"""

from __future__ import annotations

ROUNDING = 1e-6  # of a token: what floating point may lack of a whole one


class TokenBucket:
    """Full at first. Times are seconds on any clock that does not go back."""

    __slots__ = ("_at", "_tokens", "burst", "rate")

    def __init__(self, rate: float, burst: int, now: float) -> None:
        """``rate``: tokens per second; above 0, if ``next_at`` is asked. ``burst``: how many it holds, at least 1."""
        self.rate = rate
        self.burst = burst
        self._tokens = float(burst)
        self._at = now

    def available(self, now: float) -> int:
        """The whole tokens that there are."""
        if now > self._at:
            self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate)
            self._at = now
        return int(self._tokens + ROUNDING)

    def take(self, count: int) -> None:
        """Take tokens; no more than ``available`` has just said."""
        self._tokens -= count

    def put(self, count: float) -> None:
        """Some that were taken are not needed, or some come beside the rate."""
        self._tokens = min(self.burst, self._tokens + count)

    def next_at(self) -> float:
        """When a whole token is there again, on the clock of ``available``, which was just asked."""
        return self._at + max(0.0, 1.0 - self._tokens) / self.rate


def bucket_of(rate: float, burst: int, now: float) -> TokenBucket | None:
    """The bucket of such settings. ``rate`` 0: no limit, and None. ``burst`` 0: what comes in one second."""
    return TokenBucket(rate, burst or max(1, int(rate)), now) if rate else None
