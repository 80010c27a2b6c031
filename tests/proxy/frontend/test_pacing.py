"""Clients over a limit, driven with bytes alone: they wait, nothing is lost or refused, and others go on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import trio
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from trio.testing import MockClock

from proxy.frontend.client import HELD_BYTES_MAX, PASS_REQUESTS_MAX
from proxy.frontend.pacing import Limit, UserLimits
from proxy.settings import ClientSettings, ListenerSettings, Settings, UserSettings
from routing.priority import Priority
from tests.proxy.exchange.test_open_requests import command
from tests.proxy.world import Client, World, in_turn, world_of

PING, PONG = command("PING"), b"+PONG\r\n"
BLPOP = command("BLPOP", "list", "0")


def with_user(**limits: float | int | str) -> Settings:
    return Settings(users=(UserSettings("app", "secret", **limits),))  # type: ignore[arg-type]  # its fields'


def user_of(world: World, name: str = "app") -> Client:
    client = world.client()
    client.send(command("AUTH", name, "secret"))
    assert client.values() == [b"OK"]
    return client


def gets(first: int, end: int) -> bytes:
    return b"".join(command("GET", f"k{number}") for number in range(first, end))


def numbers(requests: Iterable[list[bytes]]) -> list[int]:
    return [int(request[1][1:]) for request in requests]


async def answer_all(world: World) -> list[int]:
    """Nodes answer until nothing comes any more; the numbers of the GETs, in order."""
    found: list[int] = []
    world.nodes[0].reply(*[b"+v\r\n"] * len(world.nodes[0]._unanswered))
    await world.settle()
    while requests := world.nodes[0].take():
        found += numbers(requests)
        world.nodes[0].reply(*[b"+%b\r\n" % request[1] for request in requests])
        await world.settle()
    return found


async def test_a_connection_over_its_rate_goes_on_at_that_rate(autojump_clock: MockClock) -> None:
    """Promise 6: it waits, nothing is refused or lost, and its order holds."""
    async with world_of(1, clients=ClientSettings(requests_per_second=10, requests_burst=3)) as world:
        client = world.client()
        start = trio.current_time()
        client.send(PING * 2 + gets(0, 6))
        await world.settle()
        assert client.replies() == [PONG, PONG]
        assert numbers(world.nodes[0].take()) == [0]
        world.nodes[0].reply(b"+0\r\n")
        for number in range(1, 6):
            await trio.sleep_until(start + number / 10 - 0.01)
            assert world.nodes[0].take() == []
            await trio.sleep_until(start + number / 10 + 0.01)
            assert numbers(world.nodes[0].take()) == [number]
            world.nodes[0].reply(b"+%d\r\n" % number)
        world.turn()
        assert client.values() == [b"%d" % number for number in range(6)]
        assert world.server.pacing.paced_total == {Limit.RATE: 5, Limit.IN_FLIGHT: 0}


async def test_who_keeps_to_the_rate_never_waits(autojump_clock: MockClock) -> None:
    async with world_of(1, clients=ClientSettings(requests_per_second=10)) as world:
        client = world.client()
        for _ in range(3):
            client.send(PING * 10)
            assert client.replies() == [PONG] * 10
            await trio.sleep(1)
        assert world.server.pacing.paced_total[Limit.RATE] == 0


async def test_without_a_limit_nothing_is_counted_and_nobody_is_woken(autojump_clock: MockClock) -> None:
    async with world_of(1) as world:
        client = world.client()
        client.send(PING * PASS_REQUESTS_MAX)
        assert len(client.replies()) == PASS_REQUESTS_MAX
        assert client.connection._pacer is None
        assert not world.server.pacing._timed
        assert not world.server.pacing._next_turn


async def test_a_slow_rate_waits_longer_than_one_wake(autojump_clock: MockClock) -> None:
    async with world_of(1, clients=ClientSettings(requests_per_second=0.1)) as world:
        client = world.client()
        client.send(PING * 2)
        start = trio.current_time()
        await trio.sleep(9.9)
        assert client.replies() == [PONG]
        await trio.sleep(0.2)
        assert client.replies() == [PONG]
        assert trio.current_time() - start < 11
        assert world.server.pacing.paced_total[Limit.RATE] == 1


async def test_the_bytes_of_a_held_client_are_bounded(autojump_clock: MockClock) -> None:
    """Promise 7: past some bytes its socket is not read; and it is again."""
    async with world_of(1, clients=ClientSettings(requests_per_second=1000, requests_burst=1)) as world:
        client = world.client()
        count = HELD_BYTES_MAX // len(PING) + 100
        client.send(PING * count)
        assert client.transport.is_paused
        await trio.sleep(count / 1000 + 0.1)
        assert not client.transport.is_paused
        assert len(client.replies()) == count


async def test_a_held_client_that_shuts_its_side_gets_all_its_replies(autojump_clock: MockClock) -> None:
    async with world_of(1, clients=ClientSettings(requests_per_second=10, requests_burst=1)) as world:
        client = world.client()
        client.send(PING * 5)
        client.end()
        assert not client.transport.is_closed
        await trio.sleep(1)
        assert client.replies() == [PONG] * 5
        assert client.transport.is_closed


async def test_a_held_client_is_not_idle(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ClientSettings(requests_per_second=0.01, idle_timeout_seconds=5)
    async with world_of(1, clients=limits) as world:
        held, idle = world.client(), world.client()
        held.send(PING * 2)
        idle.send(PING)
        for client in (held, idle):
            client.connection.last_command_at -= 6
        world.server.beat()
        assert idle.transport.is_closed
        assert not held.transport.is_closed


async def test_a_user_s_rate_is_that_of_all_its_connections(autojump_clock: MockClock) -> None:
    """They take turns: the one that sent a thousand does not keep the other waiting for more than one turn."""
    async with world_of(1, settings=with_user(requests_per_second=10, requests_burst=4)) as world:
        noisy, quiet, other = user_of(world), user_of(world), world.client()
        await trio.sleep(1)
        noisy.send(PING * 1000)
        quiet.send(PING * 2)
        other.send(PING * 50)
        assert len(other.replies()) == 50
        await trio.sleep(0.05)
        assert [len(noisy.replies()), len(quiet.replies())] == [4, 0]
        await trio.sleep(0.4)
        assert len(quiet.replies()) == 2
        assert len(noisy.replies()) == 2
        await trio.sleep(10)
        assert 99 <= len(noisy.replies()) <= 101


async def test_connections_take_turns_for_what_may_be_in_flight() -> None:
    async with world_of(1, settings=with_user(in_flight_max=4)) as world:
        noisy, quiet, other = user_of(world), user_of(world), world.client()
        noisy.send(gets(0, 100))
        quiet.send(gets(1000, 1002))
        other.send(gets(2000, 2010))
        await world.settle()
        assert numbers(world.nodes[0].take()) == [0, 1, 2, 3, *range(2000, 2010)]
        world.nodes[0].reply(*[b"+v\r\n"] * 2)
        await world.settle()
        assert numbers(world.nodes[0].take()) in ([1000, 4], [4, 1000])
        assert user_limits(world).in_flight == 4
        assert (await answer_all(world))[-1] == 99
        await world.settle()
        assert len(noisy.replies()) == 100
        assert len(quiet.replies()) == 2
        assert user_limits(world).in_flight == 0
        assert world.server.pacing.paced_total[Limit.IN_FLIGHT] > 0
        assert world.server.pacing.paced_total[Limit.RATE] == 0


def user_limits(world: World) -> UserLimits:
    limits = world.server.users.of(b"app").limits
    assert limits is not None
    return limits


async def test_who_leaves_makes_room() -> None:
    async with world_of(1, settings=with_user(in_flight_max=2)) as world:
        first, second, third = user_of(world), user_of(world), user_of(world)
        first.send(gets(0, 10))
        second.send(gets(10, 20))
        third.send(gets(20, 21))
        await world.settle()
        second.connection.close("gone")  # which waits
        first.connection.close("gone")  # which has two in flight
        await world.settle()
        assert numbers(world.nodes[0].take()) == [0, 1, 20]
        assert user_limits(world).in_flight == 1
        assert not user_limits(world).waiting


async def test_a_turn_that_cannot_be_used_is_another_s() -> None:
    """One whose replies nobody reads cannot go on when it is its turn."""
    async with world_of(1, settings=with_user(in_flight_max=1)) as world:
        first, stuck, third = user_of(world), user_of(world), user_of(world)
        first.send(gets(0, 1))
        stuck.send(gets(10, 11))
        third.send(gets(20, 21))
        stuck.transport.unsent_bytes = 2 << 20
        stuck.connection._pace()
        assert stuck.transport.is_paused
        assert await answer_all(world) == [0, 20]
        stuck.drain()
        assert await answer_all(world) == [10]
        assert user_limits(world).in_flight == user_limits(world)._reserved == 0


async def test_who_comes_later_does_not_overtake_who_waits(autojump_clock: MockClock) -> None:
    """Of a user's rate: at each moment at which a token is there, it is that of who has waited."""
    async with world_of(1, settings=with_user(requests_per_second=10, requests_burst=3)) as world:
        first, later = user_of(world), user_of(world)
        await trio.sleep(1)
        first.send(PING * 4)
        await world.settle()
        assert len(first.replies()) == 3
        await trio.sleep(0.0999)
        with in_turn(world.hub):  # the token has come, and the timer's task was not there yet
            world.server.users.of(b"app").limits.bucket._tokens += 1  # type: ignore[union-attr]  # it has both
            later.connection.receive(PING)
        assert later.replies() == []
        await trio.sleep(0.01)
        assert [len(first.replies()), len(later.replies())] == [1, 1]


