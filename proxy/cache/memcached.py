"""Replies to GET at snapshots, kept in a memcached that several proxies share. pymemcache asks it, in worker threads.

Questions of one turn go as one ``get_many``. What is to be kept is collected and goes as one ``set_many``, on a
connection of its own. Nobody waits for a thread longer than the deadline: one that is stuck is left behind, and the
next does not begin before it has ended.

Why an entry may be used as a proof
- It is found by a hash of all that makes it what it is: the snapshot, the RESP version, the format, and the key.
- A snapshot is named by more than its number, which a store that was lost may give again: by when and by which process
  it was opened, by the cluster's epoch, and by its replication ids, which are random and so name the cluster.
- All of that stands in the entry too, under a checksum, and is compared. What differs, or has another format, is a
  miss.
- Only a reply that a proxy used as right at that very snapshot is put in, and that does not change while it serves.
- Only replies that never expire are put in: of keys without a TTL, and nil. memcached's clock stands still while it is
  stopped, and clocks of machines differ, so no reply hangs on one. When memcached may forget an entry is about room.
- Whoever uses it sees, in that step, that the snapshot serves. When it ends, nobody asks for its entries any more.

Whoever can write to the memcached can make it lie: it belongs where the nodes are.

A failure opens the way round it (``is_bypassed``): all who wait are told at once that there is nothing, nobody asks any
more, and a probe goes there after pauses that grow up to PAUSE_SECONDS_MAX, until one succeeds. It begins so: a
memcached that is not there hinders no start.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from hashlib import blake2b
from math import ceil
from typing import Any, Generic, TypeVar

import trio
from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError, MemcacheServerError, MemcacheUnexpectedCloseError

from proxy.log import get_logger
from proxy.metrics import Family, MetricType, Sample
from proxy.settings import CacheSettings
from routing.snapshot import SnapshotRecord
from routing.topology import Address

FORMAT = b"SR\x01"  # of an entry: what it begins with
DIGEST_BYTES = 16
IDENTITY_BYTES = 16
HEAD_BYTES = len(FORMAT) + DIGEST_BYTES

QUESTIONS_MAX = 4096  # that wait; more go to the nodes
BATCH_MAX = 128  # of them in one get_many: some milliseconds of work
UNKEPT_BYTES_MAX = 8 * 1024 * 1024  # that wait to be kept; more are not
BATCH_BYTES = 256 * 1024  # of them in one set_many
ENTRY_BYTES_MAX = 1024 * 1024 - 1024  # memcached's own limit, unless it is told otherwise, and what it adds
ENTRY_SECONDS_MAX = 86_400  # after which memcached may forget it
PAUSE_SECONDS = 0.05
PAUSE_SECONDS_MAX = 1.0
KEEPING_SECONDS = 1.0  # the deadline of a set_many, for which nobody waits
CONNECT_SECONDS = 1.0  # of a probe that may have to find a name and connect
PROBE = "steadyread:probe"

T = TypeVar("T")
log = get_logger(__name__)


class Reason(Enum):
    """Why memcached did not serve."""

    TIMEOUT = "timeout"
    CONNECTION = "connection"  # refused, reset, closed, a name that is not found
    REFUSED = "refused"  # SERVER_ERROR, as of one that is full
    PROTOCOL = "protocol"  # not what a memcached says
    QUEUE_FULL = "queue_full"
    WRONG_VERSION = "wrong_version"  # an entry of another format
    DAMAGED = "damaged"  # an entry that does not fit its checksum
    MISMATCH = "mismatch"  # an entry of something else


class Failure(Exception):
    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


# -- entries


def identity_of(record: SnapshotRecord) -> bytes:
    """What no other snapshot has, of this cluster or another one, whatever became of their stores.

    It changes when a history is added after a failover. Then entries are found no more, and are made anew.
    """
    facts = (record.id, record.opened_at, record.owner, record.epoch, sorted(record.floors))
    return blake2b(repr(facts).encode(), digest_size=IDENTITY_BYTES).digest()


def subject_of(identity: bytes, resp: int, key: bytes) -> bytes:
    """What an entry is about."""
    return b"%b%d%b" % (identity, resp, key)


def name_of(subject: bytes) -> str:
    """Under which it is kept: memcached takes no long keys, and no spaces in them."""
    return f"steadyread:{blake2b(FORMAT + subject, digest_size=24).hexdigest()}"


def entry_of(subject: bytes, reply: bytes) -> bytes:
    body = b"%b%b%b" % (len(subject).to_bytes(4, "big"), subject, reply)
    return FORMAT + blake2b(FORMAT + body, digest_size=DIGEST_BYTES).digest() + body


def reply_of(entry: object, subject: bytes) -> bytes | Reason:
    """The reply in an entry; or why it is none for this subject."""
    if not isinstance(entry, bytes) or entry[: len(FORMAT)] != FORMAT:
        return Reason.WRONG_VERSION
    body = entry[HEAD_BYTES:]
    if blake2b(FORMAT + body, digest_size=DIGEST_BYTES).digest() != entry[len(FORMAT) : HEAD_BYTES]:
        return Reason.DAMAGED
    length = int.from_bytes(body[:4], "big")
    if body[4 : 4 + length] != subject:
        return Reason.MISMATCH
    return body[4 + length :]


class Question:
    """For one entry."""

    __slots__ = ("asked_at", "found", "name", "subject")

    def __init__(self, subject: bytes) -> None:
        self.subject = subject
        self.name = name_of(subject)
        self.asked_at = 0.0  # Trio's clock
        self.found: bytes | None = None  # the reply


class Unkept:
    """An entry that is to be kept."""

    __slots__ = ("ends_at", "entry", "name")

    def __init__(self, name: str, entry: bytes, ends_at: float | None) -> None:
        self.name = name
        self.entry = entry
        self.ends_at = ends_at  # of its snapshot, in Unix seconds


# -- the connection


class Line:
    """A connection that worker threads use, one at a time."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._turn = trio.CapacityLimiter(1)  # which a thread that was left behind keeps until it ends
        self._is_stale = False  # an operation was left behind: what comes on the connection is of that

    async def do(self, operation: Callable[[Any], T], deadline: float) -> T:
        """What ``operation`` returns. Raises Failure, at the deadline (Trio's clock) at the latest."""
        outcome: list[T | Exception] = []

        def work() -> None:
            try:
                if self._is_stale:
                    self._is_stale = False
                    self._client.close()
                outcome.append(operation(self._client))
            except Exception as error:  # whatever a server that is none makes of the client
                outcome.append(error)

        with trio.move_on_at(deadline):
            await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._turn)
        if not outcome:  # one that came as late as the look at the clock counts
            self._is_stale = True
            self._shut()
            raise Failure(Reason.TIMEOUT, "it did not answer in time")
        match outcome[0]:
            case OSError() | MemcacheUnexpectedCloseError() as error:
                is_late = isinstance(error, TimeoutError)
                raise Failure(Reason.TIMEOUT if is_late else Reason.CONNECTION, _words(error)) from error
            case MemcacheServerError() as error:
                raise Failure(Reason.REFUSED, _words(error)) from error
            case Failure() as failure:
                raise failure
            case Exception() as error:
                text = _words(error) if isinstance(error, MemcacheError) else repr(error)
                raise Failure(Reason.PROTOCOL, text) from error
            case result:
                return result

    def _shut(self) -> None:
        """End what a thread waits for."""
        sock = self._client.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._shut()
        if not self._turn.borrowed_tokens:
            self._client.close()


