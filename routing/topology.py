"""The topology view: who owns which slot, at one epoch, with the migrations in progress.

A view is immutable. The data plane holds exactly one at a time and swaps it between two turns; whoever
holds an older one may finish with it, because nothing in it ever changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from routing.slot import SLOT_COUNT

UNOWNED = -1  # in TopologyView.shard_of_slot: no primary serves the slot


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


@dataclass(frozen=True, slots=True)
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

    def nodes(self) -> Iterator[Node]:
        """All nodes, each primary before its replicas."""
        for shard in self.shards:
            yield shard.primary
            yield from shard.replicas

    def slot_ranges_of(self, shard_index: int) -> tuple[tuple[int, int], ...]:
        """The slots of one shard as inclusive (first, last) ranges, ascending."""
        return tuple(ranges(slot for slot, owner in enumerate(self.shard_of_slot) if owner == shard_index))

    @property
    def unowned_count(self) -> int:
        """How many of the 16384 slots no primary serves."""
        return self.shard_of_slot.count(UNOWNED)


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
