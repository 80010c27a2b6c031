"""What STEADY.EXPLAIN answers: where a read goes, at which level, who could have answered, and why each did or did not.

An explanation is made by whoever routes the read, of what it knew at that moment. Here stand the facts, the sentences
that give a reason, so that each is worded once, and two ways to write an explanation down: for programs, which get it
as JSON or as a reply, and for people. Both are text and numbers that can be printed: a key is arbitrary bytes and is
shown escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from routing.command import lookup, refusal
from routing.keys import KeysError, key_positions
from routing.levels import AUTO, Level, ReadLevel
from routing.names import SHOWN_MAX, count, key_text
from routing.offsets import Point
from routing.topology import Address

REPLID_SHOWN_CHARACTERS = 8  # of 40, for people


@dataclass(frozen=True, slots=True)
class CandidateFacts:
    """One node that could have answered. Numbers are finite."""

    node_id: str
    address: Address
    role: str  # primary, replica
    stage: str  # of a replica; empty for a primary
    zone: str  # empty if it is not known
    outstanding: int  # requests sent to it by this proxy and not yet answered
    latency_seconds: float | None  # recent
    stamp: Point | None  # that it proved last
    staleness_seconds: float | None  # how old its data is at most; None if nothing is proved
    is_chosen: bool
    why: str  # or why not; one of the sentences below


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one read. Numbers are finite."""

    command: str
    key: bytes  # of several the first
    slot: int
    slot_state: str
    owner: Address | None
    epoch: int  # of the view that routed it
    asked: ReadLevel | None  # by the connection, or by who asks for the explanation; None: auto
    level: ReadLevel  # the one that applies
    because: str  # of whose choice; one of the sentences below
    given: Level | None  # the level that the reply proves; None: there is none
    floor: Point | None
    staleness_seconds: float | None  # of the reply, at most
    served_by: Address | None
    role: str  # of who served it; empty if nobody did
    candidates: tuple[CandidateFacts, ...]
    refusal: str  # the error that its client would get; empty if it gets a reply
    snapshot_id: int | None = None  # of level snapshot; None also if none is current
    markers: tuple[int, ...] = ()  # of which snapshots' markers it asks; the first that exists decides
    hot_share: float | None = None  # of the keys that reads name of late, at least; None: it is not a hot key


class ExplainError(ValueError):
    """There is nothing to explain. The text says why."""


def key_of_read(args: Sequence[bytes]) -> bytes:
    """The key whose slot decides where this read goes; of several the first. Raises ExplainError."""
    if not args:
        raise ExplainError("give the command to explain and its arguments")
    command = lookup(args)
    text = refusal(command, args)
    if text is not None or command is None:
        raise ExplainError((text or "").removeprefix("ERR ").strip())
    if not command.is_readonly:
        raise ExplainError(f"{command.name} is not a read, and levels are of reads: no replica gets it")
    try:
        positions = key_positions(command, args)
    except KeysError as error:
        raise ExplainError(str(error).removeprefix("ERR ")) from error
    if not positions:
        raise ExplainError(
            f"{command.name} names no key here, so there is no slot that decides where it goes"
        )
    return args[positions[0]]


# States of the slot.

SETTLED: Final = "settled"
IN_FLUX: Final = "in flux"
MOVED: Final = "moved"  # within the time that it is given to settle
UNOWNED: Final = "unowned"

# Whose choice the level is.

BY_CONNECTION: Final = "this connection asked for it"
BY_QUESTION: Final = "the question names it"
BY_LISTENER: Final = "the listener's default"
BY_MODE: Final = "the routing mode"

RULES_DO_NOT_COUNT: Final = "at level snapshot, rules for prefixes do not count"
KEYS_DIFFER: Final = "its keys of this slot have different levels, so all are read at level strong"


def by_rule(prefix: bytes) -> str:
    return f'rule for prefix "{key_text(prefix)}"'


# Why only a primary answers.

