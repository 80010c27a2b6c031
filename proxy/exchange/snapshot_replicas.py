"""Reads at a snapshot by replicas (setting ``snapshots.read_at``), of keys that nobody has written since the cut.

Why such a reply is right. The replica is of a history that has a floor of the snapshot, and has applied as much: all
that the shard had at the cut, and all that migrations have brought since. The key has not been written since, which
this proxy knows while it alone writes (``proxy.snapshots.own_writes``), so from whatever later moment of that history
the value is, it is the cut's. That the replica is still of that history is asked in front of the reads, once in each
turn. What may mean that the key is not there proves nothing, for it may have moved to another shard: the owner is
asked.

Other reads, and slots that are in flux or moved lately, are the owner's, as are those of a shard whose floor is not
settled. Nobody waits for a replica's proof: until it has come, the owner serves.
"""

from __future__ import annotations

import trio

from proxy.exchange.replica_reads import INFO_REPLICATION, QUIET_SECONDS
from proxy.replicas.service import Replica, Replicas, ShardReplicas
from proxy.settings import ReadAt
from proxy.snapshots.histories import Histories
from proxy.upstream.connection import NodeConnection
from proxy.upstream.reply_slot import Slot
from routing.offsets import SampleError, covers


class SnapshotReplicas:
    """What the replicas have shown, for reads at snapshots. One per proxy."""

    def __init__(self, replicas: Replicas, histories: Histories, read_at: ReadAt) -> None:
        self.replicas = replicas
        self.histories = histories
        self.is_used = read_at is ReadAt.REPLICAS
        self.reads_total = 0  # that replicas served

    def line(self, snapshot_id: int, hash_slot: int, resp: int) -> tuple[Replica, NodeConnection] | None:
        """Over which a key that was not written since may be read; one that has shown nothing yet is asked."""
        shard = self.replicas.of_slot[hash_slot]
        found = None if shard is None or not shard.has_readable else self._choose(shard, resp)
        if found is None or self.histories.is_in_doubt(hash_slot):
            return None
        replica, connection = found
        shown = connection.shown
        if shown is None:
            self.ask(replica, connection)
            return None
        floor = self.histories.floors.get(snapshot_id, {}).get(shown.replid)
        if floor is None or not floor.has_keys_of(hash_slot):
            return None
        if not covers(shown, floor.point):
            self.ask(replica, connection)
            return None
        return found

    def _choose(self, shard: ShardReplicas, resp: int) -> tuple[Replica, NodeConnection] | None:
        now = trio.current_time()
        if now - self.replicas.used_at > QUIET_SECONDS:
            self.replicas.on_news()
        self.replicas.used_at = now
        return shard.choose(resp)

    def ask(self, replica: Replica, connection: NodeConnection) -> None:
        """Have it say what it has applied, in front of what is queued next; once in a step."""
        step = connection.hub.step
        if connection.guarded_step != step:
            connection.guarded_step = step
            connection.queue(ReplicaGuard(self, replica))

    def note(self, replica: Replica, connection: NodeConnection, reply: bytes) -> None:
        """What it said; nothing, if that proves nothing."""
        connection.shown = None
        try:
            sample = replica.reader.sample_of(reply)
        except SampleError:
            return
        if not sample.is_primary and not sample.is_syncing:
            connection.shown = sample.point


class ReplicaGuard(Slot):
    """Asks a replica for its history, and how much of it it has applied, in front of reads."""

    __slots__ = ("hash_slot", "raw", "replica", "requester", "service")

    def __init__(self, service: SnapshotReplicas, replica: Replica) -> None:
        self.raw = INFO_REPLICATION
        self.hash_slot = -1
        self.requester = None
        self.service = service
        self.replica = replica

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        self.service.note(self.replica, connection, reply)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        """So are the reads behind it, and they are told."""
