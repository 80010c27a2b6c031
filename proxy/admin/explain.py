"""``/v1/explain``: where a read would go now, at which level, and why. It changes nothing.

A POST, because a command's arguments do not fit a URL well, and may be what no log should have.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus

from proxy.admin.acts import content_of
from proxy.admin.http import ProblemError, Request, Response, Route
from proxy.settings.values import DAY_SECONDS, OFFERED_LEVELS
from proxy.snapshots.asked import id_of_text
from routing.explain import ExplainError, Explanation, as_json, key_of_read
from routing.levels import AUTO, CURRENT, Level, ReadLevel

UNPROCESSABLE = HTTPStatus.UNPROCESSABLE_ENTITY

Explain = Callable[[list[bytes], ReadLevel | None], Awaitable[Explanation]]


def routes(explain: Explain) -> list[Route]:
    """POST ``/v1/explain``. ``explain`` gets a read that names a key, and a level or None for auto.

    It may raise ExplainError, whose text the caller gets.
    """

    async def post(request: Request) -> Response:
        """Takes ``{"command": ["GET", "k"], "level": "bounded_staleness 500"}``; null for level is auto."""
        request.refuse_query()
        content = content_of(request, ("command", "level"))
        command, level = _command_of(content["command"]), _level_of(content["level"])
        try:
            key_of_read(command)
            explanation = await explain(command, level)
        except ExplainError as error:
            raise ProblemError(UNPROCESSABLE, str(error)) from error
        return Response.of_json(as_json(explanation))

    return [Route("/v1/explain", {"POST": post})]


def _command_of(value: object) -> list[bytes]:
    """Raises ProblemError 422."""
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        try:
            return [word.encode() for word in value]
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can write
            pass
    raise ProblemError(
        UNPROCESSABLE, '"command" is a list of texts: the name of the command, and its arguments'
    )


def _level_of(value: object) -> ReadLevel | None:
    """A level as the answer writes it: bounded_staleness with its bound in milliseconds, snapshot with an id or
    ``current``, which may be left out; None for auto.

    Raises ProblemError 422.
    """
    if value is None or value == AUTO:
        return None
    name, _, bound = value.partition(" ") if isinstance(value, str) else ("", "", "")
    if name == Level.BOUNDED_STALENESS.value:
        return ReadLevel(Level.BOUNDED_STALENESS, _bound_of(bound))
    if name == Level.SNAPSHOT.value:
        return ReadLevel(Level.SNAPSHOT, snapshot_id=_snapshot_of(bound))
    if name in OFFERED_LEVELS and not bound:
        return ReadLevel(Level(name))
    raise ProblemError(
        UNPROCESSABLE,
        f'"level" is null or one of {", ".join((AUTO, *OFFERED_LEVELS))}; only bounded_staleness has a bound, '
        "and only snapshot an id",
    )


def _snapshot_of(text: str) -> int | None:
    """The id; None for the current one. Raises ProblemError 422."""
    if text in ("", CURRENT):
        return None
    try:
        return id_of_text(text)
    except ValueError as error:
        raise ProblemError(
            UNPROCESSABLE, f'{error}; "{Level.SNAPSHOT.value}" alone is the current one'
        ) from None


def _bound_of(text: str) -> float:
    """In seconds. Raises ProblemError 422."""
    try:
        seconds = float(text) / 1000
    except ValueError:
        seconds = 0.0
    if 0 < seconds <= DAY_SECONDS:  # NaN is not
        return seconds
    raise ProblemError(
        UNPROCESSABLE,
        f"{Level.BOUNDED_STALENESS.value} takes its bound in milliseconds, above 0 and at most "
        f'{DAY_SECONDS * 1000:.0f}, as in "{Level.BOUNDED_STALENESS.value} 500"',
    )
