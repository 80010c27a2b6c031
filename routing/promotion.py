"""The stages by which a replica becomes readable, and what takes it back.

    joining -> syncing -> caught_up -> verified -> readable;  on a mismatch, from any of the last three: quarantined

Each proxy promotes the replicas for itself: nothing that a proof rests on is heard from others. A ``Promotion`` is
what is known of one replica; ``advance`` makes the next from what one tick saw of it. The steps:

    joining    until it has told a sample over the connection that there is now
    syncing    while it is sent the data set, or its history is not its primary's; then until it has applied an offset
               that its primary told after the replica was first seen to follow it
    caught_up  until a comparison, begun after that, finds its keys equal to its primary's (``routing.comparison``)
    verified   for one tick more: it is readable at the next in which it is still of the same history

A reset takes back all that was proved, so that every step is taken again: a full synchronisation, a history that its
primary does not have, an offset that went back, silence, a lost connection (its process may be another one now). A
comparison that was begun before a reset proves nothing after it; ``proof`` tells which resets it knew.

A small data set is sent and loaded between two ticks, and while it loads a node may be silent. But each full
synchronisation begins the replica's own backlog anew, at the offset of the data that came: a backlog that has
never been full and begins after the offset of the tick before tells of one (replication.c of Redis 6.2 to Valkey 9.1).

A link to its primary that is merely down resets nothing: a readable replica's data does not become wrong, only old,
and how old is proved with each reply. Nor does a primary that does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from routing.comparison import Outcome, Verdict
from routing.events import Event, EventKind
from routing.names import count, key_text
from routing.offsets import NO_POINT, Point, Sample, covers
from routing.topology import Node

UNDECIDED_SECONDS = 1.0  # a readable replica whose keys could not be compared is compared again after this
KEYS_GROW_MAX = 4  # each comparison that decided nothing is followed by one of twice the keys, so many times
KEYS_GROWN_MAX = 256  # the limit of that
KEYS_SHOWN_MAX = 16  # in the evidence; the sentence has fewer
KEYS_SAID_MAX = 3


class Stage(Enum):
    """How far a replica has come. Only a readable one is sent reads."""

    JOINING = "joining"  # it has not told its offset yet
    SYNCING = "syncing"  # it is being sent the data set, or its history is not its primary's
    CAUGHT_UP = "caught_up"  # it has applied an offset that its primary had after it joined
    VERIFIED = "verified"  # sampled keys are equal to its primary's
    READABLE = "readable"
    QUARANTINED = "quarantined"  # a sampled key differed


@dataclass(frozen=True, slots=True)
class PromotionRules:
    """What operators set. Durations in seconds."""

    verify_interval_seconds: float = (
        30.0  # between comparisons of a readable replica; 0: only before it is readable
    )
    verify_keys: int = 16  # in one comparison
    quarantine_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Promotion:
    """What is known of one replica. Times are seconds on the clock of ``now``."""

    stage: Stage = Stage.JOINING
    why_not: str = "it has not told its offset yet"  # one clause; "" when it is readable
    proof: int = 0  # counts the resets
    joined_at: float | None = None  # when it was first seen to follow its primary, since the last reset
    point: Point = NO_POINT  # its newest, since the last reset
    floor: Point = NO_POINT  # an offset of its primary after ``joined_at``, which it must apply
    compare_at: float = 0.0  # the next comparison is not due before
    undecided: int = 0  # comparisons in a row that proved nothing
    verified_at: float | None = None  # since the last reset
    quarantined_until: float = 0.0
    suspects: tuple[
        bytes, ...
    ] = ()  # keys that differed; no comparison is passed before they are found equal


@dataclass(frozen=True, slots=True)
class Compared:
    """The end of a comparison that was begun when ``Promotion.proof`` was ``proof``."""

    proof: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Tick:
    """What was seen of one replica and of its primary, which was asked before it."""

    replica: Sample | None  # None: it does not answer
    primary: Sample | None = None  # None: it does not answer
    primary_asked_at: float = 0.0  # before the question was sent
    backlog_from: int | None = None  # of the replica, see ``parse_backlog``
    problem: str = ""  # why there is no ``replica``, one clause
    compared: Compared | None = None


def advance(known: Promotion, tick: Tick, rules: PromotionRules, now: float) -> Promotion:
    """The promotion after ``tick``. At most one stage is gained."""
    if known.stage is Stage.QUARANTINED:
        if now < known.quarantined_until:
            return known
        known = reset(known, Stage.SYNCING, "its quarantine is over, and it has to be verified again")
    if tick.replica is None:
        return reset(known, Stage.JOINING, tick.problem or "it does not answer")
    if why := _why_apart(known, tick.replica, tick.primary) or _why_anew(
        known, tick.replica, tick.backlog_from
    ):
        return reset(known, Stage.SYNCING, why)
    known = replace(known, point=tick.replica.point)
    match known.stage:
        case Stage.JOINING | Stage.SYNCING:
            return _catch_up(known, tick, now)
        case Stage.CAUGHT_UP:
            return _judge(known, tick, rules, now)
        case _:
            judged = _judge(known, tick, rules, now)
            return (
                replace(judged, stage=Stage.READABLE, why_not="")
                if judged.stage is Stage.VERIFIED
                else judged
            )


def reset(known: Promotion, stage: Stage, why: str) -> Promotion:
    """Back to ``stage``, with nothing proved. A quarantine goes on, and suspects are kept."""
    if known.stage is Stage.QUARANTINED and stage is Stage.JOINING:
        return replace(known, proof=known.proof + 1)
    return Promotion(stage=stage, why_not=why, proof=known.proof + 1, suspects=known.suspects)


def is_comparison_due(known: Promotion, rules: PromotionRules, now: float) -> bool:
    """Whether its keys should be compared with its primary's now."""
    if known.stage is Stage.READABLE:
        return rules.verify_interval_seconds > 0 and now >= known.compare_at
    return known.stage is Stage.CAUGHT_UP and now >= known.compare_at


