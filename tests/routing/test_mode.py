"""The routing mode: what may be chosen, and what is given meanwhile."""

from routing.levels import Level
from routing.mode import DEFAULT_MODE, NOTES, ROUTED_MODES, given_mode, refusal_of


def test_all_but_snapshot_route_and_that_says_when_it_will() -> None:
    """Promise 9: a refusal says what and why."""
    assert {mode for mode in Level if refusal_of(mode) is not None} == {Level.SNAPSHOT}
    assert set(Level) - ROUTED_MODES == {Level.SNAPSHOT}
    two = frozenset({Level.STRONG, Level.SESSION})
    assert refusal_of(Level.SESSION, two) is None
    assert refusal_of(Level.EVENTUAL, two) == (
        "eventual comes with its level; this version routes strong and session only"
    )


def test_a_mode_that_a_newer_proxy_chose_gives_strong_here() -> None:
    """Promise 2: never weaker than asked for, so the default must be one that always routes."""
    assert DEFAULT_MODE in ROUTED_MODES
    assert given_mode(Level.SNAPSHOT) is Level.STRONG
    for mode in ROUTED_MODES:
        assert given_mode(mode) is mode
    assert given_mode(Level.SESSION, frozenset(Level)) is Level.SESSION


def test_every_mode_has_a_note() -> None:
    assert set(NOTES) == set(Level)
