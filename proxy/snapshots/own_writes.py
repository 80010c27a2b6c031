"""What this proxy knows by itself of the snapshots that it cut while no other proxy was there: which keys may differ.

As long as it is the only proxy that writes, a key that it has not begun to preserve since a cut stands as it stood at
that cut, and a read of it needs no marker.

Why that is right. A key is noted before anything is sent that preserves it, which is before anything is sent that
writes it; what was written before the cut is answered before the snapshot serves. So a value that was read while its
key was not noted is the cut's. What the node lost or gained meanwhile is another matter, and looked after as for any
read (``proxy.snapshots.histories``). Another proxy writes nothing before this one has said that it has heard of it,
or has lost its lease (``Snapshots._await_owners``): by then ``end`` was called, for good.

Of a key whose pre-image was kept it is known in which replication history. A node of that history has it, and it is
read there without a look at the marker: a node that lost something goes on under another history. The one that is
noted was seen before the pre-image was sent. So it may be too old, and then no node is of it, but not too new.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from proxy.protocol.encode import frame

KEY_BYTES_MAX = 256  # of a longer one the request is not kept


class Kept(NamedTuple):
    """Where a key's pre-image is."""

    history: bytes  # replication id
    request: bytes  # GET of it: made once, because such reads come often


Written = dict[bytes, Kept | None]  # key -> its pre-image, if it is known where that is


class OwnWrites:
    """See the module's text. One per proxy."""

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        # Snapshot -> the keys that may have been written since its cut. A snapshot that is not there, or there no more,
        # is not known of.
        self.since: dict[int, Written] = {}

    def begin(self, snapshot_id: int) -> None:
        """This proxy cuts now, alone."""
        self.since[snapshot_id] = {}

    def note(self, keys: Collection[bytes]) -> None:
        """These may be written from now on. With more than ``keys_max`` of all, the oldest is not known of any more."""
        for written in self.since.values():
            for key in keys:
                written.setdefault(key, None)
        while sum(map(len, self.since.values())) > self._keys_max:
            del self.since[min(self.since)]

    def kept(self, snapshot_id: int, preimages: Iterable[tuple[bytes, bytes]], history: bytes) -> None:
        """These (key, name of its pre-image) are at a node that had shown this history before; b"": none."""
        written = self.since.get(snapshot_id)
        if written is not None and history:
            for key, name in preimages:
                if len(key) <= KEY_BYTES_MAX:
                    written[key] = Kept(history, frame([b"GET", name]))

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
        return written is not None and written.keys().isdisjoint(keys)
