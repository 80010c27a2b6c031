"""Promises 5 and 6: one client's order through redirections and lost connections. The rules are open_requests.py's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from proxy.exchange.open_requests import RESENDS_MAX
from proxy.exchange.routes import KINDS
from proxy.protocol.encode import frame
from proxy.protocol.replies import ServerError
from proxy.topology.discovery import Discovery
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ASKING
from routing.slot import slot_of
from routing.topology import Address, Node, Role, Shard
from tests.proxy.world import DEADLINE_SECONDS, World, flat, in_turn, keys_of

OK = b"+OK\r\n"


def moved(world: World, key: bytes, index: int) -> bytes:
    return b"-MOVED %d %s\r\n" % (slot_of(key), str(world.nodes[index].address).encode())


def ask(world: World, key: bytes, index: int) -> bytes:
    return b"-ASK %d %s\r\n" % (slot_of(key), str(world.nodes[index].address).encode())


def command(*words: bytes | str) -> bytes:
    return frame([word if isinstance(word, bytes) else word.encode() for word in words])


# -- replies


async def test_replies_of_several_nodes_leave_in_request_order(world: World) -> None:
    """Promise 6, in each order in which three nodes can answer."""
    keys = [keys_of(world, index)[0] for index in range(3)]
    for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
        client = world.client()
        client.send(b"".join(command("GET", key) for key in keys))
        got = []
        for index in order:
            assert world.nodes[index].take() == [[b"GET", keys[index]]]
            world.nodes[index].reply(b"$1\r\n%d\r\n" % index)
            world.turn()
            got += client.replies()
        assert got == [b"$1\r\n%d\r\n" % index for index in range(3)]


async def test_a_client_that_left_takes_its_replies_with_it(world: World) -> None:
    """Promise 6: what it was owed is dropped, and the next client on the connection gets its own."""
    key = keys_of(world, 0)[0]
    gone, stays = world.client(), world.client()
    gone.send(command("GET", key))
    stays.send(command("GET", key))
    gone.connection.on_gone("reset")
    world.nodes[0].reply(b"+for the first\r\n", b"+for the second\r\n")
    world.turn()
    assert gone.replies() == []
    assert stays.values() == [b"for the second"]


# -- redirections


async def test_moved_is_followed_and_adopted(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("SET", key, "v"))
    world.nodes[0].take()
    world.nodes[0].reply(moved(world, key, 1))
    world.turn()
    assert world.nodes[1].take() == [[b"SET", key, b"v"]]
    world.nodes[1].reply(OK)
    world.turn()
    assert client.values() == [b"OK"]
    client.send(command("GET", key))
    assert world.nodes[1].take() == [[b"GET", key]]
    assert world.nodes[0].take() == []


async def test_moved_without_a_host_means_the_node_that_said_so(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("GET", key))
    world.nodes[0].reply(b"-MOVED %d :7001\r\n" % slot_of(key))
    world.turn()
    assert world.nodes[1].take() == [[b"GET", key]]


async def test_ask_is_followed_with_asking_and_not_adopted(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("SET", key, "v"))
    world.nodes[0].take()
    world.nodes[0].reply(ask(world, key, 1))
    world.turn()
    assert world.nodes[1].take() == [[b"ASKING"], [b"SET", key, b"v"]]
    world.nodes[1].reply(OK, OK)
    world.turn()
    assert client.values() == [b"OK"]
    client.send(command("GET", key))
    assert world.nodes[0].take() == [[b"GET", key]]


@pytest.mark.parametrize(
    "refusal",
    [
        b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
        b"-CLUSTERDOWN The cluster is down\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-MASTERDOWN Link with MASTER is down\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
    ],
)
async def test_a_node_that_cannot_now_is_asked_again(
    autojump_clock: MockClock, world: World, refusal: bytes
) -> None:
    """Even a write: the node said that it did not run it (promise 5)."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("SET", key, "v"))
    for _ in range(3):
        assert world.nodes[0].take() == [[b"SET", key, b"v"]]
        world.nodes[0].reply(refusal)
        await world.settle()
        assert client.replies() == []
        await trio.sleep(0.2)
        await world.settle()
    assert world.nodes[0].take() == [[b"SET", key, b"v"]]
    world.nodes[0].reply(OK)
    await world.settle()
    assert client.values() == [b"OK"]


