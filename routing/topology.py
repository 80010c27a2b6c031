"""The topology view: who owns which slot, at one epoch, with the migrations in progress.

A view is immutable. The data plane holds exactly one at a time and swaps it between two turns; whoever
holds an older one may finish with it, because nothing in it ever changes.

A view may have 1,000 nodes: what is asked of it often is worked out once, at the first question, in one pass over
the slots or the nodes. Nothing here costs slots times shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from hashlib import blake2b
from itertools import compress, pairwise
from operator import ne
from typing import NamedTuple

from routing.slot import SLOT_COUNT

SlotRanges = tuple[tuple[int, int], ...]  # inclusive (first, last) pairs, ascending

UNOWNED = -1  # in TopologyView.shard_of_slot: no primary serves the slot
FINGERPRINT_BYTES = 8  # of TopologyView.fingerprint: maps that differ by chance agree once in 2**64


class Address(NamedTuple):
    """Where a node listens. ``host`` is a name or an IP address, IPv6 without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """``HOST:PORT`` or ``[IPV6]:PORT``. Raises ValueError that says what is wrong."""
        host, separator, port = text.rpartition(":")
        if not separator or not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
            raise ValueError(f"{text!r} is not HOST:PORT with a port from 0 to 65535")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))


class Role(Enum):
    PRIMARY = "primary"
    REPLICA = "replica"


class MigrationKind(Enum):
    STEPWISE = "stepwise"  # SETSLOT MIGRATING/IMPORTING and MIGRATE, key by key
    ATOMIC = "atomic"  # Valkey 9: CLUSTER MIGRATESLOTS, the slot changes hands at once


@dataclass(frozen=True, slots=True)
class Node:
    """One server as the cluster names it."""

    id: str  # 40 hex digits
    address: Address
    role: Role
    primary_id: str | None = None  # of a replica: the node it follows
    config_epoch: int = 0
    is_failing: bool = False  # flagged fail or fail? by the node that told
    is_linked: bool = True  # the telling node's cluster-bus link to it is up
    hostname: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """A primary and its replicas."""

    primary: Node
    replicas: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Migration:
    """Slots that are on their way from one shard to another."""

    slots: tuple[int, ...]  # ascending
    source_id: str  # node id of the source primary
    target_id: str  # node id of the target primary
    kind: MigrationKind


@dataclass(frozen=True)  # not slotted: the cached properties need a place; they are no part of the content
class TopologyView:
    """Slot -> shard at one epoch. Equal content means equal view; ``revision`` counts the changes seen here."""

    revision: int
    epoch: int  # the cluster's current epoch when it was seen
    shards: tuple[Shard, ...]
    shard_of_slot: tuple[int, ...]  # slot -> index into shards, or UNOWNED
    migrations: tuple[Migration, ...] = ()

    def primary_of(self, slot: int) -> Node | None:
        """The primary that owns ``slot``, or None when no node does."""
        index = self.shard_of_slot[slot]
        return None if index == UNOWNED else self.shards[index].primary

    def says_the_same_as(self, other: TopologyView) -> bool:
        """Whether two views have the same content, whichever was seen first."""
        return (
            self.epoch == other.epoch
            and self.migrations == other.migrations
            and self.shard_of_slot == other.shard_of_slot
            and self.shards == other.shards
        )

    def nodes(self) -> Iterator[Node]:
        """All nodes, each primary before its replicas."""
        for shard in self.shards:
            yield shard.primary
            yield from shard.replicas

    def is_serving(self, address: Address) -> bool:
        """Whether a node listens at ``address`` that is not failing."""
        return address in self._serving

    def slot_ranges_of(self, shard_index: int) -> SlotRanges:
        """The slots of one shard; of UNOWNED, those that no primary serves."""
        return self._ranges_of_owner.get(shard_index, ())

    @cached_property
    def unowned_count(self) -> int:
        """How many of the 16384 slots no primary serves."""
        return self.shard_of_slot.count(UNOWNED)

    @cached_property
    def fingerprint(self) -> bytes:
        """FINGERPRINT_BYTES that are equal where each slot has the same primary, on every proxy and machine.

        Epoch, addresses, replicas, migrations, primaries without slots and the order of the shards do not count.
        """
        # slot -> place of its owner's id among all of them: as quick however scattered the slots are.
        id_of_shard = [
            *(shard.primary.id for shard in self.shards),
            "",
        ]  # at UNOWNED, the last one: nobody's id
        owner_ids = sorted({id_of_shard[index] for index in set(self.shard_of_slot)})
        place_of_id = {owner_id: place.to_bytes(2, "little") for place, owner_id in enumerate(owner_ids)}
        place_of_shard = [place_of_id.get(shard_id, b"") for shard_id in id_of_shard]
        digest = blake2b("\n".join(owner_ids).encode(), digest_size=FINGERPRINT_BYTES)
        digest.update(b"".join(map(place_of_shard.__getitem__, self.shard_of_slot)))
        return digest.digest()

    @cached_property
    def _serving(self) -> frozenset[Address]:
        found = {shard.primary.address for shard in self.shards if not shard.primary.is_failing}
        found.update(node.address for shard in self.shards for node in shard.replicas if not node.is_failing)
        return frozenset(found)

    @cached_property
    def _ranges_of_owner(self) -> dict[int, SlotRanges]:
        owners = self.shard_of_slot
        changes = compress(range(1, len(owners)), map(ne, owners, owners[1:]))  # at the speed of C
        found: dict[int, list[tuple[int, int]]] = {}
        for first, after in pairwise([0, *changes, len(owners)]):
            found.setdefault(owners[first], []).append((first, after - 1))
        return {owner: tuple(pairs) for owner, pairs in found.items()}


def ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as inclusive (first, last) runs."""
    first = last = None
    for number in numbers:
        if last is not None and number == last + 1:
            last = number
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = number
    if first is not None and last is not None:
        yield first, last


EMPTY_VIEW = TopologyView(revision=0, epoch=0, shards=(), shard_of_slot=(UNOWNED,) * SLOT_COUNT)
