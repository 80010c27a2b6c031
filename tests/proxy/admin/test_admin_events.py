"""The timeline as operators get it: nothing twice, nothing left out, and what cannot be told is said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from random import Random

import pytest
import trio
import trio.testing

from proxy.admin.events import HEARTBEAT_SECONDS, routes
from proxy.admin.http import ProblemError, Request, Response, StreamResponse
from proxy.admin.server import AdminServer
from proxy.store.interface import Delete
from proxy.store.memory import MemoryStore
from proxy.store.records import EVENTS, numbered
from proxy.topology.history import History
from routing.events import EventKind
from tests.proxy.topology.record import a_migration, an_event, write_events, write_migration


async def ask(
    store: MemoryStore, path: str = "/v1/events", headers: Mapping[str, str] | None = None, **query: object
) -> Response | StreamResponse:
    [route] = [route for route in routes(History(store)) if route.pattern == path]
    values = {
        name.rstrip("_"): [str(part) for part in (value if isinstance(value, list) else [value])]
        for name, value in query.items()
    }
    return await route.handlers["GET"](Request("GET", path, values, headers or {}))


async def page(store: MemoryStore, **query: object) -> dict[str, object]:
    response = await ask(store, **query)
    assert isinstance(response, Response)
    facts = json.loads(response.body)
    facts["events"] = [event["number"] for event in facts["events"]]
    assert isinstance(facts, dict)
    return facts


async def stream_of(store: MemoryStore, last: str = "", **query: object) -> StreamResponse:
    headers = {"accept": "text/event-stream", **({"last-event-id": last} if last else {})}
    response = await ask(store, headers=headers, **query)
    assert isinstance(response, StreamResponse)
    assert response.content_type == "text/event-stream"
    return response


async def a_store(count: int) -> MemoryStore:
    store = MemoryStore()
    kinds = (EventKind.FAILOVER, EventKind.NODE_ADDED)
    await write_events(store, [an_event(n, kinds[n % 2]) for n in range(1, count + 1)])
    return store


async def test_pages_say_where_to_go_on_and_what_is_missing() -> None:
    store = await a_store(10)
    facts = await page(store, from_=3, limit=2)
    assert (facts["events"], facts["next"], facts["at_end"], facts["missing_before"]) == (
        [3, 4],
        5,
        False,
        None,
    )
    facts = await page(store, limit=3, kind="failover")
    assert (facts["events"], facts["next"], facts["at_end"]) == ([6, 8, 10], 11, True)
    await store.commit([Delete(numbered(EVENTS, number)) for number in range(1, 6)])
    facts = await page(store, from_=1)
    assert (facts["events"], facts["missing_before"], facts["looked_from"]) == ([6, 7, 8, 9, 10], 6, 6)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"form": 1}, "takes from, limit, kind, shard, slot, wait_seconds, stream, and got form"),
        ({"from_": 0}, "from is a number from 1"),
        ({"from_": [1, 2]}, "may be given once"),
        ({"from_": 12}, "the newest event is 10"),
        ({"limit": 201}, "from 1 to 200"),
        ({"slot": 16384}, "is not a slot"),
        ({"kind": "no_such"}, "is no kind of event"),
        ({"wait_seconds": 61}, "from 0 to 60"),
        ({"stream": "yes"}, "true or false"),
        ({"stream": "true", "wait_seconds": 5}, "waits by itself"),
    ],
)
async def test_a_question_that_is_not_understood_is_refused(query: dict[str, object], words: str) -> None:
    """Promise 9: no parameter is passed over, and no filter waits for what can never come."""
    store = await a_store(10)
    with pytest.raises(ProblemError, match=words) as raised:
        await ask(store, **query)
    assert raised.value.status == 400


async def test_a_store_that_is_gone_is_503() -> None:
    store = await a_store(1)
    await store.aclose()
    for path in ("/v1/events", "/v1/migrations"):
        with pytest.raises(ProblemError) as raised:
            await ask(store, path)
        assert raised.value.status == 503


async def test_a_wait_ends_with_the_event_or_with_its_time(autojump_clock: trio.testing.MockClock) -> None:
    """An event that does not match ends no wait, and is not looked at again."""
    store = await a_store(10)
    assert (await page(store, from_=11, wait_seconds=7))["events"] == []
    assert trio.current_time() == pytest.approx(7)
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            await trio.sleep(3)
            await write_events(store, [an_event(11, EventKind.NODE_ADDED)])
            await trio.sleep(3)
            await write_events(store, [an_event(12, EventKind.FAILOVER)])

        nursery.start_soon(write)
        facts = await page(store, from_=11, wait_seconds=60, kind="failover")
    assert (facts["events"], facts["next"], trio.current_time()) == ([12], 13, pytest.approx(13))


# -- streams


def messages_of(received: bytes) -> list[dict[str, str]]:
    """The fields of each message; comments have none."""
    messages = []
    for block in received.decode().split("\n\n")[:-1]:
        fields = [line.partition(": ") for line in block.split("\n") if not line.startswith(":")]
        messages.append({name: value for name, _, value in fields})
    return messages


async def test_a_stream_tells_events_in_the_form_that_browsers_take() -> None:
    store = await a_store(2)
    async with aclosing((await stream_of(store, from_=1)).chunks()) as chunks:
        assert await anext(chunks) == b"retry: 1000\n\n"
        first, second = messages_of(await anext(chunks))
    assert (first["id"], first["event"], second["id"]) == ("1", "node_added", "2")
    assert json.loads(first["data"])["message"] == "node_added 1"


async def test_silence_is_broken_by_heartbeats_that_tell_the_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store = await a_store(10)
    async with aclosing((await stream_of(store, from_=11, kind="failover")).chunks()) as chunks:
        await anext(chunks)
        for beat in (1, 2):
            assert await anext(chunks) == b": heartbeat\nid: 10\n\n"
            assert trio.current_time() == pytest.approx(beat * HEARTBEAT_SECONDS)
        await write_events(store, [an_event(11, EventKind.FAILOVER)])
        assert messages_of(await anext(chunks))[0]["id"] == "11"


async def test_a_stream_says_what_is_missing_and_that_it_is_another_record() -> None:
    store = await a_store(10)
    async with aclosing((await stream_of(store, last="57", from_=3)).chunks()) as chunks:
        await anext(chunks)
        [replaced] = messages_of(await anext(chunks))
        assert replaced["event"] == "record_replaced"
        assert "id" not in replaced
        await anext(chunks)
        assert messages_of(await anext(chunks))[0]["id"] == "1"
    await store.commit([Delete(numbered(EVENTS, number)) for number in range(1, 6)])
    async with aclosing((await stream_of(store, last="2")).chunks()) as chunks:
        await anext(chunks)
        [missing] = messages_of(await anext(chunks))
        assert (missing["event"], json.loads(missing["data"])) == ("missing", {"missing_before": 6})


async def test_a_stream_outlives_a_store_that_is_away(autojump_clock: trio.testing.MockClock) -> None:
    store = await a_store(1)
    async with aclosing((await stream_of(store, from_=1)).chunks()) as chunks:
        await anext(chunks)
        await anext(chunks)
        store._is_closed = True
        [away] = messages_of(await anext(chunks))
        assert away["event"] == "store_unavailable"
        assert (await anext(chunks)).startswith(b":")
        store._is_closed = False
        await write_events(store, [an_event(2)])
        assert messages_of(await anext(chunks))[0]["id"] == "2"


@asynccontextmanager
async def a_connection(port: int, last: str) -> AsyncIterator[trio.SocketStream]:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        head = f"GET /v1/events?from=1 HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n{last}\r\n"
        await stream.send_all(head.encode())
        yield stream


async def test_a_stream_that_breaks_goes_on_without_loss_or_repetition() -> None:
    """Whoever sends Last-Event-ID gets each event once, while others write and connections break anywhere."""
    random, count = Random(7), 300
    store = MemoryStore()
    await write_events(store, [an_event(1)])
    server = AdminServer(routes(History(store)))
    seen: list[int] = []

    async def write() -> None:
        for number in range(2, count + 1):
            await write_events(store, [an_event(number)])
            if random.random() < 0.1:
                await trio.sleep(0.001)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await nursery.start(server.serve, listeners)
            port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(write)
            while not seen or seen[-1] < count:
                last = f"Last-Event-ID: {seen[-1]}\r\n" if seen else ""
                async with a_connection(port, last) as stream:
                    received = b""
                    for _ in range(random.randrange(2, 6)):
                        received += await stream.receive_some(random.choice([700, 5000]))
                        if f"id: {count}\n".encode() in received:
                            break
                whole = received[
                    : received.rfind(b"\n\n") + 2
                ]  # what a caller has when the connection breaks
                data = [line[6:] for line in whole.split(b"\n") if line.startswith(b"data: ")]
                seen += [json.loads(facts)["number"] for facts in data]
            server.stop()
    assert seen == list(range(1, count + 1))


async def test_migrations_are_told_with_their_stages() -> None:
    store = MemoryStore()
    await write_migration(store, a_migration(1))
    await write_migration(store, a_migration(2))
    response = await ask(store, "/v1/migrations", limit=1)
    assert isinstance(response, Response)
    [facts] = json.loads(response.body)["migrations"]
    assert (facts["id"], facts["stage"], facts["begun_at"]) == ("m-2", "moving", "2027-01-15T08:00:02.000Z")
    assert facts["stages"] == [{"stage": "moving", "at": "2027-01-15T08:00:02.000Z", "evidence": {"keys": 3}}]
    assert facts["open_slot_ranges"] == [[1, 2], [7, 7]]
