"""The ways to the data: Steadyread's snapshots, and two controls that show what the campaign is worth.

`Plain` readers see live data and call it a snapshot: the campaign must blame them, by each of its checks.
`Copies` are frozen copies on a server of their own, made while nobody writes: the campaign must not blame them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol

import trio

from proxy.embedded.engine import Engine
from routing.topology import Address
from tests.live.campaign.proxies import free_address, serving_process
from tests.live.campaign.resp import (
    RECEIVE_BYTES,
    BadReply,
    Connection,
    ErrorReply,
    Incomplete,
    Reply,
    frame,
    parse,
)
from tests.live.campaign.workload import GONE

STEADY_READ = b"STEADY.READ"
SNAPSHOT = b"STEADY.SNAPSHOT"
COPY_DATABASES = 256
BATCH = 200


class Refused(Exception):
    """An error reply to what was asked. ``code`` is its first word."""

    @property
    def code(self) -> str:
        return str(self).partition(" ")[0]


class Lost(Exception):
    """No reply: the connection could not be made, broke, or was silent for too long."""


class Answer(NamedTuple):
    raw: bytes  # all replies as they came
    replies: list[Reply]


class Client(Connection):
    """A connection that also gives the bytes of its replies."""

    def close_nowait(self) -> None:
        """Unlike `aclose_forcefully`, several in a row are all closed when their task is cancelled."""
        self._stream.socket.close()

    async def ask(self, payload: bytes, reply_count: int) -> Answer:
        """Raises Lost; then the connection is spent."""
        [answer] = await self.ask_all([(payload, reply_count)])
        return answer

    async def ask_all(self, requests: Sequence[tuple[bytes, int]]) -> list[Answer]:
        """Payloads, and how many replies each has, in one pipeline. Raises Lost."""
        try:
            await self.send(b"".join([payload for payload, _ in requests]))
            return [await self._next_answer(count) for _, count in requests]
        except GONE as fault:
            raise Lost(str(fault)) from fault

    async def ask_each(self, steps: Sequence[bytes], pause: Callable[[], float]) -> Answer:
        """One request after the other, with a pause in seconds after each. Raises Lost."""
        raw = b""
        replies: list[Reply] = []
        for step in steps:
            answer = await self.ask(step, 1)
            raw += answer.raw
            replies += answer.replies
            await trio.sleep(pause())
        return Answer(raw, replies)

    async def call(self, *parts: bytes | int) -> Reply:
        """One command. Raises Refused and Lost."""
        reply = (await self.ask(frame(parts), 1)).replies[0]
        if isinstance(reply, ErrorReply):
            raise Refused(reply.decode(errors="replace"))
        return reply

    async def _next_answer(self, count: int) -> Answer:
        """Raises what `next_reply` raises."""
        replies: list[Reply] = []
        start = 0
        while len(replies) < count:
            try:
                reply, start = parse(self._received, start)
            except Incomplete:
                pass
            except ValueError as problem:
                raise BadReply(str(problem)) from problem
            else:
                replies.append(reply)
                continue
            data = await self._stream.receive_some(RECEIVE_BYTES)
            if not data:
                raise trio.BrokenResourceError("the peer closed the connection")
            self._received += data
        raw = bytes(self._received[:start])
        del self._received[:start]
        return Answer(raw, replies)


async def connect(address: Address, *, resp3: bool = False) -> Client:
    """Raises Lost."""
    try:
        connection = await Client.open(address.host, address.port, resp3=resp3)
    except GONE as fault:
        raise Lost(f"{address}: {fault}") from fault
    assert isinstance(connection, Client)
    return connection


class Doors(Protocol):
    """``count`` doors lead to the same data."""

    count: int
    has_snapshots: bool  # False: of a closed snapshot, and of names, nothing can be asked

    async def writer(self, door: int, *, resp3: bool = False) -> Client:
        """Raises Lost."""

    async def reader(self, door: int, snapshot_id: int, *, resp3: bool = False) -> Client:
        """A client whose reads are of this snapshot. Raises Lost, and Refused."""

    async def open(self, door: int) -> int:
        """The id of a new snapshot. Raises Lost, and Refused."""

    async def close(self, door: int, snapshot_id: int) -> None:
        """Raises Lost, and Refused."""


class Plain:
    """Through proxies, but each snapshot is whatever there is when it is read."""

    has_snapshots = False

    def __init__(self, addresses: Sequence[Address]) -> None:
        self.addresses = addresses
        self.count = len(addresses)
        self._last_id = 0

    async def writer(self, door: int, *, resp3: bool = False) -> Client:
        return await connect(self.addresses[door], resp3=resp3)

    async def reader(self, door: int, snapshot_id: int, *, resp3: bool = False) -> Client:
        return await connect(self.addresses[door], resp3=resp3)

    async def open(self, door: int) -> int:
        self._last_id += 1
        return self._last_id

    async def close(self, door: int, snapshot_id: int) -> None:
        await trio.lowlevel.checkpoint()


class Snapshots(Plain):
    """What Steadyread promises."""

    has_snapshots = True

    async def reader(self, door: int, snapshot_id: int, *, resp3: bool = False) -> Client:
        client = await super().reader(door, snapshot_id, resp3=resp3)
        try:
            await client.call(STEADY_READ, b"SNAPSHOT", snapshot_id)
        except BaseException:
            client.close_nowait()
            raise
        return client

    async def open(self, door: int) -> int:
        return snapshot_id_in(await self._once(door, SNAPSHOT, b"OPEN"))

    async def close(self, door: int, snapshot_id: int) -> None:
        await self._once(door, SNAPSHOT, b"CLOSE", snapshot_id)

    async def open_ids(self, door: int) -> list[int]:
        """Those of snapshots that are not yet closed or aborted. Raises Lost, and Refused."""
        listed = await self._once(door, SNAPSHOT, b"LIST")
        return [
            facts["id"] for facts in map(_facts, _list(listed)) if facts["state"] not in ("closed", "aborted")
        ]

    async def _once(self, door: int, *parts: bytes | int) -> Reply:
        client = await self.writer(door)
        try:
            return await client.call(*parts)
        finally:
            client.close_nowait()


def snapshot_id_in(reply: Reply) -> int:
    """Of the reply to OPEN. Raises BadReply."""
    if isinstance(reply, int):
        return reply
    return int(_facts(reply)["id"])


def _facts(reply: Reply) -> dict[str, Any]:
    """One snapshot's facts: JSON, or names and values by turns."""
    if isinstance(reply, bytes):
        found: dict[str, Any] = json.loads(reply)
        return found
    flat = _list(reply)
    facts: dict[str, Any] = {}
    for name, value in zip(flat[::2], flat[1::2], strict=True):
        if isinstance(name, bytes):
            facts[name.decode()] = value.decode() if isinstance(value, bytes) else value
    facts["id"] = int(facts["id"])
    return facts


