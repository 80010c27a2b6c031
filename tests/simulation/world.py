"""Virtual time, a network with delays, and what the real proxy touches of the operating system: hub and sockets.

Nothing happens by itself: the world keeps a queue of events, and Trio's clock jumps to the next one when every task
waits. What arrives at a proxy at one moment is one turn of its hub. All delays and choices come from one seed.
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf
from typing import TYPE_CHECKING, Any
from zlib import crc32

import trio
import trio._core._run as trio_run
from trio.testing import MockClock

import proxy.upstream.connect
from proxy.hub import READ, Endpoint, Hub
from proxy.protocol import requests
from proxy.snapshots.histories import Standing
from proxy.upstream.connect import ConnectError, Dialer
from routing.topology import Address, TopologyView
from tests.simulation.ledger import EPOCH_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.cluster import Cluster, Peer, ServerNode

TICK_SECONDS = (
    0.0001  # messages arrive at whole ticks: those that arrive together cost less, and share a turn
)
EVENTS_MAX = 400_000  # of one history: more means that something goes round in a circle


class SimClock:
    """Trio's clock, which stands still while any task can run and then jumps to what comes next."""

    def __init__(self) -> None:
        self.time = 0.0
        self.world: World | None = None
        clock: Any = MockClock(autojump_threshold=0)  # the one kind of clock that Trio lets jump
        clock.current_time = lambda: self.time
        clock.deadline_to_sleep_time = lambda deadline: 0.0 if deadline <= self.time else 999_999_999.0
        clock._autojump = self._autojump
        self.of_trio: MockClock = clock

    def _autojump(self) -> None:
        deadline = trio_run.GLOBAL_RUN_CONTEXT.runner.deadlines.next_deadline()
        at = self.world.next_at() if self.world is not None else inf
        if at <= deadline and self.world is not None:
            assert at < inf, "every task waits, and nothing will ever happen"
            self.time = max(self.time, at)
            self.world.run_due()
        else:
            self.time = max(self.time, deadline)


class World:
    """See the module's text."""

    def __init__(self, seed: int, clock: SimClock) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.clock = clock
        clock.world = self
        self.cluster: Cluster
        self.hubs: list[SimHub] = []
        self.on_fault: Callable[[Exception], None] = lambda error: None  # a handler of a proxy's hub raised
        self.trace = 0  # a checksum of all that was sent and when
        self.log: list[str] | None = None  # what happened, for a history that is looked at
        self.events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = 0
        self._sockets = 0

    @property
    def now(self) -> float:
        return self.clock.time

    def now_ms(self) -> int:
        return int((EPOCH_SECONDS + self.clock.time) * 1000)

    def unix_seconds(self) -> float:
        return EPOCH_SECONDS + self.clock.time

    def token(self) -> str:
        return f"{self.rng.getrandbits(160):040x}"

    def later(self, delay: float, act: Callable[[], None]) -> None:
        self.at(self.clock.time + delay, act)

    def at(self, moment: float, act: Callable[[], None]) -> None:
        self._numbers += 1
        heappush(self._queue, (moment, self._numbers, act))

    def next_at(self) -> float:
        return self._queue[0][0] if self._queue else inf

    def run_due(self) -> None:
        """What is due now, then a turn of each hub that has something to read."""
        queue, now = self._queue, self.clock.time
        while queue and queue[0][0] <= now:
            self.events += 1
            heappop(queue)[2]()
        assert self.events < EVENTS_MAX, "too many events: something goes round in a circle"
        for hub in self.hubs:
            if hub.ready:
                hub.turn()

    def latency(self) -> float:
        """Of one message. Mostly short, now and then long."""
        rng = self.rng
        if rng.random() < 0.03:
            return rng.uniform(0.001, 0.02)
        return rng.uniform(0.00005, 0.0008)

    def note(self, what: str, data: bytes) -> None:
        """A message arrived."""
        self.trace = crc32(data, crc32(b"%.9f" % self.clock.time, self.trace))
        if self.log is not None:
            self.log.append(f"{self.clock.time:9.5f} {what} {data[:300]!r}")

    def tell(self, text: str) -> None:
        """Something happened, for who reads the log."""
        self.trace = crc32(text.encode(), self.trace)
        if self.log is not None:
            self.log.append(f"{self.clock.time:9.5f} {text}")

    def next_socket(self) -> int:
        self._sockets += 1
        return self._sockets


