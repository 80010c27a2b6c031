"""Concurrent clients on a few keys, and the history of what they did.

Each client has one request under way; most go to the key of the moment, so that many meet there. Written values are
different ones, with room between them for increments, so that what a read returns tells which write it saw.

A reply that is lost, or OUTCOMEUNKNOWN, leaves an operation whose outcome is unknown. Any other error is counted as
refused, and its operation is one of unknown outcome too: that a refused write did not happen is another test's promise.
Times are those of one clock: before the request's first byte is sent, and after the reply's last was read.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from types import TracebackType
from typing import Protocol, Self

import trio

from routing.levels import Level
from routing.topology import Address
from tests.linearizability.checker import Kind, Operation
from tests.live.campaign.resp import BadReply, Connection, ErrorReply, Reply, frame

ANSWER_SECONDS = 8.0  # then a reply counts as lost
RECONNECT_SECONDS = 0.02
HOT_SHARE = 0.5  # of the requests, those to the key of the moment
HOT_SECONDS = 0.05  # how long a key is that
VALUE_STEP = 1000  # between two written values: more than the increments between two writes
WEIGHTS = {Kind.READ: 70, Kind.WRITE: 20, Kind.INCREMENT: 8, Kind.SET_IF_ABSENT: 1, Kind.DELETE: 1}
OUTCOME_UNKNOWN = b"OUTCOMEUNKNOWN"
GONE = (trio.BrokenResourceError, trio.ClosedResourceError, BadReply, OSError)


class Client(Protocol):
    """How one client reaches the data. Raises what is in `GONE`; then it is spent."""

    async def ask(self, key: bytes, is_read: bool, request: bytes) -> Reply: ...


ClientOpener = Callable[[], AbstractAsyncContextManager[Client]]


class Refused(Exception):
    """The server answered with an error where the whole history depends on it."""


class ThroughProxy:
    """One connection to the proxy, whose reads are of one level."""

    def __init__(self, address: Address, level: Level) -> None:
        self._address = address
        self._level = level

    async def __aenter__(self) -> Self:
        """Raises Refused when the proxy does not know the level, and what is in `GONE`."""
        self._connection = await Connection.open(*self._address)
        try:
            request = frame([b"STEADY.READ", self._level.value.upper().encode()])
            [reply] = await self._connection.exchange(request, 1)
            if reply != b"OK":
                raise Refused(f"STEADY.READ {self._level.value}: {reply!r}")
        except BaseException:
            await self._connection.aclose_forcefully()  # noqa: ASYNC102  # it does not wait
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connection.aclose_forcefully()  # noqa: ASYNC102  # it does not wait

    async def ask(self, key: bytes, is_read: bool, request: bytes) -> Reply:
        [reply] = await self._connection.exchange(request, 1)
        return reply


class AtReplicas:
    """What a cluster client does that may read at replicas: writes to the owner, reads from the owner's replica.

    It asks for no proof, and knows the map of its beginning only.
    """

    def __init__(self, nodes: Mapping[bytes, tuple[Address, Address]]) -> None:
        """``nodes``: key -> its owner, and that one's replica."""
        self._nodes = nodes
        self._connections: dict[Address, Connection] = {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            for owner, replica in self._nodes.values():
                for address in (owner, replica):
                    if address not in self._connections:
                        connection = self._connections[address] = await Connection.open(*address)
                        opened.push_async_callback(connection.aclose_forcefully)
                        await connection.exchange(frame([b"READONLY"]), 1)  # owners do not mind
            self._opened = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.aclose()

    async def ask(self, key: bytes, is_read: bool, request: bytes) -> Reply:
        owner, replica = self._nodes[key]
        [reply] = await self._connections[replica if is_read else owner].exchange(request, 1)
        return reply


@dataclass(slots=True)
class Recorder:
    """A load and its history."""

    keys: Sequence[bytes]
    seed: int = 0
    pause_seconds: float = 0.001  # of a client between two requests, on the average
    operations: list[Operation] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)  # error replies, and connections that broke
    is_stopping: bool = False
    _values: count[int] = field(default_factory=lambda: count(VALUE_STEP, VALUE_STEP))

    @property
    def reads(self) -> int:
        """How many were answered."""
        return sum(1 for operation in self.operations if operation.kind is Kind.READ)

    async def create_keys(self, client: Client) -> None:
        """The first write of each key is part of the history. Raises Refused, and what is in `GONE`."""
        for key in self.keys:
            await self._perform(client, 0, key, Kind.WRITE)
        if self.refused:
            raise Refused(f"the keys cannot be written: {dict(self.refused)}")

    async def run(self, openers: Sequence[ClientOpener]) -> None:
        """So many clients as there are openers, until `stop`. Raises what opening raises at first."""
        async with trio.open_nursery() as clients:
            for number, opener in enumerate(openers, start=1):
                clients.start_soon(self._run_client, number, opener)

    def stop(self) -> None:
        """Each client ends after the request that it has under way."""
        self.is_stopping = True

    async def _run_client(self, number: int, opener: ClientOpener) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        is_opened = False
        while not self.is_stopping:
            try:
                async with opener() as client:
                    is_opened = True
                    await self._load(client, number, rng)
            except GONE as problem:
                if not is_opened:
                    raise
                self.refused[f"connection lost: {problem}"] += 1
                await trio.sleep(RECONNECT_SECONDS)

    async def _load(self, client: Client, number: int, rng: random.Random) -> None:
        """Requests until `stop`. Raises what is in `GONE`; what was under way then has an unknown outcome."""
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        while not self.is_stopping:
            key = rng.choice(self.keys)
            if rng.random() < HOT_SHARE:
                key = self.keys[int(perf_counter() / HOT_SECONDS) % len(self.keys)]
            await self._perform(client, number, key, rng.choices(kinds, weights)[0])
            await trio.sleep(rng.random() * 2 * self.pause_seconds)

    async def _perform(self, client: Client, number: int, key: bytes, kind: Kind) -> None:
        argument = next(self._values) if kind in (Kind.WRITE, Kind.SET_IF_ABSENT) else None
        request = frame(command_of(kind, key, argument))
        called_at = perf_counter()
        returned_at, result = None, None
        try:
            with trio.fail_after(ANSWER_SECONDS):
                reply = await client.ask(key, kind is Kind.READ, request)
            if isinstance(reply, ErrorReply):
                if not reply.startswith(OUTCOME_UNKNOWN):
                    self.refused[reply.decode(errors="replace")] += 1
            else:
                returned_at, result = perf_counter(), result_of(kind, reply)
        except trio.TooSlowError as late:
            raise trio.BrokenResourceError(f"no reply within {ANSWER_SECONDS} s") from late
        finally:
            if returned_at is not None or kind is not Kind.READ:
                self.operations.append(
                    Operation(number, key.decode(), kind, called_at, returned_at, argument, result)
                )


def command_of(kind: Kind, key: bytes, argument: int | None) -> list[bytes | int]:
    """The words that a server understands."""
    match kind:
        case Kind.READ:
            return [b"GET", key]
        case Kind.WRITE:
            assert argument is not None
            return [b"SET", key, argument]
        case Kind.INCREMENT:
            return [b"INCR", key]
        case Kind.SET_IF_ABSENT:
            assert argument is not None
            return [b"SET", key, argument, b"NX"]
        case Kind.DELETE:
            return [b"DEL", key]


def result_of(kind: Kind, reply: Reply) -> int | None:
    """The reply as `Operation.result`. Raises BadReply for one that the command cannot have."""
    match kind, reply:
        case Kind.READ, None:
            return None
        case Kind.READ, bytes(value) if value.isdigit():
            return int(value)
        case Kind.WRITE, b"OK":
            return None
        case Kind.SET_IF_ABSENT, (b"OK" | None):
            return int(reply is not None)
        case Kind.INCREMENT, int(value):
            return value
        case Kind.DELETE, (0 | 1):
            return int(reply == 1)
    raise BadReply(f"{kind.value}: {reply!r}")
