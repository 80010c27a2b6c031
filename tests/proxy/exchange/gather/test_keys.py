"""SCAN, KEYS, RANDOMKEY, DBSIZE, INFO keyspace: no snapshot's key is ever shown, and as of one its own keys are."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from trio.testing import MockClock

from proxy.exchange.gather import gather_keyspace, keys
from proxy.exchange.gather.at_snapshot import KeysAtSnapshot
from proxy.exchange.open_requests import CURRENT
from proxy.protocol.replies import ServerError
from routing.snapshot import Chain
from routing.snapshot_names import is_internal, marker, preimage, tags
from tests.proxy.exchange.gather.model import ModelCluster, key_in, slot_of
from tests.proxy.world import world_of

SLOTS = range(4)
KEYS = [key_in(slot, b":%d" % number) for slot in SLOTS for number in range(4)]
A, B, NEW = key_in(0, b"a"), key_in(0, b"b"), key_in(2, b"new")
RUNS = 40
REFUSAL = b"-SNAPSHOTTOOOLD snapshot 3 is closed\r\n"


# -- the keys of now


async def test_no_key_of_a_snapshot_is_shown(model: ModelCluster) -> None:
    """Nothing but clients' keys, whether snapshots are open, closed, or were an earlier proxy's."""
    foreign = b"steady{%b}:m:x:a client's" % tags()[1]
    for key in [*KEYS, foreign]:
        model.put(key, b"v")
    model.cut(3)
    for key in KEYS[::2]:
        model.write(key)
    model.cut(4)
    model.write(NEW)
    model.put(marker(3, 1, b"left over"), b"p")  # nobody knows of it
    expected = Counter({*KEYS, NEW, foreign})
    for chain in (model.snapshots.chain, Chain()):
        model.snapshots.chain = chain
        assert Counter(await model.scan()) == expected
        assert Counter(await model.scan("COUNT", "1000", "TYPE", "string")) == expected
        assert Counter(await model.call("KEYS", "*")) == expected
        assert await model.call("KEYS", "steady*") == [foreign]
        assert await model.call("DBSIZE") == len(expected)
        assert {await model.call("RANDOMKEY") for _ in range(50)} <= set(expected)


async def test_random_key_is_found_among_many_of_snapshots(model: ModelCluster) -> None:
    """When the draws find none, the listing does; and nothing is there when only snapshots' keys are."""
    for number in range(400):
        model.put(marker(number % 64, 3, b"%d" % number), b"a")
    assert await model.call("RANDOMKEY") is None
    model.put(A, b"v")
    assert {await model.call("RANDOMKEY") for _ in range(5)} == {A}


async def test_the_empty_key_is_drawn_as_any_other(model: ModelCluster) -> None:
    model.put(b"", b"v")
    assert await model.call("RANDOMKEY") == b""


async def test_dbsize_is_the_cheap_sum_only_while_no_snapshot_has_keys(model: ModelCluster) -> None:
    for key in KEYS:
        model.put(key, b"v")
    model.snapshots.may = False
    assert await model.call("DBSIZE") == len(KEYS)
    assert {words[0] for words in model.ran} == {b"DBSIZE"}

    # One is cut while the nodes count: the sum is not used.
    def cut() -> None:
        model.between = lambda: None
        model.snapshots.may = True
        model.cut(3)
        for key in KEYS:
            model.write(key)

    model.between = cut
    assert await model.call("DBSIZE") == len(KEYS)
    assert [b"CLUSTER", b"NODES"] in model.ran


async def test_dbsize_counts_keys_that_expired_and_are_held_as_nodes_do(model: ModelCluster) -> None:
    model.put(A, b"v")
    model.held.add(A)
    assert await model.call("DBSIZE") == 1
    assert await model.scan() == []


async def test_info_keyspace_says_nothing_while_snapshots_may_have_keys(model: ModelCluster) -> None:
    model.put(A, b"v")

    async def count_in_bodies() -> int | None:
        found: list[list[bytes] | None] = []

        async def gather() -> bytes:
            found.append(await gather_keyspace(model.requests))
            return b""

        await model.while_serving(gather)
        return None if found[0] is None else sum(b"keys=1," in body for body in found[0])

    assert await count_in_bodies() is None
    model.snapshots.may = False
    assert await count_in_bodies() == 1


# -- as of a snapshot


