"""Opens a connection to a node: TCP, then the handshake, then into the hub.

The handshake is done on Trio before the hub sees the socket, so that every connection in the hub is ready for
requests. It authenticates, chooses the RESP version and names the connection after its proxy, so that operators and
other proxies can tell whose it is in CLIENT LIST. It learns the client id, by which the node can be told to end it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from proxy.hub import Hub
from proxy.protocol.encode import command
from proxy.protocol.replies import ReplyError, ServerError, decode, end_of_reply
from proxy.upstream.abandoned import ALL, Abandoned
from proxy.upstream.connection import NodeConnection, PushHandler
from proxy.upstream.load import NodeLoad
from routing.client_list import connection_name
from routing.topology import Address

KEEPALIVE_SECONDS = 30  # a node whose machine vanished is noticed within a minute, by who waits in BLPOP too


class ConnectError(Exception):
    """The node could not be reached or refused the handshake; the text says which node and why."""


@dataclass(frozen=True, slots=True)
class Dialer:
    """What every upstream connection of one proxy has in common."""

    hub: Hub
    username: str
    password: str
    connect_timeout_seconds: float
    unsent_bytes_max: int
    is_readonly: bool = False  # for replicas: they serve reads only after READONLY
    proxy_id: str = ""  # in the connections' name
    abandoned: Abandoned = field(default_factory=Abandoned)

    async def open(
        self,
        address: Address,
        *,
        resp: int = 2,
        on_closed: Callable[[NodeConnection, str], None] = lambda connection, reason: None,
        on_ready: Callable[[], None] = lambda: None,
        on_push: PushHandler | None = None,
        load: NodeLoad | None = None,
    ) -> NodeConnection:
        """A connection after its handshake, registered in the hub. Raises ConnectError.

        If cancelled, nothing is left open.
        """
        with trio.move_on_after(self.connect_timeout_seconds):
            sock = await self._connected(address)
            try:
                client_id = await self._handshake(sock, address, resp)
            except BaseException:
                sock.close()
                raise
            plain = socket.socket(fileno=sock.detach())
            plain.setblocking(False)
            return NodeConnection(
                self.hub,
                plain,
                address,
                unsent_bytes_max=self.unsent_bytes_max,
                on_closed=on_closed,
                on_ready=on_ready,
                on_push=on_push,
                client_id=client_id,
                abandoned=self.abandoned,
                only_reads=self.is_readonly,
                load=load,
            )
        raise ConnectError(f"{address} did not answer within {self.connect_timeout_seconds:g} s")

    async def _connected(self, address: Address) -> trio.socket.SocketType:
        try:
            found = await trio.socket.getaddrinfo(address.host, address.port, type=trio.socket.SOCK_STREAM)
        except OSError as error:
            raise ConnectError(f"{address}: the host name cannot be resolved: {error}") from error
        failure: OSError | None = None
        for family, kind, protocol, _, target in found:
            sock = trio.socket.socket(family, kind, protocol)
            try:
                sock.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
                sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_KEEPALIVE, 1)
                sock.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
                sock.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS // 3)
                sock.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPCNT, 3)
                await sock.connect(target)
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise ConnectError(f"{address}: {failure}") from failure

    async def _handshake(self, sock: trio.socket.SocketType, address: Address, resp: int) -> int:
        """The connection's client id; ALL from a node that does not tell, which only snapshots need."""
        steps = []
        if self.password:
            words = ["AUTH", *([self.username] if self.username else []), self.password]
            steps.append(("AUTH", command(*words)))
        if resp == 3:
            steps.append(("HELLO 3", command("HELLO", "3")))
        steps.append(("CLIENT SETNAME", command("CLIENT", "SETNAME", connection_name(self.proxy_id))))
        steps.append(("CLIENT ID", command("CLIENT", "ID")))
        if self.is_readonly:
            steps.append(("READONLY", command("READONLY")))
        received = b""
        client_id = ALL
        try:
            unsent = b"".join(frame for _, frame in steps)
            while unsent:
                unsent = unsent[await sock.send(unsent) :]
            for step, _ in steps:
                while (end := end_of_reply(received)) < 0:
                    data = await sock.recv(65536)
                    if not data:
                        raise ConnectError(f"{address} closed the connection during {step}")
                    received += data
                answer = decode(received[:end])
                received = received[end:]
                if step == "CLIENT ID":
                    client_id = answer if isinstance(answer, int) else ALL
                elif isinstance(answer, ServerError) and not str(answer).startswith("LOADING"):
                    raise ConnectError(f"{address} refused {step}: {answer}")
        except (OSError, ReplyError) as error:
            raise ConnectError(f"{address}: {error}") from error
        return client_id
