"""Priorities: whose requests a node's permits go to first, and whose are shed last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """The most important first. The numbers are places in tables; people write the names in small letters."""

    CRITICAL = 0
    NORMAL = 1
    BACKGROUND = 2

    def __str__(self) -> str:
        return self.name.lower()


def parse_priority(text: str) -> Priority:
    """The priority that people call ``text``, in small or capital letters.

    Raises ValueError, with the names there are, if it is none.
    """
    try:
        return Priority[text.upper()]
    except KeyError:
        names = ", ".join(map(str, Priority))
        raise ValueError(f"{text!r} is not a priority: write one of {names}") from None


@dataclass(frozen=True, slots=True)
class PriorityRule:
    """Requests whose first key begins with ``prefix`` have this priority, unless their connection asked for one."""

    prefix: bytes
    priority: int


def closest_first(rules: Sequence[PriorityRule]) -> tuple[PriorityRule, ...]:
    """Longest prefix first, so that the first that fits is the closest one."""
    return tuple(sorted(rules, key=lambda rule: len(rule.prefix), reverse=True))
