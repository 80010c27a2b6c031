"""Promises 1, 5 and 6 against a small cluster in memory, whose slots move and whose connections break.

Hypothesis writes the history: clients pipeline reads and writes on few keys, keys and slots migrate with the
engines' rules for MOVED, ASK and TRYAGAIN, nodes load or lose their connections, discovery looks now or later. Each
request carries an identity, and the model keeps which node ran it and when. After the history all clients must have
one reply a request, and the log must show that

- a write ran once if it was acknowledged, never if its client was told that it did not run, at most once else;
- one client's requests on one key ran in the order sent, if one of the two writes;
- each node that ran a request had the key's whole value: nothing was read or written beside it.

It is deterministic: Hypothesis prints the history that fails, and seeds Trio's scheduler and the proxy's jitter.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from proxy.protocol.encode import array, bulk, frame
from proxy.protocol.replies import ServerError, decode
from routing.slot import slot_of
from tests.proxy.world import Client, FakeNode, Link, World, keys_of, world_of

OK = b"+OK\r\n"
NODES = 3
CLIENTS = 2
WAIT_SECONDS_MAX = 30.0  # no history may leave a client without replies for longer


@dataclass
class Run:
    """One execution of one request on one key."""

    client: int
    number: int
    key: bytes
    is_write: bool


@dataclass
class LinkState:
    """What a node keeps for one connection."""

    link: Link
    pending: deque[list[bytes]] = field(default_factory=deque)
    asking: bool = False
    queue: list[list[bytes]] | None = None
    failed: bool = False


class ModelCluster:
    """Answers what the proxy sends as the engines would, and logs what ran."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tags = [keys_of(world, 0)[0], keys_of(world, 1)[0]]
        self.keys = [b"{%b}%d" % (tag, n) for tag in self.tags for n in range(2)]
        self.data: list[dict[bytes, list[bytes]]] = [{} for _ in range(NODES)]
        self.truth: dict[bytes, list[bytes]] = {}
        self.log: list[Run] = []
        self.loading: set[int] = set()
        self.hiccups = [0] * NODES  # how many of a node's next requests it turns away
        self.migrated: set[int] = set()  # slots that have ever begun to move
        self._states: dict[int, list[LinkState]] = {n: [] for n in range(NODES)}

    # -- what happens to the cluster

    def migrate(self, slot: int, target: int) -> None:
        if slot not in self.world.migrations and self.world.owners[slot] != target:
            self.world.migrations[slot] = (self.world.owners[slot], target)
            self.migrated.add(slot)

    def move(self, key: bytes) -> None:
        slot = slot_of(key)
        if slot in self.world.migrations:
            source, target = self.world.migrations[slot]
            if key in self.data[source]:
                self.data[target][key] = self.data[source].pop(key)

    def finish(self, slot: int) -> None:
        if slot in self.world.migrations:
            for key in self.keys:
                if slot_of(key) == slot:
                    self.move(key)
            self.world.owners[slot] = self.world.migrations.pop(slot)[1]

    def lose(self, index: int, executed: int) -> None:
        """All connections of a node break after it ran some more requests, whose replies are lost."""
        self.run(index, executed, answers=False)
        self.world.nodes[index].lose()
        self._states[index].clear()

    # -- what a node does

    def run(self, index: int, count: int, *, answers: bool = True, is_last_first: bool = False) -> int:
        """The node runs up to ``count`` of its requests, of one connection after the other; how many it ran."""
        node: FakeNode = self.world.nodes[index]
        states = self._states[index]
        for link in node.links:
            state = next((known for known in states if known.link is link), None)
            if state is None:
                state = LinkState(link)
                states.append(state)
            state.pending += link.take()
        done = 0
        for state in reversed(states) if is_last_first else states:
            while state.pending and done < count:
                reply = self._handle(index, state, state.pending.popleft())
                done += 1
                if answers:
                    state.link.reply(reply)
        return done

    def _handle(self, index: int, state: LinkState, words: list[bytes]) -> bytes:
        name = words[0]
        if name == b"ASKING":
            state.asking = True
            return OK
        if name == b"MULTI":
            state.queue, state.failed = [], False
            return OK
        asking = state.asking
        if name == b"EXEC":
            assert state.queue is not None
            queue, state.queue, state.asking = state.queue, None, False
            if state.failed:
                return b"-EXECABORT Transaction discarded because of previous errors.\r\n"
            for queued in queue:
                if refusal := self._refusal(index, _keys(queued), asking):
                    return refusal
            return array([self._execute(index, queued) for queued in queue])
        refusal = self._refusal(index, _keys(words), asking)
        if state.queue is not None:
            if refusal:
                state.failed = True
                return refusal
            state.queue.append(words)
            return b"+QUEUED\r\n"
        state.asking = False
        return refusal or self._execute(index, words)

    def _refusal(self, index: int, keys: list[bytes], asking: bool) -> bytes | None:
        """The engines' rules of redirection."""
        if self.hiccups[index]:
            self.hiccups[index] -= 1
            return b"-CLUSTERDOWN The cluster is down\r\n"
        if index in self.loading:
            return b"-LOADING Redis is loading the dataset in memory\r\n"
        slot = slot_of(keys[0])
        missing = sum(key not in self.data[index] for key in set(keys))
        source, target = self.world.migrations.get(slot, (-1, -1))
        if self.world.owners[slot] == index:
            if source != index or not missing:
                return None
            if missing < len(set(keys)):
                return b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"
            return b"-ASK %d %s\r\n" % (slot, str(self.world.nodes[target].address).encode())
        if target == index and asking:
            if missing and len(set(keys)) > 1:
                return b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"
            return None
        return b"-MOVED %d %s\r\n" % (slot, str(self.world.nodes[self.world.owners[slot]].address).encode())

    def _execute(self, index: int, words: list[bytes]) -> bytes:
        name, keys = words[0], _keys(words)
        data = self.data[index]
        for key in keys:
            assert data.get(key, []) == self.truth.get(key, []), f"{words} ran beside the value of {key!r}"
        if name == b"MGET":
            return array([bulk(b"|".join(data[key])) if key in data else b"$-1\r\n" for key in keys])
        if name == b"MSET":
            for key, identity in zip(words[1::2], words[2::2], strict=True):
                data[key] = [identity]
                self.truth[key] = [identity]
                self._note(identity, key, is_write=True)
            return OK
        identity = words[-1]
        is_write = name != b"GETRANGE"
        for key in keys:
            if is_write:
                data.setdefault(key, []).append(identity)
                self.truth.setdefault(key, []).append(identity)
            self._note(identity, key, is_write=is_write)
        return bulk(identity)

    def _note(self, identity: bytes, key: bytes, *, is_write: bool) -> None:
        client, number = identity.split(b".")
        self.log.append(Run(int(client), int(number), key, is_write))


