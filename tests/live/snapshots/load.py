"""The writers: every type of key, chains of causes over shards, banks, queues that somebody waits at.

All run in one process with the readers, so what was acknowledged when OPEN was sent is known exactly. What is written
is written by one task at a time. A write without a clear answer ends the writing of what it wrote: its last state is
unknown, but a snapshot must show it as it was all the same.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from tests.live.campaign.resp import ErrorReply, Reply, frame
from tests.live.campaign.workload import refusals_in
from tests.live.snapshots.checks import Fault, Tally, shown
from tests.live.snapshots.doors import Answer, Client, Doors, Lost
from tests.live.snapshots.families import Keys, Parts
from tests.live.snapshots.subjects import Chain, Queue, Shares, Subject, Tills, VersionedKeys

MANY_SHARE = 0.15  # of the writes of keys, those of several keys
PREFILL_BATCH = 200
RECONNECT_SECONDS = 0.05
DEADLINE_SECONDS = 9.0  # more than the proxy's own
STORM_SECONDS = 0.005  # before what it is made for
WAIT_SECONDS = (0.1, 0.6)  # for which a taker waits at its queue; a writer is held for as long at most
TRANSFER_SCRIPT = b"redis.call('DECRBY', KEYS[1], ARGV[1]) return redis.call('INCRBY', KEYS[2], ARGV[1])"

Step = Callable[..., Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    slots: tuple[int, ...]
    keys_per_slot: int = 12
    writers: int = 8
    write_rate: float = 250.0  # writes of keys per second, of all writers together
    step_seconds: float = 0.03  # of each task that writes what belongs together
    chains: int = 4
    tellers: int = 4  # of whom each transfers between any two accounts of one slot
    shares: int = 3
    seed: int = 0
    has_eval_ro: bool = True


class Hold:
    """Lets writers pass, or holds them all."""

    def __init__(self) -> None:
        self._is_held = False
        self._holder: trio.lowlevel.Task | None = None
        self._passing = 0
        self._changed = trio.Condition()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        async with self._changed:
            while self._is_held:
                await self._changed.wait()
            self._passing += 1
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):  # nobody waits while holding the condition
                async with self._changed:
                    self._passing -= 1
                    self._changed.notify_all()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Every write has its answer when the block begins, and none is sent until it ends. Blocks may be nested."""
        if self._holder is trio.lowlevel.current_task():
            yield
            return
        async with self._changed:
            while self._is_held:
                await self._changed.wait()
            self._is_held = True
            while self._passing:
                await self._changed.wait()
        self._holder = trio.lowlevel.current_task()
        try:
            yield
        finally:
            self._holder = None
            with trio.CancelScope(shield=True):
                async with self._changed:
                    self._is_held = False
                    self._changed.notify_all()


