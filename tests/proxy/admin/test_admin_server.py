"""The admin port speaks HTTP/1.1 rightly, whatever is sent to it, however it is cut."""

import json
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from itertools import pairwise

import h11
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from proxy.admin.http import ProblemError, Request, Response, Route
from proxy.admin.server import AdminLimits, AdminServer

TOKEN = "s3cret"


async def echo(request: Request) -> Response:
    return Response.of_json(
        {
            "method": request.method,
            "query": dict(request.query),
            "body": request.body.decode("latin-1"),
            "parameters": dict(request.parameters),
        }
    )


async def fail(request: Request) -> Response:
    raise KeyError("payload-of-the-bug")


async def hang(request: Request) -> Response:
    await trio.sleep_forever()
    raise AssertionError("unreachable")


async def conflict(request: Request) -> Response:
    raise ProblemError(HTTPStatus.CONFLICT, "already running", more={"migration": 7})


ROUTES = [
    Route("/healthz", {"GET": echo}, is_open=True),
    Route("/echo", {"GET": echo, "POST": echo}),
    Route("/things/{id}/parts/{part}", {"DELETE": echo}),
    Route("/fail", {"GET": fail}),
    Route("/hang", {"GET": hang}),
    Route("/conflict", {"POST": conflict}),
]


class Answer:
    """One parsed response."""

    def __init__(self, head: h11.Response | h11.InformationalResponse, body: bytes) -> None:
        self.status = head.status_code
        self.headers = {name.decode(): value.decode() for name, value in head.headers}
        self.body = body

    def json(self) -> dict[str, object]:
        parsed = json.loads(self.body)
        assert isinstance(parsed, dict)
        return parsed


async def talk(
    pieces: Sequence[bytes], *, methods: str = "GET", server: AdminServer | None = None
) -> list[Answer]:
    """All answers to these bytes, sent piece by piece and followed by an end of file."""
    server = AdminServer(ROUTES) if server is None else server
    ours, theirs = trio.testing.memory_stream_pair()
    received = bytearray()

    async def send() -> None:
        try:
            for piece in pieces:
                await ours.send_all(piece)
            await ours.send_eof()
        except trio.BrokenResourceError:
            pass  # the server may close before it has read everything

    async def receive() -> None:
        async for data in ours:
            received.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_connection, theirs)
        nursery.start_soon(send)
        nursery.start_soon(receive)
    return parse(bytes(received), methods.split())


def parse(received: bytes, methods: Sequence[str]) -> list[Answer]:
    """The responses in these bytes, as h11's client half reads them; the last method is that of the rest."""
    answers: list[Answer] = []
    left = received
    while left:
        client = h11.Connection(h11.CLIENT)
        method = methods[min(len(answers), len(methods) - 1)]
        client.send(h11.Request(method=method, target="/", headers=[("Host", "localhost")]))
        client.send(h11.EndOfMessage())
        client.receive_data(left)
        head, body = client.next_event(), bytearray()
        assert isinstance(head, h11.Response | h11.InformationalResponse), received
        if isinstance(head, h11.InformationalResponse):
            answers.append(Answer(head, b""))
            left = left[left.index(b"\r\n\r\n") + 4 :]
            continue
        while isinstance(event := client.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage), received
        answers.append(Answer(head, bytes(body)))
        left = client.trailing_data[0]
    return answers


def request(line: str, *headers: str, body: str = "") -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *length, *headers, "", body]).encode()


CONVERSATION = (
    request("GET /echo?a=1&a=&b=%20")
    + request("POST /echo", body="hello")
    + b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
    + request("DELETE /things/a%2Fb/parts/7")
    + request("GET http://x/echo", "Connection: close")
)


def check_conversation(answers: list[Answer]) -> None:
    assert [answer.status for answer in answers] == [200, 200, 200, 404, 200]
    assert answers[0].json()["query"] == {"a": ["1", ""], "b": [" "]}
    assert [answer.json()["body"] for answer in answers[1:3]] == ["hello", "hello"]
    assert answers[4].headers["connection"] == "close"


@pytest.mark.parametrize("size", [1, 7, 1_000_000])
async def test_a_conversation_cut_anywhere_is_answered_the_same(size: int) -> None:
    """Pipelined requests, both body framings, whole and byte by byte."""
    pieces = [CONVERSATION[at : at + size] for at in range(0, len(CONVERSATION), size)]
    check_conversation(await talk(pieces))