SLOT_IN_FLUX: Final = "the slot is migrating, and is read at primaries until it has settled"
SLOT_UNOWNED: Final = "the slot has no owner"
LEVEL_STRONG: Final = "level strong is read at the slot's owner"
LEVEL_SNAPSHOT: Final = (
    "level snapshot is read at the slot's owner: the key and its markers, or what stands for it"
)
SNAPSHOT_UNWRITTEN: Final = (
    "the key alone, at the slot's owner: nobody but this proxy writes, and it has not since the cut"
)
SNAPSHOT_AT_REPLICA: Final = "it has applied the cut, and the key was not written since"
SNAPSHOT_IN_FLUX: Final = "the slot is migrating: the key, then each marker, is read wherever it is by then"
NOT_OF_SNAPSHOT: Final = "nobody is asked, because nothing can answer this as of a snapshot"
SNAPSHOT_REFUSED: Final = "nobody is asked, because the snapshot does not serve"
NO_REPLICA: Final = "the shard has no replica"
MAY_WRITE: Final = "the command may write, so its owner gets it"
RUNS_SCRIPT: Final = "the command runs a script, so its owner gets it"
HAS_CURSOR: Final = "the command has a cursor, which means nothing at another node, so its owner gets it"
SEVERAL_KEYS: Final = "the command names several keys, and replicas are asked for one at a time"
NOT_AT_REPLICAS: Final = "the command is not one that replicas are asked for, so its owner gets it"
OWN_WRITE_PENDING: Final = (
    "a write of the same connection is on its way to the shard, and the read follows it"
)
OWNER_ASKED: Final = "no replica could be asked, so the owner answers"
OWNER_PROVES: Final = "no replica proves the level now, so the owner answers"
OWNER_NOT_NEEDED: Final = (
    "not asked, because a replica answers; it is asked if that reply could mean that there is no such key"
)
MIGRATION_TARGET: Final = "the slot is migrating to it: it answers for keys that the owner has sent there"
SESSION_LOST: Final = "nobody is asked, because what the session wrote is not proven to have survived"
OWNER_CONFIRMS: Final = (
    "the replica's reply could mean that there is no such key, so its owner is asked again"
)


def slot_moved(seconds_ago: float, settle_seconds: float) -> str:
    return (
        f"the slot changed its owner {seconds_text(seconds_ago)} ago, and is read at primaries "
        f"for {seconds_text(settle_seconds)} after"
    )


# Why a replica was not chosen, or why its reply was not used.

NOT_CONNECTED: Final = "there is no connection to it"
NO_FLOOR: Final = "its primary did not tell its offset, so there is no floor that it could reach"
KNOWN_BEHIND: Final = "it was behind when it was read last, and has not told since that it has caught up"
SESSION_GOES_ON: Final = "not asked, because the session goes on with the replica that it read at"
OTHER_HISTORY: Final = (
    "it follows another replication history than its primary's, so its offset proves nothing"
)
NOTHING_PROVED: Final = "how old its data is cannot be proved"

_NOT_YET_READABLE: Final = {  # stage -> what is still missing
    "joining": "it is joining: it has not told its offset yet",
    "syncing": "it is syncing: it is being sent the whole data set, and answers as if it had none",
    "caught_up": "it has caught up, and its keys have not been verified yet",
    "verified": "it is verified, and not readable yet",
}


def not_readable(stage: str) -> str:
    """Of a replica in a stage before readable."""
    return _NOT_YET_READABLE.get(stage) or f"it is {stage}, and not readable yet"


def quarantined(keys: Sequence[bytes]) -> str:
    """``keys``: those whose values differed from the primary's."""
    shown = ", ".join(f'"{key_text(key)}"' for key in keys[:SHOWN_MAX])
    more = f" and {len(keys) - SHOWN_MAX} more" if len(keys) > SHOWN_MAX else ""
    return f"it is quarantined: {count(len(keys), 'key')} differed from its primary's: {shown}{more}"


NO_PERMIT: Final = "it has as many requests under way as it may have"


def out(why: str) -> str:
    """``why``: its circuit is open."""
    return f"it gets no reads for now, because it failed or stalled: {why}"


def returning(share: float) -> str:
    return f"it failed or stalled, and gets {share:.0%} of its reads until it is trusted again"


def not_connected(reason: str) -> str:
    """``reason``: why, empty if it is not known."""
    return f"{NOT_CONNECTED}: {reason}" if reason else NOT_CONNECTED


def no_stamp(reason: str) -> str:
    return f"it did not tell its offset: {reason}"


def behind(lag_bytes: int) -> str:
    return f"its stamp is {count(lag_bytes, 'byte')} behind the floor"


def too_old(staleness_seconds: float, max_staleness_seconds: float) -> str:
    return (
        f"its data may be {seconds_text(staleness_seconds)} old, "
        f"and the bound is {seconds_text(max_staleness_seconds)}"
    )


def timed_out(timeout_seconds: float) -> str:
    return f"it did not reply within {seconds_text(timeout_seconds)}"


class Preference(Enum):
    """By what one readable replica is preferred to another."""

    ZONE = "it is in this proxy's zone"
    OUTSTANDING = "it has fewer requests outstanding"
    LATENCY = "it has answered faster of late"
    FIRST = "nothing sets them apart, and it comes first"


def passed_over(preference: Preference) -> str:
    """Of a readable replica."""
    return f"not asked, because another is preferred: {preference.value}"


# Why one was chosen.

CHOSEN: Final = "chosen: its reply is used"


def seconds_text(seconds: float) -> str:
    """``0.25 ms``, ``250 ms``, ``1.20 s``, ``90 s``."""
    if abs(seconds) < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


# Written down.