class Load:
    """Runs until it is cancelled, once it is prefilled."""

    def __init__(self, doors: Doors, tally: Tally, options: LoadOptions) -> None:
        self.tally = tally
        self.hold = Hold()
        self.may_have_lost = (
            False  # a primary was killed: what was acknowledged may be gone, and writers see it
        )
        self._doors = doors
        self._options = options
        slots = options.slots
        rng = random.Random(f"{options.seed}/subjects")
        self._storm = trio.Event()
        self._storms = 0
        self._keys = Keys(slots, options.keys_per_slot, options.writers)
        # From slot to slot in an order of its own, so that each shard is cause and effect.
        self._chains = [
            Chain(rng.sample(slots, min(3, len(slots))), index) for index in range(options.chains)
        ]
        self._tills = Tills(slots)
        self._shares = [Shares(slots, index) for index in range(options.shares)]
        self._queues = [
            Queue(slot, index, has_second=index % 2 == 1)
            for index, slot in enumerate(rng.sample(slots, min(4, len(slots))))
        ]
        self.subjects: list[Subject] = [
            VersionedKeys(self._keys, has_eval_ro=options.has_eval_ro, seed=options.seed),
            *self._chains,
            self._tills,
            *self._shares,
            *self._queues,
        ]

    async def prefill(self) -> None:
        """Raises Lost, and AssertionError for a refusal."""
        client = await self._doors.writer(0)
        try:
            commands = [payload for subject in self.subjects for payload in subject.create()]
            for start in range(0, len(commands), PREFILL_BATCH):
                batch = commands[start : start + PREFILL_BATCH]
                for answer in await client.ask_all([(payload, 1) for payload in batch]):
                    assert not any(refusals_in(answer.replies)), answer.raw
        finally:
            client.close_nowait()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            number = 0

            def start(work: Step, *given: object) -> None:
                nonlocal number
                # Chains and transfers take the doors by turns, so that a cause and its effect pass different ones.
                caller = Caller(
                    self._doors, number, self.tally, random.Random(f"{self._options.seed}/{number}")
                )
                nursery.start_soon(self._repeat, caller, work, *given)
                number += 1

            for owner in range(self._options.writers):
                start(self._write_keys, owner)
            for chain in self._chains:
                start(self._lengthen, chain)
            for _ in range(self._options.tellers):
                start(self._transfer, self._tills)
            for shares in self._shares:
                start(self._redistribute, shares)
            for queue in self._queues:
                start(self._push, queue)
                start(self._take, queue)

    @asynccontextmanager
    async def storm(self) -> AsyncIterator[None]:
        """Chains are lengthened and money is moved without pauses: a cut in the block falls into the middle of it."""
        self._storms += 1
        self._storm.set()
        try:
            await trio.sleep(STORM_SECONDS)
            yield
        finally:
            self._storms -= 1
            if not self._storms:
                self._storm = trio.Event()

    async def _repeat(self, caller: Caller, work: Step, *given: object) -> None:
        """Do the work at its pace until it says that it is over."""
        rng, options = caller.rng, self._options
        pause = options.step_seconds
        if work == self._write_keys:
            pause = options.writers / options.write_rate
        has_storms = work in (self._lengthen, self._transfer, self._redistribute)
        try:
            while True:
                with trio.move_on_after(rng.uniform(0.5, 1.5) * pause):
                    if not has_storms:
                        await trio.sleep_forever()
                    await self._storm.wait()
                async with self.hold.passing():
                    if not await work(caller, *given):
                        return
        finally:
            caller.leave()

    # --- one step of each; False: it is over ---

    async def _write_keys(self, caller: Caller, owner: int) -> bool:
        rng = caller.rng
        request = None
        if rng.random() < MANY_SHARE:
            request = self._keys.write_many(owner, rng)
        request = request or self._keys.write(owner, rng)
        if request is None:
            return True  # others of its keys may be certain
        answer = await caller.ask(request.payload, request.reply_count)
        if answer is None:
            for key in request.writes:
                key.is_certain = False
            return True
        for fault in request.check(answer.replies):
            self._blame_write(f"{request.label}: {fault.detail}")
            for key in request.writes:
                key.is_certain = False
        return True

    async def _lengthen(self, caller: Caller, chain: Chain) -> bool:
        """One number for each link, each only after the one before it was acknowledged."""
        number = chain.issued[0] + 1
        for link, name in enumerate(chain.names):
            chain.issued[link] = number
            caller.next_door()
            answer = await caller.ask(frame([b"SET", name, number]), 1)
            if answer is None:
                return False
            chain.acked[link] = number
        return True

    async def _transfer(self, caller: Caller, tills: Tills) -> bool:
        """Within one slot. Half done is none, so an unknown outcome does no harm."""
        rng = caller.rng
        source, target = rng.sample(rng.choice(tills.by_slot), 2)
        amount = rng.randint(1, 50)
        if rng.random() < 0.5:
            await caller.ask(frame([b"EVAL", TRANSFER_SCRIPT, 2, source, target, amount]), 1)
            return True
        block: list[Parts] = [[b"MULTI"], [b"DECRBY", source, amount], [b"INCRBY", target, amount], [b"EXEC"]]
        await caller.ask(b"".join([frame(parts) for parts in block]), len(block))
        return True

    async def _redistribute(self, caller: Caller, shares: Shares) -> bool:
        """From slot to slot; without a clear answer the total may be torn for good."""
        rng = caller.rng
        source, target = rng.sample(range(len(shares.names)), 2)
        amount = rng.randint(1, 50)
        wanted = list(shares.balances)
        wanted[source] -= amount
        wanted[target] += amount
        named = list(zip(shares.names, wanted, strict=True))
        chosen = named if rng.random() < 0.5 else [named[source], named[target]]
        answer = await caller.ask(frame([b"MSET", *[part for pair in chosen for part in pair]]), 1)
        if answer is None:
            shares.is_certain = False
            return False
        shares.balances = wanted
        return True

    async def _push(self, caller: Caller, queue: Queue) -> bool:
        count = caller.rng.randint(1, 3)
        numbers = range(queue.pushed_issued + 1, queue.pushed_issued + count + 1)
        queue.pushed_issued += count
        answer = await caller.ask(
            frame([b"RPUSH", queue.name, *[queue.element(number) for number in numbers]]), 1
        )
        if answer is None:
            return False
        queue.pushed_acked += count
        # Longer than a taker needs for what was pushed, so that takers do wait.
        await trio.sleep(caller.rng.random() * self._options.step_seconds * 16)
        return True

    async def _take(self, caller: Caller, queue: Queue) -> bool:
        seconds = b"%.2f" % caller.rng.uniform(*WAIT_SECONDS)
        if queue.second is None:
            parts = [b"BLPOP", queue.name, seconds]
        else:
            parts = [b"BLMOVE", queue.name, queue.second, b"LEFT", b"RIGHT", seconds]
        answer = await caller.ask(frame(parts), 1)
        if answer is None:
            return False
        taken = answer.replies[0]
        if taken is None:
            return True
        wanted: Reply = queue.element(queue.taken_acked + 1)
        if taken != (wanted if queue.second else [queue.name, wanted]):
            self._blame_write(f"{parts[0].decode()} took {taken!r}, {wanted!r} was due")
            return False
        queue.taken_acked += 1
        return True

    def _blame_write(self, words: str) -> None:
        if not self.may_have_lost:
            self.tally.fault(Fault.WRITE, words)


