"""Replicas and primaries freeze, die, come back empty or are deposed: reads stay right, or are refused with a reason.

Promises 2, 8 and 9, on real servers and a proxy of its own process. ``tests.live.levels`` checks the levels while links
are cut and slots move; here are the single faults, each made at the moment when it could do most harm.
"""

from __future__ import annotations

import json
import signal
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Any

import pytest
import trio

from proxy.embedded.cluster import Cluster, Node, running_cluster
from proxy.embedded.connection import Argument, Connection, ServerError, connected
from routing.levels import Level
from routing.topology import Address
from tests.live.campaign import proxies
from tests.live.conftest import engine_named
from tests.live.levels.links import SMALL_BACKLOG_BYTES, cut
from tests.live.levels.targets import ReadCounts, reads_in

REPLICA_TIMEOUT_SECONDS = 0.25  # the proxy's default
SAVED = "dump.rdb"  # what a node keeps of a synchronisation, and loads when it starts
BEAT_SECONDS = 0.1  # at which silent connections are found, and nodes sampled
BOUND_SECONDS = 0.3
SLACK_SECONDS = 0.6  # for a busy test machine
KEYS = [b"key:%d" % number for number in range(8)]
LEVELS: dict[Level, tuple[Argument, ...]] = {
    Level.CAUGHT_UP: ("CAUGHT_UP",),
    Level.BOUNDED_STALENESS: ("BOUNDED_STALENESS", int(BOUND_SECONDS * 1000)),
    Level.SESSION: ("SESSION",),
    Level.EVENTUAL: ("EVENTUAL",),
}
PACE_SECONDS = 0.002  # between two commands of one client
pytestmark = pytest.mark.live


# -- the proxy


@dataclass(frozen=True, slots=True)
class Served:
    """A proxy that serves a cluster."""

    cluster: Cluster
    address: Address
    admin: Address
    process: trio.Process

    async def replicas(self) -> dict[Node, dict[str, Any]]:
        """What it knows of each replica in its view now: ``live`` of /v1/replicas."""
        listed = json.loads(await self._get("/v1/replicas"))["replicas"]
        return {
            self.cluster.node_at(Address.parse(one["address"])): one["live"]
            for one in listed
            if one["live"] is not None
        }

    async def wait_readable(self, *nodes: Node, seconds: float = 10.0) -> None:
        """Return once each of ``nodes`` is readable."""
        seen: dict[Node, dict[str, Any]] = {}
        with trio.move_on_after(seconds):
            while True:
                seen = await self.replicas()
                if all(node in seen and seen[node]["stage"] == "readable" for node in nodes):
                    return
                await trio.sleep(0.02)
        raise AssertionError(
            f"not readable: { {str(n): (f['stage'], f['why_not']) for n, f in seen.items()} }"
        )

    async def reads(self, level: Level) -> ReadCounts:
        counted = reads_in(await self._get("/metrics"), level)
        assert counted is not None
        return counted

    async def _get(self, path: str) -> str:
        def get() -> str:
            with urllib.request.urlopen(f"http://{self.admin}{path}", timeout=5) as answer:
                return str(answer.read().decode())

        return await trio.to_thread.run_sync(get)


@asynccontextmanager
async def _serving(
    cluster: Cluster, *settings: str, program: Sequence[str] = ("-m", "proxy")
) -> AsyncIterator[Served]:
    address, admin = proxies.free_address(), proxies.free_address()
    command = [sys.executable, *program, "serve", f"--listen={address}", f"--admin={admin}"]
    command += [f"--seed={seed}" for seed in cluster.addresses]
    command += [f"--set={setting}" for setting in ("store.file=memory", *settings)]
    async with proxies.serving_process(command, address) as process:
        yield Served(cluster, address, admin, process)


# -- the load


