"""Reads at replicas: what must be asked, when a reply counts, and that one client's order stays (promises 1, 2, 6).

The fake nodes answer when the test says so: each case is one interleaving of client, primary and replica.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from proxy.protocol.replies import ServerError
from routing.promotion import Stage
from routing.proof import Refusal
from routing.slot import slot_of
from tests.proxy.exchange.test_open_requests import OK, command, moved
from tests.proxy.world import Client, FakeNode, World, in_turn, keys_of, world_of

X = b"a" * 40
Y = b"b" * 40
INFO = [b"INFO", b"replication"]


def value(text: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text), text)


NIL = b"$-1\r\n"


def primary(offset: int, replid: bytes = X, second: tuple[bytes, int] | None = None) -> bytes:
    second_id, second_offset = second or (b"0" * 40, -1)
    return value(
        b"# Replication\r\nrole:master\r\nconnected_slaves:1\r\nmaster_replid:%b\r\nmaster_replid2:%b\r\n"
        b"master_repl_offset:%d\r\nsecond_repl_offset:%d\r\n" % (replid, second_id, offset, second_offset)
    )


def replica(offset: int, replid: bytes = X, *, syncing: int = 0) -> bytes:
    return value(
        b"# Replication\r\nrole:slave\r\nmaster_link_status:up\r\nmaster_sync_in_progress:%d\r\n"
        b"slave_repl_offset:%d\r\nmaster_replid:%b\r\nmaster_repl_offset:1\r\n" % (syncing, offset, replid)
    )


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Three shards of a primary and a readable replica each."""
    async with world_of(3, replicas=1) as world:
        for one in world.replicas.replicas():
            one.set_stage(Stage.READABLE)
        yield world


def reader(world: World, *level: str) -> Client:
    client = world.client()
    client.send(command("STEADY.READ", *level))
    assert client.values() == [b"OK"]
    return client


@pytest.fixture
def caught_up(world: World) -> Client:
    return reader(world, "CAUGHT_UP")


