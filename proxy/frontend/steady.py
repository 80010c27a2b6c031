"""STEADY.*: the proxy's own commands, as a client sends them. Parsing only: ``client.py`` carries them out.

STEADY.READ [AUTO | STRONG | CAUGHT_UP | BOUNDED_STALENESS ms | SESSION [token] | SNAPSHOT id|CURRENT | EVENTUAL]
STEADY.SNAPSHOT OPEN [NAME name] [TTL seconds] | CLOSE id | LIST | INFO id
STEADY.PRIORITY [CRITICAL | NORMAL | BACKGROUND | AUTO]
STEADY.TOKEN
STEADY.EXPLAIN command arg...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy.snapshots.asked import checked_name, id_of_text, ttl_of_text
from routing.levels import Level, ReadLevel
from routing.names import key_text
from routing.priority import Priority, parse_priority

PREFIX = b"STEADY."
LEVELS = "AUTO | STRONG | CAUGHT_UP | BOUNDED_STALENESS ms | SESSION [token] | SNAPSHOT id|CURRENT | EVENTUAL"
USAGE = f"STEADY.READ [{LEVELS}]"
PRIORITY_USAGE = "STEADY.PRIORITY [CRITICAL | NORMAL | BACKGROUND | AUTO]"
SNAPSHOT_USAGE = "STEADY.SNAPSHOT OPEN [NAME name] [TTL seconds] | CLOSE id | LIST | INFO id"
STALENESS_MS_MAX = 24 * 3600 * 1000


class SteadyError(ValueError):
    """The command is not right; the text, with its error code, says what is."""


@dataclass(frozen=True, slots=True)
class AskLevel:
    """STEADY.READ without arguments: which level do my reads get?"""


@dataclass(frozen=True, slots=True)
class SetLevel:
    """From the next command on, reads get this level; None: auto. ``token``: of the session to go on with.

    A snapshot that is not named is the one that is current now, and stays it.
    """

    level: ReadLevel | None
    token: bytes | None = None


@dataclass(frozen=True, slots=True)
class AskPriority:
    """STEADY.PRIORITY without arguments: which priority do requests get whose key no rule names?"""


@dataclass(frozen=True, slots=True)
class SetPriority:
    """From the next command on, requests get this priority; None: as rules and listener say."""

    priority: Priority | None


@dataclass(frozen=True, slots=True)
class MakeToken:
    """A token for all that this connection has done."""


@dataclass(frozen=True, slots=True)
class Explain:
    """Where this read would go, and why."""

    arguments: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class OpenSnapshot:
    """A snapshot of now. ``ttl_seconds``: None: as the settings say; 0: until it is closed."""

    name: str = ""
    ttl_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class CloseSnapshot:
    """No reads of it any more."""

    snapshot_id: int


@dataclass(frozen=True, slots=True)
class ListSnapshots:
    """All that are known, the oldest first."""


@dataclass(frozen=True, slots=True)
class ShowSnapshot:
    """One of them."""

    snapshot_id: int


Steady = (
    AskLevel
    | SetLevel
    | AskPriority
    | SetPriority
    | MakeToken
    | Explain
    | OpenSnapshot
    | CloseSnapshot
    | ListSnapshots
    | ShowSnapshot
)


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
        case b"STEADY.SNAPSHOT":
            return _snapshot(arguments[1:])
        case b"STEADY.PRIORITY":
            return _priority(arguments[1:])
        case b"STEADY.INFO":
            raise SteadyError("ERR STEADY.INFO is not part of this version")
    raise SteadyError(
        f"ERR unknown command '{key_text(arguments[0][:64])}'; "
        "there are STEADY.READ, STEADY.PRIORITY, STEADY.SNAPSHOT, STEADY.TOKEN and STEADY.EXPLAIN"
    )


def _priority(words: Sequence[bytes]) -> Steady:
    if not words:
        return AskPriority()
    if len(words) > 1:
        raise SteadyError(f"ERR STEADY.PRIORITY takes one word: {PRIORITY_USAGE}")
    if words[0].upper() == b"AUTO":
        return SetPriority(None)
    try:
        return SetPriority(parse_priority(key_text(words[0])))
    except ValueError as problem:
        raise SteadyError(f"ERR {problem}, as in {PRIORITY_USAGE}") from None


def _read(words: Sequence[bytes]) -> Steady:
    if not words:
        return AskLevel()
    name, rest = words[0].upper(), words[1:]
    if name == b"SNAPSHOT":
        if len(rest) != 1:
            raise SteadyError("ERR give the snapshot, as in STEADY.READ SNAPSHOT CURRENT, or its id")
        snapshot_id = None if rest[0].upper() == b"CURRENT" else _id(rest[0])
        return SetLevel(ReadLevel(Level.SNAPSHOT, snapshot_id=snapshot_id))
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


def _snapshot(words: Sequence[bytes]) -> Steady:
    name, rest = (words[0].upper() if words else b""), words[1:]
    if name == b"OPEN":
        return _open(rest)
    if name == b"LIST":
        if rest:
            raise SteadyError(f"ERR STEADY.SNAPSHOT LIST takes nothing more; {SNAPSHOT_USAGE}")
        return ListSnapshots()
    if name in (b"CLOSE", b"INFO"):
        if len(rest) != 1:
            raise SteadyError(f"ERR STEADY.SNAPSHOT {name.decode()} takes the id of one snapshot")
        return CloseSnapshot(_id(rest[0])) if name == b"CLOSE" else ShowSnapshot(_id(rest[0]))
    if not name:
        raise SteadyError(f"ERR say what to do: {SNAPSHOT_USAGE}")
    raise SteadyError(f"ERR unknown subcommand '{key_text(words[0][:64])}'; {SNAPSHOT_USAGE}")


def _open(words: Sequence[bytes]) -> OpenSnapshot:
    given: dict[bytes, bytes] = {}
    for place in range(0, len(words), 2):
        option = words[place].upper()
        if option not in (b"NAME", b"TTL"):
            raise SteadyError(
                f"ERR STEADY.SNAPSHOT OPEN takes NAME and TTL, not '{key_text(words[place][:64])}'; {SNAPSHOT_USAGE}"
            )
        if option in given:
            raise SteadyError(f"ERR give {option.decode()} once")
        if place + 1 == len(words):
            raise SteadyError(f"ERR give a value after {option.decode()}; {SNAPSHOT_USAGE}")
        given[option] = words[place + 1]
    try:
        name = checked_name(given.get(b"NAME", b"").decode())
        ttl_seconds = ttl_of_text(given[b"TTL"].decode("ascii", "replace")) if b"TTL" in given else None
    except UnicodeDecodeError:
        raise SteadyError("ERR a snapshot's name is a text in UTF-8") from None
    except ValueError as problem:
        raise SteadyError(f"ERR {problem}") from None
    return OpenSnapshot(name, ttl_seconds)


def _id(text: bytes) -> int:
    """Of a snapshot. Raises SteadyError."""
    try:
        return id_of_text(text.decode("ascii", "replace"))
    except ValueError as problem:
        raise SteadyError(f"ERR {problem}, not '{key_text(text[:64])}'") from None
