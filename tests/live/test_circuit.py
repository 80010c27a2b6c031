"""A replica that stands still is left within a part of its timeout, and gets its reads back slowly.

Promises 1, 2 and 8, on a real cluster and a proxy of its own process: values are right all the while.
"""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable
from itertools import count

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from proxy.embedded.cluster import Node, running_cluster
from proxy.embedded.connection import connected
from routing.slot import slot_of
from routing.topology import Address
from tests.live.campaign import proxies
from tests.live.conftest import engine_named

pytestmark = pytest.mark.live

STALL_SECONDS = 0.1
REPLICA_TIMEOUT_SECONDS = 2.0  # so that a read that nobody recalls shows
LEFT_WITHIN_SECONDS = 1.0  # a busy machine's slack is in it
STOPPED_SECONDS = 1.0
LEVELS = (("EVENTUAL",), ("BOUNDED_STALENESS", 60_000))
VALUE = b"v" * 100
CLIENTS = 8


class Reads:
    """Clients that read one key, and check it."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.slowest_seconds = 0.0
        self.total = 0
        self.since: dict[int, float] = {}  # client -> when it sent what is not answered

    async def run(self, address: Address, number: int) -> None:
        async with connected(address) as client:
            await client.call("STEADY.READ", *LEVELS[number % len(LEVELS)])
            while True:
                self.since[number] = began = trio.current_time()
                assert await client.call("GET", self.key) == VALUE
                self.slowest_seconds = max(self.slowest_seconds, trio.current_time() - began)
                self.total += 1
                await trio.sleep(0.005)

    def begin(self) -> None:
        """Count from now on."""
        self.slowest_seconds, self.total = 0.0, 0

    def slowest(self) -> float:
        """Those that wait still count as well."""
        now = trio.current_time()
        return max(self.slowest_seconds, *(now - since for since in self.since.values()))


class Told:
    """The proxy's metrics."""

    def __init__(self, admin: Address) -> None:
        self.admin = admin

    async def of(self, name: str, label: str, value: object) -> float:
        def get() -> str:
            with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=5) as answer:
                return str(answer.read().decode())

        text = await trio.to_thread.run_sync(get)
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and sample.labels.get(label) == str(value)
        )

    async def until(self, is_so: Callable[[float], bool], name: str, label: str, value: object) -> None:
        with trio.fail_after(15):
            while not is_so(await self.of(name, label, value)):
                await trio.sleep(0.05)


async def test_reads_leave_a_replica_that_stands_still_and_return_slowly() -> None:
    async with running_cluster(engine_named("redis-7.0"), primaries=3, replicas=1) as cluster:
        address, admin = proxies.free_address(), proxies.free_address()
        command = [sys.executable, "-m", "proxy", "serve", f"--listen={address}", f"--admin={admin}"]
        command += [f"--seed={seed}" for seed in cluster.addresses]
        command += ["--set=store.file=memory", f"--set=reads.circuit_stall_seconds={STALL_SECONDS}"]
        command += [f"--set=reads.replica_timeout_seconds={REPLICA_TIMEOUT_SECONDS}"]
        stopped: Node = cluster.replicas[0]
        assert stopped.primary is not None
        owned = await cluster.map_at(cluster.primaries[0])
        key = next(
            key
            for key in (b"key:%d" % number for number in count())
            if owned.owner_of(slot_of(key)).address == stopped.primary.address
        )
        told = Told(admin)
        async with proxies.serving_process(command, address), trio.open_nursery() as nursery:
            async with connected(address) as writer:
                await writer.call("SET", key, VALUE)
            await told.until(lambda readable: readable == 3, "steadyread_replicas", "stage", "readable")
            reads = Reads(key)
            for number in range(CLIENTS):
                nursery.start_soon(reads.run, address, number)
            node = stopped.address
            await told.until(lambda total: total > 200, "steadyread_replica_reads_total", "node", node)

            reads.begin()
            cluster.stop_process(stopped)
            await told.until(bool, "steadyread_circuit_open", "node", node)
            await trio.sleep(STOPPED_SECONDS)
            assert reads.slowest() < LEFT_WITHIN_SECONDS
            assert reads.total > 200
            assert await told.of("steadyread_circuit_openings_total", "node", node) == 1
            assert await told.of("steadyread_replica_refusals_total", "reason", "stalled") > 0

            cluster.cont(stopped)
            await told.until(lambda is_open: not is_open, "steadyread_circuit_open", "node", node)
            before = await told.of("steadyread_replica_reads_total", "node", node)
            reads.begin()
            await trio.sleep(1.0)
            at_replica = await told.of("steadyread_replica_reads_total", "node", node) - before
            assert 0 < at_replica < 0.3 * reads.total  # 5 and 10 %, and what a busy machine may add
            assert reads.slowest() < LEFT_WITHIN_SECONDS
            nursery.cancel_scope.cancel()