class Caller:
    """One writer's connections, opened when they are needed and again after they broke.

    Every other one speaks RESP3, so that the proxy writes over several connections to each node.
    """

    def __init__(self, doors: Doors, number: int, tally: Tally, rng: random.Random) -> None:
        self.rng = rng
        self._doors = doors
        self._door = number // 2 % doors.count
        self._resp3 = number % 2 == 1
        self._tally = tally
        self._clients: dict[int, Client] = {}

    def next_door(self) -> None:
        self._door = (self._door + 1) % self._doors.count

    async def ask(self, payload: bytes, reply_count: int) -> Answer | None:
        """None without a clear answer: the outcome is unknown, or it was refused."""
        client = await self._client()
        try:
            with trio.fail_after(DEADLINE_SECONDS):
                answer = await client.ask(payload, reply_count)
        except (Lost, trio.TooSlowError):
            self._tally.writes_lost += 1
            del self._clients[self._door]
            client.close_nowait()
            return None
        except BaseException:
            client.close_nowait()
            raise
        refusal = _refusal(answer)
        if refusal is not None:
            text = refusal.decode(errors="replace")
            self._tally.refuse(self._tally.writes_refused, shown(payload), text)
            return None
        self._tally.writes += 1
        return answer

    def leave(self) -> None:
        for client in self._clients.values():
            client.close_nowait()

    async def _client(self) -> Client:
        """Waits for as long as nobody listens."""
        while self._door not in self._clients:
            try:
                with trio.fail_after(DEADLINE_SECONDS):
                    self._clients[self._door] = await self._doors.writer(self._door, resp3=self._resp3)
            except (Lost, trio.TooSlowError):
                await trio.sleep(RECONNECT_SECONDS)
        return self._clients[self._door]


def _refusal(answer: Answer) -> ErrorReply | None:
    return next(iter(refusals_in(answer.replies)), None)


def names_in(subjects: Sequence[Subject]) -> set[bytes]:
    """All that may be there."""
    found: set[bytes] = set()
    for subject in subjects:
        expectation = subject.expect()
        expectation.on_opened()
        found |= expectation.names()[1]
    return found