async def test_ask_after_tryagain_is_followed(autojump_clock: MockClock, world: World) -> None:
    """A split slot whose last keys arrived at the target: what had to wait goes there, not to the owner for ever."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("EVAL", "return 1", "2", key, b"{" + key + b"}2"))
    for _ in range(3):  # the later ones come back to the task that retries
        assert len(world.nodes[0].take()) == 1
        world.nodes[0].reply(b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n")
        await world.settle()
        await trio.sleep(0.2)
        await world.settle()
    assert len(world.nodes[0].take()) == 1
    world.nodes[0].reply(ask(world, key, 1))
    await world.settle()
    assert [words[0] for words in world.nodes[1].take()] == [b"ASKING", b"EVAL"]
    world.nodes[1].reply(OK, b":1\r\n")
    await world.settle()
    assert client.values() == [1]


async def test_redirections_without_end_end_at_the_deadline(autojump_clock: MockClock, world: World) -> None:
    """Two nodes that each name the other: the client gets an error that says so, and in time."""
    key = keys_of(world, 0)[0]
    client = world.client()
    began = trio.current_time()
    client.send(command("SET", key, "v"))
    while not (values := client.values()):
        for index in (0, 1):
            for _ in world.nodes[index].take():
                world.nodes[index].reply(moved(world, key, 1 - index))
        await world.settle()
        if not any(node.has_unread() for node in world.nodes):
            await trio.sleep(0.001)
            await world.settle()
    # The deadline may strike while the write is at a node, which then answers in vain.
    assert str(values[0]).startswith(("NOTREADY", "OUTCOMEUNKNOWN"))
    assert DEADLINE_SECONDS <= trio.current_time() - began < DEADLINE_SECONDS + 1


async def test_a_client_that_leaves_mid_retry_leaves_nothing(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("SET", key, "v") + command("GET", key))
    client.connection.on_gone("reset")
    world.nodes[0].reply(moved(world, key, 1), moved(world, key, 1))
    await world.settle()
    assert world.nodes[1].take() == []
    assert world.hub.faults_total == 0


# -- the rules of order


async def test_rule_1_nothing_is_sent_past_a_retry(autojump_clock: MockClock, world: World) -> None:
    key, elsewhere = keys_of(world, 0)[0], keys_of(world, 2)[0]
    client = world.client()
    client.send(command("SET", key, "1"))
    world.nodes[0].take()
    world.nodes[0].reply(b"-TRYAGAIN\r\n")
    world.turn()
    client.send(command("SET", key, "2") + command("SET", elsewhere, "3"))
    await world.settle()
    assert world.nodes[2].take() == []
    await trio.sleep(0.2)
    await world.settle()
    assert world.nodes[0].take() == [[b"SET", key, b"1"]]
    world.nodes[0].reply(OK)
    await world.settle()
    assert world.nodes[0].take() == [[b"SET", key, b"2"]]
    assert world.nodes[2].take() == [[b"SET", elsewhere, b"3"]]


async def test_rule_2_a_retry_waits_for_what_is_in_flight(world: World) -> None:
    """What was sent after the turned away request may have run; only its answer tells."""
    key, elsewhere = keys_of(world, 0)[0], keys_of(world, 2)[0]
    client = world.client()
    client.send(command("SET", key, "1") + command("SET", elsewhere, "2"))
    world.nodes[0].take()
    world.nodes[0].reply(moved(world, key, 1))
    await world.settle()
    assert world.nodes[1].take() == []
    world.nodes[2].reply(OK)
    await world.settle()
    assert world.nodes[1].take() == [[b"SET", key, b"1"]]
    world.nodes[1].reply(OK)
    await world.settle()
    assert client.values() == [b"OK", b"OK"]


@pytest.mark.parametrize(
    ("first", "second", "is_refused"),
    [("SET", "SET", True), ("SET", "GET", True), ("GET", "SET", True), ("GET", "GET", False)],
)
async def test_rule_3_an_overtaken_request_is_refused(
    world: World, first: str, second: str, is_refused: bool
) -> None:
    """The first is turned away, the second runs (the slot came back meanwhile): the first must not run after it."""
    key = keys_of(world, 0)[0]
    words = {"SET": ("SET", key, "v"), "GET": ("GET", key)}
    client = world.client()
    client.send(command(*words[first]) + command(*words[second]))
    world.nodes[0].take()
    world.nodes[0].reply(ask(world, key, 1), b"+ran\r\n")
    await world.settle()
    if is_refused:
        assert world.nodes[1].take() == []
        values = client.values()
        assert str(values[0]).startswith(f"NOTREADY {first} did not run")
        assert values[1] == b"ran"
    else:
        assert flat(world.nodes[1].take()) == [b"ASKING", b"GET", key]


async def test_rule_3_is_about_keys_not_slots(world: World) -> None:
    key = keys_of(world, 0)[0]
    other = b"{" + key + b"}other"
    client = world.client()
    client.send(command("SET", key, "1") + command("SET", other, "2") + command("PING"))
    world.nodes[0].take()
    world.nodes[0].reply(ask(world, key, 1), OK)
    await world.settle()
    assert world.nodes[1].take() == [[b"ASKING"], [b"SET", key, b"1"]]
    world.nodes[1].reply(OK, OK)
    await world.settle()
    assert client.values() == [b"OK", b"OK", b"PONG"]
    assert world.hub.faults_total == 0


async def test_rule_4_a_new_owner_waits_for_answers_of_the_former(world: World) -> None:
    """Discovery tells of the new owner while a write is on its way to the former one."""
    key = keys_of(world, 0)[0]
    client, idle = world.client(), world.client()
    client.send(command("SET", key, "1"))
    world.owners[slot_of(key)] = 1
    world.see()
    client.send(command("SET", key, "2"))
    idle.send(command("GET", key))
    assert world.nodes[1].take() == [[b"GET", key]]
    world.nodes[0].take()
    world.nodes[0].reply(moved(world, key, 1))
    world.turn()
    assert world.nodes[1].take() == [[b"SET", key, b"1"]]
    world.nodes[1].reply(b"$-1\r\n", OK)
    world.turn()
    assert world.nodes[1].take() == [[b"SET", key, b"2"]]


async def test_rule_4_in_a_moving_slot_requests_go_one_by_one(world: World) -> None:
    key = keys_of(world, 0)[0]
    world.migrations[slot_of(key)] = (0, 1)
    world.see()
    client = world.client()
    client.send(b"".join(command("SET", key, str(n)) for n in range(3)))
    for n in range(3):
        await world.settle()
        assert world.nodes[0].take() == [[b"SET", key, b"%d" % n]]
        world.nodes[0].reply(OK)
    await world.settle()
    assert client.values() == [b"OK"] * 3


async def test_rule_5_a_write_behind_reads_waits_for_them_once(world: World) -> None:
    """They are on another connection, which the node may serve later."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("GET", key))
    client.send(command("SET", key, "1"))
    assert world.nodes[0].take() == [[b"GET", key]]
    world.nodes[0].reply(b"$-1\r\n")
    await world.settle()
    assert world.nodes[0].take() == [[b"SET", key, b"1"]]
    client.send(command("GET", key))
    client.send(command("SET", key, "2"))
    assert world.nodes[0].take() == [[b"GET", key], [b"SET", key, b"2"]]
    world.nodes[0].reply(OK, b"$1\r\n1\r\n", OK)
    await world.settle()
    assert client.values() == [None, b"OK", b"1", b"OK"]


