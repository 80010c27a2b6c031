"""How a client connection's bytes travel: a plain TCP socket in the hub.

The connection itself is transport-free: it is given bytes, and writes bytes to a ``Transport``. TLS would be
another transport over the same connection.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from typing import Protocol

from proxy.hub import HANGUP, READ, WRITE, Endpoint, Hub, receive

RECEIVE_BYTES = 64 * 1024


class Receiver(Protocol):
    """The connection above a transport."""

    def receive(self, data: bytes) -> None: ...

    def on_end(self) -> None:
        """The client sends nothing more; it may still read."""

    def on_end_ahead(self) -> None:
        """While paused: behind the bytes that wait in the socket, the client sends nothing more."""

    def on_gone(self, reason: str) -> None:
        """The transport ended; nothing can be written any more."""

    def on_sent(self) -> None:
        """Unsent bytes became fewer."""

    def on_fault(self, error: Exception) -> None: ...


class Transport(Protocol):
    """What a client connection writes to."""

    unsent_bytes: int

    def write(self, data: bytes) -> None:
        """Send, or keep what cannot be sent yet."""

    def pause(self) -> None:
        """Hand over no more bytes until ``resume``."""

    def resume(self) -> None: ...

    def close(self) -> None:
        """Close at once; what is unsent is lost."""


class TcpTransport(Endpoint):
    """A client's plain TCP socket in the hub."""

    __slots__ = (
        "_backlog",
        "_is_open",
        "_paused",
        "_saw_end",
        "hub",
        "interest",
        "receiver",
        "sock",
        "unsent_bytes",
    )

    def __init__(self, hub: Hub, sock: socket.socket) -> None:
        self.hub = hub
        self.sock = sock
        self.receiver: Receiver  # set before ``open``
        self.interest = READ
        self.unsent_bytes = 0
        self._backlog: deque[bytes] | None = None  # what the kernel did not take; None while it takes all
        self._is_open = True
        self._paused = False
        self._saw_end = False

    def open(self, receiver: Receiver) -> None:
        """Begin to read."""
        self.receiver = receiver
        self.hub.add(self)

    def on_readable(self) -> None:
        if self._paused or self._saw_end:
            self._on_hangup()
            return
        try:
            data = receive(self.sock, RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(f"receive failed: {error}")
            return
        if data:
            self.receiver.receive(data)
        else:
            self._saw_end = True
            self.hub.watch(self, self.interest & ~READ)
            self.receiver.on_end()

    def _on_hangup(self) -> None:
        """An event while nothing is read: the connection broke, or a paused client shut down its side.

        A broken one is reported until it is closed, and after an end of stream reading it shows no error.
        """
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        events = poll.poll(0)
        if not events:  # of bytes that came before the pause
            return
        if events[0][1] & (select.POLLHUP | select.POLLERR):
            self._end("the client reset the connection")
        elif not self._saw_end:
            self.hub.watch(self, self.interest & ~HANGUP)
            self.receiver.on_end_ahead()

    def write(self, data: bytes) -> None:
        if self._backlog is not None:
            self._backlog.append(data)
            self.unsent_bytes += len(data)
            return
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._end(f"send failed: {error}")
            return
        if sent != len(data):
            self._backlog = deque((data[sent:],))
            self.unsent_bytes = len(data) - sent
            self.hub.watch(self, self.interest | WRITE)

    def on_writable(self) -> None:
        backlog = self._backlog
        if backlog is None:
            return
        try:
            while backlog:
                sent = self.sock.send(backlog[0])
                self.unsent_bytes -= sent
                if sent != len(backlog[0]):
                    backlog[0] = backlog[0][sent:]
                    break
                backlog.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._end(f"send failed: {error}")
            return
        if not backlog:
            self._backlog = None
            self.hub.watch(self, self.interest & ~WRITE)
        self.receiver.on_sent()

    def pause(self) -> None:
        if not self._paused:
            self._paused = True
            if not self._saw_end:
                self.hub.watch(self, self.interest & ~READ | HANGUP)

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if not self._saw_end:
                self.hub.watch(self, self.interest & ~HANGUP | READ)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self.hub.remove(self)
            self.sock.close()

    def on_fault(self, error: Exception) -> None:
        self.receiver.on_fault(error)

    def _end(self, reason: str) -> None:
        self.close()
        self.receiver.on_gone(reason)
