"""Readers and writers whose every reply can be judged.

Each key exists from before the start to after the end, has one writer, and holds its own name and a version
that only grows. So a nil is wrong whenever it comes, and a version lower than one that was acknowledged
before the read was sent is stale.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, Protocol

import trio

from proxy.embedded.cluster import Cluster, ClusterError
from proxy.embedded.connection import Argument, Connection, ConnectionLost, ServerError, connect
from routing.slot import slot_of
from routing.topology import Address

ANSWER_SECONDS = 5.0  # a request that takes longer counts as an error
_WAIT_REPLICAS_MS = 5_000
_PAUSE_AFTER_ERROR_SECONDS = 0.05


class Client(Protocol):
    """How one task reaches the data. Both calls raise ServerError and ConnectionLost."""

    async def read(self, key: bytes, *command: Argument) -> Any: ...
    async def write(self, key: bytes, *command: Argument) -> Any: ...
    async def aclose(self) -> None: ...


class SingleServerClient:
    """What a service has: one connection to one server. It opens a new one after the old one broke."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection: Connection | None = None

    async def read(self, key: bytes, *command: Argument) -> Any:
        if self._connection is None:
            self._connection = await connect(self._address)
        connection, self._connection = self._connection, None
        try:
            reply = await connection.call(*command)
        except ServerError:
            self._connection = connection
            raise
        self._connection = connection
        return reply

    write = read

    async def aclose(self) -> None:
        if self._connection is not None:
            await self._connection.aclose()
            self._connection = None


class Latencies:
    """How long requests took, in steps of 2 %, so that any number of them fits in little memory."""

    _STEP = math.log(1.02)

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()  # step -> how many

    def add(self, seconds: float) -> None:
        self._counts[math.ceil(math.log(max(seconds, 1e-6)) / self._STEP)] += 1

    def quantile_ms(self, share: float) -> float | None:
        """The latency that ``share`` of the requests did not exceed, up to 2 % too high; None of none."""
        wanted = share * self._counts.total()
        seen = 0
        for step in sorted(self._counts):
            seen += self._counts[step]
            if seen >= wanted:
                return math.exp(step * self._STEP) * 1000
        return None


