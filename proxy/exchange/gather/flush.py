"""FLUSHALL and FLUSHDB at all primaries, unless a snapshot is open: they would take what it has kept."""

from __future__ import annotations

from proxy.exchange.gather.fanout import all_done, ask_primaries
from proxy.exchange.open_requests import OpenRequests
from proxy.protocol.encode import error


async def flush(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """FLUSHALL and FLUSHDB [ASYNC | SYNC].

    Done twice, because a key may be on its way: the target is flushed before the key arrives, and the source
    after it has left. After the first pass no source has an old key to send, so the second takes what
    arrived. What clients write meanwhile is concurrent with this command and may go too. Not repeated when
    a reply is lost: a flush that runs late would take what was written after it.

    No snapshot is cut from the check until all nodes have answered, so that it is before a cut as a whole. Of one
    whose reply never comes the barrier takes care, as of any write.
    """
    name = arguments[0].decode().upper()
    snapshots = requests.exchange.snapshots
    async with snapshots.begin_multi(requests):
        if ids := snapshots.chain.ids:
            return _snapshot_open(name, ids)
        answers = await ask_primaries(requests, arguments, repeatable=False)
        if not any(answer.is_error for answer in answers):
            answers = await ask_primaries(requests, arguments, repeatable=False)
        return all_done(name, answers)


def _snapshot_open(name: str, ids: tuple[int, ...]) -> bytes:
    listed = ", ".join(map(str, ids))
    return error(
        f"SNAPSHOTOPEN {name} did not run: it would take what was kept for snapshot{'s' * (len(ids) > 1)} {listed};"
        " close what is open (STEADY.SNAPSHOT LIST, STEADY.SNAPSHOT CLOSE id) and send it again"
    )


COMMANDS = {"FLUSHALL": flush, "FLUSHDB": flush}
