"""The current topology view, as the data plane has it: swapped between turns, told to whoever subscribed.

It owns the view and nothing else: it asks no node and reads no store. ``proxy.topology.keeper`` hands it each view,
and nodes' MOVED change single slots at once. Losing everyone who could tell something new changes nothing: the last
view serves on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import trio

from proxy.log import get_logger
from routing.discovery import with_all_moved, with_moved
from routing.topology import EMPTY_VIEW, Address, TopologyView

log = get_logger(__name__)

Subscriber = Callable[[TopologyView, TopologyView], None]  # (old, new); called at once, must not block


class Topology:
    """The current view."""

    def __init__(self) -> None:
        self.view: TopologyView = EMPTY_VIEW
        self.engine_version = ""  # the oldest that a node of the cluster named
        self.wanted = trio.Event()  # something does not fit the view: who keeps it should look soon
        self.looked_at = -inf  # trio time: the view is of a look that began no earlier
        self._moved: dict[int, tuple[float, Address]] = {}  # slot -> (trio time, owner) by MOVED
        self._subscribers: dict[Subscriber, None] = {}  # in the order in which they came
        self._changed = trio.Event()

    # -- for the data plane: synchronous

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call ``subscriber(old, new)`` at each change, in the order of the changes."""
        self._subscribers[subscriber] = None

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Call ``subscriber`` no more, also not for the change that is being told just now."""
        self._subscribers.pop(subscriber, None)

    def on_moved(self, slot: int, address: Address) -> None:
        """A node said that ``address`` owns ``slot`` now: adopt it at once and look at the cluster soon."""
        self._moved[slot] = (trio.current_time(), address)
        self._set(with_moved(self.view, slot, address))
        self.refresh_soon()

    def refresh_soon(self) -> None:
        """Something does not fit the view: look at the cluster without waiting for the interval."""
        self.wanted.set()

    async def wait_change(self) -> None:
        """Return when the view has changed."""
        await self._changed.wait()

    # -- for the keeper: synchronous

    def take_wanted(self) -> None:
        """A look begins: what is wanted from now on is another one."""
        self.wanted = trio.Event()

    def moved_since(self, began: float) -> dict[int, Address]:
        """slot -> owner, of the MOVED that came after a trio time; older ones are forgotten."""
        self._moved = {slot: item for slot, item in self._moved.items() if item[0] > began}
        return {slot: address for slot, (_, address) in self._moved.items()}

    def moved_to(self) -> list[Address]:
        """Where MOVED said that slots are, lately."""
        return list(dict.fromkeys(address for _, address in self._moved.values()))

    def adopt(self, view: TopologyView, began: float) -> None:
        """Take a view over. What a MOVED said after ``began``, a trio time, is newer than the view, and stays."""
        self.looked_at = max(self.looked_at, began)
        if moved := self.moved_since(began):
            view = with_all_moved(view, moved)
        if not view.says_the_same_as(self.view):
            self._set(replace(view, revision=self.view.revision + 1))

    def _set(self, view: TopologyView) -> None:
        old = self.view
        if view is old:
            return
        self.view = view
        log.debug("view_changed", revision=view.revision, epoch=view.epoch, shards=len(view.shards))
        for subscriber in list(self._subscribers):
            if subscriber in self._subscribers:
                subscriber(old, view)
        self._changed.set()
        self._changed = trio.Event()
