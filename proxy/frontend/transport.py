"""How a client connection's bytes travel: a plain TCP socket in the hub.

The connection itself is transport-free: it is given bytes, and writes bytes to a ``Transport``. TLS would be
another transport over the same connection.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Protocol

from proxy.hub import HANGUP, READ, WRITE, Endpoint, Hub

RECEIVE_BYTES = 64 * 1024


class Receiver(Protocol):
    """The connection above a transport."""

    def receive(self, data: bytes) -> None: ...

    def on_end(self) -> None:
        """The client sends nothing more; it may still read."""

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

    __slots__ = ("_backlog", "_is_open", "_paused", "hub", "interest", "receiver", "sock", "unsent_bytes")

    def __init__(self, hub: Hub, sock: socket.socket) -> None:
        self.hub = hub
        self.sock = sock
        self.receiver: Receiver  # set before ``open``
        self.interest = READ
        self.unsent_bytes = 0
        self._backlog: deque[bytes] | None = None  # what the kernel did not take; None while it takes all
        self._is_open = True
        self._paused = False

    def open(self, receiver: Receiver) -> None:
        """Begin to read."""
        self.receiver = receiver
        self.hub.add(self)

    def on_readable(self) -> None:
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(f"receive failed: {error}")
            return
        if data:
            self.receiver.receive(data)
        else:
            self.hub.watch(self, self.interest & ~(READ | HANGUP))
            self.receiver.on_end()

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
            self.hub.watch(self, self.interest & ~READ)

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self.hub.watch(self, self.interest | READ)

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
