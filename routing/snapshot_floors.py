"""Whether a node's history contains a snapshot's cut, and every later step on which the snapshot counts.

A shard's floor is a point of its primary's history: the cut, or a later moment at which what it got by migrations had
arrived. A history is lost from its end only, so where a write is left, so is the pre-image that was saved before it.
What came from another node by a migration has no such order with writes that happened there. So a floor is *unsettled*
from the first sign of a migration into the shard until a new one is taken after its end.

A primary proves that it has a floor by being of the same history, or by having been promoted from it past the floor:
the second replication id that the engines keep, and the first offset that is not of that history.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace

from routing.offsets import Point, Sample


@dataclass(frozen=True, slots=True)
class ShardFloor:
    """One snapshot's floor on one replication history."""

    point: Point
    # What the shard owned, by the view, when the floor was taken, and the primary's configuration epoch then. None: by
    # a proxy that ended since. Then nobody knows what migrations did meanwhile.
    slots: frozenset[int] | None
    config_epoch: int = 0
    is_settled: bool = True

    def seen(self, slots: Set[int], config_epoch: int, *, is_importing: bool) -> ShardFloor:
        """After a look at the cluster. A slot that comes back later counts as gained."""
        if self.slots is None:
            return self
        is_settled = (
            self.is_settled
            and not is_importing
            and slots <= self.slots
            and config_epoch == self.config_epoch  # another one: slots may have left and come back, unseen
        )
        return replace(self, slots=self.slots & slots, is_settled=is_settled)

    def has_keys_of(self, hash_slot: int) -> bool:
        """Whether who has applied the floor has what the slot's keys were at the cut."""
        return self.is_settled and self.slots is not None and hash_slot in self.slots


@dataclass(frozen=True, slots=True)
class Proven:
    """The node's history has the floor, which is ``floor`` on that history."""

    floor: ShardFloor


@dataclass(frozen=True, slots=True)
class Unproven:
    """It does not, or nobody can tell. ``reason`` ends the snapshot."""

    reason: str


def judge(
    floors: Mapping[bytes, ShardFloor],
    sample: Sample,
    slots: Set[int],
    config_epoch: int,
    *,
    is_importing: bool,
) -> Proven | Unproven:
    """Whether a primary that said ``sample`` has one snapshot's floor.

    ``floors``: by replication id, all that the snapshot has. ``slots``, ``config_epoch``, ``is_importing``: of the
    primary, by a view no older than its promotion.
    """
    history = sample.point.replid
    same = floors.get(history)
    if same is not None:
        if sample.point.offset < same.point.offset:
            return Unproven(
                f"it is at offset {sample.point.offset} of a history that was at {same.point.offset}"
            )
        return Proven(same)
    before = floors.get(sample.second.replid)
    if before is None:
        if not slots and any(floor.slots is None for floor in floors.values()):
            return Unproven(
                "it owns nothing now, and while no proxy watched it may have had, and lost, something"
            )
        if not slots:
            # A node that owns nothing has nothing that a snapshot counts on; what comes, comes by migrations.
            return Proven(ShardFloor(sample.point, frozenset(), config_epoch, is_settled=not is_importing))
        return Unproven("its history is not one that was there at the cut, nor a known one's continuation")
    if before.slots is None:
        return Unproven("it failed over while no proxy watched")
    if not before.is_settled or is_importing:
        return Unproven("it failed over during or soon after a migration into its shard")
    if slots - before.slots:
        return Unproven("it failed over, and owns slots that its shard did not own when its floor was taken")
    if sample.second.offset <= before.point.offset:
        return Unproven(
            f"it was promoted at offset {sample.second.offset}, and the snapshot needs {before.point.offset}"
        )
    return Proven(replace(before, point=Point(history, before.point.offset), config_epoch=config_epoch))


def retaken(sample: Sample, slots: Iterable[int], config_epoch: int) -> ShardFloor:
    """A floor of now, for a history that has been there all the time. ``slots``: all that the shard owns, at rest."""
    return ShardFloor(sample.point, frozenset(slots), config_epoch)
