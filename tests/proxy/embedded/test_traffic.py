"""Every wrong reply is counted as what it is, and no right one is."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from proxy.embedded.connection import Argument, ConnectionLost, ServerError
from proxy.embedded.traffic import ANSWER_SECONDS, Latencies, Traffic, tags_in_slots_of, value_of
from routing.slot import slot_of


class Dictionary:
    """A server that is right: what was written is read."""

    def __init__(self, traffic: Traffic) -> None:
        self.values: dict[bytes, bytes | None] = {key: value_of(key, 0) for key in traffic.keys}

    async def read(self, key: bytes, *command: Argument) -> Any:
        await trio.sleep(0.001)
        return self.values[key]

    async def write(self, key: bytes, *command: Argument) -> Any:
        await trio.sleep(0.001)
        value = command[2]
        assert isinstance(value, bytes)
        self.values[key] = value
        return b"OK"

    async def aclose(self) -> None:
        pass


@pytest.fixture
def traffic() -> Traffic:
    return Traffic("side", [b"a", b"b"], 5)


async def drive(traffic: Traffic, reader: Any, writer: Any, seconds: float = 1.0) -> None:
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traffic.write_on, writer, traffic.keys, 0.001)
            nursery.start_soon(traffic.read_on, reader, random.Random(7), 0.001)


async def test_a_server_that_is_right_is_clean(traffic: Traffic, autojump_clock: MockClock) -> None:
    """Reads and writes are counted, nothing is wrong; a side that read nothing is not clean."""
    assert not traffic.tally.is_clean
    server = Dictionary(traffic)
    await drive(traffic, server, server)
    assert traffic.tally.is_clean
    assert traffic.tally.reads > 100
    assert traffic.tally.writes > 100
    assert traffic.tally.latencies.quantile_ms(0.5) == pytest.approx(1.0, rel=0.02)


async def test_a_missing_key_is_a_wrong_nil(traffic: Traffic, autojump_clock: MockClock) -> None:
    """Promise 1, as the demo counts it."""
    server = Dictionary(traffic)
    server.values[traffic.keys[3]] = None
    with trio.move_on_after(1):
        await traffic.read_on(server, random.Random(7), 0.001)
    assert traffic.tally.wrong_nils > 0
    assert (traffic.tally.stale_values, traffic.tally.errors) == (0, 0)
    assert traffic.keys[3].decode() in traffic.tally.examples["wrong_nils"]


async def test_a_value_older_than_acknowledged_is_stale(traffic: Traffic, autojump_clock: MockClock) -> None:
    """Promise 2: the reader sees a copy that never gets the writes."""
    await drive(traffic, Dictionary(traffic), Dictionary(traffic))
    assert traffic.tally.stale_values > 0
    assert (traffic.tally.wrong_nils, traffic.tally.errors) == (0, 0)


async def test_a_value_of_another_key_is_an_error(traffic: Traffic, autojump_clock: MockClock) -> None:
    """Promise 6: a reply that belongs to another request."""
    server = Dictionary(traffic)
    server.values[traffic.keys[0]] = value_of(traffic.keys[1], 0)
    with trio.move_on_after(1):
        await traffic.read_on(server, random.Random(7), 0.001)
    assert traffic.tally.errors > 0
    assert (traffic.tally.wrong_nils, traffic.tally.stale_values) == (0, 0)


@pytest.mark.parametrize("fault", [ServerError("TRYAGAIN later"), ConnectionLost("gone")])
async def test_errors_are_counted_and_survived(
    traffic: Traffic, autojump_clock: MockClock, fault: Exception
) -> None:
    """Every failed request is one error; a write that failed is not taken for acknowledged."""

    class Failing(Dictionary):
        async def write(self, key: bytes, *command: Argument) -> Any:
            raise fault

    await drive(traffic, Dictionary(traffic), Failing(traffic))
    assert traffic.tally.errors > 10
    assert traffic.tally.writes == 0
    assert traffic.tally.reads > 100
    assert traffic.tally.stale_values == 0
    assert str(fault) in traffic.tally.examples["errors"]


async def test_silence_is_an_error(traffic: Traffic, autojump_clock: MockClock) -> None:
    """A request without an answer does not stop the count for ever."""

    class Silent(Dictionary):
        async def read(self, key: bytes, *command: Argument) -> Any:
            await trio.sleep_forever()

    with trio.move_on_after(3.5 * ANSWER_SECONDS):
        await traffic.read_on(Silent(traffic), random.Random(7), 0.001)
    assert traffic.tally.errors == 3


@given(st.lists(st.floats(min_value=1e-5, max_value=100), min_size=1), st.floats(min_value=0.01, max_value=1))
def test_quantiles_are_two_percent_high_at_most(seconds: list[float], share: float) -> None:
    """Against a sorted list."""
    latencies = Latencies()
    for value in seconds:
        latencies.add(value)
    ordered = sorted(seconds)
    exact = next(value for n, value in enumerate(ordered, start=1) if n >= share * len(ordered))
    found = latencies.quantile_ms(share)
    assert found is not None
    assert exact * 0.999999 <= found / 1000 <= exact * 1.020001


def test_tags_spread_over_the_owners() -> None:
    """Two slots of each owner, all different."""
    owners = [frozenset(range(5461)), frozenset(range(5461, 10923)), frozenset(range(10923, 16384))]
    slots = [slot_of(tag) for tag in tags_in_slots_of(owners, 2)]
    assert len(set(slots)) == 6
    assert [sum(slot in owned for slot in slots) for owned in owners] == [2, 2, 2]