@dataclass
class Load:
    """Clients that write ascending versions, and readers of each level that check every reply."""

    address: Address
    acknowledged: dict[bytes, list[tuple[float, int]]] = field(
        default_factory=lambda: {key: [] for key in KEYS}
    )  # key -> (when it was known to be acknowledged, version), ascending
    reads: Counter[Level] = field(default_factory=Counter)
    waiting_since: dict[Connection, float] = field(default_factory=dict)  # of readers that have no reply yet
    slowest_seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def check(self) -> None:
        assert self.wrong == []
        assert min(self.reads[level] for level in LEVELS) > 50  # fewer would show little

    def _needed(self, key: bytes, at: float) -> int:
        """The version that was acknowledged last at ``at`` (Trio's clock)."""
        return max((version for when, version in self.acknowledged[key] if when <= at), default=0)

    async def write(self) -> None:
        async with connected(self.address) as connection:
            for version in count(1):
                key = KEYS[version % len(KEYS)]
                await connection.call("SET", key, version)
                self.acknowledged[key].append((trio.current_time(), version))
                del self.acknowledged[key][:-1000]
                await trio.sleep(PACE_SECONDS)

    async def read(self, level: Level, number: int) -> None:
        """Reads of one client. One of level session writes between its reads, to a key of its own."""
        seen: Counter[bytes] = Counter()
        own = b"own:%d" % number
        async with connected(self.address) as connection:
            await connection.call("STEADY.READ", *LEVELS[level])
            for turn in count(1):
                if level is Level.SESSION and turn % 5 == 0:
                    await connection.call("SET", own, turn)
                    await self._take(connection, level, own, turn)
                key = KEYS[turn % len(KEYS)]
                bound = {Level.CAUGHT_UP: 0.0, Level.BOUNDED_STALENESS: BOUND_SECONDS}.get(level, inf)
                needed = self._needed(key, trio.current_time() - bound)
                if level is Level.SESSION:
                    needed = seen[key]
                seen[key] = await self._take(connection, level, key, needed)
                await trio.sleep(PACE_SECONDS)

    async def _take(self, connection: Connection, level: Level, key: bytes, needed: int) -> int:
        began = self.waiting_since[connection] = trio.current_time()
        (reply,) = await connection.call_all([("GET", key)])
        del self.waiting_since[connection]
        self.reads[level] += 1
        self.slowest_seconds = max(self.slowest_seconds, trio.current_time() - began)
        if isinstance(reply, bytes) and int(reply) >= needed:
            return int(reply)
        self.wrong.append(f"{level.value} {key!r}: {reply!r}, at least {needed} was to be seen")
        return needed


@asynccontextmanager
async def _load(served: Served) -> AsyncIterator[Load]:
    """Every key is there before, and has been read at each level."""
    load = Load(served.address)
    async with connected(served.address) as warm:
        await warm.call_all([("SET", key, "0") for key in KEYS])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.write)
        for level in LEVELS:
            for number in range(2):
                nursery.start_soon(load.read, level, number)
        with trio.fail_after(5):
            while min(load.reads[level] for level in LEVELS) < 20:
                await trio.sleep(0.01)
        yield load
        waits = [trio.current_time() - since for since in load.waiting_since.values()]
        load.slowest_seconds = max(load.slowest_seconds, *waits, 0.0)
        nursery.cancel_scope.cancel()


async def _wait_reads_at(served: Served, node: Node) -> None:
    """Return once the replica gets reads again."""
    before = (await served.replicas())[node]["reads_total"]
    with trio.fail_after(5):
        while (await served.replicas())[node]["reads_total"] <= before + 10:
            await trio.sleep(0.02)


# -- 1: a frozen replica


FREEZE_TIMEOUT_SECONDS = 0.35  # within it a frozen replica's reads are not taken from it yet


async def test_a_frozen_replica_holds_no_read_up_and_its_old_data_is_not_served() -> None:
    small = running_cluster(engine_named("redis-7.0"), primaries=1, replicas=1)
    patient = f"reads.replica_timeout_seconds={FREEZE_TIMEOUT_SECONDS}"
    async with small as cluster, _serving(cluster, patient) as served:
        replica = cluster.replicas[0]
        await served.wait_readable(replica)
        async with _load(served) as load:
            cluster.stop_process(replica)
            await trio.sleep(FREEZE_TIMEOUT_SECONDS + BEAT_SECONDS + SLACK_SECONDS)
            cluster.cont(replica)
            await served.wait_readable(replica)
            await _wait_reads_at(served, replica)
        load.check()
        assert load.slowest_seconds < FREEZE_TIMEOUT_SECONDS + BEAT_SECONDS + SLACK_SECONDS / 2
        await _outlive_its_history(served)


