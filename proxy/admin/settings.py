"""``/v1/settings/reload``: the settings, asked of their source again and put into effect."""

from __future__ import annotations

from http import HTTPStatus

from proxy.admin.acts import content_of, operator_of
from proxy.admin.http import ProblemError, Request, Response, Route
from proxy.reload import Reloader, ReloadRefusedError
from proxy.settings.reload import Changed
from proxy.settings.show import facts_of_problem


def routes(reloader: Reloader) -> list[Route]:
    """POST of ``/v1/settings/reload``."""

    async def reload(request: Request) -> Response:
        """Takes an empty JSON object. 422 with all problems when the settings cannot be used."""
        request.refuse_query()
        operator = operator_of(request)
        content_of(request, ())
        try:
            reloaded = await reloader.reload(operator)
        except ReloadRefusedError as error:
            if not error.problems:
                raise ProblemError(HTTPStatus.CONFLICT, str(error)) from error
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                str(error),
                more={"problems": [facts_of_problem(problem) for problem in error.problems]},
            ) from error
        return Response.of_json(
            {
                "changed": [_facts_of(changed) for changed in reloaded.in_effect],
                "needs_restart": [_facts_of(changed) for changed in reloaded.needs_restart],
                "is_recorded": not reloaded.record_problem,
                "record_problem": reloaded.record_problem or None,
            }
        )

    return [Route("/v1/settings/reload", {"POST": reload})]


def _facts_of(changed: Changed) -> dict[str, object]:
    return {"setting": changed.setting, "before": changed.before, "after": changed.after}
