"""Promises 1, 2 and 6 of reads at replicas against a small cluster in memory, whose replicas lag and get lost.

Hypothesis writes the history: clients pipeline reads and writes at changing levels and RESP versions, replicas apply
what their primaries wrote now or later, slots go into flux or change hands, connections break, nodes answer in any
order. Each write makes the next version of its key, so a reply shows which version it read. After the history each
client must have one reply a request, and

- what was there when a read was sent and until its reply came is never answered as absent, at no level;
- strong, caught_up: a read shows all that any client was told of before it was sent;
- strong, caught_up, session: it shows what its client wrote before it, and nothing older than its client has read;
- bounded_staleness: it shows no version that was replaced longer than its bound before the reply came;
- a batch of one client's commands takes effect in the order sent, and replies are in the RESP version asked for.

It is deterministic, as ``test_cluster_model``, whose sister it is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from proxy.protocol.encode import array, bulk, frame
from proxy.protocol.replies import ServerError, decode
from routing.offsets import Sample, parse_sample
from routing.promotion import Stage
from routing.slot import slot_of
from tests.proxy.exchange.test_replica_reads import primary, replica
from tests.proxy.world import FakeNode, Link, World, keys_of, world_of

OK = b"+OK\r\n"
NODES = 2
REPLICAS_MAX = 2  # of each
CLIENTS = 4
WAIT_SECONDS_MAX = 30.0  # no history may leave a client without replies for longer
OFFSET_OF_ENTRY = 10
LEVELS = {
    "strong": (b"STRONG",),
    "caught_up": (b"CAUGHT_UP",),
    "session": (b"SESSION",),
    "bounded": (b"BOUNDED_STALENESS", b"100"),
    "tight": (b"BOUNDED_STALENESS", b"50"),
    "eventual": (b"EVENTUAL",),
}
BOUNDS = {"bounded": 0.1, "tight": 0.05}  # seconds
FRESH = ("strong", "caught_up")
OWN = ("strong", "caught_up", "session")


@dataclass
class Version:
    """One state of one key: from when it was the newest."""

    is_there: bool
    step: int
    time: float


@dataclass
class LinkState:
    """What a node keeps for one connection."""

    link: Link
    pending: deque[list[bytes]] = field(default_factory=deque)
    queue: list[list[bytes]] | None = None
    failed: bool = False


class ModelCluster:
    """Answers as the engines would. ``step`` counts what happens."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.keys = [key for index in range(NODES) for key in keys_of(world, index, 2)]
        self.step = 0
        self.versions: dict[bytes, list[Version]] = {key: [Version(False, 0, 0.0)] for key in self.keys}
        self.number_of: dict[bytes, list[tuple[bytes, int]]] = {}  # a write's identity -> what it made
        # What each primary wrote: the key, and its version there, or None for "not here".
        self.logs: list[list[tuple[bytes, int | None]]] = [[] for _ in range(NODES)]
        self.applied = [0] * (NODES * world.replicas_each)
        self.histories = [0] * NODES
        self.history_began = [0] * NODES  # its offset when it began
        self.may_refuse: set[str] = set()  # levels that something happened to which excuses an error
        self.syncing: set[int] = set()
        self._states: dict[str, list[LinkState]] = {}

    @property
    def all_nodes(self) -> tuple[FakeNode, ...]:
        return (*self.world.nodes, *self.world.replica_nodes)

    # -- what happens to the cluster

    def lose(self, index: int, executed: int) -> None:
        index %= len(self.all_nodes)
        self.run(index, executed, answers=False)
        node = self.all_nodes[index]
        node.lose()
        self._states.pop(node.id, None)
        if index < NODES:
            self.may_refuse.update(LEVELS)

    def begin_history(self, index: int) -> None:
        """As by a promotion that loses nothing. A session's writes at unknown offsets count as lost."""
        self.histories[index] += 1
        self.history_began[index] = OFFSET_OF_ENTRY * len(self.logs[index])
        self.may_refuse.add("session")

    def hand_over(self, slot: int, target: int) -> None:
        source = self.world.owners[slot]
        if source != target and slot not in self.world.migrations:
            self.world.owners[slot] = target
            for key in self.keys:
                if slot_of(key) == slot:
                    self.logs[target].append((key, len(self.versions[key]) - 1))
                    self.logs[source].append((key, None))

    def apply(self, index: int, count: int) -> None:
        """A replica catches up a little."""
        index %= len(self.applied)
        log = self.logs[index // self.world.replicas_each]
        self.applied[index] = min(len(log), self.applied[index] + count)

    def sample(self) -> None:
        """What the monitor would ask the primaries, and the replicas."""
        now = trio.current_time()
        for shard in self.world.replicas.shards():
            index = next(n for n in range(NODES) if self.world.nodes[n].id == shard.primary.id)
            shard.note(self._sample_of(index), now)
            for one in shard.replicas:
                place = next(n for n, node in enumerate(self.all_nodes) if node.address == one.address)
                one.note(self._sample_of(place), now, now)

    def _sample_of(self, index: int) -> Sample:
        return parse_sample(self._info(index))

    # -- what a node does

    def run(self, index: int, count: int, *, answers: bool = True, is_last_first: bool = False) -> int:
        index %= len(self.all_nodes)
        node = self.all_nodes[index]
        states = self._states.setdefault(node.id, [])
        for link in node.links:
            state = next((known for known in states if known.link is link), None)
            if state is None:
                state = LinkState(link)
                states.append(state)
            state.pending += link.take()
        done = 0
        for state in reversed(states) if is_last_first else states:
            while state.pending and done < count:
                self.step += 1
                reply = self._handle(index, state, state.pending.popleft())
                done += 1
                if answers:
                    state.link.reply(reply)
        return done

    def _info(self, index: int) -> bytes:
        shard = index if index < NODES else (index - NODES) // self.world.replicas_each
        replid = b"%040x" % (16 * (shard + 1) + self.histories[shard] % 16)
        if index < NODES:
            second = None
            if self.histories[shard]:
                former = b"%040x" % (16 * (shard + 1) + (self.histories[shard] - 1) % 16)
                second = (former, self.history_began[shard] + 1)
            return primary(OFFSET_OF_ENTRY * len(self.logs[index]), replid, second)
        applied = OFFSET_OF_ENTRY * self.applied[index - NODES]
        return replica(applied, replid, syncing=int(index - NODES in self.syncing))

    def _handle(self, index: int, state: LinkState, words: list[bytes]) -> bytes:
        name = words[0]
        if name == b"INFO":
            return self._info(index)
        if name == b"MULTI":
            state.queue, state.failed = [], False
            return OK
        if name == b"EXEC":
            assert state.queue is not None
            queue, state.queue = state.queue, None
            if state.failed:
                return b"-EXECABORT Transaction discarded because of previous errors.\r\n"
            return array([self._execute(index, queued) for queued in queue])
        refusal = self._refusal(index, keys_in(words))
        if state.queue is not None:
            if refusal:
                state.failed = True
                return refusal
            state.queue.append(words)
            return b"+QUEUED\r\n"
        return refusal or self._execute(index, words)

    def _refusal(self, index: int, keys: list[bytes]) -> bytes | None:
        owner = self.world.owners[slot_of(keys[0])]
        if index >= NODES or owner == index:
            return None
        address = str(self.world.nodes[owner].address).encode()
        return b"-MOVED %d %s\r\n" % (slot_of(keys[0]), address)

    def _execute(self, index: int, words: list[bytes]) -> bytes:
        name, keys = words[0], keys_in(words)
        if name in (b"GET", b"SINTER", b"MGET", b"EXISTS"):
            found = [self._value(index, key) for key in keys]
            if name == b"EXISTS":
                return b":%d\r\n" % sum(value is not None for value in found)
            texts = [b"$-1\r\n" if value is None else bulk(value) for value in found]
            return array(texts) if name == b"MGET" else texts[0]
        assert index < NODES
        identity = words[-1]  # of DEL, which carries none, nobody asks
        for key in dict.fromkeys(keys):
            self.versions[key].append(Version(name != b"DEL", self.step, trio.current_time()))
            number = len(self.versions[key]) - 1
            self.logs[index].append((key, number))
            self.number_of.setdefault(identity, []).append((key, number))
        return b":1\r\n" if name == b"DEL" else OK

    def _value(self, index: int, key: bytes) -> bytes | None:
        """The number of the version that a node has, as text."""
        if index < NODES:
            log = self.logs[index]
        else:
            log = self.logs[(index - NODES) // self.world.replicas_each][: self.applied[index - NODES]]
        number = next((number for known, number in reversed(log) if known == key), None)
        return None if number is None or not self.versions[key][number].is_there else b"%d" % number


def keys_in(words: list[bytes]) -> list[bytes]:
    match words[0]:
        case b"EVAL":
            return words[3:4]
        case b"MGET" | b"EXISTS":
            return words[1:]
        case b"DEL":
            return words[1:]
        case b"MSET":
            return words[1::2]
    return words[1:2]


# -- clients


@dataclass
class Sent:
    """One request that a client sent. ``known``: the versions that anybody was told of, by key, at that time."""

    kind: str  # read, exec, queued, write, answered
    name: str
    level: str
    keys: list[bytes]
    step: int
    known: dict[bytes, int]
    reply: bytes = b""
    replied: int = 0
    replied_at: float = 0.0
    made: list[tuple[bytes, int]] = field(default_factory=list)  # by a write
    identity: bytes = b""


class ModelClient:
    def __init__(self, index: int, cluster: ModelCluster, told: dict[bytes, int]) -> None:
        self.index = index
        self.client = cluster.world.client()
        self.cluster = cluster
        self.sent: list[Sent] = []
        self.answered = 0
        self.level = "strong"
        self.told = told  # shared by all: the newest version of each key that somebody was told of

    def send(self, kinds: list[tuple[str, int]]) -> None:
        """Pipeline some requests in one piece."""
        self.cluster.step += 1
        data = b""
        for kind, place in kinds:
            key = self.cluster.keys[place]
            other = self.cluster.keys[(place + 1) % 4]
            match kind:
                case "get":
                    data += self._frame("read", [key], b"GET", key)
                case "sinter":
                    data += self._frame("read", [key], b"SINTER", key)
                case "exists":
                    data += self._frame("exists", [key], b"EXISTS", key)
                case "mget":
                    data += self._frame("read", [key, other], b"MGET", key, other)
                case "set":
                    data += self._frame("write", [key], b"SET", key, b"?")
                case "eval":
                    data += self._frame("write", [key], b"EVAL", b"script", b"1", key, b"?")
                case "del":
                    data += self._frame("write", [key], b"DEL", key)
                case "mset":
                    data += self._frame("write", [key, other], b"MSET", key, b"?", other, b"?")
                case "exec set" | "exec get":
                    data += self._frame("answered", [], b"MULTI")
                    if kind == "exec set":
                        identity = self._identity()
                        data += self._frame("answered", [], b"SET", key, identity)
                        data += self._frame("write", [key], b"EXEC", identity=identity)
                    else:
                        data += self._frame("answered", [], b"GET", key)
                        data += self._frame("read", [key], b"EXEC")
                case "hello":
                    data += self._frame("hello", [], b"HELLO", b"%d" % (2 + place % 2))
                case "ping":
                    data += self._frame("answered", [], b"PING")
                case _:
                    self.level = kind
                    data += self._frame("answered", [], b"STEADY.READ", *LEVELS[kind])
        self.client.send(data)

    def _identity(self) -> bytes:
        return b"%d.%d" % (self.index, len(self.sent))

    def _frame(self, kind: str, keys: list[bytes], *words: bytes, identity: bytes = b"") -> bytes:
        identity = identity or self._identity()
        name = words[0].decode()
        self.sent.append(
            Sent(kind, name, self.level, keys, self.cluster.step, dict(self.told), identity=identity)
        )
        return frame([identity if word == b"?" else word for word in words])

    def take(self) -> None:
        """Note what came, and when."""
        for reply in self.client.replies():
            assert self.answered < len(self.sent), f"client {self.index} got more replies than it asked for"
            sent = self.sent[self.answered]
            self.answered += 1
            self.cluster.step += 1
            sent.reply, sent.replied, sent.replied_at = reply, self.cluster.step, trio.current_time()
            if sent.kind == "write" and not isinstance(decode(reply), ServerError):
                sent.made = self.cluster.number_of.get(sent.identity, [])
                for key, number in sent.made:
                    self.told[key] = max(self.told[key], number)
            elif sent.kind == "read" and sent.level in FRESH:
                for key, read in self._read(sent):
                    if read is not None:
                        self.told[key] = max(self.told[key], read)

    def _read(self, sent: Sent) -> list[tuple[bytes, int | None]]:
        """Which version of each key the reply shows; None: it is absent."""
        value = decode(sent.reply)
        if isinstance(value, ServerError):
            return []
        values = value if isinstance(value, list) else [value]
        assert len(values) == len(sent.keys), f"{sent}"
        return [
            (key, None if text is None else int(text)) for key, text in zip(sent.keys, values, strict=True)
        ]

    def check(self) -> None:
        assert self.answered == len(self.sent)
        newest: dict[bytes, int] = {}  # of what this client wrote and read so far
        for number, sent in enumerate(self.sent):
            what = f"client {self.index}: request {number}: {sent}"
            value = decode(sent.reply)
            if isinstance(value, ServerError):
                assert sent.level in self.cluster.may_refuse, what
                assert str(value).startswith(("NOTREADY", "OUTCOMEUNKNOWN")), what
                continue
            if sent.kind == "write":
                assert len(sent.made) == len(set(sent.keys)) or sent.name == "DEL", what
                for key, made in sent.made:
                    newest[key] = max(newest.get(key, 0), made)
            elif sent.kind == "exists":
                states = self._states_since(sent, sent.keys[0], newest.get(sent.keys[0], 0))
                assert bool(value) in states, what
            elif sent.kind == "read":
                for key, read in self._read(sent):
                    self._check_read(sent, key, read, newest, what)
            elif sent.kind == "hello":
                assert sent.reply[0] == (37 if self._resp_of(number) == 3 else 42), what

    def _resp_of(self, number: int) -> int:
        return 3 if self.sent[number].reply[0] == 37 else 2

    def _states_since(self, sent: Sent, key: bytes, lower: int) -> set[bool]:
        """Whether the key was there at the owner, at the times between the request and its reply."""
        versions = self.cluster.versions[key]
        found = set()
        for place, version in enumerate(versions):
            is_last = place + 1 == len(versions)
            if version.step > sent.replied or (not is_last and versions[place + 1].step <= sent.step):
                continue
            if place >= lower:
                found.add(version.is_there)
        return found

    def _check_read(
        self, sent: Sent, key: bytes, read: int | None, newest: dict[bytes, int], what: str
    ) -> None:
        versions = self.cluster.versions[key]
        lower = 0
        if sent.level in FRESH:
            lower = sent.known[key]
        if sent.level in OWN:
            lower = max(lower, newest.get(key, 0))
        if read is None:
            assert False in self._states_since(sent, key, lower), f"absent is wrong: {what}"
            return
        assert read >= lower, f"it should show version {lower} of {key!r}: {what}"
        assert versions[read].step <= sent.replied
        if sent.level in BOUNDS and read + 1 < len(versions):
            age = sent.replied_at - versions[read + 1].time
            assert age <= BOUNDS[sent.level] + 1e-6, f"{age} s too old: {what}"
        newest[key] = max(newest.get(key, 0), read)


# -- histories

WRITTEN = (("send", 3, [("set", 0)]), ("run all",), ("apply all",), ("sample",))
# A read without a stamp among those with one, whose replica cannot prove anything.
MIXED_LEVELS = [*WRITTEN, ("sync", 0), ("together", [("get", 0)]), ("run all",)]
# A write behind the read that asks for a floor, and a replica that lags.
WRITE_BEHIND_A_READ = [
    *WRITTEN,
    *(("send", 0, [("get", 0), ("eval", 0)]), ("run all",), ("run all",), ("run all",)),
    *(("send", 0, [("get", 0)]), ("run all",)),
]

PLACES = st.integers(0, 3)
CLIENT = st.integers(0, CLIENTS - 1)
NODE = st.integers(0, NODES * (1 + REPLICAS_MAX) - 1)
REPLICA = st.integers(0, NODES * REPLICAS_MAX - 1)
KINDS = st.sampled_from(
    [
        *("get", "get", "get", "mget", "sinter", "exists"),
        *("set", "eval", "del", "mset", "exec set", "exec get"),
        *("ping", "hello", *LEVELS),
    ]
)
STEP = st.one_of(
    st.tuples(st.just("send"), CLIENT, st.lists(st.tuples(KINDS, PLACES), min_size=1, max_size=5)),
    st.tuples(st.just("send"), CLIENT, st.lists(st.tuples(KINDS, PLACES), min_size=1, max_size=5)),
    st.tuples(st.just("together"), st.lists(st.tuples(KINDS, PLACES), min_size=1, max_size=3)),
    st.tuples(st.just("together"), st.lists(st.tuples(st.just("get"), PLACES), min_size=1, max_size=2)),
    st.tuples(st.just("run"), NODE, st.integers(1, 6), st.booleans()),
    st.tuples(st.just("run"), NODE, st.integers(1, 6), st.booleans()),
    st.tuples(st.just("run all")),
    st.tuples(st.just("apply"), REPLICA, st.integers(1, 3)),
    st.tuples(st.just("apply all")),
    st.tuples(st.just("turn")),
    st.tuples(st.just("sample")),
    st.tuples(st.just("flux"), PLACES),
    st.tuples(st.just("hand over"), PLACES, st.integers(0, NODES - 1)),
    st.tuples(st.just("see")),
    st.tuples(st.just("lose"), NODE, st.integers(0, 5)),
    st.tuples(st.just("sync"), REPLICA),
    st.tuples(st.just("history"), st.integers(0, NODES - 1)),
    st.tuples(st.just("leave"), CLIENT),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 0.03, 0.2])),
)


