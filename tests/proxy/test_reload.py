"""A reload takes effect whole or not at all, says what it did, and is on record as an operator's act."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from proxy.admin.server import DEFAULT_LIMITS
from proxy.app import Proxy, Started
from proxy.reload import RECORD_SECONDS, Reloaded, Reloader, ReloadRefusedError
from proxy.settings import (
    AdminSettings,
    ClientSettings,
    ClusterSettings,
    CommandSettings,
    CrossSlotTransactions,
    ListenerSettings,
    Settings,
)
from proxy.settings.load import DEFAULT_ORIGIN, Problem, SettingsError
from proxy.settings.reload import Changed
from proxy.store.interface import Expect, Operation, StoreUnavailableError
from proxy.store.memory import MemoryStore
from proxy.store.records import EVENTS, numbered, unpack_event
from proxy.topology.audit import Operator, read_page
from routing.audit import AuditRecord, verify
from routing.timeline import EventKind
from routing.topology import Address

ANN = Operator("ann", "10.0.0.9:51000")
OLD = Settings()
NEW = replace(
    OLD,
    log_level="debug",
    cluster=ClusterSettings(seeds=(Address("b", 7001),)),
    clients=ClientSettings(password="hunter2"),
)
PROBLEM = Problem(DEFAULT_ORIGIN, "log_level", '"loud"', "give another")


class FakeProxy:
    """Has settings, and remembers which it was told to go by."""

    def __init__(self) -> None:
        self.settings = OLD
        self.adopted: list[Settings] = []

    def adopt(self, settings: Settings) -> None:
        self.settings = settings
        self.adopted.append(settings)


class FailingStore(MemoryStore):
    """Takes no commits: it is out of reach, or it does not answer at all."""

    hangs = False

    async def commit(
        self, operations: Sequence[Operation], expect: Sequence[Expect] = (), *, durable: bool = False
    ) -> int:
        if self.hangs:
            await trio.sleep_forever()
        raise StoreUnavailableError("the disk is full")


def gives(settings: Settings) -> Callable[[], Settings]:
    return lambda: settings


def is_broken() -> Settings:
    raise SettingsError([PROBLEM, PROBLEM])


def events_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


async def test_live_settings_take_effect_and_the_others_are_named() -> None:
    proxy = FakeProxy()
    reloaded = await Reloader(proxy, gives(NEW), MemoryStore(), "p1").reload(ANN)
    assert proxy.adopted == [replace(OLD, log_level="debug", clients=NEW.clients)]
    assert reloaded == Reloaded(
        in_effect=(
            Changed("log_level", "info", "debug", is_live=True),
            Changed("clients.password", "", "(hidden)", is_live=True),
        ),
        needs_restart=(Changed("cluster.seeds", ["127.0.0.1:7600"], ["b:7001"], is_live=False),),
        record_problem="",
    )


async def test_the_act_and_its_event_are_recorded() -> None:
    """Who, from where, and the settings that changed before and after; no secret."""
    store = MemoryStore()
    await Reloader(FakeProxy(), gives(NEW), store, "p1", now=lambda: 12.5).reload(ANN)
    page = await read_page(store, 1, 10)
    assert verify(page.records, page.head) == ()
    [record] = page.records
    assert isinstance(record, AuditRecord)
    assert (record.who, record.origin, record.act, record.at) == ("ann", "10.0.0.9:51000", "settings", 12.5)
    assert record.before == {"log_level": "info", "clients.password": ""}
    assert record.after == {"log_level": "debug", "clients.password": "(hidden)"}
    entry = await store.get(numbered(EVENTS, 1))
    assert entry is not None
    event = unpack_event(1, entry.value)
    assert (event.kind, event.at, event.seen_by) == (EventKind.SETTINGS_RELOADED, 12.5, "p1")
    assert event.message == (
        "ann reloaded the settings of one proxy: log_level, clients.password changed; "
        "a restart is needed for cluster.seeds"
    )
    assert event.evidence == {
        "before": record.before,
        "after": record.after,
        "needs_restart": ["cluster.seeds"],
        "who": "ann",
        "origin": "10.0.0.9:51000",
    }
    assert await store.revision() == 1  # one commit


async def test_a_source_with_problems_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    proxy, store = FakeProxy(), MemoryStore()
    with pytest.raises(ReloadRefusedError, match="2 problems, and nothing was changed") as raised:
        await Reloader(proxy, is_broken, store, "p1").reload(ANN)
    assert raised.value.problems == (PROBLEM, PROBLEM)
    assert proxy.adopted == []
    assert await store.revision() == 0
    assert events_logged(caplog) == ["reload_refused"]


async def test_without_a_source_a_reload_is_refused() -> None:
    proxy = FakeProxy()
    with pytest.raises(ReloadRefusedError, match="restart it with the new ones") as raised:
        await Reloader(proxy, None, MemoryStore(), "p1").reload(ANN)
    assert raised.value.problems == ()
    assert proxy.adopted == []


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_reload_needs_no_store(
    hangs: bool, caplog: pytest.LogCaptureFixture, autojump_clock: trio.abc.Clock
) -> None:
    """Promise 8: it is in effect, and the answer and the log say that it is not on record."""
    proxy, store = FakeProxy(), FailingStore()
    store.hangs = hangs
    began = trio.current_time()
    with caplog.at_level(logging.INFO):
        reloaded = await Reloader(proxy, gives(NEW), store, "p1").reload(ANN)
    assert trio.current_time() - began <= DEFAULT_LIMITS.request_deadline_seconds / 2  # a POST is answered
    assert [settings.log_level for settings in proxy.adopted] == ["debug"]
    assert [changed.setting for changed in reloaded.in_effect] == ["log_level", "clients.password"]
    assert reloaded.record_problem == (
        f"the store memory did not answer within {RECORD_SECONDS:g} s, so whether it was recorded is not known"
        if hangs
        else "the disk is full"
    )
    assert events_logged(caplog) == ["settings_reloaded", "reload_not_recorded"]


async def test_the_record_has_reloads_in_the_order_in_which_they_took_effect() -> None:
    """Also when they are asked for at the same time: each begins where the one before ended."""
    levels = iter(["debug", "warning", "error"])
    store = MemoryStore()
    reloader = Reloader(FakeProxy(), lambda: replace(OLD, log_level=next(levels)), store, "p1")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(reloader.reload, ANN)
    records = (await read_page(store, 1, 10)).records
    assert [(record.before, record.after) for record in records if isinstance(record, AuditRecord)] == [
        ({"log_level": "info"}, {"log_level": "debug"}),
        ({"log_level": "debug"}, {"log_level": "warning"}),
        ({"log_level": "warning"}, {"log_level": "error"}),
    ]


async def test_a_signal_reloads_and_never_ends_the_proxy(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the source does: refuse, fail by a bug of ours, or answer."""
    asked = 0

    def source() -> Settings:
        nonlocal asked
        asked += 1
        if asked == 1:
            return is_broken()
        if asked == 2:
            raise KeyError("a bug")
        return NEW

    proxy, store = FakeProxy(), MemoryStore()
    reloader = Reloader(proxy, source, store, "p1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reloader.run)
        with trio.fail_after(15):
            for count in (1, 2, 3):
                reloader.reload_soon()
                reloader.reload_soon()  # at once: one reload for both
                while asked < count:
                    await trio.sleep(0.001)
            while not await store.revision():
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert (asked, [settings.log_level for settings in proxy.adopted]) == (3, ["debug"])
    assert events_logged(caplog) == ["reload_refused", "reload_failed"]
    [record] = (await read_page(store, 1, 10)).records
    assert isinstance(record, AuditRecord)
    assert (record.who, record.origin) == ("signal", "SIGHUP")


# -- a whole proxy, before a cluster that is not there

TOKEN = "s3cret"
LOOPBACK = Address("127.0.0.1", 0)


def settings_for(seed: Address, **more: Any) -> Settings:
    return Settings(
        cluster=ClusterSettings(seeds=(seed,), request_deadline_seconds=0.05),
        listeners=(ListenerSettings(LOOPBACK),),
        admin=AdminSettings(LOOPBACK, token=TOKEN),
        **more,
    )


@asynccontextmanager
async def running(proxy: Proxy) -> AsyncIterator[Started]:
    async with trio.open_nursery() as nursery:
        yield await nursery.start(lambda task_status: proxy.run(with_signals=False, task_status=task_status))
        nursery.cancel_scope.cancel()


async def post(
    admin: Address, content_type: str = "application/json", token: str = TOKEN, body: str = "{}"
) -> tuple[int, dict[str, Any]]:
    """(status, JSON) of a POST to /v1/settings/reload."""
    async with await trio.open_tcp_stream(*admin) as stream:
        await stream.send_all(
            (
                "POST /v1/settings/reload HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n"
                f"Authorization: Bearer {token}\r\nX-Steadyread-Operator: ann\r\n"
                f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            ).encode()
        )
        answer = b"".join([part async for part in stream])
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)