async def _outlive_its_history(served: Served) -> None:
    """The primary comes back empty, with a new history, while its replica is frozen with a larger offset.

    The proxy has no reason yet to leave the replica: it sends it reads, which are answered when it goes on.
    """
    cluster, primary, replica = served.cluster, *served.cluster.nodes
    async with connected(served.address) as client:
        await client.call_all([("SET", key, "old") for key in KEYS])
    async with cluster.connection(primary) as direct:
        await direct.call("SET", KEYS[0], "old")
        assert await direct.call("WAIT", 1, 2000) == 1
    replies: list[tuple[Level, Any]] = []

    async def read(level: Level) -> None:
        async with connected(served.address) as reader:
            *_, reply = await reader.call_all([("STEADY.READ", *LEVELS[level]), ("GET", KEYS[0])])
            replies.append((level, reply))

    cluster.stop_process(replica)
    await cluster.kill(primary)
    (primary.directory / SAVED).unlink()
    await cluster.restart(primary)
    restarted = trio.current_time()
    async with trio.open_nursery() as nursery:
        for turn in range(50):
            if turn == 10:
                cluster.cont(replica)
            nursery.start_soon(read, Level.CAUGHT_UP)
            nursery.start_soon(read, Level.SESSION)
            if trio.current_time() - restarted > BOUND_SECONDS:
                nursery.start_soon(read, Level.BOUNDED_STALENESS)
            await trio.sleep(0.01)
        # A primary that starts serves nothing for two seconds; reads wait for it.
    assert {level for level, _ in replies} == {Level.CAUGHT_UP, Level.SESSION, Level.BOUNDED_STALENESS}
    assert [one for one in replies if one[1] is not None] == []
    async with connected(served.address) as client:
        await client.call("SET", KEYS[0], "new")
        await client.call("STEADY.READ", "CAUGHT_UP")
        assert await client.call("GET", KEYS[0]) == b"new"


# -- 2: a full synchronisation

FILLER_KEYS = 1500
SLOW_LOADING = ("--key-load-delay", "150", "--loading-process-events-interval-bytes", "1024")
SAVE_DELAY = "rdb-key-save-delay"


async def test_a_replica_that_is_sent_the_data_set_serves_nothing_of_it() -> None:
    """One that is readable and has to load everything anew; one that joins with nothing. Each for half a second."""
    slow = running_cluster(engine_named("redis-7.0"), primaries=1, replicas=1, extra=SLOW_LOADING)
    async with slow as cluster, _serving(cluster, "reads.sample_interval_seconds=0.2") as served:
        primary, replica = cluster.nodes
        async with cluster.connection(primary) as connection:
            await connection.call_all([("SET", b"filler:%d" % n, "x" * 100) for n in range(FILLER_KEYS)])
        await served.wait_readable(replica)
        async with _load(served) as load:
            loading = await _load_anew(cluster, primary, replica)
            await served.wait_readable(replica)
            await _wait_reads_at(served, replica)
            await cluster.call(primary, "CONFIG", "SET", SAVE_DELAY, 150)
            await cluster.kill(replica)
            (replica.directory / SAVED).unlink()
            await cluster.restart(replica)
            assert await cluster.call(replica, "DBSIZE") == 0
            await served.wait_readable(replica)
            await _wait_reads_at(served, replica)
        assert loading > 0.1
        load.check()
        assert load.slowest_seconds < REPLICA_TIMEOUT_SECONDS + BEAT_SECONDS + SLACK_SECONDS


