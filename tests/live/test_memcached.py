"""The real memcached behind proxies that read at snapshots: what it answers, and how it is done without."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest
import trio
from pymemcache.client.base import Client

from proxy.cache.memcached import FORMAT, HEAD_BYTES, IDENTITY_BYTES, entry_of
from proxy.embedded.cluster import Cluster
from proxy.embedded.connection import Connection, connected
from routing.topology import Address
from tests.live.campaign.proxies import free_address, serving_process
from tests.live.conftest import ClusterStarter

PROGRAM = "/usr/bin/memcached"
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(
        not shutil.which(PROGRAM), reason=f"Debian's memcached is not here: {PROGRAM} is missing"
    ),
    pytest.mark.parametrize("engine", ["redis-7.0"], indirect=True),
]

TIMEOUT_SECONDS = 0.1  # so much that only what stands still is late on a busy machine
NODE_SECONDS_MAX = 0.5  # for a pipeline of reads, by far
FOUND_SECONDS_MAX = 5.0
KEYS = [f"key:{number}" for number in range(120)]
WRITTEN = KEYS[::3]  # after the cut
EXPIRING = KEYS[1::30]
ABSENT = [f"absent:{number}" for number in range(10)]
ALL = [*KEYS, *ABSENT]
EXPECTED = [b"old-%d" % number for number in range(len(KEYS))] + [None] * len(ABSENT)


class Served:
    """A proxy, a client of it, and its metrics."""

    def __init__(self, client: Connection, admin: Address) -> None:
        self.client = client
        self._admin = admin
        self.slowest = 0.0  # seconds of a pipeline of reads

    async def read(
        self, snapshot_id: object, keys: Sequence[str] = ALL, times: int = 1
    ) -> list[bytes | None]:
        """The same each time. Each key twice in turn: the second is a read again, whatever other keys are read."""
        await self.client.call("STEADY.READ", "SNAPSHOT", snapshot_id)
        replies: list[bytes | None] = []
        for _ in range(times):
            began = trio.current_time()
            twice = await self.client.call_all([("GET", key) for key in keys for _ in range(2)])
            self.slowest = max(self.slowest, trio.current_time() - began)
            again = twice[::2]
            assert twice[1::2] == again
            assert not replies or again == replies
            replies = again
        return replies

    async def metric(self, name: str) -> float:
        """``name`` with its labels, as on the page."""
        async with await trio.open_tcp_stream(*self._admin) as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            page = b"".join([chunk async for chunk in stream]).decode()
        [line] = [line for line in page.splitlines() if line.startswith(f"steadyread_snapshot_cache_{name} ")]
        return float(line.rpartition(" ")[2])

    async def wait_metric(self, name: str, is_right: Callable[[float], bool]) -> None:
        with trio.fail_after(FOUND_SECONDS_MAX):
            while not is_right(await self.metric(name)):
                await trio.sleep(0.02)


def command_of(address: Address, megabytes: int = 64) -> list[str]:
    place = ["-l", address.host, "-p", str(address.port), "-U", "0", "-m", str(megabytes), "-I", "512k"]
    return [PROGRAM, "-u", getpass.getuser(), *place]


@asynccontextmanager
async def memcached_at(address: Address, megabytes: int = 64) -> AsyncIterator[trio.Process]:
    process = await trio.lowlevel.open_process(command_of(address, megabytes))
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@asynccontextmanager
async def proxies(
    cluster: Cluster, memcached: Address, bytes_max: Sequence[int]
) -> AsyncIterator[list[Served]]:
    """Proxies of one store, that keep so many bytes themselves, and have found memcached."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steadyread-record-")))
        found = []
        for size in bytes_max:
            address, admin = free_address(), free_address()
            command = [sys.executable, "-m", "proxy", "serve", f"--listen={address}", f"--admin={admin}"]
            command += [f"--memcached={memcached}", f"--set=cache.bytes_max={size}"]
            command += [f"--set=cache.memcached_timeout_ms={1000 * TIMEOUT_SECONDS}"]
            command += [
                "--set=cluster.refresh_interval_seconds=0.2"
            ]  # for which the first read at a cut waits
            command += [f"--set=store.file={directory / 'topology.sqlite'}"]
            command += [f"--seed={seed}" for seed in cluster.addresses[:3]]
            await stack.enter_async_context(serving_process(command, address))
            found.append(Served(await stack.enter_async_context(connected(address)), admin))
        yield found


async def open_snapshot(writer: Connection) -> object:
    """With all kinds of keys: as they were, written since, that expire, and absent ones."""
    await writer.call_all([("SET", key, f"old-{number}") for number, key in enumerate(KEYS)])
    await writer.call_all([("PEXPIRE", key, 600_000) for key in EXPIRING])
    snapshot_id: object = await writer.call("STEADY.SNAPSHOT", "OPEN")
    await writer.call_all([("SET", key, "new") for key in WRITTEN])
    await writer.call_all([("SET", key, "new") for key in ABSENT[::2]])
    return snapshot_id


@asynccontextmanager
async def asking(memcached: Address) -> AsyncIterator[Client]:
    with closing(Client((memcached.host, memcached.port), timeout=5, default_noreply=False)) as client:
        yield client


