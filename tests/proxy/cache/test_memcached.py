"""The memcached: what is asked together, what an entry proves, and the way round one that does not serve."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import trio
from pymemcache.exceptions import MemcacheServerError

from proxy.cache import memcached as module
from proxy.cache.memcached import (
    ENTRY_SECONDS_MAX,
    FORMAT,
    PROBE,
    QUESTIONS_MAX,
    Memcached,
    Question,
    Reason,
    entry_of,
    identity_of,
    name_of,
    reply_of,
    subject_of,
)
from proxy.settings import CacheSettings
from routing.snapshot import Floor, SnapshotRecord, SnapshotState
from routing.topology import Address

ADDRESS = Address("127.0.0.1", 11211)
RECORD = SnapshotRecord(
    7, SnapshotState.SERVING, 1000.25, owner="host-1-abcd", epoch=3, floors={"f" * 40: Floor("f" * 40, 5)}
)
SUBJECT = subject_of(identity_of(RECORD), 2, b"key")
TIMEOUT_MS = 500.0  # so much that a slow machine does not matter where nothing is to time out


class Server:
    """What the clients of one memcached share. ``gate``: operations wait until it is set."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.expires: dict[str, int] = {}
        self.gets: list[list[str]] = []
        self.sets: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.refuses = False

    def client(self, address: Address, timeout_seconds: float) -> Client:
        return Client(self)

    def pass_gate(self) -> None:
        self.gate.wait()
        if self.error is not None:
            raise self.error