async def _load_anew(cluster: Cluster, primary: Node, replica: Node) -> float:
    """It misses more than its primary keeps, while it is frozen for less than the proxy would leave it for.

    Returns for how many seconds it answered that it is loading.
    """
    async with cluster.connection(primary) as above, cluster.connection(replica) as below:
        await below.call("READONLY")
        await above.call("CONFIG", "SET", "repl-backlog-size", SMALL_BACKLOG_BYTES)
        cluster.stop_process(replica)
        await above.call("CLIENT", "KILL", "TYPE", "replica")
        for _ in range(4):
            await above.call("SET", "large", "x" * SMALL_BACKLOG_BYTES)
        cluster.cont(replica)
        began: float | None = None
        with trio.fail_after(5):
            while True:
                try:
                    await below.call("GET", KEYS[0])
                except ServerError as error:
                    if error.code == "LOADING" and began is None:
                        began = trio.current_time()
                else:
                    if began is not None:
                        return trio.current_time() - began
                await trio.sleep(0.005)


# -- 3: a deposed primary


async def test_the_replica_of_a_deposed_primary_serves_nothing_after_the_new_ones_first_write() -> None:
    """A primary and one replica are cut off from two others, one of which takes over. Both sides take writes.

    They are cut off by forgetting each other: what a node hears from one that it does not know, it drops. So both
    sides answer the proxy all the time. Redis 7.0 does not pass on what it forgot; later engines do.
    """
    wide = running_cluster(engine_named("redis-7.0"), primaries=1, replicas=3)
    async with wide as cluster, _serving(cluster, "reads.settle_seconds=0") as served:
        primary, kept, taking, other = cluster.nodes
        await served.wait_readable(kept, taking, other)
        async with connected(served.address) as client:
            await client.call("SET", KEYS[0], "before")
        await cluster.call(primary, "WAIT", 3, 2000)
        for node in (primary, kept):
            for forgotten in (taking, other):
                await cluster.call(node, "CLUSTER", "FORGET", forgotten.id)
        await cluster.call(taking, "CLUSTER", "FAILOVER", "TAKEOVER")
        async with connected(served.address) as client, trio.open_nursery() as nursery:
            nursery.start_soon(_write_at, cluster, primary)
            with trio.fail_after(10):  # until the proxy has heard of it, which the cut delays for nobody
                while await cluster.call(taking, "GET", KEYS[0]) != b"after":
                    await client.call("SET", KEYS[0], "after")
            replies: Counter[object] = Counter()
            for level in (Level.CAUGHT_UP, Level.BOUNDED_STALENESS):
                nursery.start_soon(_read_on, served.address, level, replies)
            await served.wait_readable(other)
            at_kept = (await served.replicas()).get(kept, {}).get("reads_total", 0)
            await trio.sleep(0.5)
            seen = await served.replicas()
            nursery.cancel_scope.cancel()
        # The other side is as it was: the replica follows, and both think that they are the shard.
        followed = await cluster.call(kept, "ROLE")
        assert (followed[2], followed[3]) == (primary.address.port, b"connected")
        assert set(replies) == {b"after"}
        assert replies[b"after"] > 100
        assert seen[other]["reads_total"] > 0
        assert seen.get(kept, {}).get("reads_total", 0) == at_kept


async def _write_at(cluster: Cluster, primary: Node) -> None:
    """Writes that only a client of the deposed primary sends."""
    async with cluster.connection(primary) as connection:
        while True:
            await connection.call("SET", KEYS[0], "deposed")
            await trio.sleep(PACE_SECONDS)


async def _read_on(address: Address, level: Level, replies: Counter[object]) -> None:
    """Replies that come after the bound, which counts from the new primary's first write."""
    until = trio.current_time() + (BOUND_SECONDS if level is Level.BOUNDED_STALENESS else 0)
    async with connected(address) as connection:
        await connection.call("STEADY.READ", *LEVELS[level])
        while True:
            is_checked = trio.current_time() > until
            try:
                reply = await connection.call("GET", KEYS[0])
            except ServerError as error:
                reply = str(error)
            if is_checked:
                replies[reply] += 1
            await trio.sleep(PACE_SECONDS)


