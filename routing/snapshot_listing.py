"""Which keys existed at a snapshot's cut: judged by listings of their slots and by markers.

A slot's listing shows the clients' keys that are there now, pre-images, and markers, whose names carry the key that
they are about. A key that existed at the cut and is gone was preserved before it went, so its marker is listed.
The *candidates* are therefore all listed keys of clients, and all keys of listed markers that a read at the
snapshot asks. Of each candidate the oldest such marker decides, as it does for any read
(docs/decisions/0009-snapshots.md).

Why no key is missed that existed at the cut
1. A listing of one node that has all keys of the slot shows one instant. The key is there at that instant, or its
   marker is, because the marker is set before the key is first changed, at the same node.
2. A slot that is split between two nodes is listed at the source at t1 and at the target at t2. Keys and markers go
   from source to target only, and a new key, as a marker is, is never made at the source. Was the key at the
   source at t1, it is listed. Else it was gone or at the target. Was it gone, its marker was there at t1: at the
   source, and is listed, or at the target, where it still is at t2. Was it at the target, it is there at t2 and
   listed, or it has gone since: then its marker was at the source by t1 or is at the target at t2.
Expiry removes keys without a marker; those are not promised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import NamedTuple

from routing.snapshot_names import PREFIX, is_internal, marker_prefix

PREIMAGE = b"p"  # what a marker says: see the pre-image
ABSENT = b"a"  # the key did not exist
TOO_LARGE = b"x"  # it existed, and was too large to keep


class Existence(Enum):
    """What tells whether a key existed at the cut."""

    AS_NOW = auto()  # no marker: the key itself, as it is now
    AS_KEPT = auto()  # its pre-image
    DID_NOT = auto()
    DID_BUT_LOST = auto()  # it was too large to keep: it existed, and no more is known


class Decision(NamedTuple):
    existence: Existence
    snapshot_id: int = 0  # whose pre-image, if AS_KEPT


AS_NOW = Decision(Existence.AS_NOW)
DID_NOT = Decision(Existence.DID_NOT)
DID_BUT_LOST = Decision(Existence.DID_BUT_LOST)


def decide(ids: Iterable[int], values: Iterable[bytes | None]) -> Decision:
    """By the markers of one key. ``ids``: ``Chain.markers_of`` of the snapshot; ``values``: those markers', None
    where there is none.

    Raises ValueError for what no marker says.
    """
    for snapshot_id, value in zip(ids, values, strict=True):
        if value is None:
            continue
        if value == PREIMAGE:
            return Decision(Existence.AS_KEPT, snapshot_id)
        if value == ABSENT:
            return DID_NOT
        if value == TOO_LARGE:
            return DID_BUT_LOST
        raise ValueError(f"a marker of snapshot {snapshot_id} says {value[:20]!r}")
    return AS_NOW


def clients_keys(names: Iterable[bytes]) -> list[bytes]:
    """Those names that clients may see."""
    return [name for name in names if not name.startswith(PREFIX) or not is_internal(name)]


class SlotCandidates:
    """The candidates of one slot, from its listing, which may be added in pieces."""

    def __init__(self, slot: int, ids: Sequence[int]) -> None:
        self._prefixes = tuple(marker_prefix(slot, snapshot_id) for snapshot_id in ids)
        self._keys: dict[bytes, None] = {}
        self.marked: set[bytes] = set()  # those with a listed marker

    def add(self, names: Iterable[bytes]) -> None:
        for name in names:
            if not name.startswith(PREFIX):
                self._keys[name] = None
            elif name.startswith(self._prefixes):
                key = next(
                    name[len(prefix) :] for prefix in self._prefixes if name.startswith(prefix)
                )  # of different ids, so that no prefix begins another
                self._keys[key] = None
                self.marked.add(key)
            elif not is_internal(name):
                self._keys[name] = None

    @property
    def keys(self) -> list[bytes]:
        """Each once, the clients' and the marked ones."""
        return list(self._keys)