class Pipe:
    """One direction of a connection: what is sent arrives later, and in the order sent."""

    __slots__ = ("_arrives_at", "deliver", "world")

    def __init__(self, world: World, deliver: Callable[[bytes | None], None]) -> None:
        self.world = world
        self.deliver = deliver
        self._arrives_at = 0.0

    def hold_up(self, seconds: float) -> None:
        self._arrives_at = max(self._arrives_at, self.world.now + seconds)

    def send(self, data: bytes | None) -> None:
        """None: the end."""
        arrives_at = ceil((self.world.now + self.world.latency()) / TICK_SECONDS) * TICK_SECONDS
        self._arrives_at = max(self._arrives_at, arrives_at)
        self.world.at(self._arrives_at, lambda: self.deliver(data))


class SimHub(Hub):
    """The real hub's turns, without a poll set: the world says which sockets are ready."""

    def __init__(self, world: World) -> None:
        self._by_number: dict[int, Endpoint] = {}
        self.dirty = []
        self.turns_total = self.step = 0
        self.faults_total = 0
        self._in_turn = False
        self.clock = trio.current_time
        self.late_seconds = 0.0
        self.ready: dict[int, None] = {}  # numbers of sockets, in the order in which they became so
        self.sockets: list[SimSocket] = []  # all that were ever connected
        self.is_dead = False
        world.hubs.append(self)
        self._world = world

    def add(self, endpoint: Endpoint) -> None:
        number = endpoint.sock.fileno()
        self._by_number[number] = endpoint
        if endpoint.sock.has_input:  # type: ignore[attr-defined]
            self.wake(number)

    def remove(self, endpoint: Endpoint) -> None:
        self._by_number.pop(endpoint.sock.fileno(), None)

    def watch(self, endpoint: Endpoint, interest: int) -> None:
        endpoint.interest = interest

    def wake(self, number: int) -> None:
        """A socket became readable: at the end of this moment there is a turn."""
        self.ready[number] = None

    def late_with(self, sock: Any) -> float:
        return 0.0

    @property
    def now(self) -> float:  # type: ignore[override]  # time stands still within a turn
        return self.clock()

    def turn(self) -> bool:
        ready, self.ready = list(self.ready), {}
        self._in_turn = True
        self.step += 1
        for number in ready:
            endpoint = self._by_number.get(number)
            if endpoint is None or not endpoint.interest & READ:
                continue
            try:
                endpoint.on_readable()
            except Exception as error:
                self._fault(endpoint, error)
        self.turns_total += 1
        self.flush()
        return bool(ready)

    def in_turn(self, act: Callable[[], None]) -> None:
        """Run something as part of a turn."""
        self._in_turn = True
        self.step += 1
        try:
            act()
        finally:
            self.flush()

    def die(self) -> None:
        """The process is gone: the kernel closes its sockets, and nothing more is read or sent."""
        self._by_number.clear()
        self.ready.clear()
        for sock in self.sockets:
            sock.close()
        self.is_dead = True
        self._world.hubs.remove(self)

    def close(self) -> None:
        pass

    def _fault(self, item: Any, error: Exception) -> None:
        self._world.on_fault(error)
        super()._fault(item, error)