# -- 4: a primary that lost its replicas

RETURN_SECONDS = 10.0


async def test_a_primary_that_lost_its_replicas_serves_all_reads() -> None:
    small = running_cluster(engine_named("valkey-9.1"), primaries=1, replicas=2)
    async with small as cluster, _serving(cluster) as served:
        await served.wait_readable(*cluster.replicas)
        async with _load(served) as load:
            for replica in cluster.replicas:
                await cluster.kill(replica)
            await trio.sleep(0.2)
            before = {level: await served.reads(level) for level in LEVELS}
            await trio.sleep(0.3)
            for level, earlier in before.items():
                grown = await served.reads(level) - earlier
                assert grown.replica == 0
                assert grown.primary > 20
            for replica in cluster.replicas:
                await cluster.restart(replica)
            await served.wait_readable(*cluster.replicas)
            before = {level: await served.reads(level) for level in LEVELS}
            with trio.fail_after(RETURN_SECONDS):  # slowly: their circuits have opened
                while any([(await served.reads(level) - before[level]).replica <= 20 for level in LEVELS]):
                    await trio.sleep(0.1)
        load.check()
        assert load.slowest_seconds < REPLICA_TIMEOUT_SECONDS + BEAT_SECONDS + SLACK_SECONDS


# -- 5: a step of the clock

STEP_SECONDS = 3600
STEPPED_CLOCK = f"""
import signal, sys, time
true_time, steps = time.time, [0]
def step(seconds):
    return lambda number, frame: steps.append(steps.pop() + seconds)
signal.signal(signal.SIGUSR1, step({STEP_SECONDS}))
signal.signal(signal.SIGUSR2, step(-{STEP_SECONDS}))
time.time = lambda: true_time() + steps[0]
from proxy.cli import main
sys.exit(main())
"""


async def test_a_step_of_the_wall_clock_changes_no_proof() -> None:
    """One hour ahead, two hours back: reads stay at the replica, and none is older than its bound."""
    level = Level.BOUNDED_STALENESS
    cluster_of_two = running_cluster(engine_named("valkey-9.1"), primaries=1, replicas=1)
    async with cluster_of_two as cluster, _serving(cluster, program=("-c", STEPPED_CLOCK)) as served:
        primary, replica = cluster.nodes
        await served.wait_readable(replica)
        async with connected(served.address) as client:
            began, stepped = await _uptime(client), 0
            async with _load(served) as load:
                for signals in ((signal.SIGUSR1,), (signal.SIGUSR2, signal.SIGUSR2)):
                    before = await served.reads(level)
                    for number in signals:
                        served.process.send_signal(number)
                        await trio.sleep(0.05)  # two at once would be one
                    await trio.sleep(0.3)
                    stepped = max(stepped, await _uptime(client))
                    share = (await served.reads(level) - before).replica_share
                    assert share is not None
                    assert share > 0.9
            load.check()
            assert stepped - began >= STEP_SECONDS  # it did see the first
            await _stay_within_the_bound(served, client, primary, replica)


async def _stay_within_the_bound(served: Served, client: Connection, primary: Node, replica: Node) -> None:
    """The replica's data is old, and the clock steps back to when it was not."""
    await client.call("STEADY.READ", *LEVELS[Level.BOUNDED_STALENESS])
    await cut(served.cluster, replica, is_full=False)
    await client.call("SET", KEYS[0], "1000000")
    written = trio.current_time()
    served.process.send_signal(signal.SIGUSR2)
    await trio.sleep_until(written + BOUND_SECONDS)
    while trio.current_time() < written + BOUND_SECONDS + 0.3:
        assert await client.call("GET", KEYS[0]) == b"1000000"
    async with served.cluster.connection(replica) as below:
        await below.call("READONLY")
        assert await below.call("GET", KEYS[0]) != b"1000000"  # else there was nothing to be seen


async def _uptime(client: Connection) -> int:
    """The proxy's own, by its wall clock, in seconds."""
    info: bytes = await client.call("INFO", "server")
    return int(info.split(b"uptime_in_seconds:")[1].split()[0])


