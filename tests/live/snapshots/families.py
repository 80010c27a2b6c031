"""Keys that are read at snapshots, beside those of the campaign of moves: of each type some that are deleted and made
again, some that are renamed, and collections that are too large for the engines' compact encodings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from routing.slot import slot_of
from tests.live.campaign.keys import (
    STREAM_LENGTH,
    Bitmaps,
    Family,
    Hashes,
    HyperLogLogs,
    Key,
    Lists,
    Pairs,
    Places,
    Request,
    Sets,
    SortedSets,
    Streams,
    items,
    reading,
    replying,
    tag_of,
    value_of,
    version_in,
    writing,
)
from tests.live.campaign.keys import Keys as MovedKeys
from tests.live.campaign.resp import Reply, frame

Parts = list[bytes | int]
CROWD = 600  # members that stay; the engines keep 512 at most in a compact encoding


@dataclass(frozen=True, slots=True)
class Making:
    """How a key of one type is made whole in one command, so that it exists at a version or not at all."""

    base: Family
    parts: Callable[[Key, int], Parts]
    wanted: Callable[[int], Reply]  # what the engine says when it was not there


MAKINGS = (
    Making(
        Hashes(),
        lambda k, v: [b"HSET", k.name, b"v", value_of(k.name, v), b"n", v, b"fixed", k.name],
        lambda v: 3,
    ),
    Making(Lists(), lambda k, v: [b"RPUSH", k.name, value_of(k.name, v), value_of(k.name, v)], lambda v: 2),
    Making(Sets(), lambda k, v: [b"SADD", k.name, k.name, value_of(k.name, v)], lambda v: 2),
    Making(SortedSets(), lambda k, v: [b"ZADD", k.name, v, k.name, -1, b"fixed"], lambda v: 2),
    Making(
        Streams(),
        lambda k, v: [
            b"XADD",
            k.name,
            b"MAXLEN",
            STREAM_LENGTH,
            b"%d-1" % v,
            b"v",
            value_of(k.name, v),
        ],
        lambda v: b"%d-1" % v,
    ),
    Making(
        Bitmaps(),
        lambda k, v: [
            *(b"BITFIELD", k.name, b"SET", b"u32", b"#0", v),
            *(b"SET", b"u32", b"#1", k.index + 1, b"SET", b"u32", b"#2", 2**32 - 1),
        ],
        lambda v: [0, 0, 0],
    ),
    Making(
        Places(),
        lambda k, v: [
            b"GEOADD",
            k.name,
            b"%.3f" % (v * Places.STEP_DEGREES),
            k.index % 60,
            k.name,
        ],
        lambda v: 1,
    ),
    Making(HyperLogLogs(), lambda k, v: [b"PFADD", k.name, value_of(k.name, v)], lambda v: 1),
)


class Reborn(Family):
    """Keys of one type that their owner deletes and makes again; even versions exist."""

    has_gaps = True

    def __init__(self, making: Making) -> None:
        self.kind = making.base.kind
        self.stem = b"reborn-" + making.base.stem
        # A count says nothing of the version where the key begins anew with each.
        self.reads = () if isinstance(making.base, HyperLogLogs) else making.base.reads
        self._making = making

    def create(self, key: Key) -> list[bytes]:
        return [frame(self._making.parts(key, 0))]

    def write(self, key: Key) -> Request:
        key.alive = not key.alive
        version = key.begin()
        if version % 2 == 0:
            wanted = self._making.wanted(version)
            return writing(
                key, self.stem.decode(), self._making.parts(key, version), replying(version, wanted)
            )
        label = b"DEL" if version % 4 == 1 else b"UNLINK"
        return writing(key, label.decode(), [label, key.name], replying(version, 1, absent=0))


class Renamed(Family):
    """One string under one of two names: odd versions rename it, even ones write it where it is."""

    stem = b"renamed"

    @staticmethod
    def names(key: Key) -> tuple[bytes, bytes]:
        return key.name, key.name + b":there"

    @staticmethod
    def place(version: int) -> int:
        """Which of the two names it has."""
        return (version + 1) // 2 % 2

    @staticmethod
    def _found(key: Key, reply: Reply) -> int | None:
        found = [(place, value) for place, value in enumerate(items(reply)) if value is not None]
        if not found:
            return None
        if len(found) == 2:
            raise ValueError("torn: it has both names")
        [(place, value)] = found
        written = version_in(key.name, value)
        assert written is not None
        return written if place == Renamed.place(written) else written + 1

    reads = (
        reading(
            "MGET names", lambda key: [b"MGET", *Renamed.names(key)], lambda key, r: Renamed._found(key, r)
        ),
    )

    def create(self, key: Key) -> list[bytes]:
        return [frame([b"SET", key.name, value_of(key.name, 0)])]

    def write(self, key: Key) -> Request:
        version = key.begin()
        here, there = self.names(key)[self.place(version - 1)], self.names(key)[self.place(version)]
        if version % 2:
            return writing(key, "RENAME", [b"RENAME", here, there], replying(version, b"OK"))
        value = value_of(key.name, version)
        return writing(key, "SET XX", [b"SET", here, value, b"XX"], replying(version, b"OK"))


class Crowds(Sets):
    """Sets of many members."""

    stem = b"crowd"

    def create(self, key: Key) -> list[bytes]:
        members = [value_of(key.name, -number) for number in range(1, CROWD + 1)]
        return [*super().create(key), frame([b"SADD", key.name, *members])]


class CrowdedHashes(Hashes):
    """Hashes of many fields, whose order is that of a table."""

    stem = b"crowded-hash"
    # Another number of fields, which the type of the base's tuple does not foresee.
    reads = tuple(read for read in Hashes.reads if read[0] != "HLEN")  # type: ignore[assignment]

    def create(self, key: Key) -> list[bytes]:
        fields: Parts = [part for number in range(CROWD) for part in (b"field:%d" % number, number)]
        return [*super().create(key), frame([b"HSET", key.name, *fields])]


ADDED: tuple[tuple[Family, int], ...] = (  # family, how many of it in each slot
    *((Reborn(making), 1) for making in MAKINGS),
    (Renamed(), 2),
    (Crowds(), 1),
    (CrowdedHashes(), 1),
)


class Keys(MovedKeys):
    """All keys that have one owner and a version."""

    def __init__(self, slots: Sequence[int], keys_per_slot: int, owners: int) -> None:
        super().__init__(slots, keys_per_slot, owners)
        for slot in slots:
            tag = tag_of(slot)
            for family, count in ADDED:
                for index in range(count):
                    name = b"%b:{%b}:%d" % (family.stem, tag, index)
                    assert slot_of(name) == slot
                    number = len(self.all)
                    self.all.append(Key(family, name, slot, number, number % owners))
        self.index()


def names_at(key: Key, version: int) -> tuple[bytes, ...]:
    """The names that exist at this version."""
    if isinstance(key.family, Renamed):
        return (Renamed.names(key)[Renamed.place(version)],)
    if key.family.has_gaps and version % 2:
        return ()
    return Pairs.names(key) if isinstance(key.family, Pairs) else (key.name,)