async def ask(stream: trio.SocketStream, *words: str) -> bytes:
    """A request's reply, which is small."""
    parts = [f"*{len(words)}\r\n", *(f"${len(word)}\r\n{word}\r\n" for word in words)]
    await stream.send_all("".join(parts).encode())
    return bytes(await stream.receive_some(65536))


@pytest.fixture
def closed_port() -> Address:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return Address("127.0.0.1", free.getsockname()[1])


async def test_a_post_reloads_the_running_proxy(closed_port: Address) -> None:
    """What the documentation of the settings says: what holds at once, and what for later connections."""
    given = settings_for(closed_port)
    proxy = Proxy(given, lambda: given)
    big = "x" * 200
    with trio.fail_after(15):
        async with running(proxy) as started, await trio.open_tcp_stream(*started.listeners[0]) as older:
            assert await ask(older, "PING", big) == b"$200\r\n" + big.encode() + b"\r\n"
            given = settings_for(
                closed_port,
                stop_deadline_seconds=3.0,
                clients=ClientSettings(connections_max=2, request_bytes_max=100, password="hunter2"),
                commands=CommandSettings(
                    cross_slot_transactions=CrossSlotTransactions.PER_SLOT, script_cache_bytes_max=7
                ),
            )
            status, answer = await post(started.admin)
            assert status == 200
            assert {each["setting"]: (each["before"], each["after"]) for each in answer["changed"]} == {
                "stop_deadline_seconds": (10.0, 3.0),
                "clients.password": ("", "(hidden)"),
                "clients.connections_max": (20_000, 2),
                "clients.request_bytes_max": (64 * 1024 * 1024, 100),
                "commands.cross_slot_transactions": ("refuse", "per_slot"),
            }
            assert [each["setting"] for each in answer["needs_restart"]] == [
                "commands.script_cache_bytes_max"
            ]
            assert (answer["is_recorded"], answer["record_problem"]) == (True, None)
            assert proxy.settings.stop_deadline_seconds == 3.0
            assert proxy.server.settings is proxy.settings
            # The older connection keeps its limits, and stays logged in.
            assert await ask(older, "PING", big) == b"$200\r\n" + big.encode() + b"\r\n"
            assert await ask(older, "MULTI") == b"+OK\r\n"
            assert await ask(older, "SET", "k", big) == b"+QUEUED\r\n"
            async with await trio.open_tcp_stream(*started.listeners[0]) as newer:
                assert (await ask(newer, "PING")).startswith(b"-NOAUTH ")
                assert await ask(newer, "AUTH", "hunter2") == b"+OK\r\n"
                assert (await ask(newer, "PING", big)).startswith(b"-")
            while proxy.server.client_count > 1:
                await trio.sleep(0.001)
            async with await trio.open_tcp_stream(*started.listeners[0]) as second:
                assert await ask(second, "AUTH", "hunter2") == b"+OK\r\n"
                async with await trio.open_tcp_stream(*started.listeners[0]) as third:
                    assert await third.receive_some(100) == b"-ERR max number of clients reached\r\n"
            [record] = (await read_page(proxy.store, 1, 10)).records
            assert isinstance(record, AuditRecord)
            assert (record.who, record.origin.rpartition(":")[0]) == ("ann", "127.0.0.1")
            assert "hunter2" not in str(record)