async def test_rule_5_a_read_behind_a_write_follows_it(world: World) -> None:
    """On the same connection, also when it is the client's first read."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("SET", key, "1"))
    client.send(command("GET", key))
    used = [link for link in world.nodes[0].links if link.has_unread()]
    assert len(used) == 1
    assert world.nodes[0].take() == [[b"SET", key, b"1"], [b"GET", key]]


async def test_retries_that_can_go_at_once_keep_their_order(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(b"".join(command("SET", key, str(n)) for n in range(5)))
    world.nodes[0].take()
    world.nodes[0].reply(*[moved(world, key, 1)] * 5)
    world.turn()
    assert world.nodes[1].take() == [[b"SET", key, b"%d" % n] for n in range(5)]


async def test_quick_retries_are_bounded(world: World) -> None:
    """After RESENDS_MAX at once, a task goes on with waits in between: no storm between two confused nodes."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("SET", key, "v"))
    hops = 0
    while any(flat(node.take() for node in world.nodes[:1])) or any(
        flat(node.take() for node in world.nodes[1:2])
    ):
        index = hops % 2
        world.nodes[index].reply(moved(world, key, 1 - index))
        world.turn()
        hops += 1
        assert hops < 50
    assert hops == RESENDS_MAX + 1


# -- lost connections


@pytest.mark.parametrize(("words", "repeated"), [(("GET",), True), (("SET", "v"), False), (("INCR",), False)])
async def test_a_read_is_repeated_and_a_sent_write_is_not(
    autojump_clock: MockClock, world: World, words: tuple[str, ...], repeated: bool
) -> None:
    """Promise 5."""
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command(words[0], key, *words[1:]))
    assert len(world.nodes[0].take()) == 1
    world.nodes[0].lose()
    await world.settle()
    await world.connect()
    await trio.sleep(0.3)
    await world.settle()
    if repeated:
        assert world.nodes[0].take() == [[b"GET", key]]
        world.nodes[0].reply(b"$1\r\nv\r\n")
        await world.settle()
        assert client.values() == [b"v"]
    else:
        assert world.nodes[0].take() == []
        (value,) = client.values()
        assert isinstance(value, ServerError)
        assert str(value).startswith("OUTCOMEUNKNOWN")
        assert world.exchange.unknown_outcomes_total == 1


