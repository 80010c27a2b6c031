"""Faults that a review of fetches at snapshots found, each as the smallest test that shows it."""

from __future__ import annotations

from trio.testing import MockClock

from tests.proxy.exchange.test_open_requests import command
from tests.proxy.exchange.test_permits import ONE, load_of
from tests.proxy.exchange.test_snapshot_cache import Keys, get, reader_of, warm
from tests.proxy.exchange.test_snapshot_writes import ID, serve
from tests.proxy.world import keys_of, world_of


async def test_a_read_at_a_snapshot_that_waited_uses_its_permit(autojump_clock: MockClock) -> None:
    """To be looked at again is not to be read again: it was asked for once."""
    async with world_of(1, settings=ONE) as world:
        keys = Keys(world)
        serve(world, ID)
        key, spelling = keys_of(world, 0)[:2]
        keys.values[key] = b"v"
        client, busy = reader_of(world), world.client()
        await get(keys, client, spelling)
        await get(keys, client, spelling)
        fills = world.exchange.snapshot_reads.cache.fills_total
        slow = world.exchange.snapshot_reads.slow_total
        load_of(world).tighten(0.99)
        busy.send(command("GET", "busy"))
        client.send(command("GET", key))
        assert load_of(world).waiting == 1
        await keys.answer()
        assert busy.values() == [None]
        assert client.values() == [b"v"]
        assert world.exchange.snapshot_reads.slow_total == slow, "it was made to wait once more, in a task"
        assert world.exchange.snapshot_reads.cache.fills_total == fills, "a key read once was kept"


async def test_what_the_cache_has_is_answered_while_its_node_sheds() -> None:
    async with world_of(1, settings=ONE) as world:
        keys = Keys(world)
        serve(world, ID)
        key, other = keys_of(world, 0)[:2]
        keys.values[key] = b"v"
        client, busy = reader_of(world), world.client()
        assert await warm(keys, client, key) == b"v"
        load_of(world).tighten(0.99)
        busy.send(command("GET", "busy"))
        assert not load_of(world).has_permit(0)
        client.send(command("GET", key) + command("GET", other))
        assert client.values() == [b"v"]
        assert load_of(world).waiting == 1
