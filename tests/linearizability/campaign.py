"""One campaign: a cluster, the proxy before it, clients on a few keys, and slots that move to and fro meanwhile.

    keys      their slots
    moving    two slots of the first primary; they go to the second and come back
    resting   two slots of the second primary, whose replica is always linked
    trailing  one slot of the third, whose replica's link is down by turns: it shows what is old, and says so to
              who asks

Each slot that moves has other keys too, so that it is on two nodes for a while, with the clients' keys on either.
"""

from __future__ import annotations

import http.client
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from sys import executable
from tempfile import TemporaryDirectory

import trio
from prometheus_client.parser import text_string_to_metric_families

from proxy.embedded.cluster import Cluster, Node, running_cluster
from proxy.embedded.engine import Engine
from proxy.embedded.moves import move_slot_stepwise, move_slots_atomically
from routing.levels import Level
from routing.slot import slot_of
from routing.topology import Address
from tests.linearizability.checker import Operation, Violation, check
from tests.linearizability.recorder import AtReplicas, ClientOpener, Recorder, ThroughProxy
from tests.live.campaign.keys import tag_of
from tests.live.campaign.proxies import free_address, serving_process
from tests.live.campaign.resp import frame

MOVING_SLOTS = (0, 1)
RESTING_SLOTS = (7000, 7001)
TRAILING_SLOT = 12000
OTHER_KEYS = 20  # in each slot that moves
BATCH_KEYS = 5
HALF_MOVED_SECONDS = 0.2
LINK_DOWN_SECONDS = 0.4  # and until the replica tries again, which it does once a second
LINK_UP_SECONDS = 0.5
READABLE_SECONDS = 20.0  # until the first replica must be readable
POLL_SECONDS = 0.05
KEYS = [
    *[b"moving:{%b}:%d" % (tag_of(slot), number) for slot in MOVING_SLOTS for number in range(2)][:3],
    *[b"resting:{%b}" % tag_of(slot) for slot in RESTING_SLOTS],
    b"trailing:{%b}" % tag_of(TRAILING_SLOT),
]
RESTING_KEYS = [key for key in KEYS if slot_of(key) in RESTING_SLOTS]


class MoveKind(Enum):
    STEPWISE = "stepwise"  # SETSLOT and MIGRATE
    ATOMIC = "atomic"  # Valkey 9: CLUSTER MIGRATESLOTS


class NoReplicaReads(Exception):
    """No replica answered a read of this level within READABLE_SECONDS."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the clients saw, judged."""

    engine: str
    reads_are: str  # the level, or what else was done
    seed: int
    seconds: float  # of load
    operations: Sequence[Operation]
    reads: int
    by_replicas: int  # of the reads, those that a replica answered at the level asked
    refused: Counter[str]
    moved: Counter[MoveKind]  # how many times a slot changed hands
    violations: Sequence[Violation]

    @property
    def is_clean(self) -> bool:
        return not self.violations and not self.refused

    def __str__(self) -> str:
        lines = [
            f"{self.engine}, {self.reads_are}, seed {self.seed}: {len(self.operations)} operations,"
            f" {self.by_replicas} of {self.reads} reads by replicas, moved {_counts(self.moved)}"
        ]
        lines += [f"  refused {times} times: {words}" for words, times in self.refused.items()]
        return "\n".join([*lines, *map(str, self.violations)])


def _counts(moved: Counter[MoveKind]) -> str:
    return ", ".join(f"{times} {kind.value}" for kind, times in moved.items()) or "nothing"


async def run_through_proxy(
    engine: Engine, level: Level, *, seconds: float, clients: int = 8, seed: int = 0
) -> Outcome:
    """Load until slots moved to and fro at least once, and ``seconds`` are over. Leaves nothing running.

    Raises Refused, NoReplicaReads, SearchTooLong, and what starting and moving raise.
    """
    recorder = Recorder(KEYS, seed)
    async with running_cluster(engine) as cluster, serving_proxy(cluster) as (address, admin):
        await _write_other_keys(cluster)
        opener = partial(ThroughProxy, address, level)
        async with opener() as client:
            await recorder.create_keys(client)
            if level is not Level.STRONG:
                await _wait_replica_reads(client, admin, level)
        answered_before = await reads_by_replicas(admin, level)
        began = trio.current_time()
        moved = await _load(recorder, [opener] * clients, partial(_move_and_trail, cluster, seconds))
        loaded_seconds = trio.current_time() - began
        by_replicas = await reads_by_replicas(admin, level) - answered_before
    return _judged(engine, level.value, recorder, loaded_seconds, by_replicas, moved)


async def run_at_replicas(engine: Engine, *, seconds: float, clients: int = 8, seed: int = 0) -> Outcome:
    """Clients that read at replicas without proof, while a replica's link is down by turns; nothing moves."""
    recorder = Recorder(KEYS, seed)
    async with running_cluster(engine) as cluster:
        map_ = await cluster.map_at(cluster.nodes[0])
        owners = {key: cluster.node_at(map_.owner_of(slot_of(key)).address) for key in KEYS}
        nodes = {key: (owner.address, _replica_of(cluster, owner).address) for key, owner in owners.items()}
        opener = partial(AtReplicas, nodes)
        async with opener() as client:
            await recorder.create_keys(client)
        began = trio.current_time()
        moved = await _load(recorder, [opener] * clients, partial(_trail_only, cluster, seconds))
        loaded_seconds = trio.current_time() - began
    return _judged(engine, "at replicas without proof", recorder, loaded_seconds, recorder.reads, moved)


