"""``/v1/snapshots``: snapshots looked at, opened and closed."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from proxy.admin.acts import content_of, operator_of, store_problems
from proxy.admin.http import ProblemError, Request, Response, Route
from proxy.admin.server import DEFAULT_LIMITS
from proxy.snapshots.asked import SnapshotDesk, checked_name, checked_ttl, id_of_text, why_not_closed
from proxy.snapshots.facts import Costs, SnapshotError, SnapshotFacts
from proxy.snapshots.shown import shown
from routing.levels import Level
from routing.snapshot import SnapshotRecord

UNPROCESSABLE = HTTPStatus.UNPROCESSABLE_ENTITY
_TEMPORARY = frozenset({"NOTREADY", "OVERLOADED"})  # error codes after which a later attempt may succeed


def routes(desk: SnapshotDesk, mode: Callable[[], Level], *, open_deadline_seconds: float) -> list[Route]:
    """GET and POST of ``/v1/snapshots``, GET and DELETE of ``/v1/snapshots/ID``.

    ``mode``: the routing mode that is in effect here. ``open_deadline_seconds``: how long an opening may take.
    """

    async def list_(request: Request) -> Response:
        request.refuse_query()
        return Response.of_json(
            {"current": desk.current(), "snapshots": [shown(facts) for facts in desk.facts()]}
        )

    async def open_(request: Request) -> Response:
        """Takes ``{"name": "report", "ttl_seconds": 600}``; null, or nothing, for what the settings say."""
        request.refuse_query()
        operator = operator_of(request)
        content = content_of(request, (), optional=("name", "ttl_seconds"))
        name, ttl_seconds = _name_of(content["name"]), _ttl_of(content["ttl_seconds"])
        try:
            with store_problems():
                record = await desk.open(name, ttl_seconds, operator)
        except SnapshotError as error:
            raise _problem_of(str(error)) from error
        response = Response.of_json(_facts_of(record), HTTPStatus.CREATED)
        return Response(
            response.status,
            response.body,
            response.content_type,
            (("Location", f"/v1/snapshots/{record.id}"),),
        )

    async def get(request: Request) -> Response:
        request.refuse_query()
        return Response.of_json(shown(_known(request)))

    async def close(request: Request) -> Response:
        request.refuse_query()
        operator = operator_of(request)
        snapshot_id = _known(request).record.id
        refusal = why_not_closed(desk, snapshot_id, mode())
        if refusal is not None:
            raise _problem_of(refusal)
        try:
            with store_problems():
                record = await desk.close(snapshot_id, operator)
        except SnapshotError as error:
            raise _problem_of(str(error)) from error
        return Response.of_json(_facts_of(record))

    def _known(request: Request) -> SnapshotFacts:
        """Raises ProblemError 404."""
        text = request.parameters["id"]
        try:
            facts = desk.facts_of(id_of_text(text))
        except ValueError as error:
            raise ProblemError(HTTPStatus.NOT_FOUND, f"there is no snapshot {text!r:.100}: {error}") from None
        if facts is None:
            raise ProblemError(
                HTTPStatus.NOT_FOUND,
                f"there is no snapshot {text}: it was never opened, or ended long ago; "
                "/v1/snapshots lists those that there are",
            )
        return facts

    def _facts_of(record: SnapshotRecord) -> dict[str, object]:
        facts = desk.facts_of(record.id)
        return shown(SnapshotFacts(record, 0.0, Costs()) if facts is None else facts)

    patience_seconds = open_deadline_seconds + DEFAULT_LIMITS.request_deadline_seconds
    return [
        Route("/v1/snapshots", {"GET": list_, "POST": open_}, deadline_seconds=patience_seconds),
        Route("/v1/snapshots/{id}", {"GET": get, "DELETE": close}),
    ]


def _name_of(value: object) -> str:
    """Raises ProblemError 422."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ProblemError(UNPROCESSABLE, '"name" is a text, or null')
    try:
        return checked_name(value)
    except ValueError as error:
        raise ProblemError(UNPROCESSABLE, f'"name": {error}') from None


def _ttl_of(value: object) -> float | None:
    """Raises ProblemError 422."""
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return checked_ttl(value if is_number else -1)  # type: ignore[arg-type]  # it is one
    except ValueError as error:
        raise ProblemError(UNPROCESSABLE, f'"ttl_seconds": {error}') from None


def _problem_of(text: str) -> ProblemError:
    """Of an error that begins with its code: 503 where a later attempt may succeed, else 409."""
    code, _, detail = text.partition(" ")
    if code in _TEMPORARY:
        return ProblemError(
            HTTPStatus.SERVICE_UNAVAILABLE, detail, more={"code": code}, headers=[("Retry-After", "1")]
        )
    return ProblemError(HTTPStatus.CONFLICT, detail, more={"code": code})
