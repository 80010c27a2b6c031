"""Replication offsets as proofs: what a replica has certainly applied, and how old that makes it.

An offset counts the bytes of one replication history, which its replication id names; offsets of different histories
are never compared. Both stand in INFO replication, read by a node in one step, so a pair of them is true of one
moment. ROLE is cheaper for a node (0.8 to 1.4 microseconds less on Redis 7.0), but carries no id: a replica that was
frozen while its primary restarted or was deposed and promoted again shows, for a moment, the old history's offset.

    floor  a point that a replica must have applied before its reply may be used
    stamp  the point that it proved to have applied, asked in the same pipeline before the reads

Source: replication.c and server.c (genRedisInfoString) of Redis 6.2 to Valkey 9.1.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple


class Point(NamedTuple):
    """A place in one replication history."""

    replid: bytes  # 40 hex digits
    offset: int


class Sample(NamedTuple):
    """What one node said of its replication at one moment."""

    is_primary: bool
    point: Point  # of a primary: all that it has written; of a replica: all that it has applied
    second: Point  # a primary's history before it was promoted, and the first offset that is not of it
    is_syncing: bool = (
        False  # a replica that is being sent the whole data set: it may answer as if it had none
    )
    link_up: bool = True  # of a replica, to its primary


NO_POINT = Point(b"", -1)
NO_SECOND_HISTORY = b"0" * 40


class SampleError(ValueError):
    """The reply is not INFO replication; the text shows its beginning."""


def parse_sample(reply: bytes) -> Sample:
    """The reply to INFO replication, in RESP2 or RESP3, errors included. Raises SampleError.

    On the hot path, once for each node that is asked in a turn: so no general parser of INFO.
    """
    find = reply.find
    is_primary = find(b"role:master\r\n") >= 0
    at = find(b"\nmaster_replid:")
    if at < 0 or not (is_primary or find(b"role:slave\r\n") >= 0):
        raise SampleError(f"no INFO replication: {reply[:80]!r}")
    replid = reply[at + 15 : at + 55]
    try:
        if is_primary:
            point = Point(replid, _number(reply, b"\nmaster_repl_offset:", at))
            second_id = reply[find(b"\nmaster_replid2:", at) + 16 :][:40]
            if second_id == NO_SECOND_HISTORY:
                return Sample(True, point, NO_POINT)
            return Sample(True, point, Point(second_id, _number(reply, b"\nsecond_repl_offset:", at)))
        return Sample(
            False,
            Point(replid, _number(reply, b"\nslave_repl_offset:", 0)),
            NO_POINT,
            is_syncing=find(b"\nmaster_sync_in_progress:0") < 0,
            link_up=find(b"\nmaster_link_status:up") >= 0,
        )
    except ValueError as error:
        raise SampleError(f"no INFO replication: {error}") from error


class SampleReader:
    """Parses one node's samples. While nothing is written it gives the same answer again, which is parsed once."""

    __slots__ = ("_reply", "_sample")

    def __init__(self) -> None:
        self._reply = b""
        self._sample: Sample | None = None

    def sample_of(self, reply: bytes) -> Sample:
        """As ``parse_sample``. Raises SampleError."""
        if self._sample is None or reply != self._reply:
            self._sample = parse_sample(reply)
            self._reply = reply
        return self._sample


def _number(reply: bytes, field: bytes, start: int) -> int:
    at = reply.find(field, start)
    if at < 0:
        raise ValueError(f"{field[1:]!r} is missing in {reply[:80]!r}")
    at += len(field)
    return int(reply[at : reply.find(b"\r\n", at)])


def covers(stamp: Point, floor: Point) -> bool:
    """Whether who has applied ``stamp`` has certainly applied ``floor``."""
    return stamp.replid == floor.replid and stamp.offset >= floor.offset


def holds(primary: Sample, floor: Point) -> bool:
    """Whether what a primary has written certainly includes ``floor``, also one of before its promotion.

    ``second`` names the first offset that the promoted replica did not have of its former history.
    """
    return covers(primary.point, floor) or (
        primary.second.replid == floor.replid and floor.offset < primary.second.offset
    )


class OffsetHistory:
    """When a primary's offset was sampled: proves how old a replica's data can be. For one replication history.

    ``add`` is told a time *before* the question was sent: at that time the primary had written no more than it said.
    So who has applied the sampled offset has everything that the primary had at that time.
    Times are seconds on one monotonic clock.
    """

    __slots__ = ("_keep_seconds", "_offsets", "_times", "replid")

    def __init__(self, keep_seconds: float) -> None:
        self._keep_seconds = keep_seconds
        self.replid = b""
        self._offsets: list[int] = []  # ascending
        self._times: list[float] = []  # of each offset the newest; ascending

    def add(self, asked_at: float, point: Point) -> None:
        """The primary said ``point`` to a question sent after ``asked_at``. A new history forgets the old one."""
        if point.replid != self.replid:
            self.replid = point.replid
            self._offsets.clear()
            self._times.clear()
        offsets, times = self._offsets, self._times
        # Answers may come in another order than their questions were sent, over two connections.
        at = bisect_right(offsets, point.offset)
        if at and times[at - 1] >= asked_at:
            return  # a smaller or equal offset proves as much
        while at < len(offsets) and times[at] <= asked_at:  # larger offsets that prove less than this one
            del offsets[at], times[at]
        if at and offsets[at - 1] == point.offset:
            times[at - 1] = asked_at
        else:
            offsets.insert(at, point.offset)
            times.insert(at, asked_at)
        if times[0] < asked_at - self._keep_seconds and len(times) > 1:
            expired = bisect_right(times, asked_at - self._keep_seconds)
            del offsets[:expired], times[:expired]

    def proven_until(self, stamp: Point) -> float | None:
        """The newest time of which ``stamp`` has everything; None when nothing is proven."""
        if stamp.replid != self.replid:
            return None
        at = bisect_right(self._offsets, stamp.offset)
        return self._times[at - 1] if at else None
