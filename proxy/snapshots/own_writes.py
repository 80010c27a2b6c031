"""What this proxy knows by itself of the snapshots that it cut while no other proxy was there: which keys may differ.

As long as it is the only proxy that writes, a key that it has not begun to preserve since a cut stands as it stood at
that cut, and a read of it needs no marker.

Why that is right. A key is noted before anything is sent that preserves it, which is before anything is sent that
writes it; what was written before the cut is answered before the snapshot serves. So a value that was read while its
key was not noted is the cut's. What the node lost or gained meanwhile is another matter, and looked after as for any
read (``proxy.snapshots.histories``). Another proxy writes nothing before this one has said that it has heard of it,
or has lost its lease (``Snapshots._await_owners``): by then ``end`` was called, for good.
"""

from __future__ import annotations

from collections.abc import Collection


class OwnWrites:
    """See the module's text. One per proxy."""

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        # Snapshot -> the keys that may have been written since its cut. One that is not there, or there no more, is
        # not known of.
        self.since: dict[int, set[bytes]] = {}

    def begin(self, snapshot_id: int) -> None:
        """This proxy cuts now, alone."""
        self.since[snapshot_id] = set()

    def note(self, keys: Collection[bytes]) -> None:
        """These may be written from now on. A snapshot with more than ``keys_max`` is not known of any more."""
        for snapshot_id, written in list(self.since.items()):
            written.update(keys)
            if len(written) > self._keys_max:
                del self.since[snapshot_id]

    def keep(self, snapshot_ids: Collection[int]) -> None:
        """Only these can be read still."""
        for snapshot_id in self.since.keys() - set(snapshot_ids):
            del self.since[snapshot_id]

    def end(self) -> None:
        """Another proxy may write from now on."""
        self.since.clear()

    def shows(self, snapshot_id: int, keys: Collection[bytes]) -> bool:
        """Whether values of these keys that were read by now are those of the cut."""
        written = self.since.get(snapshot_id)
        return written is not None and written.isdisjoint(keys)
