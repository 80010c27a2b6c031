"""The admin port's HTTP/1.1 server: h11 for the protocol, Trio for the bytes.

It owns its listeners and connections. Each connection is one task: read a request whole, answer it, go on
with the next. Everything a caller can do is bounded: header and body bytes, the time a request may take, the
time a connection may be idle, the number of connections. What goes wrong on one ends that connection
and is logged; nothing leaves this server but cancellation, so that the proxy serves on.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from email.utils import formatdate
from http import HTTPStatus

import h11
import trio

from proxy.admin.http import ProblemError, Request, Response, Route, RouteTable, parse_target
from proxy.log import get_logger
from routing.topology import Address

READ_BYTES = 16_384
LAST_WORDS_SECONDS = 1.0  # for a last answer to leave, and for the caller to have read it
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AdminLimits:
    """What one caller may take. Tested in tests/proxy/admin/test_server.py."""

    header_bytes_max: int = 16_384
    body_bytes_max: int = 262_144
    request_deadline_seconds: float = 10.0  # from a request's first byte to the last of its answer
    idle_timeout_seconds: float = 75.0  # between requests
    connections_max: int = 128


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
        self._connection_count = 0
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
        """Stops accepting and closes idle connections; a request in progress is answered, then closed."""
        self.is_stopping = True
        self._accepting.cancel()
        for scope in self._idle:
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
        with trio.move_on_after(self._limits.request_deadline_seconds) as deadline:
            return await self._answer(connection)
        if deadline.cancelled_caught and connection.is_answerable:
            seconds = self._limits.request_deadline_seconds
            if connection.has_read_request:
                status, detail = HTTPStatus.SERVICE_UNAVAILABLE, f"no answer within {seconds:g} seconds"
            else:
                status, detail = HTTPStatus.REQUEST_TIMEOUT, f"no whole request within {seconds:g} seconds"
            with trio.move_on_after(LAST_WORDS_SECONDS):
                await connection.refuse(ProblemError(status, detail))
        return False

    async def _answer(self, connection: _Connection) -> bool:
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
        response = await self._response_to(request)
        return await connection.send(response, is_last=self.is_stopping)

    async def _response_to(self, parsed: Request) -> Response:
        """The answer of the route's handler, or the problem that stood in the way."""
        try:
            match = self._table.find(parsed.path)
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
        """Raises ProblemError 401 unless the right token was sent. All wrong ones take the same time."""
        if not self._token:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(token.strip().encode("latin-1"), self._token)
        if scheme.lower() != "bearer" or not is_right:
            raise ProblemError(
                HTTPStatus.UNAUTHORIZED,
                "send the admin token: Authorization: Bearer TOKEN",
                headers=[("WWW-Authenticate", 'Bearer realm="steadyread admin"')],
            )


class _Connection:
    """One connection: bytes to requests, responses to bytes. Used by one task."""

    def __init__(self, stream: trio.abc.Stream, limits: AdminLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes_max)
        self._is_head = False

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
        self._is_head = head.method == b"HEAD"
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
        headers = [
            ("Date", formatdate(usegmt=True)),
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *response.headers,
        ]
        if is_last:
            headers.append(("Connection", "close"))
        phrase = response.status.phrase.encode()
        head = h11.Response(status_code=response.status.value, headers=headers, reason=phrase)
        parts = [self._http.send(head)]
        if not self._is_head:
            parts.append(self._http.send(h11.Data(data=response.body)))
        parts.append(self._http.send(h11.EndOfMessage()))
        await self._stream.send_all(b"".join(part for part in parts if part))
        if is_last or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            await self.close_politely()
            return False
        self._http.start_next_cycle()
        self._is_head = False
        return True

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


def _peer_of(stream: trio.abc.Stream) -> str:
    """The address at the other end; empty where there is none, or no longer."""
    if not isinstance(stream, trio.SocketStream):
        return ""
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError:  # the caller has gone
        return ""
    return str(Address(host, port))