class Client:
    """As pymemcache's."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.sock = None

    def get_many(self, names: Sequence[str]) -> dict[str, bytes]:
        if PROBE not in names:
            self._server.gets.append(list(names))
        self._server.pass_gate()
        return {name: self._server.entries[name] for name in names if name in self._server.entries}

    def set_many(self, entries: dict[str, bytes], expire: int) -> list[str]:
        self._server.pass_gate()
        if self._server.refuses:
            raise MemcacheServerError(b"out of memory storing object")
        if PROBE not in entries:
            self._server.sets.append(list(entries))
            self._server.entries |= entries
            self._server.expires |= dict.fromkeys(entries, expire)
        return []

    def close(self) -> None:
        pass


class Asker:
    """Gets the answers."""

    def __init__(self, memcached: Memcached) -> None:
        self.memcached = memcached
        self.answered: list[Question] = []
        self._more = trio.Event()
        memcached.deliver = self._take

    def _take(self, questions: Sequence[Question]) -> None:
        self.answered += questions
        self._more.set()

    async def ask(self, *subjects: bytes) -> list[bytes | None]:
        """In one step."""
        questions = [Question(subject) for subject in subjects]
        assert all(self.memcached.ask(question) for question in questions)
        await self.wait_answered(questions)
        return [question.found for question in questions]

    async def wait_answered(self, questions: Sequence[Question]) -> None:
        with trio.fail_after(5):
            while not set(questions) <= set(self.answered):
                self._more = trio.Event()
                await self._more.wait()


async def until(is_so: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not is_so():
            await trio.sleep(0.001)


@asynccontextmanager
async def served(
    server: Server, timeout_ms: float = TIMEOUT_MS, value_bytes_max: int = 1000
) -> AsyncIterator[Asker]:
    """A memcached that has been found on both sides."""
    settings = CacheSettings(0, value_bytes_max, str(ADDRESS), timeout_ms)
    memcached = Memcached(ADDRESS, settings, server.client, now=lambda: 2000.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memcached.run)
        await until(lambda: not memcached.is_bypassed and not memcached._writes.is_bypassed)
        try:
            yield Asker(memcached)
        finally:
            server.gate.set()
            nursery.cancel_scope.cancel()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.gate.set()


def put(server: Server, subject: bytes, reply: bytes) -> None:
    server.entries[name_of(subject)] = entry_of(subject, reply)


def subjects(count: int) -> list[bytes]:
    return [subject_of(identity_of(RECORD), 2, b"key:%d" % number) for number in range(count)]


async def wait_kept(asker: Asker, count: int) -> None:
    await until(lambda: asker.memcached.fills_total == count)


# -- what an entry proves


@pytest.mark.parametrize(
    "other",
    [
        replace(RECORD, opened_at=1000.5),
        replace(RECORD, owner="host-1-abce"),
        replace(RECORD, id=8),
        replace(RECORD, epoch=4),
        replace(RECORD, floors={"e" * 40: Floor("e" * 40, 5)}),
    ],
)
async def test_a_snapshot_of_the_same_number_is_another_one(server: Server, other: SnapshotRecord) -> None:
    """As after a store was lost, or of another cluster."""
    put(server, subject_of(identity_of(other), 2, b"key"), b"stale")
    async with served(server) as asker:
        assert await asker.ask(SUBJECT) == [None]
        put(server, SUBJECT, b"right")
        assert await asker.ask(SUBJECT) == [b"right"]


async def test_what_does_not_make_a_snapshot_another_one_changes_nothing() -> None:
    """A record is read by each proxy for itself, and moves on."""
    same = replace(RECORD, state=SnapshotState.CLOSING, floors={"f" * 40: Floor("f" * 40, 9)}, reason="x")
    assert identity_of(same) == identity_of(RECORD)


@pytest.mark.parametrize(
    ("resp", "key"), [(3, b"key"), (2, b"key2"), (2, b"ke"), (2, b"\x00 \r\n"), (2, b"k" * 1000)]
)
def test_each_key_and_resp_version_has_a_name_of_its_own(resp: int, key: bytes) -> None:
    subject = subject_of(identity_of(RECORD), resp, key)
    assert name_of(subject) != name_of(SUBJECT)
    assert len(name_of(subject)) <= 250
    assert name_of(subject).isprintable()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (b"", Reason.WRONG_VERSION),
        (b"SR\x02" + entry_of(SUBJECT, b"stale")[3:], Reason.WRONG_VERSION),
        (FORMAT, Reason.DAMAGED),
        (entry_of(SUBJECT, b"stale")[:-1], Reason.DAMAGED),
        (entry_of(SUBJECT, b"stale") + b"x", Reason.DAMAGED),
        (entry_of(SUBJECT, b"stale").replace(b"stale", b"stalk"), Reason.DAMAGED),
        (entry_of(SUBJECT + b"2", b"stale"), Reason.MISMATCH),
        (
            entry_of(subject_of(identity_of(replace(RECORD, opened_at=1.0)), 2, b"key"), b"stale"),
            Reason.MISMATCH,
        ),
    ],
)
async def test_an_entry_that_does_not_fit_is_a_miss(server: Server, entry: bytes, reason: Reason) -> None:
    """Whatever stands under the right name."""
    server.entries[name_of(SUBJECT)] = entry
    async with served(server) as asker:
        assert await asker.ask(SUBJECT) == [None]
        memcached = asker.memcached
        assert memcached.failures == {each: each is reason for each in Reason}
        assert (memcached.hits_total, memcached.misses_total) == (0, 1)
        assert not memcached.is_bypassed


@pytest.mark.parametrize("reply", [b"", b"$-1\r\n", b"$3\r\n\r\n\x00\r\n"])
def test_an_entry_gives_back_what_was_kept(reply: bytes) -> None:
    assert reply_of(entry_of(SUBJECT, reply), SUBJECT) == reply


# -- together


async def test_what_is_asked_in_one_step_goes_as_one_and_what_comes_meanwhile_as_the_next(
    server: Server,
) -> None:
    async with served(server) as asker:
        wanted = subjects(5)
        put(server, wanted[1], b"1")
        server.gate.clear()
        questions = [Question(subject) for subject in wanted]
        for question in questions[:3]:
            assert asker.memcached.ask(question)
        await until(lambda: len(server.gets) == 1)
        for question in questions[3:]:
            assert asker.memcached.ask(question)
        server.gate.set()
        await asker.wait_answered(questions)
        assert server.gets == [[name_of(each) for each in wanted[:3]], [name_of(each) for each in wanted[3:]]]
        assert [question.found for question in questions] == [None, b"1", None, None, None]


async def test_what_is_to_be_kept_is_collected_and_no_longer_kept_than_its_snapshot(server: Server) -> None:
    async with served(server) as asker:
        a, b, c, d = subjects(4)
        for subject, ends_at in ((a, None), (b, None), (c, 2060.5), (d, 1999.0)):
            asker.memcached.keep(Question(subject), b"v", ends_at)
        await wait_kept(asker, 4)
        assert server.sets == [[name_of(a), name_of(b)], [name_of(c)], [name_of(d)]]
        assert [server.expires[name_of(each)] for each in (a, b, c, d)] == [*[ENTRY_SECONDS_MAX] * 2, 61, 1]
        assert await asker.ask(a, b) == [b"v", b"v"]


async def test_too_large_a_value_is_not_kept(server: Server) -> None:
    async with served(server, value_bytes_max=100) as asker:
        asker.memcached.keep(Question(SUBJECT), b"x" * (101 - len(SUBJECT)), None)
        asker.memcached.keep(Question(SUBJECT), b"x" * (100 - len(SUBJECT)), None)
        await wait_kept(asker, 1)
        assert server.sets == [[name_of(SUBJECT)]]


async def test_both_queues_have_bounds(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 7."""
    monkeypatch.setattr(module, "UNKEPT_BYTES_MAX", 10_000)
    async with served(server) as asker:
        memcached = asker.memcached
        assert [memcached.ask(Question(SUBJECT)) for _ in range(QUESTIONS_MAX + 2)].count(False) == 2
        for number in range(100):
            memcached.keep(Question(SUBJECT + b"%d" % number), b"x" * 500, None)
        assert len(memcached._writes.waiting) < 20
        assert memcached.failures[Reason.QUEUE_FULL] == 2 + 100 - len(memcached._writes.waiting)
        await until(lambda: not memcached._writes.waiting and not memcached._reads.waiting)
        assert memcached._unkept_bytes == 0


