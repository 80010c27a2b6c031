"""One client's place in the queues for permits: at most one, of the request that it would send next.

A request that finds no permit is not taken: its bytes stay unparsed, and with them all that the client sent after it.
So one client has one place, whatever it pipelines, and its order needs no further thought. When it gets the permit,
its bytes are looked at again, in the same step; the request then may go another way, and the permit is given back.
When it is shed, the request gets the error. What stands behind it in the client's buffer by then has waited as long:
it gets a permit at once, or an error as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from proxy.upstream.load import NodeLoad, Waiting
from routing.admission import Waiter
from routing.priority import Priority

if TYPE_CHECKING:
    from proxy.exchange.open_requests import OpenRequests

SCAN_FIRST = 4  # requests that are looked at again after a wait; twice as many each time that all go on
SCAN_MAX = 1 << 20


class Permits(Waiting):
    """Who asks: a request for which ``load.has_permit(priority)`` is false."""

    __slots__ = (
        "_client",
        "_load",
        "_passed",
        "_place",
        "_since",
        "_waited_seconds",
        "granted",
        "is_waiting",
        "refusal",
        "scan_max",
    )

    def __init__(self, client: OpenRequests) -> None:
        self._client = client
        self.is_waiting = (
            False  # then nothing of the client is looked at; frontend.pacing holds it by this, too
        )
        self.granted: NodeLoad | None = None  # whose permit its next request has, until the end of this step
        self.refusal: bytes | None = None  # the reply to its next request, which was shed
        self.scan_max = SCAN_MAX
        self._since = 0.0  # when its wait began
        # So long one that was shed has waited, and what it sent behind that as well; None: that is not so.
        self._waited_seconds: float | None = None
        # Where its next request has had a permit while it waits for another node's: it need not wait there again.
        self._passed: set[NodeLoad] = set()
        self._place: Waiter[Waiting] | None = None
        self._load: NodeLoad | None = None

    def may_pass(self, load: NodeLoad, priority: int) -> bool:
        """Whether the client's next request goes on all the same, with the permit that it waited for.

        If not, it is not to be taken: it waits from now on, or it is refused.
        """
        if self.granted is load:
            self.granted = None
            load.use_permit()
            self._passed.add(load)
            return True
        if load in self._passed:
            return True
        self.scan_max = SCAN_FIRST
        if self._waited_seconds is not None:
            load.shed_at_once(self, priority, self._waited_seconds)
            return False
        self._since = now = trio.current_time()
        deadline = now + self._client.exchange.deadline_seconds
        self.is_waiting = True
        self._load = load
        self._place = load.wait_for_permit(self, priority, now, deadline)
        return False

    def go(self) -> None:
        """The request has all the permits that it needs."""
        if self._passed:
            self._passed.clear()

    def on_permit(self, load: NodeLoad) -> None:
        self.is_waiting = False
        self._place = None
        self.granted = load
        self._client.hub.touched(self._client)

    def on_shed(self, reply: bytes) -> None:
        if self._waited_seconds is None:
            self._waited_seconds = trio.current_time() - self._since
        self.is_waiting = False
        self._place = None
        self.refusal = reply
        self._client.hub.touched(self._client)

    def on_change(self) -> None:
        self.is_waiting = False
        self._place = None
        self._client.hub.touched(self._client)

    def take_refusal(self) -> bytes | None:
        """The reply to the client's next request, if that was shed."""
        refusal, self.refusal = self.refusal, None
        if refusal is not None:
            self._passed.clear()
        return refusal

    def end_pass(self, *, is_all: bool) -> None:
        """What the client may send now was looked at; ``is_all``: and no whole request is left of it."""
        if self.granted is not None:
            load, self.granted = self.granted, None
            load.give_up_permit()
        if is_all:
            self._waited_seconds = None

    def leave(self) -> None:
        """The client left."""
        if self._place is not None and self._load is not None:
            self._load.leave(self._place)
            self._place = None
        self.is_waiting = False
        self.end_pass(is_all=True)


NORMAL = int(Priority.NORMAL)  # an exact int, by which lists are indexed in half the time