def keys_to_compare(known: Promotion, rules: PromotionRules) -> int:
    """How many keys the next comparison should draw."""
    return max(
        rules.verify_keys, min(rules.verify_keys << min(known.undecided, KEYS_GROW_MAX), KEYS_GROWN_MAX)
    )


def _why_apart(known: Promotion, replica: Sample, primary: Sample | None) -> str:
    """Why the replica is not one whose data is a past state of its primary's; "" if it is."""
    if replica.is_primary:
        return "it says that it is a primary"
    if replica.is_syncing:
        return "it is being sent the whole data set"
    history = known.point.replid  # of which it was at the tick before
    if primary is not None and primary.is_primary:
        if replica.point.replid != primary.point.replid:
            return "its replication history is not its primary's"
    elif not history:
        return "its primary has not told its offset"
    elif replica.point.replid != history:
        return "its replication history changed, and its primary has not told its own"
    return ""


def _why_anew(known: Promotion, replica: Sample, backlog_from: int | None) -> str:
    """Why the replica's data is not what it was at the tick before and what was added to it; "" if it is.

    Offsets are counted on when a history goes over into another one, so this holds then too.
    """
    if known.point == NO_POINT:
        return ""
    if replica.point.offset < known.point.offset:
        return "its offset went back"
    if backlog_from is not None and backlog_from > known.point.offset + 1:
        return "it was sent the whole data set"
    return ""


def parse_backlog(reply: bytes) -> int | None:
    """The first offset in the backlog of who answered INFO replication with ``reply``.

    None if it has no backlog, or one that was full, so that it need not be where the backlog was begun.
    """
    fields = []
    for field in (b"\nrepl_backlog_size:", b"\nrepl_backlog_first_byte_offset:", b"\nrepl_backlog_histlen:"):
        at = reply.find(field)
        digits = reply[at + len(field) : reply.find(b"\r", at)] if at >= 0 else b""
        if not digits.isdigit():
            return None
        fields.append(int(digits))
    size, first, length = fields
    return first if b"\nrepl_backlog_active:1" in reply and length < size else None


