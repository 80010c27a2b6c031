"""A key's value, or its absence, is kept before its first write after a cut, whoever else writes at the same time.

The node here is a dictionary that answers what the script and the single steps ask; tests/live has real servers. The
steps are driven one by one, through every order in which two writers' steps can come.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Iterator
from itertools import combinations, islice
from types import coroutine
from typing import Any

import pytest
import trio

from proxy.protocol.encode import array, bulk, error, integer
from proxy.protocol.replies import decode
from proxy.settings import SnapshotSettings
from proxy.snapshots.preserve import INTERNAL_KEY, SCRIPT_KEYS_MAX, PreserveFailedError, Preserver
from routing.slot import slot_of
from routing.snapshot import Chain
from routing.snapshot_names import marker, preimage

KEY = b"account"
SLOT = slot_of(KEY)
ID = 7
MARKER, PREIMAGE = marker(SLOT, ID, KEY), preimage(SLOT, ID, KEY)
NIL, OK = b"$-1\r\n", b"+OK\r\n"


Writer = Callable[["Preserver", "Node"], Coroutine[None, None, None]]


@coroutine
def between_steps() -> Generator[None, None, None]:
    """Where another writer may come in."""
    yield


class Node:
    """One server: values, and those of them that expire."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.mortal: set[bytes] = set()
        self.refuses: Callable[[list[bytes]], bytes | None] = lambda words: None

    def run(self, words: list[bytes]) -> bytes:
        if (refusal := self.refuses(words)) is not None:
            return refusal
        values = self.values
        match words:
            case [b"GET", key]:
                return bulk(values[key]) if key in values else NIL
            case [b"MEMORY", b"USAGE", key]:
                return integer(len(values[key])) if key in values else NIL
            case [b"PTTL", key]:
                return integer(-2 if key not in values else 5000 if key in self.mortal else -1)
            case [b"DUMP", key]:
                return bulk(values[key]) if key in values else NIL
            case [b"RESTORE", key, ttl, payload]:
                if key in values:
                    return error("BUSYKEY Target key name already exists.")
                values[key] = payload
                if ttl != b"0":
                    self.mortal.add(key)
                return OK
            case [b"SET", key, value, b"NX"]:
                if key in values:
                    return NIL
                values[key] = value
                return OK
            case [b"SET", key, value]:
                values[key] = value
                self.mortal.discard(key)
                return OK
            case [b"UNLINK", key]:
                return integer(values.pop(key, None) is not None)
        raise AssertionError(words)

    def script(self) -> None:
        """What the script does, in one step."""
        if MARKER not in self.values:
            if KEY in self.values:
                self.values.setdefault(PREIMAGE, self.values[KEY])
                if KEY in self.mortal:
                    self.mortal.add(PREIMAGE)
            self.values[MARKER] = b"p" if KEY in self.values else b"a"

    def expire(self) -> None:
        for key in self.mortal:
            self.values.pop(key, None)
        self.mortal.clear()

    def at_snapshot(self) -> bytes | None:
        """What a reader gets: the key, unless it has a marker."""
        kind = self.values.get(MARKER)
        assert kind in (None, b"a", b"p", b"x")
        if kind is None:
            return self.values.get(KEY)
        return self.values.get(PREIMAGE) if kind == b"p" else None


class StepWays:
    """Carries single steps to the node; before each one, others may come in."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def execute(self, raw: bytes, hash_slot: int, **options: Any) -> bytes:
        await between_steps()
        words: list[bytes] = decode(raw)
        return self.node.run(words)


def preserver_of(node: Node, **settings: Any) -> Preserver:
    preserver = Preserver(SnapshotSettings(**settings))
    preserver.chain = Chain((ID,))
    preserver.newest = ID
    preserver.ways = StepWays(node)  # type: ignore[assignment]
    return preserver


async def write_by_steps(preserver: Preserver, node: Node, value: bytes) -> None:
    refused = await preserver._by_steps(SLOT, [KEY], ID, 2, 1.0)
    assert refused is None
    await between_steps()
    node.run([b"SET", KEY, value])


async def write_by_script(node: Node, value: bytes) -> None:
    await between_steps()
    node.script()
    await between_steps()
    node.run([b"SET", KEY, value])


def length_of(writer: Writer, node: Node, preserver: Preserver) -> int:
    """Its steps, when it runs alone."""
    return sum(1 for _ in drive(writer(preserver, node))) + 1


def drive(work: Coroutine[None, None, None]) -> Iterator[None]:
    while True:
        try:
            work.send(None)
        except StopIteration:
            return
        yield


def result_of(work: Coroutine[Any, Any, bytes | str | None]) -> bytes | str | None:
    while True:
        try:
            work.send(None)
        except StopIteration as done:
            result: bytes | str | None = done.value
            return result


def interleavings(first: int, second: int) -> Iterator[tuple[int, ...]]:
    """Orders of so many steps of two workers, as places of the first one's: all, or one in eleven of very many."""
    every = combinations(range(first + second), first)
    return islice(every, 0, None, 11) if first + second > 15 else every


