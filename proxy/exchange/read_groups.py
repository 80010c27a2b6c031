"""What reads at replicas are made of: the level that they ask for, and the group that is proved together.

Nothing here sends or judges: ``replica_reads`` and ``routing.proof`` do.
"""

from __future__ import annotations

from abc import abstractmethod
from math import inf
from typing import TYPE_CHECKING, Protocol

import trio

from proxy.exchange.routes import KINDS
from proxy.replicas.service import Replica, ShardReplicas
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import Slot
from routing.levels import Level, ReadLevel
from routing.offsets import Point, Sample

if TYPE_CHECKING:
    from proxy.exchange.replica_reads import ReplicaReads


class ReadCounts:
    """What became of the reads that asked for one level."""

    __slots__ = ("at_owner", "returned", "sent")

    def __init__(self) -> None:
        self.sent = 0  # to replicas
        self.returned = 0  # of those, by the owner in the end
        self.at_owner = 0  # those too


class Asked:
    """One level in one RESP version, as reads ask for it."""

    __slots__ = (
        "bound",
        "counts",
        "is_eventual",
        "is_session",
        "kind",
        "level",
        "needs_floor",
        "open_groups",
        "resp",
    )

    def __init__(self, level: ReadLevel, resp: int, counts: ReadCounts) -> None:
        self.counts = counts
        self.level = level
        self.resp = resp
        self.kind = KINDS[resp][Lane.READ]
        self.needs_floor = level.level in (Level.CAUGHT_UP, Level.SESSION)
        self.is_session = level.level is Level.SESSION
        self.is_eventual = level.level is Level.EVENTUAL
        self.open_groups: dict[ShardReplicas, ReadGroup] = {}  # that leave at the end of the turn
        self.bound = level.max_staleness_seconds if level.level is Level.BOUNDED_STALENESS else inf


class ReadSlot(Slot):
    """What is read: a client's slot, or the part of an MGET. Its own reply counts as long as it is in no group."""

    __slots__ = ()

    reply: bytes | None
    group: ReadGroup | None  # set by ``leave_group`` alone

    @abstractmethod
    def leave_group(self) -> None:
        """From now on its reply comes from the owner."""

    @abstractmethod
    def look_closely(self) -> None:
        """Have ``ReplicaReads.consider`` see its reply, also if that shows that the key is there."""

    @abstractmethod
    def lacks(self, reply: bytes) -> bool:
        """Whether the reply may come from a node that does not have what is read."""

    @abstractmethod
    def answer(self, reply: bytes) -> None:
        """Take ``reply`` as it is."""

    @abstractmethod
    def wait_for_owner(self, since: float) -> None:
        """Its owner takes no request at the moment: go there as soon as that can be.

        ``since``: from when its deadline counts, on Trio's clock.
        """


class SessionFloors(Protocol):
    """What a group needs of a session: see ``proxy.exchange.sessions``."""

    open_groups: dict[ShardReplicas, ReadGroup]

    def floor_of(self, shard: ShardReplicas) -> Point | None:
        """What its next read must show; None when the primary has to be asked."""

    def line_of(self, shard: ShardReplicas) -> NodeConnection | None:
        """Over which it read last: another replica may be behind this one."""

    @property
    def deeds(self) -> int:
        """Counts what it did at owners."""

    def on_floor(self, shard: ShardReplicas, sample: Sample, deeds: int | None = None) -> bytes | None:
        """The primary's sample, asked after the first ``deeds`` or all; an error reply when it cannot go on."""

    def on_served(self, shard: ShardReplicas, connection: NodeConnection) -> None:
        """Its reads are served over this connection to a replica."""

    def on_owner(self, shard: ShardReplicas) -> None:
        """A read of it goes to the owner, which is newer than any stamp."""


class ReadGroup:
    """Reads of one shard in one turn that are proved together."""

    __slots__ = (
        "asked",
        "asked_at",
        "began",
        "connection",
        "deeds",
        "floor",
        "is_returned",
        "judged_in",
        "proven_until",
        "reads",
        "replica",
        "returned",
        "service",
        "session",
        "shard",
    )

    def __init__(
        self, service: ReplicaReads, shard: ShardReplicas, asked: Asked, session: SessionFloors | None
    ) -> None:
        self.service = service
        self.shard = shard
        self.asked = asked
        self.session = session
        # Of the session by now: later ones may be done after the floor is asked.
        self.deeds = 0 if session is None else session.deeds
        self.reads: list[ReadSlot] = []
        self.floor: Point | None = None
        self.began = trio.current_time()
        self.asked_at = 0.0  # Trio's clock, before the floor was asked
        # That a session has to go on with, if it has no new floor.
        self.connection: NodeConnection | None = None
        self.replica: Replica | None = None  # that has its reads
        self.is_returned = False  # all its reads went to the owner
        self.judged_in = 0  # the turn in which the stamp came
        self.proven_until = inf  # Trio's clock: after it the replies are older than the bound
        self.returned: set[tuple[int, int]] | None = None  # (client, slot) of reads that went to the owner
