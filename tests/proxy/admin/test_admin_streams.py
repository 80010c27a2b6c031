"""Answers that wait for what is yet to happen take no more than their share, and end when they should."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable
from http import HTTPStatus

import pytest
import trio
import trio.testing

from proxy.admin.http import Request, Response, Route, StreamResponse
from proxy.admin.server import AdminLimits, AdminServer
from tests.proxy.admin.test_admin_server import Connect, parse, request, with_server

END = b"0\r\n\r\n"  # of a body in chunks that is whole
Chunks = Callable[[], AsyncGenerator[bytes, None]]


class Source:
    """A stream's chunks, given by the test; it knows whether it was closed."""

    def __init__(self) -> None:
        self.give, self._chunks = trio.open_memory_channel[bytes](100)
        self.closed = trio.Event()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._chunks:
                yield chunk
        finally:
            self.closed.set()

    def routes(self) -> list[Route]:
        return [*routes_of(self.chunks), Route("/ask", {"GET": answer})]


def routes_of(chunks: Chunks) -> list[Route]:
    async def stream(request: Request) -> StreamResponse:
        return StreamResponse(HTTPStatus.OK, "text/plain", chunks, (("X-Kind", "endless"),))

    return [Route("/stream", {"GET": stream})]


async def answer(request: Request) -> Response:
    return Response.of_json({})


def patient_routes(seconds: float, waited: list[str]) -> list[Route]:
    """A handler that waits for ever, and notes when it is cancelled."""

    async def wait(request: Request) -> Response:
        try:
            await trio.sleep_forever()
        finally:
            waited.append("ended")
        raise AssertionError("unreachable")

    return [Route("/wait", {"GET": wait}, deadline_seconds=seconds), Route("/ask", {"GET": answer})]


async def receive_until(stream: trio.abc.ReceiveStream, ending: bytes) -> bytes:
    received = b""
    with trio.fail_after(5):
        while not received.endswith(ending):
            data = await stream.receive_some()
            assert data, received
            received += data
    return received


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    received = b""
    with trio.fail_after(5):
        async for data in stream:
            received += data
    return received


async def test_chunks_are_sent_as_they_come_and_the_end_is_marked() -> None:
    """The caller has a chunk before there is a next one; a whole body parses as such, empty chunks aside."""
    source = Source()
    server = AdminServer(source.routes())

    async def act(connect: Connect, nursery: trio.Nursery) -> None:
        stream = await connect()
        await stream.send_all(request("GET /stream"))
        received = b""
        for chunk in (b"one", b"", b"two"):
            await source.give.send(chunk)
            if chunk:
                received += await receive_until(stream, chunk + b"\r\n")
        source.give.close()
        received += await receive_all(stream)
        [whole] = parse(received, ["GET"])
        assert (whole.status, whole.body, whole.headers["x-kind"]) == (200, b"onetwo", "endless")
        assert (whole.headers["transfer-encoding"], whole.headers["connection"]) == ("chunked", "close")

    await with_server(server, act)


async def test_http_1_0_gets_a_stream_without_chunks_and_head_gets_its_head() -> None:
    server = AdminServer(routes_of(_two_chunks))

    async def act(connect: Connect, nursery: trio.Nursery) -> None:
        old, head = await connect(), await connect()
        await old.send_all(b"GET /stream HTTP/1.0\r\n\r\n")
        assert (await receive_all(old)).endswith(b"\r\n\r\nonetwo")
        await head.send_all(request("HEAD /stream"))
        [answer] = parse(await receive_all(head), ["HEAD"])
        assert (answer.status, answer.body, answer.headers["x-kind"]) == (200, b"", "endless")

    await with_server(server, act)


async def _two_chunks() -> AsyncGenerator[bytes, None]:
    yield b"one"
    yield b"two"


async def test_a_stream_outlives_the_deadline_of_requests(autojump_clock: trio.testing.MockClock) -> None:
    async def slow() -> AsyncGenerator[bytes, None]:
        for _ in range(3):
            await trio.sleep(1000)
            yield b"x"

    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(AdminServer(routes_of(slow)).serve_connection, theirs)
        await ours.send_all(request("GET /stream"))
        received = b""
        async for data in ours:
            received += data
        await ours.aclose()
    assert trio.current_time() == pytest.approx(3000)
    assert parse(received, ["GET"])[0].body == b"xxx"


async def test_a_reader_that_stalls_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    """Each chunk has its deadline; one that reads slowly but steadily stays."""
    source = Source()
    server = AdminServer(source.routes(), limits=AdminLimits(chunk_deadline_seconds=5))
    ours, theirs = trio.testing.lockstep_stream_pair()
    for _ in range(10):
        source.give.send_nowait(b"chunk")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_connection, theirs)
        await ours.send_all(request("GET /stream"))
        for _ in range(5):
            await trio.sleep(4)
            assert await ours.receive_some()
        assert not source.closed.is_set()
        began = trio.current_time()
        await source.closed.wait()
        assert trio.current_time() - began == pytest.approx(5)
        assert not (await receive_all(ours)).endswith(END)
        await ours.aclose()


