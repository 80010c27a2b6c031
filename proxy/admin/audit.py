"""``/v1/audit``: the audit log by pages. Whoever reads it can verify it: the records are whole."""

from __future__ import annotations

from proxy.admin.acts import store_problems
from proxy.admin.http import Request, Response, Route
from proxy.admin.query import number_of
from proxy.store.interface import TopologyStore
from proxy.topology.audit import read_page
from routing.audit import facts_of_head, facts_of_record

PAGE_DEFAULT = 100
PAGE_MAX = 1000  # records of one answer


def routes(store: TopologyStore) -> list[Route]:
    """GET ``/v1/audit?from=N&limit=M``: records in order, the head, and where the next page begins.

    ``next`` is null after the last page. While acts are recorded, the head of the last page is the one that fits.
    """

    async def get(request: Request) -> Response:
        request.refuse_query("from", "limit")
        first = number_of(request, "from")
        limit = number_of(request, "limit", least=1, most=PAGE_MAX) or PAGE_DEFAULT
        with store_problems():
            page = await read_page(store, 1 if first is None else first, limit)
        return Response.of_json(
            {
                "head": facts_of_head(page.head),
                "records": [facts_of_record(record) for record in page.records],
                "next": page.next,
            }
        )

    return [Route("/v1/audit", {"GET": get})]