def by_steps(value: bytes) -> Writer:
    return lambda preserver, node: write_by_steps(preserver, node, value)


def by_script(value: bytes) -> Writer:
    return lambda preserver, node: write_by_script(node, value)


@pytest.mark.parametrize("value", [b"100", None], ids=["a value", "absent"])
@pytest.mark.parametrize("second", [by_steps(b"B"), by_script(b"B")], ids=["steps", "script"])
def test_two_writers_of_a_key_in_a_split_slot_keep_what_it_was(second: Writer, value: bytes | None) -> None:
    def world() -> tuple[Node, Preserver]:
        node = Node()
        if value is not None:
            node.values[KEY] = value
        return node, preserver_of(node)

    writers = [by_steps(b"A"), second]
    steps = [length_of(writer, *world()) for writer in writers]
    for places in interleavings(*steps):
        node, preserver = world()
        running = [drive(writer(preserver, node)) for writer in writers]
        for place in range(sum(steps)):
            next(running[0 if place in places else 1], None)
            assert node.at_snapshot() == value, f"after step {place} of {places}"
        for left in running:
            for _ in left:
                assert node.at_snapshot() == value, places
        assert node.values[KEY] in (b"A", b"B")
        assert node.at_snapshot() == value, places


def test_a_key_that_expires_between_the_steps_of_two_writers_is_gone_at_the_snapshot_too() -> None:
    def world() -> tuple[Node, Preserver]:
        node = Node()
        node.values[KEY] = b"100"
        node.mortal.add(KEY)
        return node, preserver_of(node)

    writers = [by_steps(b"A"), by_script(b"B")]
    steps = [length_of(writer, *world()) for writer in writers]
    for places in interleavings(*steps):
        for expires_at in range(sum(steps) + 1):
            node, preserver = world()
            running = [drive(writer(preserver, node)) for writer in writers]
            for place in range(sum(steps)):
                if place == expires_at:
                    node.expire()
                next(running[0 if place in places else 1], None)
                assert node.at_snapshot() in (b"100", None), (places, expires_at, place)
            for left in running:
                for _ in left:
                    assert node.at_snapshot() in (b"100", None)


@pytest.mark.parametrize("steps", range(8))
def test_no_step_for_an_earlier_snapshot_is_begun_after_a_cut(steps: int) -> None:
    """It would keep, for the earlier one, what was written after the later one's cut."""
    node = Node()
    node.values[KEY] = b"100"
    preserver = preserver_of(node)
    work = drive(preserver._by_steps(SLOT, [KEY], ID, 2, 1.0))  # type: ignore[arg-type]
    for _ in range(steps):
        next(work, None)
    preserver.newest = ID + 1
    node.values[marker(SLOT, ID + 1, KEY)] = b"p"
    node.values[preimage(SLOT, ID + 1, KEY)] = b"100"
    node.run([b"SET", KEY, b"B"])
    for _ in work:
        pass
    expected = (
        b"100" if MARKER in node.values else b"B"
    )  # without a marker of its own, the later one's decides
    assert node.at_snapshot() == expected


def test_a_key_over_the_limit_is_marked_and_not_copied() -> None:
    node = Node()
    node.values[KEY] = b"x" * 100
    preserver = preserver_of(node, key_bytes_max=99)
    for _ in drive(write_by_steps(preserver, node, b"A")):
        pass
    assert node.values[MARKER] == b"x"
    assert PREIMAGE not in node.values
    assert preserver.costs[ID].keys_too_large == 1


