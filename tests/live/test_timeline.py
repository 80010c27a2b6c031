"""What others do to a cluster becomes events within a second, as a proxy of it records them.

Nothing here goes through the proxy: the engine's own cli and commands change the cluster, and the admin port tells.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.embedded.cluster import Cluster, Node, running_cluster
from proxy.embedded.connection import ServerError
from proxy.embedded.moves import move_slots_atomically, move_slots_with_cli
from routing.topology import Address
from tests.live.campaign.proxies import free_address, serving_process
from tests.live.conftest import ClusterStarter, engine_named

TOLD_SECONDS = 1.0  # from the change to its event
SLACK_SECONDS = 0.5  # for a busy test machine
NODE_TIMEOUT_MS = 1500
STUCK_SECONDS = 1.5
ENGINES = ["redis-7.0", "valkey-9.1"]
pytestmark = pytest.mark.live

Event = dict[str, Any]


@dataclass
class Watched:
    """A cluster with a proxy that records it."""

    cluster: Cluster
    admin: Address
    file: Path

    async def get(self, path: str) -> Any:
        def ask() -> Any:
            connection = http.client.HTTPConnection(*self.admin, timeout=5)
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                return json.loads(response.read())
            finally:
                connection.close()

        return await trio.to_thread.run_sync(ask)

    async def events(self, *kinds: str) -> list[Event]:
        query = "".join(f"&kind={kind}" for kind in kinds)
        page = await self.get(f"/v1/events?from=1&limit=200{query}")
        found: list[Event] = page["events"]
        return found

    async def wait_event(self, kind: str, fits: Callable[[Event], bool] = lambda event: True) -> Event:
        """The first event of this kind that fits, when there is one. Fails after TOLD_SECONDS."""
        began = time.monotonic()
        while True:
            for event in await self.events(kind):
                if fits(event):
                    return event
            told = [(event["kind"], event["message"]) for event in await self.events()]
            assert time.monotonic() - began < TOLD_SECONDS + SLACK_SECONDS, f"no {kind} among {told}"
            await trio.sleep(0.02)


@asynccontextmanager
async def watched(cluster: Cluster, file: Path) -> AsyncIterator[Watched]:
    """A proxy that has recorded the cluster as it is: it serves a moment before it has."""
    async with a_proxy(cluster, file) as admin:
        seen = Watched(cluster, admin, file)
        await seen.wait_event("cluster_seen")
        yield seen


@asynccontextmanager
async def a_proxy(cluster: Cluster, file: Path) -> AsyncIterator[Address]:
    listen, admin = free_address(), free_address()
    command = [sys.executable, "-m", "proxy", "serve", "--listen", str(listen), "--admin", str(admin)]
    command += ["--seed", str(cluster.addresses[0]), "--set", f"store.file={file}"]
    command += ["--set", f"cluster.migration_stuck_seconds={STUCK_SECONDS}"]
    async with serving_process(command, listen):
        yield admin


@pytest.fixture(params=ENGINES)
def start_cluster(request: pytest.FixtureRequest) -> ClusterStarter:
    return partial(running_cluster, engine_named(request.param))


async def test_what_others_do_is_told(start_cluster: ClusterStarter, tmp_path: Path) -> None:
    """A reshard is one migration with a beginning and an end; a slot left open is called stuck; a failover says who
    took whose place, with the evidence. Each within a second of what happened."""
    async with (
        start_cluster(node_timeout_ms=NODE_TIMEOUT_MS) as cluster,
        watched(cluster, tmp_path / "topology.sqlite") as seen,
    ):
        assert (await seen.wait_event("cluster_seen"))["number"] == 2  # after who looks
        await _reshard(seen)
        await _leave_open(seen)
        await _fail_over(seen)
        numbers = [event["number"] for event in await seen.events()]
        assert numbers == list(range(1, len(numbers) + 1))


async def _reshard(seen: Watched) -> None:
    source, target, _ = seen.cluster.primaries
    before = (await seen.get("/v1/topology"))["epoch"]
    began_at = time.time()
    moved = await move_slots_with_cli(seen.cluster, source, target, 12)
    ended_at = time.time()
    done = await seen.wait_event("migration_completed")
    (begun,) = await seen.events("migration_begun")
    assert began_at <= _unix(begun) <= began_at + TOLD_SECONDS + SLACK_SECONDS
    assert _unix(done) <= ended_at + TOLD_SECONDS + SLACK_SECONDS
    assert done["nodes"] == begun["nodes"] == [source.id, target.id]
    assert _slots(done) == list(moved)
    assert done["epoch"] >= before
    advanced = await seen.events("migration_advanced")
    assert sorted(slot for event in advanced for slot in _slots(event)) == list(moved)
    assert {event["seen_by"] for event in advanced} == {done["seen_by"]}
    (record,) = (await seen.get("/v1/migrations"))["migrations"]
    assert [stage["stage"] for stage in record["stages"]] == ["moving", "completed"]


async def _leave_open(seen: Watched) -> None:
    """An operator's mistake: a slot is opened and nobody moves it."""
    source, target, _ = seen.cluster.primaries
    slot = 100
    await seen.cluster.call(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
    await seen.cluster.call(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
    await seen.wait_event("migration_begun", lambda event: _slots(event) == [slot])
    await trio.sleep(STUCK_SECONDS)
    stuck = await seen.wait_event("migration_stuck")
    assert _slots(stuck) == [slot]
    assert str(source.address) in stuck["message"]
    with trio.fail_after(4):  # health names what lasts
        while not any("100" in warning for warning in (await seen.get("/healthz"))["warnings"]):
            await trio.sleep(0.1)
    for node in (source, target):
        await seen.cluster.call(node, "CLUSTER", "SETSLOT", slot, "STABLE")
    closed_at = time.time()
    abandoned = await seen.wait_event("migration_abandoned")
    assert _unix(abandoned) <= closed_at + TOLD_SECONDS + SLACK_SECONDS
    assert _slots(abandoned) == [slot]


async def _fail_over(seen: Watched) -> None:
    victim = seen.cluster.primaries[2]
    (replica,) = [node for node in seen.cluster.replicas if node.primary is victim]
    before = (await seen.get("/v1/topology"))["epoch"]
    await _write_to(seen.cluster, victim)
    await seen.cluster.kill(victim)
    await seen.wait_event("primary_lost", lambda event: victim.id in event["nodes"])
    promoted_at = await _promotion(seen.cluster, replica)
    failover = await seen.wait_event("failover")
    assert _unix(failover) <= promoted_at + TOLD_SECONDS + SLACK_SECONDS
    assert failover["nodes"][:2] == [replica.id, victim.id]
    assert failover["epoch"] > before
    assert failover["evidence"]["offset"] > 0
    assert str(replica.address) in failover["message"]
    await seen.cluster.restart(victim)
    with trio.fail_after(20):
        while not await seen.events("replica_recovered"):
            await trio.sleep(0.1)


async def _write_to(cluster: Cluster, node: Node) -> None:
    """So that there is an offset to tell."""
    for number in range(50):
        with suppress(ServerError):  # another node's
            await cluster.call(node, "SET", f"key-{number}", "value")


async def _promotion(cluster: Cluster, replica: Node) -> float:
    """Unix seconds at which the replica began to call itself a primary."""
    with trio.fail_after(20):
        while (await cluster.call(replica, "ROLE"))[0] != b"master":
            await trio.sleep(0.01)
    return time.time()


async def test_nodes_that_come_and_go_are_told(start_cluster: ClusterStarter, tmp_path: Path) -> None:
    """A node that is forgotten by all is removed; when it is met again it is added."""
    async with start_cluster() as cluster, watched(cluster, tmp_path / "topology.sqlite") as seen:
        leaving = cluster.replicas[0]
        others = [node for node in cluster.nodes if node is not leaving]
        await cluster.call(leaving, "CLUSTER", "RESET", "HARD")
        for node in others:
            await cluster.call(node, "CLUSTER", "FORGET", leaving.id)
        removed = await seen.wait_event("node_removed")
        assert removed["nodes"][0] == leaving.id
        new_id = (await cluster.call(leaving, "CLUSTER", "MYID")).decode()
        await cluster.call(leaving, "CLUSTER", "MEET", others[0].address.host, others[0].address.port)
        with trio.fail_after(20):
            while not any(new_id in event["nodes"] for event in await seen.events("node_added")):
                await trio.sleep(0.1)


async def test_an_atomic_migration_is_one_record(tmp_path: Path) -> None:
    """Valkey's own: its job is named, with its states, though the hand-over takes no longer than some milliseconds."""
    async with (
        running_cluster(engine_named("valkey-9.1")) as cluster,
        watched(cluster, tmp_path / "topology.sqlite") as seen,
    ):
        source, target, _ = cluster.primaries
        slots = sorted((await cluster.map_at(source)).owned_by(source.id))[:3]
        await move_slots_atomically(cluster, slots, target)
        done = await seen.wait_event("migration_completed")
        assert _slots(done) == slots
        (record,) = (await seen.get("/v1/migrations"))["migrations"]
        assert record["kind"] == "atomic"
        assert len(await seen.events("migration_begun")) == 1


async def test_a_fleet_shares_one_record(tmp_path: Path) -> None:
    """Two proxies and one file: one looks, all see; when it is killed, another goes on within seconds and says for
    how long nobody looked. No event is lost, doubled or out of order."""
    file = tmp_path / "topology.sqlite"
    async with (
        running_cluster(engine_named("redis-7.0")) as cluster,
        a_proxy(cluster, file) as first,
        a_proxy(cluster, file) as second,
    ):
        follower = Watched(cluster, second, file)
        await follower.wait_event("cluster_seen")
        discoverers = {(await follower.get("/v1/topology"))["record"]["discoverer"]}
        leader = Watched(cluster, first, file)
        discoverers.add((await leader.get("/v1/topology"))["record"]["discoverer"])
        (discoverer,) = discoverers
        source, target, _ = cluster.primaries
        await move_slots_with_cli(cluster, source, target, 4)
        assert _slots(await follower.wait_event("migration_completed")) == [0, 1, 2, 3]
        assert await _shards(leader) == await _shards(follower)
        pid = int(discoverer.split("-")[-2])
        os.kill(pid, signal.SIGSTOP)  # worse than its death: it holds its connections
        try:
            with trio.fail_after(10):
                while (await follower.get("/v1/topology"))["record"]["discoverer"] in (None, discoverer):
                    await trio.sleep(0.1)
            await move_slots_with_cli(cluster, target, source, 4)
            with trio.fail_after(10):
                while len(await follower.events("migration_completed")) < 2:
                    await trio.sleep(0.1)
        finally:
            os.kill(pid, signal.SIGCONT)
        await trio.sleep(1.0)
        change = (await leader.events("discoverer_changed"))[-1]
        assert change["evidence"]["former"] == discoverer
        assert change["evidence"]["former_said_so"] is False
        numbers = [event["number"] for event in await leader.events()]
        assert numbers == list(range(1, len(numbers) + 1))
        assert await _shards(leader) == await _shards(follower)


async def _shards(seen: Watched) -> Any:
    """By the topology; but for what each proxy asks the nodes, which is its own."""
    shards = (await seen.get("/v1/topology"))["shards"]
    for shard in shards:
        for node in (shard["primary"], *shard["replicas"]):
            node.pop("load", None)
    return shards


def _unix(event: Event) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()


def _slots(event: Event) -> list[int]:
    return [slot for low, high in event["slot_ranges"] for slot in range(low, high + 1)]
