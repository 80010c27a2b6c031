"""PUBSUB: who listens, on any node. Clients may subscribe at every node, replicas too, so all are asked."""

from __future__ import annotations

from proxy.exchange.gather.fanout import Answer, ask_each, ask_primaries, first_error, primaries
from proxy.exchange.gather.nodes import ask_any_node
from proxy.exchange.open_requests import OpenRequests
from proxy.protocol.encode import array, bulk, frame, integer
from proxy.protocol.replies import decode


async def channels(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """PUBSUB CHANNELS and SHARDCHANNELS: each channel once."""
    answers = await _ask_nodes(requests, arguments)
    if (failure := first_error(answers)) is not None:
        return failure
    found = dict.fromkeys(channel for answer in answers for channel in decode(answer.reply))
    return array([bulk(channel) for channel in found])


async def subscriber_counts(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """PUBSUB NUMSUB and SHARDNUMSUB: the sums, in the order of the words."""
    answers = await _ask_nodes(requests, arguments)
    if (failure := first_error(answers)) is not None:
        return failure
    columns = zip(*(decode(answer.reply)[1::2] for answer in answers), strict=True)
    parts = []
    for channel, counts in zip(arguments[2:], columns, strict=True):
        parts += [bulk(channel), integer(sum(counts))]
    return array(parts)


async def pattern_count(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """PUBSUB NUMPAT: the sum. A pattern used at two nodes counts twice, because nodes do not name theirs."""
    answers = await _ask_nodes(requests, arguments)
    if (failure := first_error(answers)) is not None:
        return failure
    return integer(sum(decode(answer.reply) for answer in answers))


async def _ask_nodes(requests: OpenRequests, arguments: list[bytes]) -> list[Answer]:
    """What all primaries say, and all replicas that the cluster does not hold for failing."""
    exchange = requests.exchange
    addresses = primaries(exchange)
    if not addresses:
        return await ask_primaries(requests, arguments, repeatable=True)
    for shard in exchange.topology.view.shards:
        addresses += [replica.address for replica in shard.replicas if not replica.is_failing]
    return await ask_each(requests, addresses, frame(arguments), repeatable=True)


COMMANDS = {
    "PUBSUB|CHANNELS": channels,
    "PUBSUB|NUMSUB": subscriber_counts,
    "PUBSUB|NUMPAT": pattern_count,
    "PUBSUB|SHARDCHANNELS": channels,
    "PUBSUB|SHARDNUMSUB": subscriber_counts,
    "PUBSUB|HELP": ask_any_node,
}