async def test_a_new_refresh_interval_does_not_wait_for_the_old_one_to_pass(
    closed_port: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one may be a day: a look at once ends it."""
    given = settings_for(closed_port)
    proxy = Proxy(given, lambda: given)
    with trio.fail_after(15):
        async with running(proxy) as started:
            looks: list[float] = []
            monkeypatch.setattr(
                proxy.topology, "refresh_soon", lambda: looks.append(proxy.keeper.refresh_seconds)
            )
            given = replace(given, cluster=replace(given.cluster, refresh_interval_seconds=0.25))
            assert (await post(started.admin))[0] == 200
            assert looks == [0.25]


async def test_what_a_post_needs_and_what_refuses_it(closed_port: Address) -> None:
    """A token, the content type that no foreign page can send, an empty object, and usable settings."""
    proxy = Proxy(settings_for(closed_port), is_broken)
    with trio.fail_after(15):
        async with running(proxy) as started:
            assert (await post(started.admin, token="wrong"))[0] == 401
            assert (await post(started.admin, content_type="text/plain"))[0] == 415
            assert (await post(started.admin, body='{"log_level": "debug"}'))[0] == 400
            status, problem = await post(started.admin)
            assert (status, problem["detail"]) == (
                422,
                "the settings have 2 problems, and nothing was changed",
            )
            assert problem["problems"][0] == {
                "origin": "default",
                "line": None,
                "setting": "log_level",
                "value": '"loud"',
                "message": "give another",
            }
            assert (await read_page(proxy.store, 1, 10)).records == ()


async def test_an_embedded_proxy_refuses_a_reload(closed_port: Address) -> None:
    proxy = Proxy(settings_for(closed_port))
    with trio.fail_after(15):
        async with running(proxy) as started:
            status, problem = await post(started.admin)
    assert (status, "restart it" in problem["detail"]) == (409, True)