async def test_a_blocking_command_does_not_count() -> None:
    """Else the consumers of a queue could keep its producer, the same user, from filling it."""
    async with world_of(1, settings=with_user(in_flight_max=1)) as world:
        consumer, producer = user_of(world), user_of(world)
        consumer.send(BLPOP)
        await world.settle()
        assert user_limits(world).in_flight == 0
        producer.send(gets(0, 2))
        await world.settle()
        assert numbers(request for request in world.nodes[0].take() if request[0] == b"GET") == [0]


async def test_another_user_has_its_own_limits_from_the_next_request_on() -> None:
    settings = Settings(
        users=(UserSettings("app", "secret", in_flight_max=1), UserSettings("job", "secret", in_flight_max=3))
    )
    async with world_of(1, settings=settings) as world:
        client = world.client()
        client.send(
            command("AUTH", "app", "secret") + gets(0, 1) + command("AUTH", "job", "secret") + gets(1, 9)
        )
        await world.settle()
        assert numbers(world.nodes[0].take()) == [0]  # which fills what the first user may have in flight
        world.nodes[0].reply(b"+0\r\n")
        await world.settle()
        assert numbers(world.nodes[0].take()) == [1, 2, 3]
        client.connection.close("gone")
        assert user_limits(world).in_flight == 0