async def play(replicas: int, levels: list[str], steps: list[tuple]) -> None:  # type: ignore[type-arg]
    async with world_of(NODES, replicas=replicas) as world:
        for one in world.replicas.replicas():
            one.set_stage(Stage.READABLE)
        cluster = ModelCluster(world)
        told = dict.fromkeys(cluster.keys, 0)
        clients = [ModelClient(index, cluster, told) for index in range(CLIENTS)]
        gone: set[int] = set()
        for index, level in enumerate(levels):
            clients[index].send([(level, 0)])
        await world.settle()
        cluster.sample()

        def take() -> None:
            for client in clients:
                client.take()

        for step in steps:
            cluster.step += 1
            match step:
                case ("send", who, kinds):
                    if who not in gone:
                        clients[who].send(kinds)
                case ("together", kinds):
                    world.hub._in_turn = True
                    received = [client for index, client in enumerate(clients) if index not in gone]
                    for client in received:
                        client.client.send = client.client.connection.receive  # type: ignore[method-assign]
                        client.send(kinds)
                        del client.client.send
                    world.hub.flush()
                case ("run", index, count, is_last_first):
                    cluster.run(index, count, is_last_first=is_last_first)
                case ("run all",):
                    for index in range(len(cluster.all_nodes)):
                        cluster.run(index, 1000)
                    await world.settle()
                case ("apply", index, count):
                    cluster.apply(index, count)
                case ("apply all",):
                    for index in range(NODES * replicas):
                        cluster.apply(index, 1000)
                case ("turn",):
                    await world.settle()
                case ("sample",):
                    cluster.sample()
                case ("flux", place):
                    slot = slot_of(cluster.keys[place])
                    if world.migrations.pop(slot, None) is None:
                        world.migrations[slot] = (world.owners[slot], 1 - world.owners[slot])
                case ("hand over", place, target):
                    cluster.hand_over(slot_of(cluster.keys[place]), target)
                case ("see",):
                    world.see()
                case ("lose", index, executed):
                    cluster.lose(index, executed)
                case ("sync", index):
                    cluster.syncing ^= {index}
                case ("history", index):
                    cluster.begin_history(index)
                case ("leave", who):
                    if who == CLIENTS - 1:
                        take()
                        gone.add(who)
                        clients[who].client.connection.close("left")
                        del clients[who].sent[clients[who].answered :]
                case ("wait", seconds):
                    await world.settle()
                    take()
                    await trio.sleep(seconds)
                    world.replicas.settle(trio.current_time())
                    for one in world.replicas.replicas():
                        one.set_stage(Stage.READABLE)
            take()
        began = trio.current_time()
        while any(
            client.client.connection.slots or client.client.connection._unread_bytes for client in clients
        ):
            await world.settle()
            take()
            if not sum(cluster.run(index, 1000) for index in range(len(cluster.all_nodes))):
                await trio.sleep(0.02)
            assert trio.current_time() - began < WAIT_SECONDS_MAX, "a client was left without replies"
        await world.settle()
        take()
        assert world.hub.faults_total == 0
        reads = world.exchange.reads
        assert not reads._groups
        for client in clients:
            client.check()
        for _ in range(10):
            for index in range(len(cluster.all_nodes)):
                cluster.run(index, 1000)
            await world.settle()
        assert not reads._asking


@given(
    st.integers(1, REPLICAS_MAX),
    st.lists(st.sampled_from([*LEVELS]), min_size=CLIENTS, max_size=CLIENTS),
    st.lists(STEP, max_size=40),
)
@example(1, ["bounded", "eventual", "tight", "strong"], MIXED_LEVELS)
@example(1, ["session", "strong", "strong", "strong"], WRITE_BEHIND_A_READ)
@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_histories(replicas: int, levels: list[str], steps: list[tuple]) -> None:  # type: ignore[type-arg]
    trio.run(play, replicas, levels, steps, clock=MockClock(autojump_threshold=0))
