"""Commands that may block their connection: BLPOP and its kin, XREAD BLOCK. They run on a private connection.

There is no deadline on the reply: the command has its own timeout. A node that turns a waiting client away (the slot
moved, the node became a replica) did not run the command, so it waits on at the new owner, with its whole timeout.
"""

from __future__ import annotations

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.failures import not_ready
from proxy.upstream.connect import ConnectError
from proxy.upstream.reply_slot import ConnectionLostError
from routing.redirect import Ask, Moved, needs_attention
from routing.topology import Address


async def execute_blocking(
    exchange: Exchange, raw: bytes, hash_slot: int, writes: tuple[bytes, ...], *, resp: int, repeatable: bool
) -> bytes:
    """The reply of a command that may block. If cancelled, the connection is closed, which unblocks the node.

    ``writes``: the keys that it may write. They are preserved before each sending; while it waits at a node, a snapshot
    that is cut finds them in ``private.blocked``.
    """
    target: Address | None = None
    attempt = 0
    # For finding a node: the time of waiting at one does not count.
    deadline = trio.current_time() + exchange.deadline_seconds
    reason = "no node serves the slot"
    while True:
        asking = target is not None
        if target is None:
            primary = exchange.topology.view.primary_of(hash_slot)
            target = None if primary is None else primary.address
        if target is not None:
            try:
                connection = await exchange.private.acquire(target, resp)
            except ConnectError as error:
                reason = str(error)
            else:
                sent_at = trio.current_time()
                try:
                    if writes and exchange.preserver.needs(hash_slot, writes, resp):
                        until = sent_at + exchange.deadline_seconds
                        refused = await exchange.preserver.preserve({hash_slot: writes}, resp, until)
                        if refused is not None:
                            exchange.private.release(connection)
                            return refused
                    exchange.private.blocked[connection] = (hash_slot, writes)
                    reply = await connection.request(raw, asking=asking)
                except ConnectionLostError as lost:
                    if lost.sent and not repeatable:
                        return exchange.outcome_unknown(str(lost))
                    reason = str(lost)
                    deadline += trio.current_time() - sent_at
                except BaseException:
                    exchange.private.discard(connection)
                    raise
                else:
                    exchange.private.release(connection)
                    redirect = exchange.understand(reply, connection) if needs_attention(reply) else None
                    if redirect is None:
                        return reply
                    reason = str(redirect)
                    deadline += trio.current_time() - sent_at
                    if isinstance(redirect, Moved | Ask):
                        target = redirect.address if isinstance(redirect, Ask) else None
                        attempt += 1
                        if attempt % 4:
                            continue
                finally:
                    exchange.private.blocked.pop(connection, None)
        if trio.current_time() >= deadline:
            exchange.expired_total += 1
            return not_ready(f"slot {hash_slot}", exchange.deadline_seconds, reason)
        exchange.topology.refresh_soon()
        await exchange.pause(attempt, deadline)
        attempt += 1
        target = None
