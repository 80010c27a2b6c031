"""What any one node can answer for all, and what all say of their keyspace."""

from __future__ import annotations

import random

from proxy.exchange.gather.fanout import ask_each, ask_primaries, primaries
from proxy.exchange.open_requests import OpenRequests
from proxy.protocol.encode import frame
from proxy.protocol.replies import ReplyError, decode
from proxy.upstream.nodes import Lane


async def ask_any_node(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """The reply of one primary to these words, as it came; of a connected one when there is any."""
    exchange = requests.exchange
    candidates = primaries(exchange)
    connected = [a for a in candidates if exchange.routes.node(a, requests.resp, Lane.READ) is not None]
    if not (connected or candidates):
        return (await ask_primaries(requests, arguments, repeatable=True))[0].reply
    chosen = random.choice(connected or candidates)
    return (await ask_each(requests, [chosen], frame(arguments), repeatable=True))[0].reply


async def gather_keyspace(requests: OpenRequests) -> list[bytes] | None:
    """The body of each primary's INFO keyspace, or None if one could not be had.

    None too while there may be keys of snapshots, which the nodes count with the clients': INFO is asked often,
    and to list all keys each time, as DBSIZE does, would cost more than it tells.
    """
    if requests.exchange.snapshots.may_have_keys():
        return None
    answers = await ask_primaries(requests, [b"INFO", b"keyspace"], repeatable=True)
    bodies = []
    for answer in answers:
        try:
            body = decode(answer.reply)
        except ReplyError:
            return None
        if not isinstance(body, bytes):
            return None
        bodies.append(body)
    return bodies