async def test_an_unsent_write_is_sent_after_a_reconnect(autojump_clock: MockClock, world: World) -> None:
    """Promise 5: not one byte of it had left."""
    key = keys_of(world, 0)[0]
    filler, client = world.client(), world.client()
    filler.send(command("SET", key, b"x" * 3_000_000))  # more than the socket takes
    client.send(command("SET", key, "v"))
    world.nodes[0].lose()
    await world.settle()
    await world.connect()
    await trio.sleep(0.3)
    await world.settle()
    assert str(filler.values()[0]).startswith("OUTCOMEUNKNOWN")
    assert world.nodes[0].take() == [[b"SET", key, b"v"]]
    world.nodes[0].reply(OK)
    await world.settle()
    assert client.values() == [b"OK"]


async def test_a_node_that_stays_away_gives_notready_in_time(autojump_clock: MockClock, world: World) -> None:
    """Promise 9: it says what, why, and that it did not run."""
    key = keys_of(world, 0)[0]
    client = world.client()
    world.nodes[0].accepts = False
    world.nodes[0].lose()
    await world.settle()
    began = trio.current_time()
    client.send(command("SET", key, "v"))
    while not (values := client.values()):
        await world.settle()
        await trio.sleep(0.05)
    assert trio.current_time() - began < DEADLINE_SECONDS + 1
    assert str(values[0]).startswith(f"NOTREADY slot {slot_of(key)} was not served within 5 s (node:7000")
    assert "did not run" in str(values[0])


async def test_one_lost_node_holds_back_no_other(world: World) -> None:
    """Promise 8."""
    world.nodes[0].accepts = False
    world.nodes[0].lose()
    await world.settle()
    blocked, client = world.client(), world.client()
    blocked.send(command("GET", keys_of(world, 0)[0]))
    client.send(command("GET", keys_of(world, 1)[0]))
    world.nodes[1].reply(b"+there\r\n")
    world.turn()
    assert client.values() == [b"there"]


async def test_noscript_is_healed_from_the_proxys_own_copy(world: World) -> None:
    key = keys_of(world, 0)[0]
    client = world.client()
    client.send(command("EVAL", "return 1", "1", key))
    world.nodes[0].take()
    world.nodes[0].reply(b":1\r\n")
    world.turn()
    digest = b"e0e1f9fabfc9d4800c877a703b823ac0578ff8db"
    client.send(
        command("EVALSHA", digest.upper(), "1", key)
        + command("EVALSHA", b"0" * 40, "1", keys_of(world, 0)[1])
    )
    world.nodes[0].take()
    world.nodes[0].reply(b"-NOSCRIPT No matching script.\r\n", b"-NOSCRIPT No matching script.\r\n")
    world.turn()
    assert world.nodes[0].take() == [[b"EVAL", b"return 1", b"1", key]]
    world.nodes[0].reply(b":1\r\n")
    world.turn()
    values = client.values()
    assert values[:2] == [1, 1]
    assert str(values[2]).startswith("NOSCRIPT")


async def test_asking_and_its_command_are_never_parted(world: World) -> None:
    key = keys_of(world, 0)[0]
    first, second = world.client(), world.client()
    first.send(command("SET", key, "1"))
    second.send(command("SET", key, "2"))
    world.nodes[0].take()
    world.nodes[0].reply(ask(world, key, 1), ask(world, key, 1))
    world.turn()
    assert world.nodes[1].take() == [[b"ASKING"], [b"SET", key, b"1"], [b"ASKING"], [b"SET", key, b"2"]]
    assert command("ASKING") == ASKING


async def test_reads_follow_writes_though_a_lane_is_gone(world: World) -> None:
    """Rule 5: a read that took the read lane because its node's write lane is gone takes no later write with it."""
    a, b = keys_of(world, 0)[0], keys_of(world, 1)[0]
    warm = world.client()  # so that the scan knows these commands
    warm.send(command("GET", a) + command("SET", a, "0"))
    world.nodes[0].reply(b"$-1\r\n", OK)
    world.turn()
    lost = world.upstreams.connection(world.nodes[0].address, 2, Lane.WRITE)
    assert lost is not None
    client = world.client()
    with in_turn(world.hub):
        lost.close("gone")
        client.connection.receive(command("GET", a) + command("SET", b, "1"))
    client.send(command("GET", b))
    lanes = {
        lane: [
            slot.raw
            for node in world.nodes
            if (connection := world.upstreams.connection(node.address, 2, lane)) is not None
            for slot in connection.owed
        ]
        for lane in Lane
    }
    assert not (lanes[Lane.READ] and lanes[Lane.WRITE]), lanes
    world.nodes[0].reply(b"$-1\r\n")
    world.turn()
    assert world.nodes[1].take() == [[b"SET", b, b"1"], [b"GET", b]]