class Side(Generic[T]):
    """One of two: what is asked, or what is to be kept. The way round it, and back.

    ``is_bypassed`` is true from a failure until a probe succeeds.
    """

    def __init__(self, name: str, line: Line, memcached: Memcached, probe: Callable[[Any], object]) -> None:
        self.name = name
        self.line = line
        self.is_bypassed = True
        self.waiting: deque[T] = deque()
        self.has_waiting = trio.Event()
        self._memcached = memcached
        self._probe = probe
        self._is_told: str | None = None  # what the log said last of it

    def add(self, item: T) -> None:
        self.waiting.append(item)
        self.has_waiting.set()

    async def wait_waiting(self) -> None:
        if not self.waiting:
            self.has_waiting = trio.Event()
            await self.has_waiting.wait()

    def fail(self, failure: Failure) -> None:
        self.is_bypassed = True
        self._memcached.failures[failure.reason] += 1
        if self._is_told != "bypassed":
            self._is_told = "bypassed"
            log.warning(
                "memcached_bypassed",
                address=str(self._memcached.address),
                side=self.name,
                reason=failure.reason.value,
                error=str(failure),
            )

    async def wait_found(self) -> None:
        """Until a probe has succeeded."""
        pause = 0.0
        while self.is_bypassed:
            await trio.sleep(pause)
            pause = min(max(PAUSE_SECONDS, 2 * pause), PAUSE_SECONDS_MAX)
            try:
                await self.line.do(self._probe, trio.current_time() + CONNECT_SECONDS)
                await self.line.do(self._probe, trio.current_time() + self._memcached.timeout_seconds)
            except Failure as failure:
                self.fail(failure)
            else:
                self.is_bypassed = False
                if self._is_told != "found":
                    self._is_told = "found"
                    log.info("memcached_found", address=str(self._memcached.address), side=self.name)


