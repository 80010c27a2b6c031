"""An open-loop load of several streams, and what became of each request.

Requests arrive by a Poisson process whose rate no reply slows. Each goes out on a connection that has nothing in
flight; if there is none it waits at the client. Latency counts from the moment the request was due, so a wait at the
client, or a load that is late itself, is never left out (coordinated omission). A client gives up ``deadline_seconds``
after that moment, as services do. What it has not sent then it never sends; a connection that still owes it a reply
stays busy until that comes, as in clients that share connections. So an overload makes no storm of new connections
here, which would be another overload than the one that is measured.

One thread serves all connections, for a core that is shared. Arrivals are timed by select(2) on the epoll's own file
descriptor, because epoll rounds up to a millisecond.

Values name their key and version, and every reply is judged: a read shows at least the newest version that was
acknowledged before it was due, and none that was never sent.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from random import Random
from typing import NamedTuple

from proxy.protocol.encode import command
from proxy.protocol.replies import end_of_reply

RETRY_AFTER = re.compile(rb"^-OVERLOADED .*; retry after (\d+) ms\r\n$")
RECEIVE_BYTES = 65536
LOOK_SECONDS = 0.01  # how late a deadline may be noticed
OK = b"+OK\r\n"


class Outcome(IntEnum):
    ANSWERED = 0
    SHED = 1  # OVERLOADED
    TIMED_OUT = 2  # the client gave up
    FAILED = 3  # any other error, or the connection ended
    WRONG = 4  # a value that no correct server could have given


@dataclass(frozen=True, slots=True)
class Stream:
    """Services of one kind. Their reads are ``words`` with a key in between; writes are SET."""

    name: str
    priority: str  # for STEADY.PRIORITY; "": what the proxy gives by default
    connections: int
    keys: Sequence[bytes]
    before_key: Sequence[bytes | int] = (b"GET",)
    after_key: Sequence[bytes | int] = ()
    write_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    seconds: float
    rates: Sequence[float]  # requests per second of each stream


class Sample(NamedTuple):
    """One request. Times are seconds since the load began."""

    phase: int
    stream: int
    due: float
    ended: float
    outcome: Outcome
    retry_ms: int  # what a shed one was told; -1 if nothing that can be read


class Values:
    """What each key may show. One write of a key at a time; one without a known outcome is its last."""

    def __init__(self) -> None:
        self._acknowledged: dict[bytes, int] = {}  # key -> version
        self._sent: dict[bytes, int] = {}

    def prefilled(self, key: bytes) -> bytes:
        """The value with which the key begins."""
        self._acknowledged[key] = self._sent[key] = 0
        return b"%b|0" % key

    def begin_write(self, key: bytes) -> bytes | None:
        """The next value; None while another is on its way, or may be."""
        if self._sent[key] != self._acknowledged[key]:
            return None
        self._sent[key] += 1
        return b"%b|%d" % (key, self._sent[key])

    def acknowledge(self, key: bytes) -> None:
        self._acknowledged[key] = self._sent[key]

    def refuse(self, key: bytes) -> None:
        """It was not done, and will not be."""
        self._sent[key] -= 1

    def floor(self, key: bytes) -> int:
        return self._acknowledged[key]

    def is_right(self, key: bytes, reply: bytes, floor: int) -> bool:
        """``reply`` is a bulk string's frame; ``floor`` is of when it was asked for."""
        of_key, _, version = reply.split(b"\r\n")[1].rpartition(b"|")
        return of_key == key and version.isdigit() and floor <= int(version) <= self._sent[key]


@dataclass(slots=True, eq=False)
class _Request:
    phase: int
    stream: int
    due: float
    key: bytes
    floor: int = 0
    is_write: bool = False
    is_over: bool = False


class _Connection:
    __slots__ = ("buffer", "greetings", "is_connected", "link", "request", "stream")

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.link: socket.socket
        self.request: _Request | None = None
        self.is_connected = False
        self.buffer = b""
        self.greetings = 0  # replies to come before the request's