def _list(reply: Reply) -> list[Reply]:
    if not isinstance(reply, list):
        raise BadReply(f"not an array: {reply!r}")
    return reply


class Copies(Plain):
    """A snapshot is a copy on a server beside the cluster, a database each, made while all writers are held."""

    def __init__(
        self,
        addresses: Sequence[Address],
        copies: Address,
        holding: Callable[[], Any],
        names: Callable[[], set[bytes]],
    ) -> None:
        """``holding`` is an async context manager while which nobody writes; ``names``: all keys that there may be."""
        super().__init__(addresses)
        self._copies = copies
        self._holding = holding
        self._names = names

    async def reader(self, door: int, snapshot_id: int, *, resp3: bool = False) -> Client:
        client = await connect(self._copies, resp3=resp3)
        await client.call(b"SELECT", snapshot_id)
        return client

    async def open(self, door: int) -> int:
        snapshot_id = await super().open(door)
        source, target = await self.writer(door), await self.reader(door, snapshot_id)
        try:
            async with self._holding():
                names = sorted(self._names())
                for start in range(0, len(names), BATCH):
                    await _copy(source, target, names[start : start + BATCH])
        finally:
            source.close_nowait()
            target.close_nowait()
        return snapshot_id


async def _copy(source: Client, target: Client, names: Sequence[bytes]) -> None:
    asked = [(frame([b"DUMP", name]) + frame([b"PTTL", name]), 2) for name in names]
    restores = []
    for name, answer in zip(names, await source.ask_all(asked), strict=True):
        value, ttl = answer.replies
        if isinstance(value, ErrorReply):
            raise Refused(value.decode())
        if isinstance(value, bytes) and isinstance(ttl, int):
            restores.append((frame([b"RESTORE", name, max(0, ttl), value]), 1))
    for answer in await target.ask_all(restores):
        if answer.replies != [b"OK"]:
            raise Refused(f"RESTORE: {answer.replies!r}")


@asynccontextmanager
async def copies_server(engine: Engine) -> AsyncIterator[Address]:
    """A server for `Copies`."""
    address = free_address()
    with tempfile.TemporaryDirectory(prefix="steadyread-copies-") as directory:
        command = [*engine.server, "--port", str(address.port), "--bind", address.host, "--dir", directory]
        command += ["--save", "", "--appendonly", "no", "--databases", str(COPY_DATABASES)]
        async with serving_process(command, address):
            yield address