async def test_a_node_that_left_and_returned_at_once_is_not_served_by_the_old_connection(
    autojump_clock: MockClock, world: World
) -> None:
    """Its keeper drains it and closes it, so a write that was queued there meanwhile would be lost."""
    node = world.nodes[1]
    routes = world.exchange.routes
    key = keys_of(world, 1)[0]
    world.client().send(command("GET", key) + command("SET", keys_of(world, 1)[1], "v"))
    world.client().send(command("GET", key))  # both lanes owe a reply
    world.upstreams.retain([other.address for other in world.nodes if other is not node])
    world.upstreams.ensure(node.address, 2)
    world.upstreams.notify(node.address)
    node.accepts = False
    await world.settle()
    assert not any(route.ready for route in routes.of_slot[slot_of(key)])
    node.reply(OK, OK, OK)
    await world.settle()
    await trio.sleep(1)
    assert world.upstreams.failure(node.address).endswith("refused")


async def test_a_node_is_asked_once_when_a_moved_names_a_replica(world: World) -> None:
    """Else two askers open a connection each, and one of them stays open with no owner."""
    shard, *others = world.topology.view.shards
    replica = Node("f" * 40, Address("node", 7100), Role.REPLICA, primary_id=shard.primary.id)
    world.topology.adopt(
        replace(world.topology.view, shards=(Shard(shard.primary, (replica,)), *others)), trio.current_time()
    )
    world.topology.on_moved(0, replica.address)
    discovery = Discovery(world.exchange.private._dialer, ())
    look = await discovery.look(world.topology.view, with_seeds=False)
    discovery.close()
    assert replica.address in look.asked
    assert len(look.asked) == len(set(look.asked))


async def test_a_client_waits_for_the_former_owner_and_no_other_client_does(world: World) -> None:
    """Rule 4, whichever way a slot's owner changes: another shard has it, or its shard another primary."""
    moved, kept = keys_of(world, 0)[0], keys_of(world, 1)[0]
    mine, other, neighbour = world.client(), world.client(), world.client()
    neighbour.send(command("GET", keys_of(world, 0)[1]))  # the same node, a slot that stays
    mine.send(command("GET", moved))
    other.send(command("GET", kept))
    world.owners[slot_of(moved)] = 2
    world.see()
    assert mine.connection.is_held
    assert not other.connection.is_held
    assert not neighbour.connection.is_held
    mine.send(command("GET", moved))
    assert world.nodes[2].take() == []
    world.nodes[0].reply(b"$1\r\nb\r\n", b"$1\r\na\r\n")
    world.turn()
    assert world.nodes[2].take() == [[b"GET", moved]]
    shards = list(world.topology.view.shards)
    view = replace(world.topology.view, revision=98, shards=(shards[0], shards[2], shards[1]))
    world.topology.adopt(view, trio.current_time())
    assert other.connection.is_held


async def test_routes_follow_connections_without_a_new_view(autojump_clock: MockClock, world: World) -> None:
    """A slot's routes are ready again once its node is, those of a slot in flux never; nobody else's change."""
    routes = world.exchange.routes
    slot, in_flux = (slot_of(key) for key in keys_of(world, 1)[:2])
    world.migrations[in_flux] = (1, 2)
    world.see()
    world.nodes[1].accepts = False
    world.nodes[1].lose()
    await world.settle()
    ready = [KINDS[2][lane] for lane in Lane]
    assert not any(routes.of_slot[slot][kind].ready for kind in ready)
    assert all(routes.of_slot[slot_of(keys_of(world, 0)[0])][kind].ready for kind in ready)
    world.nodes[1].accepts = True
    await world.connect()
    assert all(routes.of_slot[slot][kind].ready for kind in ready)
    assert not any(route.ready for route in routes.of_slot[in_flux])
    world.migrations.clear()
    world.see()
    assert all(routes.of_slot[in_flux][kind].ready for kind in ready)
    assert not any(routes.of_slot[slot][kind].ready for kind in KINDS[3])  # nobody speaks RESP 3
