"""A listening socket in the hub: accepts clients and gives each a connection."""

from __future__ import annotations

import socket

from proxy.exchange.exchange import Exchange
from proxy.frontend.client import ClientConnection
from proxy.frontend.server import Server
from proxy.frontend.transport import TcpTransport
from proxy.hub import READ, Endpoint, Hub
from proxy.log import get_logger
from routing.levels import ReadLevel
from routing.priority import Priority
from routing.topology import Address

KEEPALIVE_SECONDS = 300  # as Redis: a client whose machine vanished, in a blocking command say, is noticed
ACCEPTS_PER_TURN = 64  # so that a storm of connects leaves room for the clients that are there
BACKLOG = 4096
TOO_MANY_CLIENTS = b"-ERR max number of clients reached\r\n"

log = get_logger(__name__)


class Listener(Endpoint):
    """One address that services connect to."""

    def __init__(
        self,
        hub: Hub,
        server: Server,
        exchange: Exchange,
        address: Address,
        level: ReadLevel | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> None:
        self.hub = hub
        self.address = address
        self.interest = READ
        self._server = server
        self._exchange = exchange
        self._is_open = False
        self._priority = priority
        self._level = level  # that reads of its clients get who ask for none; None: auto

    def open(self) -> None:
        """Listen. Raises OSError; port 0 takes a free one, and ``address`` says which."""
        family = socket.AF_INET6 if ":" in self.address.host else socket.AF_INET
        self.sock = socket.create_server(tuple(self.address), family=family, backlog=BACKLOG)
        self.sock.setblocking(False)
        self.address = Address(self.address.host, self.sock.getsockname()[1])
        self._is_open = True
        self.hub.add(self)

    def on_readable(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, peer = self.sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:  # no file descriptors left: they wait in the backlog
                log.error("accept_failed", listener=self.address, error=error)
                self.hub.watch(self, 0)  # else it is ready again at once, in every turn
                return
            self._welcome(sock, Address(*peer[:2]))

    def _welcome(self, sock: socket.socket, peer: Address) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS // 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        if self._server.client_count >= self._server.settings.clients.connections_max:
            self._server.rejected_total += 1
            try:
                sock.send(TOO_MANY_CLIENTS)
            except OSError as error:
                log.debug("rejected_client_gone", error=error)
            sock.close()
            return
        transport = TcpTransport(self.hub, sock)
        client = ClientConnection(
            self._server,
            self._exchange,
            transport,
            str(peer),
            str(self.address),
            self._level,
            self._priority,
        )
        self._server.add(client)
        transport.open(client)

    def resume(self) -> None:
        """Accept again, if it stopped because it could not. Called each second."""
        self.hub.watch(self, READ)

    def on_writable(self) -> None:
        """Never called: a listener is watched for readers only."""

    def on_fault(self, error: Exception) -> None:
        """A client that could not be welcomed is lost; the listener goes on."""

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self.hub.remove(self)
            self.sock.close()
