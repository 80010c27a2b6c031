"""A plain cluster client that reads at replicas, for comparison.

It does what popular clients do when told to read from replicas: it learns the map from CLUSTER SLOTS, sends
READONLY on its connections to replicas and reads there, follows MOVED (and learns the map anew) and ASK, and
waits a little on TRYAGAIN. It believes what a replica answers.
"""

from __future__ import annotations

import random
from typing import Any

import trio

from proxy.embedded.connection import Argument, Connection, ConnectionLost, ServerError, connect
from routing.slot import slot_of
from routing.topology import Address

REDIRECTIONS_MAX = 16
_TRYAGAIN_SECONDS = 0.01


class FollowingClient:
    """One task at a time uses it. `read` and `write` raise ServerError and ConnectionLost."""

    def __init__(self, seed: Address, choice: random.Random) -> None:
        self._seed = seed
        self._choice = choice  # among the replicas of a slot
        self._shards: list[
            tuple[int, int, Address, tuple[Address, ...]]
        ] = []  # first, last, primary, replicas
        self._connections: dict[Address, Connection] = {}

    async def read(self, key: bytes, *command: Argument) -> Any:
        """The reply of a replica of the key's slot, or of its primary when it has none."""
        primary, replicas = await self._shard_of(key)
        return await self._follow(self._choice.choice(replicas) if replicas else primary, command)

    async def write(self, key: bytes, *command: Argument) -> Any:
        """The reply of the key's primary."""
        primary, _ = await self._shard_of(key)
        return await self._follow(primary, command)

    async def aclose(self) -> None:
        for connection in self._connections.values():
            await connection.aclose()
        self._connections.clear()

    async def _follow(self, address: Address, command: tuple[Argument, ...]) -> Any:
        """Send the command there and wherever the redirections lead."""
        asking = False
        for _ in range(REDIRECTIONS_MAX):
            reply = await self._send(address, command, asking)
            if not isinstance(reply, ServerError):
                return reply
            asking = False
            if reply.code == "MOVED":
                address = _named(reply)
                await self._learn_map()
            elif reply.code == "ASK":
                address, asking = _named(reply), True
            elif reply.code == "TRYAGAIN":
                await trio.sleep(_TRYAGAIN_SECONDS)
            else:
                raise reply
        raise reply

    async def _send(self, address: Address, command: tuple[Argument, ...], asking: bool) -> Any:
        connection = await self._connection(address)
        try:
            replies = await connection.call_all([("ASKING",), command] if asking else [command])
        except BaseException:
            del self._connections[address]  # it is closed; the next command opens another
            self._shards.clear()  # and learns the map anew
            raise
        return replies[-1]

    async def _connection(self, address: Address) -> Connection:
        if address not in self._connections:
            connection = await connect(address)
            try:
                await connection.call("READONLY")  # at a primary it changes nothing
            except BaseException:
                await connection.aclose()
                raise
            self._connections[address] = connection
        return self._connections[address]

    async def _shard_of(self, key: bytes) -> tuple[Address, tuple[Address, ...]]:
        if not self._shards:
            await self._learn_map()
        slot = slot_of(key)
        for first, last, primary, replicas in self._shards:
            if first <= slot <= last:
                return primary, replicas
        raise ConnectionLost(f"no node is known to serve slot {slot}")

    async def _learn_map(self) -> None:
        shards = []
        for first, last, *nodes in await self._send(self._seed, ("CLUSTER", "SLOTS"), asking=False):
            primary, *replicas = [Address(node[0].decode(), node[1]) for node in nodes]
            shards.append((first, last, primary, tuple(replicas)))
        self._shards = shards


def _named(redirection: ServerError) -> Address:
    """The address in ``MOVED 12 127.0.0.1:7001``."""
    return Address.parse(str(redirection).split(" ")[2])
