"""The sampler sees each command with the same chance, counts none twice, and its bounds hold (promise 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.exchange.hot import KEY_BYTES_MAX, KEYS_PER_COMMAND_MAX, NEVER, SLOT_SERIES_MAX, HotSampler
from proxy.protocol.requests import Simple
from proxy.settings import HotSettings
from routing.command import lookup
from routing.slot import slot_of
from tests.proxy.exchange.test_open_requests import OK, command
from tests.proxy.world import World, keys_of

ALL = HotSettings(sample_every=1)


def simple(key: bytes, name: bytes = b"GET") -> Simple:
    found = lookup([name])
    assert found is not None
    return found, command(name, key), slot_of(key), key


def sampler(options: HotSettings, seed: int = 1) -> HotSampler:
    return HotSampler(options, Random(seed), lambda: 1000.0)


def send(hot: HotSampler, found: Sequence[Simple]) -> None:
    """As a client connection does."""
    hot.countdown -= len(found)
    if hot.countdown < 0:
        hot.look(found)


def samples(hot: HotSampler, kind: str = "read") -> int:
    return hot.facts()[kind].samples


@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_no_rhythm_of_clients_is_in_step_with_it(size: int) -> None:
    """Sixteen keys in turn, one in sixteen commands looked at: each has a sixteenth of the samples."""
    hot = sampler(HotSettings(sample_every=16))
    items = [simple(b"key%d" % number) for number in range(16)]
    sent = 160_000
    for at in range(0, sent, size):
        send(hot, [items[number % 16] for number in range(at, min(at + size, sent))])
    facts = hot.facts(16)["read"]
    assert facts.samples == pytest.approx(sent / 16, rel=0.05)
    assert len(facts.keys) == 16
    for each in facts.keys:
        assert each.share_at_least == each.share_at_most == pytest.approx(1 / 16, rel=0.2)


def test_the_rate_is_that_of_all_commands() -> None:
    now = 1000.0
    hot = HotSampler(HotSettings(sample_every=4), Random(1), lambda: now)
    for _ in range(40_000):
        send(hot, [simple(b"k")])
    now += 20.0
    [key] = hot.facts()["read"].keys
    assert key.per_second == pytest.approx(2000, rel=0.05)


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=20), max_size=40))
def test_shares_are_within_the_bounds_of_the_algorithm(batches: list[list[int]]) -> None:
    """Of all commands, with fewer counters than keys; the names of reads and writes are the same, their counts not."""
    hot = sampler(HotSettings(sample_every=1, counters=16))
    truth = {b"GET": Counter[bytes](), b"SET": Counter[bytes]()}
    for batch in batches:
        found = []
        for number in batch:
            name, key = (b"SET", b"GET")[number % 3 > 0], b"key%d" % number
            truth[name][key] += 1
            found.append(simple(key, name))
        send(hot, found)
    for kind, counts in (("read", truth[b"GET"]), ("write", truth[b"SET"])):
        facts = hot.facts(100)[kind]
        assert facts.samples == counts.total()
        for each in facts.keys:
            share = counts[each.item] / counts.total()
            assert each.share_at_least <= share <= each.share_at_most <= 1
        shown = {each.item for each in facts.keys}
        for key, number in counts.items():
            # More than what counters can be wrong by, and than what may be chance.
            if number >= 5 + counts.total() / 16:
                assert key in shown


@given(
    st.lists(st.integers(1, 12), max_size=30),
    st.integers(1, 5),
    st.integers(),
)
def test_what_was_not_taken_counts_when_it_comes_again(sizes: list[int], every: int, seed: int) -> None:
    """Whatever is taken of each batch, the same commands are looked at as if each came alone."""
    random = Random(seed)
    count = sum(sizes)
    items = [simple(b"key%d" % number) for number in range(count)]
    in_batches, one_by_one = (sampler(HotSettings(sample_every=every), seed) for _ in range(2))
    for item in items:
        send(one_by_one, [item])
    at = 0
    while at < count:
        batch = items[at : at + 12]
        untaken = batch[random.randint(0, len(batch)) :]
        in_batches.countdown -= len(batch)
        if in_batches.countdown < 0 or untaken:
            in_batches.look(batch, sum(len(item[1]) for item in untaken))
        at += len(batch) - len(untaken)
    assert in_batches.countdown == one_by_one.countdown
    assert samples(in_batches) == samples(one_by_one)
    for item in items:
        counted = [each._of_kind["read"].keys.counted(item[3], 1000.0) for each in (in_batches, one_by_one)]
        assert counted[0] == counted[1]


def test_a_long_key_counts_for_its_slot_alone() -> None:
    hot = sampler(ALL)
    long, longest = b"{a}" + b"x" * KEY_BYTES_MAX, b"{a}" + b"x" * (KEY_BYTES_MAX - 3)
    for key in (long, longest):
        for _ in range(10):
            send(hot, [simple(key)])
    facts = hot.facts()["read"]
    assert [(each.item, each.share_at_least) for each in facts.keys] == [(longest, 0.5)]
    assert [(each.item, each.share_at_least) for each in facts.slots] == [(slot_of(b"a"), 1.0)]


def test_keys_and_slots_are_of_the_same_time() -> None:
    """Also if for several windows no key was short enough to count."""
    now = 1000.0
    hot = HotSampler(HotSettings(sample_every=1, window_seconds=10), Random(1), lambda: now)

    def seen() -> tuple[float, int, list[float]]:
        facts = hot.facts()["read"]
        return facts.seconds, facts.samples, [each.share_at_least for each in facts.keys]

    now = 1034.0
    send(hot, [simple(b"x" * (KEY_BYTES_MAX + 1))] * 8)
    now = 1048.0
    send(hot, [simple(b"k")] * 8)
    assert seen() == (18.0, 16, [0.5])
    now = 1051.0
    assert seen() == (11.0, 8, [1.0])
    now = 1065.0
    assert seen() == (15.0, 0, [])


def test_of_a_command_with_many_keys_some_are_counted() -> None:
    hot = sampler(ALL)
    mget = lookup([b"MGET"])
    assert mget is not None
    keys = [b"key%d" % number for number in range(1000)]
    hot.look_at(mget, [b"MGET", *keys])
    assert samples(hot) == KEYS_PER_COMMAND_MAX


def test_what_was_seen_seldom_is_not_hot() -> None:
    hot = sampler(ALL)
    for number, key in enumerate([b"once", b"often"]):
        for _ in range(4 + number):
            send(hot, [simple(key)])
    assert [each.item for each in hot.facts()["read"].keys] == [b"often"]


def test_metrics_name_no_key_and_few_slots() -> None:
    hot = sampler(ALL)
    for number in range(40):
        for _ in range(10):
            send(hot, [simple(b"secret%d" % number, b"SET")])
    found = list(hot.samples())
    values = {(each.family.name, each.label_values): each.value for each in found}
    assert values["steadyread_hot_samples_total", ("write",)] == 400
    assert values["steadyread_hottest_key_share_ratio", ("write",)] == 1 / 40
    assert values["steadyread_hottest_slot_share_ratio", ("write",)] == 1 / 40
    assert values["steadyread_hottest_key_share_ratio", ("read",)] == 0.0
    assert sum(each.family.name == "steadyread_hot_slot_share_ratio" for each in found) == SLOT_SERIES_MAX
    assert "secret" not in str(found)


def test_other_settings_begin_anew_and_the_same_go_on() -> None:
    hot = sampler(ALL)
    send(hot, [simple(b"k")] * 9)
    hot.adopt(HotSettings(sample_every=1))
    assert samples(hot) == 9
    hot.adopt(HotSettings(sample_every=0))
    send(hot, [simple(b"k")] * 9)
    assert (samples(hot), hot.facts()["read"].keys) == (0, ())
    hot.adopt(ALL)
    send(hot, [simple(b"k")] * 6)
    assert samples(hot) == 6
    [total] = [
        each.value
        for each in hot.samples()
        if each.family.name == "steadyread_hot_samples_total" and each.label_values == ("read",)
    ]
    assert total == 15  # counters do not go back


# -- in the data plane


async def answer_all(world: World, requests: int) -> None:
    """Until the nodes have run so many, let them answer what comes."""
    while requests:
        await world.settle()
        for node in world.nodes:
            for request in node.take():
                values = len(request) - 1 if request[0] == b"MGET" else 1
                is_array = request[0] in (b"MGET", b"EXEC")
                node.reply(b"*%d\r\n" % values + b"$1\r\nv\r\n" * values if is_array else OK)
                requests -= 1
    await world.settle()


async def test_every_way_of_a_command_is_looked_at_once(world: World) -> None:
    """In the fast way, in the general one, split, and in a transaction; what names no key counts for nothing.

    A write after a read waits until that is answered, and is parsed once more.
    """
    hot = world.exchange.hot
    hot.adopt(ALL)
    first, second = keys_of(world, 0, 2)
    client = world.client()
    client.send(
        command("GET", first) * 3  # the first in the general way, if it is the first of all
        + command("SET", second, "v") * 2
        + command("MGET", first, second)
        + command("PING")
        + command("ECHO", "text")
        + command("MULTI")
        + command("GET", first)
        + command("EXEC")
        + command("EVAL", "return 1", "1", second)
        + command("PUBLISH", "channel", "text")
    )
    await answer_all(world, 3 + 2 + 2 + 3 + 1 + 1)
    assert len(client.replies()) == 13
    facts = hot.facts()
    assert (facts["read"].samples, facts["write"].samples) == (3 + 2 + 1, 2 + 1)
    assert [(each.item, each.share_at_least) for each in facts["read"].keys] == [(first, 5 / 6)]


@pytest.mark.parametrize("is_looking", [True, False])
async def test_what_waits_for_a_lost_node_counts_once(world: World, is_looking: bool) -> None:
    """Looking at all, and at none yet."""
    hot = world.exchange.hot
    hot.adopt(HotSettings(sample_every=int(is_looking)))

    def counted() -> int:
        return hot.facts()["read"].samples if is_looking else NEVER - hot.countdown

    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("GET", key) * 2)
    await answer_all(world, 2)
    world.nodes[0].lose()
    await world.settle()
    client.send(command("GET", key) * 5)
    assert counted() == 3  # the first waits for the node, the others for it
    await world.connect()
    await answer_all(world, 5)
    assert len(client.replies()) == 7
    assert counted() == 7
