"""What one client's reads ask for: its level, made from who chose what, ready for the hot path.

A client that asks for nothing but ``strong`` has no policy at all, so that its requests pay nothing for this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from proxy.exchange.read_groups import Asked
from proxy.exchange.replica_reads import ReplicaReads
from proxy.exchange.sessions import LOST, NOT_ASKED, Session
from proxy.protocol.requests import key_of_simple
from routing.levels import Level, LevelChoice, PrefixRule, ReadLevel

if TYPE_CHECKING:
    from proxy.exchange.exchange import Exchange


class ReadPolicy:
    """``asked``: what a read asks for whose key no rule names; None for strong."""

    __slots__ = ("_by_prefix", "asked", "choice", "looks_at_keys", "refusal", "session")

    def __init__(self, choice: LevelChoice, reads: ReplicaReads, resp: int, session: Session | None) -> None:
        self.choice = choice
        self.asked = _asked(choice.usual, reads, resp)
        self.looks_at_keys = choice.looks_at_keys
        self._by_prefix = [(rule.prefix, _asked(rule.given, reads, resp)) for rule in choice.rules]
        self.refusal: bytes | None = None
        self.session = session if uses(choice, Level.SESSION) else None

    @property
    def needs_check(self) -> bool:
        """Its session has to be checked before its next command is looked at."""
        return self.session is not None and self.session.needs_check and self.refusal is None

    async def check(self, exchange: Exchange, deadline: float) -> None:
        """Check the session after a change of the map."""
        if self.session is not None:
            self.refusal = await self.session.check(exchange, deadline)

    def take_refusal(self) -> bytes | None:
        """The reply for a read that its session does not allow; None when it does."""
        session, refusal = self.session, self.refusal
        if session is None:
            return refusal
        if session.is_lost:
            return LOST
        self.refusal = None  # a primary did not answer: the next pass checks again
        return NOT_ASKED if session.needs_check else refusal

    def of_key(self, key: bytes) -> Asked | None:
        """What a read of ``key`` asks for; None for strong."""
        if self.looks_at_keys:
            for prefix, asked in self._by_prefix:
                if key.startswith(prefix):
                    return asked
        return self.asked

    def of_simple(self, raw: bytes) -> Asked | None:
        """The same for a frame that ``scan_simple`` took."""
        return self.of_key(key_of_simple(raw)) if self.looks_at_keys else self.asked

    def note_write(self, slots: Iterable[int]) -> None:
        """Writes on these slots are sent."""
        if self.session is not None:
            self.session.wrote(slots)

    def of_keys(self, keys: Sequence[bytes]) -> Asked | None:
        """What one read of several keys asks for: what all of them ask for, or else strong."""
        if not self.looks_at_keys:
            return self.asked
        wanted = {self.of_key(key) for key in keys}
        return wanted.pop() if len(wanted) == 1 else None


def uses(choice: LevelChoice, level: Level) -> bool:
    """Whether some read by this choice gets ``level``."""
    return any(given.level is level for given in levels_of(choice))


def is_strong(choice: LevelChoice) -> bool:
    """Whether all reads get strong, so that no policy is needed."""
    return all(given.level is Level.STRONG for given in levels_of(choice))


def levels_of(choice: LevelChoice) -> list[ReadLevel]:
    """All levels that its reads can get."""
    rules: tuple[PrefixRule, ...] = choice.rules if choice.looks_at_keys else ()
    return [choice.usual, *(rule.given for rule in rules)]


def _asked(given: ReadLevel, reads: ReplicaReads, resp: int) -> Asked | None:
    return None if given.level is Level.STRONG else reads.asked(given, resp)
