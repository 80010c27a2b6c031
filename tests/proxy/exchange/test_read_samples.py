"""The metrics of reads add up: each read is in one series, and each series is there before its first read."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from proxy.exchange.read_samples import read_samples
from proxy.metrics import Metrics
from proxy.protocol.encode import command as encoded
from routing.levels import Level
from routing.promotion import Stage
from routing.proof import Refusal
from tests.proxy.exchange.test_replica_reads import NIL, primary, replica, value
from tests.proxy.world import World, keys_of, world_of


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with world_of(1, replicas=1) as world:
        yield world


def scraped(world: World) -> dict[str, float]:
    """Name and label values, joined by spaces -> number. Without the buckets of histograms."""
    metrics = Metrics()
    metrics.register_source(lambda: read_samples(world.exchange.reads, world.replicas))
    return {
        " ".join([sample.name.removeprefix("steadyread_"), *sample.labels.values()]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("steadyread_") and "le" not in sample.labels
    }


async def test_all_series_of_fixed_labels_are_there_from_the_start(world: World) -> None:
    found = scraped(world)
    assert found.pop("replicas joining") == 1
    assert set(found.values()) == {0}
    levels = [level.value for level in Level if level not in (Level.STRONG, Level.SNAPSHOT)]
    assert {name for name in found if name.startswith("reads_total")} == {
        "reads_total strong strong primary",
        *(f"reads_total {level} {level} replica" for level in levels),
        *(f"reads_total {level} strong primary" for level in levels),
    }
    reasons = [name.split()[1] for name in found if name.startswith("replica_refusals_total")]
    assert reasons == [refusal.value for refusal in Refusal]
    failures = {name.split()[1] for name in found if name.startswith("stamp_failures_total")}
    assert failures == {"behind", "other_history", "too_old", "syncing", "no_stamp"}
    stages = {name.split()[1] for name in found if name.startswith("replicas ")}
    assert stages | {"joining"} == {stage.value for stage in Stage}


async def test_each_read_is_counted_by_what_became_of_it(world: World) -> None:
    """One strong, one without a readable replica, one by the replica, a miss that the owner has, one behind."""
    [key] = keys_of(world, 0, 1)
    owner, reader = world.nodes[0], world.replica_nodes[0]
    client = world.client()
    get = encoded("GET", key)

    def answer(*steps: tuple[object, bytes]) -> None:
        for node, reply in steps:
            node.reply(reply)  # type: ignore[attr-defined]  # fake nodes
            world.turn()

    client.send(get)
    answer((owner, value(b"1")))
    client.send(encoded("STEADY.READ", "CAUGHT_UP") + get)
    answer((owner, value(b"2")))
    [one] = world.replicas.replicas()
    one.set_stage(Stage.READABLE)
    client.send(get)
    answer((owner, primary(5)), (reader, replica(5)), (reader, value(b"3")))
    client.send(get)
    answer((owner, primary(5)), (reader, replica(5)), (reader, NIL), (owner, value(b"4")))
    client.send(get)
    answer((owner, primary(6)), (reader, replica(5)), (reader, value(b"x")), (owner, value(b"5")))
    assert client.values() == [b"1", b"OK", b"2", b"3", b"4", b"5"]
    found = {name: number for name, number in scraped(world).items() if number}
    assert 0 < found.pop("read_staleness_seconds_sum") < 1
    assert found == {
        "reads_total strong strong primary": 1,
        "reads_total caught_up caught_up replica": 1,
        "reads_total caught_up strong primary": 3,
        "replica_refusals_total not_readable": 1,
        "replica_refusals_total behind": 1,
        "stamp_failures_total behind": 1,
        "misses_confirmed_total": 1,
        "nils_prevented_total": 1,
        "floor_questions_total": 3,
        "stamp_questions_total": world.exchange.reads.stamps_total,
        "read_staleness_seconds_count": 2,
        "replicas readable": 1,
        f"replica_reads_total {reader.address}": 3,
    }
    assert world.exchange.reads.stamps_total >= 3
