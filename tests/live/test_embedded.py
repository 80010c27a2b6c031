"""The embedded cluster on every engine at hand: it forms, moves slots, survives kills, and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from proxy.embedded.cluster import Cluster, ClusterError, Node, running_cluster
from proxy.embedded.connection import ServerError
from proxy.embedded.engine import find_engine
from proxy.embedded.moves import (
    MoveError,
    move_slot_stepwise,
    move_slots_atomically,
    move_slots_with_cli,
)
from routing.slot import slot_of
from tests.live.conftest import ClusterStarter

pytestmark = pytest.mark.live

KEYS = 250
TAG = b"{steady}"


async def owner_of(cluster: Cluster, slot: int) -> Node:
    return cluster.node_at((await cluster.map_at(cluster.nodes[0])).owner_of(slot).address)


async def owners_at_each_node(cluster: Cluster, slot: int) -> set[str]:
    return {(await cluster.map_at(node)).owner_of(slot).id for node in cluster.nodes}


async def write_keys(cluster: Cluster, tag: bytes) -> None:
    node = await owner_of(cluster, slot_of(tag))
    async with cluster.connection(node) as connection:
        replies = await connection.call_all([("SET", b"%b%d" % (tag, n), n) for n in range(KEYS)])
    assert replies == [b"OK"] * KEYS


async def values_at(cluster: Cluster, node: Node, tag: bytes) -> list[bytes | None]:
    values: list[bytes | None] = await cluster.call(node, "MGET", *[b"%b%d" % (tag, n) for n in range(KEYS)])
    return values


VALUES = [b"%d" % n for n in range(KEYS)]


async def test_a_cluster_forms_moves_slots_and_survives_kills(start_cluster: ClusterStarter) -> None:
    """3+3 nodes serve; a slot moves each way in each manner with all its keys; killed nodes come back; at the
    end no server runs."""
    async with start_cluster(node_timeout_ms=1500) as cluster:
        pids = [node.process.pid for node in cluster.nodes if node.process]
        assert len(pids) == 6
        await every_node_knows_its_part(cluster)
        await slots_move_stepwise(cluster)
        await slots_move_by_the_cli(cluster)
        await slots_move_atomically(cluster)
        await a_killed_replica_returns(cluster)
        await a_killed_primary_is_replaced(cluster)
        where = cluster.directory
    assert [pid for pid in pids if is_alive(pid)] == []
    assert not where.exists()


async def every_node_knows_its_part(cluster: Cluster) -> None:
    for node in cluster.primaries:
        assert (await cluster.call(node, "ROLE"))[0] == b"master"
    for node in cluster.replicas:
        assert node.primary is not None
        assert (await cluster.call(node, "ROLE"))[:4] == [
            b"slave",
            b"127.0.0.1",
            node.primary.address.port,
            b"connected",
        ]
    assert (await cluster.call(cluster.nodes[0], "CLUSTER", "INFO")).startswith(b"cluster_state:ok")


async def slots_move_stepwise(cluster: Cluster) -> None:
    slot = slot_of(TAG)
    await write_keys(cluster, TAG)
    home = await owner_of(cluster, slot)
    away = next(node for node in cluster.primaries if node is not home)
    halves: list[int] = []

    async def count_both() -> None:
        halves.extend([await cluster.call(node, "CLUSTER", "COUNTKEYSINSLOT", slot) for node in (home, away)])

    reached = trio.Event()
    async with trio.open_nursery() as nursery:

        async def look_at_the_half() -> None:
            await reached.wait()
            await count_both()

        nursery.start_soon(look_at_the_half)
        await move_slot_stepwise(cluster, slot, away, half_moved_seconds=0.3, on_half_moved=reached.set)
    assert halves == [KEYS // 2, KEYS // 2]
    assert await values_at(cluster, away, TAG) == VALUES
    assert await owners_at_each_node(cluster, slot) == {away.id}

    await move_slot_stepwise(cluster, slot, home, batch_keys=7)
    assert await values_at(cluster, home, TAG) == VALUES
    assert await owners_at_each_node(cluster, slot) == {home.id}


async def slots_move_by_the_cli(cluster: Cluster) -> None:
    first, second, _ = cluster.primaries
    assert await move_slots_with_cli(cluster, first, second, 2) == (0, 1)
    assert await owners_at_each_node(cluster, 0) == {second.id}
    assert await move_slots_with_cli(cluster, second, first, 2) == (0, 1)
    assert await owners_at_each_node(cluster, 1) == {first.id}


async def slots_move_atomically(cluster: Cluster) -> None:
    slot = slot_of(TAG)
    home = await owner_of(cluster, slot)
    away = next(node for node in cluster.primaries if node is not home)
    if not cluster.engine.moves_slots_atomically:
        with pytest.raises(MoveError):
            await move_slots_atomically(cluster, [slot], away)
        return
    for target in (away, home):
        await move_slots_atomically(cluster, [slot], target)
        assert await values_at(cluster, target, TAG) == VALUES
        assert await owners_at_each_node(cluster, slot) == {target.id}


async def a_killed_replica_returns(cluster: Cluster) -> None:
    replica = cluster.replicas[0]
    assert replica.primary is not None
    await cluster.kill(replica)
    with pytest.raises(ClusterError):
        await cluster.kill(replica)
    await cluster.restart(replica)
    await cluster.wait_serving()
    assert (await cluster.call(replica, "ROLE"))[3] == b"connected"


async def a_killed_primary_is_replaced(cluster: Cluster) -> None:
    slot = slot_of(TAG)
    primary = await owner_of(cluster, slot)
    (replica,) = [node for node in cluster.replicas if node.primary is primary]
    await cluster.kill(primary)
    with trio.fail_after(20):
        while True:
            if (await cluster.call(replica, "ROLE"))[0] == b"master":
                break
            await trio.sleep(0.05)
    await cluster.restart(primary)
    await cluster.wait_serving()
    assert await owners_at_each_node(cluster, slot) == {replica.id}
    assert await values_at(cluster, replica, TAG) == VALUES


async def test_a_frozen_node_keeps_its_connections_and_continues() -> None:
    """SIGSTOP silences a node without closing anything; SIGCONT gives the answer that was owed."""
    async with running_cluster(find_engine(), primaries=3, replicas=0) as cluster:
        node = cluster.nodes[0]
        async with cluster.connection(node) as connection:
            await connection.call("PING")
            cluster.stop_process(node)
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    assert await connection.call("ECHO", "owed") == b"owed"

                nursery.start_soon(ask)
                with trio.move_on_after(0.2) as silent:
                    await cluster.call(node, "PING")
                assert silent.cancelled_caught
                cluster.cont(node)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_the_servers_end_with_a_parent_that_is_killed(ending: signal.Signals) -> None:
    """A parent that dies by a signal, unasked and without clean-up, leaves no server and no directory."""
    script = (
        "import trio\n"
        "from proxy.embedded.cluster import running_cluster\n"
        "from proxy.embedded.engine import find_engine\n"
        "async def main():\n"
        "    async with running_cluster(find_engine(), primaries=3, replicas=0) as cluster:\n"
        "        print(cluster.directory, *[n.process.pid for n in cluster.nodes], flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        directory, *pids = parent.stdout.readline().split()
        assert len(pids) == 3
        assert all(is_alive(int(pid)) for pid in pids)
        parent.send_signal(ending)
    end = time.monotonic() + 10
    while Path(directory).exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(directory).exists()
    assert [pid for pid in pids if is_alive(int(pid))] == []


async def test_an_exception_or_a_cancellation_leaves_nothing_running() -> None:
    """However the block ends, its servers end with it."""
    engine = find_engine()
    pids: list[int] = []
    with trio.move_on_after(60) as scope:
        async with running_cluster(engine, primaries=3, replicas=0) as cluster:
            pids += [node.process.pid for node in cluster.nodes if node.process]
            scope.cancel()
            await trio.sleep_forever()

    async def fail() -> None:
        async with running_cluster(engine, primaries=3, replicas=0) as cluster:
            pids.extend(node.process.pid for node in cluster.nodes if node.process)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert len(pids) == 6
    assert [pid for pid in pids if is_alive(pid)] == []


async def test_a_server_that_cannot_start_says_why() -> None:
    """A wrong option ends in an error with the server's own words, not in a wait."""
    with pytest.raises(ClusterError, match="no-such-option"):
        async with running_cluster(find_engine(), extra=("--no-such-option", "1")):
            pass


async def test_error_replies_are_values_in_a_pipeline_and_raised_alone(share_cluster: ClusterStarter) -> None:
    """The connection decodes what servers of each engine answer."""
    async with (
        share_cluster(replicas=1) as cluster,
        cluster.connection(await owner_of(cluster, slot_of(b"k"))) as connection,
    ):
        with pytest.raises(ServerError, match="unknown command") as refused:
            await connection.call("NOSUCHCOMMAND")
        assert refused.value.code == "ERR"
        replies = await connection.call_all(
            [("SET", "k", b"a\r\nb"), ("GET", "k"), ("LPUSH", "k", 1), ("GET", "{k}2"), ("EXISTS", "k")]
        )
    assert replies[:2] == [b"OK", b"a\r\nb"]
    assert isinstance(replies[2], ServerError)
    assert replies[2].code == "WRONGTYPE"
    assert replies[3:] == [None, 1]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended but waits to be collected does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
