"""Commands that concern all shards: asked of each and merged into one server's answer.

Each function takes a client's open requests and the command's words, and gives one whole reply in the
client's RESP version. It runs in a task while the client is held, ends within the request deadline, and
raises nothing for what nodes do: errors are replies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.exchange.gather import flush, keys, pubsub, scripts
from proxy.exchange.gather.nodes import ask_any_node, gather_keyspace
from proxy.exchange.open_requests import OpenRequests

__all__ = ["GATHERED", "ask_any_node", "gather_keyspace"]

Gather = Callable[[OpenRequests, list[bytes]], Awaitable[bytes]]

# By the names that routing.command gives.
GATHERED: dict[str, Gather] = {**keys.COMMANDS, **flush.COMMANDS, **scripts.COMMANDS, **pubsub.COMMANDS}