async def test_what_is_in_flight_goes_over_to_the_new_user() -> None:
    settings = Settings(
        users=(UserSettings("app", "secret", in_flight_max=2), UserSettings("job", "secret", in_flight_max=9))
    )
    async with world_of(1, settings=settings) as world:
        client = user_of(world)
        client.send(gets(0, 1))
        assert user_limits(world).in_flight == 1
        client.send(command("AUTH", "job", "secret"))
        assert user_limits(world).in_flight == 0


async def test_logging_in_again_does_not_fill_the_connection_s_bucket(autojump_clock: MockClock) -> None:
    settings = replace(with_user(), clients=ClientSettings(requests_per_second=1, requests_burst=4))
    async with world_of(1, settings=settings) as world:
        client = world.client()
        client.send(
            PING + command("AUTH", "app", "secret") + PING + command("AUTH", "default", "x") + PING * 9
        )
        await world.settle()
        assert len(client.replies()) == 4


async def test_a_reload_changes_a_user_s_limits_at_once() -> None:
    async with world_of(1, settings=with_user(in_flight_max=1)) as world:
        client, second = user_of(world), user_of(world)
        client.send(gets(0, 6))
        second.send(gets(10, 11))
        await world.settle()
        assert numbers(world.nodes[0].take()) == [0]
        world.server.adopt(with_user(in_flight_max=3, priority="critical"))
        await world.settle()
        assert client.connection.priority == Priority.CRITICAL
        assert sorted(numbers(world.nodes[0].take())) == [1, 10]
        assert user_limits(world).in_flight == 3
        world.server.adopt(with_user())
        await world.settle()
        await answer_all(world)
        assert client.connection.priority == Priority.NORMAL
        assert len(client.replies()) == 6
        assert len(second.replies()) == 1


async def test_the_user_s_priority_is_between_the_listener_s_and_the_connection_s() -> None:
    settings = replace(with_user(priority="background"), listeners=(ListenerSettings(priority="critical"),))
    async with world_of(1, settings=settings) as world:
        client = world.client()
        said = command("STEADY.PRIORITY")
        client.send(said + command("AUTH", "app", "secret") + said + command("STEADY.PRIORITY", "CRITICAL"))
        client.send(said + command("AUTH", "default", "") + said + command("RESET"))
        await world.settle()
        client.send(said + command("AUTH", "app", "secret") + said)
        assert client.values() == [
            *[b"normal", b"OK", b"background", b"OK"],
            *[b"critical", b"OK", b"critical", b"RESET"],
            *[b"normal", b"OK", b"background"],
        ]


