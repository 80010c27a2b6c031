"""One client's subscriptions to channels, patterns and sharded channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from routing.command import Command

if TYPE_CHECKING:
    from proxy.frontend.client import ClientConnection

SUBSCRIPTION_COMMANDS = frozenset(
    {"SUBSCRIBE", "UNSUBSCRIBE", "PSUBSCRIBE", "PUNSUBSCRIBE", "SSUBSCRIBE", "SUNSUBSCRIBE"}
)


class Subscriptions:
    def __init__(self, client: ClientConnection) -> None:
        self.client = client
        self.channels: set[bytes] = set()
        self.patterns: set[bytes] = set()
        self.shard_channels: set[bytes] = set()
        self.count = 0

    async def change(self, command: Command, arguments: list[bytes]) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