def names_in(memcached: Address) -> list[str]:
    """All keys that it has, but for probes. pymemcache gives the last part of a long listing only."""
    with socket.create_connection(memcached, timeout=5) as asking:
        asking.sendall(b"lru_crawler metadump all\r\n")
        page = b""
        while not page.endswith(b"END\r\n"):
            page += asking.recv(1 << 16)
    words = [line.split()[0].removeprefix("key=") for line in page.decode().splitlines()[:-1]]
    return [word.replace("%3A", ":") for word in words if "probe" not in word]


async def test_proxies_share_what_they_read_and_take_only_what_fits(share_cluster: ClusterStarter) -> None:
    memcached = free_address()
    async with (
        share_cluster() as cluster,
        memcached_at(memcached),
        proxies(cluster, memcached, [1 << 26, 0]) as (first, second),
        asking(memcached) as client,
    ):
        for each in (first, second):
            await each.wait_metric("l2_is_bypassed", lambda value: value == 0)
        snapshot_id = await open_snapshot(first.client)
        assert await first.read(snapshot_id, times=3) == EXPECTED
        kept = len(ALL) - len(EXPIRING)
        await first.wait_metric("l2_fills_total", lambda value: value == kept)
        a, b, c, d, *_ = names = names_in(memcached)
        assert len(names) == kept
        # The second one keeps nothing itself, so that memcached is asked for each key each time.
        assert await second.read(snapshot_id, times=3) == EXPECTED
        assert await second.metric("l2_hits_total") == 3 * kept
        assert await second.metric("l2_fills_total") == 0

        # Entries that do not fit: of another format, cut, of another key, of another snapshot with this number.
        entries: dict[str, bytes] = client.get_many(names)
        client.set(a, b"SR\x00" + entries[a][len(FORMAT) :])
        client.set(b, entries[b][:-3])
        client.set(c, entries[d])
        length = int.from_bytes(entries[d][HEAD_BYTES : HEAD_BYTES + 4], "big")
        subject = entries[d][HEAD_BYTES + 4 : HEAD_BYTES + 4 + length]
        other = bytes(IDENTITY_BYTES) + subject[IDENTITY_BYTES:]
        client.set(d, entry_of(other, b"$5\r\nstale\r\n"))
        assert await second.read(snapshot_id) == EXPECTED
        for reason, count in (("wrong_version", 1), ("damaged", 1), ("mismatch", 2)):
            assert await second.metric(f'l2_failures_total{{reason="{reason}"}}') == count
        await second.wait_metric("l2_fills_total", lambda value: value == 4)  # they are put right
        assert client.get_many(names) == entries

        # What was read at one snapshot answers nothing for the next.
        again = await open_snapshot(first.client)
        await first.client.call("SET", ABSENT[0], "newer")
        assert await second.read(again, times=3) == [*EXPECTED[: len(KEYS)], *[b"new", None] * 5]
        assert await second.read(snapshot_id) == EXPECTED


async def test_reads_do_without_one_that_stands_still_or_is_gone_and_find_it_again(
    share_cluster: ClusterStarter,
) -> None:
    memcached = free_address()
    async with share_cluster() as cluster, proxies(cluster, memcached, [0]) as (served,):
        # It is not there at the start.
        snapshot_id = await open_snapshot(served.client)
        assert await served.read(snapshot_id, times=3) == EXPECTED
        assert await served.metric("l2_is_bypassed") == 1

        async def is_used() -> None:
            """It is found, and answers."""
            await served.wait_metric("l2_is_bypassed", lambda value: value == 0)
            before = await served.metric("l2_hits_total")
            with trio.fail_after(FOUND_SECONDS_MAX):
                while await served.metric("l2_hits_total") == before:
                    assert await served.read(snapshot_id) == EXPECTED

        async with memcached_at(memcached) as process:
            await is_used()
            served.slowest = 0.0
            os.kill(process.pid, signal.SIGSTOP)
            assert await served.read(snapshot_id, times=20) == EXPECTED
            assert await served.metric("l2_is_bypassed") == 1
            assert await served.metric('l2_failures_total{reason="timeout"}') >= 1
            os.kill(process.pid, signal.SIGCONT)
            await is_used()
        assert await served.read(snapshot_id, times=3) == EXPECTED
        assert served.slowest < TIMEOUT_SECONDS + NODE_SECONDS_MAX
        assert await served.metric("l2_is_bypassed") == 1
        async with memcached_at(memcached):
            await is_used()


async def test_one_that_is_full_changes_nothing_but_what_it_answers(share_cluster: ClusterStarter) -> None:
    memcached = free_address()
    keys = [f"key:{number}" for number in range(6000)]
    expected = [b"%d " % number * 100 for number in range(len(keys))]
    async with (
        share_cluster() as cluster,
        memcached_at(memcached, megabytes=1),
        proxies(cluster, memcached, [0]) as (served,),
        asking(memcached) as client,
    ):
        await served.wait_metric("l2_is_bypassed", lambda value: value == 0)
        await served.client.call_all(
            [("SET", key, value.decode()) for key, value in zip(keys, expected, strict=True)]
        )
        snapshot_id = await served.client.call("STEADY.SNAPSHOT", "OPEN")
        for first in range(0, len(keys), 500):
            part = slice(first, first + 500)
            assert await served.read(snapshot_id, keys[part], times=3) == expected[part]
        assert int(client.stats()[b"evictions"]) > 0
        assert await served.metric("l2_hits_total") > 0
        assert await served.metric("l2_is_bypassed") == 0