async def test_keys_are_those_of_the_cut(model: ModelCluster) -> None:
    """Promise 2: what was deleted since is there, what was created since is not; for each of several snapshots."""
    for key in KEYS:
        model.put(key, b"v")
    model.cut(3)
    model.delete(KEYS[0])
    model.delete(KEYS[1])
    model.write(KEYS[2], too_large=True)
    model.write(NEW)
    model.cut(5)
    model.write(KEYS[0])
    model.delete(KEYS[3])
    model.delete(NEW)
    model.cut(9)
    model.delete(KEYS[5])
    first = b"{%b}:" % tags()[0]
    for snapshot_id, existed in model.existed.items():
        at = partial(model.call, snapshot_id=snapshot_id)
        assert Counter(await model.scan(snapshot_id=snapshot_id)) == Counter(existed)
        assert Counter(await at("KEYS", "*")) == Counter(existed)
        assert set(await at("KEYS", first + b"*")) == {key for key in existed if key.startswith(first)}
        assert await at("DBSIZE") == len(existed)
        assert set(await model.scan("MATCH", "*:[12]", snapshot_id=snapshot_id)) == {
            key for key in existed if key[-2:] in (b":1", b":2")
        }
    assert NEW in model.existed[5]
    assert len(model.keys()) not in map(len, model.existed.values())  # it differs from now