def _keys(words: list[bytes]) -> list[bytes]:
    match words[0]:
        case b"EVAL":
            return words[3:5]
        case b"MGET":
            return words[1:]
        case b"MSET":
            return words[1::2]
    return words[1:2]


# -- clients


@dataclass
class Sent:
    """One request that a client sent, and what its log must show. ``kind`` decides."""

    kind: str
    number: int
    keys: list[bytes]


class ModelClient:
    def __init__(self, index: int, cluster: ModelCluster) -> None:
        self.index = index
        self.client: Client = cluster.world.client()
        self.cluster = cluster
        self.sent: list[Sent] = []

    def send(self, kinds: list[tuple[str, int]]) -> None:
        """Pipeline some requests in one piece."""
        keys = self.cluster.keys
        data = b""
        for kind, place in kinds:
            key = keys[place]
            if kind == "multi":
                data += self._frame("answered", [], b"MULTI")
                for _ in range(2):
                    data += self._frame("queued", [key], b"APPEND", key, b"?")
                data += self._frame("exec", [key, key], b"EXEC")
            elif kind == "append":
                data += self._frame(kind, [key], b"APPEND", key, b"?")
            elif kind == "read":
                data += self._frame(kind, [key], b"GETRANGE", key, b"0", b"?")
            elif kind == "eval":
                pair = keys[place // 2 * 2 : place // 2 * 2 + 2]
                data += self._frame(kind, pair, b"EVAL", b"script", b"2", *pair, b"?")
            elif kind == "mget":
                data += self._frame(kind, [], b"MGET", *keys)
            elif kind == "mset":
                pair = [keys[place], keys[(place + 2) % 4]]
                data += self._frame(kind, pair, b"MSET", pair[0], b"?", pair[1], b"?")
            else:
                data += self._frame("answered", [], b"PING")
        self.client.send(data)

    def _frame(self, kind: str, keys: list[bytes], *words: bytes) -> bytes:
        number = len(self.sent)
        self.sent.append(Sent(kind, number, keys))
        identity = b"%d.%d" % (self.index, number)
        return frame([identity if word == b"?" else word for word in words])

    def check(self, log: list[Run], *, is_calm: bool) -> None:
        replies = self.client.replies()
        assert len(replies) == len(self.sent)
        values = [decode(reply) for reply in replies]
        runs = Counter(run.number for run in log if run.client == self.index)
        if is_calm:
            assert not [value for value in values if isinstance(value, ServerError)]
        counted: set[int] = set()  # requests that ran, as far as the client may count on it
        for sent in self.sent:
            value, ran = values[sent.number], runs[sent.number]
            identity = b"%d.%d" % (self.index, sent.number)
            what = f"client {self.index}: {sent}: {value!r}, ran {ran} times"
            if sent.kind == "queued":
                assert value == b"QUEUED", what
            elif sent.kind == "exec":
                parts = [sent.number - 2, sent.number - 1]
                ran_parts = [runs[number] for number in parts]
                if isinstance(value, list):
                    assert value == [b"%d.%d" % (self.index, number) for number in parts], what
                    assert ran_parts == [1, 1], what
                    counted.update(parts)
                elif str(value).startswith("OUTCOMEUNKNOWN"):
                    assert ran_parts in ([0, 0], [1, 1]), what
                    counted.update(parts)
                else:
                    assert str(value).startswith("NOTREADY"), what
                    assert ran_parts == [0, 0], what
            elif sent.kind == "mget":
                assert isinstance(value, list) or str(value).startswith("NOTREADY"), what
                assert not isinstance(value, list) or len(value) == 4, what
            elif sent.kind == "answered":
                assert value in (b"OK", b"PONG"), what
            else:
                is_write = sent.kind != "read"
                all_keys = len(sent.keys)
                if value == (b"OK" if sent.kind == "mset" else identity):
                    assert ran == all_keys if is_write else ran >= 1, what
                    counted.add(sent.number)
                else:
                    text = str(value)
                    assert isinstance(value, ServerError), what
                    assert text.startswith(("NOTREADY", "OUTCOMEUNKNOWN") if is_write else "NOTREADY"), what
                    if text.startswith("NOTREADY") and "parts ran" not in text and is_write:
                        assert ran == 0, what
                    if is_write:
                        assert ran <= all_keys, what
                        counted.add(sent.number)
        self._check_order(log, counted)

    def _check_order(self, log: list[Run], counted: set[int]) -> None:
        """The last run of a read is the one whose reply its client got."""
        for key in self.cluster.keys:
            mine = [
                run for run in log if run.client == self.index and run.key == key and run.number in counted
            ]
            last = {run.number: place for place, run in enumerate(mine)}
            writes = {run.number for run in mine if run.is_write}
            for early in last:
                for late in last:
                    if early < late and (early in writes or late in writes):
                        assert last[early] < last[late], (
                            f"client {self.index}: {late} ran before {early} on {key!r}"
                        )


# -- histories

KINDS = st.sampled_from(
    ["append", "append", "append", "read", "read", "eval", "multi", "mget", "mset", "ping"]
)
PLACES = st.integers(0, 3)
INDEXES = st.integers(0, NODES - 1)
STEP = st.one_of(
    st.tuples(
        st.just("send"),
        st.integers(0, CLIENTS - 1),
        st.lists(st.tuples(KINDS, PLACES), min_size=1, max_size=5),
    ),
    st.tuples(st.just("run"), INDEXES, st.integers(1, 6), st.booleans()),
    st.tuples(st.just("turn")),
    st.tuples(st.just("migrate"), PLACES, INDEXES),
    st.tuples(st.just("move"), PLACES),
    st.tuples(st.just("finish"), PLACES),
    st.tuples(st.just("see")),
    st.tuples(st.just("lose"), INDEXES, st.integers(0, 5)),
    st.tuples(st.just("loading"), INDEXES),
    st.tuples(st.just("hiccup"), INDEXES, st.integers(1, 3)),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 0.03, 0.2])),
)


