"""What the read settings mean to the routing: rules, listeners and the mode as levels with their bounds."""

from __future__ import annotations

import pytest

from proxy.settings import ListenerSettings, NodeZone, ReadRuleSettings, ReadSettings, Settings
from proxy.settings.reads import listener_level, mode_level, read_rules, zones_of
from routing.levels import STRONG, Level, PrefixRule, ReadLevel
from routing.topology import Address

ADDRESS = Address("127.0.0.1", 9001)


def test_the_longest_prefix_comes_first_and_a_bound_that_is_not_named_is_that_of_reads() -> None:
    rules = (
        ReadRuleSettings("a", "bounded_staleness"),
        ReadRuleSettings("aé:", "bounded_staleness", 0.25),
        ReadRuleSettings("ab", "session"),
    )
    assert read_rules(Settings(reads=ReadSettings(max_staleness_seconds=3.0, rules=rules))) == (
        PrefixRule(b"a\xc3\xa9:", ReadLevel(Level.BOUNDED_STALENESS, 0.25)),
        PrefixRule(b"ab", ReadLevel(Level.SESSION)),
        PrefixRule(b"a", ReadLevel(Level.BOUNDED_STALENESS, 3.0)),
    )


@pytest.mark.parametrize(
    ("listener", "expected"),
    [
        (ListenerSettings(ADDRESS), None),
        (ListenerSettings(ADDRESS, "strong"), STRONG),
        (ListenerSettings(ADDRESS, "snapshot"), ReadLevel(Level.SNAPSHOT)),
        (ListenerSettings(ADDRESS, "bounded_staleness"), ReadLevel(Level.BOUNDED_STALENESS, 3.0)),
        (ListenerSettings(ADDRESS, "bounded_staleness", 0.5), ReadLevel(Level.BOUNDED_STALENESS, 0.5)),
    ],
)
def test_a_listener_chooses_a_level_or_leaves_it_to_the_mode(
    listener: ListenerSettings, expected: ReadLevel | None
) -> None:
    settings = Settings(reads=ReadSettings(max_staleness_seconds=3.0))
    assert listener_level(listener, settings) == expected


def test_only_the_mode_with_a_bound_gets_one() -> None:
    """Equal levels are interchangeable, so no other may carry a bound."""
    settings = Settings(reads=ReadSettings(max_staleness_seconds=3.0))
    assert mode_level(Level.BOUNDED_STALENESS, settings) == ReadLevel(Level.BOUNDED_STALENESS, 3.0)
    for level in Level:
        if level is not Level.BOUNDED_STALENESS:
            assert mode_level(level, settings) == ReadLevel(level)


def test_zones_by_address() -> None:
    reads = ReadSettings(zones=(NodeZone(ADDRESS, "a"), NodeZone(Address("::1", 2), "b")))
    assert zones_of(Settings(reads=reads)) == {ADDRESS: "a", Address("::1", 2): "b"}
    assert zones_of(Settings()) == {}
