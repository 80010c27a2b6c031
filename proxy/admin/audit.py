"""``/v1/audit``: the audit log by pages. Whoever reads it can verify it: the records are whole."""

from __future__ import annotations

from http import HTTPStatus

from proxy.admin.acts import integer_of, store_problems
from proxy.admin.http import ProblemError, Request, Response, Route
from proxy.store.interface import TopologyStore
from proxy.topology.audit import read_page
from routing.audit import facts_of_head, facts_of_record

PAGE_DEFAULT = 100
PAGE_MAX = 1000  # records of one answer
NUMBER_MAX = 10**16 - 1  # of a key with 16 digits


def routes(store: TopologyStore) -> list[Route]:
    """GET ``/v1/audit?from=N&limit=M``: records in order, the head, and where the next page begins.

    ``next`` is null after the last page. While acts are recorded, the head of the last page is the one that fits.
    """

    async def get(request: Request) -> Response:
        unknown = sorted(request.query.keys() - {"from", "limit"})
        if unknown:
            raise ProblemError(
                HTTPStatus.BAD_REQUEST, f"{request.path} takes from and limit, and got {', '.join(unknown)}"
            )
        first = integer_of(request, "from", 1, 0, NUMBER_MAX)
        limit = integer_of(request, "limit", PAGE_DEFAULT, 1, PAGE_MAX)
        with store_problems():
            page = await read_page(store, first, limit)
        return Response.of_json(
            {
                "head": facts_of_head(page.head),
                "records": [facts_of_record(record) for record in page.records],
                "next": page.next,
            }
        )

    return [Route("/v1/audit", {"GET": get})]