async def test_a_slot_in_parts_is_of_the_cut_too(
    model: ModelCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part holds its share of the cut's keys, whatever comes and goes between the calls."""
    monkeypatch.setattr(keys, "PART_KEYS", 10)
    many = [key_in(0, b"%d" % number) for number in range(100)]
    for key in many:
        model.put(key, b"v")
    model.cut(3)
    found: list[bytes] = []
    cursor, calls = b"0", 0
    while cursor != b"0" or not calls:
        cursor, part = await model.call("SCAN", cursor, snapshot_id=3)
        assert len(part) < 40
        found += part
        calls += 1
        for number in range(5):
            model.delete(many[(calls * 7 + number) % 100])
            model.write(key_in(0, b"new %d %d" % (calls, number)))
    assert Counter(found) == Counter(many)
    assert calls > 4


async def test_types_are_those_of_the_cut_and_unknown_ones_are_refused(model: ModelCluster) -> None:
    model.put(A, b"v")
    model.put(B, b"v")
    model.types[A] = b"hash"
    model.cut(3)
    model.delete(A)
    del model.types[A]
    model.write(A)  # a string now
    assert await model.scan("TYPE", "hash", snapshot_id=3) == [A]
    assert await model.scan("TYPE", "string", snapshot_id=3) == [B]
    model.write(B, too_large=True)
    refused = await model.call("SCAN", "0", "TYPE", "string", snapshot_id=3)
    assert isinstance(refused, ServerError)
    assert str(refused).startswith("SNAPSHOTTOOOLD the type of {"), refused
    assert await model.scan("TYPE", "hash", "MATCH", "*a", snapshot_id=3) == [A]
    assert set(await model.scan(snapshot_id=3)) == {A, B}


async def test_an_expired_pre_image_is_not_listed(model: ModelCluster) -> None:
    model.put(A, b"v")
    model.put(B, b"v")
    model.cut(3)
    model.write(A)
    model.held.add(preimage(0, 3, A))
    assert await model.scan(snapshot_id=3) == [B]
    model.migrate(0, 1)
    assert await model.scan(snapshot_id=3) == [B]
    model.held.add(B)
    assert await model.scan(snapshot_id=3) == []


async def test_a_key_that_expired_while_listed_and_was_made_anew_is_not_listed(model: ModelCluster) -> None:
    """Its new life began after the cut: the marker is asked for, though the listing showed none."""
    model.put(A, b"v")
    model.cut(3)
    model.held.add(A)

    def make_anew() -> None:
        if model.ran and model.ran[-1][1:3] == [b"GETKEYSINSLOT", b"0"]:
            model.between = lambda: None
            del model.data[0][A]
            model.held.clear()
            model.write(A)

    model.between = make_anew
    assert await model.scan(snapshot_id=3) == []
    assert model.get(A) is not None


async def test_a_snapshot_cut_between_key_and_marker_is_noticed(model: ModelCluster) -> None:
    """A write after the new cut marks for the new snapshot alone, which the question on its way does not ask."""
    model.put(A, b"v")
    model.cut(3)

    def cut_and_delete() -> None:
        if model.running[:1] == [b"EXISTS"]:
            model.between = lambda: None
            model.cut(4)
            model.delete(A)

    model.between = cut_and_delete
    assert await model.scan(snapshot_id=3) == [A]
    assert model.existed == {3: {A}, 4: {A}}
    assert model.get(A) is None


async def test_a_marker_that_a_failover_took_is_not_counted_on(model: ModelCluster) -> None:
    """The write behind it is lost as well, so the key is as it was at the cut."""
    model.put(A, b"v")
    model.cut(3)
    before = dict(model.data[0])
    for name in (b"MGET", b"EXISTS"):
        model.data[0] = dict(before)
        model.delete(A)

        def fail_over(name: bytes = name) -> None:
            if model.running[:1] == [name]:
                model.between = lambda: None
                model.data[0] = dict(before)

        model.between = fail_over
        assert await model.scan(snapshot_id=3) == [A]


async def test_a_marker_that_says_nothing_known_is_an_error(model: ModelCluster) -> None:
    model.put(A, b"v")
    model.cut(3)
    model.put(marker(0, 3, A), b"?")
    for is_split in (False, True):
        if is_split:
            model.migrate(0, 1)
        refused = await model.call("KEYS", "*", snapshot_id=3)
        assert str(refused) == "ERR snapshot 3: a marker of snapshot 3 says b'?'"


async def test_current_is_the_snapshot_that_serves(model: ModelCluster) -> None:
    model.put(A, b"v")
    model.cut(3)
    model.delete(A)
    model.snapshots.serving = 3
    assert await model.call("KEYS", "*", snapshot_id=CURRENT) == [A]
    model.snapshots.serving = None
    for words in (["SCAN", "0"], ["KEYS", "*"], ["DBSIZE"]):
        assert str(await model.call(*words, snapshot_id=CURRENT)).startswith("NOTREADY no snapshot is open")


async def test_what_is_no_snapshot_any_more_is_refused(model: ModelCluster) -> None:
    """A reply is used only if the snapshot still serves when it is complete."""
    model.put(A, b"v")
    model.cut(3)

    def end_before(name: bytes) -> Callable[[], None]:
        def end() -> None:
            if name in model.running[:2]:
                model.snapshots.ended[3] = REFUSAL

        return end

    for words in (["SCAN", "0", "COUNT", "1000"], ["KEYS", "*"], ["DBSIZE"]):
        for name in (b"HISTORY", b"GETKEYSINSLOT", b"EXISTS", b"MGET"):
            model.snapshots.ended.clear()
            model.between = end_before(name)
            refused = await model.call(*words, snapshot_id=3)
            assert str(refused) == "SNAPSHOTTOOOLD snapshot 3 is closed", (words, name, refused)
    model.ran.clear()
    model.between = lambda: None
    await model.call("DBSIZE", snapshot_id=3)
    assert not model.ran


async def test_the_last_word_on_the_snapshot_is_asked_when_all_is_found(
    model: ModelCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with nothing found, and so nothing looked at, the reply waits for it."""
    model.cut(3)
    whole = KeysAtSnapshot.existing

    async def existing(keyspace: KeysAtSnapshot, *words: object) -> list[bytes]:
        found = await whole(keyspace, *words)  # type: ignore[arg-type]
        model.snapshots.ended[3] = REFUSAL
        return found

    monkeypatch.setattr(KeysAtSnapshot, "existing", existing)
    for words in (["SCAN", "0"], ["KEYS", "*"], ["DBSIZE"]):
        model.snapshots.ended.clear()
        assert str(await model.call(*words, snapshot_id=3)) == "SNAPSHOTTOOOLD snapshot 3 is closed"


async def test_random_key_is_refused_with_the_reason(model: ModelCluster) -> None:
    model.cut(3)
    assert "cannot be answered as of a snapshot" in str(await model.call("RANDOMKEY", snapshot_id=3))
    assert not model.ran


async def test_what_takes_too_long_says_so(model: ModelCluster, autojump_clock: MockClock) -> None:
    """A node whose history nobody has judged is not asked; nothing weaker is answered."""
    model.put(A, b"v")
    model.cut(3)
    model.reads.unjudged.add(model.world.nodes[0].address)
    for words in (["SCAN", "0"], ["KEYS", "*"], ["DBSIZE"]):
        refused = await model.call(*words, snapshot_id=3)
        assert str(refused).startswith(f"NOTREADY {words[0]}"), refused
        assert "is not judged yet" in str(refused)
    assert not any(words[:2] == [b"CLUSTER", b"GETKEYSINSLOT"] and words[2] == b"0" for words in model.ran)


async def test_a_node_of_another_history_is_never_believed(model: ModelCluster) -> None:
    """Promise 2: when a failover comes between the judgement and the question, the answer is lost and asked anew."""
    for key in KEYS:
        model.put(key, b"v")
    model.cut(3)
    whole = dict(model.data[0])
    for name in (b"GETKEYSINSLOT", b"EXISTS"):
        phases = iter((b"other", b"good"))

        def change_history(name: bytes = name, phases: object = phases) -> None:
            """It is another node, with a part of the keys, from the check before a question until the next."""
            state = model.histories[0]
            upcoming = model.upcoming(0)
            if (
                state == b"good"
                and upcoming[:1] == [[b"HISTORY"]]
                and any(name in words[:2] for words in upcoming)
            ):
                if next(phases, None) is None:  # type: ignore[call-overload]
                    return
                model.histories[0], model.data[0] = b"other", {}
            elif state == b"other" and not any(name in words[:2] for words in upcoming):
                model.histories[0], model.data[0] = b"good", dict(whole)
                next(phases)  # type: ignore[call-overload]

        model.between = change_history
        model.reads.guards = 0
        assert await model.call("DBSIZE", snapshot_id=3) == len(KEYS)
        assert next(phases, None) is None, f"no failover before {name!r}"
        assert model.reads.guards > 3


# -- and whatever happens


def _step(model: ModelCluster, chance: random.Random, cuts: list[int]) -> None:
    """One of the things that others do at the same time."""
    key = chance.choice([*KEYS, A, NEW])
    match chance.randrange(12):
        case 0 | 1 | 2:
            model.write(key, too_large=chance.random() < 0.1)
        case 3 | 4 | 5:
            model.delete(key)
        case 6 | 7 | 8:
            if names := sorted(name for data in model.data for name in data if _is_split(model, name)):
                model.move(chance.choice(names))
        case 9:
            model.migrate(chance.choice(SLOTS), chance.randrange(3))
        case 10 if cuts and chance.random() < 0.2:
            model.cut(cuts.pop(0))
        case 11:
            for slot, (source, target) in list(model.world.migrations.items()):
                if not any(slot_of(name) == slot for name in model.data[source]):
                    model.world.owners[slot] = target
                    del model.world.migrations[slot]


def _is_split(model: ModelCluster, name: bytes) -> bool:
    migration = model.world.migrations.get(slot_of(name))
    return migration is not None and name in model.data[migration[0]]


@pytest.mark.parametrize("part", range(4))
async def test_listings_are_of_the_cut_whatever_happens_meanwhile(
    autojump_clock: MockClock, few_slots: None, part: int
) -> None:
    """Promise 2, with writers, cuts and stepwise migrations between any two commands that the nodes run."""
    seed = random.randrange(1 << 32)
    differing = 0
    for run in range(RUNS):
        chance = random.Random(f"{seed}:{part}:{run}")
        async with world_of(3) as world:
            model = ModelCluster(world)
            cuts = [4, 7]
            for key in KEYS:
                if chance.random() < 0.7:
                    model.put(key, b"v")
            model.cut(3)
            for _ in range(chance.randrange(60)):
                _step(model, chance, cuts)
            if chance.random() < 0.5:
                world.see()
            rate = chance.choice((0.0, 0.1, 0.5))

            def between(
                model: ModelCluster = model,
                chance: random.Random = chance,
                cuts: list[int] = cuts,
                rate: float = rate,
            ) -> None:
                while chance.random() < rate:
                    _step(model, chance, cuts)
                # A proxy that wants a look gets one before long; else none may come before its deadline.
                topology = model.world.topology
                if chance.random() < (0.3 if topology.wanted.is_set() else 0.02):
                    topology.take_wanted()
                    model.world.see()

            model.between = between
            snapshot_id = chance.choice(sorted(model.existed))
            found = (
                await model.scan("COUNT", "1000", snapshot_id=snapshot_id)
                if chance.random() < 0.5
                else await model.call("KEYS", "*", snapshot_id=snapshot_id)
            )
            assert not isinstance(found, ServerError), f"{found}, seed {seed}:{part}:{run}"
            assert Counter(found) == Counter(model.existed[snapshot_id]), f"seed {seed}:{part}:{run}"
            assert not any(map(is_internal, found))
            differing += model.keys() != model.existed[snapshot_id]
    assert differing > RUNS // 2
