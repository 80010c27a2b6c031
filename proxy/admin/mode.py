"""``/v1/mode``: the routing mode, asked and set."""

from __future__ import annotations

from http import HTTPStatus

from proxy.admin.acts import content_of, operator_of, store_problems
from proxy.admin.http import ProblemError, Request, Response, Route
from proxy.topology.event_facts import rfc3339
from proxy.topology.mode import (
    ModeConflictError,
    ModeKeeper,
    ModeNotNowError,
    ModeRefusedError,
    ModeState,
)
from routing.levels import Level
from routing.mode import NOTES, refusal_of

UNPROCESSABLE = HTTPStatus.UNPROCESSABLE_ENTITY


def routes(keeper: ModeKeeper) -> list[Route]:
    """GET and PUT of ``/v1/mode``."""

    async def get(request: Request) -> Response:
        request.refuse_query()
        return Response.of_json({**_facts_of_state(keeper.current), **_facts_of_keeper(keeper)})

    async def put(request: Request) -> Response:
        """Sets the mode if ``revision`` is the current one; 0 if none was set yet."""
        request.refuse_query()
        operator = operator_of(request)
        content = content_of(request, ("mode", "revision"))
        mode, revision = _mode_of(content["mode"]), content["revision"]
        if type(revision) is not int or revision < 0:
            raise ProblemError(UNPROCESSABLE, '"revision" is the one that GET shows, a whole number')
        try:
            with store_problems():
                state = await keeper.set(mode, revision, operator)
        except ModeNotNowError as error:
            raise ProblemError(HTTPStatus.CONFLICT, str(error)) from error
        except ModeRefusedError as error:
            raise ProblemError(UNPROCESSABLE, str(error)) from error
        except ModeConflictError as error:
            raise ProblemError(
                HTTPStatus.CONFLICT, str(error), more={"current": _facts_of_state(error.current)}
            ) from error
        return Response.of_json({**_facts_of_state(state), **_facts_of_keeper(keeper)})

    return [Route("/v1/mode", {"GET": get, "PUT": put})]


def _mode_of(value: object) -> Level:
    try:
        return Level(value)
    except ValueError:
        names = ", ".join(mode.value for mode in Level)
        raise ProblemError(UNPROCESSABLE, f'"mode" is one of {names}') from None


def _facts_of_state(state: ModeState) -> dict[str, object]:
    return {
        "mode": state.mode.value,
        "revision": state.revision,
        "at": None if state.at is None else rfc3339(state.at),
        "who": state.who or None,
    }


def _facts_of_keeper(keeper: ModeKeeper) -> dict[str, object]:
    return {
        "given": keeper.given.value,  # what reads get at this proxy
        "problems": keeper.problems(),
        "modes": [
            {
                "name": mode.value,
                "routes": mode in keeper.routed,
                "note": f"{NOTES[mode]}; {refusal}"
                if (refusal := refusal_of(mode, keeper.routed))
                else NOTES[mode],
            }
            for mode in Level
        ],
    }
