"""Whether a replica's sample proves what a read asks for, and the reasons why a replica does not serve one."""

from __future__ import annotations

from enum import StrEnum
from math import inf

from routing.offsets import OffsetHistory, Point, Sample, covers


class Refusal(StrEnum):  # a key that hashes fast
    """Why a read that could have been served by a replica went to its owner. The values are for metrics."""

    IN_FLUX = "in_flux"  # its slot is moving, or moved lately, or has no owner
    NOT_READABLE = "not_readable"  # no replica of the shard is
    COMMAND = "command"  # it is not read at replicas
    IN_FLIGHT = "in_flight"  # it follows the client's own requests that are on their way to the primary
    NO_FLOOR = "no_floor"  # the primary did not tell its offset
    KNOWN_BEHIND = "known_behind"  # the replicas were behind, and have not proved more since
    BEHIND = "behind"  # the stamp is short of the floor
    OTHER_HISTORY = "other_history"  # the stamp counts in another history than the floor
    TOO_OLD = "too_old"  # the stamp proves an age over the bound
    SYNCING = "syncing"  # the replica is being sent the whole data set
    NO_STAMP = "no_stamp"  # the replica answered the question with an error
    LOST = "lost"  # the connection to the replica ended
    STALLED = "stalled"  # the replica sent nothing for too long
    CIRCUIT = (
        "circuit"  # those that could serve it are out, or get a share only, since they failed or stalled
    )
    OVERLOADED = "overloaded"  # those that could serve it have no permit


def judge(
    bound: float, history: OffsetHistory, floor: Point | None, sample: Sample, now: float
) -> tuple[Refusal | None, float]:
    """Whether a replica's ``sample`` proves what reads that come after it on its connection ask for; None: it does.

    ``bound``: how old the data may be, in seconds; inf for levels without one, which have a ``floor``. ``history``: of
    the shard's primary. With the refusal, if there is a bound, until when (on the clock of ``now``) the replica has
    everything; else, or if that is not proven, -inf.
    """
    if sample.is_syncing:
        return Refusal.SYNCING, -inf
    if bound != inf:
        until = history.proven_until(sample.point)
        if until is None:
            refusal = Refusal.OTHER_HISTORY if sample.point.replid != history.replid else Refusal.TOO_OLD
            return refusal, -inf
        return (Refusal.TOO_OLD if now - until > bound else None), until
    assert floor is not None
    if covers(sample.point, floor):
        return None, -inf
    return (Refusal.BEHIND if sample.point.replid == floor.replid else Refusal.OTHER_HISTORY), -inf