# -- the way round it


async def test_a_memcached_that_stands_still_is_left_within_the_deadline_and_found_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Its thread is stuck for as long as it stands still; nobody waits for that."""
    async with served(server, timeout_ms=50) as asker:
        memcached = asker.memcached
        put(server, SUBJECT, b"v")
        server.gate.clear()
        questions = [Question(subject) for subject in (SUBJECT, *subjects(3))]
        began = trio.current_time()
        assert memcached.ask(questions[0])
        await until(lambda: len(server.gets) == 1)
        assert all(memcached.ask(question) for question in questions[1:])  # they wait behind it
        await asker.wait_answered(questions)
        assert trio.current_time() - began < 0.05 + 0.2
        assert [question.found for question in questions] == [None] * 4
        assert memcached.is_bypassed
        assert not memcached.ask(Question(SUBJECT))
        await until(lambda: memcached.failures[Reason.TIMEOUT] >= 3)  # probes
        server.gate.set()
        await until(lambda: not memcached.is_bypassed)
        assert await asker.ask(SUBJECT) == [b"v"]
    assert [record.message for record in caplog.records].count("memcached_bypassed") == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError("refused"), Reason.CONNECTION),
        (TimeoutError("timed out"), Reason.TIMEOUT),
        (MemcacheServerError(b"busy"), Reason.REFUSED),
        (ValueError("Unable to parse line"), Reason.PROTOCOL),
        (KeyError(b"another key"), Reason.PROTOCOL),
    ],
)
async def test_each_failure_is_counted_by_its_reason_and_answered_at_once(
    server: Server, error: Exception, reason: Reason
) -> None:
    async with served(server, timeout_ms=1000) as asker:
        memcached = asker.memcached
        put(server, SUBJECT, b"v")
        server.error = error
        began = trio.current_time()
        assert await asker.ask(SUBJECT) == [None]
        assert trio.current_time() - began < 0.5
        assert memcached.is_bypassed
        assert memcached.failures[reason] >= 1
        assert sum(memcached.failures.values()) == memcached.failures[reason]
        server.error = None
        await until(lambda: not memcached.is_bypassed)
        assert await asker.ask(SUBJECT) == [b"v"]


async def test_one_that_is_full_is_still_asked(server: Server) -> None:
    async with served(server) as asker:
        memcached = asker.memcached
        put(server, SUBJECT, b"v")
        server.refuses = True
        memcached.keep(Question(subjects(1)[0]), b"v", None)
        await until(lambda: memcached._writes.is_bypassed)
        assert memcached.failures[Reason.REFUSED] >= 1
        assert await asker.ask(SUBJECT) == [b"v"]
        assert not memcached.is_bypassed
        server.refuses = False
        await until(lambda: not memcached._writes.is_bypassed)
        memcached.keep(Question(subjects(1)[0]), b"v", None)
        await wait_kept(asker, 1)


async def test_one_that_is_not_there_at_the_start_is_not_asked(server: Server) -> None:
    server.error = ConnectionRefusedError("refused")
    memcached = Memcached(ADDRESS, CacheSettings(memcached=str(ADDRESS)), server.client)
    assert not memcached.ask(Question(SUBJECT))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memcached.run)
        await until(lambda: memcached.failures[Reason.CONNECTION] >= 3)
        assert not memcached.ask(Question(SUBJECT))
        server.error = None
        await until(lambda: not memcached.is_bypassed)
        assert memcached.ask(Question(SUBJECT))
        nursery.cancel_scope.cancel()


async def test_a_connection_may_take_longer_than_an_answer(server: Server) -> None:
    """As with a name that is looked up slowly: else it would be bypassed for good."""
    is_connected: set[int] = set()
    pass_gate = server.pass_gate

    def connect_slowly() -> None:
        thread = len(is_connected)
        if thread < 2:  # one on each side
            is_connected.add(thread)
            threading.Event().wait(0.2)
        pass_gate()

    server.pass_gate = connect_slowly  # type: ignore[method-assign]
    put(server, SUBJECT, b"v")
    async with served(server, timeout_ms=50) as asker:
        assert asker.memcached.failures[Reason.TIMEOUT] == 0
        assert await asker.ask(SUBJECT) == [b"v"]


async def test_what_comes_on_a_connection_that_was_left_is_not_looked_at(server: Server) -> None:
    """It is closed before the next operation, which begins only when the former has ended."""
    line = module.Line(client := Client(server))
    events: list[str] = []
    client.close = lambda: events.append("closed")  # type: ignore[method-assign]
    client.sock = SimpleNamespace(shutdown=lambda how: events.append("shut"))  # type: ignore[assignment]
    server.gate.clear()
    with pytest.raises(module.Failure) as failed:
        await line.do(lambda client: client.get_many(["a"]), trio.current_time() + 0.01)
    assert failed.value.reason is Reason.TIMEOUT
    assert events == ["shut"]
    server.gate.set()
    await line.do(lambda client: events.append("next"), trio.current_time() + 5)
    assert events == ["shut", "closed", "next"]
