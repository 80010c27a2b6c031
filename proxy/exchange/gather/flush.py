"""FLUSHALL and FLUSHDB at all primaries."""

from __future__ import annotations

from proxy.exchange.gather.fanout import all_done, ask_primaries
from proxy.exchange.open_requests import OpenRequests


async def flush(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """FLUSHALL and FLUSHDB [ASYNC | SYNC].

    Done twice, because a key may be on its way: the target is flushed before the key arrives, and the source
    after it has left. After the first pass no source has an old key to send, so the second takes what
    arrived. What clients write meanwhile is concurrent with this command and may go too. Not repeated when
    a reply is lost: a flush that runs late would take what was written after it.
    """
    name = arguments[0].decode().upper()
    answers = await ask_primaries(requests, arguments, repeatable=False)
    if not any(answer.is_error for answer in answers):
        answers = await ask_primaries(requests, arguments, repeatable=False)
    return all_done(name, answers)


COMMANDS = {"FLUSHALL": flush, "FLUSHDB": flush}