@given(st.lists(st.integers(1, len(CONVERSATION) - 1), max_size=6).map(sorted))
def test_a_conversation_cut_at_random_is_answered_the_same(cuts: list[int]) -> None:
    edges = [0, *cuts, len(CONVERSATION)]
    pieces = [CONVERSATION[start:end] for start, end in pairwise(edges)]
    check_conversation(trio.run(talk, pieces))


async def test_parameters_stand_for_one_segment() -> None:
    [found, missing] = await talk(
        [request("DELETE /things/1/parts/x%20y"), request("DELETE /things//parts/x")]
    )
    assert found.json()["parameters"] == {"id": "1", "part": "x y"}
    assert missing.status == 404


async def test_head_is_get_without_its_body() -> None:
    [head, get] = await talk([request("HEAD /echo"), request("GET /echo")], methods="HEAD GET")
    assert head.status == 200
    assert head.body == b""
    assert int(head.headers["content-length"]) == len(get.body) + 1  # "HEAD" is a letter longer than "GET"
    assert get.json()["method"] == "GET"


async def test_errors_are_problem_details() -> None:
    """RFC 9457: type, title, status, detail, and members of the problem's own."""
    not_found, not_allowed, failed, clash = await talk(
        [request("GET /none"), request("PUT /echo"), request("GET /fail"), request("POST /conflict")]
    )
    for answer in (not_found, not_allowed, failed, clash):
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status
    assert not_found.json()["title"] == "Not Found"
    assert (not_allowed.status, not_allowed.headers["allow"]) == (405, "GET, HEAD, POST")
    assert failed.status == 500
    assert b"payload-of-the-bug" not in failed.body
    assert clash.json() == {"title": "Conflict", "status": 409, "detail": "already running", "migration": 7}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ((), 401),
        (("Authorization: Bearer wrong",), 401),
        ((f"Authorization: Basic {TOKEN}",), 401),
        ((f"Authorization: Bearer {TOKEN}x",), 401),
        ((f"Authorization: Bearer {TOKEN}", "Authorization: Bearer x"), 401),
        (("Authorization: Bearer s\xe9cret",), 401),
        ((f"Authorization: bearer {TOKEN}",), 200),
    ],
)
async def test_a_token_is_asked_for_everywhere_but_at_open_routes(
    header: tuple[str, ...], expected: int
) -> None:
    server = AdminServer(ROUTES, token=TOKEN)
    echoed, unknown, health = await talk(
        [request("GET /echo", *header), request("GET /none", *header), request("GET /healthz", *header)],
        server=server,
    )
    assert (echoed.status, health.status) == (expected, 200)
    assert unknown.status == (404 if expected == 200 else 401)
    if expected == 401:
        assert echoed.headers["www-authenticate"].startswith("Bearer ")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"\r\nnonsense\r\n\r\n", 400),
        (b"*1\r\n$4\r\nPING\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET relative HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /echo?%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /echo?" + b"a&" * 40 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000, 431),
        (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n\r\n", 413),
        (
            b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"8000\r\n"
            + b"x" * 0x8000
            + (b"\r\n8000\r\n" + b"x" * 0x8000) * 9,
            413,
        ),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: zip\r\n\r\n", 501),
    ],
)
async def test_bad_requests_are_answered_and_end_the_connection(sent: bytes, expected: int) -> None:
    answers = await talk([sent, request("GET /echo")])
    assert [answer.status for answer in answers] == [expected]
    assert answers[0].headers["connection"] == "close"
    assert answers[0].headers["content-type"] == "application/problem+json"


@given(st.binary(max_size=200), st.integers(0, len(CONVERSATION)), st.integers(0, 40))
def test_garbage_never_breaks_the_server(garbage: bytes, at: int, skipped: int) -> None:
    """Whatever is spliced into a conversation, each answer is well-formed HTTP and the connection ends."""
    sent = CONVERSATION[:at] + garbage + CONVERSATION[at + skipped :]
    for answer in trio.run(talk, [sent]):
        assert 200 <= answer.status < 502
        assert answer.status != 500


async def test_who_waits_for_100_continue_is_told_to_go_on_or_not() -> None:
    expect = ("Expect: 100-continue", "Content-Length: 5")
    go_on, answer = await talk([request("POST /echo", *expect), b"hello"])
    assert (go_on.status, answer.status) == (100, 200)
    [refused] = await talk([request("POST /echo", "Expect: 100-continue", "Content-Length: 999999")])
    assert refused.status == 413