# -- the cache


class Memcached:
    """One per proxy. ``deliver`` gets each question that was asked, within its deadline, in batches."""

    def __init__(
        self,
        address: Address,
        settings: CacheSettings,
        new_client: Callable[[Address, float], Any] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.address = address
        self.timeout_seconds = settings.memcached_timeout_ms / 1000
        self.deliver: Callable[[Sequence[Question]], None] = lambda questions: None
        self._value_bytes_max = min(settings.value_bytes_max, ENTRY_BYTES_MAX)
        self._now = now
        new_client = new_client or client_of
        self._reads: Side[Question] = Side(
            "reads", Line(new_client(address, self.timeout_seconds)), self, _ask_probe
        )
        self._writes: Side[Unkept] = Side(
            "writes", Line(new_client(address, KEEPING_SECONDS)), self, _keep_probe
        )
        self._unkept_bytes = 0
        self.hits_total = 0
        self.misses_total = 0
        self.fills_total = 0
        self.failures = dict.fromkeys(Reason, 0)

    @property
    def is_bypassed(self) -> bool:
        return self._reads.is_bypassed

    def ask(self, question: Question) -> bool:
        """Have it answered by ``deliver``, later; False: it is not asked."""
        if self._reads.is_bypassed:
            return False
        if len(self._reads.waiting) >= QUESTIONS_MAX:
            self.failures[Reason.QUEUE_FULL] += 1
            return False
        question.asked_at = trio.current_time()
        self._reads.add(question)
        return True

    def keep(self, question: Question, reply: bytes, ends_at: float | None) -> None:
        """Keep what a question asks for, which never expires. ``ends_at``: its snapshot does, in Unix seconds."""
        length = len(question.subject) + len(reply)
        if self._writes.is_bypassed or length > self._value_bytes_max:
            return
        if self._unkept_bytes + length > UNKEPT_BYTES_MAX:
            self.failures[Reason.QUEUE_FULL] += 1
            return
        entry = entry_of(question.subject, reply)
        self._unkept_bytes += len(entry)
        self._writes.add(Unkept(question.name, entry, ends_at))

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_reads)
                nursery.start_soon(self._run_writes)
        finally:
            for side in (self._reads, self._writes):
                side.line.close()

    async def _run_reads(self) -> None:
        reads = self._reads
        while True:
            await reads.wait_found()
            await reads.wait_waiting()
            batch = [reads.waiting.popleft() for _ in range(min(BATCH_MAX, len(reads.waiting)))]
            names = [question.name for question in batch]
            deadline = batch[0].asked_at + self.timeout_seconds
            if trio.current_time() >= deadline:  # this process was slow, and not memcached
                self.failures[Reason.TIMEOUT] += 1
                self.deliver(batch)
                continue
            try:
                found = await reads.line.do(_getting(names), deadline)
            except Failure as failure:
                reads.fail(failure)
                batch += reads.waiting
                reads.waiting.clear()
            else:
                self._take(batch, found)
            self.deliver(batch)

    def _take(self, batch: Sequence[Question], found: dict[str, object]) -> None:
        for question in batch:
            entry = found.get(question.name)
            if entry is None:
                self.misses_total += 1
                continue
            reply = reply_of(entry, question.subject)
            if isinstance(reply, Reason):
                self.failures[reply] += 1
                self.misses_total += 1
            else:
                self.hits_total += 1
                question.found = reply

    async def _run_writes(self) -> None:
        writes = self._writes
        while True:
            await writes.wait_found()
            await writes.wait_waiting()
            batches: dict[float | None, dict[str, bytes]] = {}
            size = 0
            while writes.waiting and size < BATCH_BYTES:
                unkept = writes.waiting.popleft()
                size += len(unkept.entry)
                batches.setdefault(unkept.ends_at, {})[unkept.name] = unkept.entry
            self._unkept_bytes -= size
            try:
                for ends_at, entries in batches.items():
                    keeping = _keeping(entries, self._seconds_until(ends_at))
                    await writes.line.do(keeping, trio.current_time() + KEEPING_SECONDS)
                    self.fills_total += len(entries)
            except Failure as failure:
                writes.fail(failure)
                writes.waiting.clear()
                self._unkept_bytes = 0

    def _seconds_until(self, ends_at: float | None) -> int:
        if ends_at is None:
            return ENTRY_SECONDS_MAX
        return max(1, min(ENTRY_SECONDS_MAX, ceil(ends_at - self._now())))

    def samples(self) -> Iterator[Sample]:
        yield Sample(HITS, self.hits_total)
        yield Sample(MISSES, self.misses_total)
        yield Sample(FILLS, self.fills_total)
        yield Sample(BYPASSED, self.is_bypassed)
        for reason, count in self.failures.items():
            yield Sample(FAILURES, count, (reason.value,))