class Shard:
    """The first shard, and a key of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.primary: FakeNode = world.nodes[0]
        self.replica: FakeNode = world.replica_nodes[0]
        self.key, self.other, self.third = keys_of(world, 0, 3)

    def answer(self, node: FakeNode, expected: list[list[bytes]], *replies: bytes) -> None:
        """``node`` has got exactly these requests, and answers."""
        assert node.take() == expected
        node.reply(*replies)
        self.world.turn()


@pytest.fixture
def shard(world: World) -> Shard:
    return Shard(world)


async def test_a_floor_then_a_stamp_then_the_value(world: World, shard: Shard, caught_up: Client) -> None:
    caught_up.send(command("GET", shard.key))
    assert shard.replica.take() == []
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(100), value(b"v"))
    assert caught_up.values() == [b"v"]
    assert shard.primary.take() == []


async def test_one_question_to_each_node_serves_all_reads_of_a_turn(world: World, shard: Shard) -> None:
    clients = [reader(world, "CAUGHT_UP") for _ in range(5)]
    with in_turn(world.hub):
        for client in clients:
            client.connection.receive(command("GET", shard.key) + command("GET", shard.other))
    shard.answer(shard.primary, [INFO], primary(100))
    gets = [[b"GET", shard.key], [b"GET", shard.other]] * 5
    shard.answer(shard.replica, [INFO, *gets], replica(150), *(value(words[1]) for words in gets))
    assert [client.values() for client in clients] == [[shard.key, shard.other]] * 5
    assert world.exchange.reads.floors_total == world.exchange.reads.stamps_total == 1


@pytest.mark.parametrize(
    ("stamp", "refusal"),
    [
        (replica(99), Refusal.BEHIND),
        (replica(1000, Y), Refusal.OTHER_HISTORY),
        (replica(1000, syncing=1), Refusal.SYNCING),
        (b"-LOADING Redis is loading the dataset in memory\r\n", Refusal.NO_STAMP),
    ],
)
async def test_what_the_stamp_does_not_prove_the_owner_answers(
    world: World, shard: Shard, caught_up: Client, stamp: bytes, refusal: Refusal
) -> None:
    caught_up.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], stamp, value(b"stale"))
    assert caught_up.values() == []
    shard.answer(shard.primary, [[b"GET", shard.key]], value(b"new"))
    assert caught_up.values() == [b"new"]
    assert world.exchange.reads.refusals == {refusal: 1}


async def test_a_replica_known_to_be_behind_is_spared_until_it_has_proved_more(
    world: World, shard: Shard, caught_up: Client
) -> None:
    caught_up.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(99), value(b"stale"))
    shard.answer(shard.primary, [[b"GET", shard.key]], value(b"new"))
    caught_up.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.primary, [[b"GET", shard.key]], value(b"new"))
    assert caught_up.values() == [b"new", b"new"]
    shard.answer(shard.replica, [INFO], replica(100))  # asked at once, when it was found behind
    caught_up.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(100), value(b"new"))
    assert caught_up.values() == [b"new"]


@pytest.mark.parametrize(
    ("words", "absent", "found"),
    [
        (("GET",), NIL, value(b"v")),
        (("EXISTS",), None, None),
        (("LLEN",), b":0\r\n", b":3\r\n"),
        (("TYPE",), b"+none\r\n", b"+list\r\n"),
        (("TTL",), b":-2\r\n", b":100\r\n"),
        (("HGETALL",), b"*0\r\n", b"*2\r\n$1\r\nf\r\n$1\r\nv\r\n"),
        (("GETRANGE", "0", "3"), b"$0\r\n\r\n", value(b"v")),
        (("HMGET", "f", "g"), b"*2\r\n$-1\r\n$-1\r\n", b"*2\r\n$-1\r\n$1\r\nv\r\n"),
        (("SMISMEMBER", "f", "g"), b"*2\r\n:0\r\n:0\r\n", b"*2\r\n:0\r\n:1\r\n"),
        (("XPENDING", "g"), b"-NOGROUP No such key\r\n", b"*4\r\n:0\r\n$-1\r\n$-1\r\n*-1\r\n"),
    ],
)
async def test_a_reply_that_could_mean_absence_is_asked_at_the_owner(
    world: World,
    shard: Shard,
    caught_up: Client,
    words: tuple[str, ...],
    absent: bytes | None,
    found: bytes | None,
) -> None:
    """Promise 1. EXISTS, whose number does not show which key is missing, does not go to a replica at all."""
    read = [words[0].encode(), shard.key, *(word.encode() for word in words[1:])]
    caught_up.send(command(words[0], shard.key, *words[1:]))
    if absent is None or found is None:
        assert shard.primary.take() == [read]
        return
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, read], replica(100), absent)
    assert caught_up.replies() == []
    shard.answer(shard.primary, [read], found)
    assert caught_up.replies() == [found]
    assert world.exchange.reads.confirmed_total == 1


async def test_a_nil_that_the_owner_prevents_is_counted(
    world: World, shard: Shard, caught_up: Client
) -> None:
    for reply, prevented in ((value(b"v"), 1), (NIL, 1)):
        caught_up.send(command("GET", shard.key))
        shard.answer(shard.primary, [INFO], primary(100))
        shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(100), NIL)
        shard.answer(shard.primary, [[b"GET", shard.key]], reply)
        assert caught_up.replies() == [reply]
        assert world.exchange.reads.nils_prevented_total == prevented


async def test_later_reads_of_a_slot_follow_the_one_that_went_to_the_owner(
    world: World, shard: Shard, caught_up: Client
) -> None:
    """Else the second could show an older state than the first."""
    caught_up.send(command("GET", shard.key) + command("GET", shard.other) + command("STRLEN", shard.key))
    reads = [[b"GET", shard.key], [b"GET", shard.other], [b"STRLEN", shard.key]]
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, *reads], replica(100), NIL, value(b"other"), b":5\r\n")
    assert caught_up.values() == []
    shard.answer(shard.primary, [reads[0], reads[2]], value(b"newest"), b":6\r\n")
    assert caught_up.values() == [b"newest", b"other", 6]


async def test_a_write_waits_for_the_reads_before_it_and_a_read_follows_its_own_write(
    world: World, shard: Shard, caught_up: Client
) -> None:
    set_, get = [b"SET", shard.key, b"v"], [b"GET", shard.key]
    caught_up.send(command("GET", shard.key))
    caught_up.send(command("SET", shard.key, "v") + command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    assert shard.primary.take() == []
    shard.answer(shard.replica, [INFO, get], replica(100), value(b"before"))
    assert caught_up.values() == [b"before"]
    shard.answer(shard.primary, [set_, get], OK, value(b"v"))
    assert caught_up.values() == [b"OK", b"v"]
    assert shard.replica.take() == []


async def test_the_connection_to_the_replica_ends(world: World, shard: Shard, caught_up: Client) -> None:
    caught_up.send(command("GET", shard.key) + command("GET", shard.other))
    shard.answer(shard.primary, [INFO], primary(100))
    assert len(shard.replica.take()) == 3
    shard.replica.reply(replica(100), value(b"old"))
    world.turn()
    shard.replica.lose()
    world.turn()
    assert caught_up.values() == [b"old"]
    shard.answer(shard.primary, [[b"GET", shard.other]], value(b"new"))
    assert caught_up.values() == [b"new"]


async def test_a_replica_that_says_moved_is_not_believed(
    world: World, shard: Shard, caught_up: Client
) -> None:
    caught_up.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(100), moved(world, shard.key, 1))
    assert world.topology.view.primary_of(slot_of(shard.key)).id == shard.primary.id
    shard.answer(shard.primary, [[b"GET", shard.key]], value(b"v"))
    assert caught_up.values() == [b"v"]


async def test_a_primary_that_was_deposed_proves_nothing(
    world: World, shard: Shard, caught_up: Client
) -> None:
    caught_up.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], replica(100))
    shard.answer(shard.primary, [[b"GET", shard.key]], value(b"v"))
    assert caught_up.values() == [b"v"]
    assert world.topology.wanted.is_set()


async def test_slots_in_flux_and_slots_that_moved_lately_are_read_at_primaries(
    world: World, shard: Shard, caught_up: Client, autojump_clock: MockClock
) -> None:
    read = [b"GET", shard.key]
    slot = slot_of(shard.key)
    world.migrations[slot] = (0, 1)
    world.see()
    caught_up.send(command("GET", shard.key))
    shard.answer(world.nodes[0], [read], value(b"1"))
    world.migrations.clear()
    world.owners[slot] = 1
    world.see()
    caught_up.send(command("GET", shard.key))
    shard.answer(world.nodes[1], [read], value(b"2"))
    await trio.sleep(5.1)
    world.replicas.settle(trio.current_time())
    caught_up.send(command("GET", shard.key))
    shard.answer(world.nodes[1], [INFO], primary(100))
    shard.answer(world.replica_nodes[1], [INFO, read], replica(100), value(b"3"))
    assert caught_up.values() == [b"1", b"2", b"3"]


async def test_a_client_that_left_costs_its_replies_only(
    world: World, shard: Shard, caught_up: Client
) -> None:
    other = reader(world, "CAUGHT_UP")
    with in_turn(world.hub):
        caught_up.connection.receive(command("GET", shard.key))
        other.connection.receive(command("GET", shard.key))
    caught_up.connection.close("left")
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, *[[b"GET", shard.key]] * 2], replica(100), NIL, value(b"v"))
    assert other.values() == [b"v"]
    assert shard.primary.take() == []


async def test_bounded_staleness_asks_no_primary_and_is_judged_by_what_was_sampled(
    world: World, shard: Shard, autojump_clock: MockClock
) -> None:
    client = reader(world, "BOUNDED_STALENESS", "500")
    known = world.replicas.owner_of(slot_of(shard.key))
    read = [b"GET", shard.key]
    asked_at = trio.current_time()
    client.send(command("GET", shard.key))  # nothing was sampled yet
    shard.answer(shard.primary, [read], value(b"1"))
    from routing.offsets import parse_sample

    known.note(parse_sample(primary(100)), asked_at)
    known.replicas[0].note(parse_sample(replica(100)), asked_at, asked_at)
    await trio.sleep(0.4)
    client.send(command("GET", shard.key))
    shard.answer(shard.replica, [INFO, read], replica(100), value(b"2"))
    await trio.sleep(0.2)
    client.send(command("GET", shard.key))  # what it proved last is too old by now
    shard.answer(shard.primary, [read], value(b"3"))
    assert client.values() == [b"1", b"2", b"3"]


async def test_a_reply_that_comes_after_the_bound_is_not_handed_out(
    world: World, shard: Shard, autojump_clock: MockClock
) -> None:
    from routing.offsets import parse_sample

    client = reader(world, "BOUNDED_STALENESS", "500")
    known = world.replicas.owner_of(slot_of(shard.key))
    known.note(parse_sample(primary(100)), trio.current_time())
    known.replicas[0].note(parse_sample(replica(100)), trio.current_time(), trio.current_time())
    client.send(command("GET", shard.key))
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(100))
    await trio.sleep(0.6)
    shard.replica.reply(value(b"late"))
    world.turn()
    assert client.values() == []
    shard.answer(shard.primary, [[b"GET", shard.key]], value(b"new"))
    assert client.values() == [b"new"]


async def test_eventual_asks_nobody_and_still_confirms_a_miss(world: World, shard: Shard) -> None:
    client = reader(world, "EVENTUAL")
    client.send(command("GET", shard.key) + command("GET", shard.other))
    shard.answer(shard.replica, [[b"GET", shard.key], [b"GET", shard.other]], value(b"old"), NIL)
    shard.answer(shard.primary, [[b"GET", shard.other]], NIL)
    assert client.values() == [b"old", None]


async def test_a_stamp_that_proves_nothing_takes_no_reply_from_reads_that_need_none(
    world: World, shard: Shard, autojump_clock: MockClock
) -> None:
    """Two groups behind one stamp, and between them, in the order in which they came, one of level eventual."""
    from routing.offsets import parse_sample

    known = world.replicas.owner_of(slot_of(shard.key))
    known.note(parse_sample(primary(100)), trio.current_time())
    known.replicas[0].note(parse_sample(replica(100)), trio.current_time(), trio.current_time())
    levels = (("BOUNDED_STALENESS", "500"), ("EVENTUAL",), ("BOUNDED_STALENESS", "900"))
    clients = [reader(world, *level) for level in levels]
    with in_turn(world.hub):
        for client, key in zip(clients, (shard.key, shard.other, shard.third), strict=True):
            client.connection.receive(command("GET", key))
    first, eventual, second = ([b"GET", key] for key in (shard.key, shard.other, shard.third))
    stamp = replica(1000, syncing=1)
    answers = (stamp, value(b"stale"), value(b"stale"), value(b"eventual"))
    shard.answer(shard.replica, [INFO, first, second, eventual], *answers)
    shard.answer(shard.primary, [first, second], value(b"1"), value(b"2"))
    assert [client.values() for client in clients] == [[b"1"], [b"eventual"], [b"2"]]


async def test_values_of_an_mget_come_from_replicas_and_owners(world: World, caught_up: Client) -> None:
    keys = [keys_of(world, index)[0] for index in range(3)]
    slot = slot_of(keys[2])
    world.migrations[slot] = (2, 0)
    world.see()
    caught_up.send(command("MGET", *keys))
    for index in (0, 1):
        assert world.nodes[index].take() == [INFO]
        world.nodes[index].reply(primary(10))
    assert world.nodes[2].take() == [[b"MGET", keys[2]]]
    world.nodes[2].reply(b"*1\r\n$1\r\nC\r\n")
    world.turn()
    for index, text in ((0, b"A"), (1, None)):
        assert world.replica_nodes[index].take() == [INFO, [b"MGET", keys[index]]]
        world.replica_nodes[index].reply(replica(10), b"*1\r\n" + (NIL if text is None else value(text)))
    world.turn()
    assert caught_up.values() == []
    assert world.nodes[1].take() == [[b"MGET", keys[1]]]
    world.nodes[1].reply(b"*1\r\n" + value(b"B"))
    world.turn()
    assert caught_up.values() == [[b"A", b"B", b"C"]]


async def test_cursors_scripts_and_reads_of_several_keys_go_to_owners(
    world: World, shard: Shard, caught_up: Client
) -> None:
    tagged = b"{" + shard.key + b"}2"
    for words in (
        ("HSCAN", shard.key, "0"),
        ("EVAL_RO", "return 1", "1", shard.key),
        ("SINTER", shard.key, tagged),
        ("EXISTS", shard.key),
    ):
        caught_up.send(command(*words))
        assert [taken[0] for taken in shard.primary.take()] == [words[0].encode()]
        shard.primary.reply(b":1\r\n")
        world.turn()
        assert caught_up.values() == [1]
    assert world.exchange.reads.refusals[Refusal.COMMAND] == 4


async def test_reads_without_a_stamp_do_not_stand_between_a_stamp_and_its_reads(
    world: World, shard: Shard, autojump_clock: MockClock
) -> None:
    """Else the replies of the wrong reads are dropped: one client waits for ever, another gets what is too old."""
    from routing.offsets import parse_sample

    known = world.replicas.owner_of(slot_of(shard.key))
    known.note(parse_sample(primary(100)), trio.current_time())
    known.replicas[0].note(parse_sample(replica(100)), trio.current_time(), trio.current_time())
    levels = (("BOUNDED_STALENESS", "500"), ("EVENTUAL",), ("BOUNDED_STALENESS", "600"))
    clients = [reader(world, *level) for level in levels]
    with in_turn(world.hub):
        for client, key in zip(clients, (shard.key, shard.other, shard.third), strict=True):
            client.connection.receive(command("GET", key))
    gets = {key: [b"GET", key] for key in (shard.key, shard.other, shard.third)}
    taken = shard.replica.take()
    assert sorted(taken) == sorted([INFO, *gets.values()])
    shard.replica.reply(*(replica(99) if words == INFO else value(b"old") for words in taken))
    world.turn()
    assert [client.values() for client in clients] == [[], [b"old"], []]
    shard.answer(shard.primary, [gets[shard.key], gets[shard.third]], value(b"1"), value(b"3"))
    assert [client.values() for client in clients] == [[b"1"], [], [b"3"]]


@pytest.mark.parametrize(
    "words", [("EXISTS",), ("SINTER",), ("HSCAN", "0")], ids=["parts", "several keys", "cursor"]
)
async def test_a_read_for_the_owner_does_not_overtake_reads_at_replicas(
    world: World, shard: Shard, caught_up: Client, words: tuple[str, ...]
) -> None:
    """Else it could show an older state than the read before it."""
    late = [words[0].encode(), shard.key, *(word.encode() for word in words[1:])]
    caught_up.send(command("GET", shard.key) + command(words[0], shard.key, *words[1:]))
    shard.answer(shard.primary, [INFO], primary(100))
    assert shard.primary.take() == []
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(100), value(b"v"))
    await world.settle()
    shard.answer(shard.primary, [late], b":1\r\n")
    await world.settle()
    assert caught_up.values() == [b"v", 1]


async def test_a_transaction_and_a_new_level_come_after_reads_at_replicas(
    world: World, shard: Shard, caught_up: Client
) -> None:
    get = [b"GET", shard.key]
    transaction = [[b"MULTI"], get, [b"EXEC"]]
    caught_up.send(command("GET", shard.key) + b"".join(command(*words) for words in transaction))
    shard.answer(shard.primary, [INFO], primary(100))
    assert shard.primary.take() == []
    shard.answer(shard.replica, [INFO, get], replica(100), value(b"1"))
    await world.settle()
    shard.answer(shard.primary, transaction, OK, b"+QUEUED\r\n", b"*1\r\n" + value(b"2"))
    await world.settle()
    assert caught_up.values() == [b"1", b"OK", b"QUEUED", [b"2"]]
    caught_up.send(command("GET", shard.key) + command("STEADY.READ", "STRONG") + command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    assert shard.primary.take() == []
    shard.answer(shard.replica, [INFO, get], replica(100), value(b"2"))
    await world.settle()
    shard.answer(shard.primary, [get], value(b"3"))
    assert caught_up.values() == [b"2", b"OK", b"3"]


async def test_the_time_that_a_read_waits_for_a_floor_counts_towards_its_deadline(
    world: World, shard: Shard, caught_up: Client, autojump_clock: MockClock
) -> None:
    caught_up.send(command("GET", shard.key))
    await trio.sleep(4.0)
    shard.primary.accepts = False
    shard.primary.lose()
    await world.settle()
    await trio.sleep(1.5)
    await world.settle()
    (refusal,) = caught_up.values()
    assert str(refusal).startswith("NOTREADY ")


# -- sessions


async def session_of(world: World) -> Client:
    client = world.client()
    client.send(command("STEADY.READ", "SESSION"))
    await world.settle()
    assert client.values() == [b"OK"]
    return client


@pytest.mark.parametrize(
    "writes",
    [
        [["EVAL", "script", "1", "KEY"]],
        [["FCALL", "function", "1", "KEY"]],
        [["DEL", "KEY"]],
        [["MULTI"], ["APPEND", "KEY", "v"], ["EXEC"]],
    ],
    ids=["script", "function", "split", "transaction"],
)
@pytest.mark.parametrize("is_pipelined", [False, True])
async def test_a_session_sees_what_it_wrote(
    world: World, shard: Shard, *, writes: list[list[str]], is_pipelined: bool
) -> None:
    """Also behind a read that asks for a floor, which is sampled before the write is sent."""
    client = await session_of(world)
    get = [b"GET", shard.key]
    named = [[shard.key.decode() if word == "KEY" else word for word in words] for words in writes]
    sent = [[word.encode() for word in words] for words in named]
    replies = [b"+QUEUED\r\n"] * len(sent)
    replies[0], replies[-1] = (OK, b"*1\r\n:1\r\n") if len(sent) > 1 else (b":1\r\n", b":1\r\n")
    data = b"".join(command(*words) for words in named)
    client.send(command("GET", shard.key) + (data if is_pipelined else b""))
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, get], replica(100), value(b"old"))
    if not is_pipelined:
        client.send(data)
    await world.settle()
    shard.answer(shard.primary, sent, *replies)
    await world.settle()
    assert client.values()[0] == b"old"
    client.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(110))
    shard.answer(shard.replica, [INFO, get], replica(100), value(b"old"))
    shard.answer(shard.primary, [get], value(b"new"))
    assert client.values() == [b"new"]


async def test_a_session_that_changes_its_resp_version_gets_replies_of_the_new_one(
    world: World, shard: Shard
) -> None:
    client = await session_of(world)
    read = [b"HGETALL", shard.key]
    client.send(command("HGETALL", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, read], replica(100), b"*2\r\n$1\r\nf\r\n$1\r\nv\r\n")
    client.send(command("HELLO", "3"))
    for _ in range(3):
        await world.settle()
    client.values()
    asked = len(shard.replica.links[0].take())
    client.send(command("HGETALL", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    assert len(shard.replica.links[0].take()) == asked == 0
    shard.answer(shard.replica, [INFO, read], replica(100), b"%1\r\n$1\r\nf\r\n$1\r\nv\r\n")
    assert client.values() == [{b"f": b"v"}]


async def test_a_session_that_could_not_be_checked_is_refused_until_it_is(
    world: World, shard: Shard, autojump_clock: MockClock
) -> None:
    """Each read of the pass, not only the first."""
    client = await session_of(world)
    client.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(100), value(b"1"))
    fail_over(world)
    await world.settle()
    client.send(command("GET", shard.key) + command("PING") + command("GET", shard.key))
    await trio.sleep(6.0)  # no primary answers
    await world.settle()
    one, first, pong, second = client.values()
    assert (one, pong) == (b"1", b"PONG")
    assert str(first).startswith("NOTREADY a primary did not tell")
    assert str(second) == str(first)


async def test_a_token_of_another_map_needs_a_look_at_the_cluster(
    world: World, autojump_clock: MockClock
) -> None:
    from routing.token import Token, pack_token

    world.exchange.token_secret = b"s" * 32
    witness = world.topology.view.shards[0].primary.id
    client = world.client()
    token = pack_token(Token(1, b"12345678", {}, frozenset({witness})), b"s" * 32)
    client.send(command("STEADY.READ", "SESSION", token))
    await trio.sleep(6.0)  # nobody looks
    await world.settle()
    (refusal,) = client.values()
    assert str(refusal).startswith("NOTREADY the token is of another slot map")


async def test_a_session_asks_the_primary_only_after_it_wrote(world: World, shard: Shard) -> None:
    client = world.client()
    client.send(command("STEADY.READ", "SESSION"))
    await world.settle()
    assert client.values() == [b"OK"]
    read = [b"GET", shard.key]
    client.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(100))
    shard.answer(shard.replica, [INFO, read], replica(100), value(b"1"))
    client.send(command("GET", shard.key))  # its floor stands
    shard.answer(shard.replica, [INFO, read], replica(100), value(b"2"))
    client.send(command("SET", shard.key, "v"))
    shard.answer(shard.primary, [[b"SET", shard.key, b"v"]], OK)
    client.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(120))
    shard.answer(shard.replica, [INFO, read], replica(119), value(b"1"))
    shard.answer(shard.primary, [read], value(b"v"))
    assert client.values() == [b"1", b"2", b"OK", b"v"]


async def test_a_token_carries_a_session_to_another_connection(world: World, shard: Shard) -> None:
    world.exchange.token_secret = b"s" * 32
    client, other = world.client(), world.client()
    client.send(command("STEADY.READ", "SESSION") + command("SET", shard.key, "v"))
    await world.settle()
    assert shard.primary.take() == [[b"SET", shard.key, b"v"]]
    shard.primary.reply(OK)
    world.turn()
    client.send(command("STEADY.TOKEN"))
    await world.settle()
    shard.answer(shard.primary, [INFO], primary(200))
    await world.settle()
    ok, done, token = client.values()
    assert (ok, done) == (b"OK", b"OK")
    other.send(command("STEADY.READ", "SESSION", token))
    await world.settle()
    assert other.values() == [b"OK"]
    other.send(command("GET", shard.key))
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(199), value(b"old"))
    shard.answer(shard.primary, [[b"GET", shard.key]], value(b"v"))
    assert other.values() == [b"v"]


async def test_a_forged_token_and_one_of_another_cluster_are_refused(world: World) -> None:
    from routing.token import Token, pack_token

    world.exchange.token_secret = b"s" * 32
    client = world.client()
    view = world.topology.view
    for token in (
        b"rubbish",
        pack_token(Token(1, view.fingerprint, {}, frozenset({view.shards[0].primary.id})), b"t" * 32),
        pack_token(Token(1, view.fingerprint, {}, frozenset({"9" * 40})), b"s" * 32),
    ):
        client.send(command("STEADY.READ", "SESSION", token))
        await world.settle()
        (refusal,) = client.values()
        assert isinstance(refusal, ServerError)
        assert str(refusal).startswith("INVALIDTOKEN ")


@pytest.mark.parametrize(("second_offset", "is_kept"), [(121, True), (120, False)])
async def test_a_session_over_a_failover(
    world: World, shard: Shard, second_offset: int, is_kept: bool, autojump_clock: MockClock
) -> None:
    """The new primary has what the session wrote only if its history provably includes it."""
    world.exchange.token_secret = b"s" * 32
    client = world.client()
    client.send(command("STEADY.READ", "SESSION"))
    await world.settle()
    client.send(command("SET", shard.key, "v"))
    shard.answer(shard.primary, [[b"SET", shard.key, b"v"]], OK)
    client.send(command("GET", shard.key))
    shard.answer(shard.primary, [INFO], primary(120))
    shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(120), value(b"v"))
    assert client.values() == [b"OK", b"OK", b"v"]
    fail_over(world)
    promoted = world.replica_nodes[0]
    for _ in range(5):
        await world.settle()
        await trio.sleep(0.05)
    promoted.take()
    client.send(command("GET", shard.key))
    await world.settle()
    for node, reply in (
        (promoted, primary(130, Y, (X, second_offset))),
        (world.nodes[1], primary(50, b"c" * 40)),
        (world.nodes[2], primary(50, b"d" * 40)),
    ):
        assert node.take() == [INFO]
        node.reply(reply)
    await world.settle()
    if is_kept:
        shard.answer(promoted, [[b"GET", shard.key]], value(b"v"))
        assert client.values() == [b"v"]
        return
    (refusal,) = client.values()
    assert str(refusal).startswith("NOTREADY this session's writes")
    assert promoted.take() == []
    client.send(command("SET", shard.key, "w"))
    shard.answer(promoted, [[b"SET", shard.key, b"w"]], OK)
    client.send(command("STEADY.READ", "SESSION"))
    await world.settle()
    client.send(command("GET", shard.key))
    shard.answer(promoted, [[b"GET", shard.key]], value(b"w"))
    assert client.values() == [b"OK", b"OK", b"w"]


def fail_over(world: World) -> None:
    """The first replica takes its primary's place, which is gone."""
    from dataclasses import replace

    from routing.topology import Node, Role
    from routing.topology import Shard as ShardOfView

    view = world.topology.view
    first = world.replica_nodes[0]
    shards = (ShardOfView(Node(first.id, first.address, Role.PRIMARY)), *view.shards[1:])
    world.topology.adopt(replace(view, epoch=2, shards=shards), trio.current_time())


async def test_a_bug_in_sending_answers_its_reads_and_spoils_no_later_ones(
    world: World, shard: Shard, caught_up: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 8: nobody waits for ever, and no later read joins the group that was given up."""

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(world.exchange.reads, "_ask_floor", fail)
        patched.setattr(world.exchange.reads, "_prepare", fail)
        caught_up.send(command("GET", shard.key))
        session = world.client()
        session.send(command("STEADY.READ", "SESSION"))
        await world.settle()
        session.send(command("GET", shard.key) + command("GET", shard.other))
    ok, *refusals = [*session.values(), *caught_up.values()]
    assert ok == b"OK"
    assert len(refusals) == 3
    assert all("internal fault" in str(refusal) for refusal in refusals)
    for client in (caught_up, session):
        client.send(command("GET", shard.key))
        shard.answer(shard.primary, [INFO], primary(100))
        shard.answer(shard.replica, [INFO, [b"GET", shard.key]], replica(100), value(b"v"))
        assert client.values() == [b"v"]
