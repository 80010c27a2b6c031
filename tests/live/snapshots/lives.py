"""The lives of snapshots: opened, read again and again by several clients at every door, listed, closed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import trio

from tests.live.campaign.resp import ErrorReply, Reply
from tests.live.snapshots.checks import ENDED, Expectation, Fault, Read, Tally, View, canonical
from tests.live.snapshots.doors import Client, Doors, Lost, Refused, Snapshots
from tests.live.snapshots.load import Load

PASS_BATCH = 24  # reads in one pipeline, when all are read
BATCHES = (1, 1, 1, 6)  # reads in one pipeline, else
TOGETHER_SHARE = 0.25  # of the reads, those of what belongs together
STAGGER_SECONDS = 0.6  # from one keeper's first opening to the next one's
GLIMPSE_SECONDS = (0.3, 1.2)  # from one glimpse to the next
LEAST_SECONDS = 0.5  # for which a snapshot is read at random, however near the end is
STEP_SECONDS_MAX = 0.01  # between two steps of one of them
DEADLINE_SECONDS = 20.0  # of a pipeline, in which several may need the proxy's own deadline
OPEN_SECONDS = 15.0
RETRY_SECONDS = 0.1
SCAN_COUNT = 200
LIST_SECONDS = (0.1, 0.6)  # from one listing to the next
LIST_REST = 5.0  # and so many times as long as the one before it took
SCAN_CALLS_MAX = 10_000
STRONG = (b"STEADY.READ", b"STRONG")


@dataclass(frozen=True, slots=True)
class LifeOptions:
    snapshots: int = 3  # open at once
    life_seconds: tuple[float, float] = (3.0, 7.0)
    readers: int = 3  # of each snapshot
    read_rate: float = 150.0  # per second, of each reader
    dumped_share: float = 0.35  # of the snapshots, those opened while nobody writes, after a dump
    seed: int = 0


class Lives:
    """All snapshots of one act."""

    def __init__(self, doors: Doors, load: Load, tally: Tally, options: LifeOptions) -> None:
        self.views: list[View] = []  # open ones
        self.unanswered: list[View] = []  # OPEN was sent, and no answer came
        self._answered: set[int] = (
            set()
        )  # snapshots whose OPEN was answered, also if their CLOSE then was not
        self._doors = doors
        self._load = load
        self._tally = tally
        self._options = options
        self._ending = trio.Event()
        self._salt = random.Random(f"{options.seed}/lives").random  # of each reader's own choices

    # --- by themselves, one after the other ---

    async def keep(self, number: int) -> None:
        """Open, read and close snapshots until `end`; the last one is closed."""
        rng = random.Random(f"{self._options.seed}/keeper {number}")
        first = True
        with trio.move_on_after(number * STAGGER_SECONDS):  # so that there are writes between two openings
            await self._ending.wait()
        while first or not self._ending.is_set():
            # The first keeper's first one has a dump, so that every run has some.
            is_dumped = rng.random() < self._options.dumped_share or (first and number == 0)
            view = await (self.open_dumped(rng) if is_dumped else self.open(rng))
            if view is None:
                with trio.move_on_after(RETRY_SECONDS):
                    await self._ending.wait()
                if self._ending.is_set():
                    return
                continue
            first = False
            await self.live(view, rng, rng.uniform(*self._options.life_seconds))
            await self.close(view, rng)

    async def glimpse(self) -> None:
        """Beside those that are kept: snapshots of which little is read, so that many cuts are made. Until `end`."""
        rng = random.Random(f"{self._options.seed}/glimpses")
        while not self._ending.is_set():
            with trio.move_on_after(rng.uniform(*GLIMPSE_SECONDS)):
                await self._ending.wait()
            view = await self.open(rng)
            if view is not None:
                for _ in range(2):
                    reads = [*view.reads_together, *rng.choices(view.reads, k=PASS_BATCH)]
                    await self._read_once(view, reads, rng.randrange(self._doors.count))
                await self.close(view, rng)

    def end(self) -> None:
        self._ending.set()

    async def live(self, view: View, rng: random.Random, seconds: float) -> None:
        """Everything once, at random from every door meanwhile and then, and everything once more at each door."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.read_on, view)
            nursery.start_soon(self._list, view, self._salt())
            await self.read_all(view, rng.randrange(self._doors.count))
            await trio.sleep(LEAST_SECONDS)
            with trio.move_on_after(seconds - LEAST_SECONDS):
                await self._ending.wait()
            nursery.cancel_scope.cancel()
        for door in range(self._doors.count):
            await self.read_all(view, door)

    # --- one by one ---

    async def open(
        self,
        rng: random.Random,
        *,
        door: int | None = None,
        dump: Mapping[bytes, list[Reply]] | None = None,
    ) -> View | None:
        """None after counting why there is none. ``door`` None: at any."""
        door = rng.randrange(self._doors.count) if door is None else door
        expectations = [subject.expect() for subject in self._load.subjects]
        view = View(expectations, dump=dump, is_bounded=not self._load.may_have_lost)
        sent_at = trio.current_time()
        try:
            with trio.fail_after(OPEN_SECONDS):
                async with self._load.storm():
                    snapshot_id = await self._doors.open(door)
        except Refused as refusal:
            self._tally.refuse(self._tally.opens_refused, "OPEN", str(refusal))
            return None
        except (Lost, trio.TooSlowError):
            self._tally.opens_lost += 1
            self.unanswered.append(view)
            return None
        view.on_opened(snapshot_id)
        self._answered.add(snapshot_id)
        self._tally.opened += 1
        self._tally.open_seconds.append(trio.current_time() - sent_at)
        self.views.append(view)
        return view

    async def open_dumped(self, rng: random.Random) -> View | None:
        """With a dump of everything, by strong reads; nobody writes meanwhile."""
        async with self._load.hold.held():
            dump = await self._dump([subject.expect() for subject in self._load.subjects])
            return await self.open(rng, dump=dump)

    async def close(self, view: View, rng: random.Random, *, door: int | None = None) -> None:
        """And see that it is read no more. A snapshot that cannot be closed now is left open."""
        self.views.remove(view)
        if view.has_ended:
            self._tally.ended += 1
        door = rng.randrange(self._doors.count) if door is None else door
        try:
            with trio.fail_after(OPEN_SECONDS):
                await self._doors.close(door, view.id)
                if self._doors.has_snapshots:
                    await self._ask_closed(view, door)
        except (Refused, Lost, trio.TooSlowError):
            return

    async def _ask_closed(self, view: View, door: int) -> None:
        try:
            client = await self._doors.reader(door, view.id)
        except Refused:
            return
        try:
            answer = await client.ask(view.reads[0].payload, view.reads[0].reply_count)
        finally:
            client.close_nowait()
        if not isinstance(answer.replies[0], ErrorReply):
            self._tally.fault(Fault.WEAKER, f"snapshot {view.id} is closed, and answered {answer.raw[:80]!r}")

    async def read_all(self, view: View, door: int) -> bool:
        """Each read once. False if it could not be done, or the snapshot has ended."""
        return await self._read_once(view, view.reads, door)

    async def _read_once(self, view: View, reads: Sequence[Read], door: int) -> bool:
        client = await self._reader(view, door, resp3=False)
        if client is None:
            return False
        try:
            for start in range(0, len(reads), PASS_BATCH):
                if view.has_ended:
                    return False
                await self._ask(client, view, reads[start : start + PASS_BATCH], resp3=False)
        except (Lost, trio.TooSlowError):
            return False
        finally:
            client.close_nowait()
        return not view.has_ended

    async def read_on(self, view: View) -> None:
        """At random from every door, until cancelled or the snapshot has ended."""
        async with trio.open_nursery() as nursery:
            for number in range(self._options.readers):
                nursery.start_soon(self._read_on, view, number, self._salt())

    async def adopt(self, door: int) -> None:
        """A snapshot whose OPEN got no answer may be open all the same; whatever it shows must fit.

        Raises Lost and Refused when this door cannot be asked.
        """
        unanswered, self.unanswered = self.unanswered, []
        if not isinstance(self._doors, Snapshots) or len(unanswered) != 1:
            return
        for snapshot_id in await self._doors.open_ids(door):
            if snapshot_id not in self._answered:
                self._answered.add(snapshot_id)
                [view] = unanswered
                view.on_opened(snapshot_id)
                self.views.append(view)
                return

    # --- readers ---

    async def _read_on(self, view: View, number: int, salt: float) -> None:
        """At random, until cancelled or the snapshot has ended."""
        options = self._options
        rng = random.Random(f"{options.seed}/reader {salt}")
        door, resp3 = number % self._doors.count, number % 3 == 2
        client: Client | None = None
        try:
            while not view.has_ended:
                if client is None:
                    client = await self._reader(view, door, resp3=resp3)
                    if client is None:
                        await trio.sleep(RETRY_SECONDS)
                        continue
                try:
                    if rng.random() < TOGETHER_SHARE:
                        reads = [rng.choice(view.reads_together)]
                        await self._ask_slowly(client, view, reads[0], rng, resp3=resp3)
                    else:
                        reads = rng.choices(view.reads, k=rng.choice(BATCHES))
                        await self._ask(client, view, reads, resp3=resp3)
                except (Lost, trio.TooSlowError):
                    client.close_nowait()
                    client = None
                await trio.sleep(rng.uniform(0.5, 1.5) * len(reads) / options.read_rate)
        finally:
            if client is not None:
                client.close_nowait()

    async def _reader(self, view: View, door: int, *, resp3: bool) -> Client | None:
        """None if it is not to be had now, which a refusal may make final."""
        try:
            with trio.fail_after(DEADLINE_SECONDS):
                return await self._doors.reader(door, view.id, resp3=resp3)
        except Refused as refusal:
            self._tally.refuse(self._tally.reads_refused, "STEADY.READ", str(refusal))
            view.has_ended = view.has_ended or refusal.code == ENDED
        except (Lost, trio.TooSlowError):
            self._tally.reads_lost += 1
        return None

    async def _ask(self, client: Client, view: View, reads: Sequence[Read], *, resp3: bool) -> None:
        """Raises Lost and trio.TooSlowError."""
        try:
            with trio.fail_after(DEADLINE_SECONDS):
                answers = await client.ask_all([(read.payload, read.reply_count) for read in reads])
        except (Lost, trio.TooSlowError):
            self._tally.reads_lost += len(reads)
            raise
        for read, answer in zip(reads, answers, strict=True):
            view.take(read, answer.raw, answer.replies, self._tally, resp3=resp3)

    async def _ask_slowly(
        self, client: Client, view: View, read: Read, rng: random.Random, *, resp3: bool
    ) -> None:
        """Step by step, so that a torn one would show. Raises Lost and trio.TooSlowError."""
        if not read.steps:
            await self._ask(client, view, [read], resp3=resp3)
            return
        try:
            with trio.fail_after(DEADLINE_SECONDS):
                answer = await client.ask_each(read.steps, lambda: rng.uniform(0, STEP_SECONDS_MAX))
        except (Lost, trio.TooSlowError):
            self._tally.reads_lost += 1
            raise
        view.take(read, answer.raw, answer.replies, self._tally, resp3=resp3)

    async def _list(self, view: View, salt: float) -> None:
        """SCAN and KEYS at each door by turns, until cancelled."""
        rng = random.Random(f"{self._options.seed}/lister {salt}")
        turn = rng.randrange(4)
        took = 0.0
        while not view.has_ended:
            # Its share of the proxy's time stays small, however long one takes.
            await trio.sleep(rng.uniform(*LIST_SECONDS) + took * LIST_REST)
            began = trio.current_time()
            client = await self._reader(view, turn // 2 % self._doors.count, resp3=False)
            turn += 1
            if client is None:
                continue
            try:
                with trio.fail_after(DEADLINE_SECONDS):
                    what = "SCAN" if turn % 2 else "KEYS"
                    names = await (_scanned(client) if turn % 2 else _keys(client))
                view.take_listing(what, names, self._tally)
            except Refused as refusal:
                if refusal.code not in ("SNAPSHOTTOOOLD", "NOTREADY"):
                    self._tally.fault(Fault.ERROR, f"{what} of snapshot {view.id}: {refusal}")
                else:
                    self._tally.refuse(self._tally.reads_refused, what, str(refusal))
            except (Lost, trio.TooSlowError):
                self._tally.reads_lost += 1
            finally:
                client.close_nowait()
                took = trio.current_time() - began

    async def _dump(self, expectations: Sequence[Expectation]) -> dict[bytes, list[Reply]]:
        """Payload -> replies now, in canonical order. Empty if it could not be made."""
        for expectation in expectations:
            expectation.on_opened()
        reads = [read for expectation in expectations for read in expectation.reads() if read.is_dumpable]
        dump: dict[bytes, list[Reply]] = {}
        try:
            client = await self._doors.writer(0)
        except Lost:
            return {}
        try:
            with trio.fail_after(DEADLINE_SECONDS):
                await client.call(*STRONG)
                for start in range(0, len(reads), PASS_BATCH):
                    batch = reads[start : start + PASS_BATCH]
                    answers = await client.ask_all([(read.payload, read.reply_count) for read in batch])
                    for read, answer in zip(batch, answers, strict=True):
                        dump[read.payload] = canonical(read.label, answer.replies)
        except (Lost, Refused, trio.TooSlowError):
            return {}
        finally:
            client.close_nowait()
        return dump


async def _scanned(client: Client) -> list[bytes]:
    """Raises Refused and Lost."""
    names: list[bytes] = []
    cursor: Reply = b"0"
    for _ in range(SCAN_CALLS_MAX):
        assert isinstance(cursor, bytes)
        reply = await client.call(b"SCAN", cursor, b"COUNT", SCAN_COUNT)
        assert isinstance(reply, list)
        cursor, found = reply
        assert isinstance(found, list)
        names += [name for name in found if isinstance(name, bytes)]
        if cursor == b"0":
            return names
    raise Refused(f"ERR no end after {SCAN_CALLS_MAX} calls")


async def _keys(client: Client) -> list[bytes]:
    """Raises Refused and Lost."""
    reply = await client.call(b"KEYS", b"*")
    assert isinstance(reply, list)
    return [name for name in reply if isinstance(name, bytes)]
