"""The stages by which a replica becomes readable, and what takes it back.

Each proxy promotes the replicas for itself: nothing that a proof rests on is heard from others.
"""

from __future__ import annotations

from enum import Enum


class Stage(Enum):
    """How far a replica has come. Only a readable one is sent reads."""

    JOINING = "joining"  # it has not told its offset yet
    SYNCING = "syncing"  # it is being sent the data set, or its history is not its primary's
    CAUGHT_UP = "caught_up"  # it has applied an offset that its primary had after it joined
    VERIFIED = "verified"  # sampled keys are equal to its primary's
    READABLE = "readable"
    QUARANTINED = "quarantined"  # a sampled key differed
