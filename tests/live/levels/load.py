"""The load: writers, readers of one or more levels, and sessions, each reply judged as it comes.

All run in one process, so what was known when a read was sent is known exactly. Each is paced, and who falls behind
does not catch up, because that would be another load. A read belongs to the phase in which it was sent.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from proxy.embedded.connection import Argument, ConnectionLost, ServerError
from routing.levels import Level
from tests.live.campaign.workload import percentiles
from tests.live.levels.checks import (
    NS_PER_MS,
    Bounded,
    Existing,
    Fault,
    Key,
    Newest,
    Promise,
    Question,
    Session,
    judge,
    shares,
)
from tests.live.levels.targets import Client, Doors

BOUND_MS = 1000  # of bounded_staleness
PIPELINE_DEPTH = 8
EXAMPLES_MAX = 3  # faults told in full, for each kind
VISIT_STEPS = 15  # of a session on one connection
RECENT_KEYS = 4  # of its own writes that a session reads at once when it is back
RECONNECT_SECONDS = 0.1
DELAY_PROBE_SECONDS = 0.01


def now() -> int:
    """Nanoseconds of Trio's clock: the system's monotonic one, and in tests a virtual one."""
    return int(trio.current_time() * 1e9)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    writers: int = 8
    write_rate: float = 2000.0  # writes per second of all writers together
    write_batch: int = 5  # keys written in one pipeline
    readers: int = 24  # of each level
    pipelined: int = 3  # how many of them pipeline
    read_rate: float = 1500.0  # reads per second of each level
    sessions: int = 12
    deadline_seconds: float = 8.0
    seed: int = 0


@dataclass(slots=True)
class Tally:
    """What the readers of one level saw in one phase."""

    reads: int = 0
    writes: int = 0  # all writers' and sessions'
    reconnects: int = 0  # of sessions, with a token
    door_changes: int = 0  # those of them that led to another proxy
    faults: Counter[Fault] = field(default_factory=Counter)
    examples: dict[Fault, list[str]] = field(default_factory=dict)
    age_when_sent_max: int = 0  # nanoseconds
    age_when_answered_max: int = 0
    latencies: array[float] = field(default_factory=lambda: array("d"))  # seconds, of reads sent alone
    seconds: float = 0.0
    delays: array[float] = field(default_factory=lambda: array("d"))  # how late this process itself ran

    def fault(self, kind: Fault, words: str) -> None:
        self.faults[kind] += 1
        told = self.examples.setdefault(kind, [])
        if len(told) < EXAMPLES_MAX:
            told.append(words)

    def summary(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 2),
            "reads": self.reads,
            "writes": self.writes,
            "reconnects": self.reconnects,
            "door_changes": self.door_changes,
            "faults": {kind.value: self.faults[kind] for kind in Fault},
            "examples": {kind.value: told for kind, told in self.examples.items()},
            "age_when_sent_ms_max": round(self.age_when_sent_max / NS_PER_MS, 2),
            "age_when_answered_ms_max": round(self.age_when_answered_max / NS_PER_MS, 2),
            "latency_ms": percentiles(sorted(self.latencies)),
            "own_delay_ms": percentiles(sorted(self.delays)),
        }


@dataclass(slots=True, eq=False)
class Group:
    """The readers of one level, by one way."""

    name: str
    level: Level
    doors: Doors
    tally: Tally = field(default_factory=Tally)  # of this phase

    @property
    def words(self) -> tuple[Argument, ...]:
        """What follows STEADY.READ."""
        words: tuple[Argument, ...] = (self.level.value.upper(),)
        return (*words, BOUND_MS) if self.level is Level.BOUNDED_STALENESS else words

    @property
    def promise(self) -> Promise:
        if self.level in (Level.STRONG, Level.CAUGHT_UP):
            return Newest()
        if self.level is Level.BOUNDED_STALENESS:
            return Bounded(BOUND_MS * NS_PER_MS)
        if self.level is Level.SESSION:
            return Session()
        return Existing()


class Load:
    """Runs from `run` to `finish`. ``keys`` may have been used by an earlier load that has ended."""

    def __init__(
        self, keys: Sequence[Key], writing: Doors, groups: Sequence[Group], options: LoadOptions
    ) -> None:
        """Writers use ``writing``, each group its own way. Sessions write too, and only with `Level.SESSION`."""
        self.keys = keys
        self.groups = groups
        self._writing = writing
        self._options = options
        self._stopping = False
        self._began = trio.current_time()

    @property
    def uncertain(self) -> int:
        """Keys whose last write has an unknown outcome; nobody reads them any more."""
        return sum(not key.is_certain for key in self.keys)

    async def run(self) -> None:
        """Write and read until `finish`."""
        options = self._options
        sessions = [group for group in self.groups if group.level is Level.SESSION]
        count = options.writers + len(sessions) * options.sessions
        owned = shares(self.keys, count)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._delay_probe)
            for number in range(options.writers):
                nursery.start_soon(self._writer, number, next(owned))
            for group in self.groups:
                if group.level is Level.SESSION:
                    for number in range(options.sessions):
                        nursery.start_soon(self._session, group, number, next(owned))
                else:
                    for number in range(options.readers):
                        nursery.start_soon(self._reader, group, number)

    def enter_phase(self) -> list[Tally]:
        """What was seen since the last call is returned, one tally for each group; what is sent from now on is new."""
        ended = [group.tally for group in self.groups]
        entered = trio.current_time()
        for group, tally in zip(self.groups, ended, strict=True):
            tally.seconds = entered - self._began
            group.tally = Tally()
        self._began = entered
        return ended

    def finish(self) -> None:
        """Each client ends after what it has under way."""
        self._stopping = True

    # --- writers ---

    async def _writer(self, number: int, owned: list[Key]) -> None:
        options = self._options
        rng = random.Random(f"{options.seed}/writer {number}")
        pace = _Pace(rng, options.writers / options.write_rate * options.write_batch)
        visitor = _Visitor(self, self._writing, number)
        try:
            while await self._next_turn(pace):
                client = await visitor.client(self.groups[0].tally)
                certain = [key for key in owned if key.is_certain]
                if client is not None and certain:
                    batch = rng.sample(certain, min(options.write_batch, len(certain)))
                    commands = [("SET", key.name, key.begin_write(now())) for key in batch]
                    replies = await self._ask(visitor, client, commands, self.groups[0].tally)
                    self._acknowledge(batch, replies)
        finally:
            await visitor.leave()  # noqa: ASYNC102  # it does not wait

    def _acknowledge(self, batch: Sequence[Key], replies: Sequence[Any] | None) -> None:
        """Written, or from now on uncertain."""
        answered_at = now()
        for key, reply in zip(batch, replies or [None] * len(batch), strict=True):
            if reply == b"OK":
                key.acknowledge(answered_at)
                for group in self.groups:
                    group.tally.writes += 1
            else:
                key.is_certain = False

    # --- readers ---

    async def _reader(self, group: Group, number: int) -> None:
        options = self._options
        rng = random.Random(f"{options.seed}/{group.name} {number}")
        depth = PIPELINE_DEPTH if number < options.pipelined else 1
        pace = _Pace(rng, options.readers / options.read_rate * depth)
        visitor = _Visitor(self, group.doors, number, group.words)
        try:
            while await self._next_turn(pace):
                client = await visitor.client(group.tally)
                if client is not None:
                    keys = [rng.choice(self.keys) for _ in range(depth)]
                    await self._read(visitor, client, keys, group.promise, group.tally)
        finally:
            await visitor.leave()  # noqa: ASYNC102  # it does not wait

    async def _read(
        self, visitor: _Visitor, client: Client, keys: Sequence[Key], promise: Promise, tally: Tally
    ) -> None:
        """In one pipeline. Keys that are or become uncertain are not judged."""
        sent_at = now()
        questions = [Question.of(key, sent_at) for key in keys]
        replies = await self._ask(visitor, client, [("GET", key.name) for key in keys], tally)
        if replies is not None:
            answered_at = now()
            if len(keys) == 1:
                tally.latencies.append((answered_at - sent_at) / 1e9)
            for question, reply in zip(questions, replies, strict=True):
                self._judge(question, reply, promise, answered_at, tally)

    def _judge(
        self, question: Question, reply: object, promise: Promise, answered_at: int, tally: Tally
    ) -> None:
        if isinstance(reply, ServerError) or not question.key.is_certain:
            return  # an error is counted where it came in
        tally.reads += 1
        judged = judge(question, reply, promise, answered_at)
        if judged.fault is not None:
            tally.fault(judged.fault, judged.words)
        tally.age_when_sent_max = max(tally.age_when_sent_max, judged.age_when_sent)
        tally.age_when_answered_max = max(tally.age_when_answered_max, judged.age_when_answered)

    # --- sessions ---

    async def _session(self, group: Group, number: int, owned: list[Key]) -> None:
        """One client that reads what it wrote, goes, and comes back with its token at the same proxy or the next."""
        options = self._options
        rng = random.Random(f"{options.seed}/{group.name} {number}")
        pace = _Pace(rng, options.sessions / options.read_rate * 2)  # a step has two reads, nearly
        stay = _Stay(self, group, rng, owned)
        while not self._stopping:
            # At each proxy twice, so that half of the tokens are used where they were made.
            door = (stay.visits // 2 + number) % group.doors.doors
            visitor = _Visitor(self, group.doors, door, (*group.words, *stay.token), is_fixed=True)
            try:
                client = await visitor.client(group.tally)
                is_whole = client is not None and await stay.visit(visitor, client, door, pace)
            finally:
                await visitor.leave()  # noqa: ASYNC102  # it does not wait
            if not is_whole:
                stay = _Stay(self, group, rng, owned)  # what it was promised went with its connection

    # --- all of them ---

    async def _delay_probe(self) -> None:
        """The part of a latency that is not the target's."""
        while not self._stopping:
            due = trio.current_time() + DELAY_PROBE_SECONDS
            await trio.sleep_until(due)
            for group in self.groups:
                group.tally.delays.append(trio.current_time() - due)

    async def _next_turn(self, pace: _Pace) -> bool:
        """Wait for it; False once the load ends."""
        await pace.wait()
        return not self._stopping

    async def _ask(
        self, visitor: _Visitor, client: Client, commands: Sequence[Sequence[Argument]], tally: Tally
    ) -> list[Any] | None:
        """The replies, errors among them counted; None when the connection is spent, which is counted once."""
        try:
            with trio.fail_after(self._options.deadline_seconds):
                replies = await client.call_all(commands)
        except trio.TooSlowError:
            words = f"no reply within {self._options.deadline_seconds} s"
        except ConnectionLost as lost:
            words = str(lost)
        else:
            for command, reply in zip(commands, replies, strict=True):
                if isinstance(reply, ServerError):
                    tally.fault(Fault.ERROR, f"{_shown(command)}: {reply}")
            return replies
        tally.fault(Fault.ERROR, f"{_shown(commands[0])}: {words}")
        await visitor.leave()
        return None


