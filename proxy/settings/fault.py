"""What is wrong with values that are each allowed on their own: how a check of several settings tells the loader."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.settings.positions import Path


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    path: Path
    value: object | None  # None: it may hold a secret and is not shown
    message: str  # what would be right
    also: Path = ()  # another option that has a part in it; without one at ``path`` it stands for the place
