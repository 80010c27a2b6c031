"""The routing mode: which consistency level a read gets that asks for none, level ``auto``.

Every level can be a mode, because each is a choice that an operator has reason to make for services that do not choose:
``strong`` when in doubt, ``caught_up`` to use replicas without giving anything up, ``session`` and
``bounded_staleness`` to bring primaries relief, ``snapshot`` to hold reads still while a migration runs, ``eventual``
in an emergency. What a level still needs comes from elsewhere: a bound from the settings, a session from the
connection, a snapshot from the one that is current. A read that names a level is not touched by the mode.

While the mode is ``snapshot``, a snapshot has to serve, or those reads would all be refused: the mode cannot be chosen
without one, and the last one cannot be closed by hand.
"""

from __future__ import annotations

from collections.abc import Collection

from routing.levels import Level

DEFAULT_MODE = Level.STRONG  # until an operator chooses: nothing weaker is ever given unasked

ROUTED_MODES = frozenset(Level)  # those that this version routes

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


# What a client gets that asks for the current snapshot when there is none.
NO_SNAPSHOT = "NOTREADY no snapshot is open; open one with STEADY.SNAPSHOT OPEN, or choose another level"


def refusal_now(mode: Level, current_snapshot: int | None) -> str | None:
    """Why a mode that routes cannot be chosen at this moment; None if it can."""
    if mode is Level.SNAPSHOT and current_snapshot is None:
        return (
            "no snapshot serves, so every read that chooses no level would be refused; "
            "open one first: steadyread snapshot open"
        )
    return None


def problem_now(mode: Level, current_snapshot: int | None) -> str | None:
    """What is wrong with the mode that is in effect; None if nothing is."""
    if refusal_now(mode, current_snapshot) is None:
        return None
    return (
        f"the routing mode is {mode.value} and no snapshot serves, so every read that chooses no level is refused; "
        "open a snapshot, or choose another mode"
    )


def closing_refusal(mode: Level, snapshot_id: int, serving: Collection[int]) -> str | None:
    """Why a snapshot cannot be closed while ``mode`` is in effect; None if it can. ``serving``: those that serve."""
    if mode is Level.SNAPSHOT and set(serving) == {snapshot_id}:
        return (
            f"SNAPSHOTOPEN snapshot {snapshot_id} is the last that serves, and the routing mode is snapshot: reads "
            "that choose no level would all be refused; choose another mode first: steadyread mode strong"
        )
    return None