class _Stay:
    """One session over all its visits: what it has written and seen, and its token."""

    def __init__(self, load: Load, group: Group, rng: random.Random, owned: list[Key]) -> None:
        self._load = load
        self._group = group
        self._rng = rng
        self._owned = owned
        self._promise = Session()
        self._recent: deque[Key] = deque(maxlen=RECENT_KEYS)
        self._door: int | None = None  # of the last visit
        self.visits = 0
        self.token: tuple[bytes, ...] = ()

    async def visit(self, visitor: _Visitor, client: Client, door: int, pace: _Pace) -> bool:
        """One connection, to its token. False: it was lost, and with it the session."""
        load, tally = self._load, self._group.tally
        if self.token:
            tally.reconnects += 1
            tally.door_changes += door != self._door
        # Before the first write, which would give the session a floor of its own.
        for key in [*self._recent]:
            await self._read(visitor, client, key)
        for _ in range(VISIT_STEPS):
            if not visitor.is_in or not await load._next_turn(pace):
                break
            await self._step(visitor, client)
        if not visitor.is_in:
            return False
        replies = await load._ask(visitor, client, [("STEADY.TOKEN",)], self._group.tally)
        if replies is None or not isinstance(replies[0], bytes):
            return False
        self.token = (replies[0],)
        self._door = door
        self.visits += 1
        return True

    async def _step(self, visitor: _Visitor, client: Client) -> None:
        load, rng = self._load, self._rng
        certain = [key for key in self._owned if key.is_certain]
        draw = rng.random()
        if draw < 0.35 or not certain:
            keys = [rng.choice(load.keys), rng.choice(certain or load.keys)]
            for key in keys:
                await self._read(visitor, client, key)
        elif draw < 0.7:
            key = rng.choice(certain)
            await self._write(visitor, client, key)
            await self._read(visitor, client, key)
        else:
            await self._write(visitor, client, rng.choice(certain), then_read=True)

    async def _read(self, visitor: _Visitor, client: Client, key: Key) -> None:
        if visitor.is_in:
            await self._load._read(visitor, client, [key], self._promise, self._group.tally)

    async def _write(self, visitor: _Visitor, client: Client, key: Key, *, then_read: bool = False) -> None:
        """``then_read``: in the same pipeline."""
        load, tally = self._load, self._group.tally
        question = Question.of(key, now())
        commands: list[tuple[Argument, ...]] = [("SET", key.name, key.begin_write(now()))]
        if then_read:
            commands.append(("GET", key.name))
        replies = await load._ask(visitor, client, commands, tally)
        load._acknowledge([key], replies[:1] if replies is not None else None)
        if replies is not None and key.is_certain:
            self._promise.wrote(key)
            self._recent.append(key)
            if then_read:
                load._judge(question, replies[1], self._promise, now(), tally)


