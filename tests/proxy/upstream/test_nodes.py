"""Keepers by the thousand: started a few at a time, and let go of at any moment."""

from __future__ import annotations

import trio
import trio.testing

from proxy.upstream.nodes import STARTED_PER_STEP, Lane, Nodes
from routing.topology import Address
from tests.bench.large import QuietDialer, QuietHub

ADDRESSES = [Address("10.0.0.1", port) for port in range(1, 101)]


def new_nodes(nursery: trio.Nursery) -> Nodes:
    return Nodes(QuietDialer(QuietHub(), "", "", 1.0, 1 << 20), nursery, 5.0)


async def test_other_tasks_run_while_many_keepers_start() -> None:
    async with trio.open_nursery() as nursery:
        nodes = new_nodes(nursery)
        nodes.ensure_all(ADDRESSES, 2)
        seen = [0]
        while seen[-1] < len(ADDRESSES) * len(Lane):
            await trio.lowlevel.checkpoint()
            seen.append(len(list(nodes.connections())))
            assert (
                seen[-1] - seen[-2] <= STARTED_PER_STEP * len(Lane) * 2
            )  # two steps, by the scheduler's whim
        nursery.cancel_scope.cancel()


async def test_every_node_that_is_wanted_in_the_end_is_connected_once() -> None:
    """Also when it is let go, and wanted again, while the keepers are starting."""
    async with trio.open_nursery() as nursery:
        nodes = new_nodes(nursery)
        nodes.ensure_all(ADDRESSES, 2)
        nodes.ensure_all(ADDRESSES, 3)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        nodes.retain(ADDRESSES[:1])
        nodes.ensure_all(ADDRESSES[:3], 2)
        await trio.testing.wait_all_tasks_blocked()
        connected = {
            (connection.address, resp, lane)
            for connection in nodes.connections()
            for resp in (2, 3)
            for lane in Lane
            if nodes.connection(connection.address, resp, lane) is connection
        }
        assert connected == {(address, 2, lane) for address in ADDRESSES[:3] for lane in Lane} | {
            (ADDRESSES[0], 3, lane) for lane in Lane
        }
        assert len(connected) == len(list(nodes.connections()))
        nursery.cancel_scope.cancel()


async def test_only_the_read_lane_only_reads() -> None:
    """What ends on the write lane may have been a write (docs/decisions/0009-snapshots.md, opening)."""
    async with trio.open_nursery() as nursery:
        nodes = new_nodes(nursery)
        nodes.ensure(ADDRESSES[0], 2)
        await trio.testing.wait_all_tasks_blocked()
        for lane in Lane:
            connection = nodes.connection(ADDRESSES[0], 2, lane)
            assert connection is not None
            assert connection.only_reads is (lane is Lane.READ)
        nursery.cancel_scope.cancel()