# -- what the threads do


def client_of(address: Address, timeout_seconds: float) -> Any:
    """pymemcache's; nothing is connected yet."""
    return Client(
        (address.host, address.port),
        connect_timeout=CONNECT_SECONDS,  # only probes connect
        timeout=timeout_seconds,
        no_delay=True,
        default_noreply=False,
    )


def _getting(names: list[str]) -> Callable[[Any], dict[str, object]]:
    def get(client: Any) -> dict[str, object]:
        found: dict[str, object] = client.get_many(names)
        return found

    return get


def _keeping(entries: dict[str, bytes], seconds: int) -> Callable[[Any], None]:
    def keep(client: Any) -> None:
        if client.set_many(entries, expire=seconds):
            raise Failure(Reason.REFUSED, "it did not store an entry")

    return keep


def _ask_probe(client: Any) -> None:
    client.get_many([PROBE])


_keep_probe = _keeping({PROBE: b"probe"}, 1)


def _words(error: Exception) -> str:
    """pymemcache gives bytes as they came."""
    return repr(error)[:200]


def _family(name: str, help_: str, kind: MetricType, *labels: str) -> Family:
    return Family(f"steadyread_snapshot_cache_l2_{name}", help_, kind, labels)


HITS = _family("hits_total", "Entries that memcached had.", MetricType.COUNTER)
MISSES = _family("misses_total", "Entries that memcached did not have, or not rightly.", MetricType.COUNTER)
FILLS = _family("fills_total", "Entries that memcached was given.", MetricType.COUNTER)
FAILURES = _family("failures_total", "What memcached did not do, by reason.", MetricType.COUNTER, "reason")
BYPASSED = _family("is_bypassed", "1 while memcached is not asked.", MetricType.GAUGE)
