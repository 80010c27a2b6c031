"""Which of listed keys exist now. A slot's listing shows expired keys until the engine collects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.gather.batch import Batch
from proxy.exchange.gather.fanout import ERROR
from proxy.exchange.gather.slots import CHECKPOINT_KEYS, SlotKeys
from proxy.exchange.gather.testify import Judge
from proxy.protocol.encode import command, frame
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ConnectionLostError
from routing.snapshot_listing import clients_keys
from routing.topology import Address

TOGETHER_KEYS_MAX = 128  # keys of one EXISTS
SINGLES_MAX = 64  # keys asked for one by one at a time


@dataclass(frozen=True, slots=True)
class Candidates:
    """Keys of one slot, and the node that had them all; None when they are split between two."""

    slot: int
    address: Address | None
    keys: Sequence[bytes]
    marked: frozenset[bytes] | set[bytes] = frozenset()  # by a snapshot that is read


class KeyFaultError(Exception):
    """The keys cannot be told: a key's node did not answer, say. ``reply`` is the error for the client."""

    def __init__(self, reply: bytes) -> None:
        super().__init__(reply)
        self.reply = reply


class Keyspace(Protocol):
    """The keys of a client: those that are there now, or as of a snapshot."""

    @property
    def judge(self) -> Judge | None:
        """Which nodes may be asked; None: all."""

    def refusal(self) -> bytes | None:
        """The error reply when what was found may not be shown any more; asked before a reply goes out."""

    async def candidates(self, slot: int, listed: SlotKeys) -> Candidates:
        """The keys that a slot's listing speaks of. Raises KeyFaultError."""

    async def existing(self, found: Sequence[Candidates], type_name: bytes | None) -> list[bytes]:
        """Those candidates that exist, of the type if one is wanted. Raises KeyFaultError."""

    async def count(self, found: Sequence[Candidates]) -> int:
        """How many of the candidates DBSIZE counts. Raises KeyFaultError."""


class KeysNow:
    """The clients' keys as they are now."""

    judge = None

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def refusal(self) -> None:
        return None

    async def candidates(self, slot: int, listed: SlotKeys) -> Candidates:
        kept: list[bytes] = []
        for at in range(0, len(listed.keys), CHECKPOINT_KEYS):
            kept += clients_keys(listed.keys[at : at + CHECKPOINT_KEYS])
            if at:
                await trio.lowlevel.checkpoint()
        return Candidates(slot, listed.address, kept)

    async def existing(self, found: Sequence[Candidates], type_name: bytes | None) -> list[bytes]:
        """The node that had them all is asked: while it is the owner, it says of a key that is not there
        whether it went elsewhere. All others go by the routes, redirections followed."""
        pieces = [
            Candidates(one.slot, one.address, one.keys[at : at + TOGETHER_KEYS_MAX])
            for one in found
            for at in range(0, len(one.keys), TOGETHER_KEYS_MAX)
        ]
        if type_name is not None:
            return await self._of_type(pieces, type_name)
        questions = [(piece.address, [frame([b"EXISTS", *piece.keys])]) for piece in pieces]
        kept: list[bytes] = []
        for piece, replies in zip(pieces, await ask_settled(self._exchange, questions), strict=True):
            if replies == [b":%d\r\n" % len(piece.keys)]:
                kept += piece.keys
            elif replies != [b":0\r\n"]:
                singles = [Candidates(piece.slot, piece.address, [key]) for key in piece.keys]
                answers = await self._ask_singles(singles, b"EXISTS")
                kept += [
                    one.keys[0] for one, answer in zip(singles, answers, strict=True) if answer == b":1\r\n"
                ]
            await trio.lowlevel.checkpoint()
        return kept

    async def count(self, found: Sequence[Candidates]) -> int:
        """As the nodes count: with those that have expired and are held still."""
        return sum(len(one.keys) for one in found)

    async def _of_type(self, pieces: Sequence[Candidates], type_name: bytes) -> list[bytes]:
        wanted = b"+%b\r\n" % type_name.lower()
        singles = [Candidates(piece.slot, piece.address, [key]) for piece in pieces for key in piece.keys]
        answers = await self._ask_singles(singles, b"TYPE")
        return [one.keys[0] for one, answer in zip(singles, answers, strict=True) if answer.lower() == wanted]

    async def _ask_singles(self, singles: Sequence[Candidates], name: bytes) -> list[bytes]:
        """The replies to ``name key``, each from the key's node, wherever it is now."""
        exchange = self._exchange
        raws = [command(name, one.keys[0]) for one in singles]
        replies = await ask_settled(
            exchange, [(one.address, [raw]) for one, raw in zip(singles, raws, strict=True)]
        )
        limiter = trio.CapacityLimiter(SINGLES_MAX)
        answers = [b"" if reply is None else reply[0] for reply in replies]

        async def ask(index: int) -> None:
            async with limiter:
                answers[index] = await exchange.execute(
                    raws[index], singles[index].slot, resp=2, repeatable=True
                )

        async with trio.open_nursery() as nursery:
            for index, reply in enumerate(replies):
                if reply is None:
                    nursery.start_soon(ask, index)
        for answer in answers:
            if answer[0] == ERROR:
                raise KeyFaultError(answer)
        return answers


async def ask_settled(
    exchange: Exchange,
    questions: Sequence[tuple[Address | None, Sequence[bytes]]],
    judge: Judge | None = None,
) -> list[list[bytes] | None]:
    """The replies to each question, some request frames that belong together, of the node that it names.

    Pipelined, in the given order at each node. None for a question that must go by the routes: it names no node,
    or that one did not answer all of it.
    """
    indexes_at: dict[Address, list[int]] = {}
    for index, (address, _) in enumerate(questions):
        if address is not None:
            indexes_at.setdefault(address, []).append(index)
    answers: list[list[bytes] | None] = [None] * len(questions)

    async def ask(connection: NodeConnection, indexes: Sequence[int]) -> None:
        raws = [raw for index in indexes for raw in questions[index][1]]
        try:
            if judge is not None and not judge(connection):
                return
            found = await Batch(connection, raws).wait_replies()
        except ConnectionLostError:
            return  # asked again by the routes, which say what is wrong if it stays so
        at = 0
        for index in indexes:
            replies = found[at : at + len(questions[index][1])]
            at += len(replies)
            if not any(reply[0] == ERROR for reply in replies):
                answers[index] = replies

    async with trio.open_nursery() as nursery:
        for address, indexes in indexes_at.items():
            connection = exchange.routes.node(address, 2, Lane.READ)
            if connection is not None:
                nursery.start_soon(ask, connection, indexes)
    return answers