def _catch_up(known: Promotion, tick: Tick, now: float) -> Promotion:
    assert tick.replica is not None
    if known.joined_at is None:
        why = "it has not applied yet what its primary had written when it joined"
        known = replace(known, stage=Stage.SYNCING, why_not=why, joined_at=now)
    elif known.floor == NO_POINT and tick.primary is not None and tick.primary_asked_at >= known.joined_at:
        known = replace(known, floor=tick.primary.point)
    if known.floor == NO_POINT:
        return known
    if (
        known.floor.replid != tick.replica.point.replid
    ):  # both went over to a new history, in which it must prove itself
        return replace(known, floor=NO_POINT, joined_at=now)
    if covers(tick.replica.point, known.floor):
        return replace(
            known, stage=Stage.CAUGHT_UP, why_not="its keys have not been compared yet", compare_at=now
        )
    if not tick.replica.link_up:
        return replace(known, why_not="its link to its primary is down, and it had not caught up")
    return known


def _judge(known: Promotion, tick: Tick, rules: PromotionRules, now: float) -> Promotion:
    """What the comparison that ended says, if one did that still counts."""
    if tick.compared is None or tick.compared.proof != known.proof:
        return known
    outcome = tick.compared.outcome
    match outcome.verdict:
        case Verdict.EQUAL:
            known = replace(
                known,
                compare_at=now + rules.verify_interval_seconds,
                undecided=0,
                verified_at=now,
                suspects=(),
            )
            if known.stage is Stage.CAUGHT_UP:
                return replace(known, stage=Stage.VERIFIED, why_not="it was verified just now")
            return known
        case Verdict.UNDECIDED:
            known = replace(known, undecided=known.undecided + 1)
            if known.stage is Stage.CAUGHT_UP:  # it is asked at the next tick, of other keys
                return replace(known, why_not=f"its keys could not be compared: {outcome.why_undecided()}")
            return replace(known, compare_at=now + min(UNDECIDED_SECONDS, rules.verify_interval_seconds))
        case Verdict.MISMATCH:
            kept = (key for key in known.suspects if key not in outcome.mismatched)
            return Promotion(
                stage=Stage.QUARANTINED,
                why_not=f"{_keys_text(outcome.mismatched)} differed from its primary's",
                proof=known.proof + 1,
                quarantined_until=now + rules.quarantine_seconds,
                suspects=(*outcome.mismatched, *kept),
            )


# -- events


def stage_event(
    replica: Node,
    primary: Node,
    old: Stage,
    new: Stage,
    reason: str,
    keys: Sequence[bytes],
    at: float,
    epoch: int,
) -> Event:
    """The event of one change. ``keys`` are those that differed; ``at`` is in Unix seconds."""
    address = replica.address
    if new is Stage.READABLE:
        kind, message = EventKind.REPLICA_READABLE, f"{address} is readable: it is verified and caught up"
    elif new is Stage.QUARANTINED:
        kind, message = EventKind.REPLICA_QUARANTINED, f"{address} is quarantined: {reason}"
    elif old is Stage.READABLE:
        kind, message = EventKind.REPLICA_UNREADABLE, f"{address} is not readable any more: {reason}"
    else:
        kind = EventKind.REPLICA_STAGE_CHANGED
        message = f"{address} was {old.value} and is {new.value}" + (f": {reason}" if reason else "")
    return Event(
        kind,
        at,
        message,
        epoch=epoch,
        nodes=(replica.id, primary.id),
        shards=(primary.id,),
        evidence={
            "old_stage": old.value,
            "new_stage": new.value,
            "reason": reason or None,
            "keys": [key_text(key) for key in keys[:KEYS_SHOWN_MAX]],
            "keys_count": len(keys),
        },
    )


def _keys_text(keys: Sequence[bytes]) -> str:
    """``key "a"``, ``keys "a", "b", "c" and 2 more``."""
    said = ", ".join(f'"{key_text(key)}"' for key in keys[:KEYS_SAID_MAX])
    more = f" and {count(len(keys) - KEYS_SAID_MAX, 'other')}" if len(keys) > KEYS_SAID_MAX else ""
    return f"{'key' if len(keys) == 1 else 'keys'} {said}{more}"
