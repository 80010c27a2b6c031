"""The routing mode: which consistency level a read gets that asks for none, level ``auto``.

Every level can be a mode, because each is a choice that an operator has reason to make for services that do not choose:
``strong`` when in doubt, ``caught_up`` to use replicas without giving anything up, ``session`` and
``bounded_staleness`` to bring primaries relief, ``snapshot`` to hold reads still while a migration runs, ``eventual``
in an emergency. What a level still needs comes from elsewhere: a bound from the settings, a session from the
connection, a snapshot from the one that is current. A read that names a level is not touched by the mode.
"""

from __future__ import annotations

from routing.levels import Level

DEFAULT_MODE = Level.STRONG  # until an operator chooses: nothing weaker is ever given unasked

ROUTED_MODES = frozenset(Level) - {Level.SNAPSHOT}  # those that this version routes

NOTES = {  # what a read of level auto gets, in one sentence
    Level.STRONG: "reads go to the slot's primary",
    Level.CAUGHT_UP: "reads go to replicas that prove to be as new as the primary was when the read arrived",
    Level.BOUNDED_STALENESS: "reads go to replicas that prove to be at most so old as the settings allow",
    Level.SESSION: "reads show at least what their own connection has written and read",
    Level.SNAPSHOT: "reads show the cluster as it was at the current snapshot",
    Level.EVENTUAL: "reads go to any readable replica, and may be of any age",
}


def refusal_of(mode: Level, routed: frozenset[Level] = ROUTED_MODES) -> str | None:
    """Why the mode cannot be chosen; None if it can."""
    if mode in routed:
        return None
    *others, last = (one.value for one in Level if one in routed)
    shown = f"{', '.join(others)} and {last}" if others else last
    return f"{mode.value} comes with its level; this version routes {shown} only"


def given_mode(chosen: Level, routed: frozenset[Level] = ROUTED_MODES) -> Level:
    """What reads of level ``auto`` really get here when a newer proxy has let an operator choose ``chosen``."""
    return chosen if chosen in routed else DEFAULT_MODE