def as_json(explanation: Explanation) -> dict[str, object]:
    """The facts for JSON. ``asked`` and ``level`` are written as STEADY.READ takes them, in lower case."""
    return {
        "command": explanation.command,
        "key": key_text(explanation.key),
        "slot": explanation.slot,
        "slot_state": explanation.slot_state,
        "owner": _text(explanation.owner),
        "hot_share": explanation.hot_share,
        "epoch": explanation.epoch,
        "asked": AUTO if explanation.asked is None else str(explanation.asked),
        "level": str(explanation.level),
        "because": explanation.because,
        "snapshot": explanation.snapshot_id,
        "markers": list(explanation.markers),
        "given": None if explanation.given is None else explanation.given.value,
        "floor": _facts_of_point(explanation.floor),
        "staleness_seconds": explanation.staleness_seconds,
        "served_by": _text(explanation.served_by),
        "role": explanation.role or None,
        "candidates": [_facts_of_candidate(candidate) for candidate in explanation.candidates],
        "refusal": explanation.refusal or None,
    }


def as_lines(explanation: Explanation) -> list[str]:
    """The facts for people."""
    return lines_of(as_json(explanation))


def lines_of(facts: Mapping[str, Any]) -> list[str]:
    """For people, what ``as_json`` gave: one fact on each line, then the candidates as a table."""
    level = facts["level"]
    rows = [
        ("command", f'{facts["command"]} "{facts["key"]}"'),
        ("slot", f"{facts['slot']}, {facts['slot_state']}, at epoch {facts['epoch']}"),
        ("owner", facts["owner"] or "none"),
        *([("hot", _shown_share(facts["hot_share"]))] if facts.get("hot_share") is not None else []),
        ("level", f"{level}: {facts['because']}; asked: {facts['asked']}"),
        ("given", facts["given"] or "none"),
    ]
    if facts["snapshot"] is not None:
        rows.append(("snapshot", _shown_snapshot(facts["snapshot"], facts["markers"])))
    if facts["floor"] is not None:
        rows.append(("floor", _shown_point(facts["floor"])))
    if facts["staleness_seconds"] is not None:
        rows.append(("staleness", f"at most {seconds_text(facts['staleness_seconds'])}"))
    rows.append(("served by", f"{facts['served_by']}, {facts['role']}" if facts["served_by"] else "nobody"))
    if facts["refusal"]:
        rows.append(("refused", facts["refusal"]))
    lines = [f"{name:<10} {text}" for name, text in rows]
    return [*lines, "", *_candidate_lines(facts["candidates"])]


def _shown_snapshot(snapshot_id: int, markers: Sequence[int]) -> str:
    if not markers:
        return str(snapshot_id)
    which = ", ".join(map(str, markers))
    decides = "the first that exists decides; without one" if len(markers) > 1 else "without it"
    return f"{snapshot_id}; markers of {which}: {decides} the key is as it was"


def _shown_share(share: float) -> str:
    return f"{share:.1%} of the reads that this proxy has looked at of late"


def _candidate_lines(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    if not candidates:
        return ["no node could have answered"]
    header = ("", "candidate", "role", "stage", "zone", "outstanding", "latency", "stamp", "staleness", "why")
    cells = [header, *(_candidate_cells(candidate) for candidate in candidates)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _candidate_cells(facts: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        "*" if facts["chosen"] else " ",
        facts["address"],
        facts["role"],
        facts["stage"] or "-",
        facts["zone"] or "-",
        str(facts["outstanding"]),
        _seconds_or_dash(facts["latency_seconds"]),
        "-" if facts["stamp"] is None else _shown_point(facts["stamp"]),
        _seconds_or_dash(facts["staleness_seconds"]),
        facts["why"],
    )


def _facts_of_candidate(candidate: CandidateFacts) -> dict[str, object]:
    return {
        "node": candidate.node_id,
        "address": str(candidate.address),
        "role": candidate.role,
        "stage": candidate.stage or None,
        "zone": candidate.zone or None,
        "outstanding": candidate.outstanding,
        "latency_seconds": candidate.latency_seconds,
        "stamp": _facts_of_point(candidate.stamp),
        "staleness_seconds": candidate.staleness_seconds,
        "chosen": candidate.is_chosen,
        "why": candidate.why,
    }


def _facts_of_point(point: Point | None) -> dict[str, object] | None:
    if point is None:
        return None
    return {"replid": point.replid.decode("ascii", "backslashreplace"), "offset": point.offset}


def _text(address: Address | None) -> str | None:
    return None if address is None else str(address)


def _shown_point(facts: Mapping[str, Any]) -> str:
    return f"{facts['offset']} of {facts['replid'][:REPLID_SHOWN_CHARACTERS]}"


def _seconds_or_dash(seconds: float | None) -> str:
    return "-" if seconds is None else seconds_text(seconds)