# -- 6: no primary

LOST_BOUND_SECONDS = 0.6
LOST_DEADLINE_SECONDS = 0.4


@dataclass(frozen=True, slots=True)
class Answer:
    began: float  # seconds after the primary's end
    ended: float
    reply: Any

    @property
    def is_refused(self) -> bool:
        return (
            isinstance(self.reply, ServerError)
            and self.reply.code == "NOTREADY"
            and len(str(self.reply)) > 30
        )


async def test_without_a_primary_each_level_gets_what_it_may_or_a_reason() -> None:
    """Nobody fails over for a minute. No read is quietly answered with less than its level says."""
    lasting = running_cluster(engine_named("valkey-9.1"), primaries=1, replicas=1, node_timeout_ms=60_000)
    deadline = f"cluster.request_deadline_seconds={LOST_DEADLINE_SECONDS}"
    async with lasting as cluster, _serving(cluster, deadline) as served:
        primary, replica = cluster.nodes
        await served.wait_readable(replica)
        answers = await _answers_without_primary(served, primary)
    for name, those in answers.items():
        print(f"{name}: {len(those)} answers, {sum(one.is_refused for one in those)} refused")
        assert all(one.is_refused or one.reply == b"1" for one in those), those
        slowest = max(one.ended - one.began for one in those)
        assert slowest < LOST_DEADLINE_SECONDS + SLACK_SECONDS
    for name in ("strong", "caught_up", "session that wrote"):
        assert all(one.is_refused for one in answers[name])
    for name in ("eventual", "session"):
        assert len(answers[name]) > 20
        assert not any(one.is_refused for one in answers[name])
    assert any(one.is_refused for one in answers["bounded"])
    served_until = max(one.ended for one in answers["bounded"] if not one.is_refused)
    refused_from = min(one.ended for one in answers["bounded"] if one.is_refused)
    print(f"bounded: served until {served_until:.3f} s, refused from {refused_from:.3f} s")
    assert LOST_BOUND_SECONDS - 2 * BEAT_SECONDS - 0.2 < served_until < LOST_BOUND_SECONDS + 0.1
    assert refused_from > served_until


async def _answers_without_primary(served: Served, primary: Node) -> dict[str, list[Answer]]:
    """Kill the primary and ask each level for a while; name -> its answers. The key's value is 1."""
    words: dict[str, tuple[Argument, ...]] = {
        "strong": ("STRONG",),
        "caught_up": ("CAUGHT_UP",),
        "bounded": ("BOUNDED_STALENESS", int(LOST_BOUND_SECONDS * 1000)),
        "session": ("SESSION",),
        "session that wrote": ("SESSION",),
        "eventual": ("EVENTUAL",),
    }
    answers: dict[str, list[Answer]] = {name: [] for name in words}
    killed_at = inf
    is_killed = trio.Event()

    async def ask(name: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with connected(served.address) as client:
            await client.call("STEADY.READ", *words[name])
            if name == "session":
                await client.call("SET", KEYS[0], "1")
            assert await client.call("GET", KEYS[0]) == b"1"
            if name == "session that wrote":
                await client.call("SET", KEYS[1], "1")
            task_status.started()
            await is_killed.wait()
            while True:
                began = trio.current_time() - killed_at
                (reply,) = await client.call_all([("GET", KEYS[0])])
                answers[name].append(Answer(began, trio.current_time() - killed_at, reply))
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        await nursery.start(ask, "session")
        await served.cluster.call(primary, "WAIT", 1, 2000)
        for name in words:
            if name != "session":
                await nursery.start(ask, name)
        await served.cluster.call(primary, "WAIT", 1, 2000)
        await trio.sleep(2 * BEAT_SECONDS)
        await served.cluster.kill(primary)
        killed_at = trio.current_time()
        is_killed.set()
        await trio.sleep(LOST_BOUND_SECONDS + LOST_DEADLINE_SECONDS + 0.5)
        nursery.cancel_scope.cancel()
    return answers
