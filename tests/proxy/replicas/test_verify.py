"""A comparison of two nodes that answer from dictionaries, while the primary is written to."""

from __future__ import annotations

from typing import Any

import trio

from proxy.replicas.verify import compare
from proxy.upstream.nodes import Lane
from routing.comparison import Outcome, Verdict
from tests.proxy.replicas.shard import ShardWorld, shard_of


async def compared(world: ShardWorld, *suspects: bytes, key_count: int = 8) -> Outcome:
    primary = world.primaries.connection(world.primary.node.address, 2, Lane.READ)
    replica = world.replica(1).connections[0]
    assert primary is not None
    assert replica is not None
    return await compare(primary, replica, suspects, key_count)


def fill(world: ShardWorld) -> None:
    for number in range(4):
        world.set_all(b"string-%d" % number, b"value")
    world.set_all(b"set", {b"a", b"b", b"c"})
    world.set_all(b"hash", {b"f": b"1", b"g": b"2"})


async def test_equal_keys_are_found_equal_while_offsets_move_on(autojump_clock: Any) -> None:
    async with shard_of() as world:
        fill(world)
        world.primary.on_request = lambda words: world.write()
        world.twins[1].data[b"hash"] = {b"g": b"2", b"f": b"1"}
        assert await compared(world) == Outcome(equal=6)


async def test_a_key_that_differs_is_named_wherever_it_is(autojump_clock: Any) -> None:
    """Another value, another type, missing at the replica, and there only."""
    async with shard_of() as world:
        fill(world)
        replica = world.twins[1]
        replica.data[b"string-1"] = b"other"
        replica.data[b"set"] = b"a string"
        del replica.data[b"hash"]
        replica.data[b"extra"] = b"its own"
        outcome = await compared(world, key_count=20)
        assert sorted(outcome.mismatched) == [b"extra", b"hash", b"set", b"string-1"]
        assert outcome.equal == 3


async def test_a_key_that_changes_in_between_is_undecided(autojump_clock: Any) -> None:
    async with shard_of() as world:
        fill(world)
        world.twins[1].data[b"set"] = {b"another"}

        def change(words: list[bytes]) -> None:
            if words[0] == b"SMEMBERS":
                world.primary.data[b"set"] = {b"%d" % len(world.primary.asked)}

        world.primary.on_request = change
        assert await compared(world) == Outcome(equal=5, undecided=1)
        assert (await compared(world, b"set")).verdict is Verdict.UNDECIDED


async def test_a_key_that_changed_and_changed_back_is_no_mismatch(autojump_clock: Any) -> None:
    """The replica shows a moment in between, once."""
    async with shard_of() as world:
        fill(world)
        shown = iter([b"in between"])
        replica = world.twins[1]

        def toggle(words: list[bytes]) -> None:
            if words == [b"STRLEN", b"string-0"]:
                replica.data[b"string-0"] = next(shown, b"value")

        replica.on_request = toggle
        assert await compared(world) == Outcome(equal=6)


async def test_a_replica_that_lags_is_asked_again_until_it_has_come_near(autojump_clock: Any) -> None:
    async with shard_of() as world:
        fill(world)
        replica = world.twins[1]
        world.primary.offset = 200
        world.primary.data[b"string-1"] = b"newest"

        def arrive(words: list[bytes]) -> None:
            if words == [b"INFO", b"replication"] and sum(asked == words for asked in replica.asked) == 4:
                replica.offset = 200
                replica.data[b"string-1"] = b"newest"

        replica.on_request = arrive
        assert await compared(world) == Outcome(equal=6)
        replica.offset = 199
        assert "did not reach" in (await compared(world)).problem


async def test_what_is_refused_moved_or_expiring_is_undecided(autojump_clock: Any) -> None:
    async with shard_of() as world:
        fill(world)
        world.twins[1].refusals = {b"string-0": "MOVED 1 node:1", b"string-1": "TRYAGAIN later"}
        world.primary.refusals = {b"string-2": "ASK 1 node:1"}
        world.primary.lifetimes = {b"string-3": 5}
        del world.twins[1].data[b"string-3"]
        assert await compared(world) == Outcome(equal=2, undecided=4)


async def test_a_change_of_history_decides_nothing(autojump_clock: Any) -> None:
    async with shard_of() as world:
        fill(world)

        def change(words: list[bytes]) -> None:
            if sum(asked == [b"INFO", b"replication"] for asked in world.primary.asked) == 2:
                world.primary.replid = b"b" * 40

        world.primary.on_request = change
        world.twins[1].data[b"set"] = {b"another"}
        outcome = await compared(world)
        assert (outcome.verdict, outcome.mismatched) == (Verdict.UNDECIDED, ())
        assert "history" in outcome.problem


async def test_an_empty_primary_has_nothing_to_compare(autojump_clock: Any) -> None:
    async with shard_of() as world:
        assert await compared(world) == Outcome(is_empty=True)
        world.twins[1].data[b"extra"] = b"value"
        assert (await compared(world)).mismatched == (b"extra",)


async def test_a_lost_connection_is_told(autojump_clock: Any) -> None:
    async with shard_of() as world:
        fill(world)
        connection = world.replica(1).connections[0]
        assert connection is not None
        world.twins[1].is_silent = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_close_soon, connection)
            assert "closed the connection" in (await compared(world)).problem


async def _close_soon(connection: Any) -> None:
    await trio.sleep(0.1)
    connection.close("broken")
