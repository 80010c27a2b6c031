"""Decides what becomes of an event that a hook must deliver: when to try again, and when to stop.

A hook delivers its events in the order of their numbers, each at least once. What it cannot deliver becomes a dead
letter after ``attempts_max`` attempts, so that one bad event holds up the others for a bounded time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from routing.timeline import Event, EventKind, Plain

_DOUBLINGS_MAX = 64  # more would only overflow


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """How long a hook keeps trying."""

    attempts_max: int
    retry_first_seconds: float
    retry_max_seconds: float


@dataclass(frozen=True, slots=True)
class At:
    """Try again then."""

    time: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Try no more: the event becomes a dead letter."""


@dataclass(frozen=True, slots=True)
class HookPosition:
    """How far a hook has come. It is kept in the store, so that another runner goes on from there."""

    key_prefix: str  # of its deliveries' idempotency keys; drawn once, so that no other hook has it
    number: int  # events up to this one are done with
    delivered_at: float | None = None  # Unix seconds of the last delivery
    failing_since: float | None = None  # Unix seconds of the first failed attempt after it
    attempts: int = 0  # failed ones for the next event
    attempted: int = 0  # that event's number; 0 if there is none
    error: str = ""  # of the last failed attempt


def next_attempt(attempts: int, now: float, limits: RetryLimits, jitter: float) -> At | GiveUp:
    """What follows ``attempts`` failed ones, of which the last ended ``now``.

    The wait doubles from ``retry_first_seconds`` up to ``retry_max_seconds``. ``jitter``, from 0 up to 1, takes away as
    much as half of it, so that hooks that failed together do not return together.
    """
    if attempts >= limits.attempts_max:
        return GiveUp()
    doublings = min(attempts - 1, _DOUBLINGS_MAX)
    wait_seconds = min(limits.retry_first_seconds * 2.0**doublings, limits.retry_max_seconds)
    return At(now + wait_seconds * (1 - jitter / 2))


def is_own_failure(event: Event, hook_name: str) -> bool:
    """Whether ``event`` says that this hook failed: telling it through the same hook would go round in a circle."""
    return event.kind is EventKind.HOOK_FAILED and event.evidence.get("hook") == hook_name


def failure_event(hook_name: str, event: Event, attempts: int, error: str, now: float) -> Event | None:
    """What the timeline says of an event that became a dead letter.

    None when ``event`` itself says that a hook failed: else two broken hooks would tell of each other for ever.
    """
    if event.kind is EventKind.HOOK_FAILED:
        return None
    evidence: Mapping[str, Plain] = {
        "hook": hook_name,
        "event": event.number,
        "attempts": attempts,
        "error": error,
    }
    message = (
        f"hook {hook_name} could not deliver event {event.number} ({event.kind.value}) "
        f"in {attempts} attempt{'s' if attempts != 1 else ''}: {error}"
    )
    return Event(EventKind.HOOK_FAILED, now, message, evidence=evidence)


def delivered(position: HookPosition, number: int, now: float) -> HookPosition:
    """After ``number`` was delivered."""
    return HookPosition(position.key_prefix, number, now)


def passed(position: HookPosition, number: int) -> HookPosition:
    """After events up to ``number`` turned out not to be for the hook, or to be beyond its power."""
    return replace(position, number=number, attempts=0, attempted=0)


def failed(position: HookPosition, number: int, error: str, now: float) -> HookPosition:
    """After one more failed attempt at ``number``."""
    return replace(
        position,
        failing_since=now if position.failing_since is None else position.failing_since,
        attempts=position.attempts + 1 if position.attempted == number else 1,
        attempted=number,
        error=error,
    )