async def test_a_caller_that_leaves_is_noticed_while_nothing_is_sent() -> None:
    """By an end of file, and by a reset."""
    for is_reset in (False, True):
        source = Source()
        server = AdminServer(source.routes())

        async def act(
            connect: Connect, nursery: trio.Nursery, source: Source = source, is_reset: bool = is_reset
        ) -> None:
            stream = await connect()
            await stream.send_all(request("GET /stream"))
            await source.give.send(b"one")
            await receive_until(stream, b"one\r\n")
            if is_reset:
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await stream.aclose()
            with trio.fail_after(2):
                await source.closed.wait()

        await with_server(server, act)


async def test_a_stop_ends_streams_whole() -> None:
    """What was sent parses as a whole body, and the server is done."""
    source = Source()
    server = AdminServer(source.routes())

    async def act(connect: Connect, nursery: trio.Nursery) -> None:
        stream = await connect()
        await stream.send_all(request("GET /stream"))
        await source.give.send(b"one")
        received = await receive_until(stream, b"one\r\n")
        server.stop()
        with trio.fail_after(2):
            received += await receive_all(stream)
        assert parse(received, ["GET"])[0].body == b"one"
        assert source.closed.is_set()

    await with_server(server, act)


async def test_a_stream_that_fails_is_not_taken_for_whole() -> None:
    async def fail() -> AsyncGenerator[bytes, None]:
        yield b"one"
        raise KeyError("a bug")

    server = AdminServer(routes_of(fail))

    async def act(connect: Connect, nursery: trio.Nursery) -> None:
        stream = await connect()
        await stream.send_all(request("GET /stream"))
        received = await receive_all(stream)
        assert received.endswith(b"one\r\n")

    await with_server(server, act)


async def test_those_who_wait_leave_room_for_short_questions() -> None:
    """Half of the connections may wait, be it for streams or for handlers; what ends makes room."""
    waited: list[str] = []
    source = Source()
    table = [*patient_routes(60, waited), *routes_of(source.chunks)]
    server = AdminServer(table, limits=AdminLimits(connections_max=4))

    async def act(connect: Connect, nursery: trio.Nursery) -> None:
        streaming, waiting, third = await connect(), await connect(), await connect()
        await streaming.send_all(request("GET /stream"))
        await receive_until(streaming, b"\r\n\r\n")
        await waiting.send_all(request("GET /wait"))
        await trio.sleep(0.05)  # a real socket: until the server has read the request
        for path in ("/stream", "/wait"):
            await third.send_all(request(f"GET {path}"))
            [refused] = parse(await third.receive_some(), ["GET"])
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["detail"] == "2 callers wait for events already"
        await third.send_all(request("GET /ask"))
        assert parse(await third.receive_some(), ["GET"])[0].status == 200
        await streaming.aclose()
        await source.closed.wait()
        await trio.testing.wait_all_tasks_blocked()  # its tasks end
        await third.send_all(request("GET /stream"))
        assert (await third.receive_some()).startswith(b"HTTP/1.1 200 ")

    await with_server(server, act)


async def test_a_handler_that_waits_has_its_own_deadline(autojump_clock: trio.testing.MockClock) -> None:
    waited: list[str] = []
    server = AdminServer(patient_routes(60, waited))
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_connection, theirs)
        await ours.send_all(request("GET /wait"))
        received = b""
        async for data in ours:
            received += data
        await ours.aclose()
    [answer] = parse(received, ["GET"])
    assert (answer.status, answer.json()["detail"]) == (503, "no answer within 60 seconds")
    assert (trio.current_time(), waited) == (pytest.approx(60), ["ended"])


async def test_a_handler_that_waits_is_ended_by_stop_and_by_its_callers_leaving() -> None:
    waited: list[str] = []
    server = AdminServer(patient_routes(60, waited))

    async def act(connect: Connect, nursery: trio.Nursery) -> None:
        leaving, staying = await connect(), await connect()
        await leaving.send_all(request("GET /wait"))
        await staying.send_all(request("GET /wait"))
        await trio.sleep(0.05)  # a real socket: until the server has read the requests
        await leaving.aclose()
        with trio.fail_after(2):
            while not waited:
                await trio.sleep(0.01)
        assert len(waited) == 1
        server.stop()
        [answer] = parse(await receive_all(staying), ["GET"])
        assert (answer.status, answer.json()["detail"]) == (503, "the proxy is stopping")
        assert answer.headers["connection"] == "close"

    await with_server(server, act)


async def test_a_question_sent_early_is_answered_after_the_one_that_waits() -> None:
    """The look for callers that left loses no byte of a pipelined request."""
    release = trio.Event()

    async def wait(request: Request) -> Response:
        await release.wait()
        return Response.of_json({"waited": True})

    server = AdminServer([Route("/wait", {"GET": wait}, deadline_seconds=60), Route("/ask", {"GET": answer})])

    async def act(connect: Connect, nursery: trio.Nursery) -> None:
        stream = await connect()
        await stream.send_all(request("GET /wait"))
        await trio.sleep(0.05)  # a real socket: until the server waits
        await stream.send_all(request("GET /ask")[:9])
        await trio.sleep(0.05)
        release.set()
        first = await stream.receive_some()
        await stream.send_all(request("GET /ask")[9:])
        second = await stream.receive_some()
        assert [parse(part, ["GET"])[0].json() for part in (first, second)] == [{"waited": True}, {}]

    await with_server(server, act)