async def test_what_each_user_sent_and_has_in_flight_is_counted() -> None:
    async with world_of(1, settings=with_user()) as world:
        client, gone = world.client(), user_of(world)
        client.send(PING + command("AUTH", "app", "secret") + gets(0, 3))
        gone.send(PING)
        gone.connection.close("gone")
        samples = {
            (sample.family.name, sample.label_values): sample.value
            for sample in world.server.users.samples(world.server.clients())
        }
        assert samples == {
            ("steadyread_user_requests_total", ("default",)): 3,  # each AUTH came from it
            ("steadyread_user_requests_total", ("app",)): 4,
            ("steadyread_user_in_flight_requests", ("default",)): 0,
            ("steadyread_user_in_flight_requests", ("app",)): 3,
            ("steadyread_clients_paced_total", ("rate",)): 0,
            ("steadyread_clients_paced_total", ("in_flight",)): 0,
        }


async def test_one_client_s_long_pipeline_leaves_turns_to_others() -> None:
    """Without any limit: what one read of its socket brought is not answered in one step."""
    async with world_of(1) as world:
        noisy, quiet = world.client(), world.client()
        noisy.send(PING * 3000)
        quiet.send(PING)
        assert quiet.replies() == [PONG]
        assert len(noisy.replies()) == PASS_REQUESTS_MAX
        await world.settle()
        assert len(noisy.replies()) == 3000 - PASS_REQUESTS_MAX


async def test_a_pipeline_of_reads_at_replicas_is_not_parted() -> None:
    """Each part would be a round trip of its own."""
    async with world_of(1) as world:
        client = world.client()
        client.send(command("STEADY.READ", "EVENTUAL"))
        assert client.values() == [b"OK"]
        client.send(PING * PASS_REQUESTS_MAX * 2)
        assert len(client.replies()) == PASS_REQUESTS_MAX * 2


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([0, 20, 300]),
    own_rate=st.sampled_from([0, 50]),
    in_flight_max=st.integers(0, 3),
    script=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 12), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    ),
)
def test_under_any_limits_everybody_gets_all_replies_in_order(
    rate: int, own_rate: int, in_flight_max: int, script: list[tuple[int, int, bool, bool]]
) -> None:
    """Three connections of one user send; nodes answer now and then. Limits hold at every step, and all is answered."""

    async def play() -> None:
        settings = replace(
            with_user(requests_per_second=rate, requests_burst=5, in_flight_max=in_flight_max),
            clients=ClientSettings(requests_per_second=own_rate),
        )
        async with world_of(1, settings=settings) as world:
            clients = [user_of(world) for _ in range(3)]
            sent = [0, 0, 0]
            replies: list[list[bytes]] = [[], [], []]
            start, taken = trio.current_time(), 0

            def check() -> None:
                nonlocal taken
                requests = world.nodes[0].take()
                waiting.extend(requests)
                taken += len(requests)
                if in_flight_max:
                    assert len(waiting) <= in_flight_max
                if rate:
                    assert taken <= 5 + rate * (trio.current_time() - start) + 0.01

            waiting: list[list[bytes]] = []
            for who, count, answers, sleeps in script:
                first = sent[who]
                sent[who] += count
                clients[who].send(b"".join(command("GET", f"{who}.{n}") for n in range(first, first + count)))
                await world.settle()
                check()
                if answers and waiting:
                    world.nodes[0].reply(b"+%b\r\n" % waiting.pop(0)[1])
                    await world.settle()
                    check()
                if sleeps:
                    await trio.sleep(0.03)
            for _ in range(3000):
                await world.settle()
                check()
                if not waiting and not any(client.connection._unread_bytes for client in clients):
                    break
                while waiting:
                    world.nodes[0].reply(b"+%b\r\n" % waiting.pop(0)[1])
                await trio.sleep(0.02)
            await world.settle()
            for who, client in enumerate(clients):
                replies[who] += client.replies()
                assert replies[who] == [b"+%d.%d\r\n" % (who, n) for n in range(sent[who])]
            if in_flight_max:
                limits = user_limits(world)
                assert limits.in_flight == limits._reserved == 0
                assert not limits.waiting

    trio.run(play, clock=MockClock(autojump_threshold=0))
