"""Whether listings of a slot's keys miss none: judged by what nodes said of themselves in the same instant.

A listing is what CLUSTER GETKEYSINSLOT gave. A node answers it for every slot, its own or not, with what it
has, and never says that a part has moved. So the same node is asked before and after the listing, in one
pipeline, which slots it owns, and which are leaving it, and how. The two answers are its *testimony*. It
says of a slot what was so all the while between the two, and at the listing therefore; or nothing.

What the engines promise, and this relies on
- A slot's keys are at its owner unless a migration by steps is open. Then a key is at the source, or at the
  target, or for a moment at both, and goes from source to target only. A slot is marked MIGRATING at the
  source before its first key leaves, until the source gives the slot up.
- In an atomic migration all keys are at the source until the target owns the slot. From then on the target
  alone takes writes, while the source may believe for some milliseconds that it owns it still. The source
  shows the job as running from before that until it knows.
- An ownership that comes back to a node has changed its config epoch, as whoever takes a slot over bumps it.

So a slot that was owned, and leaving for nobody or for the same node, in both halves of a testimony, with the
same config epoch, was so in between: to have been elsewhere it would have had to change hands twice.

Why no key is missed that existed before the first question and still does after the last
1. The node owned the slot and nothing was leaving: all keys were there at the listing. It lists them all.
2. A migration by steps is open at the source. Its listing L1 at t1 is complete but for keys that had left,
   and they are at the target, which is asked after that and lists L2 at t2.
   a. The target owned the slot and nothing was leaving: L2 is complete by itself, by 1.
   b. It did not own it. A key that was at the target at t1 is there at t2, or it has come back; for that the
      slot must have changed hands. So the source testifies once more: if that with its testimony of t1 says
      the same of the slot, it never has. L1 and L2 together are complete.
3. An atomic migration runs at the source, which is listed at t1. The target testifies after that.
   a. It owned the slot and nothing was leaving: complete, by 1.
   b. It did not own it, so at t1 the source still was the only one to take writes: L1 is complete.
In all other cases nothing is known, and the slot is asked for again. What moves keys outside of these ways,
such as MIGRATE from a slot that is not marked, hides them from every reader and not only from this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from routing.cluster_nodes import AtomicMigration, NodeLine
from routing.topology import MigrationKind


@dataclass(frozen=True, slots=True)
class Word:
    """What one primary says of itself at one instant: half a testimony."""

    node_id: str
    config_epoch: int
    owned: frozenset[int]
    leaving: Mapping[int, tuple[str, MigrationKind]] = field(default_factory=dict)  # slot -> target's id

    @classmethod
    def of(cls, myself: NodeLine, jobs: tuple[AtomicMigration, ...]) -> Word:
        """From the node's own line of CLUSTER NODES and its running atomic migrations."""
        owned: set[int] = set()
        for low, high in myself.slot_ranges:
            owned.update(range(low, high + 1))
        leaving = {slot: (target, MigrationKind.STEPWISE) for slot, target in myself.migrating}
        for job in jobs:
            if job.source_id == myself.node.id:
                for low, high in job.slot_ranges:
                    slots = range(low, high + 1)
                    leaving.update(dict.fromkeys(slots, (job.target_id, MigrationKind.ATOMIC)))
        return cls(myself.node.id, myself.node.config_epoch, frozenset(owned), leaving)


@dataclass(frozen=True, slots=True)
class Testimony:
    """What one primary said of itself before and after its listings."""

    before: Word
    after: Word

    def owned(self, slot: int) -> bool:
        """It owned the slot all the while, and was giving it to nobody or to the same node."""
        before, after = self.before, self.after
        return (before is after and slot in before.owned) or (
            (before.node_id, before.config_epoch) == (after.node_id, after.config_epoch)
            and slot in before.owned
            and slot in after.owned
            and before.leaving.get(slot) == after.leaving.get(slot)
        )

    def did_not_own(self, slot: int) -> bool:
        return slot not in self.before.owned and slot not in self.after.owned

    def has_all(self, slot: int) -> bool:
        """Rule 1: all keys of the slot were at this node."""
        return self.owned(slot) and slot not in self.before.leaving

    def target_of(self, slot: int) -> str | None:
        """The id of the node that the slot was leaving this owner for; None when it was not, or not owned."""
        return self.before.leaving[slot][0] if self.owned(slot) and slot in self.before.leaving else None


class Verdict(Enum):
    """Whose listing of a leaving slot is complete."""

    SOURCE = auto()
    TARGET = auto()
    BOTH_IF_UNCHANGED = auto()  # together, if the source then testifies the same again
    UNKNOWN = auto()


def judge(slot: int, source: Testimony, target: Testimony) -> Verdict:
    """Rules 2 and 3, for a slot that was leaving ``source`` for ``target``, which testified later."""
    if target.has_all(slot):
        return Verdict.TARGET
    if not target.did_not_own(slot):
        return Verdict.UNKNOWN
    if source.before.leaving[slot][1] is MigrationKind.ATOMIC:
        return Verdict.SOURCE
    return Verdict.BOTH_IF_UNCHANGED


def is_unchanged(slot: int, source: Testimony, again: Word) -> bool:
    """Rule 2b: whether the source owned the slot, and was giving it to the same node, until ``again``."""
    return Testimony(source.before, again).owned(slot)
