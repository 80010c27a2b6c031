"""An admin port in a thread of its own, for commands, which block."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import trio

from proxy.admin.http import Route
from proxy.admin.server import AdminServer


@contextmanager
def admin_port(table: list[Route], token: str = "") -> Iterator[str]:
    """The address of an admin port that runs until the end of the block."""
    server = AdminServer(table, token=token)
    listening = socket.create_server(("127.0.0.1", 0))
    tokens: list[trio.lowlevel.TrioToken] = []

    async def serve() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        await server.serve([trio.SocketListener(trio.socket.from_stdlib_socket(listening))])

    thread = Thread(target=trio.run, args=(serve,))
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        tokens[0].run_sync_soon(server.stop)
        thread.join()
