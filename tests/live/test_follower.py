"""The plain client of the demo: it keeps up with moves, and believes the replica of a half-moved slot."""

from __future__ import annotations

import random

import pytest
import trio

from proxy.embedded.connection import Argument
from proxy.embedded.follower import FollowingClient
from proxy.embedded.moves import move_slot_stepwise
from proxy.embedded.traffic import Traffic, write_first_values
from routing.slot import slot_of
from tests.live.conftest import ClusterStarter

pytestmark = pytest.mark.live

TAG = b"steady"


class AtPrimaries(FollowingClient):
    """The same client told to read at primaries."""

    async def read(self, key: bytes, *command: Argument) -> object:
        return await self.write(key, *command)


async def test_only_the_client_that_reads_at_replicas_sees_wrong_nils(share_cluster: ClusterStarter) -> None:
    """While a slot stands half-moved, Redis's replicas answer nil for moved keys; Valkey's redirect.

    At primaries the same client sees every key and no error, which shows that the nils are the replicas'.
    """
    async with share_cluster(replicas=1) as cluster:
        at_replicas, at_primaries = sides = Traffic("replicas", [TAG], 100), Traffic("primaries", [TAG], 100)
        await write_first_values(cluster, sides)
        map_ = await cluster.map_at(cluster.nodes[0])
        home = cluster.node_at(map_.owner_of(slot_of(b"{%b}" % TAG)).address)
        away = next(node for node in cluster.primaries if node is not home)
        seed = cluster.nodes[0].address
        plain = FollowingClient(seed, random.Random(1))
        primary = AtPrimaries(seed, random.Random(2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at_replicas.read_on, plain, random.Random(3), 0.002)
            nursery.start_soon(at_primaries.read_on, primary, random.Random(4), 0.002)
            for target in (away, home):
                await move_slot_stepwise(cluster, slot_of(TAG), target, half_moved_seconds=0.5)
            nursery.cancel_scope.cancel()
        await plain.aclose()
        await primary.aclose()
    assert at_primaries.tally.is_clean
    assert at_replicas.tally.errors == 0
    if cluster.engine.name == "redis":
        assert at_replicas.tally.wrong_nils > 0
    else:
        assert at_replicas.tally.is_clean
