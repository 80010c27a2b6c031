"""What the demo counts of reads over all shards: torn ones, and snapshots that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from trio.testing import MockClock

from proxy.embedded.connection import Argument, ServerError
from proxy.embedded.tearing import Together, TornTally

TAGS = [b"a", b"b"]


class FakeClient:
    """Answers MGET with what ``values`` gives; everything else is fine."""

    def __init__(self, values: Callable[[int], list[bytes | None]]) -> None:
        self._values = values
        self._reads = 0
        self.refuses = ""

    async def read(self, key: bytes, *command: Argument) -> Any:
        await trio.lowlevel.checkpoint()
        if command[0] == self.refuses:
            raise ServerError("ERR no")
        if command[0] == "MGET":
            self._reads += 1
            return self._values(self._reads)
        return 7 if command[:2] == ("STEADY.SNAPSHOT", "OPEN") else b"OK"

    write = read

    async def aclose(self) -> None:
        raise AssertionError


async def seen(client: FakeClient) -> TornTally:
    together = Together(TAGS)
    with trio.move_on_after(1):
        await together.read_snapshots_on(client, 0.01)
    return together.at_snapshot


async def test_the_same_whole_values_are_clean(autojump_clock: MockClock) -> None:
    tally = await seen(FakeClient(lambda number: [b"1", b"1"]))
    assert tally.is_clean
    assert tally.snapshots > 1


async def test_two_versions_in_one_read_are_torn(autojump_clock: MockClock) -> None:
    tally = await seen(FakeClient(lambda number: [b"1", b"2" if number == 3 else b"1"]))
    assert (tally.torn, tally.changed) == (1, 1)
    assert not tally.is_clean


async def test_another_value_at_the_same_snapshot_is_a_change(autojump_clock: MockClock) -> None:
    tally = await seen(FakeClient(lambda number: [b"2", b"2"] if number == 3 else [b"1", b"1"]))
    assert (tally.torn, tally.changed) == (0, 1)


async def test_refusals_are_errors_and_no_reads(autojump_clock: MockClock) -> None:
    client = FakeClient(lambda number: [b"1", b"1"])
    client.refuses = "STEADY.READ"
    tally = await seen(client)
    assert tally.reads == 0
    assert tally.errors > 0
    assert not tally.is_clean
