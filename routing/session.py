"""What a session must see: at least what it wrote, and no less than it has read.

Per shard there is a *floor*, which a replica's stamp must cover for the session's next read, and what the session is
*owed*: the writes that the shard's primary must still have, also when it has become another one. A shard without a
floor needs a new one, sampled at its primary after everything that the session did; that is always right, only dearer.

A floor is a sample of the primary, so it covers the session's writes and others' too. An owed point may therefore be
called lost after a failover although the session's own writes survived: what is not proven is not claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from routing.offsets import Point, Sample, holds

SOME_OFFSET = (
    -1
)  # in an owed point: written since the last sample, in this history, at an offset nobody knows

Shard = TypeVar("Shard", bound=Hashable)


class SessionState(Generic[Shard]):
    """See the module's text. ``Shard`` is whatever stands for a shard as long as it has its primary."""

    __slots__ = ("_floors", "_owed")

    def __init__(self) -> None:
        self._floors: dict[Shard, Point] = {}
        self._owed: dict[Shard, Point] = {}

    def floor(self, shard: Shard) -> Point | None:
        """What the next read must show; None when the primary must be sampled first."""
        return self._floors.get(shard)

    def floors(self) -> dict[Shard, Point]:
        return dict(self._floors)

    def wrote(self, shard: Shard, replid: bytes) -> None:
        """A write was sent, or may have been. ``replid``: the primary's history as last seen, b"" if never."""
        self._floors.pop(shard, None)
        self._owed[shard] = Point(replid, SOME_OFFSET)

    def read_at_owner(self, shard: Shard) -> None:
        """A read was served by the primary, which is newer than any stamp."""
        self._floors.pop(shard, None)

    def map_changed(self) -> None:
        """Slots changed hands: what a shard's floor says may not cover the slots that came to it."""
        self._floors.clear()

    def is_kept(self, shard: Shard, sample: Sample) -> bool:
        """Whether the shard's primary, which said ``sample``, provably has what the session is owed."""
        owed = self._owed.get(shard)
        return owed is None or _keeps(sample, owed)

    def sampled(self, shard: Shard, sample: Sample) -> bool:
        """The primary was sampled after all that the session did. False: what it is owed is not proven to be there."""
        if not self.is_kept(shard, sample):
            return False
        self._floors[shard] = self._owed[shard] = sample.point
        return True

    def promise(self, shard: Shard, floor: Point, *, is_usable: bool) -> None:
        """A token names ``floor`` for the shard. ``is_usable``: the shard has the same slots as then."""
        self._owed[shard] = floor
        if is_usable:
            self._floors[shard] = floor

    def owed_by(self, is_gone: Callable[[Shard], bool]) -> list[Shard]:
        """The shards of which something is owed and whose primary is none any more."""
        return [shard for shard in self._owed if is_gone(shard)]

    def inherited(self, shard: Shard, samples: Iterable[Sample]) -> bool:
        """Whether one of today's primaries provably has what ``shard`` owed; then the debt is settled."""
        owed = self._owed[shard]
        if not any(_keeps(sample, owed) for sample in samples):
            return False
        self.forget(shard)
        return True

    def forget(self, shard: Shard) -> None:
        """Nothing is owed by this shard any more."""
        self._owed.pop(shard, None)
        self._floors.pop(shard, None)

    def touched(self) -> list[Shard]:
        """The shards of which something is owed."""
        return list(self._owed)


def _keeps(primary: Sample, owed: Point) -> bool:
    if owed.offset == SOME_OFFSET:
        return owed.replid in (b"", primary.point.replid)
    return holds(primary, owed)
