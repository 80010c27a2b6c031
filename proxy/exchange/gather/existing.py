"""Which of listed keys exist. A slot's listing shows expired keys until the engine collects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.gather.fanout import ERROR
from proxy.protocol.encode import command, frame
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ConnectionLostError, Waiter
from routing.topology import Address

TOGETHER_KEYS_MAX = 128  # keys of one EXISTS
SINGLES_MAX = 64  # keys asked for one by one at a time


@dataclass(frozen=True, slots=True)
class Candidates:
    """Keys of one slot, and the node that had them all; None when they are split between two."""

    slot: int
    address: Address | None
    keys: Sequence[bytes]


class KeyFaultError(Exception):
    """A key's node did not answer. ``reply`` is the error for the client."""

    def __init__(self, reply: bytes) -> None:
        super().__init__(reply)
        self.reply = reply


async def existing(exchange: Exchange, found: Sequence[Candidates], type_name: bytes | None) -> list[bytes]:
    """The keys that exist, of the type if one is wanted. Raises KeyFaultError.

    The node that had them all is asked: while it is the owner, it says of a key that is not there whether it
    went elsewhere. All others go by the routes, redirections followed.
    """
    pieces = [
        Candidates(one.slot, one.address, one.keys[at : at + TOGETHER_KEYS_MAX])
        for one in found
        for at in range(0, len(one.keys), TOGETHER_KEYS_MAX)
    ]
    if type_name is not None:
        return await _of_type(exchange, pieces, type_name)
    replies = await _ask_settled(exchange, [(piece, frame([b"EXISTS", *piece.keys])) for piece in pieces])
    kept: list[bytes] = []
    for piece, reply in zip(pieces, replies, strict=True):
        if reply == b":%d\r\n" % len(piece.keys):
            kept += piece.keys
        elif reply is None or reply != b":0\r\n":
            singles = [Candidates(piece.slot, piece.address, [key]) for key in piece.keys]
            answers = await _ask_singles(exchange, singles, b"EXISTS")
            kept += [one.keys[0] for one, answer in zip(singles, answers, strict=True) if answer == b":1\r\n"]
        await trio.lowlevel.checkpoint()
    return kept


async def _of_type(exchange: Exchange, pieces: Sequence[Candidates], type_name: bytes) -> list[bytes]:
    wanted = b"+%b\r\n" % type_name.lower()
    kept = []
    for piece in pieces:
        singles = [Candidates(piece.slot, piece.address, [key]) for key in piece.keys]
        answers = await _ask_singles(exchange, singles, b"TYPE")
        kept += [
            one.keys[0] for one, answer in zip(singles, answers, strict=True) if answer.lower() == wanted
        ]
    return kept


async def _ask_singles(exchange: Exchange, singles: Sequence[Candidates], name: bytes) -> list[bytes]:
    """The replies to ``name key``, each from the key's node, wherever it is now."""
    raws = [command(name, one.keys[0]) for one in singles]
    replies = await _ask_settled(exchange, list(zip(singles, raws, strict=True)))
    limiter = trio.CapacityLimiter(SINGLES_MAX)
    answers = [b"" if reply is None else reply for reply in replies]

    async def ask(index: int) -> None:
        async with limiter:
            answers[index] = await exchange.execute(raws[index], singles[index].slot, resp=2, repeatable=True)

    async with trio.open_nursery() as nursery:
        for index, reply in enumerate(replies):
            if reply is None:
                nursery.start_soon(ask, index)
    for answer in answers:
        if answer[0] == ERROR:
            raise KeyFaultError(answer)
    return answers


async def _ask_settled(exchange: Exchange, asked: Sequence[tuple[Candidates, bytes]]) -> list[bytes | None]:
    """The replies of the nodes that had the keys, pipelined; None for what must go by the routes."""
    waiters: list[Waiter | None] = []
    for one, raw in asked:
        connection = None if one.address is None else exchange.routes.node(one.address, 2, Lane.READ)
        waiter = None
        if connection is not None:
            waiter = Waiter(raw)
            connection.queue(waiter)
        waiters.append(waiter)
    replies: list[bytes | None] = []
    for waiter in waiters:
        reply = None
        if waiter is not None:
            try:
                reply = await waiter.wait_reply()
            except ConnectionLostError:
                reply = None  # asked again by the routes, which say what is wrong if it stays so
        replies.append(None if reply is None or reply[0] == ERROR else reply)
    return replies
