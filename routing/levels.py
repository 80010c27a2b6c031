"""Consistency levels: what a read asks for, and how its client, its key and the operator choose it.

A read's level is chosen by the first of these that names one: its connection (STEADY.READ), the rule for its key's
prefix, its listener, the operator's routing mode. Level ``auto`` means that one does not choose.

A connection's reads are of one snapshot or of none: no rule names level snapshot, and where a listener or the mode
gives it, rules do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """The levels, strongest promise first. The values are what people write."""

    STRONG = "strong"
    CAUGHT_UP = "caught_up"
    BOUNDED_STALENESS = "bounded_staleness"
    SESSION = "session"
    SNAPSHOT = "snapshot"
    EVENTUAL = "eventual"


AUTO = "auto"  # what people write for "I do not choose"
CURRENT = "current"  # and for the newest snapshot that serves


@dataclass(frozen=True, slots=True)
class ReadLevel:
    """One level with what it needs to know. Equal ones are interchangeable."""

    level: Level
    max_staleness_seconds: float = 0.0  # of bounded_staleness
    snapshot_id: int | None = None  # of snapshot; None: whichever is current at the time of each read

    def __str__(self) -> str:
        if self.level is Level.SNAPSHOT:
            return f"{self.level.value} {CURRENT if self.snapshot_id is None else self.snapshot_id}"
        if self.level is Level.BOUNDED_STALENESS:
            return f"{self.level.value} {self.max_staleness_seconds * 1000:g}"
        return str(self.level.value)


STRONG = ReadLevel(Level.STRONG)


@dataclass(frozen=True, slots=True)
class PrefixRule:
    """Reads of keys that begin with ``prefix`` get this level unless their connection names one."""

    prefix: bytes
    given: ReadLevel


@dataclass(frozen=True, slots=True)
class LevelChoice:
    """What one connection's reads get. ``connection`` and ``listener`` are None for level ``auto``.

    ``rules``: the longest prefix that fits counts; see ``ordered``.
    """

    connection: ReadLevel | None
    rules: tuple[PrefixRule, ...]
    listener: ReadLevel | None
    mode: ReadLevel

    @property
    def usual(self) -> ReadLevel:
        """The level of a read whose key no rule names."""
        return self.connection or self.listener or self.mode

    @property
    def looks_at_keys(self) -> bool:
        """Whether the level depends on the key."""
        return self.connection is None and bool(self.rules) and self.usual.level is not Level.SNAPSHOT

    def of_key(self, key: bytes) -> ReadLevel:
        """The level of a read of ``key``."""
        if self.looks_at_keys:
            for rule in self.rules:
                if key.startswith(rule.prefix):
                    return rule.given
        return self.usual


def ordered(rules: Sequence[PrefixRule]) -> tuple[PrefixRule, ...]:
    """Longest prefix first, so that the first that fits is the closest one."""
    return tuple(sorted(rules, key=lambda rule: len(rule.prefix), reverse=True))
