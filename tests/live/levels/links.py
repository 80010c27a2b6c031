"""Cutting replication links, so that replicas really fall behind, and measuring that they do.

Killing a link at the primary is not enough: the replica connects again at once and asks for what it missed, so with
a kill each 20 ms its lag stays at a few hundred bytes. Here the replica is also given a password for its primary,
which has none and refuses it. The link stays down until the password is taken away again and the replica's next
attempt, which the engine makes once a second: so it is down for as long as the cut, and up to one second longer.

Some cuts, drawn at random, also shrink the primary's replication backlog while they last. When more is written
meanwhile than it holds, the replica has to synchronise from the start; else it gets only what it missed.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from proxy.embedded.cluster import Cluster, Node
from proxy.embedded.connection import Connection

REFUSED_PASSWORD = "refused by a primary that has none"
SMALL_BACKLOG_BYTES = 16_384  # the least that the engines take
USUAL_BACKLOG_BYTES = 1_048_576  # the default, and more than is written to a shard in one cut
LOOK_SECONDS = 0.05
RESTORE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Flapping:
    """How links are cut. Each replica's cuts begin at a moment of their own within the first period."""

    cut_seconds: float = 2.0
    period_seconds: float = 3.5
    full_share: float = 1 / 3  # of the cuts, those that ask for a full resynchronisation


@dataclass(slots=True)
class LinkFacts:
    """What the cuts did, seen by looking at every pair of nodes each 50 ms."""

    cuts: int = 0
    full_syncs: int = 0
    partial_syncs: int = 0
    looks: int = 0
    looks_down: int = 0  # those that found a link not up
    lags: list[int] = field(default_factory=list)  # bytes, at each look outside of full synchronisations

    @property
    def down_share(self) -> float:
        return self.looks_down / self.looks if self.looks else 0.0

    @property
    def lag_bytes_max(self) -> int:
        return max(self.lags, default=0)


@asynccontextmanager
async def watched_links(cluster: Cluster, flapping: Flapping | None, seed: int) -> AsyncIterator[LinkFacts]:
    """Links are looked at for the length of the block, and cut by turns when ``flapping`` is given; up at its end.

    Raises ServerError, ConnectionLost, and ClusterError when a link does not come up again.
    """
    facts = LinkFacts()
    before = await _syncs(cluster)
    try:
        async with trio.open_nursery() as nursery:
            for number, replica in enumerate(cluster.replicas):
                nursery.start_soon(_look_on, cluster, replica, facts)
                if flapping is not None:
                    rng = random.Random(f"{seed}/{number}")
                    nursery.start_soon(_flap, cluster, replica, flapping, rng, facts)
            yield facts
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(RESTORE_SECONDS, shield=True):
            for replica in cluster.replicas:
                await _restore(cluster, replica)  # noqa: ASYNC102  # shielded, with a deadline
    await cluster.wait_serving()
    after = await _syncs(cluster)
    facts.full_syncs = after[0] - before[0]
    facts.partial_syncs = after[1] - before[1]


async def _flap(
    cluster: Cluster, replica: Node, flapping: Flapping, rng: random.Random, facts: LinkFacts
) -> None:
    due = trio.current_time() + rng.random() * (flapping.period_seconds - flapping.cut_seconds)
    while True:
        await trio.sleep_until(due)
        is_full = rng.random() < flapping.full_share
        await cut(cluster, replica, is_full=is_full)
        facts.cuts += 1
        await trio.sleep_until(due + flapping.cut_seconds)
        await cluster.call(replica, "CONFIG", "SET", "masterauth", "")
        due += flapping.period_seconds


async def cut(cluster: Cluster, replica: Node, *, is_full: bool) -> None:
    """The replica's link is down, and stays so until `masterauth` is emptied. Raises ServerError, ConnectionLost."""
    assert replica.primary is not None
    backlog = SMALL_BACKLOG_BYTES if is_full else USUAL_BACKLOG_BYTES
    await cluster.call(replica, "CONFIG", "SET", "masterauth", REFUSED_PASSWORD)
    await cluster.call(replica.primary, "CONFIG", "SET", "repl-backlog-size", backlog)
    await cluster.call(replica.primary, "CLIENT", "KILL", "TYPE", "replica")


async def _restore(cluster: Cluster, replica: Node) -> None:
    assert replica.primary is not None
    await cluster.call(replica, "CONFIG", "SET", "masterauth", "")
    await cluster.call(replica.primary, "CONFIG", "SET", "repl-backlog-size", USUAL_BACKLOG_BYTES)


async def _look_on(cluster: Cluster, replica: Node, facts: LinkFacts) -> None:
    assert replica.primary is not None
    async with cluster.connection(replica.primary) as above, cluster.connection(replica) as below:
        while True:
            # The replica last: a lag that is seen is one that was there at the second question.
            written = int((await _info(above, "replication"))["master_repl_offset"])
            applied = await _info(below, "replication")
            facts.looks += 1
            facts.looks_down += applied["master_link_status"] != "up"
            if applied["master_sync_in_progress"] == "0":  # its offset means nothing until it has the data
                facts.lags.append(max(0, written - int(applied["slave_repl_offset"])))
            await trio.sleep(LOOK_SECONDS)


async def _syncs(cluster: Cluster) -> tuple[int, int]:
    """Full and partial synchronisations that the primaries have granted."""
    full = partial = 0
    for primary in cluster.primaries:
        async with cluster.connection(primary) as connection:
            stats = await _info(connection, "stats")
            full += int(stats["sync_full"])
            partial += int(stats["sync_partial_ok"])
    return full, partial


async def _info(connection: Connection, section: str) -> dict[str, Any]:
    text: bytes = await connection.call("INFO", section)
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)