class _Visitor:
    """One client's connection, opened when it is needed and again after it broke."""

    def __init__(
        self,
        load: Load,
        doors: Doors,
        number: int,
        words: tuple[Argument, ...] = (),
        *,
        is_fixed: bool = False,
    ) -> None:
        """Client ``number`` uses the doors by turns; with ``is_fixed`` that is its door."""
        self._load = load
        self._doors = doors
        self._door = number if is_fixed else number % doors.doors
        self._words = words
        self._client: Client | None = None

    @property
    def is_in(self) -> bool:
        return self._client is not None

    async def client(self, tally: Tally) -> Client | None:
        """None after counting why there is none, and a pause."""
        if self._client is None:
            try:
                with trio.fail_after(self._load._options.deadline_seconds):
                    self._client = await self._doors.open(self._door, self._words)
            except (ServerError, ConnectionLost, trio.TooSlowError) as problem:
                tally.fault(Fault.ERROR, f"connect, {_shown(self._words)}: {problem or 'no answer'}")
                await trio.sleep(RECONNECT_SECONDS)
        return self._client

    async def leave(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


class _Pace:
    """When one client's next turn is due."""

    def __init__(self, rng: random.Random, pause_seconds: float) -> None:
        self._rng = rng
        self._pause_seconds = pause_seconds
        self._due = trio.current_time() + rng.random() * pause_seconds

    async def wait(self) -> None:
        await trio.sleep_until(self._due)
        self._due = max(trio.current_time(), self._due + self._rng.uniform(0.5, 1.5) * self._pause_seconds)


def _shown(command: Sequence[Argument]) -> str:
    return " ".join(p.decode(errors="replace") if isinstance(p, bytes) else str(p) for p in command[:2])