# Steps after which nothing excuses an error: each slot moves once, no node fails, no command needs two keys of a slot.
CALM_KINDS = st.sampled_from(["append", "append", "read", "multi", "ping"])
CALM_STEP = st.one_of(
    st.tuples(
        st.just("send"),
        st.integers(0, CLIENTS - 1),
        st.lists(st.tuples(CALM_KINDS, PLACES), min_size=1, max_size=4),
    ),
    st.tuples(st.just("run"), INDEXES, st.integers(1, 6), st.booleans()),
    st.tuples(st.just("turn")),
    st.tuples(st.just("migrate once"), PLACES, INDEXES),
    st.tuples(st.just("move"), PLACES),
    st.tuples(st.just("finish"), PLACES),
    st.tuples(st.just("see")),
    st.tuples(st.just("wait"), st.just(0.005)),
)


async def play(steps: list[tuple], *, is_calm: bool = False) -> None:  # type: ignore[type-arg]
    async with world_of(NODES) as world:
        cluster = ModelCluster(world)
        clients = [ModelClient(index, cluster) for index in range(CLIENTS)]
        for step in steps:
            match step:
                case ("send", who, kinds):
                    clients[who].send(kinds)
                case ("run", index, count, is_last_first):
                    cluster.run(index, count, is_last_first=is_last_first)
                case ("turn",):
                    await world.settle()
                case ("migrate", place, target):
                    cluster.migrate(slot_of(cluster.keys[place]), target)
                case ("move", place):
                    cluster.move(cluster.keys[place])
                case ("finish", place):
                    cluster.finish(slot_of(cluster.keys[place]))
                case ("see",):
                    world.see()
                case ("lose", index, executed):
                    cluster.lose(index, executed)
                case ("migrate once", place, target):
                    if slot_of(cluster.keys[place]) not in cluster.migrated:
                        cluster.migrate(slot_of(cluster.keys[place]), target)
                case ("hiccup", index, count):
                    cluster.hiccups[index] = count
                case ("loading", index):
                    cluster.loading ^= {index}
                case ("wait", seconds):
                    await world.settle()
                    await trio.sleep(seconds)
        cluster.loading.clear()
        cluster.hiccups = [0] * NODES
        began = trio.current_time()
        while any(
            client.client.connection.slots or client.client.connection._unread_bytes for client in clients
        ):
            await world.settle()
            if not sum(cluster.run(index, 1000) for index in range(NODES)):
                await trio.sleep(0.02)
            assert trio.current_time() - began < WAIT_SECONDS_MAX, "a client was left without replies"
        assert world.hub.faults_total == 0
        for client in clients:
            client.check(cluster.log, is_calm=is_calm)


@given(st.lists(STEP, min_size=1, max_size=40))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_histories(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    trio.run(play, steps, clock=MockClock(autojump_threshold=0))


@given(st.lists(CALM_STEP, min_size=1, max_size=40))
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_slots_that_move_cause_no_errors(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    """Here a request that is refused because a later one overtook it was sent too early, or that one was."""
    trio.run(partial(play, is_calm=True), steps, clock=MockClock(autojump_threshold=0))