class SimSocket:
    """A proxy's end of a connection to a node: what a socket is to the hub, and to Trio during the handshake."""

    def __init__(self, world: World, hub: SimHub, node: ServerNode, name: str) -> None:
        self.world = world
        self.hub = hub
        self.node = node
        self.name = f"{name}->{node.index}"
        self._number = world.next_socket()
        hub.sockets.append(self)
        self._inbox: deque[bytes] = deque()
        self._is_ended = self._is_reset = self._is_closed = False
        self._news = trio.Event()
        self._in = Pipe(world, self._arrived)
        self._out = Pipe(world, self._reached)
        self.peer: Peer = node.connect(self._in.send, lambda: self._in.send(None), f"{name}:{self._number}")

    # -- the network

    def _reached(self, data: bytes | None) -> None:
        if data is None:
            self.node.on_closed(self.peer)
        else:
            self.world.note(self.name, data)
            self.node.receive(self.peer, data)

    def _arrived(self, data: bytes | None) -> None:
        if self._is_closed:
            return
        if data is None:
            self._is_ended = True
        else:
            self.world.note(f"{self.name} reply", data)
            self._inbox.append(data)
        self._news.set()
        self._news = trio.Event()
        self.hub.wake(self._number)

    @property
    def is_open(self) -> bool:
        return not self._is_closed and not self._is_ended

    def hold_up(self, seconds: float) -> None:
        """What is sent from now on arrives no sooner than after this time, also if the socket is closed meanwhile."""
        self._out.hold_up(seconds)

    @property
    def has_input(self) -> bool:
        return bool(self._inbox) or self._is_ended

    # -- for the hub

    def fileno(self) -> int:
        return self._number

    def recv_into(self, buffer: memoryview, size: int) -> int:
        if not self._inbox:
            if self._is_ended:
                return 0
            raise BlockingIOError
        data = b"".join(self._inbox)
        self._inbox.clear()
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._out.send(None)

    def setblocking(self, flag: bool) -> None:
        pass

    # -- for the handshake, and for the hub when it is not awaited

    def detach(self) -> SimSocket:
        return self

    def send(self, data: bytes) -> Any:
        if self._is_closed or self._is_ended:
            raise OSError("the connection is closed")
        self._out.send(data)
        return _Sent(len(data))

    async def recv(self, size: int) -> bytes:
        while not self._inbox and not self._is_ended:
            await self._news.wait()
        return self._inbox.popleft() if self._inbox else b""


async def _checkpoint() -> None:
    await trio.lowlevel.checkpoint()


class _Sent(int):
    """How much was sent, for the hub; it may be awaited too, as by the handshake."""

    def __await__(self) -> Iterator[Any]:
        yield from _checkpoint().__await__()
        return int(self)  # type: ignore[return-value]


@dataclass(frozen=True)
class SimDialer(Dialer):
    """The real handshake, over the simulated network."""

    world: World = None  # type: ignore[assignment]
    name: str = "proxy"

    async def _connected(self, address: Address) -> Any:
        await trio.sleep(self.world.latency())
        node = self.world.cluster.node_at(address)
        if node is None or not node.is_up:
            raise ConnectError(f"{address}: refused")
        assert isinstance(self.hub, SimHub)
        return SimSocket(self.world, self.hub, node, self.name)


@contextmanager
def simulated_sockets() -> Iterator[None]:
    """What the dialer makes of a connected socket is the simulated one."""
    module: Any = proxy.upstream.connect
    real = module.socket
    module.socket = types.SimpleNamespace(socket=lambda fileno: fileno)
    try:
        yield
    finally:
        module.socket = real


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Trio's scheduler and the proxy's own randomness come from the seed, too."""
    run: Any = trio_run
    was_deterministic, state = run._ALLOW_DETERMINISTIC_SCHEDULING, random.getstate()
    run._ALLOW_DETERMINISTIC_SCHEDULING = True
    standing_of, standings = Standing.of, {}

    def remembered(view: TopologyView, address: Address) -> Standing | None:
        """It depends on nothing else, and half of a history's time would go into it."""
        found = standings.get((id(view), address))
        if found is None:
            found = standings[id(view), address] = (view, standing_of(view, address))
        return found[1]

    Standing.of = staticmethod(remembered)  # type: ignore[method-assign]
    run._r.seed(seed)
    requests._prefixes.clear()  # what was remembered of earlier histories would change how this one's requests are read
    random.seed(seed)
    try:
        yield
    finally:
        run._ALLOW_DETERMINISTIC_SCHEDULING = was_deterministic
        Standing.of = staticmethod(standing_of)  # type: ignore[method-assign]
        random.setstate(state)
