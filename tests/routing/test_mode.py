"""The routing mode: what may be chosen, and what is given meanwhile."""

from routing.levels import Level
from routing.mode import (
    DEFAULT_MODE,
    NOTES,
    ROUTED_MODES,
    closing_refusal,
    given_mode,
    problem_now,
    refusal_now,
    refusal_of,
)


def test_all_route_and_one_that_did_not_would_say_so() -> None:
    """Promise 9: a refusal says what and why."""
    assert set(Level) == ROUTED_MODES
    assert not any(refusal_of(mode) for mode in Level)
    two = frozenset({Level.STRONG, Level.SESSION})
    assert refusal_of(Level.SESSION, two) is None
    assert refusal_of(Level.EVENTUAL, two) == (
        "eventual comes with its level; this version routes strong and session only"
    )


def test_a_mode_that_a_newer_proxy_chose_gives_strong_here() -> None:
    """Promise 2: never weaker than asked for, so the default must be one that always routes."""
    assert DEFAULT_MODE in ROUTED_MODES
    assert given_mode(Level.SNAPSHOT, frozenset({Level.STRONG})) is Level.STRONG
    for mode in ROUTED_MODES:
        assert given_mode(mode) is mode
    assert given_mode(Level.SESSION, frozenset(Level)) is Level.SESSION


def test_only_mode_snapshot_wants_a_snapshot() -> None:
    """Promise 9: without one, what it would give is refused, so it is told before and after it is chosen."""
    for mode in Level:
        for current in (None, 7):
            is_wrong = mode is Level.SNAPSHOT and current is None
            assert bool(refusal_now(mode, current)) is bool(problem_now(mode, current)) is is_wrong
    assert "open one first: steadyread snapshot open" in str(refusal_now(Level.SNAPSHOT, None))


def test_the_last_that_serves_stays_while_the_mode_is_snapshot() -> None:
    assert closing_refusal(Level.SNAPSHOT, 7, [6, 7]) is None
    assert closing_refusal(Level.SNAPSHOT, 5, [7]) is None  # it does not serve, so nobody misses it
    assert closing_refusal(Level.STRONG, 7, [7]) is None
    refused = closing_refusal(Level.SNAPSHOT, 7, [7])
    assert str(refused).startswith("SNAPSHOTOPEN snapshot 7 is the last that serves")


def test_every_mode_has_a_note() -> None:
    assert set(NOTES) == set(Level)
