"""Before a barrier: what may still write unseen is ended at the nodes.

Two kinds of connections may: those that this proxy abandoned (``proxy.upstream.abandoned``), and those of proxies
that are members no more, such as a predecessor that crashed. A node that answered CLIENT KILL has freed the client;
what is left in its socket, or on its way, is dropped by the kernel.

Client ids begin anew when a server restarts. So a client is killed only when it has this program's name, and none
that this proxy has open.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Set
from dataclasses import dataclass, field
from functools import partial

import trio

from proxy.log import get_logger
from proxy.protocol.encode import command
from proxy.protocol.replies import ServerError, decode
from proxy.upstream.abandoned import ALL, Abandoned, AbandonedConnection
from proxy.upstream.connect import ConnectError
from proxy.upstream.reply_slot import ConnectionLostError
from routing.client_list import (
    ClientListError,
    ListedClient,
    connection_name,
    is_of_this_program,
    parse_client_list,
)
from routing.topology import Address

LINES_PER_STEP = 1000  # clients read between two turns of the sockets: some milliseconds
CLIENT_LIST = command("CLIENT", "LIST")

# The raw reply of one node to one request, errors included; it may raise what is in ASK_FAILURES.
Ask = Callable[[Address, bytes], Awaitable[bytes]]
ASK_FAILURES = (ConnectError, ConnectionLostError, trio.TooSlowError)

log = get_logger(__name__)


@dataclass(slots=True)
class Strangers:
    """What ``kill_strangers`` did. ``found`` were killed, unless ``problems`` say otherwise. One sentence each."""

    found: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def kill_abandoned(
    abandoned: Abandoned, ask: Ask, is_primary: Callable[[Address], bool], own_id: str
) -> list[str]:
    """End what this proxy abandoned at nodes that are primaries. Why some could not be; [] when all are gone.

    At other addresses nothing can write; what is listed there stays listed, for the node may become a primary again.
    What is abandoned meanwhile shows in ``abandoned.added_total``. If cancelled, what is not known to be gone stays.
    """
    at: dict[Address, list[AbandonedConnection]] = {}
    for entry in abandoned.pending():
        if is_primary(entry.address):
            at.setdefault(entry.address, []).append(entry)
    problems: list[str] = []
    name = connection_name(own_id).encode()

    async def kill_at(address: Address, entries: list[AbandonedConnection]) -> None:
        ids = {entry.client_id for entry in entries}

        def is_meant(client: ListedClient) -> bool:
            return client.name == name and (ALL in ids or client.id in ids)

        question = CLIENT_LIST if ALL in ids else command("CLIENT", "LIST", "ID", *sorted(ids))
        found, problem = await _clients(ask, address, question, is_meant)
        for client in found:
            if not problem and not abandoned.is_open(address, client.id):
                problem = await _kill(ask, address, client)
        if problem:
            problems.append(f"a connection that this proxy gave up cannot be ended: {problem}")
            return
        for entry in entries:
            abandoned.remove(entry)

    async with trio.open_nursery() as nursery:
        for address, entries in at.items():
            nursery.start_soon(kill_at, address, entries)
    return problems


async def kill_strangers(ask: Ask, primaries: Iterable[Address], members: Set[str], own_id: str) -> Strangers:
    """End the connections to ``primaries`` that have this program's name and belong to no member.

    ``members`` are ids of proxies; this one need not be among them. If cancelled, some may have been ended.
    """
    known = names_of({*members, own_id})
    result = Strangers()

    async def kill_at(address: Address) -> None:
        found, problem = await _clients(ask, address, CLIENT_LIST, partial(is_stranger, known=known))
        for client in found:
            result.found.append(f"{client.name.decode(errors='replace')} at {address}")
            problem = await _kill(ask, address, client) or problem
        if problem:
            result.problems.append(f"connections of other proxies cannot be ended: {problem}")

    async with trio.open_nursery() as nursery:
        for address in primaries:
            nursery.start_soon(kill_at, address)
    if result.found:
        log.warning("strangers_killed", connections=len(result.found), first=result.found[0])
    return result


def names_of(members: Iterable[str]) -> frozenset[bytes]:
    """What the connections of these proxies are called."""
    return frozenset(connection_name(member).encode() for member in members)


def is_stranger(client: ListedClient, known: Set[bytes]) -> bool:
    """Whether a proxy of this program made the connection, and none that is known by name."""
    return is_of_this_program(client.name) and client.name not in known


async def list_clients(
    ask: Ask, address: Address, question: bytes = CLIENT_LIST, *, each: Callable[[ListedClient], None]
) -> str:
    """Hand each client of a node to ``each``, a few at a time. Why that failed, or "". Raises nothing of the node's."""
    try:
        answer = decode(await ask(address, question))
        if isinstance(answer, ServerError):
            return f"{address}: {answer}"
        if not isinstance(answer, bytes):
            return f"{address} answered CLIENT LIST with {answer!r:.80}"
        for number, client in enumerate(parse_client_list(answer)):
            if number % LINES_PER_STEP == LINES_PER_STEP - 1:
                await trio.lowlevel.checkpoint()
            each(client)
    except ClientListError as error:
        return f"{address}: {error}"
    except ASK_FAILURES as error:
        return str(error) or f"{address}: no answer in time"
    return ""


async def _clients(
    ask: Ask, address: Address, question: bytes, is_wanted: Callable[[ListedClient], bool]
) -> tuple[list[ListedClient], str]:
    """The clients of a node that are wanted, and why the list is not whole, or ""."""
    found: list[ListedClient] = []

    def look_at(client: ListedClient) -> None:
        if is_wanted(client):
            found.append(client)

    problem = await list_clients(ask, address, question, each=look_at)
    return found, problem


async def _kill(ask: Ask, address: Address, client: ListedClient) -> str:
    """End one client. Why it could not be done, or "" once it is gone."""
    try:
        answer = decode(await ask(address, command("CLIENT", "KILL", "ID", client.id)))
    except ASK_FAILURES as error:
        return str(error) or f"{address}: no answer in time"
    if isinstance(answer, int) or (
        isinstance(answer, ServerError) and str(answer).startswith("ERR No such client")
    ):
        return ""  # killed now, or gone before
    return f"{address}: {answer}"
