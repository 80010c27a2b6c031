"""``/v1/hot``: the keys and slots that clients of this proxy ask for most."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxy.admin.http import Request, Response, Route
from proxy.admin.query import number_of
from proxy.exchange.hot import SHOWN_COUNT, Hot, HotFacts
from proxy.settings import HotSettings
from routing.names import key_text
from routing.slot import slot_of
from routing.topology import TopologyView

COUNT_MAX = 1000


def routes(
    facts: Callable[[int], Mapping[str, HotFacts]],
    options: Callable[[], HotSettings],
    view: Callable[[], TopologyView],
) -> list[Route]:
    """GET ``/v1/hot[?count=N]``. ``facts`` gives at most so many keys and slots of reads and of writes."""

    async def get(request: Request) -> Response:
        request.refuse_query("count")
        number = number_of(request, "count", least=1, most=COUNT_MAX) or SHOWN_COUNT
        settings, view_now = options(), view()
        return Response.of_json(
            {
                "sample_every": settings.sample_every,
                "window_seconds": settings.window_seconds,
                **{f"{kind}s": _of_kind(seen, view_now) for kind, seen in facts(number).items()},
            }
        )

    return [Route("/v1/hot", {"GET": get})]


def _of_kind(facts: HotFacts, view: TopologyView) -> dict[str, object]:
    return {
        "seconds": facts.seconds,
        "samples": facts.samples,
        "keys": [
            {"key": key_text(hot.item), **_where(slot_of(hot.item), view), **_shares(hot)}
            for hot in facts.keys
        ],
        "slots": [{**_where(hot.item, view), **_shares(hot)} for hot in facts.slots],
    }


def _where(slot: int, view: TopologyView) -> dict[str, object]:
    owner = view.primary_of(slot)
    return {"slot": slot, "owner": None if owner is None else str(owner.address)}


def _shares(hot: Hot[bytes] | Hot[int]) -> dict[str, object]:
    return {
        "share_at_least": hot.share_at_least,
        "share_at_most": hot.share_at_most,
        "per_second": hot.per_second,
    }