async def test_http_1_0_is_answered_once() -> None:
    [answer] = await talk([b"GET /echo HTTP/1.0\r\n\r\n"])
    assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_slow_callers_are_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    """An idle connection ends quietly; a request that never ends or is never answered gets an error."""
    limits = AdminLimits(idle_timeout_seconds=60, request_deadline_seconds=10)
    for sent, status, seconds in (
        (b"", None, 60),
        (b"GET / HTTP/1.1\r\n", 408, 10),
        (request("POST /echo", "Content-Length: 5") + b"hell", 408, 10),
        (request("GET /hang"), 503, 10),
    ):
        ours, theirs = trio.testing.memory_stream_pair()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(AdminServer(ROUTES, limits=limits).serve_connection, theirs)
            await ours.send_all(sent)
            received = b""
            async for data in ours:
                received += data
            assert trio.current_time() - began == pytest.approx(seconds)
            await ours.aclose()
        assert [answer.status for answer in parse(received, ["GET"])] == ([] if status is None else [status])


Connect = Callable[[], Awaitable[trio.SocketStream]]


async def with_server(server: AdminServer, act: Callable[[Connect, trio.Nursery], Awaitable[None]]) -> None:
    """Runs ``act`` with a way to connect to ``server`` on a loopback socket. The server must end itself."""
    streams: list[trio.SocketStream] = []

    async def connect() -> trio.SocketStream:
        streams.append(await trio.open_tcp_stream("127.0.0.1", port))
        return streams[-1]

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            await nursery.start(server.serve, listeners)
            await act(connect, nursery)
            server.stop()
    for stream in streams:
        await stream.aclose()


async def test_stopping_answers_what_is_in_progress_and_closes_the_idle() -> None:
    """A graceful close over real sockets."""
    release = trio.Event()

    async def slow(request: Request) -> Response:
        await release.wait()
        return Response.of_json({"slow": True})

    server = AdminServer([*ROUTES, Route("/slow", {"GET": slow})])

    async def act(connect: Connect, nursery: trio.Nursery) -> None:
        idle, busy = await connect(), await connect()
        await idle.send_all(request("GET /echo"))
        assert (await idle.receive_some()).startswith(b"HTTP/1.1 200 ")
        await busy.send_all(request("GET /slow"))
        await trio.sleep(0.05)  # a real socket: until the server has read the request
        server.stop()
        assert await idle.receive_some() == b""
        release.set()
        received = b""
        async for data in busy:
            received += data
        [answer] = parse(received, ["GET"])
        assert answer.json() == {"slow": True}
        assert answer.headers["connection"] == "close"
        with pytest.raises(OSError, match="connect"):
            await connect()

    await with_server(server, act)


async def test_connections_are_bounded_and_idle_ones_make_room() -> None:
    server = AdminServer(ROUTES, limits=AdminLimits(connections_max=2))

    async def act(connect: Connect, nursery: trio.Nursery) -> None:
        busy = [await connect() for _ in range(2)]
        for stream in busy:
            await stream.send_all(request("GET /hang"))
        await trio.sleep(0.05)
        refused = await connect()
        assert (await refused.receive_some()).startswith(b"HTTP/1.1 503 ")
        nursery.cancel_scope.cancel()

    await with_server(server, act)

    server = AdminServer(ROUTES, limits=AdminLimits(connections_max=1))

    async def act_idle(connect: Connect, nursery: trio.Nursery) -> None:
        idle = await connect()
        await idle.send_all(request("GET /healthz"))
        assert (await idle.receive_some()).startswith(b"HTTP/1.1 200 ")
        other = await connect()
        await other.send_all(request("GET /healthz"))
        assert (await other.receive_some()).startswith(b"HTTP/1.1 200 ")
        assert await idle.receive_some() == b""

    await with_server(server, act_idle)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7380", 200),
        ("[::1]:7380", 200),
        ("localhost:7380", 200),
        ("evil.example", 403),
        ("evil.example:7380", 403),
        ("127.0.0.1.evil.example", 403),
        ("[localhost", 400),
        ("localhost]", 400),
        ("[::1", 400),
    ],
)
async def test_without_a_token_only_an_address_or_localhost_is_answered(host: str, status: int) -> None:
    """A page in a browser can make its own name lead to this port; its requests still carry that name."""
    server = AdminServer(ROUTES)
    request = Request("GET", "/v1/thing", {}, {"host": host})
    response = await server._response_to(request, server._table.find("/v1/thing"))
    assert isinstance(response, Response)
    assert response.status.value == (404 if status == 200 else status)  # there is no such path
    if status == 400:
        assert b"the Host header is no host" in response.body
