"""The readiness hub: every plain TCP socket, client and upstream, in one poll set that one Trio task awaits.

When the set is ready the task polls it once with no wait and runs a *turn*: every ready socket is read and its
bytes handled, which queues bytes on other endpoints; then every endpoint that has something to send is flushed
once. Nothing in a turn awaits, so a turn is one synchronous step to every Trio task, and what a turn queues on an
upstream connection for one client cannot be interleaved with another's.

The hub owns the poll set and the list of endpoints to flush. It never parses and never decides.

Invariants
- An endpoint is registered from ``add`` until ``remove``; after ``remove`` the hub calls it no more.
- ``dirty`` endpoints are flushed before control returns to Trio, also when a task and not a turn made them so
  (``touched`` flushes at once outside a turn).
- A fault in one endpoint's handler ends that endpoint, is logged with its traceback, and ends no other.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import trio

from proxy.log import get_logger

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANGUP = select.EPOLLRDHUP
EVENTS_PER_TURN_MAX = 1024  # bounds a turn, so that Trio's other tasks run between two
TURNS_PER_WAKE_MAX = 8  # when sockets are ready again at once, go on without a trip through Trio's scheduler

RECEIVE_BYTES = 256 * 1024  # the most that one socket is read in a turn

# linux/tcp.h, struct tcp_info: milliseconds since data came last. It is counted in ticks of the coarse clock.
_LAST_DATA_RECEIVED = struct.Struct("=52xI")
_CLOCK_MONOTONIC_COARSE = 6  # linux/time.h; the module time has no name for it
TICK_SECONDS = time.clock_getres(_CLOCK_MONOTONIC_COARSE)

log = get_logger(__name__)

# What is received stands here before its bytes are copied out. Letting recv allocate would map and unmap pages each
# time, for a few bytes. One buffer serves all, because a turn is one synchronous step of one thread.
_received = memoryview(bytearray(RECEIVE_BYTES))


def receive(sock: socket.socket, size_max: int = RECEIVE_BYTES) -> bytes:
    """What waits in a non-blocking socket, at most ``size_max`` bytes; b"" at its end.

    Raises BlockingIOError when nothing waits, and OSError.
    """
    return _received[: sock.recv_into(_received, size_max)].tobytes()


class Flushable(Protocol):
    """Something with output to send at the end of the turn. ``dirty`` is true while it is in the hub's list."""

    dirty: bool

    def flush(self) -> None: ...

    def on_fault(self, error: Exception) -> None: ...


class Endpoint(ABC):
    """A socket in the hub and what to do when it is ready. Handlers are synchronous and never block."""

    sock: socket.socket
    interest: int = READ  # the events the hub watches for: READ, WRITE, HANGUP

    @abstractmethod
    def on_readable(self) -> None:
        """Bytes, an end of stream or an error wait in the socket."""

    @abstractmethod
    def on_writable(self) -> None:
        """The socket takes bytes again; called only while WRITE is in ``interest``."""

    @abstractmethod
    def on_fault(self, error: Exception) -> None:
        """A handler raised, which is a bug: release everything that waits for this endpoint."""


class Hub:
    """See the module's text. One per proxy; not thread-safe."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self.clock = clock
        self._poll = select.epoll()
        self._endpoints: dict[int, Endpoint] = {}  # file descriptor -> endpoint
        self.dirty: list[Flushable] = []
        self.turns_total = 0
        self.step = 0  # which synchronous step this is: a turn, or what a task did outside of one
        self.now = 0.0  # the clock as the last turn began
        self.late_seconds = 0.0  # what it found ready had been so for this long at most
        self.faults_total = 0
        self._in_turn = False
        self._was_idle = True

    def add(self, endpoint: Endpoint) -> None:
        """Watch ``endpoint.sock``, which must be non-blocking, for ``endpoint.interest``."""
        fd = endpoint.sock.fileno()
        self._poll.register(fd, endpoint.interest)
        self._endpoints[fd] = endpoint

    def remove(self, endpoint: Endpoint) -> None:
        """Stop watching. Call before the socket is closed."""
        fd = endpoint.sock.fileno()
        if self._endpoints.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def watch(self, endpoint: Endpoint, interest: int) -> None:
        """Change what the hub watches for; does nothing when it is the same or the endpoint was removed."""
        if interest != endpoint.interest:
            endpoint.interest = interest
            fd = endpoint.sock.fileno()
            if fd in self._endpoints:
                self._poll.modify(fd, interest)

    def touched(self, item: Flushable) -> None:
        """``item`` has output: flush it at the end of the turn, or now when no turn runs."""
        if not item.dirty:
            item.dirty = True
            self.dirty.append(item)
        if not self._in_turn:
            self.step += 1
            self.flush()

    def flush(self) -> None:
        """Flush all that is dirty, and what that makes dirty, until nothing is."""
        self._in_turn = True
        try:
            while self.dirty:
                batch, self.dirty[:] = self.dirty[:], []
                for item in batch:
                    item.dirty = False
                    try:
                        item.flush()
                    except Exception as error:
                        self._fault(item, error)
        finally:
            self._in_turn = False

    def late_with(self, sock: socket.socket) -> float:
        """For how many seconds at least what was just read there had been ready, as this process was busy or stopped.

        ``late_seconds`` knows of turns only. Other tasks, threads that hold the interpreter and other processes delay
        a turn too: the kernel knows when the bytes came, to a tick or two, which are not counted.
        """
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECEIVED.size)
        except OSError:  # no TCP
            return self.late_seconds
        milliseconds: int = _LAST_DATA_RECEIVED.unpack(info)[0]
        return max(self.late_seconds, milliseconds / 1000 - TICK_SECONDS - (self.clock() - self.now))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Cancellation takes effect between turns, never within one."""
        fd = self._poll.fileno()
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(fd)
            for _ in range(TURNS_PER_WAKE_MAX):
                if not self.turn():
                    break

    def turn(self) -> bool:
        """Handle what is ready now, then flush. Returns whether anything was ready."""
        ready = self._poll.poll(0, EVENTS_PER_TURN_MAX)
        if ready:
            now = self.clock()
            # After a turn with nothing to do it slept until something was ready.
            self.late_seconds = 0.0 if self._was_idle else now - self.now
            self.now = now
        self._was_idle = not ready
        endpoint_of = self._endpoints.get
        self._in_turn = True
        self.step += 1
        for fd, events in ready:
            endpoint = endpoint_of(fd)
            if endpoint is None:  # removed by an earlier handler of this turn
                continue
            try:
                if events & WRITE:
                    endpoint.on_writable()
                    if endpoint_of(fd) is not endpoint:  # it ended itself
                        continue
                if events & ~WRITE:
                    endpoint.on_readable()
            except Exception as error:
                self._fault(endpoint, error)
        self.turns_total += 1
        self.flush()
        return bool(ready)

    def close(self) -> None:
        """Close the poll set; the endpoints' sockets are their owners' to close."""
        self._poll.close()

    def _fault(self, item: Endpoint | Flushable, error: Exception) -> None:
        self.faults_total += 1
        log.exception("endpoint_fault", error=error, endpoint=type(item).__name__)
        try:
            item.on_fault(error)
        except Exception as second:
            log.exception("endpoint_fault_twice", error=second, endpoint=type(item).__name__)
