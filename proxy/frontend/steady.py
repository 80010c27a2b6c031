"""STEADY.*: the proxy's own commands, as a client sends them. Parsing only: ``client.py`` carries them out.

STEADY.READ [AUTO | STRONG | CAUGHT_UP | BOUNDED_STALENESS ms | SESSION [token] | EVENTUAL]
STEADY.TOKEN
STEADY.EXPLAIN command arg...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from routing.levels import Level, ReadLevel
from routing.names import key_text

PREFIX = b"STEADY."
USAGE = "STEADY.READ [AUTO | STRONG | CAUGHT_UP | BOUNDED_STALENESS ms | SESSION [token] | EVENTUAL]"
STALENESS_MS_MAX = 24 * 3600 * 1000


class SteadyError(ValueError):
    """The command is not right; the text, with its error code, says what is."""


@dataclass(frozen=True, slots=True)
class AskLevel:
    """STEADY.READ without arguments: which level do my reads get?"""


@dataclass(frozen=True, slots=True)
class SetLevel:
    """From the next command on, reads get this level; None: auto. ``token``: of the session to go on with."""

    level: ReadLevel | None
    token: bytes | None = None


@dataclass(frozen=True, slots=True)
class MakeToken:
    """A token for all that this connection has done."""


@dataclass(frozen=True, slots=True)
class Explain:
    """Where this read would go, and why."""

    arguments: Sequence[bytes]


Steady = AskLevel | SetLevel | MakeToken | Explain


def parse(arguments: Sequence[bytes]) -> Steady:
    """The command that ``arguments``, whose first begins with STEADY., ask for. Raises SteadyError."""
    match arguments[0].upper():
        case b"STEADY.READ":
            return _read(arguments[1:])
        case b"STEADY.TOKEN":
            if len(arguments) != 1:
                raise SteadyError("ERR wrong number of arguments for 'steady.token' command: it takes none")
            return MakeToken()
        case b"STEADY.EXPLAIN":
            if len(arguments) < 2:
                raise SteadyError("ERR give STEADY.EXPLAIN the read to explain, as in STEADY.EXPLAIN GET key")
            return Explain(arguments[1:])
        case b"STEADY.SNAPSHOT" | b"STEADY.PRIORITY" | b"STEADY.INFO" as name:
            raise SteadyError(f"ERR {name.decode()} is not part of this version")
    raise SteadyError(
        f"ERR unknown command '{key_text(arguments[0][:64])}'; there are STEADY.READ, STEADY.TOKEN and STEADY.EXPLAIN"
    )


def _read(words: Sequence[bytes]) -> Steady:
    if not words:
        return AskLevel()
    name, rest = words[0].upper(), words[1:]
    if name == b"SNAPSHOT":
        raise SteadyError("ERR snapshot reads are not part of this version; " + USAGE)
    if name == b"BOUNDED_STALENESS":
        if len(rest) != 1:
            raise SteadyError("ERR give the bound in milliseconds, as in STEADY.READ BOUNDED_STALENESS 500")
        return SetLevel(ReadLevel(Level.BOUNDED_STALENESS, _bound(rest[0]) / 1000))
    if name == b"SESSION":
        if len(rest) > 1:
            raise SteadyError("ERR STEADY.READ SESSION takes one token or none")
        return SetLevel(ReadLevel(Level.SESSION), rest[0] if rest else None)
    if rest:
        raise SteadyError(f"ERR STEADY.READ {key_text(name[:64])} takes nothing more; {USAGE}")
    if name == b"AUTO":
        return SetLevel(None)
    if name in (b"STRONG", b"CAUGHT_UP", b"EVENTUAL"):
        return SetLevel(ReadLevel(Level(name.decode().lower())))
    raise SteadyError(f"ERR unknown level '{key_text(words[0][:64])}'; {USAGE}")


def _bound(text: bytes) -> int:
    """Milliseconds. Raises SteadyError."""
    if text.isdigit() and len(text) <= 9 and 0 < int(text) <= STALENESS_MS_MAX:
        return int(text)
    raise SteadyError(
        f"ERR the bound is a whole number of milliseconds from 1 to {STALENESS_MS_MAX}, not '{key_text(text[:64])}'"
    )