class OpenLoop:
    """The load of some streams on one address. ``run`` once; ``samples`` and ``errors`` tell what happened."""

    def __init__(
        self,
        address: tuple[str, int],
        streams: Sequence[Stream],
        values: Values,
        deadline_seconds: float = 1.0,
        seed: int = 1,
    ) -> None:
        self.samples: list[Sample] = []
        self.errors = Counter[str]()  # text of what is neither an answer nor OVERLOADED
        self.priorities_refused = ""  # why, if the proxy does not know STEADY.PRIORITY
        self.began = 0.0  # by the monotonic clock
        self._address = address
        self._streams = streams
        self._values = values
        self._deadline_seconds = deadline_seconds
        self._random = Random(seed)
        self._epoll = select.epoll()
        self._by_fd: dict[int, _Connection] = {}
        self._idle: list[list[_Connection]] = [[] for _ in streams]
        self._queued: list[deque[_Request]] = [deque() for _ in streams]
        self._sent: list[deque[_Request]] = [deque() for _ in streams]  # oldest first
        self._open_requests = 0

    def run(self, phases: Sequence[Phase]) -> None:
        """Returns when the last request has ended."""
        for number, stream in enumerate(self._streams):
            for _ in range(stream.connections):
                self._connect(_Connection(number))
        while sum(map(len, self._idle)) < sum(stream.connections for stream in self._streams):
            self._look()
        self.began = time.monotonic()
        arrivals = self._arrivals(phases)
        upcoming = next(arrivals, None)
        while upcoming is not None or self._open_requests:
            wait = LOOK_SECONDS if upcoming is None else min(LOOK_SECONDS, upcoming.due - self._now())
            if wait > 0:
                select.select([self._epoll], [], [], wait)
            self._look()
            now = self._now()
            while upcoming is not None and upcoming.due <= now:
                self._queued[upcoming.stream].append(upcoming)
                self._open_requests += 1
                upcoming = next(arrivals, None)
            self._give_up(now - self._deadline_seconds)
            for queue, idle in zip(self._queued, self._idle, strict=True):
                while queue and idle:
                    self._send(idle.pop(), queue.popleft())
        for connection in list(self._by_fd.values()):
            self._close(connection)
        self._epoll.close()

    def _now(self) -> float:
        return time.monotonic() - self.began

    def _arrivals(self, phases: Sequence[Phase]) -> Iterator[_Request]:
        random, numbers = self._random, range(len(self._streams))
        begin = 0.0
        for place, phase in enumerate(phases):
            total = sum(phase.rates)
            due = begin
            begin += phase.seconds
            while total and (due := due + random.expovariate(total)) < begin:
                (number,) = random.choices(numbers, phase.rates)
                yield _Request(place, number, due, random.choice(self._streams[number].keys))

    def _look(self) -> None:
        for fd, _ in self._epoll.poll(0):
            connection = self._by_fd[fd]
            if connection.is_connected:
                self._receive(connection)
            else:
                self._greet(connection)

    def _connect(self, connection: _Connection) -> None:
        """Without waiting: a proxy that accepts nobody for now keeps this connection waiting, and no other."""
        connection.link = socket.socket()
        connection.link.setblocking(False)
        connection.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.buffer = b""
        connection.greetings = 0
        connection.is_connected = False
        error = connection.link.connect_ex(self._address)
        if error != errno.EINPROGRESS:
            raise OSError(error, f"no connection to {self._address}: {os.strerror(error)}")
        self._by_fd[connection.link.fileno()] = connection
        self._epoll.register(connection.link, select.EPOLLOUT)

    def _greet(self, connection: _Connection) -> None:
        error = connection.link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, f"no connection to {self._address}: {os.strerror(error)}")
        connection.is_connected = True
        stream = self._streams[connection.stream]
        if stream.priority and not self.priorities_refused:
            connection.link.send(command("STEADY.PRIORITY", stream.priority.upper()))
            connection.greetings = 1
        self._epoll.modify(connection.link, select.EPOLLIN)
        self._idle[connection.stream].append(connection)

    def _close(self, connection: _Connection) -> None:
        del self._by_fd[connection.link.fileno()]
        self._epoll.unregister(connection.link)
        connection.link.close()

    def _send(self, connection: _Connection, request: _Request) -> None:
        stream, values = self._streams[request.stream], self._values
        request.floor = values.floor(request.key)
        frame = None
        if stream.write_share and self._random.random() < stream.write_share:
            value = values.begin_write(request.key)
            if value is not None:
                request.is_write = True
                frame = command(b"SET", request.key, value)
        if frame is None:
            frame = command(*stream.before_key, request.key, *stream.after_key)
        connection.request = request
        self._sent[request.stream].append(request)
        connection.link.send(frame)  # it fits: nothing else is on its way

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.link.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            data = b""
            self.errors[str(error)] += 1
        if not data:
            self.errors["closed by the proxy"] += 1
            self._reconnect(connection)
            return
        connection.buffer += data
        while connection.buffer and (end := end_of_reply(connection.buffer)) > 0:
            reply, connection.buffer = connection.buffer[:end], connection.buffer[end:]
            if connection.greetings:
                connection.greetings -= 1
                if reply != OK:
                    self.priorities_refused = reply.decode(errors="replace").strip()
                continue
            request, connection.request = connection.request, None
            assert request is not None, f"a reply that nobody asked for: {reply!r}"
            self._idle[connection.stream].append(connection)
            self._judge(request, reply)

    def _judge(self, request: _Request, reply: bytes) -> None:
        key, values = request.key, self._values
        outcome, retry_ms = Outcome.ANSWERED, -1
        if reply.startswith(b"-OVERLOADED"):
            outcome = Outcome.SHED
            said = RETRY_AFTER.match(reply)
            retry_ms = int(said[1]) if said else -1
            if request.is_write:
                values.refuse(key)
        elif reply[:1] == b"-":
            outcome = Outcome.FAILED
            self.errors[reply.decode(errors="replace").strip()[:200]] += 1
        elif request.is_write:
            values.acknowledge(key)
        elif reply[:1] != b"$" or reply[:2] == b"$-" or not values.is_right(key, reply, request.floor):
            outcome = Outcome.WRONG
            self.errors[f"wrong: {key!r}, floor {request.floor}: {reply[:80]!r}"] += 1
        self._end(request, outcome, retry_ms)

    def _end(self, request: _Request, outcome: Outcome, retry_ms: int = -1) -> None:
        if request.is_over:
            if outcome is not Outcome.WRONG:
                return  # too late for its client
        else:
            request.is_over = True
            self._open_requests -= 1
        self.samples.append(
            Sample(request.phase, request.stream, request.due, self._now(), outcome, retry_ms)
        )

    def _give_up(self, due_before: float) -> None:
        for queue, sent in zip(self._queued, self._sent, strict=True):
            for requests in (queue, sent):
                while requests and (requests[0].is_over or requests[0].due < due_before):
                    request = requests.popleft()
                    if not request.is_over:
                        self._end(request, Outcome.TIMED_OUT)

    def _reconnect(self, connection: _Connection) -> None:
        """A write on its way stays without an outcome, and its key is written no more."""
        self._close(connection)
        if connection.request is not None:
            self._end(connection.request, Outcome.FAILED)
            connection.request = None
        else:
            self._idle[connection.stream].remove(connection)
        self._connect(connection)


def closed_loop(address: tuple[str, int], frames: Sequence[bytes], connections: int, seconds: float) -> float:
    """Replies per second when each connection sends its next request with the last one's reply."""
    sockets = [socket.create_connection(address, timeout=10.0) for _ in range(connections)]
    random = Random(2)
    answered = 0
    with select.epoll() as epoll:
        by_fd = {each.fileno(): each for each in sockets}
        for each in sockets:
            epoll.register(each, select.EPOLLIN)
            each.sendall(random.choice(frames))
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds:
            for fd, _ in epoll.poll(0.1):
                data = by_fd[fd].recv(RECEIVE_BYTES)
                if data[:1] != b"$" or data[:2] == b"$-":
                    raise RuntimeError(f"the node answers {data!r}")
                answered += 1
                by_fd[fd].sendall(random.choice(frames))
    for each in sockets:
        each.close()
    return answered / elapsed
