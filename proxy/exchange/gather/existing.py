"""Which of listed keys exist. A slot's listing shows expired keys until the engine collects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.gather.batch import Batch
from proxy.exchange.gather.fanout import ERROR
from proxy.protocol.encode import command, frame
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ConnectionLostError
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
    singles = [Candidates(piece.slot, piece.address, [key]) for piece in pieces for key in piece.keys]
    answers = await _ask_singles(exchange, singles, b"TYPE")
    return [one.keys[0] for one, answer in zip(singles, answers, strict=True) if answer.lower() == wanted]


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
    indexes_at: dict[Address, list[int]] = {}
    for index, (one, _) in enumerate(asked):
        if one.address is not None:
            indexes_at.setdefault(one.address, []).append(index)
    replies: list[bytes | None] = [None] * len(asked)

    async def ask(connection: NodeConnection, indexes: Sequence[int]) -> None:
        try:
            found = await Batch(connection, [asked[index][1] for index in indexes]).wait_replies()
        except ConnectionLostError:
            return  # asked again by the routes, which say what is wrong if it stays so
        for index, reply in zip(indexes, found, strict=True):
            replies[index] = None if reply[0] == ERROR else reply

    async with trio.open_nursery() as nursery:
        for address, indexes in indexes_at.items():
            connection = exchange.routes.node(address, 2, Lane.READ)
            if connection is not None:
                nursery.start_soon(ask, connection, indexes)
    return replies
