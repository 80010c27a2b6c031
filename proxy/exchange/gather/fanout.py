"""Asking all primaries the same thing, and what to say when some refuse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.failures import not_ready
from proxy.exchange.open_requests import OpenRequests
from proxy.protocol.encode import error, frame
from proxy.upstream.nodes import Lane
from routing.topology import Address

ERROR = 45  # "-"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one node said, errors included."""

    address: Address
    reply: bytes

    @property
    def is_error(self) -> bool:
        return self.reply[0] == ERROR


def primaries(exchange: Exchange) -> list[Address]:
    """The primaries that hold keys or are about to, and of the others those that are connected.

    A primary that lost its slots to its replica stays in the view, dead perhaps: nobody waits for it.
    """
    view = exchange.topology.view
    wanted = set(view.shard_of_slot)
    moving = {id_ for migration in view.migrations for id_ in (migration.source_id, migration.target_id)}
    return [
        shard.primary.address
        for index, shard in enumerate(view.shards)
        if index in wanted
        or shard.primary.id in moving
        or (
            not shard.primary.is_failing
            and exchange.routes.node(shard.primary.address, 2, Lane.READ) is not None
        )
    ]


async def ask_primaries(
    requests: OpenRequests, arguments: Sequence[bytes], *, repeatable: bool
) -> list[Answer]:
    """Every primary's answer to ``arguments``, at least one; an unreachable one's is NOTREADY."""
    exchange = requests.exchange
    deadline = trio.current_time() + exchange.deadline_seconds
    attempt = 0
    while not (addresses := primaries(exchange)):
        if trio.current_time() >= deadline:
            name = arguments[0].decode(errors="replace").upper()
            reply = not_ready(name, exchange.deadline_seconds, "no primary of the cluster is known")
            return [Answer(Address("", 0), reply)]
        await exchange.pause(attempt, deadline)
        attempt += 1
    return await ask_each(requests, addresses, frame(arguments), repeatable=repeatable)


async def ask_each(
    requests: OpenRequests, addresses: Iterable[Address], raw: bytes, *, repeatable: bool
) -> list[Answer]:
    """The answers of ``addresses``, in their order, asked at the same time in the client's RESP version."""
    resp = requests.resp
    addresses = list(addresses)
    replies: dict[Address, bytes] = {}

    async def ask(address: Address) -> None:
        replies[address] = await requests.exchange.execute_at(address, raw, resp=resp, repeatable=repeatable)

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(ask, address)
    return [Answer(address, replies[address]) for address in addresses]


def first_error(answers: Iterable[Answer]) -> bytes | None:
    """The reply for a question that one node left open; None when all answered."""
    for answer in answers:
        if answer.is_error:
            return answer.reply[:-2] + b" (said by node %s)\r\n" % str(answer.address).encode()
    return None


def all_done(name: str, answers: Sequence[Answer]) -> bytes:
    """The reply for a change made at all primaries: the first's, or an error that says where it was made.

    When all refuse with one voice, as for wrong words, the client sees just that.
    """
    failed = [answer for answer in answers if answer.is_error]
    if not failed or (len(failed) == len(answers) and len({answer.reply for answer in failed}) == 1):
        return answers[0].reply
    done = [str(answer.address) for answer in answers if not answer.is_error]
    text = failed[0].reply[1:-2].decode(errors="replace")
    return error(
        f"{text}; node {failed[0].address} said so, and {name} was done at {len(done)} of {len(answers)}"
        f" primaries{': ' if done else ''}{', '.join(done)}"
    )
