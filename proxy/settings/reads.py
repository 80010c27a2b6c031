"""The read settings as the routing's own values, and what must hold of them beyond the limits of single options.

Pure: it looks at values. A bound of 0 seconds means the one of ``[reads]``, which stands in for every bound that is
not named; here, and nowhere else, it is put in.
"""

from __future__ import annotations

from collections.abc import Iterator

from proxy.settings.fault import Fault
from proxy.settings.positions import Path
from proxy.settings.schema import dotted
from proxy.settings.values import ListenerSettings, ReadRuleSettings, ReadSettings, Settings
from routing.levels import AUTO, Level, PrefixRule, ReadLevel, ordered
from routing.topology import Address


def read_rules(settings: Settings) -> tuple[PrefixRule, ...]:
    """The rules as ``LevelChoice`` takes them, longest prefix first."""
    return ordered(
        [
            PrefixRule(rule.prefix.encode(), _read_level(rule.level, rule.max_staleness_seconds, settings))
            for rule in settings.reads.rules
        ]
    )


def listener_level(listener: ListenerSettings, settings: Settings) -> ReadLevel | None:
    """The level that a listener chooses; None for ``auto``."""
    if listener.level == AUTO:
        return None
    return _read_level(listener.level, listener.max_staleness_seconds, settings)


def mode_level(level: Level, settings: Settings) -> ReadLevel:
    """The routing mode with the bound that it needs."""
    return _read_level(level.value, 0.0, settings)


def zones_of(settings: Settings) -> dict[Address, str]:
    """Node's address -> its availability zone, of those that the settings name."""
    return dict(settings.reads.zones)


def _read_level(name: str, max_staleness_seconds: float, settings: Settings) -> ReadLevel:
    level = Level(name)
    if level is not Level.BOUNDED_STALENESS:
        return ReadLevel(level)
    return ReadLevel(level, max_staleness_seconds or settings.reads.max_staleness_seconds)


def read_faults(settings: Settings) -> Iterator[Fault]:
    """All that is wrong with the listeners' levels, the rules and the zones, in the order of the options."""
    for index, listener in enumerate(settings.listeners):
        yield from _bound_faults(listener, ("listeners", index))
    yield from _zone_faults(settings.reads)
    yield from _rule_faults(settings.reads)


def _zone_faults(reads: ReadSettings) -> Iterator[Fault]:
    path: Path = ("reads", "zones")
    index_of_address: dict[Address, int] = {}
    for index, zone in enumerate(reads.zones):
        if (other := index_of_address.setdefault(zone.address, index)) != index:
            message = f"has its zone from {dotted((*path, other))}; give each node once"
            yield Fault((*path, index), str(zone), message, also=path)


def _rule_faults(reads: ReadSettings) -> Iterator[Fault]:
    index_of_prefix: dict[str, int] = {}
    for index, rule in enumerate(reads.rules):
        place: Path = ("reads", "rules", index)
        prefix, level = (*place, "prefix"), (*place, "level")
        if not rule.prefix:
            message = "give how the keys begin; the level of all others is a listener's, or the routing mode"
            yield Fault(prefix, rule.prefix, message)
        elif (other := index_of_prefix.setdefault(rule.prefix, index)) != index:
            taken = ("reads", "rules", other, "prefix")
            yield Fault(prefix, rule.prefix, f"is taken by {dotted(taken)}; give another", also=taken)
        if not rule.level:
            yield Fault(level, rule.level, "give the level that reads of these keys get")
        else:
            yield from _bound_faults(rule, place)


def _bound_faults(given: ListenerSettings | ReadRuleSettings, place: Path) -> Iterator[Fault]:
    if given.max_staleness_seconds and given.level != Level.BOUNDED_STALENESS.value:
        message = (
            f'goes with level "{Level.BOUNDED_STALENESS.value}" only, and the level here is "{given.level}"'
        )
        path = (*place, "max_staleness_seconds")
        yield Fault(path, given.max_staleness_seconds, message, also=(*place, "level"))