@dataclass(slots=True)
class Tally:
    """What one side saw."""

    reads: int = 0
    writes: int = 0
    wrong_nils: int = 0
    stale_values: int = 0
    errors: int = 0  # of reads and writes, foreign values included
    latencies: Latencies = field(default_factory=Latencies)  # of reads
    examples: dict[str, str] = field(default_factory=dict)  # kind of fault -> the first one, in words

    @property
    def is_clean(self) -> bool:
        """It read, and nothing was wrong."""
        return self.reads > 0 and not (self.wrong_nils or self.stale_values or self.errors)

    def fault(self, kind: str, words: str) -> None:
        """Count one: ``kind`` is wrong_nils, stale_values or errors."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.examples.setdefault(kind, words)


class Traffic:
    """One side's keys and what it knows about them."""

    def __init__(self, name: str, tags: Sequence[bytes], keys_per_slot: int) -> None:
        """``tags`` are hash tags, one for each slot; ``name`` keeps the sides' keys apart within a slot."""
        self.tally = Tally()
        # The name stands last: engines that hand a slot's keys out in their order mix the sides then too.
        self.keys = [b"{%b}:%d:%b" % (tag, n, name.encode()) for n in range(keys_per_slot) for tag in tags]
        self._acknowledged = dict.fromkeys(self.keys, 0)  # key -> highest version whose write was answered
        self._sent = dict.fromkeys(self.keys, 0)  # key -> highest version ever sent

    async def read_on(self, client: Client, choice: random.Random, pause_seconds: float) -> None:
        """Read keys at random until cancelled."""
        while True:
            key = choice.choice(self.keys)
            floor = self._acknowledged[key]
            begun = trio.current_time()
            reply = await self._ask(client.read(key, "GET", key), f"GET {key.decode()}")
            if not isinstance(reply, _Failed):
                self.tally.reads += 1
                self.tally.latencies.add(trio.current_time() - begun)
                self._judge(key, reply, floor)
            await trio.sleep(pause_seconds)

    async def write_on(self, client: Client, keys: Sequence[bytes], pause_seconds: float) -> None:
        """Write the next version of each of these keys in turn until cancelled. No other task writes them."""
        for version in count(1):
            for key in keys:
                self._sent[key] = version
                reply = await self._ask(
                    client.write(key, "SET", key, value_of(key, version)), f"SET {key.decode()}"
                )
                if not isinstance(reply, _Failed):
                    self.tally.writes += 1
                    self._acknowledged[key] = version
                await trio.sleep(pause_seconds)

    async def _ask(self, request: Any, words: str) -> Any:
        """The reply, or _FAILED once the error is counted."""
        try:
            with trio.fail_after(ANSWER_SECONDS):
                return await request
        except (ServerError, ConnectionLost) as fault:
            self.tally.fault("errors", f"{words}: {fault}")
        except trio.TooSlowError:
            self.tally.fault("errors", f"{words}: no answer within {ANSWER_SECONDS:.0f} s")
        await trio.sleep(_PAUSE_AFTER_ERROR_SECONDS)
        return _FAILED

    def _judge(self, key: bytes, value: bytes | None, floor: int) -> None:
        if value is None:
            self.tally.fault("wrong_nils", f"GET {key.decode()}: nil, but the key exists")
            return
        name, _, version = value.rpartition(b"=")
        if name != key or not version.isdigit() or int(version) > self._sent[key]:
            self.tally.fault("errors", f"GET {key.decode()}: never written: {value[:60]!r}")
        elif int(version) < floor:
            words = f"GET {key.decode()}: version {int(version)}, but {floor} was acknowledged before"
            self.tally.fault("stale_values", words)


async def write_first_values(cluster: Cluster, sides: Sequence[Traffic]) -> None:
    """Write version 0 of every key at its owner and wait until the owners' replicas have it
    and are listed for clients.

    The sides' keys are written by turns, because some engines hand out a slot's keys in the order of their
    writing, and half of a slot should be half of each side. Raises ClusterError, ServerError, ConnectionLost.
    """
    map_ = await cluster.map_at(cluster.nodes[0])
    owned: dict[Address, list[bytes]] = {}
    for key in chain.from_iterable(zip(*[side.keys for side in sides], strict=True)):
        owned.setdefault(map_.owner_of(slot_of(key)).address, []).append(key)
    for address, keys in owned.items():
        replicas = sum(1 for line in map_.lines if line.primary_id == cluster.node_at(address).id)
        async with cluster.connection(address) as connection:
            for reply in await connection.call_all([("SET", key, value_of(key, 0)) for key in keys]):
                if isinstance(reply, ServerError):
                    raise reply
            if await connection.call("WAIT", replicas, _WAIT_REPLICAS_MS) < replicas:
                raise ClusterError(f"the replicas of {address} did not get the first values")
    await cluster.wait_replicas_listed(owned)


class _Failed:
    """No reply came that could be judged."""


_FAILED = _Failed()


def value_of(key: bytes, version: int) -> bytes:
    return b"%b=%d" % (key, version)


def tags_in_slots_of(owners: Sequence[frozenset[int]], per_owner: int) -> Iterator[bytes]:
    """Hash tags in different slots, ``per_owner`` for each of these sets of slots."""
    left = [per_owner] * len(owners)
    seen: set[int] = set()
    for number in count():
        if not any(left):
            return
        tag = b"demo%d" % number
        slot = slot_of(tag)
        index = next(index for index, slots in enumerate(owners) if slot in slots)
        if left[index] and slot not in seen:
            left[index] -= 1
            seen.add(slot)
            yield tag
