"""Planted faults: each changes the proxy's protocol in one place, as a mistake would. The histories must find each.

Nothing of this is in the product: what is changed is put back after the history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

from proxy.exchange.open_requests import OpenRequests
from proxy.upstream.connection import NodeConnection

PLANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {}


def plant(name: str) -> Callable[[Callable[[], Iterator[None]]], Callable[[], Iterator[None]]]:
    def register(make: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
        PLANTS[name] = contextmanager(make)
        return make

    return register


@plant("a lost write repeated")
def _a_lost_write_repeated() -> Iterator[None]:
    real = OpenRequests.on_lost

    def on_lost(self: Any, slot: Any, sent: bool, connection: Any) -> None:
        real(self, slot, False, connection)

    with patch.object(OpenRequests, "on_lost", on_lost):
        yield


@plant("ASKING left out")
def _asking_left_out() -> Iterator[None]:
    with patch.object(NodeConnection, "queue_asking", NodeConnection.queue):
        yield
