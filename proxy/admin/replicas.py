"""``/v1/replicas``: how each replica fares, as the record has it."""

from __future__ import annotations

from proxy.admin.acts import store_problems
from proxy.admin.http import Request, Response, Route
from proxy.topology.event_facts import rfc3339
from proxy.topology.history import History


def routes(history: History) -> list[Route]:
    """GET ``/v1/replicas``. ``offset`` is that of the moment of ``since``, in the history ``replid``."""

    async def get(request: Request) -> Response:
        request.refuse_query()
        with store_problems():
            records = await history.replicas()
        return Response.of_json(
            {
                "replicas": [
                    {
                        "id": record.node_id,
                        "address": str(record.address),
                        "primary_id": record.primary_id,
                        "state": record.state.value,
                        "since": rfc3339(record.since),
                        "replid": record.replid or None,
                        "offset": record.offset,
                    }
                    for record in records
                ]
            }
        )

    return [Route("/v1/replicas", {"GET": get})]