@pytest.mark.parametrize("step", [b"GET", b"MEMORY", b"DUMP", b"RESTORE", b"SET"])
def test_a_step_that_a_node_refuses_sets_no_marker_and_tells_why(step: bytes) -> None:
    def after(refusal: bytes) -> tuple[Node, Coroutine[Any, Any, bytes | str | None]]:
        node = Node()
        node.values[KEY] = b"100"
        node.refuses = lambda words: refusal if words[0] == step else None
        return node, preserver_of(node)._by_steps(SLOT, [KEY], ID, 2, 1.0)

    node, work = after(error("OOM command not allowed when used memory > 'maxmemory'."))
    with pytest.raises(PreserveFailedError, match="OOM"):
        for _ in drive(work):  # type: ignore[arg-type]
            pass
    assert MARKER not in node.values

    for words in ("MISCONF no disk", "NOTREADY slot 1", "BUSY Redis is busy running a script."):
        node, work = after(error(words))
        assert result_of(work) == error(words)
        assert MARKER not in node.values


async def test_keys_with_the_snapshots_own_names_are_not_written() -> None:
    class NoWays:
        def write_connection(self, hash_slot: int, resp: int) -> None:
            return None

    preserver = Preserver(SnapshotSettings())
    preserver.newest = ID
    preserver.ways = NoWays()  # type: ignore[assignment]
    assert await preserver.preserve({SLOT: [MARKER]}, 2, trio.current_time() + 1) == INTERNAL_KEY


NO_REPLICAS = b"-NOREPLICAS Not enough good replicas to write."
OOM = b"-OOM command not allowed when used memory > 'maxmemory'."


@pytest.mark.parametrize(
    ("reply", "refusal"),
    [
        (NO_REPLICAS + b" script: 3cf9, on @user_script:8.\r\n", True),
        (
            b"-ERR Error running script (call to f_3cf9): @user_script:8: @user_script: 8: %b\r\n"
            % NO_REPLICAS,
            True,
        ),
        (b"-BUSY Redis is busy running a script. You can only call SCRIPT KILL.\r\n", True),
        (OOM + b" script: 3cf9, on @user_script:16.\r\n", False),
        (
            b"-ERR Error running script (call to f_3cf9): @user_script:16: @user_script: 16: %b\r\n" % OOM,
            False,
        ),
    ],
    ids=["no replicas", "no replicas, Redis 6.2", "busy", "no memory", "no memory, Redis 6.2"],
)
async def test_what_a_node_refuses_to_every_write_ends_no_snapshot(reply: bytes, refusal: bool) -> None:
    """The texts are what the engines answered."""

    class Connection:
        address = "node"
        is_closed = False

        async def request(self, raw: bytes, *, hash_slot: int) -> bytes:
            return reply

    preserver = Preserver(SnapshotSettings())
    work = preserver._by_script(Connection(), SLOT, [KEY], ID, 2, trio.current_time() + 1)  # type: ignore[arg-type]
    if refusal:
        answer = await work
        assert isinstance(answer, bytes)
        assert answer.startswith((b"-NOREPLICAS ", b"-BUSY "))
    else:
        with pytest.raises(PreserveFailedError, match="OOM"):
            await work


@pytest.mark.parametrize("count", [1, SCRIPT_KEYS_MAX, SCRIPT_KEYS_MAX + 1, 3 * SCRIPT_KEYS_MAX])
async def test_many_keys_go_in_several_scripts_unless_they_belong_together(count: int) -> None:
    sent: list[int] = []

    class Connection:
        address = "node"
        is_closed = False

        def __init__(self) -> None:
            self.known: set[bytes] = set()

        async def request(self, raw: bytes, *, hash_slot: int) -> bytes:
            keys = int(decode(raw)[2]) // 3
            sent.append(keys)
            return array([integer(0)] * keys)

    class AtRest:
        def is_in_flux(self, hash_slot: int) -> bool:
            return False

    preserver = preserver_of(Node())
    preserver.ways = AtRest()  # type: ignore[assignment]
    connection: Any = Connection()
    keys = [b"{x}%d" % number for number in range(count)]
    assert await preserver._at_owner(connection, SLOT, keys, 2, trio.current_time() + 1) is None
    assert sum(sent) == count
    assert max(sent) <= SCRIPT_KEYS_MAX
    assert connection.known == set(keys)

    sent.clear()
    assert await preserver._at_owner(connection, SLOT, keys, 2, trio.current_time() + 1, whole=True) is None
    assert sent == [count]
