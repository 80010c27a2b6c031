"""Asks one primary questions, and before and after them what it owns (routing.slot_listing says what for)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from proxy.exchange.exchange import Exchange
from proxy.exchange.gather.batch import Batch
from proxy.protocol.encode import command
from proxy.protocol.replies import ReplyError, ServerError, decode
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ConnectionLostError
from routing.cluster_nodes import ReportError, parse_atomic_migrations, parse_nodes
from routing.slot_listing import Testimony, Word
from routing.topology import Address

NODES = command("CLUSTER", "NODES")
JOBS = command("CLUSTER", "GETSLOTMIGRATIONS")

# Whether the engine at the other end has atomic migration. Asked once for each connection, so that engines
# without it do not count an error with each question.
_TELLS_JOBS: WeakKeyDictionary[NodeConnection, bool] = WeakKeyDictionary()


# Called with a connection in the step in which questions are queued on it, so that a check may go in front; False: they
# may not be asked there.
Judge = Callable[[NodeConnection], bool]


class UnansweredError(Exception):
    """The node gave no testimony; asking again does no harm. The message says why."""


async def testify(
    exchange: Exchange, address: Address, questions: Sequence[bytes], judge: Judge | None
) -> tuple[Testimony, list[bytes]]:
    """The node's testimony and its raw replies to ``questions`` (request frames that only read).

    Raises UnansweredError, also when the judge does not let it be asked. The caller sets the deadline.
    """
    connection = exchange.routes.node(address, 2, Lane.READ)
    if connection is None:
        raise UnansweredError(exchange.nodes.failure(address) or f"{address} takes no requests")
    try:
        words = [NODES, JOBS] if await _tells_jobs(connection) else [NODES]
        if judge is not None and not judge(connection):
            raise UnansweredError(f"the history of {address} is not judged yet")
        replies = await Batch(connection, [*words, *questions, *words]).wait_replies()
        count = len(words)
        testimony = Testimony(_word(address, *replies[:count]), _word(address, *replies[-count:]))
        return testimony, replies[count:-count]
    except (ConnectionLostError, ReplyError, ReportError) as fault:
        raise UnansweredError(f"{address}: {fault}") from fault


async def _tells_jobs(connection: NodeConnection) -> bool:
    tells = _TELLS_JOBS.get(connection)
    if tells is None:
        reply = await connection.request(JOBS)
        tells = reply[:1] != b"-"
        if not tells and b"unknown subcommand" not in reply.lower():
            raise ReplyError(reply[1:].decode(errors="replace").strip())
        _TELLS_JOBS[connection] = tells
    return tells


def _word(address: Address, nodes: bytes, jobs: bytes = b"*0\r\n") -> Word:
    """Raises ReplyError and ReportError."""
    if nodes[:1] == b"-":
        raise ReplyError(nodes[1:].decode(errors="replace").strip())
    # Its own line is the only one wanted, of maybe a thousand.
    line = next((line for line in nodes.splitlines() if b"myself" in line), b"")
    return _parse_word(address, line, jobs)


@lru_cache(maxsize=32)  # a node that remembers a thousand migrations says 400 KB of them
def _parse_word(address: Address, line: bytes, jobs: bytes) -> Word:
    """A node says the same words nearly always, and the same object says so fastest."""
    myself, _ = parse_nodes(line.decode(errors="replace"), address)
    decoded: Any = decode(jobs)
    if isinstance(decoded, ServerError):
        raise ReplyError(str(decoded))
    return Word.of(myself, parse_atomic_migrations(decoded))