def _judged(
    engine: Engine,
    reads_are: str,
    recorder: Recorder,
    seconds: float,
    by_replicas: int,
    moved: Counter[MoveKind],
) -> Outcome:
    return Outcome(
        engine=str(engine),
        reads_are=reads_are,
        seed=recorder.seed,
        seconds=seconds,
        operations=recorder.operations,
        reads=recorder.reads,
        by_replicas=by_replicas,
        refused=recorder.refused,
        moved=moved,
        violations=check(recorder.operations),
    )


Events = Callable[[], Awaitable[Counter[MoveKind]]]


async def _load(recorder: Recorder, openers: Sequence[ClientOpener], events: Events) -> Counter[MoveKind]:
    """Load for as long as the events take. Returns what they do."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.run, openers)
        moved = await events()
        recorder.stop()
    return moved


async def _move_and_trail(cluster: Cluster, seconds: float) -> Counter[MoveKind]:
    moved: Counter[MoveKind] = Counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_flap_link, cluster)
        began = trio.current_time()
        while not moved or trio.current_time() < began + seconds:
            moved += await _there_and_back(cluster)
        nursery.cancel_scope.cancel()
    return moved


async def _trail_only(cluster: Cluster, seconds: float) -> Counter[MoveKind]:
    with trio.move_on_after(seconds):
        await _flap_link(cluster)
    return Counter()


async def _there_and_back(cluster: Cluster) -> Counter[MoveKind]:
    """One primary imports at a time, and the next move waits until all nodes show the same map."""
    home, away = cluster.primaries[:2]
    moved: Counter[MoveKind] = Counter()
    for slot in MOVING_SLOTS:
        await _move_stepwise(cluster, slot, away)
        moved[MoveKind.STEPWISE] += 1
    if cluster.engine.moves_slots_atomically:
        await move_slots_atomically(cluster, MOVING_SLOTS, home)
        moved[MoveKind.ATOMIC] += len(MOVING_SLOTS)
    else:
        for slot in MOVING_SLOTS:
            await _move_stepwise(cluster, slot, home)
            moved[MoveKind.STEPWISE] += 1
    return moved


async def _move_stepwise(cluster: Cluster, slot: int, target: Node) -> None:
    await move_slot_stepwise(
        cluster, slot, target, batch_keys=BATCH_KEYS, half_moved_seconds=HALF_MOVED_SECONDS
    )


async def _flap_link(cluster: Cluster) -> None:
    """Cut the third primary's replica off by turns, until cancelled.

    It is given a password that its primary refuses, so that it stays off and goes on answering what it has.
    """
    primary = cluster.primaries[2]
    replica = _replica_of(cluster, primary)
    while True:
        await trio.sleep(LINK_UP_SECONDS)
        await cluster.call(replica, "CONFIG", "SET", "masterauth", "wrong")
        await cluster.call(primary, "CLIENT", "KILL", "TYPE", "replica")
        await trio.sleep(LINK_DOWN_SECONDS)
        await cluster.call(replica, "CONFIG", "SET", "masterauth", "")


def _replica_of(cluster: Cluster, primary: Node) -> Node:
    return next(node for node in cluster.replicas if node.primary is primary)


async def _write_other_keys(cluster: Cluster) -> None:
    async with cluster.connection(cluster.primaries[0]) as connection:
        for slot in MOVING_SLOTS:
            for number in range(OTHER_KEYS):
                await connection.call("SET", b"other:{%b}:%d" % (tag_of(slot), number), number)


@asynccontextmanager
async def serving_proxy(cluster: Cluster) -> AsyncIterator[tuple[Address, Address]]:
    """This repository's proxy with its defaults: where it serves, and its admin port."""
    address, admin = free_address(), free_address()
    command = [executable, "-m", "proxy", "serve", "--listen", str(address), "--admin", str(admin)]
    for seed in cluster.addresses[:3]:
        command += ["--seed", str(seed)]
    with TemporaryDirectory(prefix="steadyread-linearizability-") as directory:
        command += ["--set", f"store.file={directory}/topology.sqlite"]
        async with serving_process(command, address):
            yield address, admin


async def _wait_replica_reads(client: ThroughProxy, admin: Address, level: Level) -> None:
    """Read what rests until a replica has answered: a proxy that has just begun reads at owners."""
    with trio.move_on_after(READABLE_SECONDS):
        while not await reads_by_replicas(admin, level):
            for key in RESTING_KEYS:
                await client.ask(key, True, frame([b"GET", key]))
            await trio.sleep(POLL_SECONDS)
        return
    raise NoReplicaReads(f"no replica answered a {level.value} read of a key at rest in {READABLE_SECONDS} s")


async def reads_by_replicas(admin: Address, level: Level) -> int:
    """How many reads that asked for the level replicas have answered at it, as the proxy's metrics tell."""
    wanted = {"asked": level.value, "given": level.value, "role": "replica"}
    text = await trio.to_thread.run_sync(_metrics, admin)
    return sum(
        int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "steadyread_reads_total" and wanted.items() <= sample.labels.items()
    )


def _metrics(admin: Address) -> str:
    connection = http.client.HTTPConnection(*admin, timeout=5)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()
