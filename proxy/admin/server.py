"""The admin port's HTTP/1.1 server: h11 for the protocol, Trio for the bytes.

It owns its listeners and connections. Each connection is one task: read a request whole, answer it, go on
with the next. Everything a caller can do is bounded: header and body bytes, the time a request may take, the
time a connection may be idle, the number of connections. What goes wrong on one ends that connection
and is logged; nothing leaves this server but cancellation, so that the proxy serves on.

Some answers wait for what is yet to happen: streams, and handlers with a deadline of their own. While one waits,
two more tasks live within its connection's: one makes the answer, one looks whether the caller is still there.
"""

from __future__ import annotations

import hmac
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate
from http import HTTPStatus
from ipaddress import ip_address
from urllib.parse import urlsplit

import h11
import trio

from proxy.admin.http import (
    Match,
    ProblemError,
    Request,
    Response,
    Route,
    RouteTable,
    StreamResponse,
    parse_target,
)
from proxy.log import get_logger
from routing.topology import Address

READ_BYTES = 16_384
LAST_WORDS_SECONDS = 1.0  # for a last answer to leave, and for the caller to have read it
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AdminLimits:
    """What one caller may take. Tested in tests/proxy/admin/test_admin_server.py and test_admin_streams.py."""

    header_bytes_max: int = 16_384
    body_bytes_max: int = 262_144
    request_deadline_seconds: float = 10.0  # from a request's first byte to the last of its answer
    idle_timeout_seconds: float = 75.0  # between requests
    connections_max: int = 128
    chunk_deadline_seconds: float = 10.0  # for one chunk of a stream to be taken

    @property
    def waiting_max(self) -> int:
        """Streams, and callers whom a handler lets wait. Half of the connections: a short question is answered."""
        return max(1, self.connections_max // 2)


DEFAULT_LIMITS = AdminLimits()


class AdminServer:
    """Answers HTTP from a table of routes.

    With a ``token``, all but open routes want ``Authorization: Bearer TOKEN``, unknown paths too.
    """

    def __init__(
        self, routes: Iterable[Route], *, token: str = "", limits: AdminLimits = DEFAULT_LIMITS
    ) -> None:
        self._table = RouteTable(routes)
        self._token = token.encode()
        self._limits = limits
        self._accepting = trio.CancelScope()
        self._idle: dict[trio.CancelScope, None] = {}  # connections between requests, longest waiting first
        self._waiting: dict[trio.CancelScope, None] = {}  # answers that wait for what is yet to happen
        self._connection_count = 0
        self._waiting_count = 0
        self.is_stopping = False

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accepts and answers until ``stop``, then until the requests in progress are answered.

        Closes the listeners. If cancelled, closes all connections at once.
        """
        async with trio.open_nursery() as nursery:
            task_status.started(list(listeners))  # they listen already, so a caller may connect now
            with self._accepting:
                await trio.serve_listeners(self.serve_connection, list(listeners), handler_nursery=nursery)

    def stop(self) -> None:
        """Stops accepting and closes idle connections; a request in progress is answered, then closed.

        Streams end after the chunk that is being sent; who waits for an event is told that the proxy stops.
        """
        self.is_stopping = True
        self._accepting.cancel()
        for scope in (*self._idle, *self._waiting):
            scope.cancel()

    async def serve_connection(self, stream: trio.abc.Stream) -> None:
        """Answers the requests of one connection and closes it. Raises nothing but Cancelled."""
        self._connection_count += 1
        connection = _Connection(stream, self._limits)
        try:
            if self._connection_count > self._limits.connections_max and not self._close_longest_idle():
                with trio.move_on_after(self._limits.request_deadline_seconds):
                    await connection.refuse(
                        ProblemError(
                            HTTPStatus.SERVICE_UNAVAILABLE,
                            f"{self._limits.connections_max} callers are being answered already",
                            headers=[("Retry-After", "1")],
                        )
                    )
            else:
                while await self._serve_one(connection):
                    pass
        except trio.BrokenResourceError as error:
            log.debug("admin_connection_broken", reason=error)
        except Exception:
            log.exception("admin_connection_failed")
        finally:
            self._connection_count -= 1
            await trio.aclose_forcefully(stream)

    def _close_longest_idle(self) -> bool:
        """Makes room for a new connection. False if none is idle."""
        for scope in self._idle:
            scope.cancel()
            del self._idle[scope]
            return True
        return False

    async def _serve_one(self, connection: _Connection) -> bool:
        """One request and its answer. True if another may follow on this connection."""
        with trio.move_on_after(self._limits.idle_timeout_seconds) as idle:
            self._idle[idle] = None
            if self.is_stopping:
                idle.cancel()
            try:
                has_begun = await connection.wait_for_request()
            finally:
                self._idle.pop(idle, None)
        if idle.cancelled_caught or not has_begun:
            return False
        began = trio.current_time()
        answered: bool | StreamResponse = False
        with trio.move_on_after(self._limits.request_deadline_seconds) as deadline:
            answered = await self._answer(connection, deadline)
        if deadline.cancelled_caught and connection.is_answerable:
            seconds = round(deadline.deadline - began, 1)
            if connection.has_read_request:
                status, detail = HTTPStatus.SERVICE_UNAVAILABLE, f"no answer within {seconds:g} seconds"
            else:
                status, detail = HTTPStatus.REQUEST_TIMEOUT, f"no whole request within {seconds:g} seconds"
            with trio.move_on_after(LAST_WORDS_SECONDS):
                await connection.refuse(ProblemError(status, detail))
        if isinstance(answered, StreamResponse):
            return await self._stream(connection, answered)
        return answered

    async def _answer(self, connection: _Connection, deadline: trio.CancelScope) -> bool | StreamResponse:
        """Answers one request within ``deadline``; a stream, which has none, is left to be sent.

        True if another request may follow.
        """
        try:
            request = await connection.read_request()
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            await connection.refuse(ProblemError(status, f"not a request this port can read: {error}"))
            return False
        except ProblemError as problem:
            await connection.refuse(problem)
            return False
        if request is None:
            return False
        match = self._table.find(request.path)
        response: Response | StreamResponse | None
        if match is None or match.route.deadline_seconds is None:
            response = await self._response_to(request, match)
        elif self._waiting_count < self._limits.waiting_max:
            deadline.deadline = trio.current_time() + match.route.deadline_seconds
            response = await self._patient_response_to(request, match, connection)
            if response is None:
                return False
        else:
            response = self._too_many_wait()
        if isinstance(response, StreamResponse):
            if self._waiting_count < self._limits.waiting_max:
                return response
            response = self._too_many_wait()
        return await connection.send(response, is_last=self.is_stopping)

    def _too_many_wait(self) -> Response:
        return ProblemError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"{self._limits.waiting_max} callers wait for events already",
            headers=[("Retry-After", "1")],
        ).response()

    async def _patient_response_to(
        self, request: Request, match: Match, connection: _Connection
    ) -> Response | StreamResponse | None:
        """The answer of a handler that may wait long; None if the caller left meanwhile."""
        response: Response | StreamResponse | None = None
        with self._counted():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_when_left, connection, nursery.cancel_scope)
                with self._until_stop() as scope:
                    response = await self._response_to(request, match)
                if scope.cancelled_caught:
                    response = ProblemError(
                        HTTPStatus.SERVICE_UNAVAILABLE,
                        "the proxy is stopping",
                        headers=[("Retry-After", "1")],
                    ).response()
                nursery.cancel_scope.cancel()
        return response

    async def _stream(self, connection: _Connection, response: StreamResponse) -> bool:
        """Sends a stream until it ends, or must. False: it is the last answer of its connection."""
        is_whole = connection.is_head
        with self._counted():
            if await self._is_taken(connection.begin_stream(response)) and not connection.is_head:
                to_send, chunks = trio.open_memory_channel[bytes](0)
                made_all = trio.Event()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._cancel_when_left, connection, nursery.cancel_scope)
                    nursery.start_soon(self._produce, response, to_send, made_all)
                    is_whole = await self._send_chunks(connection, chunks) and made_all.is_set()
                    nursery.cancel_scope.cancel()
        if is_whole:
            await self._is_taken(connection.end_stream())
        return False

    async def _produce(
        self, response: StreamResponse, to_send: trio.MemorySendChannel[bytes], made_all: trio.Event
    ) -> None:
        """Makes chunks until there are no more, or the server stops; ``made_all`` says that it did not fail."""
        with to_send:
            try:
                with self._until_stop():
                    async with aclosing(response.chunks()) as chunks:
                        async for chunk in chunks:
                            await to_send.send(chunk)
                made_all.set()
            except Exception:
                log.exception("admin_stream_failed")

    async def _send_chunks(self, connection: _Connection, chunks: trio.MemoryReceiveChannel[bytes]) -> bool:
        """True if all were taken."""
        async for chunk in chunks:
            if chunk and not await self._is_taken(connection.send_chunk(chunk)):
                return False
        return True

    async def _is_taken(self, sending: Coroutine[object, object, None]) -> bool:
        """Sends a part of a stream. False if the caller left, or took too long; nothing can be sent then."""
        with trio.move_on_after(self._limits.chunk_deadline_seconds):
            try:
                await sending
            except trio.BrokenResourceError as error:
                log.debug("admin_connection_broken", reason=error)
                return False
            return True
        log.info("admin_stream_stalled", seconds=self._limits.chunk_deadline_seconds)
        return False

    async def _cancel_when_left(self, connection: _Connection, scope: trio.CancelScope) -> None:
        await connection.wait_until_left()
        scope.cancel()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._waiting_count += 1
        try:
            yield
        finally:
            self._waiting_count -= 1

    @contextmanager
    def _until_stop(self) -> Iterator[trio.CancelScope]:
        """A scope that ``stop`` cancels."""
        with trio.CancelScope() as scope:
            self._waiting[scope] = None
            if self.is_stopping:
                scope.cancel()
            try:
                yield scope
            finally:
                del self._waiting[scope]

    async def _response_to(self, parsed: Request, match: Match | None) -> Response | StreamResponse:
        """The answer of the route's handler, or the problem that stood in the way."""
        try:
            if match is None or not match.route.is_open:
                self._check_token(parsed)
            handler = self._table.handler_of(match, parsed)
            parameters = {} if match is None else match.parameters
            return await handler(replace(parsed, parameters=parameters))
        except ProblemError as problem:
            return problem.response()
        except Exception:
            log.exception("admin_request_failed", method=parsed.method, path=parsed.path)
            return ProblemError(
                HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed; the proxy's log says why"
            ).response()

    def _check_token(self, request: Request) -> None:
        """Raises ProblemError 401 unless the right token was sent. All wrong ones take the same time.

        Without a token, 403 for a host by any name but localhost: a page in a browser can make its own name lead to
        this port, and is then as good as its owner.
        """
        if not self._token:
            _refuse_foreign_name(request.headers.get("host", ""))
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(token.strip().encode("latin-1"), self._token)
        if scheme.lower() != "bearer" or not is_right:
            raise ProblemError(
                HTTPStatus.UNAUTHORIZED,
                "send the admin token: Authorization: Bearer TOKEN",
                headers=[("WWW-Authenticate", 'Bearer realm="steadyread admin"')],
            )


def _refuse_foreign_name(host: str) -> None:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # a bracket without its partner
        raise ProblemError(
            HTTPStatus.BAD_REQUEST, f"the Host header is no host: {host[:100]!r}; send HOST or HOST:PORT"
        ) from None
    try:
        ip_address(name)
    except ValueError:
        if name not in ("", "localhost"):
            raise ProblemError(
                HTTPStatus.FORBIDDEN,
                f"this port has no token, so it answers to an IP address or localhost, and not to {name[:100]!r}",
            ) from None


class _Connection:
    """One connection: bytes to requests, responses to bytes. Used by one task."""

    def __init__(self, stream: trio.abc.Stream, limits: AdminLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes_max)
        self.is_head = False

    @property
    def is_answerable(self) -> bool:
        """Whether no byte of an answer to the current request has been sent, and one may be."""
        return self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    @property
    def has_read_request(self) -> bool:
        """Whether the current request was read to its end."""
        return self._http.their_state not in (h11.IDLE, h11.SEND_BODY)

    async def wait_for_request(self) -> bool:
        """Waits for a first byte. False if the caller closed instead."""
        if self._http.trailing_data[0]:
            await trio.lowlevel.checkpoint()
            return True
        data = bytes(await self._stream.receive_some(READ_BYTES))
        self._http.receive_data(data)
        return bool(data)

    async def read_request(self) -> Request | None:
        """A whole request; None if the caller closed within it.

        Raises h11.RemoteProtocolError if it is malformed or its headers are too long, and ProblemError if its
        target is malformed or its body too long.
        """
        head = await self._next_event()
        if not isinstance(head, h11.Request):
            return None
        self.is_head = head.method == b"HEAD"
        headers: dict[str, str] = {}
        for raw_name, raw_value in head.headers:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        path, query = parse_target(head.target)
        declared = headers.get("content-length", "0")
        too_long = ProblemError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"a body may have {self._limits.body_bytes_max} bytes",
        )
        if int(declared) > self._limits.body_bytes_max:
            raise too_long
        body = bytearray()
        while isinstance(event := await self._next_event(), h11.Data):
            body += event.data
            if len(body) > self._limits.body_bytes_max:
                raise too_long
        if not isinstance(event, h11.EndOfMessage):
            return None
        return Request(
            head.method.decode("ascii"), path, query, headers, bytes(body), peer=_peer_of(self._stream)
        )

    async def send(self, response: Response, *, is_last: bool) -> bool:
        """Sends a response. True if another request may follow."""
        parts = [self._http.send(_head_of(response, is_last=is_last))]
        if not self.is_head:
            parts.append(self._http.send(h11.Data(data=response.body)))
        parts.append(self._http.send(h11.EndOfMessage()))
        await self._stream.send_all(b"".join(part for part in parts if part))
        if is_last or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            await self.close_politely()
            return False
        self._http.start_next_cycle()
        self.is_head = False
        return True

    async def begin_stream(self, response: StreamResponse) -> None:
        """Sends the head of a response whose length is not known. No other request follows."""
        await self._stream.send_all(self._http.send(_head_of(response, is_last=True)) or b"")

    async def send_chunk(self, data: bytes) -> None:
        await self._stream.send_all(self._http.send(h11.Data(data=data)) or b"")

    async def end_stream(self) -> None:
        """Says that the body is whole, and closes."""
        await self._stream.send_all(self._http.send(h11.EndOfMessage()) or b"")
        await self.close_politely()

    async def wait_until_left(self) -> None:
        """Returns when the caller has closed, if only its own direction.

        Who sent the next request already, instead of waiting for the answer, is found out by sending alone: what is
        read here must be kept, and so bounded.
        """
        if not self._http.trailing_data[0]:
            try:
                data = bytes(await self._stream.receive_some(READ_BYTES))
            except trio.BrokenResourceError:
                return
            self._http.receive_data(data)
            if not data:
                return
        await trio.sleep_forever()

    async def refuse(self, problem: ProblemError) -> None:
        """Answers what could not be read whole, and closes."""
        if self.is_answerable:
            await self.send(problem.response(), is_last=True)

    async def close_politely(self) -> None:
        """Ends our direction and reads on for a moment, so that the answer is not lost to a reset."""
        if isinstance(self._stream, trio.abc.HalfCloseableStream):
            with trio.move_on_after(LAST_WORDS_SECONDS):
                await self._stream.send_eof()
                while await self._stream.receive_some(READ_BYTES):
                    pass

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._http.next_event()
            if not (isinstance(event, type) and issubclass(event, h11.NEED_DATA)):
                return event
            if self._http.they_are_waiting_for_100_continue:
                go_on = self._http.send(h11.InformationalResponse(status_code=100, headers=[]))
                await self._stream.send_all(go_on or b"")
            self._http.receive_data(bytes(await self._stream.receive_some(READ_BYTES)))


def _head_of(response: Response | StreamResponse, *, is_last: bool) -> h11.Response:
    headers = [("Date", formatdate(usegmt=True)), ("Content-Type", response.content_type)]
    if isinstance(response, Response):  # the end of a stream is marked by h11, as the caller's version has it
        headers.append(("Content-Length", str(len(response.body))))
    headers += [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), *response.headers]
    if is_last:
        headers.append(("Connection", "close"))
    phrase = response.status.phrase.encode()
    return h11.Response(status_code=response.status.value, headers=headers, reason=phrase)


def _peer_of(stream: trio.abc.Stream) -> str:
    """The address at the other end; empty where there is none, or no longer."""
    if not isinstance(stream, trio.SocketStream):
        return ""
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError:  # the caller has gone
        return ""
    return str(Address(host, port))
