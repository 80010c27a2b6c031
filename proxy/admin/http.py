"""What an admin endpoint sees and says: requests, responses, problems, and the table of routes.

No I/O: ``proxy.admin.server`` reads and writes; the handlers in the table decide.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

JSON_TYPE = "application/json"
PROBLEM_TYPE = "application/problem+json"  # RFC 9457
QUERY_FIELDS_MAX = 32


class ProblemError(Exception):
    """Ends a request with an error that its caller can read: RFC 9457 problem details.

    ``more`` are extension members; ``headers`` go into the response beside the usual ones.
    """

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        *,
        more: Mapping[str, object] | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.more = dict(more or {})
        self.headers = tuple(headers)

    def response(self) -> Response:
        body = {"title": self.status.phrase, "status": self.status.value, "detail": self.detail, **self.more}
        return Response(self.status, _json(body), PROBLEM_TYPE, self.headers)


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str  # decoded, "/v1/topology"
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]  # by lower-case name; repeated ones are joined by ", "
    body: bytes = b""
    parameters: Mapping[str, str] = field(
        default_factory=dict
    )  # what stood for {name} in the route's pattern
    peer: str = ""  # the caller's address; empty if the transport has none

    def refuse_query(self) -> None:
        """Raises ProblemError if there is a query: one that is not understood must not be passed over."""
        if self.query:
            names = ", ".join(sorted(self.query))
            raise ProblemError(
                HTTPStatus.BAD_REQUEST, f"{self.path} takes no query parameters, and got {names}"
            )


@dataclass(frozen=True, slots=True)
class Response:
    status: HTTPStatus
    body: bytes
    content_type: str
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of_json(cls, value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
        return cls(status, _json(value), JSON_TYPE)


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """One path and what its methods do. A segment ``{name}`` takes any one non-empty segment."""

    pattern: str
    handlers: Mapping[str, Handler]  # method -> handler; HEAD follows GET
    is_open: bool = False  # answered without a token

    @property
    def allowed(self) -> tuple[str, ...]:
        """The methods, as the Allow header names them."""
        return tuple(sorted({*self.handlers, *(["HEAD"] if "GET" in self.handlers else [])}))


@dataclass(frozen=True, slots=True)
class Match:
    """A route that fits a path, and its parameters."""

    route: Route
    parameters: Mapping[str, str]


class RouteTable:
    """Finds the route of a path. Raises ValueError, when built, if two routes have the same pattern."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = tuple(routes)
        patterns = [route.pattern for route in self._routes]
        if len(set(patterns)) != len(patterns):
            raise ValueError(f"a pattern stands in the table twice: {sorted(patterns)}")

    def find(self, path: str) -> Match | None:
        """The first route, in the order of the table, whose pattern fits."""
        for route in self._routes:
            parameters = _fit(route.pattern.split("/"), path.split("/"))
            if parameters is not None:
                return Match(route, parameters)
        return None

    def handler_of(self, match: Match | None, request: Request) -> Handler:
        """What answers ``request``. Raises ProblemError 404 or 405."""
        if match is None:
            raise ProblemError(HTTPStatus.NOT_FOUND, f"there is nothing at {request.path}")
        method = "GET" if request.method == "HEAD" else request.method
        handler = match.route.handlers.get(method)
        if handler is None:
            allow = ", ".join(match.route.allowed)
            raise ProblemError(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{request.path} takes {allow}", headers=[("Allow", allow)]
            )
        return handler


def parse_target(target: bytes) -> tuple[str, dict[str, list[str]]]:
    """A request target as (decoded path, query). Raises ProblemError 400 if it is none."""
    try:
        text = target.decode("ascii")
        if text.startswith("/"):
            raw_path, _, raw_query = text.partition("?")
        else:  # absolute-form, which every server must take (RFC 9112, 3.2.2)
            parts = urlsplit(text)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise ValueError("neither a path nor a URL")
            raw_path, raw_query = parts.path or "/", parts.query
        path = unquote_to_bytes(raw_path).decode()
        query = parse_qs(raw_query, keep_blank_values=True, errors="strict", max_num_fields=QUERY_FIELDS_MAX)
    except ValueError:
        raise ProblemError(HTTPStatus.BAD_REQUEST, "the request target cannot be understood") from None
    return path, query


def _fit(pattern: list[str], segments: list[str]) -> dict[str, str] | None:
    if len(pattern) != len(segments):
        return None
    parameters = {}
    for wanted, got in zip(pattern, segments, strict=True):
        if wanted.startswith("{") and wanted.endswith("}"):
            if not got:
                return None
            parameters[wanted[1:-1]] = got
        elif wanted != got:
            return None
    return parameters


def _json(value: object) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"
